# shellcheck shell=sh
# Only the older version knows which parameters it gave to the boot entries.
if command -v virt-rt-tuning >/dev/null; then
  virt-rt-tuning package-upgrade || echo "virt-rt: boot entries may keep parameters of the older version" >&2
fi
