# shellcheck shell=sh
virt-rt-tuning package-apply
