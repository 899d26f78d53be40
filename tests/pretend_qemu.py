#!/usr/bin/env python3
"""A qemu for tests of the launch scripts: real threads and a real control channel, but no guest.

Writes its arguments to `$0.args`, and at `cont` to `$0.threads` a line of JSON for each thread: name, CPUs,
policy, priority. Environment:

PRETEND_KVM      answers the script's probe as a working KVM does
PRETEND_STATUS   exit status, at once after `cont`; without it, it runs until it is told to end
PRETEND_DEAF     the guest ignores the power button; `all`: qemu ignores `quit`, too
PRETEND_REFUSE   a QMP command that is answered with an error
PRETEND_LATE     at `cont` the last vCPU's thread makes one more, whose number goes to `$0.late`
PRETEND_VCPUS    how many vCPUs it says it has, in place of what `-smp` asks for
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import threading
from pathlib import Path

ARGUMENTS = sys.argv[1:]
ME = Path(sys.argv[0])


#: Set at `cont`.
RELEASED = threading.Event()


def late() -> None:
    """A thread that begins with the CPUs and the priority of the one that made it."""
    ME.with_name(ME.name + ".late").write_text(f"{threading.get_native_id()}\n")
    threading.Event().wait()


def value(option: str, pattern: str) -> str:
    """What the first group of `pattern` matches in an argument after `option`."""
    for name, argument in itertools.pairwise(ARGUMENTS):
        if name == option and (found := re.search(pattern, argument)):
            return found[1]
    raise SystemExit(f"pretend_qemu: no {option} with {pattern}")


def threads(count: int) -> list[int]:
    """Thread ids of `count` threads that wait for ever."""
    ids: list[int] = []
    ready = threading.Barrier(count + 1)

    def wait() -> None:
        ids.append(threading.get_native_id())
        ready.wait()
        RELEASED.wait()
        if os.environ.get("PRETEND_LATE") and ids[-1:] == [threading.get_native_id()] and count > 1:
            threading.Thread(target=late, daemon=True).start()
        threading.Event().wait()

    for _ in range(count):
        threading.Thread(target=wait, daemon=True).start()
    ready.wait()
    return ids


def write_threads(names: dict[int, str]) -> None:
    """How each thread of this process is placed now."""
    lines = [
        json.dumps(
            {
                "name": names.get(int(task), "other"),
                "cpus": sorted(os.sched_getaffinity(int(task))),
                "policy": os.sched_getscheduler(int(task)),
                "priority": os.sched_getparam(int(task)).sched_priority,
            }
        )
        for task in (path.name for path in Path("/proc/self/task").iterdir())
    ]
    ME.with_name(ME.name + ".threads").write_text("\n".join(sorted(lines)) + "\n")


def main() -> int:
    """Run until told to end; the exit status."""
    if "isa-debug-exit,iobase=0xf4,iosize=1" in ARGUMENTS:
        return 33 if os.environ.get("PRETEND_KVM") else 0
    if "none" in ARGUMENTS[1:2]:  # the script tries whether memory can be bound
        return 0
    # Written at once, since tests wait for it.
    new = ME.with_name(ME.name + ".args.new")
    new.write_text("".join(f"{argument}\n" for argument in ARGUMENTS))
    new.rename(ME.with_name(ME.name + ".args"))
    path = value("-chardev", "^pipe,id=control,path=(.+)$")
    deaf = os.environ.get("PRETEND_DEAF", "")
    count = int(os.environ.get("PRETEND_VCPUS") or value("-smp", r"^(\d+)"))
    vcpus, iothreads = threads(count), threads(1)
    names = {thread: f"vcpu{index}" for index, thread in enumerate(vcpus)} | {iothreads[0]: "iothread"}
    # As qemu opens them: for reading and writing, so that nobody has to be at the other end.
    read, write = (
        os.fdopen(os.open(path + end, os.O_RDWR), mode) for end, mode in ((".in", "r"), (".out", "w"))
    )

    def say(what: object) -> None:
        write.write(json.dumps(what) + "\r\n")
        write.flush()

    say({"QMP": {"version": {}, "capabilities": []}})
    for line in iter(read.readline, ""):
        asked = json.loads(line)
        command, answer = asked["execute"], {"id": asked["id"]}
        # An event between question and answer is what qemu may always send.
        say({"event": "NOTHING_TO_DO_WITH_IT", "timestamp": {"seconds": 0, "microseconds": 0}})
        if command == os.environ.get("PRETEND_REFUSE"):
            say({"error": {"class": "GenericError", "desc": "pretended"}, **answer})
        elif command == "query-cpus-fast":
            rows = [{"cpu-index": index, "thread-id": thread} for index, thread in enumerate(vcpus)]
            say({"return": rows[::-1], **answer})
        elif command == "query-iothreads":
            say({"return": [{"id": "iothread0", "thread-id": iothreads[0]}], **answer})
        else:
            if command == "cont":
                write_threads(names)
                RELEASED.set()
            say({"return": {}, **answer})
        if command == "cont" and "PRETEND_STATUS" in os.environ:
            return int(os.environ["PRETEND_STATUS"])
        if (command == "system_powerdown" and not deaf) or (command == "quit" and deaf != "all"):
            return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
