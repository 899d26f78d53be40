#!/usr/bin/env python3
"""A qemu for tests of `doit run`: a control socket, a console and a port, but no guest.

At `cont` it says `booted` on its console, and then runs until it is told to end. On the console, Ctrl-A X ends it, and
what is written comes back. Environment:

PRETEND_ARGS    its arguments go to this file, a line each, and its process to the first line
PRETEND_KVM     answers the probe as a working KVM does
PRETEND_BROKEN  it does not start on this machine
PRETEND_9P      it has 9p devices
PRETEND_ENDS    exit status, at once after `cont`
PRETEND_DEAF    it does not heed SIGTERM
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import sys
import termios
import threading
import tty
from pathlib import Path
from typing import Any

ARGUMENTS = sys.argv[1:]


def value(option: str, pattern: str) -> str:
    """What the first group of `pattern` matches in an argument after `option`; empty when none does."""
    for name, argument in itertools.pairwise(ARGUMENTS):
        if name == option and (found := re.search(pattern, argument)):
            return found[1]
    return ""


def leave(status: int) -> None:
    """End at once, from whatever thread, the terminal as it was."""
    if BEFORE is not None:
        termios.tcsetattr(0, termios.TCSADRAIN, BEFORE)
    os._exit(status)


def show(text: str) -> None:
    """Write to the console."""
    path = value("-chardev", "^file,id=console,path=(.+)$")
    if path:
        with Path(path).open("a") as file:
            file.write(text)
    else:
        os.write(1, text.encode())


def listen_to_the_person() -> None:
    """Keys of the console."""
    escaped = False
    with contextlib.suppress(OSError):
        while key := os.read(0, 1):
            if escaped and key == b"x":
                leave(0)
            escaped = key == b"\x01"
            show(repr(key.decode(errors="replace")))


def listen_to_ssh(port: socket.socket) -> None:
    """Greet like an sshd."""
    while True:
        connection, _ = port.accept()
        connection.sendall(b"SSH-2.0-pretend\r\n")
        connection.close()


def answer(asked: dict[str, object], port: int) -> object:
    """What qemu answers."""
    if asked["execute"] == "human-monitor-command":
        return (
            f"Hub -1:\r\n  TCP[HOST_FORWARD]  13       127.0.0.1 {port}       10.0.2.15    22     0     0\r\n"
        )
    return {}


def main() -> int:
    """Run until told to end; the exit status."""
    global BEFORE
    if os.environ.get("PRETEND_BROKEN"):
        return 127
    if "--version" in ARGUMENTS:
        return 0
    if "isa-debug-exit,iobase=0xf4,iosize=1" in ARGUMENTS:
        return 33 if os.environ.get("PRETEND_KVM") else 0
    if value("-device", "^(.*),help$"):
        return 0 if os.environ.get("PRETEND_9P") else 1
    if os.environ.get("PRETEND_DEAF"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    port = socket.socket()
    try:
        port.bind(("127.0.0.1", int(value("-netdev", r"hostfwd=tcp:127\.0\.0\.1:(\d+)-:22"))))
    except OSError:
        print("pretend_machine: could not set up host forwarding rule", file=sys.stderr)
        return 1
    port.listen()
    control = socket.socket(socket.AF_UNIX)
    control.bind(value("-chardev", "^socket,id=control,path=(.+),server=on,wait=off$"))
    control.listen()
    if os.isatty(0):
        BEFORE = termios.tcgetattr(0)
        tty.setraw(0)
    Path(os.environ["PRETEND_ARGS"]).write_text("".join(f"{line}\n" for line in (os.getpid(), *ARGUMENTS)))
    threading.Thread(target=listen_to_ssh, args=(port,), daemon=True).start()
    threading.Thread(target=listen_to_the_person, daemon=True).start()
    while True:
        connection, _ = control.accept()
        with connection, connection.makefile("rw") as stream:
            stream.write('{"QMP": {"version": {}, "capabilities": []}}\n')
            stream.flush()
            for line in stream:
                asked = json.loads(line)
                said = {"return": answer(asked, port.getsockname()[1]), "id": asked["id"]}
                stream.write('{"event": "NOTHING_TO_DO_WITH_IT"}\n' + json.dumps(said) + "\n")
                stream.flush()
                if asked["execute"] == "cont":
                    show("booted\r\n")
                    if "PRETEND_ENDS" in os.environ:
                        leave(int(os.environ["PRETEND_ENDS"]))
                if asked["execute"] == "system_powerdown":
                    show("powered down\r\n")
                    leave(0)


BEFORE: Any = None

if __name__ == "__main__":
    sys.exit(main())
