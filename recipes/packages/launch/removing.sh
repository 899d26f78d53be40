# shellcheck shell=sh
if [ -d /run/systemd/system ]; then
  systemctl stop "virt-rt-guest-{{ guest }}.service"
fi
if command -v systemctl >/dev/null; then
  systemctl --no-reload disable "virt-rt-guest-{{ guest }}.service"
fi
