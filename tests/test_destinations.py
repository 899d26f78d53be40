"""Places that take a repository: every kind does the same, for real servers."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipeline import destination as contract
from pipeline import webserver
from pipeline.destination import LEASE, LOCK, Content, Destination, checked
from pipeline.destinations import destination
from pipeline.directory import Directory
from pipeline.errors import InternalError, UserError
from pipeline.rsyncserver import RsyncServer
from pipeline.signing import SECRETS
from pipeline.webserver import AUTH_VARIABLE, WebServer
from tests import servers

KINDS = ("directory", "web", "web without copy", "rsync", "ssh")
PLAIN = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Destination, Path]]:
    """A destination in a directory that is not there yet, and that directory."""
    kind = request.param
    served = tmp_path / "served"
    root = served / "repo"
    if kind == "directory":
        yield Directory(root, patience=0), root
    elif kind.startswith("web"):
        location = servers.TAKES_FILES if kind == "web" else servers.TAKES_FILES.replace(" COPY", "")
        with servers.nginx(served, tmp_path / "nginx", location) as address:
            yield WebServer(f"{address}/repo/", PLAIN, patience=0, settle=0.01), root
    elif kind == "rsync":
        with servers.rsync_daemon(served, tmp_path / "rsyncd") as address:
            yield RsyncServer(f"{address}/repo", PLAIN, patience=0, settle=0.01), root
    else:
        served.mkdir()
        environ = PLAIN | {"RSYNC_RSH": str(servers.stand_in_ssh(tmp_path))}
        yield RsyncServer(f"user@example.test:{root}", environ, patience=0, settle=0.01), root


def files(root: Path) -> dict[str, bytes]:
    """What a repository holds, but not what its publisher keeps there."""
    found = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    return {path: content for path, content in found.items() if not path.startswith(".")}


def test_files_come_and_go(place: tuple[Destination, Path], tmp_path: Path) -> None:
    there, root = place
    assert there.read("a") is None
    assert there.read("deep/er/a") is None
    assert not there.holds(["apt", "key.asc"])
    big = tmp_path / "big"
    big.write_bytes(os.urandom(3 << 20))
    names: dict[str, Content] = {
        "a": b"1",
        "empty": b"",
        "apt/pool/n/n_1.0~rc1+g0_amd64.deb": big,
        "apt/pool/n/x^y=z@1": b"2",
    }
    assert there.put({}) == []
    assert set(there.put(names)) == set(names)
    assert there.put(names) == []
    want = {k: v if isinstance(v, bytes) else v.read_bytes() for k, v in names.items()}
    assert files(root) == want
    assert {path: there.read(path) for path in want} == want
    assert there.read("apt/pool/n/none") is None
    assert there.holds(["key.asc", "apt"])
    assert there.holds(["a"])
    assert not there.holds(["yum", "key.asc"])
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in root.rglob("*") if path.is_file())
    assert not [p for p in root.rglob(".*") if p.is_file()]
    # the same size, another content
    assert there.put({"a": b"3", "empty": b""}) == ["a"]
    assert (root / "a").read_bytes() == b"3"
    there.delete([])
    there.delete(["apt/pool/n/x^y=z@1", "apt/pool/n/never", "never/there"])
    there.delete(["empty"])
    assert set(files(root)) == {"a", "apt/pool/n/n_1.0~rc1+g0_amd64.deb"}


def test_copies_on_the_server(place: tuple[Destination, Path]) -> None:
    there, _ = place
    there.put({"yum/testing/x/Packages/p.rpm": b"rpm", "yum/testing/x/Packages/q.rpm": b"other"})
    there.copy({})
    for _ in range(2):
        there.copy(
            {f"yum/stable/x/Packages/{name}.rpm": f"yum/testing/x/Packages/{name}.rpm" for name in "pq"}
        )
    assert there.read("yum/stable/x/Packages/p.rpm") == b"rpm"
    assert there.read("yum/stable/x/Packages/q.rpm") == b"other"
    there.delete(["yum/testing/x/Packages/p.rpm"])
    assert there.read("yum/stable/x/Packages/p.rpm") == b"rpm"
    with pytest.raises(UserError, match=r"has lost yum/testing/x/Packages/p.rpm"):
        there.copy({"yum/stable/x/Packages/r.rpm": "yum/testing/x/Packages/p.rpm"})


def test_deleting_leaves_the_neighbours(place: tuple[Destination, Path]) -> None:
    there, root = place
    there.put({"d/e/1": b"1", "d/e/2": b"2", "d/f/1": b"3", "e/1": b"4", "1": b"5"})
    there.delete(["d/e/1", "d/f/1"])
    assert files(root) == {"d/e/2": b"2", "e/1": b"4", "1": b"5"}


# The lock ---------------------------------------------------------------------------------------


def test_one_publisher_at_a_time(place: tuple[Destination, Path]) -> None:
    there, _ = place
    with there.locked() as renew:
        renew()
        with pytest.raises(UserError, match="is publishing to"), there.locked():
            raise AssertionError("both have it")
        renew()
    with there.locked():
        pass


def test_a_publisher_waits_for_the_one_before(place: tuple[Destination, Path], monkeypatch: Any) -> None:
    there, _ = place
    monkeypatch.setattr(there, "_patience", 60.0)
    if not there.local:
        monkeypatch.setattr(there, "_settle", 1.0)
    monkeypatch.setattr(contract, "INTERVAL", 0.05)
    inside: list[int] = []
    most: list[int] = []

    def publish() -> None:
        with there.locked():
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.1)
            inside.pop()

    threads = [threading.Thread(target=publish) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


def lock_of(**changes: object) -> bytes:
    """A lock's content; by default of another machine, and in force."""
    held = {"token": "other", "host": "elsewhere", "machine": "m", "pid": 1, "started": "1"}
    return json.dumps(held | {"until": time.time() + 100} | changes).encode()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[WebServer, Path]]:
    """A web server that does not wait, and its directory."""
    with servers.nginx(tmp_path / "served", tmp_path / "nginx") as address:
        yield WebServer(address, PLAIN, patience=0, settle=0), tmp_path / "served"


def own(**changes: object) -> dict[str, Any]:
    return {**contract._process(), **changes}


def test_a_lock_in_force_is_respected(web: tuple[WebServer, Path]) -> None:
    there, root = web
    for content in (lock_of(), lock_of(**own())):
        (root / LOCK).write_bytes(content)
        with (
            pytest.raises(UserError, match=r"process \d+ of \S+ is publishing to http") as refused,
            there.locked(),
        ):
            raise AssertionError("locked")
        assert f"remove {LOCK} there" in refused.value.hint
        assert (root / LOCK).read_bytes() == content


@pytest.mark.parametrize(
    "content",
    [
        lock_of(until=time.time() - 1),
        lock_of(**own(pid=2**22 - 1)),
        lock_of(**own(started="1")),
        lock_of(until="later"),
        lock_of(until=time.time() + 1e6),
        lock_of(until=float("nan")),
        b"[" * 100_000,
        b"{",
        b"[]",
        b"",
    ],
    ids=[
        "over",
        "ended",
        "another process of that id",
        "no time",
        "for weeks",
        "no number",
        "deep",
        "no JSON",
        "no object",
        "empty",
    ],
)
def test_a_lock_that_counts_no_more(content: bytes, web: tuple[WebServer, Path]) -> None:
    there, root = web
    (root / LOCK).write_bytes(content)
    with there.locked() as renew:
        renew()
        assert json.loads((root / LOCK).read_bytes())["pid"] == os.getpid()
    assert not (root / LOCK).exists()


def test_of_two_who_lock_at_once_one_gets_it(web: tuple[WebServer, Path], monkeypatch: Any) -> None:
    there, root = web
    put = there.put

    def overtaken(files: Any) -> list[str]:
        written = put(files)
        (root / LOCK).write_bytes(lock_of())
        return written

    monkeypatch.setattr(there, "put", overtaken)
    with pytest.raises(UserError, match=r"process 1 of elsewhere is publishing"), there.locked():
        raise AssertionError("locked")
    assert json.loads((root / LOCK).read_bytes())["host"] == "elsewhere"


def test_a_lost_lock_is_noticed_and_left_to_its_owner(web: tuple[WebServer, Path]) -> None:
    there, root = web
    with there.locked() as renew:
        (root / LOCK).write_bytes(lock_of())
        with pytest.raises(UserError, match=r"was lost to process 1 of elsewhere"):
            renew()
        (root / LOCK).unlink()
        with pytest.raises(UserError, match=r"was lost to nobody"):
            renew()
        (root / LOCK).write_bytes(lock_of())
    assert (root / LOCK).exists()


def test_a_lock_is_renewed_in_time(web: tuple[WebServer, Path], monkeypatch: Any) -> None:
    there, root = web
    with there.locked() as renew:
        first = json.loads((root / LOCK).read_bytes())["until"]
        renew()
        assert json.loads((root / LOCK).read_bytes())["until"] == first
        late = time.time() + LEASE * 0.6
        monkeypatch.setattr(time, "time", lambda: late)
        renew()
        assert json.loads((root / LOCK).read_bytes())["until"] == int(late + LEASE)


def test_a_directory_and_a_server_that_leads_to_it_lock_each_other(tmp_path: Path) -> None:
    root = tmp_path / "repo"
    environ = PLAIN | {"RSYNC_RSH": str(servers.stand_in_ssh(tmp_path))}
    there = RsyncServer(f"example.test:{root}", environ, patience=0, settle=0.01)
    here = Directory(root, patience=0)
    with here.locked(), pytest.raises(UserError, match="is publishing to"), there.locked():
        raise AssertionError("locked")
    with there.locked(), pytest.raises(UserError, match="is publishing to"), here.locked():
        raise AssertionError("locked")
    # of a publisher that was killed before a reboot: it had the lock that we have now
    (root / LOCK).write_bytes(lock_of(system_lock=True))
    with pytest.raises(UserError, match="is publishing to"), there.locked():
        raise AssertionError("locked")
    with here.locked() as renew:
        renew()


@pytest.mark.parametrize("late", [1, 2])
def test_a_directory_that_another_publisher_makes_in_that_moment(tmp_path: Path, late: int) -> None:
    """rsync looks for the directory, does not find it, and is told that it is there when it makes it."""
    root, program, count = tmp_path / "repo", tmp_path / "bin/rsync", tmp_path / "count"
    program.parent.mkdir()
    program.write_text(
        f"""\
#!/bin/sh
echo run >>{count}
if [ $(wc -l <{count}) -le {late} ]; then
  mkdir -p {root}
  echo 'rsync: [Receiver] mkdir "{root}" failed: File exists (17)' >&2
  echo 'rsync error: error in file IO (code 11) at main.c(783) [Receiver=3.2.7]' >&2
  exit 11
fi
exec {shutil.which("rsync")} "$@"
"""
    )
    program.chmod(0o755)
    environ = PLAIN | {
        "PATH": f"{program.parent}:{PLAIN['PATH']}",
        "RSYNC_RSH": str(servers.stand_in_ssh(tmp_path)),
    }
    there = RsyncServer(f"example.test:{root}", environ, patience=0, settle=0.01)
    if late == 1:
        there.put({"dists/Release": b"1"})
        assert files(root) == {"dists/Release": b"1"}
    else:
        with pytest.raises(UserError, match=r"ended with 11: .* failed: File exists"):
            there.put({"dists/Release": b"1"})


def test_links_lead_nowhere_else(tmp_path: Path) -> None:
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "repo"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    place = Directory(root, patience=0)
    place.put({"a": b"1"})
    (root / "link").symlink_to(elsewhere)
    for act in (
        lambda: place.put({"link/new": b"1"}),
        lambda: place.copy({"link/new": "a"}),
        lambda: place.delete(["link/precious"]),
    ):
        assert "a link leads elsewhere" in refusal(act)
    (root / ".publishing").rmdir()
    (root / ".publishing").symlink_to(elsewhere)
    assert "is a link" in refusal(place.locked().__enter__)
    assert "is a link" in refusal(lambda: place.put({"b": b"1"}))
    assert [path.name for path in elsewhere.iterdir()] == ["precious"]


# Addresses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "kind", "name"),
    [
        ("/srv/repo", Directory, "/srv/repo"),
        ("./a:b/c", Directory, "./a:b/c"),
        ("http://host/repo/", WebServer, "http://host/repo"),
        ("https://me:secret@host:8443/repo", WebServer, "https://host:8443/repo"),
        ("host:repo", RsyncServer, "host:repo"),
        ("me@host:/srv/repo/", RsyncServer, "me@host:/srv/repo/"),
        ("host::module/repo", RsyncServer, "host::module/repo"),
        ("rsync://host/module", RsyncServer, "rsync://host/module"),
        ("rsync://me:secret@host:873/module/x", RsyncServer, "rsync://me@host:873/module/x"),
    ],
)
def test_which_kind_an_address_means(address: str, kind: type, name: str) -> None:
    found = destination(address, PLAIN)
    assert type(found) is kind
    assert found.name == (name if kind is not Directory else str(Path(name).absolute()))
    assert found.local == (kind is Directory)
    assert "secret" not in found.name


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("", "is no destination"),
        ("-oProxyCommand=x:y", "is no destination"),
        ("a\nb", "is no destination"),
        ("ftp://host/x", "ftp:// is no way to publish"),
        ("s3://bucket/x", "s3:// is no way to publish"),
        ("rsync://me:secret@host", "rsync://host names no module"),
        ("rsync://host/", "names no module"),
        ("http:///x", "is not the address of a directory"),
        ("https://me:secret@[host/x", "this https:// address is none"),
        ("rsync://me:secret@[host/x", "this rsync:// address is none"),
        ("https://me:secret@host/x?y", "https://host/x is not the address of a directory"),
    ],
)
def test_addresses_that_are_none(address: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        destination(address, PLAIN)
    assert "secret" not in refused.value.message + refused.value.hint
    assert refused.value.hint


@pytest.mark.parametrize(
    "path", ["", "/a", "a/", "a//b", ".", "..", "a/../b", "a/./b", "../a", "a b", "a*", "a\n", "é"]
)
def test_paths_that_are_none(path: str) -> None:
    with pytest.raises(InternalError, match="is no path of a repository"):
        checked(path)


@pytest.mark.parametrize(
    "path", ["a", ".a", "a/..b", "a..", "apt/pool/n/n_1.0~rc1+g0_amd64.deb", "x^y=z@1-_"]
)
def test_paths_that_are_fine(path: str) -> None:
    assert checked(path) == path


# What servers refuse ----------------------------------------------------------------------------


def refusal(act: Callable[[], object]) -> str:
    """Both lines of the error."""
    with pytest.raises(UserError) as refused:
        act()
    return f"{refused.value.message} | {refused.value.hint}"


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (Directory(tmp_path / "file"), Directory(Path("/proc/none"))):
        assert "check permissions and room" in refusal(lambda place=place: place.put({"a": b"1"}))  # type: ignore[misc]
        assert "check permissions and room" in refusal(place.locked().__enter__)
    assert "/absent: No such file" in refusal(lambda: Directory(tmp_path / "d").put({"a": Path("/absent")}))
    (tmp_path / "d/a").mkdir(parents=True, exist_ok=True)
    assert "d/a: Is a directory" in refusal(lambda: Directory(tmp_path / "d").read("a"))


def test_a_directory_without_hard_links(tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    place = Directory(tmp_path)
    place.put({"a": b"1"})
    place.copy({"b/c": "a"})
    assert (tmp_path / "b/c").read_bytes() == b"1"


PROTECTED = "auth_basic repo; auth_basic_user_file {work}/users;"


@pytest.mark.parametrize("how", ["address", "variable", "netrc"])
def test_passwords(how: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(webserver, "BACKOFF", 0.01)
    work = tmp_path / "nginx"
    location = servers.TAKES_FILES.replace("location / {", f"location / {{ {PROTECTED.format(work=work)}")
    with servers.nginx(tmp_path / "served", work, location) as address:
        (work / "users").write_text("me:{PLAIN}p@ss/w?rd\n")
        plain = WebServer(address, PLAIN, settle=0)
        said = refusal(lambda: plain.put({"a": b"1"}))
        assert "401" in said
        assert AUTH_VARIABLE in said
        environ = dict(PLAIN)
        if how == "address":
            address = address.replace("//", "//me:p%40ss%2Fw%3Frd@")
        elif how == "variable":
            environ[AUTH_VARIABLE] = "me:p@ss/w?rd"
        else:
            netrc = tmp_path / "netrc"
            netrc.write_text("machine 127.0.0.1 login me password p@ss/w?rd\n")
            monkeypatch.setenv("NETRC", str(netrc))
        place = WebServer(address, environ, settle=0)
        assert place.put({"a": b"1"}) == ["a"]
        place.delete(["a"])
        assert "ss" not in place.name
    said = refusal(lambda: place.read("a"))
    assert "GET http://127.0.0.1:" in said
    assert "p@ss" not in said
    assert "p%40ss" not in said


def test_a_password_without_a_user() -> None:
    assert "is not user:password" in refusal(lambda: WebServer("http://host/", {AUTH_VARIABLE: "secret"}))


@pytest.mark.parametrize(
    ("location", "said"),
    [
        (servers.READ_ONLY, "405"),
        ("location / { return 301 https://elsewhere.test$request_uri; }", "https://elsewhere.test/a"),
        ("location / { return 403; }", "403 Forbidden"),
        ("location / { return 507; }", "507"),
    ],
)
def test_web_servers_that_take_nothing(location: str, said: str, tmp_path: Path) -> None:
    with servers.nginx(tmp_path / "served", tmp_path / "nginx", location) as address:
        assert said in refusal(lambda: WebServer(address, PLAIN, settle=0).put({"a": b"1"}))


class Odd(http.server.BaseHTTPRequestHandler):
    """A server that fails at first, or keeps less than it was given."""

    failures: ClassVar[list[int]] = []
    kept: ClassVar[dict[str, bytes]] = {}
    cut: ClassVar[int | None] = None

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.failures:
            self.send_response(self.failures.pop())
        else:
            self.kept[self.path] = body[: self.cut]
            self.send_response(201)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_GET(self) -> None:
        self.answer(self.kept.get(self.path, b""))

    def answer(self, body: bytes) -> None:
        there = self.kept.get(self.path)
        self.send_response(404 if there is None else 200)
        self.send_header("Content-Length", str(len(there or b"")))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def odd() -> Iterator[WebServer]:
    """A place on the odd server."""
    Odd.failures, Odd.kept, Odd.cut = [], {}, None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield WebServer(f"http://127.0.0.1:{server.server_port}", PLAIN, settle=0)
        server.shutdown()
        thread.join()


def test_a_busy_web_server_is_asked_again(odd: WebServer, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(webserver, "BACKOFF", 0.01)
    Odd.failures = [503, 500]
    big = tmp_path / "big"
    big.write_bytes(os.urandom(2 << 20))
    assert odd.put({"a": big}) == ["a"]
    assert Odd.kept == {"/a": big.read_bytes()}
    Odd.failures = [503] * 9
    assert "503" in refusal(lambda: odd.put({"b": b"1"}))


def test_a_web_server_that_keeps_half(odd: WebServer) -> None:
    Odd.cut = 3
    assert "a has 3 bytes after a PUT of 6" in refusal(lambda: odd.put({"a": b"123456"}))


def test_a_web_server_that_breaks_off(odd: WebServer, monkeypatch: Any) -> None:
    Odd.kept = {"/a": b"123456"}
    monkeypatch.setattr(Odd, "do_GET", lambda self: self.answer(b"123"))
    assert "/a failed: " in refusal(lambda: odd.put({"a": b"123456"}))


def test_servers_that_are_not_there(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(webserver, "BACKOFF", 0.01)
    port = servers.free_port()
    closed = WebServer(f"http://me:secret@127.0.0.1:{port}/", PLAIN, settle=0)
    said = refusal(lambda: closed.read("a"))
    assert f"GET http://127.0.0.1:{port}/a failed" in said
    assert "secret" not in said
    said = refusal(lambda: RsyncServer(f"rsync://me:secret@127.0.0.1:{port}/x", PLAIN).read("a"))
    assert "Connection refused" in said
    assert "secret" not in said
    environ = PLAIN | {"RSYNC_RSH": str(servers.stand_in_ssh(tmp_path))}
    assert "Could not resolve hostname unknown" in refusal(
        lambda: RsyncServer("unknown:x", environ).read("a")
    )
    assert "rsync is missing" in refusal(lambda: RsyncServer("host:x", {"PATH": "/nonexistent"}).read("a"))


def test_rsync_servers_that_take_nothing(tmp_path: Path) -> None:
    with servers.rsync_daemon(tmp_path / "served", tmp_path / "rsyncd", "read only = yes\n") as address:
        assert "read only" in refusal(lambda: RsyncServer(address, PLAIN).put({"a": b"1"}))
        other = address.replace("/repo", "/other")
        assert "Unknown module 'other'" in refusal(lambda: RsyncServer(other, PLAIN).read("a"))
    with servers.rsync_daemon(tmp_path / "taken", tmp_path / "other") as address:
        # a directory below one that is not there is no empty repository that could be begun
        assert "No such file" in refusal(lambda: RsyncServer(f"{address}/x/y", PLAIN).put({"a": b"1"}))


def test_rsync_passwords(tmp_path: Path) -> None:
    (tmp_path / "secrets").write_text("me:p@ss\n")
    (tmp_path / "secrets").chmod(0o600)
    extra = f"auth users = me\nsecrets file = {tmp_path}/secrets\n"
    with servers.rsync_daemon(tmp_path / "served", tmp_path / "rsyncd", extra) as address:
        right = RsyncServer(address.replace("//", "//me:p%40ss@"), PLAIN)
        assert right.put({"a": b"1"}) == ["a"]
        assert "ss" not in right.name
        wrong = RsyncServer(address.replace("//", "//me:wrong@"), PLAIN)
        said = refusal(lambda: wrong.read("a"))
        assert "auth failed" in said
        assert "wrong" not in said


def test_a_greeting_of_an_rsync_server_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "motd").write_text("Welcome\n\n-rw-r--r-- 1 2026/01/01 00:00:00 apt\n")
    global_ = f"motd file = {tmp_path}/motd"
    with servers.rsync_daemon(tmp_path / "served", tmp_path / "rsyncd", before=global_) as address:
        place = RsyncServer(address, PLAIN)
        assert not place.holds(["apt", "Welcome"])
        place.put({"a": b"1"})
        assert place.holds(["a"])


def test_secrets_do_not_reach_rsync_and_ssh(tmp_path: Path) -> None:
    program = tmp_path / "ssh"
    program.write_text(f"#!/bin/sh\nenv >{tmp_path}/seen\nexit 1\n")
    program.chmod(0o755)
    ours = dict.fromkeys((*SECRETS, AUTH_VARIABLE), "sesame:sesame")
    place = RsyncServer("host:x", PLAIN | ours | {"RSYNC_RSH": str(program), "SSH_AUTH_SOCK": "/agent"})
    refusal(lambda: place.read("a"))
    seen = (tmp_path / "seen").read_text()
    assert "SSH_AUTH_SOCK=/agent" in seen and "sesame" not in seen


def test_a_file_that_vanishes_under_rsync_is_none(tmp_path: Path) -> None:
    """Such as the lock of a publisher that has just finished."""
    program = tmp_path / "rsync"
    program.write_text("#!/bin/sh\necho 'file has vanished: \"/a\"' >&2\nexit 24\n")
    program.chmod(0o755)
    place = RsyncServer("host:x", {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert place.read("a") is None
    assert "ended with 24" in refusal(lambda: place.put({"a": b"1"}))
