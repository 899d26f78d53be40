# shellcheck shell=sh
# What the guest wrote, and its console.
rm -rf "/var/lib/virt-rt/{{ platform }}/{{ guest }}" "/var/log/virt-rt/{{ guest }}.log"
rmdir --ignore-fail-on-non-empty "/var/lib/virt-rt/{{ platform }}" /var/lib/virt-rt /var/log/virt-rt 2>/dev/null || true
