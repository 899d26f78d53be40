#!/usr/bin/env bash
# Runs inside the lab's emulated host: takes a CPU from a vCPU, in a way that the host's trace has to name.
#
# Usage: disturb hog CPU SECONDS           a thread `hog` of SCHED_FIFO 50 has the CPU without a pause
#        disturb interrupt CPU SECONDS OTHER  the interrupt of the device $SPINNING is moved to the CPU and raised from
#                                             CPU OTHER, its handler keeping the CPU for a second each time; afterwards
#                                             it is where it was
# A signal ends it earlier. Exit status 0 when it disturbed, 2 when it could not.
set -euo pipefail

kind=$1 cpu=$2 seconds=$3 from=${4:-}

hog() {
  # Started as usual and only then hastened: what is measured is the hog, not how long Python takes to begin.
  exec timeout "$((seconds + 10))" python3 -c '
import os, sys, time
cpu, seconds = int(sys.argv[1]), float(sys.argv[2])
with open("/proc/self/comm", "w") as comm:
    comm.write("hog")
os.sched_setaffinity(0, {cpu})
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
end = time.monotonic() + seconds
while time.monotonic() < end:
    pass
' "$cpu" "$seconds"
}

interrupt() {
  local spin=/sys/module/irqlat_edu/parameters/spin_us irqs affinity was
  irqs=("/sys/bus/pci/devices/$SPINNING/msi_irqs"/*)
  affinity=/proc/irq/${irqs[0]##*/}/smp_affinity_list
  was=$(<"$affinity")
  # shellcheck disable=SC2064  # as they are now
  trap "echo 0 >$spin; echo $was >$affinity" EXIT
  trap 'exit 0' TERM
  echo 1000000 >"$spin"
  "/usr/libexec/virt-rt/drivers/$(uname -r)/irqlat/irqlat" --device "$SPINNING" --cpu "$cpu" --trigger-cpu "$from" \
    --samples "$seconds" --interval 1000000 >/dev/null &
  wait "$!" || true
}

case $kind in
  hog | interrupt) "$kind" || exit 2 ;;
  *) echo "virt-rt-stack-disturb: no disturbance $kind: give hog or interrupt" >&2 && exit 2 ;;
esac
