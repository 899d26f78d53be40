"""Stand-ins for what a measurement calls: cyclictest, hackbench, and an ssh whose every machine is this one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

#: Takes cyclictest's options, measures nothing, and tells what cyclictest would: from so many threads as CPUs.
CYCLICTEST = """#!{python}
import argparse, json, os, signal, sys, threading, time
options = argparse.ArgumentParser(add_help=False)  # -h is the histogram
for name in ("-m", "-q"):
    options.add_argument(name, action="store_true")
for name in ("-p", "-i", "-d", "-t", "-D", "-h"):
    options.add_argument(name, type=int, dest="o_" + name[1:])
for name in ("-a", "--policy", "--mainaffinity", "--json"):
    options.add_argument(name)
given = options.parse_args()
cpus = [int(cpu) for cpu in given.a.split(",")]
if os.path.exists({broken!r}):
    sys.exit("Unable to change scheduling policy!")
def measure(cpu):
    os.sched_setaffinity(0, [cpu])
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(given.o_p))
    except OSError:
        pass
    time.sleep(given.o_D)
threads = [threading.Thread(target=measure, args=[cpu], daemon=True) for cpu in cpus]
os.sched_setaffinity(0, [int(cpu) for cpu in given.mainaffinity.split(",")])
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
cycles = given.o_D * 1000000 // given.o_i
stamp = time.strftime("%a, %d %b %Y %H:%M:%S +0000", time.gmtime(time.time() - given.o_D))
uname = os.uname()
json.dump({{
    "file_version": 1, "cmdline:": " ".join(["cyclictest", *sys.argv[1:]]),
    "rt_test_version:": "2.40", "start_time": stamp,
    "end_time": time.strftime("%a, %d %b %Y %H:%M:%S +0000", time.gmtime()), "return_code": 0,
    "sysinfo": {{"sysname": uname.sysname, "nodename": uname.nodename, "release": uname.release,
                "version": uname.version, "machine": uname.machine, "realtime": 1}},
    "num_threads": len(cpus), "resolution_in_ns": 0,
    "thread": {{str(number): {{"histogram": {{"3": cycles}}, "cycles": cycles, "min": 3, "max": 3, "avg": 3.0,
                             "cpu": cpu, "node": 0}} for number, cpu in enumerate(cpus)}},
}}, open(given.json, "w"))
"""
#: A load of two processes that does little.
HACKBENCH = """#!/bin/sh
(while :; do i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; sleep 0.05; done) &
while :; do i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; sleep 0.05; done
"""
#: ssh [-oOPTION | -pPORT | -T]... -- HOST COMMAND: below {world}; a file `lost` there cuts every connection.
SSH = """#!/bin/sh
echo "$*" >>{world}/ssh.log
guest=
while [ $# -gt 0 ]; do
  case $1 in
    -oProxyCommand=*) guest=yes; shift ;;
    --) shift; break ;;
    -*) shift ;;
    *) break ;;
  esac
done
[ ! -e {world}/lost ] || {{ echo "ssh: connect to host $1 port 22: Connection timed out" >&2; exit 255; }}
case $1 in
  root@board) [ -z "$guest" ] || exit 99 ;;
  root@127.0.0.1) [ "$guest" ] || exit 99 ;;
  stranger@board) echo "$1: Permission denied (publickey)." >&2; exit 255 ;;
  *) echo "ssh: Could not resolve hostname $1: Name or service not known" >&2; exit 255 ;;
esac
shift
command=$(printf '%s' "$*" | sed 's#/var/lib/virt-rt/measure#{world}/there#g')
exec sh -c "$command"
"""


def tools(directory: Path) -> Path:
    """A directory for PATH with a cyclictest and a hackbench; a file `broken` beside it makes the former fail."""
    directory.mkdir(parents=True, exist_ok=True)
    text = CYCLICTEST.format(python=sys.executable, broken=str(directory.parent / "broken"))
    for name, content in (("cyclictest", text), ("hackbench", HACKBENCH)):
        (directory / name).write_text(content)
        (directory / name).chmod(0o755)
    return directory


def ssh(directory: Path, world: Path) -> None:
    """Add the ssh; what lies below /var/lib/virt-rt/measure there is in `world`/there."""
    world.mkdir(parents=True, exist_ok=True)
    (directory / "ssh").write_text(SSH.format(world=world))
    (directory / "ssh").chmod(0o755)


def may_be_real_time() -> bool:
    """Whether these tests may use SCHED_FIFO, and there are two CPUs to do so."""
    from pipeline.measure.machineinfo import may_be_fifo

    return may_be_fifo(80) and {0, 1} <= os.sched_getaffinity(0)
