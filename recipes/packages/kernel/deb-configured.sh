# shellcheck shell=sh
depmod '{{ release }}'
# A kernel that unpacks no compressed archive has no use for an initramfs; hooks make one unless INITRD says No.
if grep -q '^CONFIG_RD_[A-Z0-9]*=y' '/boot/config-{{ release }}'; then INITRD=Yes; else INITRD=No; fi
export INITRD
