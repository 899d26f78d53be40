# shellcheck shell=sh
# What kernel-install put beside the boot loader; it removes most of that itself, depending on the boot loader.
rm -f '/boot/vmlinuz-{{ release }}' '/boot/.vmlinuz-{{ release }}.hmac' '/boot/System.map-{{ release }}' \
  '/boot/config-{{ release }}' '/boot/symvers-{{ release }}.gz' '/boot/initramfs-{{ release }}.img' \
  '/boot/initramfs-{{ release }}kdump.img'
