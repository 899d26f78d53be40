# shellcheck shell=sh
# Left when the program that made them was removed before the kernel was, or made them anew in between.
rm -f '/boot/initrd.img-{{ release }}' '/boot/initrd.img-{{ release }}.bak' '/boot/initrd.img-{{ release }}.old-dkms' \
  '/var/lib/initramfs-tools/{{ release }}'
