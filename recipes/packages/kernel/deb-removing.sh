# shellcheck shell=sh
# Asks before the kernel that runs is removed; of linux-base, which a machine may do without.
if command -v linux-check-removal >/dev/null; then
  linux-check-removal '{{ release }}'
fi
