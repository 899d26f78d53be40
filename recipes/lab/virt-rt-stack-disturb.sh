#!/usr/bin/env bash
# Runs inside the lab's emulated host: takes a CPU from a vCPU, in a way that the host's trace has to name.
#
# Usage: disturb hog CPU SECONDS           a thread `hog` of SCHED_FIFO 50 has the CPU without a pause
#        disturb serial CPU SECONDS FROM   the interrupt of the serial port ttyS1 is moved to the CPU, and the port is
#                                          written to from the CPU FROM; afterwards the interrupt is where it was
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

serial() {
  local irq was
  irq=$(</sys/class/tty/ttyS1/irq)
  stty -F /dev/ttyS1 raw -echo
  # Held open: the interrupt has a handler as long as somebody has the port open.
  exec 5>/dev/ttyS1
  was=$(<"/proc/irq/$irq/smp_affinity_list")
  # The handler goes on as long as it finds something to send: the writer must never be late.
  chrt -f 60 taskset -c "$from" timeout "$seconds" cat /dev/zero >&5 &
  # shellcheck disable=SC2064  # as they are now
  trap "kill $! 2>/dev/null; echo $was >/proc/irq/$irq/smp_affinity_list" EXIT
  trap 'exit 0' TERM
  echo "$cpu" >"/proc/irq/$irq/smp_affinity_list"
  wait "$!" || true
}

case $kind in
  hog | serial) "$kind" || exit 2 ;;
  *) echo "virt-rt-stack-disturb: no disturbance $kind: give hog or serial" >&2 && exit 2 ;;
esac
