#!/usr/bin/env bash
# Runs inside the guest of the emulated host, and tells over a virtio-serial port of its own what it sees.
#
# Out: one line per answer, "NAME EXIT-STATUS BASE64-OF-THE-OUTPUT"; the last line is "end SHA256", over all before it.
#      Nothing is judged here.
set -uo pipefail

exec 3>/dev/virtio-ports/virt-rt.stack
work=$(mktemp -d /run/virt-rt-stack.XXXXXX)

# answer NAME COMMAND...
answer() {
  local name=$1 status=0
  shift
  "$@" >"$work/answer" 2>&1 || status=$?
  printf '%s %d %s\n' "$name" "$status" "$(base64 -w 0 "$work/answer")" | tee -a "$work/answers" >&3
}

# pci: vendor:device of each function.
pci() {
  local directory
  for directory in /sys/bus/pci/devices/*; do
    printf '%s:%s\n' "$(<"$directory/vendor")" "$(<"$directory/device")"
  done
}

answer version uname -v
answer release uname -r
answer cmdline cat /proc/cmdline
answer hypervisor systemd-detect-virt
answer pci pci
answer isolated cat /sys/devices/system/cpu/isolated

digest=$(sha256sum <"$work/answers")
printf 'end %s\n' "${digest%% *}" >&3
