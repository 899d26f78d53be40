# shellcheck shell=sh
virt-rt-tuning package-remove
