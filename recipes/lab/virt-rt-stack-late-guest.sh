# shellcheck shell=bash disable=SC2154
# For the agent in the guest, which sources it: measures until it is late, for each disturbance of the host.
#
# Needs of the caller: PLACE, `guest-` and its name; ISOLATED, the vCPU that is measured; `answer`; MEASURE, the path of
# virt-rt-measure; `work`, a directory.

# Seconds that it measures at most.
LATE_S=100

# be_late KIND LIMIT: measures until it is late by more than LIMIT microseconds, which is far above what twice emulated
# is late by itself, and far below how long the host disturbs. Tells `measuring_KIND` when it measures, then `late_KIND`
# with guest-break.json.
be_late() {
  local kind=$1 limit=$2 out=$work/late-$1.json line
  while read -r line; do
    if [[ $line == measuring ]]; then answer "measuring_$kind" true; else echo "$line"; fi
  done < <(python3 "$MEASURE" trace break --place "$PLACE" --cpus "$ISOLATED" --limit "$limit" \
    --seconds "$LATE_S" --interval 10000 --housekeeping 0 --out "$out" 2>&1)
  answer "late_$kind" cat "$out"
}
