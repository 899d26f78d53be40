# shellcheck shell=bash disable=SC2154
# For the script in the lab's emulated host, which sources it: a guest is made late, and the trace says by whom.
#
# Needs of the caller: CPU, of the vCPU that the guest measures; OTHER_CPU, from where interrupts are raised; `told`, the
# file with the guest's answers; `within`; virt-rt-measure; DISTURB, the path of virt-rt-stack-disturb.sh.

# Seconds for the guest to begin to measure, for the disturbance, and for the guest to tell.
LATE_BEGIN_S=180 LATE_DISTURB_S=3 LATE_END_S=120 LATE_BUFFER_KIB=16384

# late KIND DIRECTORY: wait until the guest measures, disturb it, and attribute. DIRECTORY gets host.json and trace.txt,
# guest-break.json of the guest's answer `late_KIND`, and attribution.json. Fails where one of them cannot be had.
late() {
  local kind=$1 directory=$2 disturbing status=0
  virt-rt-measure trace arm --cpus "$CPU" --buffer-kib "$LATE_BUFFER_KIB" || return
  if within "$LATE_BEGIN_S" grep -q "^measuring_$kind " "$told"; then
    "$DISTURB" "$kind" "$CPU" "$LATE_DISTURB_S" "$OTHER_CPU" &
    disturbing=$!
    within "$LATE_END_S" grep -q "^late_$kind " "$told" || { echo "the guest does not tell late_$kind" && status=1; }
    kill "$disturbing" 2>/dev/null
    wait "$disturbing"
  else
    echo "the guest does not tell measuring_$kind" && status=1
  fi
  virt-rt-measure trace stop --out "$directory" || status=1
  virt-rt-measure trace disarm || status=1
  ((status == 0)) || return "$status"
  sed -n "s/^late_$kind 0 //p" "$told" | base64 -d >"$directory/guest-break.json" &&
    virt-rt-measure attribute --host "$directory" --guest "$directory/guest-break.json" \
      --json "$directory/attribution.json"
}
