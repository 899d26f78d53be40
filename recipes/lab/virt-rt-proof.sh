#!/usr/bin/env bash
# Runs inside the guest, once it has booted, and tells what it finds over a virtio-serial port of its own.
#
# Env: ISOLATED          CPUs to measure, the kernel's list format ("1", "1-3")
#      MEASURED_COUNT    how many they are: one measuring thread each
#      HOUSEKEEPING      CPUs of cyclictest's main thread
#      DURATION_SECONDS  how long cyclictest measures
#      INTERVAL_US       its period, microseconds
#      HISTOGRAM_US      the latencies it counts one by one, microseconds
#      UNWANTED_UNITS    units whose state is asked for, separated by spaces
# Out: one line per answer, "NAME EXIT-STATUS BASE64-OF-THE-OUTPUT"; the last line is "end SHA256", over all before it.
#      Nothing is judged here: an answer that is missing or wrong is for pipeline/gate.py to refuse.
set -uo pipefail

exec 3>/dev/virtio-ports/virt-rt.proof
work=$(mktemp -d /run/virt-rt-proof.XXXXXX)

# answer NAME COMMAND...
answer() {
  local name=$1 status=0
  shift
  "$@" >"$work/answer" 2>&1 || status=$?
  printf '%s %d %s\n' "$name" "$status" "$(base64 -w 0 "$work/answer")" | tee -a "$work/answers" >&3
}

# The measuring threads as the kernel schedules them: stat holds priority and policy (proc(5)).
threads() {
  local task
  for task in /proc/"$1"/task/*; do
    cat "$task/stat" && grep Cpus_allowed_list "$task/status"
  done
}

answer running systemctl is-system-running --wait
answer failed systemctl list-units --failed --no-legend --plain
read -ra units <<<"$UNWANTED_UNITS"
answer unwanted systemctl is-active "${units[@]}"
answer version uname -v
answer release uname -r
answer cmdline cat /proc/cmdline
answer isolated cat /sys/devices/system/cpu/isolated
answer nohz_full cat /sys/devices/system/cpu/nohz_full
answer config zgrep '^CONFIG_PREEMPT_RT=' /proc/config.gz

cyclictest -m -p80 -i"$INTERVAL_US" -d0 --policy=fifo -a "$ISOLATED" -t "$MEASURED_COUNT" \
  --mainaffinity="$HOUSEKEEPING" -q -D "$DURATION_SECONDS" -h "$HISTOGRAM_US" --json="$work/cyclictest.json" \
  >"$work/cyclictest.log" 2>&1 &
cyclictest=$!
sleep "$((DURATION_SECONDS / 2))"
answer threads threads "$cyclictest"
wait "$cyclictest"
echo $? >"$work/cyclictest.status"
answer cyclictest_status cat "$work/cyclictest.status"
answer cyclictest_log grep -v '^[0-9]' "$work/cyclictest.log"
answer cyclictest cat "$work/cyclictest.json"

digest=$(sha256sum <"$work/answers")
printf 'end %s\n' "${digest%% *}" >&3
