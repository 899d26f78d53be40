# shellcheck shell=sh
# After the whole transaction: the tools that this needs, and their configuration, are then as they will stay.
depmod '{{ release }}'
kernel-install add '{{ release }}' '/usr/lib/modules/{{ release }}/vmlinuz'
