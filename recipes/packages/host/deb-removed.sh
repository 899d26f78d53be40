# shellcheck shell=sh
# Without the name of a kernel, the boot menu begins with grub's choice again.
if [ -e /boot/grub/grub.cfg ] && command -v update-grub >/dev/null; then
  update-grub || echo "virt-rt: update-grub failed: run it again" >&2
fi
