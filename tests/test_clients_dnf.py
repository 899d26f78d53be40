"""dnf as a client of the signed repository: installs into a directory, upgrades, downgrades, removes, and refuses.

What is typed is what docs/deploy-rpm.md and docs/rollback.md show, with `--installroot`; the distribution is the one of
tests/distribution.py. Releases are those of tests/test_clients_apt.py.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pipeline.directory import Directory
from pipeline.publication import publication
from pipeline.repository import EMPTY, with_release
from tests import distribution, published
from tests.clients import DNF, Done, Machine, change, cutting, differences, documented, images
from tests.published import RECIPE, secret_key, signer
from tests.servers import READ_ONLY, nginx
from tests.workshop import FIRST, GUEST, PLATFORM, SETTINGS, Made, Shelf

pytestmark = [pytest.mark.engine, pytest.mark.network, pytest.mark.slow]

TARGET = "/target"
PREFIX = f"/opt/virt-rt/{PLATFORM}"
HOST_PACKAGE, GUEST_PACKAGE = f"virt-rt-host-{PLATFORM}", f"virt-rt-guest-{GUEST}"
OURS = r"^(virt-rt-|qemu-kvm-rt-|linux-(image|headers)-.*-rt-virt-)"
CONFIGURATION = f"""\
[main]
gpgcheck=1
repo_gpgcheck=1
assumeyes=1
install_weak_deps=0
reposdir={TARGET}/etc/yum.repos.d
[distribution]
name=stand-ins for a distribution
baseurl=file:///distribution
gpgcheck=0
repo_gpgcheck=0
"""
#: What removing leaves, and why that is right.
LEFT = {
    r"/var/log/.*": "what happened",
    r"/var/tmp": "made by rpm for itself",  # noqa: S108  # a path to compare with
    r"/etc/yum\.repos\.d/.*": "what the administrator brought",
    r"/var/cache/.*": "caches",
    r"/(var/lib|usr/lib/sysimage)/(rpm|dnf)/.*": "records of rpm and dnf",
    r"/etc/virt-rt(/guests(/.*\.rpm(save|new))?)?": "what the administrator wrote",
}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """An image with dnf, and the distribution's repository."""
    repository = distribution.make(tmp_path_factory.mktemp("distribution"))
    with images([DNF]) as names:
        yield names[DNF], repository


@pytest.fixture
def machine(image: tuple[str, Path]) -> Iterator[Machine]:
    """A machine with a system in a directory."""
    name, repository = image
    with Machine(name, [(repository, "/distribution")]) as started:
        started.write("/etc/dnf/dnf.conf", CONFIGURATION)
        # rpm's plugin that takes the network from scripts asks for more rights than a container has.
        started.write("/etc/rpm/macros", "%__transaction_unshare %{nil}\n")
        started.sh(f"mkdir -p {TARGET}/dev {TARGET}/etc/yum.repos.d && mknod -m 666 {TARGET}/dev/null c 1 3")
        dnf(started, "dnf install bash kmod systemd dracut python3 iproute jq")
        yield started


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A directory that is served, and its address."""
    with nginx(tmp_path / "web", tmp_path / "nginx", READ_ONLY) as url:
        yield tmp_path / "web", url


@pytest.fixture(params=["stand-in", "real"])
def second(request: pytest.FixtureRequest, shelf: Shelf) -> Made:
    """The release that the machine is upgraded to."""
    return shelf.second if request.param == "stand-in" else shelf.real()


def asked(machine: Machine, commands: str) -> Done:
    """What comes of commands of the documentation, in the directory instead of `/`."""
    commands = re.sub(
        r"\bdnf ", f"dnf --installroot={TARGET} --releasever=99 --config=/etc/dnf/dnf.conf ", commands
    )
    return machine.run(commands.replace("/etc/yum.repos.d", f"{TARGET}/etc/yum.repos.d"))


def dnf(machine: Machine, commands: str) -> str:
    """`asked`, of commands that succeed."""
    done = asked(machine, commands)
    assert done.status == 0, f"# {commands}\n{done.out}"
    assert "scriptlet failed" not in done.out, done.out
    return done.out


def installed(machine: Machine) -> dict[str, str]:
    """Versions of our packages, by name; each is as it was packed, but for configuration."""
    listed = machine.sh(f"rpm --root {TARGET} -qa --qf '%{{NAME}} %{{VERSION}}\\n'")
    there = dict(line.split() for line in listed.splitlines() if re.match(OURS, line))
    verified = machine.run(f"rpm --root {TARGET} -V {' '.join(there)}").out if there else ""
    assert [line for line in verified.splitlines() if not line.endswith(SETTINGS)] == []
    return there


def releases_of(there: dict[str, str]) -> set[str]:
    """The releases that packages are of, but kernels and headers, which outlive theirs."""
    return {version.partition("+g")[0] for name, version in there.items() if not name.startswith("linux-")}


def test_install_upgrade_downgrade_and_remove(
    second: Made, machine: Machine, served: tuple[Path, str], shelf: Shelf
) -> None:
    web, url = served
    first = shelf.first
    before = machine.files(TARGET)
    shelf.workshop.publish(first.repository, web, url)
    dnf(machine, documented("deploy-rpm.md", "Setting up a host", url=url))
    dnf(machine, documented("deploy-rpm.md", "Setting up a guest").splitlines()[0])
    there = installed(machine)
    kernels = [f"linux-image-{release.kernels['host']}" for release in (first, second)]
    assert {HOST_PACKAGE, GUEST_PACKAGE, kernels[0]} <= there.keys() and releases_of(there) == {first.version}
    assert machine.sh(f"rpm --root {TARGET} -V {' '.join(there)}") == ""
    calls = machine.sh(f"cat {TARGET}{distribution.LOG}").splitlines()
    kernel = first.kernels["host"]
    assert f"kernel-install add {kernel} /usr/lib/modules/{kernel}/vmlinuz" in calls
    assert machine.sh(f"cat {TARGET}/usr/share/virt-rt/kernel") == f"{kernel}\n"
    assert calls.index(f"depmod {kernel}") < calls.index(f"dracut /boot/initramfs-{kernel}.img {kernel}")
    # Not in the directory as root: the loader finds itself through /proc, and none is mounted there.
    machine.sh(f"ln -s {TARGET}/opt/virt-rt /opt/ && {PREFIX}/qemu/bin/qemu-system-x86_64 --version")

    machine.sh(f"echo '# mine' >>{TARGET}{SETTINGS}")
    shelf.workshop.publish(second.repository, web, url)
    dnf(machine, f"dnf clean expire-cache\n{documented('deploy-rpm.md', 'Upgrading')}")
    there = installed(machine)
    assert releases_of(there) == {second.version}
    assert kernels[0] != kernels[1] and set(kernels) <= there.keys(), "the previous kernel stays"
    for release in (first, second):
        name = release.kernels["host"]
        assert {f"vmlinuz-{name}", f"initramfs-{name}.img"} <= set(machine.sh(f"ls {TARGET}/boot").split())
    assert machine.sh(f"tail -n 1 {TARGET}{SETTINGS}") == "# mine\n"
    assert FIRST in machine.sh(f"cat {TARGET}{SETTINGS}")
    assert FIRST not in machine.sh(f"cat {TARGET}{SETTINGS}.rpmnew")

    back = documented("rollback.md", "Fedora, RHEL and their kin")
    dnf(machine, back.replace("0.1.0", first.version))
    assert releases_of(installed(machine)) == {first.version}
    assert machine.sh(f"cat {TARGET}/usr/share/virt-rt/kernel") == f"{kernel}\n", "that kernel is meant again"
    dnf(machine, documented("rollback.md", "Fedora, RHEL and their kin", block=1))
    assert releases_of(installed(machine)) == {first.version}
    dnf(machine, documented("deploy-rpm.md", "Upgrading"))
    assert releases_of(installed(machine)) == {second.version}

    dnf(machine, documented("deploy-rpm.md", "Removing"))
    assert installed(machine) == {}
    assert differences(before, machine.files(TARGET), LEFT) == {}


def test_a_stick_will_do_without_a_network(image: tuple[str, Path], shelf: Shelf) -> None:
    """What needs nothing of the distribution is installed from a release's directory."""
    volume = (shelf.second.repository, "/media/stick/repository")
    with Machine(image[0], [volume], network="none") as machine:
        machine.write("/etc/dnf/dnf.conf", CONFIGURATION.partition("[distribution]")[0])
        machine.sh(f"ln -s repository/key.asc /media/stick/key.asc; mkdir -p {TARGET}/etc/yum.repos.d")
        known = documented("air-gapped.md", "A host without a network", block=2)
        dnf(machine, known.replace(HOST_PACKAGE, f"virt-rt-image-{GUEST}"))
        assert set(installed(machine)) == {f"virt-rt-image-{GUEST}"}


# Refusals ----------------------------------------------------------------------------------------

PACKAGE = "rt-part"
Keys = tuple[dict[str, str], dict[str, str]]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """How to sign with our key, and with one of somebody else."""
    directory = tmp_path_factory.mktemp("keys")
    return secret_key(directory / "ours"), secret_key(directory / "theirs", "Someone else <else@localhost>")


@pytest.fixture(scope="module")
def reader(image: tuple[str, Path]) -> Iterator[Machine]:
    """A machine on which dnf knows no repository but the one in question."""
    name, repository = image
    with Machine(name, [(repository, "/distribution")]) as started:
        started.write("/etc/dnf/dnf.conf", CONFIGURATION.partition("[distribution]")[0])
        yield started


@pytest.fixture
def small(served: tuple[Path, str], tmp_path: Path, keys: Keys) -> Path:
    """A served repository with two packages that is in order."""
    return publish(served, tmp_path / "packages", keys[0])


def publish(served: tuple[Path, str], work: Path, key: dict[str, str], version: str = "1.0") -> Path:
    """A repository of two packages in the served directory."""
    web, url = served
    with signer(key) as opened:
        made = published.packages(work, version)
        return published.release(web, version, made, opened, recipe=msgspec.structs.replace(RECIPE, url=url))


def ask(reader: Machine, url: str, key: bytes | None = None) -> Done:
    """What comes of an installation into an empty directory; `key` is trusted instead of the one that is served."""
    repositories = f"{TARGET}/etc/yum.repos.d"
    reader.sh(f"rm -rf {TARGET} /var/cache/dnf && mkdir -p {repositories}")
    reader.sh(f"curl -fsSo {repositories}/virt-rt.repo {url}/virt-rt-testing.repo")
    if key is not None:
        reader.write("/trusted.asc", key)
        reader.sh(f"sed -i 's,^gpgkey=.*,gpgkey=file:///trusted.asc,' {repositories}/virt-rt.repo")
    return asked(reader, f"dnf install {PACKAGE}")


def refused(reader: Machine, url: str, key: bytes | None = None) -> str:
    """What dnf says when it will not; nothing is installed then."""
    done = ask(reader, url, key)
    assert done.status == 1, done.out
    assert reader.run(f"rpm --root {TARGET} -q {PACKAGE}").status != 0
    return done.out


def rpm_of(web: Path) -> Path:
    """The rpm that clients ask for."""
    (found,) = web.glob(f"yum/testing/x86_64/Packages/{PACKAGE}*.rpm")
    return found


def indexes(web: Path, pattern: str) -> list[Path]:
    """Index files by name, wherever clients find them."""
    return [path for path in web.glob(f"yum/**/repodata/{pattern}") if path.is_file()]


def test_dnf_takes_what_is_in_order(reader: Machine, small: Path, served: tuple[Path, str]) -> None:
    done = ask(reader, served[1])
    assert done.status == 0, done.out
    assert reader.sh(f"cat {TARGET}/usr/share/{PACKAGE}/version") == "1.0\n"


def test_dnf_refuses_a_changed_package(reader: Machine, small: Path, served: tuple[Path, str]) -> None:
    change(rpm_of(small))
    assert "checksum doesn't match" in refused(reader, served[1])


def test_dnf_refuses_a_package_that_is_cut_short(
    reader: Machine, small: Path, served: tuple[Path, str]
) -> None:
    path = rpm_of(small)
    os.truncate(path, path.stat().st_size // 2)
    said = refused(reader, served[1])
    assert "Interrupted by header callback" in said, said


def test_dnf_refuses_a_download_that_ends_early(reader: Machine, tmp_path: Path, keys: Keys) -> None:
    web = tmp_path / "web"
    with cutting(web, (".rpm",)) as url:
        publish((web, url), tmp_path / "packages", keys[0])
        said = refused(reader, url)
        assert "partial file" in said, said


def test_dnf_refuses_a_changed_index(reader: Machine, small: Path, served: tuple[Path, str]) -> None:
    for path in indexes(small, "*primary*"):
        change(path)
    assert "checksum doesn't match" in refused(reader, served[1])


def test_dnf_refuses_a_changed_list_of_indexes(
    reader: Machine, small: Path, served: tuple[Path, str]
) -> None:
    for path in indexes(small, "repomd.xml"):
        path.write_text(path.read_text().replace("</repomd>", "<!-- changed --></repomd>"))
    assert "Bad GPG signature" in refused(reader, served[1])


def test_dnf_refuses_indexes_of_another_key(
    reader: Machine, small: Path, served: tuple[Path, str], keys: Keys, tmp_path: Path
) -> None:
    trusted = (small / "key.asc").read_bytes()
    shutil.rmtree(small)
    publish(served, tmp_path / "again", keys[1])
    assert "Bad GPG signature" in refused(reader, served[1], trusted)


def test_dnf_refuses_what_nobody_signed(reader: Machine, small: Path, served: tuple[Path, str]) -> None:
    for path in indexes(small, "repomd.xml.asc"):
        path.unlink()
    assert "repomd.xml.asc" in refused(reader, served[1])


@pytest.mark.parametrize("signed", [False, True], ids=["by nobody", "by another key"])
def test_dnf_refuses_a_package_in_good_indexes(
    reader: Machine, served: tuple[Path, str], keys: Keys, tmp_path: Path, signed: bool
) -> None:
    """As when somebody could add to the set before it was indexed."""
    web, url = served
    ours, theirs = keys
    made = published.packages(tmp_path / "packages", "1.0")
    if signed:
        with signer(theirs) as other:
            other.sign_rpms([path for path in made if path.suffix == ".rpm"], other.identity.created)
    with signer(ours) as opened:
        release, found = published.described("1.0", made, opened, signed=True)
        recipe = msgspec.structs.replace(RECIPE, url=url)
        state = with_release(EMPTY, recipe.channels[0], release, found, recipe.keep)
        first = publication(EMPTY, state, recipe, opened, release.date)
    files = {package.sha256: path for package, path in zip(found, made, strict=True)}
    Directory(web).put({path: files[digest] for path, digest in first.packages.items()})
    Directory(web).put({**first.indexes, **dict(first.entries)})
    said = refused(reader, url)
    assert re.search("Public key for .* is not installed" if signed else "Package .* is not signed", said), (
        said
    )
