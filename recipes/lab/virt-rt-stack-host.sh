#!/usr/bin/env bash
# Runs inside the lab's emulated host, at each of its boots: starts a guest in every way there is, checks it, disturbs
# it, ends it in every way, has the host come back after a reboot, and tells over a virtio-serial port what it saw.
#
# Env: BUILT            what was built for the platform, laid out as in artifacts/
#      GUEST            the guest's name
#      RT_VCPU, RT_CPU  a vCPU of it, which is moved by hand, and its CPU in the plan
#      SPARE_CPU        the CPU it is moved to, which the plan gives to nobody
#      REST_CPUS        CPUs of qemu's other threads in the plan
#      PHYSICAL         PCI address of the function that has virtual ones, the first of which is the guest's
#      FUNCTION         PCI address of the device that the guest is given whole
#      SPINNING         PCI address of a device whose interrupts disturb
#      BOOT_SECONDS     how long the guest may take to boot
#      ECHOES           how many packets are sent through the virtual function, and have to come back
#      NEAR, FAR        addresses of the physical function and of the guest's virtual one
#      SABOTAGE         what is broken before it is judged (see docs/stack-proof.md), or nothing
# In:  the lab's disk, mounted at $LAB: `guest.conf` with the variables of a start. Its `state/` outlives a reboot:
#      `part` says what comes next, `answers` what was told so far.
# Out: one line per answer, "NAME EXIT-STATUS BASE64-OF-THE-OUTPUT"; the last line is "end SHA256", over all before it.
#      Directories go over a port of their own, each as "NAME BYTES SHA256", a newline, and a tar of that size.
#      Nothing is judged here: an answer that is missing or wrong is for pipeline/stackgate.py to refuse.
set -uo pipefail

exec 3>/dev/virtio-ports/virt-rt.stack 4>/dev/virtio-ports/virt-rt.records
work=$(mktemp -d /run/virt-rt-stack.XXXXXX)
mkdir "$work/records"
# What the guest says, and the directories it sends: see the wrapper of its qemu.
told=/run/virt-rt-stack/told sent=/run/virt-rt-stack/sent
state=$LAB/state
launch=$BUILT/launch/$GUEST
unit=virt-rt-guest-$GUEST.service
pci=/sys/bus/pci/devices

# answer NAME COMMAND...
answer() {
  local name=$1 status=0 line
  shift
  "$@" >"$work/answer" 2>&1 || status=$?
  line="$name $status $(base64 -w 0 "$work/answer")"
  echo "$line" >>"$state/answers"
  echo "$line" >&3
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
    numvfs=
    [[ ! -e $pci/$address/sriov_numvfs ]] || numvfs=$(<"$pci/$address/sriov_numvfs")
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

# start SCRIPT: the guest, in the background.
start() {
  : >"$told"
  : >"$sent"
  "$launch/$1" </dev/null >"$work/messages" 2>&1 &
  launcher=$!
}

# The guest's qemu, and a vCPU's thread of it.
qemu() { pgrep -f "name $GUEST,debug-threads=on"; }
vcpu() { grep -lx "CPU $RT_VCPU/KVM" "/proc/$(qemu)/task"/*/comm | sed 's,.*/task/\([0-9]*\)/.*,\1,'; }

# gone: whether the guest is; without a process, since it is asked again and again.
gone() {
  if [[ -n ${launcher:-} ]]; then
    ! kill -0 "$launcher" 2>/dev/null
  else
    ! { read -r _ <"/sys/fs/cgroup/system.slice/$unit/cgroup.procs"; } 2>/dev/null
  fi
}

# has_told NAME: whether the guest has given that answer.
has_told() {
  local line
  while read -r line; do
    [[ $line != "$1 "* ]] || return 0
  done <"$told"
  return 1
}

# Whether the guest has begun to answer, waits for packets, has told all; or never will.
speaks() { [[ -s $told ]] || gone; }
listens() { has_told vf_before || ready; }
ready() { has_told end || gone; }
no_qemu() { ! qemu; }
audit() { virt-rt-check audit --json "$GUEST"; }
boot_id() { cat /proc/sys/kernel/random/boot_id; }

# traffic: packets from the physical function to the guest's virtual one, and back.
traffic() {
  local -a net=("$pci/$PHYSICAL/net"/*)
  ip address replace "$NEAR/24" dev "${net[0]##*/}" || return
  python3 "$LAB/echo" "${net[0]##*/}" "$NEAR" "$FAR" "$ECHOES"
}

# installed: sha256 of what the guest is started from.
installed() { (cd "$BUILT" && sha256sum kernel/guest/bzImage "image/$GUEST/disk.qcow2"); }

# Whether the guest has used its devices, the host makes load, the guest has measured; how the host's measuring ended.
used() { has_told irqlat_after || ready; }
guest_measured() { has_told measured || ready; }
loaded() { compgen -G "$work/records/measurement/*-load" >/dev/null; }
measured() {
  local status=0
  wait "$measuring" || status=$?
  cat "$work/measuring"
  return "$status"
}

# send NAME FILE: a tar to the lab.
send() {
  local size digest
  size=$(stat -c %s "$2") && digest=$(sha256sum <"$2") || return
  printf '%s %d %s\n' "$1" "$size" "${digest%% *}" >&4 && cat "$2" >&4
}

# send_own: what the host has to say at length.
send_own() {
  dmesg >"$work/records/dmesg" && cp /proc/interrupts "$work/messages" "$work/records" &&
    # A trace is tens of megabytes of text; what it was needed for is beside it.
    rm -f "$work"/records/late-*/trace.txt &&
    tar -cf "$work/records.tar" -C "$work/records" . && send "$1" "$work/records.tar"
}

# breaking NAME: whether that is to be broken.
breaking() { [[ " $SABOTAGE " == *" $1 "* ]]; }

# finish COMMAND...: the last words of this boot.
finish() {
  sync -f "$state"
  exec "$@"
}

first_boot() {
  answer running systemctl is-system-running --wait
  answer failed systemctl list-units --failed --no-legend --plain
  answer version uname -v
  answer release uname -r
  answer cmdline cat /proc/cmdline
  answer boot_id boot_id
  answer installed installed
  answer preflight virt-rt-check preflight --json
  answer devices_before devices

  # Started by the script that takes the kernel beside the disk; all of its units. The guest's console goes to the lab
  # at once, so that it is there whatever happens here. Each character of it costs some ten thousand instructions twice
  # emulated, so the guest is asked not to say much.
  CMDLINE_EXTRA="quiet systemd.show_status=no" start kvmqemu.sh
  answer booted within "$BOOT_SECONDS" speaks
  answer devices_running devices
  ! breaking vcpu-unpinned || taskset -pc 0-63 "$(vcpu)" >/dev/null
  # The launch script puts such a thread back within a second: it must not see it.
  ! breaking emulator-on-rt-cpu || { kill -STOP "$launcher" && taskset -pc "$RT_CPU" "$(qemu)"; } >/dev/null
  answer audit audit
  ! breaking vcpu-unpinned || taskset -pc "$RT_CPU" "$(vcpu)" >/dev/null
  ! breaking emulator-on-rt-cpu || { taskset -pc "$REST_CPUS" "$(qemu)" && kill -CONT "$launcher"; } >/dev/null
  answer move taskset -pc "$SPARE_CPU" "$(vcpu)"
  answer audit_moved audit
  answer move_back taskset -pc "$RT_CPU" "$(vcpu)"
  answer audit_back audit
  answer listens within "$BOOT_SECONDS" listens
  answer traffic traffic
  answer used within "$BOOT_SECONDS" used

  # The host makes load while the guest measures; then the guest is made late, and the host's trace says by whom.
  ! breaking cyclictest-missing || mount --bind /dev/null /usr/bin/cyclictest
  virt-rt-measure run --request "$LAB/request.json" --record "$work/records/measurement" >"$work/measuring" 2>&1 &
  measuring=$!
  answer loaded within 180 loaded
  ! breaking clock-wrong || date --set="+1 hour" >/dev/null
  echo go >/run/virt-rt-stack/go.in
  answer guest_measured within "$BOOT_SECONDS" guest_measured
  answer late_hog late hog "$work/records/late-hog"
  answer late_interrupt late interrupt "$work/records/late-interrupt"
  answer finished within "$BOOT_SECONDS" ready
  answer guest cat "$told"
  answer host_measured measured
  kill -TERM "$launcher"
  answer ended within 120 gone
  answer status wait "$launcher"
  answer messages cat "$work/messages"
  answer qemu_after no_qemu
  ! breaking vf-not-restored || echo 1 >"$pci/$PHYSICAL/sriov_numvfs"
  answer devices_after devices
  ! breaking vf-not-restored || echo 0 >"$pci/$PHYSICAL/sriov_numvfs"
  answer records_guest send "guest-$GUEST" "$sent"
  answer records_host send_own host

  # Started by the script that takes the kernel inside the disk, with a few units only; killed.
  start kvmqemu-rfs.sh
  answer inside_booted within "$BOOT_SECONDS" speaks
  answer inside_audit audit
  answer inside_devices devices
  answer inside_finished within 60 ready
  answer inside_guest cat "$told"
  kill -KILL "$launcher"
  wait "$launcher"
  answer inside_messages cat "$work/messages"
  answer cleanup_running "$launch/kvmqemu-rfs.sh" --cleanup
  answer kill_qemu pkill -KILL -f "name $GUEST,debug-threads=on"
  answer qemu_killed within 20 no_qemu
  answer devices_killed devices
  answer cleanup "$launch/kvmqemu-rfs.sh" --cleanup
  answer devices_cleaned devices
  answer cleanup_again "$launch/kvmqemu-rfs.sh" --cleanup
  answer devices_cleaned_again devices

  # It is to come back by itself.
  answer enable systemctl enable "$unit"
  # Without the mark this boot would be repeated for ever.
  if echo second_boot >"$state/part"; then finish systemctl reboot; else finish systemctl poweroff; fi
}

second_boot() {
  answer again_running systemctl is-system-running --wait
  answer again_failed systemctl list-units --failed --no-legend --plain
  answer again_boot_id boot_id
  answer service_active systemctl is-active "$unit"
  answer service_booted within "$BOOT_SECONDS" speaks
  answer service_audit audit
  answer service_devices devices
  answer service_finished within 60 ready
  answer service_guest cat "$told"
  answer service_stop timeout 120 systemctl stop "$unit"
  answer service_result systemctl show --property=Result,ExecMainStatus "$unit"
  answer service_messages journalctl --no-pager --no-hostname --boot --unit="$unit" --output=cat
  answer service_qemu no_qemu
  answer service_devices_after devices

  digest=$(sha256sum <"$state/answers")
  printf 'end %s\n' "${digest%% *}" >&3
  finish systemctl poweroff
}

# shellcheck disable=SC2034  # for what is sourced
CPU=$RT_CPU OTHER_CPU=${REST_CPUS%%[,-]*} DISTURB=$LAB/disturb
# shellcheck disable=SC1091  # not in the checkout
. "$LAB/late"
# shellcheck disable=SC1091
set -a && . "$LAB/guest.conf" && set +a
export STATE_DIR=$work/state

part=$(<"$state/part")
case $part in
  first_boot | second_boot) "$part" ;;
  *) echo "virt-rt-stack: no part $part" >&2 && finish systemctl poweroff ;;
esac
