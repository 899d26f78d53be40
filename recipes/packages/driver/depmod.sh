# shellcheck shell=sh
# The kernel may go together with its drivers.
if [ -e '/usr/lib/modules/{{ release }}/modules.order' ]; then
  depmod '{{ release }}'
fi
