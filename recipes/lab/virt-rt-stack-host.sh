#!/usr/bin/env bash
# Runs inside the lab's emulated host: starts a guest by its launch script, checks it, disturbs it, ends it in two ways,
# and tells over a virtio-serial port what it saw.
#
# Env: BUILT         what was built for the platform, laid out as in artifacts/
#      GUEST         the guest's name
#      VCPU          a vCPU of it, which is moved by hand
#      OTHER_CPU     the CPU it is moved to, which the plan gives to nobody
#      PHYSICAL      PCI address of the function that has virtual ones, of which the guest is given the first
#      FUNCTION      PCI address of the device that the guest is given whole
#      BOOT_SECONDS  how long the guest may take to boot
# Out: one line per answer, "NAME EXIT-STATUS BASE64-OF-THE-OUTPUT"; the last line is "end SHA256", over all before it.
#      Nothing is judged here: an answer that is missing or wrong is for pipeline/stackgate.py to refuse.
set -uo pipefail

exec 3>/dev/virtio-ports/virt-rt.stack
work=$(mktemp -d /run/virt-rt-stack.XXXXXX)
script=$BUILT/launch/$GUEST/kvmqemu.sh
pci=/sys/bus/pci/devices

# answer NAME COMMAND...
answer() {
  local name=$1 status=0
  shift
  "$@" >"$work/answer" 2>&1 || status=$?
  printf '%s %d %s\n' "$name" "$status" "$(base64 -w 0 "$work/answer")" | tee -a "$work/answers" >&3
  echo "virt-rt-stack: $name $status"
}

# within SECONDS COMMAND...: whether it succeeds in time.
within() {
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < end)) || return 1
    sleep 0.5
  done
}

# functions ADDRESS...: what each is, who drives it, and whom it was reserved for.
functions() {
  local address driver numvfs
  for address; do
    driver=$(readlink "$pci/$address/driver") || driver=none
    numvfs=$(cat "$pci/$address/sriov_numvfs" 2>/dev/null) || numvfs=
    printf '%s %s:%s driver=%s override=%s%s\n' "$address" "$(<"$pci/$address/vendor")" "$(<"$pci/$address/device")" \
      "${driver##*/}" "$(<"$pci/$address/driver_override")" "${numvfs:+ numvfs=$numvfs}"
  done
}

# devices: the two devices of the board, and the virtual functions that are there.
devices() {
  local link
  functions "$PHYSICAL" "$FUNCTION"
  for link in "$pci/$PHYSICAL"/virtfn*; do
    [[ ! -L $link ]] || functions "$(basename -- "$(readlink "$link")")"
  done
}

# start: the guest, in the background; it answers into $work/guest.
start() {
  : >"$work/guest"
  "$script" -- -smbios "type=11,path=/usr/libexec/virt-rt-stack/unit" \
    -smbios "type=11,path=/usr/libexec/virt-rt-stack/dropin" -smbios "type=11,path=/usr/libexec/virt-rt-stack/guest" \
    -device virtio-serial-pci -chardev "file,id=stack,path=$work/guest" \
    -device virtserialport,chardev=stack,name=virt-rt.stack </dev/null >"$work/messages" 2>&1 &
  launcher=$!
}

# The guest's qemu, and a vCPU's thread of it.
qemu() { pgrep -f "name $GUEST,debug-threads=on"; }
vcpu() { grep -lx "CPU $VCPU/KVM" "/proc/$(qemu)/task"/*/comm | sed 's,.*/task/\([0-9]*\)/.*,\1,'; }

gone() { ! kill -0 "$launcher" 2>/dev/null; }
told() { gone || grep -q '^end ' "$work/guest"; }
runs() { gone || virt-rt-check audit "$GUEST" >/dev/null; }
no_qemu() { ! qemu; }

answer running systemctl is-system-running --wait
answer failed systemctl list-units --failed --no-legend --plain
answer version uname -v
answer release uname -r
answer cmdline cat /proc/cmdline
answer preflight virt-rt-check preflight --json
answer devices_before devices

# The guest's console goes to the lab at once, so that it is there whatever happens here. Each character of it costs
# some ten thousand instructions twice emulated, so the guest is asked not to say much.
export CONSOLE=/dev/virtio-ports/virt-rt.console STATE_DIR=$work/state SNAPSHOT=1 SSH_PORT='' QMP=''
export CMDLINE_EXTRA="quiet systemd.show_status=no"

start
answer booted within "$BOOT_SECONDS" told
answer guest cat "$work/guest"
answer devices_running devices
answer audit virt-rt-check audit --json "$GUEST"
was=$(taskset -pc "$(vcpu)" | sed 's/.*: //')
answer move taskset -pc "$OTHER_CPU" "$(vcpu)"
answer audit_moved virt-rt-check audit --json "$GUEST"
answer move_back taskset -pc "$was" "$(vcpu)"
answer audit_back virt-rt-check audit --json "$GUEST"
kill -TERM "$launcher"
answer ended within 120 gone
answer status wait "$launcher"
answer messages cat "$work/messages"
answer qemu_after no_qemu
answer devices_after devices

start
answer again within "$BOOT_SECONDS" runs
answer devices_again devices
kill -KILL "$launcher"
wait "$launcher"
answer cleanup_running "$script" --cleanup
answer kill_qemu pkill -KILL -f "name $GUEST,debug-threads=on"
answer qemu_killed within 20 no_qemu
answer devices_killed devices
answer cleanup "$script" --cleanup
answer devices_cleaned devices
answer cleanup_again "$script" --cleanup
answer devices_cleaned_again devices

digest=$(sha256sum <"$work/answers")
printf 'end %s\n' "${digest%% *}" >&3
