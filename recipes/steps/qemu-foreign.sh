#!/usr/bin/env bash
# Runs a qemu of another architecture under user-mode emulation. That has no seccomp, so -sandbox is left out.
#
# usage: qemu-foreign.sh EMULATOR PROGRAM ARGUMENT...
set -euo pipefail

words=()
while (($#)); do
  if [[ $1 == -sandbox ]]; then
    shift 2
    continue
  fi
  words+=("$1")
  shift
done
exec "${words[@]}"
