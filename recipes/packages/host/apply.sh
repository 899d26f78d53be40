# shellcheck shell=sh
# The boot entries follow the kernel that this package names.
virt-rt-tuning package-apply
