# shellcheck shell=sh
virt-rt-tuning package-forget || echo "virt-rt: look at grubby --info=DEFAULT for what starts the next time" >&2
