"""apt as a client of the signed repository: machines set up, upgraded, rolled back and cleaned, and what it refuses.

What is typed into the machines is what docs/deploy-debian.md and docs/rollback.md show. Releases are of the real
recipes with stand-ins for what is compiled (tests/workshop.py), and the real one where it is in artifacts/.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests import published
from tests.clients import DEBIAN, Machine, System, change, cutting, differences, documented, images
from tests.published import RECIPE, secret_key, signer
from tests.servers import READ_ONLY, nginx
from tests.test_tuning import PROBE
from tests.workshop import FIRST, GUEST, PLATFORM, SETTINGS, Made, Shelf

pytestmark = [pytest.mark.engine, pytest.mark.network, pytest.mark.slow]

HOST_PACKAGE, GUEST_PACKAGE = f"virt-rt-host-{PLATFORM}", f"virt-rt-guest-{GUEST}"
PREFIX = f"/opt/virt-rt/{PLATFORM}"
#: What a purge leaves, or takes, and why that is right.
LEFT = {
    r"/var/log/.*": "what happened",
    r"/var/cache/.*": "caches of apt, debconf and ldconfig",
    r"/var/lib/(apt|dpkg)/.*": "their records",
    r"/opt": "empty in a fresh Debian, of no package; dpkg takes it with the last package that lies there",
}
#: What apt was given, and what it took from there.
BROUGHT = re.compile(r"^(/etc/apt/sources\.list\.d|/var/lib/apt/lists|/var/cache/apt/archives)/")
OURS = re.compile(r"^(virt-rt-|qemu-kvm-rt-|linux-(image|headers)-.*-rt-virt-)")


@pytest.fixture(scope="module")
def made() -> Iterator[dict[System, str]]:
    with images(list(DEBIAN.values())) as names:
        yield names


@pytest.fixture(params=DEBIAN)
def machine(request: pytest.FixtureRequest, made: dict[System, str]) -> Iterator[Machine]:
    with Machine(made[DEBIAN[request.param]]) as started:
        # No one is there to answer; no compiler, which headers recommend; and no waiting for the disk.
        started.write(
            "/etc/apt/apt.conf.d/90test", 'APT::Get::Assume-Yes "true";\nAPT::Install-Recommends "false";\n'
        )
        started.write("/etc/dpkg/dpkg.cfg.d/test", "force-unsafe-io\n")
        yield started


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A directory that is served, and its address."""
    with nginx(tmp_path / "web", tmp_path / "nginx", READ_ONLY) as url:
        yield tmp_path / "web", url


def installed(machine: Machine) -> dict[str, str]:
    """Versions of our packages, by name."""
    listed = machine.sh("dpkg-query -W -f '${Package} ${Version} ${db:Status-Abbrev}\\n'")
    rows = [line.split() for line in listed.splitlines()]
    ours = [row for row in rows if OURS.match(row[0])]
    assert all(row[2] == "ii" for row in ours), ours
    return {row[0]: row[1] for row in ours}


@pytest.fixture(params=["stand-in", "real"])
def second(request: pytest.FixtureRequest, shelf: Shelf) -> Made:
    """The release that machines are upgraded to."""
    return shelf.second if request.param == "stand-in" else shelf.real()


def test_two_commands_set_up_a_fresh_machine(
    second: Made, machine: Machine, served: tuple[Path, str], shelf: Shelf
) -> None:
    web, url = served
    shelf.workshop.publish(second.repository, web, url)
    machine.sh(documented("deploy-debian.md", "Setting up a host", url=url))
    install_guest, _ = documented("deploy-debian.md", "Setting up a guest").splitlines()
    machine.sh(install_guest)
    kernel = second.kernels["host"]
    machine.sh(f"apt-get install linux-headers-{kernel}")
    there = installed(machine)
    assert {HOST_PACKAGE, GUEST_PACKAGE, f"linux-image-{kernel}", f"linux-headers-{kernel}"} <= there.keys()
    assert {version.partition("+g")[0] for version in there.values()} == {second.version}
    # the distribution's hook made the initramfs, in which the modules are
    assert f"lib/modules/{kernel}" in machine.sh(f"lsinitramfs /boot/initrd.img-{kernel}")
    # programs find the libraries that came with them
    libraries = machine.sh(f"ldd {PREFIX}/qemu/bin/qemu-system-x86_64")
    assert set(re.findall(r"\.so[.0-9]* => (\S+)/lib[^/ ]+ ", libraries)) == {f"{PREFIX}/qemu/bin/../lib"}
    machine.sh(f"{PREFIX}/qemu/bin/qemu-system-x86_64 --version")
    modpost = machine.run(f"/usr/src/linux-headers-{kernel}/scripts/mod/modpost -h")
    # it knows no -h: that it says so shows that it runs
    assert re.search("sage|invalid option", modpost.out) and "not found" not in modpost.out, modpost
    assert "preflight" in machine.sh("virt-rt-check --help")
    shown = machine.sh(f"{PREFIX}/launch/{GUEST}/kvmqemu.sh --dry-run")
    assert f"{PREFIX}/qemu/bin/qemu-system-x86_64 " in shown and "chrt -f -p 1 " in shown


def releases_of(there: dict[str, str]) -> set[str]:
    """The releases that packages are of, but kernels and headers, which outlive theirs."""
    return {version.partition("+g")[0] for name, version in there.items() if not name.startswith("linux-")}


def test_upgrade_rollback_and_purge_leave_nothing_behind(
    second: Made, machine: Machine, served: tuple[Path, str], shelf: Shelf
) -> None:
    web, url = served
    first = shelf.first
    shelf.workshop.publish(first.repository, web, url)
    bring, _ = documented("deploy-debian.md", "Setting up a host", url=url).splitlines()
    machine.sh(bring)
    machine.sh("apt-get update")
    # What Debian brings, point releases included, is there before, so that what is left in the end is ours.
    machine.sh("apt-get dist-upgrade")
    planned = machine.sh(f"apt-get -s install {HOST_PACKAGE} {GUEST_PACKAGE}")
    others = [name for name in re.findall(r"^Inst (\S+) ", planned, re.MULTILINE) if not OURS.match(name)]
    others.append("zstd")  # else making an initramfs takes long
    machine.sh(f"apt-get install {' '.join(others)} && apt-mark manual {' '.join(others)}")
    before = machine.files()

    machine.sh(f"apt-get install {HOST_PACKAGE} {GUEST_PACKAGE}")
    assert releases_of(installed(machine)) == {first.version}
    machine.sh(f"echo '# mine' >>{SETTINGS}")
    shelf.workshop.publish(second.repository, web, url)
    machine.sh("apt-get update")
    machine.sh(documented("deploy-debian.md", "Upgrading", block=1))
    there = installed(machine)
    assert releases_of(there) == {second.version}
    kernels = [f"linux-image-{release.kernels['host']}" for release in (first, second)]
    assert kernels[0] != kernels[1] and set(kernels) <= there.keys(), "the previous kernel stays"
    for release in (first, second):
        kernel = release.kernels["host"]
        assert {f"vmlinuz-{kernel}", f"initrd.img-{kernel}"} <= set(machine.sh("ls /boot").split())
    assert machine.sh(f"tail -n 1 {SETTINGS}") == "# mine\n"
    assert FIRST in machine.sh(f"cat {SETTINGS}")
    assert FIRST not in machine.sh(f"cat {SETTINGS}.dpkg-dist")

    back = documented("rollback.md", "Debian and Ubuntu").replace("0.1.0", first.version)
    machine.write("/etc/dpkg/dpkg.cfg.d/answer", "force-confold\n")
    machine.sh(back)
    there = installed(machine)
    assert releases_of(there) == {first.version}
    assert machine.sh(f"tail -n 1 {SETTINGS}") == "# mine\n"
    machine.sh("apt-get update")
    assert "0 upgraded, 0 newly installed" in machine.sh("apt-get dist-upgrade"), "it stays there"
    machine.sh(documented("rollback.md", "Debian and Ubuntu", block=2))
    assert releases_of(installed(machine)) == {second.version}

    machine.sh(documented("deploy-debian.md", "Removing"))
    assert installed(machine) == {}
    machine.sh("rm /etc/dpkg/dpkg.cfg.d/answer")
    after = machine.files()
    assert differences(before, after, LEFT) == {}
    assert [path for path in after if re.search("virt-rt|rt-virt", path) and not BROUGHT.search(path)] == []


def test_the_menu_begins_with_the_kernel_of_the_release(
    machine: Machine, served: tuple[Path, str], shelf: Shelf
) -> None:
    """By the real update-grub, on a machine that has a newer kernel of the distribution's, too."""
    web, url = served
    machine.sh("apt-get update && apt-get install grub2-common zstd && mkdir -p /boot/grub")
    machine.sh("touch /boot/grub/grub.cfg && echo kernel >/boot/vmlinuz-6.99.0-amd64")
    machine.write("/usr/sbin/grub-probe", PROBE)  # there is no disk to probe

    def first() -> str:
        """The release that the menu's first entry starts."""
        menu = machine.sh("cat /boot/grub/grub.cfg")
        started: list[str] = re.findall(r"^\s*linux\s+\S*/vmlinuz-(\S+) ", menu, re.MULTILINE)
        return started[0]

    shelf.workshop.publish(shelf.first.repository, web, url)
    machine.sh(documented("deploy-debian.md", "Setting up a host", url=url))
    kernels = [release.kernels["host"] for release in (shelf.first, shelf.second)]
    assert machine.sh("cat /usr/share/virt-rt/kernel").split() == [kernels[0]] == [first()]
    shelf.workshop.publish(shelf.second.repository, web, url)
    machine.sh("apt-get update")
    machine.sh(documented("deploy-debian.md", "Upgrading", block=0))
    assert first() == kernels[1]
    machine.sh(documented("rollback.md", "Debian and Ubuntu").replace("0.1.0", shelf.first.version))
    assert first() == kernels[0]
    assert sorted(f"/boot/vmlinuz-{name}" for name in kernels) == machine.sh("ls /boot/vmlinuz-*rt*").split()
    machine.sh(documented("rollback.md", "Debian and Ubuntu", block=2))
    assert first() == kernels[1]
    machine.sh(f"apt-get remove {HOST_PACKAGE}")
    assert first() == "6.99.0-amd64"
    assert "without CPU isolation" in machine.sh("cat /boot/grub/grub.cfg"), "the tuning stays"
    machine.sh("apt-get remove --autoremove 'virt-rt-tuning-*'")
    menu = machine.sh("cat /boot/grub/grub.cfg")
    assert [each for each in ("virt-rt-plain-", "virt-rt-host-", "isolcpus") if each in menu] == []


def test_a_stick_will_do_without_a_network(made: dict[System, str], shelf: Shelf) -> None:
    """What needs nothing of the distribution is installed from a release's directory."""
    volume = (shelf.second.repository, "/media/stick/repository")
    with Machine(made[DEBIAN["12"]], [volume], network="none") as machine:
        machine.sh("rm -f /etc/apt/sources.list; ln -s repository/key.asc /media/stick/key.asc")
        known = documented("air-gapped.md", "A host without a network", block=1)
        machine.sh(known.replace(HOST_PACKAGE, f"-y virt-rt-image-{GUEST}"))
        assert set(installed(machine)) == {f"virt-rt-image-{GUEST}"}


# Refusals ----------------------------------------------------------------------------------------

PACKAGE = "rt-part"
Keys = tuple[dict[str, str], dict[str, str]]


@pytest.fixture(scope="module", params=DEBIAN)
def reader(request: pytest.FixtureRequest, made: dict[System, str]) -> Iterator[Machine]:
    """A machine that knows no repository but the one in question."""
    with Machine(made[DEBIAN[request.param]]) as started:
        started.sh("rm -f /etc/apt/sources.list /etc/apt/sources.list.d/*")
        yield started


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """How to sign with our key, and with one of somebody else."""
    directory = tmp_path_factory.mktemp("keys")
    return secret_key(directory / "ours"), secret_key(directory / "theirs", "Someone else <else@localhost>")


@pytest.fixture
def small(served: tuple[Path, str], tmp_path: Path, keys: Keys) -> Path:
    """A served repository with two packages that is in order."""
    return publish(served, tmp_path / "packages", keys[0])


def publish(served: tuple[Path, str], work: Path, key: dict[str, str], valid_days: int = 0) -> Path:
    web, url = served
    recipe = msgspec.structs.replace(RECIPE, url=url, valid_days=valid_days)
    with signer(key) as opened:
        return published.release(web, "1.0", published.packages(work, "1.0"), opened, recipe=recipe)


def ask(reader: Machine, url: str, source: bytes | None = None) -> str:
    """What apt says when it is to install a package and will not; nothing is installed then."""
    reader.sh(
        f"rm -rf /var/lib/apt/lists/* /var/cache/apt/archives/*.deb /etc/apt/sources.list.d/*; dpkg --purge {PACKAGE}"
    )
    bring = f"/usr/lib/apt/apt-helper download-file {url}/virt-rt-testing.sources /etc/apt/sources.list.d/a.sources"
    if source is None:
        reader.sh(bring)
    else:
        reader.write("/etc/apt/sources.list.d/a.sources", source)
    done = reader.run(f"apt-get update && apt-get install -y -o Acquire::Retries=0 {PACKAGE}")
    assert done.status == 100, done.out
    assert reader.run(f"dpkg -s {PACKAGE}").status != 0
    return done.out


def test_apt_takes_what_is_in_order(reader: Machine, small: Path, served: tuple[Path, str]) -> None:
    source = (small / "virt-rt-testing.sources").read_bytes()
    reader.write("/etc/apt/sources.list.d/a.sources", source)
    reader.sh(f"apt-get update && apt-get install -y {PACKAGE}")
    assert reader.sh(f"cat /usr/share/{PACKAGE}/version") == "1.0\n"


def test_apt_refuses_a_changed_package(reader: Machine, small: Path, served: tuple[Path, str]) -> None:
    (package,) = small.glob(f"apt/pool/{PACKAGE}/*.deb")
    change(package)
    assert "Hash Sum mismatch" in ask(reader, served[1])


def test_apt_refuses_a_changed_index(reader: Machine, small: Path, served: tuple[Path, str]) -> None:
    for index in [p for p in small.glob("apt/dists/*/main/binary-amd64/**/*") if p.is_file()]:
        change(index)
    assert "Hash Sum mismatch" in ask(reader, served[1])


def test_apt_refuses_a_changed_list_of_indexes(
    reader: Machine, small: Path, served: tuple[Path, str]
) -> None:
    path = small / "apt/dists/testing/InRelease"
    path.write_text(path.read_text().replace("Suite: testing", "Suite: stable!"))
    assert re.search("BADSIG|Message has been manipulated", ask(reader, served[1]))


def test_apt_refuses_another_key(
    reader: Machine,
    small: Path,
    served: tuple[Path, str],
    keys: Keys,
    tmp_path: Path,
) -> None:
    source = (small / "virt-rt-testing.sources").read_bytes()
    shutil.rmtree(small)
    publish(served, tmp_path / "again", keys[1])
    assert re.search("NO_PUBKEY|Missing key", ask(reader, served[1], source))


def test_apt_refuses_what_nobody_signed(reader: Machine, small: Path, served: tuple[Path, str]) -> None:
    (small / "apt/dists/testing/InRelease").unlink()
    (small / "apt/dists/testing/Release.gpg").unlink()
    assert "is not signed" in ask(reader, served[1])


def test_apt_refuses_an_index_that_is_too_old(
    reader: Machine, served: tuple[Path, str], keys: Keys, tmp_path: Path
) -> None:
    publish(served, tmp_path / "packages", keys[0], valid_days=7)  # dated like the key: long ago
    assert re.search(r"Release file .* is expired", ask(reader, served[1]))


def test_apt_refuses_a_package_that_is_cut_short(
    reader: Machine, small: Path, served: tuple[Path, str]
) -> None:
    (package,) = small.glob(f"apt/pool/{PACKAGE}/*.deb")
    os.truncate(package, package.stat().st_size // 2)
    assert "File has unexpected size" in ask(reader, served[1])


def test_apt_refuses_a_download_that_ends_early(reader: Machine, tmp_path: Path, keys: Keys) -> None:
    web = tmp_path / "web"
    with cutting(web, (".deb",)) as url:
        publish((web, url), tmp_path / "packages", keys[0])
        said = ask(reader, url)
        assert "Failed to fetch" in said and "Undetermined Error" in said, said
