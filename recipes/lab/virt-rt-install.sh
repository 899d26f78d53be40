#!/usr/bin/env bash
# Runs inside the lab's emulated host, which runs Debian's kernel: installs our packages from their signed repository with
# the commands of docs/deploy-debian.md, and tells over a virtio-serial port what apt, dpkg and GRUB say.
#
# Env: SOURCES    address of the repository's .sources file
#      PACKAGES   names of the packages to install, separated by spaces
#      ADDRESS    address of this machine, with its prefix length
# Out: one line per answer, "NAME EXIT-STATUS BASE64-OF-THE-OUTPUT"; the last line is "end SHA256", over all before it.
#      Nothing is judged here: an answer that is missing or wrong is for pipeline/installgate.py to refuse.
set -uo pipefail

exec 3>/dev/virtio-ports/virt-rt.install
work=$(mktemp -d)
: >"$work/answers"

# answer NAME COMMAND...
answer() {
  local name=$1 status=0 line
  shift
  "$@" >"$work/answer" 2>&1 </dev/null || status=$?
  line="$name $status $(base64 -w 0 "$work/answer")"
  echo "$line" >>"$work/answers"
  echo "$line" >&3
  echo "virt-rt-install: $name $status"
}

# The emulated network card gets its address for this boot only.
network() {
  local path found=()
  for path in /sys/class/net/*; do
    [[ $(readlink "$path/device/driver") != */virtio_net ]] || found+=("${path##*/}")
  done
  [[ ${#found[@]} == 1 ]] || {
    echo "not one virtio network card: ${found[*]}"
    return 1
  }
  ip address add "$ADDRESS" dev "${found[0]}" && ip link set "${found[0]}" up
}

# Where the file of what GRUB starts the next time lies on the disk: bytes from its first one.
environment_block() {
  local start extents
  start=$(cat "/sys/class/block/$(basename "$(findmnt -no SOURCE /)")/start") || return
  extents=$(filefrag -s -b512 -e /boot/grub/grubenv) || return
  awk -F '[:. ]+' -v start="$start" '/^ *0:/ { print (start + $5) * 512; found = 1 } END { exit !found }' <<<"$extents"
}

export DEBIAN_FRONTEND=noninteractive
answer running systemctl is-system-running --wait
answer failed systemctl list-units --failed --no-legend --plain
answer version uname -v
answer release uname -r
answer apt_settings apt-config dump
answer sources_before find /etc/apt/sources.list /etc/apt/sources.list.d -type f
answer menu_before update-grub
answer network network

read -ra asked <<<"$PACKAGES"
answer sources /usr/lib/apt/apt-helper download-file "$SOURCES" /etc/apt/sources.list.d/virt-rt.sources
answer update apt-get update
answer install apt-get install -y "${asked[@]}"

answer clean apt-get clean
# shellcheck disable=SC2016  # dpkg-query's variables
answer packages dpkg-query -W -f '${db:Status-Abbrev} ${Package} ${Version}\n'
answer verify dpkg --verify
answer meant cat /usr/share/virt-rt/kernel
answer menu cat /boot/grub/grub.cfg
answer menu_check grub-script-check /boot/grub/grub.cfg
answer environment grub-editenv - list
answer environment_block environment_block
answer boot ls /boot
# Blocks of what was removed again need not be kept.
answer trim fstrim /

digest=$(sha256sum <"$work/answers")
printf 'end %s\n' "${digest%% *}" >&3
rm -r "$work"
