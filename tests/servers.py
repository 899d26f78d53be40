"""Servers for one test each, on free ports of loopback: nginx that takes files, rsync's own, a stand-in for ssh."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: What stands between a client and its server for `rsync -e`: the host is this machine.
SSH = """\
#!/bin/sh
# ssh [-oOPTION]... [-l USER] HOST COMMAND...
while [ $# -gt 0 ]; do
  case $1 in
    -l) shift 2 ;;
    -*) shift ;;
    *) break ;;
  esac
done
[ "$1" = "example.test" ] || { echo "ssh: Could not resolve hostname $1" >&2; exit 255; }
shift
exec sh -c "$*"
"""
NGINX = """\
daemon off; {user} pid {work}/pid; error_log {work}/error.log; worker_processes 2;
events {{ worker_connections 256; }}
http {{
  access_log off; client_max_body_size 0; sendfile on; types {{ }} default_type application/octet-stream;
  client_body_temp_path {work}/body; proxy_temp_path {work}/proxy; fastcgi_temp_path {work}/fastcgi;
  uwsgi_temp_path {work}/uwsgi; scgi_temp_path {work}/scgi;
  server {{
    listen 127.0.0.1:{port};
    root {root};
    {location}
  }}
}}
"""
READ_ONLY = "location / { }"
TAKES_FILES = """location / {
  dav_methods PUT DELETE MKCOL COPY; create_full_put_path on; dav_access user:rw group:r all:r;
}"""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def process(command: list[str], port: int) -> Iterator[None]:
    """A server, from when it answers until the end of the block."""
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    try:
        until = time.monotonic() + 20
        while True:
            assert running.poll() is None, running.stderr.read()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < until, f"{command[0]} does not listen"
                time.sleep(0.02)
        yield
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(timeout=20)
        running.stderr.close()


@contextmanager
def nginx(root: Path, work: Path, location: str = TAKES_FILES) -> Iterator[str]:
    """nginx that serves `root` (made when missing); its address. `location` is nginx's configuration of it."""
    root.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True)
    port = free_port()
    user = "user root;" if os.getuid() == 0 else ""
    configuration = work / "nginx.conf"
    configuration.write_text(NGINX.format(user=user, work=work, port=port, root=root, location=location))
    with process(["/usr/sbin/nginx", "-e", f"{work}/error.log", "-c", str(configuration)], port):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def rsync_daemon(root: Path, work: Path, extra: str = "", before: str = "") -> Iterator[str]:
    """rsync's server with the writable module `repo` at `root`; the module's address.

    `extra` is configuration of the module, `before` of the whole server.
    """
    root.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True)
    port = free_port()
    configuration = work / "rsyncd.conf"
    ids = "uid = root\ngid = root\n" if os.getuid() == 0 else ""
    configuration.write_text(
        f"{ids}use chroot = no\nreverse lookup = no\n{before}\n[repo]\npath = {root}\nread only = no\n{extra}"
    )
    command = ["rsync", "--daemon", "--no-detach", "--address=127.0.0.1", f"--port={port}"]
    with process([*command, f"--config={configuration}", f"--log-file={work}/log"], port):
        yield f"rsync://127.0.0.1:{port}/repo"


def stand_in_ssh(directory: Path) -> Path:
    """A program that does what `ssh example.test COMMAND` would do, on this machine."""
    program = directory / "ssh"
    program.write_text(SSH)
    program.chmod(0o755)
    return program
