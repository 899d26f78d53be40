# shellcheck shell=sh
# Which kernel started before, for when this package goes; the new one is about to become the default.
virt-rt-tuning package-note || echo "virt-rt: the boot entry that was the default is not remembered" >&2
