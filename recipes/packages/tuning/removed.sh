# shellcheck shell=sh
# Without the files, services are as they were before, and so is the boot menu.
if [ -d /run/systemd/system ]; then
  systemctl daemon-reload || true
fi
if [ -e /boot/grub/grub.cfg ] && command -v update-grub >/dev/null; then
  update-grub || echo "virt-rt: update-grub failed: run it again, or the machine starts with isolated CPUs" >&2
fi
