#!/usr/bin/env bash
# Runs inside the guest of the emulated host, and tells over a virtio-serial port of its own what it sees.
#
# Env: USES       1: the devices that were passed through are used, too; else the guest only says what it is, and
#                 powers off at the press of the power button, for which nobody else is there then
#      ECHOES     how many packets will come through the virtual function
#      FAR        address of the virtual function
#      MASKED     units that must be masked
#      INTERRUPTS how many interrupts the device that was given whole is asked for
#      ISOLATED   the vCPU that they go to, and that is measured
#      PLACE      what the guest is called in a measurement
#      SABOTAGE   what is broken before it is told, or nothing
# In:  /run/virt-rt-tools, the lab's disk for guests, with this script, the driver irqlat and its program
# Out: one line per answer, "NAME EXIT-STATUS BASE64-OF-THE-OUTPUT"; the last line is "end SHA256", over all before it.
#      Over a second port goes a tar of what there is to say at length. Nothing is judged here.
set -uo pipefail

tools=/run/virt-rt-tools
# shellcheck disable=SC2034  # for what is sourced
MEASURE=$tools/virt-rt-measure
# Twice emulated, each process costs a noticeable time: where bash can do it alone, it does.
answers=

# port NAME: the device of a virtio-serial port, which has no name without udev.
port() {
  local entry name
  for entry in /sys/class/virtio-ports/*; do
    if read -r name <"$entry/name" && [[ $name == "$1" ]]; then found=/dev/${entry##*/}; fi
  done
}

# answer NAME COMMAND...
answer() {
  local name=$1 status=0 text line
  shift
  text=$("$@" 2>&1) || status=$?
  line="$name $status $(base64 -w 0 <<<"$text")"$'\n'
  answers+=$line
  printf '%s' "$line" >&3
}

# line FILE: the first one.
line() {
  local text
  read -r text <"$1" || [[ -n $text ]] && printf '%s\n' "$text"
}

# pci: vendor:device of each function.
pci() {
  local directory
  for directory in /sys/bus/pci/devices/*; do
    printf '%s:%s\n' "$(<"$directory/vendor")" "$(<"$directory/device")"
  done
}

firmware() { if [[ -d /sys/firmware/efi ]]; then echo uefi; else echo none; fi; }

# function_of ID: the directory of the PCI function with that vendor:device.
function_of() {
  local directory
  for directory in /sys/bus/pci/devices/*; do
    [[ $(<"$directory/vendor"):$(<"$directory/device") != "$1" ]] || echo "$directory"
  done
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

# The virtual function's interface: whether it is there, has a link, has had all packets.
has_interface() { [[ -d $function/net ]] && interface=$(echo "$function/net"/*) && [[ -d $interface ]]; }
has_link() { [[ $(cat "$interface/carrier" 2>/dev/null) == 1 ]]; }
count() { read -r "$1" <"$interface/statistics/$1"; }
served() {
  local rx_packets tx_packets
  count rx_packets && count tx_packets && ((rx_packets >= rx_before + ECHOES && tx_packets >= tx_before + ECHOES))
}

# raise: give the virtual function its address, and wait for its link.
raise() {
  function=$(function_of 0x8086:0x10ca)
  # udev does that, where it runs.
  [[ -e $function/driver ]] || modprobe igbvf
  within 60 has_interface || { echo "no network interface in $function" && return 1; }
  ip address add "$FAR/24" dev "${interface##*/}" && ip link set "${interface##*/}" up && within 60 has_link || return
  echo "driver=$(basename "$(readlink "$function/driver")") carrier=$(<"$interface/carrier")"
}

# interrupts NAME: how many there were, on all CPUs and of all vectors whose name begins so.
interrupts() {
  local text sum=0
  local -a words
  while read -ra words; do
    [[ ${words[-1]} == "$1"* ]] || continue
    for text in "${words[@]:1}"; do
      [[ $text =~ ^[0-9]+$ ]] || break
      ((sum += text))
    done
  done </proc/interrupts
  echo "$sum"
}

# counters: of the virtual function: packets in and out, and interrupts.
counters() {
  local rx_packets tx_packets
  count rx_packets && count tx_packets || return
  echo "rx=$rx_packets tx=$tx_packets interrupts=$(interrupts "${interface##*/}")"
}

# use_function: the virtual function, with packets of the host.
use_function() {
  local rx_before tx_before
  # Not in a subshell: what it finds is needed later.
  raise >"$work/raised" 2>&1
  answer vf cat "$work/raised"
  [[ -n ${interface:-} ]] || return
  count rx_packets && count tx_packets && rx_before=$rx_packets tx_before=$tx_packets
  answer vf_before counters
  answer vf_served within 120 served
  answer vf_after counters
}

# breaking NAME: whether that is to be broken.
breaking() { [[ " $SABOTAGE " == *" $1 "* ]]; }

# use_device: the device that was given whole, with a driver that is not in the kernel's tree.
use_device() {
  local release
  release=$(uname -r)
  ! breaking driver-missing || mount -t tmpfs none "$tools/usr/lib/modules"
  answer irqlat_loaded insmod "$tools/usr/lib/modules/$release/updates/irqlat_edu.ko"
  answer irqlat_before interrupts irqlat
  answer irqlat_run "$tools/usr/libexec/virt-rt/drivers/$release/irqlat/irqlat" --cpu "$ISOLATED" \
    --samples "$INTERRUPTS" --interval 2000 --json "$work/irqlat.json"
  answer irqlat cat "$work/irqlat.json"
  answer irqlat_after interrupts irqlat
}

# measure: as the request says, as soon as the host makes load.
measure() {
  read -r -t 600 _ <"$1" && python3 "$MEASURE" run --request "$tools/request.json" --record "$work/records/measurement"
}

# send: what there is to say at length, and its sha256.
send() {
  local digest
  dmesg >"$work/records/dmesg" && cp /proc/interrupts "$work/records" &&
    tar -cf "$work/records.tar" -C "$work/records" . && cat "$work/records.tar" >"$found" || return
  digest=$(sha256sum <"$work/records.tar") && echo "${digest%% *}"
}

# open_button: have what the power button says from now on at file descriptor 4.
open_button() {
  local name entry
  for entry in /sys/class/input/event*; do
    if read -r name <"$entry/device/name" && [[ $name == 'Power Button' ]]; then
      exec 4<"/dev/input/${entry##*/}" && return
    fi
  done
  return 1
}

found=
port virt-rt.stack
exec 3>"$found"
! breaking unit-unmasked || systemctl unmask "${MASKED%% *}" >/dev/null 2>&1

answer version uname -v
answer release uname -r
answer cmdline line /proc/cmdline
answer hypervisor systemd-detect-virt
answer firmware firmware
answer pci pci
answer isolated line /sys/devices/system/cpu/isolated
# shellcheck disable=SC2086  # several
answer masked systemctl is-enabled $MASKED

if ((USES)); then
  work=$(mktemp -d /run/virt-rt-stack.XXXXXX)
  mkdir "$work/records"
  use_function
  use_device
  port virt-rt.go
  answer measured measure "$found"
  # shellcheck disable=SC1091  # not in the checkout
  . "$tools/late"
  # Far above what twice emulated is late by itself, and below how long the host disturbs.
  be_late hog 1000000
  be_late interrupt 700000
  port virt-rt.records
  answer sent send
else
  # Before the last answer: then it may be pressed.
  open_button || exit 1
fi

digest=$(printf '%s' "$answers" | sha256sum)
printf 'end %s\n' "${digest%% *}" >&3

if ((!USES)); then
  head -c 24 <&4 >/dev/null
  systemctl poweroff --force --force
fi
