# shellcheck shell=sh
kernel-install remove '{{ release }}'
