"""apt and dnf read over nginx while a hundred releases are published: each read is of one release, and none fails.

The clients are this machine's own programs with directories of their own. A release has two packages, the first of
which needs the second in exactly its version; a client fetches both.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from pipeline.destination import Content, Destination, Renew
from pipeline.directory import Directory
from pipeline.files import digest_file
from pipeline.packagefile import Package
from pipeline.publication import publication
from pipeline.publishing import Publisher
from pipeline.releaserecipe import RepositoryRecipe
from pipeline.repository import Release, read_state, with_release
from pipeline.signing import Signer
from pipeline.webserver import WebServer
from tests import published, servers

PUBLICATIONS = 100
PLATFORM, CHANNEL = "qemu-q35", "testing"
NOW = 1_800_000_000
#: Seconds before each file that is written, so that clients meet every state on the way.
PAUSE = 0.004
VERSION = re.compile(r"rt-(?:all|part)[_-](\d+\.\d+)")


class Failed(Exception):
    """A client was refused something, or saw two releases at once."""


@dataclass
class Client:
    """A package manager with directories of its own, which reads a repository again and again."""

    root: Path
    url: str
    key: Path
    reads: int = 0
    seen: list[str] = field(default_factory=list)

    def run(self, *command: str) -> str:
        environ = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "HOME": str(self.root)}
        done = subprocess.run(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        # apt tells of an index that it could not get, and succeeds with the one it had
        if done.returncode or re.search(r"^(W|E|Err):|^Err", done.stdout, re.MULTILINE):
            raise Failed(done.stdout)
        return done.stdout

    def read(self) -> str:
        """Fetch indexes and both packages anew; the version that both have."""
        got = self.fetch()
        versions = {found[1] for name in got if (found := VERSION.match(name))}
        if len(got) != 2 or len(versions) != 1:
            raise Failed(f"packages of two releases: {got}")
        self.reads += 1
        self.seen.append(versions.pop())
        return self.seen[-1]

    def fetch(self) -> list[str]:
        """Names of the package files that came."""
        raise NotImplementedError

    def empty(self, directory: Path, pattern: str) -> None:
        for path in directory.glob(pattern):
            path.unlink()


class Apt(Client):
    """apt, with lists and caches below `root`; it must know nothing of this machine's packages."""

    def fetch(self) -> list[str]:
        archives = self.root / "cache/archives"
        if not archives.exists():
            for directory in ("lists/partial", "cache/archives/partial", "etc/preferences.d", "dpkg"):
                (self.root / directory).mkdir(parents=True)
            (self.root / "dpkg/status").touch()
            (self.root / "etc/sources.list").write_text(
                f"deb [signed-by={self.key} arch=amd64] {self.url}/apt {CHANNEL} main\n"
            )
            (self.root / "apt.conf").write_text(
                f'Dir::State "{self.root}"; Dir::State::status "{self.root}/dpkg/status";\n'
                f'Dir::Cache "{self.root}/cache"; Dir::Etc "{self.root}/etc"; APT::Architecture "amd64";\n'
                'APT::Sandbox::User "root"; Acquire::Retries "0"; Acquire::Languages "none";\n'
                'Debug::NoLocking "true"; APT::Get::Assume-Yes "true"; Dir::Log::Terminal "";\n'
            )
        apt = ("apt-get", "-c", str(self.root / "apt.conf"), "-q")
        self.run(*apt, "update")
        self.empty(archives, "*.deb")
        self.run(*apt, "install", "--download-only", "rt-all")
        return [path.name for path in archives.glob("*.deb")]


class Dnf(Client):
    """dnf, for an installation below `root`; `mirrors` as our clients do, else as any client could."""

    mirrors = True

    def fetch(self) -> list[str]:
        configuration = self.root / "dnf.conf"
        if not configuration.exists():
            self.root.mkdir(parents=True)
            top = f"{self.url}/yum/{CHANNEL}/x86_64"
            where = f"mirrorlist={top}/mirrorlist" if self.mirrors else f"baseurl={top}/"
            configuration.write_text(
                f"[main]\nreposdir=/nonexistent\ncachedir={self.root}/cache\npersistdir={self.root}/state\n"
                f"logdir={self.root}/log\nkeepcache=1\nassumeyes=1\nretries=1\nplugins=0\n"
                f"[virt-rt]\nname=virt-rt\n{where}\ngpgkey=file://{self.key}\ngpgcheck=1\nrepo_gpgcheck=1\n"
            )
        for path in self.root.rglob("*.rpm"):
            path.unlink()
        self.run(
            "dnf", "-q", "-c", str(configuration), f"--installroot={self.root}/installed", "--releasever=1",
            "--forcearch=x86_64", "--refresh", "install", "--downloadonly", "rt-all",
        )  # fmt: skip
        return [path.name for path in self.root.rglob("*.rpm")]


class DnfWithoutMirrors(Dnf):
    """dnf that asks for repomd.xml and its signature where they change."""

    mirrors = False


CLIENTS: tuple[type[Client], ...] = (Apt, Dnf)


@dataclass(frozen=True)
class Offer:
    """A repository that nginx serves and takes, and releases for it: packages by the last part of their version."""

    signer: Signer
    recipe: RepositoryRecipe
    root: Path
    url: str
    key: Path
    packages: dict[int, list[Path]]

    def publish(self, place: Destination, number: int) -> None:
        clock = NOW + number
        release, packages = self.release(number)
        publishing = Publisher(place, self.recipe, self.signer, clock=lambda: clock)
        assert publishing.add(release, packages, {p.name: p for p in self.packages[number]}, CHANNEL).changed

    def release(self, number: int) -> tuple[Release, list[Package]]:
        return published.described(version(number), self.packages[number], self.signer, PLATFORM, signed=True)

    def client(self, kind: type[Client], directory: Path) -> Client:
        return kind(directory / kind.__name__, self.url, self.key)


def version(number: int) -> str:
    return f"1.{number}"


@pytest.fixture(scope="module")
def packages(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Signer, Path, dict[int, list[Path]]]]:
    """A signer, its public key, and signed packages for every publication."""
    directory = tmp_path_factory.mktemp("packages")
    environ = published.secret_key(directory / "key")
    numbers = range(PUBLICATIONS + 1)
    with ThreadPoolExecutor(4) as workers:
        made = list(workers.map(lambda n: published.packages(directory / str(n), version(n)), numbers))
    with published.signer(environ) as signer:
        rpms = [path for paths in made for path in paths if path.suffix == ".rpm"]
        signer.sign_rpms(rpms, signer.identity.created)
        yield signer, directory / "key/public.asc", dict(zip(numbers, made, strict=True))


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk would be half of the time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def offer(packages: tuple[Signer, Path, dict[int, list[Path]]], tmp_path: Path) -> Iterator[Offer]:
    """A repository that has the first release."""
    signer, key, made = packages
    with servers.nginx(tmp_path / "served", tmp_path / "nginx") as url:
        recipe = msgspec.structs.replace(published.RECIPE, url=url)
        offered = Offer(signer, recipe, tmp_path / "served", url, key, made)
        offered.publish(Directory(offered.root), 0)
        yield offered


def next_second() -> None:
    """apt asks whether InRelease is newer than what it has, and HTTP counts in seconds."""
    time.sleep(1.1)


class Watched:
    """A destination that changes one file at a time and tells of it before."""

    local = True

    def __init__(self, place: Destination, before: Callable[[str], None]) -> None:
        self.place, self.before = place, before
        self.name = place.name

    def read(self, path: str) -> bytes | None:
        return self.place.read(path)

    def contents(self, paths: Iterable[str]) -> dict[str, bytes | None]:
        return self.place.contents(paths)

    def holds(self, names: Iterable[str]) -> bool:
        return self.place.holds(names)

    def put(self, files: Mapping[str, Content]) -> list[str]:
        for path, content in files.items():
            self.before(path)
            self.place.put({path: content})
        return list(files)

    def copy(self, copies: Mapping[str, str]) -> None:
        self.place.copy(copies)

    def delete(self, paths: Iterable[str]) -> None:
        self.place.delete(paths)

    def locked(self) -> AbstractContextManager[Renew]:
        return self.place.locked()


@pytest.mark.slow
def test_a_hundred_publications_under_readers(offer: Offer, tmp_path: Path) -> None:
    clients = [offer.client(kind, tmp_path) for kind in CLIENTS]
    over = threading.Event()

    def read_on(client: Client) -> None:
        try:
            while not over.is_set():
                client.read()
        finally:
            over.set()

    def dawdle(path: str) -> None:
        time.sleep(PAUSE)

    def publish_all() -> None:
        places = Directory(offer.root), WebServer(offer.url, {}, settle=0)
        try:
            for number in range(1, PUBLICATIONS + 1):
                assert not over.is_set(), "a client gave up"
                if number == PUBLICATIONS:
                    next_second()
                offer.publish(Watched(places[number % 4 == 0], dawdle), number)
        finally:
            over.set()

    with ThreadPoolExecutor(len(clients) + 1) as workers:
        running = [workers.submit(read_on, client) for client in clients]
        running.append(workers.submit(publish_all))
        for each in running:
            each.result()
    for client in clients:
        assert client.read() == version(PUBLICATIONS)
        assert client.reads > 10
        order = [int(each.partition(".")[2]) for each in client.seen]
        assert order == sorted(order)
        assert len(set(order)) > 8, "the client saw too few releases for this to say anything"


def test_clients_see_one_release_before_every_file(offer: Offer, tmp_path: Path) -> None:
    apt, dnf = (offer.client(kind, tmp_path) for kind in CLIENTS)
    without = offer.client(DnfWithoutMirrors, tmp_path)
    told: list[str] = []
    refused: list[str] = []

    def look(path: str) -> None:
        told.append(path)
        client = dnf if path.startswith("yum/") else apt
        if path.startswith(("apt/dists/", "yum/")) and "by-hash" not in path:
            assert client.read() in (version(0), version(1))
        if path.endswith(f"{CHANNEL}/x86_64/repodata/repomd.xml"):
            # two files that cannot change at once: this is what the mirror list is for
            try:
                without.read()
            except Failed:
                refused.append(path)

    offer.publish(Watched(Directory(offer.root), look), 1)
    assert refused, "dnf does not mind a signature of another repomd.xml"
    assert any(path.endswith("mirrorlist") for path in told)
    assert [client.read() for client in (apt, dnf, without)] == [version(1)] * 3


def test_the_wrong_order_fails_clients(offer: Offer, tmp_path: Path) -> None:
    apt, dnf = (offer.client(kind, tmp_path) for kind in CLIENTS)
    assert apt.read() == dnf.read() == version(0)
    next_second()
    place = Directory(offer.root)
    old = read_state(place.read, offer.signer.trusted)
    release, packages = offer.release(1)
    new = with_release(old, CHANNEL, release, packages, offer.recipe.keep)
    made = publication(old, new, offer.recipe, offer.signer, NOW + 1)
    place.put(dict(made.entries))
    for client in (apt, dnf):
        with pytest.raises(Failed):
            client.read()
    place.put(made.indexes)
    for client in (apt, dnf):
        with pytest.raises(Failed):  # of the packages
            client.read()
    place.put({path: _file(offer, digest) for path, digest in made.packages.items()})
    assert apt.read() == dnf.read() == version(1)


def _file(offer: Offer, digest: str) -> Path:
    (found,) = [path for path in offer.packages[1] if digest_file(path) == digest]
    return found
