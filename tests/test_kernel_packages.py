"""Packages of kernels, headers and drivers: made for real from a small pretended kernel, and their scripts run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from pipeline import drivers, packages
from pipeline.action import Action, Upstream
from pipeline.packager import Packager
from pipeline.packages import Maker
from pipeline.project import Project
from tests.test_drivers import write_driver

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = "qemu-q35"
KEY = "0123456789abcdef"
LATER = "fedcba9876543210"
EPOCH = 1_700_000_000
#: What depmod made when the modules were built, and makes again on the machine.
GENERATED = ["alias", "alias.bin", "builtin.alias.bin", "builtin.bin", "dep", "dep.bin", "devname"]
GENERATED += ["softdep", "symbols", "symbols.bin", "weakdep"]

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("dpkg-deb", "rpm", "patchelf")),
    reason="dpkg-deb, rpm or patchelf is not installed: `make test` installs them",
)


def release_of(role: str, build: str = KEY) -> str:
    """A kernel's release as its build names it."""
    return f"6.12.107-rt-virt-{role}-{build[:12]}"


@pytest.fixture(scope="module")
def project() -> Project:
    return Project(ROOT)


def pretend_kernel(directory: Path, release: str, decompressor: str = "CONFIG_RD_ZSTD=y\n") -> Path:
    """What a kernel's action leaves, small; `decompressor` is the part of the configuration about the initramfs."""
    (directory / "headers" / "scripts" / "basic").mkdir(parents=True)
    modules = directory / "modules" / "lib" / "modules" / release
    (modules / "kernel" / "drivers" / "net").mkdir(parents=True)
    for name, text in {
        "bzImage": f"image of {release}",
        "config": f"CONFIG_PREEMPT_RT=y\nCONFIG_BLK_DEV_INITRD=y\n{decompressor}",
        "System.map": "0000 T start\n",
        "kernelrelease": f"{release}\n",
        "headers/Makefile": "all:\n",
        "headers/.config": "CONFIG_PREEMPT_RT=y\n",
        "headers/scripts/mkcompile_h": "#!/bin/sh\n",
    }.items():
        (directory / name).write_text(text)
    (directory / "headers" / "scripts" / "mkcompile_h").chmod(0o755)
    shutil.copy("/usr/bin/patchelf", directory / "headers" / "scripts" / "basic" / "fixdep")
    (modules / "kernel" / "drivers" / "net" / "igb.ko").write_text(f"module of {release}")
    for name in [*GENERATED, "order", "builtin", "builtin.modinfo"]:
        (modules / f"modules.{name}").write_text(name)
    return directory


@dataclass(frozen=True, slots=True)
class Made:
    """A package in both formats, and what `package.json` says of it."""

    deb: Path
    rpm: Path
    document: dict[str, object]

    def control(self, field: str) -> str:
        """A field of the deb's control file."""
        return output("dpkg-deb", "--field", str(self.deb), field)

    def deb_files(self) -> dict[str, str]:
        """Mode and owner, and target of a link, of all that the deb installs, by path."""
        found = {}
        for line in output("dpkg-deb", "--contents", str(self.deb)).splitlines():
            mode, owner, _size, _date, _time, *rest = line.split(maxsplit=5)
            path, _, link = rest[0].partition(" -> ")
            found[path.removeprefix(".").rstrip("/") or "/"] = f"{mode} {owner}" + (
                f" -> {link}" if link else ""
            )
        return found

    def rpm_query(self, what: str) -> list[str]:
        """Lines of what rpm says of the package file: `--list`, `--provides`, ..."""
        return output("rpm", "-qp", "--nosignature", what, str(self.rpm)).splitlines()

    def rpm_scripts(self) -> dict[str, str]:
        """The rpm's scripts, by tag: prein, postin, preun, postun, posttrans."""
        tags = ("prein", "postin", "preun", "postun", "posttrans")
        texts = {
            tag: output("rpm", "-qp", "--nosignature", "--qf", f"%{{{tag}}}", str(self.rpm)) for tag in tags
        }
        return {tag: text for tag, text in texts.items() if text != "(none)"}

    def deb_scripts(self, directory: Path) -> dict[str, str]:
        """The deb's maintainer scripts, by name."""
        subprocess.run(["dpkg-deb", "--control", str(self.deb), str(directory)], check=True)
        names = ("preinst", "postinst", "prerm", "postrm")
        return {name: (directory / name).read_text() for name in names if (directory / name).exists()}


def output(*command: str) -> str:
    """What a command prints; rpm looks for no database of this machine."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def make(action: Action, upstreams: dict[str, Path], work: Path, key: str = KEY) -> Made:
    """Run the packager as its step does: `upstreams` are directories with the outputs of actions, by action."""
    inputs, out = work / "in", work / "out"
    for directory in (inputs, out, work / "work"):
        directory.mkdir(parents=True)
    for name, file in action.files.items():
        (inputs / name).parent.mkdir(parents=True, exist_ok=True)
        (inputs / name).write_bytes(file.content)
    for name, used in action.inputs.items():
        lay(used, upstreams, inputs / name)
    Packager(inputs, out, work / "work", key, EPOCH).make()
    document = json.loads((out / "package.json").read_text())
    formats = document["formats"]
    return Made(out / "deb" / formats["deb"]["file"], out / "rpm" / formats["rpm"]["file"], document)


def lay(used: Upstream, upstreams: dict[str, Path], target: Path) -> None:
    """Lay one input out, as the executor does."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if used.action == packages.TOOL:
        target.symlink_to(ROOT / ".venv" / "bin" / used.output)
        return
    assert used.action in upstreams, used
    source = upstreams[used.action] / used.output
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy(source, target)


def licences(directory: Path) -> Path:
    """What the action that takes licence texts out of Linux leaves."""
    for name in ("COPYING", "LICENSES/preferred/GPL-2.0", "LICENSES/exceptions/Linux-syscall-note"):
        (directory / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / "texts" / name).write_text(f"text of {name}\n")
    return directory


@dataclass(frozen=True, slots=True)
class Factory:
    """Makes packages of pretended kernels in a directory of its own; what was asked for before is not made again."""

    project: Project
    directory: Path
    made: dict[tuple[str, ...], Made] = field(default_factory=dict)

    def __call__(
        self,
        what: str,
        build: str = KEY,
        version: str = "0.1.0",
        key: str = KEY,
        decompressor: str = "CONFIG_RD_ZSTD=y\n",
    ) -> Made:
        """The package of a recipe, for the kernel whose key is `build`, in a release of that version."""
        asked = (what, build, version, key, decompressor)
        if asked in self.made:
            return self.made[asked]
        role = what.rpartition("-")[2]
        release = msgspec.structs.replace(self.project.release, version=version)
        maker = Maker.of(ROOT, release, self.project.sources_lock)
        action = maker.package(PLATFORM, self.project.recipes.platforms[PLATFORM], what, {})
        work = self.directory / f"{what}-{len(list(self.directory.iterdir()))}"
        kernel = pretend_kernel(work / "kernel", release_of(role, build), decompressor)
        upstreams = {f"kernel:{PLATFORM}:{role}": kernel, "licences:linux-rt": licences(work / "licences")}
        self.made[asked] = make(action, upstreams, work, key)
        return self.made[asked]


@pytest.fixture(scope="module")
def factory(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Factory:
    return Factory(project, tmp_path_factory.mktemp("packages"))


# What is in them -------------------------------------------------------------------------------


def test_a_kernels_deb_is_laid_out_as_debians(factory: Factory) -> None:
    made = factory("kernel-image-host")
    release = release_of("host")
    assert made.control("Package") == f"linux-image-{release}"
    assert made.control("Version") == "0.1.0+g0123456789ab"
    assert made.control("Architecture") == "amd64"
    assert made.control("Section") == "kernel"
    assert made.control("Depends") == "kmod, initramfs-tools | linux-initramfs-tool"
    files = made.deb_files()
    for path in (f"/boot/vmlinuz-{release}", f"/boot/config-{release}", f"/boot/System.map-{release}"):
        assert files[path] == "-rw-r--r-- root/root"
    modules = f"/usr/lib/modules/{release}"
    assert f"{modules}/kernel/drivers/net/igb.ko" in files
    assert f"{modules}/modules.builtin.modinfo" in files
    assert f"{modules}/vmlinuz" not in files
    assert not [name for name in GENERATED if f"{modules}/modules.{name}" in files]
    assert f"/usr/share/doc/linux-image-{release}/copyright" in files


def test_a_kernels_rpm_is_laid_out_for_kernel_install(factory: Factory) -> None:
    made = factory("kernel-image-host")
    release = release_of("host")
    modules = f"/usr/lib/modules/{release}"
    files = made.rpm_query("--list")
    for name in ("vmlinuz", "config", "System.map", "modules.order", "kernel/drivers/net/igb.ko"):
        assert f"{modules}/{name}" in files
    assert modules in files  # its directory goes with it
    assert not [path for path in files if path.startswith("/boot")]
    assert f"/usr/share/licenses/linux-image-{release}/copyright" in files
    provides = made.rpm_query("--provides")
    assert "installonlypkg(kernel)" in provides
    assert f"kernel-uname-r = {release}" in provides
    assert {"kmod", "dracut", "/usr/bin/kernel-install"} <= set(made.rpm_query("--requires"))


def test_every_licence_text_is_in_the_package(factory: Factory, tmp_path: Path) -> None:
    made = factory("kernel-image-guest")
    subprocess.run(["dpkg-deb", "--extract", str(made.deb), str(tmp_path / "root")], check=True)
    text = (tmp_path / f"root/usr/share/doc/linux-image-{release_of('guest')}/copyright").read_text()
    for name in ("COPYING", "LICENSES/preferred/GPL-2.0", "LICENSES/exceptions/Linux-syscall-note"):
        assert f"text of {name}\n" in text
    assert "GPL-2.0-only WITH Linux-syscall-note" in text


def test_a_new_build_is_installed_beside_the_old_one(factory: Factory) -> None:
    for what in ("kernel-image-host", "kernel-headers-host"):
        old, new = factory(what), factory(what, build=LATER)
        assert old.control("Package") != new.control("Package")

        def owned(files: dict[str, str]) -> set[str]:
            return {path for path, mode in files.items() if not mode.startswith("d")}

        assert not owned(old.deb_files()) & owned(new.deb_files())


def test_the_same_kernel_in_a_newer_release_has_the_same_files(factory: Factory) -> None:
    """For dnf, which installs both versions: an equal file may belong to both, and no other."""
    old, new = factory("kernel-image-host"), factory("kernel-image-host", version="9.0", key=LATER)
    assert new.document["version"] == "9.0+gfedcba987654"
    assert old.rpm_query("--dump") == new.rpm_query("--dump")
    assert old.document["name"] == new.document["name"]


def test_headers_bring_their_programs_libraries(factory: Factory) -> None:
    made = factory("kernel-headers-guest")
    release = release_of("guest")
    sources = f"/usr/src/linux-headers-{release}"
    files = made.deb_files()
    assert made.control("Package") == f"linux-headers-{release}"
    assert files[f"/usr/lib/modules/{release}/build"].endswith(f" -> {sources}")
    assert files[f"{sources}/scripts/mkcompile_h"].startswith("-rwxr-xr-x")
    assert f"{sources}/.config" in files
    libraries = [path for path in files if path.startswith(f"/usr/lib/linux-headers-{release}/")]
    assert any(re.search(r"/ld-linux[^/]*\.so", path) for path in libraries)
    assert any(path.endswith("/libc.so.6") for path in libraries)
    assert f"kernel-devel-uname-r = {release}" in made.rpm_query("--provides")
    assert "gcc" in made.control("Recommends")


def test_headers_programs_are_told_where_their_libraries_are(factory: Factory, tmp_path: Path) -> None:
    made = factory("kernel-headers-guest")
    release = release_of("guest")
    subprocess.run(["dpkg-deb", "--extract", str(made.deb), str(tmp_path / "root")], check=True)
    program = tmp_path / f"root/usr/src/linux-headers-{release}/scripts/basic/fixdep"
    libraries = f"/usr/lib/linux-headers-{release}"
    assert output("patchelf", "--print-interpreter", str(program)).startswith(f"{libraries}/ld-linux")
    assert output("patchelf", "--print-rpath", str(program)).startswith("$ORIGIN/")


def test_equal_inputs_give_equal_bytes(factory: Factory, tmp_path: Path) -> None:
    for what in ("kernel-image-guest", "kernel-headers-guest"):
        first = factory(what)
        second = Factory(factory.project, tmp_path)(what)
        assert first.deb.read_bytes() == second.deb.read_bytes()
        assert first.rpm.read_bytes() == second.rpm.read_bytes()


# What their scripts do -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Machine:
    """A root directory in which maintainer scripts run, and programs that record how they were called."""

    root: Path

    def __post_init__(self) -> None:
        self.tools.mkdir(parents=True)
        for tool in ("depmod", "kernel-install", "linux-check-removal"):
            self.tool(tool, 'echo "${0##*/} $*" >>"$CALLS"')

    @property
    def tools(self) -> Path:
        return self.root / "tools"

    def tool(self, name: str, script: str) -> None:
        """Put a program into the path."""
        (self.tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.tools / name).chmod(0o755)

    def hooks(self, *directories: str) -> None:
        """A hook in each of these directories that records its name, arguments and environment."""
        for directory in directories:
            hook = self.root / directory / "zz-record"
            hook.parent.mkdir(parents=True)
            hook.write_text(
                '#!/bin/sh\nd=${0%/*}\necho "${d##*/} $* [$DEB_MAINT_PARAMS] INITRD=${INITRD:-}" >>"$CALLS"\n'
            )
            hook.chmod(0o755)

    def file(self, path: str, text: str = "x") -> Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return target

    def run(self, script: str, *arguments: str, name: str = "") -> tuple[int, list[str]]:
        """Run a script with its absolute paths below the root: its status, and the calls it made."""
        calls = self.root / "calls"
        calls.write_text("")
        moved = re.sub(r"(?<![\w.{}/-])/(etc|usr|boot|var)/", rf"{self.root}/\1/", script)
        moved = re.sub(r"(?<= )/(etc/kernel|usr/share/kernel)(?=[ ;])", rf"{self.root}/\1", moved)
        path = f"{self.tools}:{os.environ['PATH']}"
        done = subprocess.run(
            ["/bin/sh", "-c", moved, name or "script", *arguments],
            env={"PATH": path, "CALLS": str(calls), "DPKG_MAINTSCRIPT_NAME": name},
            capture_output=True,
            text=True,
            check=False,
        )
        lines = [line.replace(str(self.root), "") for line in calls.read_text().splitlines()]
        return done.returncode, lines


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


def test_debians_hooks_are_called_as_its_own_kernels_call_them(
    factory: Factory, machine: Machine, tmp_path: Path
) -> None:
    release = release_of("host")
    image = f"/boot/vmlinuz-{release}"
    scripts = factory("kernel-image-host").deb_scripts(tmp_path / "control")
    machine.hooks(*(f"etc/kernel/{name}.d" for name in scripts))
    machine.file(f"boot/config-{release}", "CONFIG_RD_ZSTD=y\n")

    def run(name: str, *arguments: str) -> list[str]:
        status, calls = machine.run(scripts[name], *arguments, name=name)
        assert status == 0
        return calls

    assert run("preinst", "install") == [f"preinst.d {release} {image} [install] INITRD="]
    assert run("postinst", "configure", "") == [
        f"depmod {release}",
        f"postinst.d {release} {image} [configure ] INITRD=Yes",
    ]
    assert run("prerm", "upgrade", "2") == []
    assert run("postrm", "upgrade", "2") == []
    assert run("prerm", "remove") == [
        f"linux-check-removal {release}",
        f"prerm.d {release} {image} [remove] INITRD=",
    ]
    assert run("postrm", "remove") == [f"postrm.d {release} {image} [remove] INITRD="]


def test_a_kernel_that_unpacks_no_initramfs_gets_none(
    factory: Factory, machine: Machine, tmp_path: Path
) -> None:
    made = factory("kernel-image-guest", decompressor="# CONFIG_RD_GZIP is not set\n")
    assert made.control("Depends") == "kmod"
    assert "dracut" not in made.rpm_query("--requires")
    scripts = made.deb_scripts(tmp_path / "control")
    machine.hooks("etc/kernel/postinst.d")
    machine.file(f"boot/config-{release_of('guest')}", "# CONFIG_RD_GZIP is not set\n")
    status, calls = machine.run(scripts["postinst"], "configure", "", name="postinst")
    assert status == 0
    assert calls[1].endswith("INITRD=No")


def test_a_machine_without_hooks_and_boot_loader_takes_the_kernel(
    factory: Factory, machine: Machine, tmp_path: Path
) -> None:
    release = release_of("host")
    scripts = factory("kernel-image-host").deb_scripts(tmp_path / "control")
    machine.file(f"boot/config-{release}", "CONFIG_RD_ZSTD=y\n")
    (machine.tools / "linux-check-removal").unlink()
    for name, arguments in (
        ("preinst", ["install"]), ("postinst", ["configure", ""]), ("prerm", ["remove"]), ("postrm", ["remove"]),
        ("postrm", ["purge"]),
    ):  # fmt: skip
        assert machine.run(scripts[name], *arguments, name=name)[0] == 0, name


def test_a_hook_that_fails_fails_the_installation(factory: Factory, machine: Machine, tmp_path: Path) -> None:
    scripts = factory("kernel-image-host").deb_scripts(tmp_path / "control")
    machine.file(f"boot/config-{release_of('host')}", "CONFIG_RD_ZSTD=y\n")
    machine.hooks("etc/kernel/postinst.d")
    machine.file("etc/kernel/postinst.d/initramfs", "#!/bin/sh\nexit 1\n").chmod(0o755)
    status, calls = machine.run(scripts["postinst"], "configure", "", name="postinst")
    assert status != 0
    assert not any(call.startswith("postinst.d") for call in calls)  # no boot entry for what would not boot


def test_nothing_is_left_of_a_purged_kernel(factory: Factory, machine: Machine, tmp_path: Path) -> None:
    release = release_of("host")
    scripts = factory("kernel-image-host").deb_scripts(tmp_path / "control")
    for name in GENERATED:
        machine.file(f"usr/lib/modules/{release}/modules.{name}")
    leftover = [f"boot/initrd.img-{release}", f"var/lib/initramfs-tools/{release}"]
    for path in leftover:
        machine.file(path)
    other = machine.file(f"boot/initrd.img-{release_of('host', LATER)}")
    assert machine.run(scripts["postrm"], "remove", name="postrm")[0] == 0
    assert not (machine.root / "usr/lib/modules" / release).exists()
    assert machine.run(scripts["postrm"], "purge", name="postrm")[0] == 0
    assert not [path for path in leftover if (machine.root / path).exists()]
    assert other.exists()


def test_what_others_put_beside_the_modules_stays(factory: Factory, machine: Machine, tmp_path: Path) -> None:
    scripts = factory("kernel-image-host").deb_scripts(tmp_path / "control")
    machine.file(f"usr/lib/modules/{release_of('host')}/modules.dep")
    other = machine.file(f"usr/lib/modules/{release_of('host')}/updates/own.ko")
    assert machine.run(scripts["postrm"], "remove", name="postrm")[0] == 0
    assert other.exists()
    assert not (other.parent.parent / "modules.dep").exists()


def test_rpms_kernel_goes_to_the_boot_loader_after_the_transaction(
    factory: Factory, machine: Machine
) -> None:
    release = release_of("host")
    scripts = factory("kernel-image-host").rpm_scripts()
    assert set(scripts) == {"posttrans", "preun", "postun"}
    assert machine.run(scripts["posttrans"]) == (
        0, [f"depmod {release}", f"kernel-install add {release} /usr/lib/modules/{release}/vmlinuz"],
    )  # fmt: skip
    # an older version of the same kernel's package goes, the kernel stays
    assert machine.run(scripts["preun"], "1") == (0, [])
    assert machine.run(scripts["postun"], "1") == (0, [])
    assert machine.run(scripts["preun"], "0") == (0, [f"kernel-install remove {release}"])
    machine.file(f"usr/lib/modules/{release}/modules.dep")
    image = machine.file(f"boot/vmlinuz-{release}")
    assert machine.run(scripts["postun"], "0")[0] == 0
    assert not image.exists()
    assert not (machine.root / "usr/lib/modules" / release).exists()


def test_a_kernel_that_could_not_be_made_to_boot_is_told(factory: Factory, machine: Machine) -> None:
    scripts = factory("kernel-image-host").rpm_scripts()
    machine.tool("kernel-install", "exit 5")
    assert machine.run(scripts["posttrans"])[0] == 5


def test_dkms_builds_for_new_headers(factory: Factory, machine: Machine, tmp_path: Path) -> None:
    made = factory("kernel-headers-host")
    assert made.rpm_scripts() == {}
    scripts = made.deb_scripts(tmp_path / "control")
    machine.hooks("etc/kernel/header_postinst.d")
    status, calls = machine.run(scripts["postinst"], "configure", "", name="postinst")
    assert (status, calls) == (0, [f"header_postinst.d {release_of('host')} [configure ] INITRD="])
    assert machine.run(scripts["postinst"], "abort-upgrade", "1", name="postinst") == (0, [])


# Real package managers -------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="rpm changes its root directory, which only root may")
def test_rpm_installs_both_kernels_and_leaves_nothing(factory: Factory, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for directory in ("boot", "usr/lib/modules", "usr/share/licenses", "usr/src", "var/lib/rpm"):
        (root / directory).mkdir(parents=True)
    before = sorted(path.relative_to(root) for path in root.rglob("*") if "var/lib/rpm" not in str(path))
    made = [
        factory("kernel-image-host"),
        factory("kernel-image-host", build=LATER),
        factory("kernel-headers-host"),
    ]

    def rpm(*arguments: str) -> str:
        return output("rpm", "--root", str(root), "--dbpath", "/var/lib/rpm", *arguments)

    rpm("-i", "--nosignature", "--nodeps", "--noscripts", *(str(each.rpm) for each in made))
    names = [str(each.document["name"]) for each in made]
    assert sorted(rpm("-qa", "--qf", "%{name}\\n").splitlines()) == sorted(names)
    assert rpm("-V", "--nodeps", *names) == ""
    assert (
        root / f"usr/lib/modules/{release_of('host')}/vmlinuz"
    ).read_text() == f"image of {release_of('host')}"
    rpm("-e", "--noscripts", "--nodeps", *names)
    after = sorted(path.relative_to(root) for path in root.rglob("*") if "var/lib/rpm" not in str(path))
    assert after == before


@pytest.mark.skipif(os.geteuid() != 0, reason="rpm changes its root directory, which only root may")
def test_rpm_takes_two_versions_of_the_same_kernels_package(factory: Factory, tmp_path: Path) -> None:
    """As dnf installs them, since the package provides installonlypkg(kernel)."""
    root = tmp_path / "root"
    (root / "var" / "lib" / "rpm").mkdir(parents=True)
    old, new = factory("kernel-image-host"), factory("kernel-image-host", version="9.0", key=LATER)

    def rpm(*arguments: str) -> str:
        return output("rpm", "--root", str(root), "--dbpath", "/var/lib/rpm", *arguments)

    for made in (old, new):
        rpm("-i", "--nosignature", "--nodeps", "--noscripts", str(made.rpm))
    assert len(rpm("-qa").splitlines()) == 2
    rpm("-e", "--noscripts", f"{old.document['name']}-{old.document['version']}-1")
    assert rpm("-qa", "--qf", "%{version}") == new.document["version"]
    assert rpm("-V", "--nodeps", str(new.document["name"])) == ""


# Drivers ---------------------------------------------------------------------------------------


def test_a_drivers_package_is_for_one_kernel(project: Project, machine: Machine, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "recipes").mkdir(parents=True)
    write_driver(checkout)
    driver = drivers.load(checkout, project.recipes.platforms)["hello"]
    release = release_of("guest")
    built = tmp_path / "driver"
    modules = built / "root" / "usr" / "lib" / "modules" / release / "updates"
    modules.mkdir(parents=True)
    (modules / "hello.ko").write_text("module")
    (built / "licence").write_text("Copy it as you like.\n")
    (built / "kernelrelease").write_text(f"{release}\n")
    (built / "driver.json").write_text('{"schema": 1}\n')
    maker = Maker.of(ROOT, project.release, project.sources_lock)
    variables = packages.driver_variables(drivers.Build("hello", driver, "guest"))
    action = maker.package(PLATFORM, project.recipes.platforms[PLATFORM], "driver", variables)
    assert action.name == "package:qemu-q35:driver-hello"
    made = make(action, {"driver:qemu-q35:hello": built}, tmp_path / "package")
    assert made.control("Package") == f"virt-rt-driver-hello-{release}"
    assert made.control("Depends") == f"kmod, linux-image-{release}"
    assert f"linux-image-{release}" in made.rpm_query("--requires")
    assert f"/usr/lib/modules/{release}/updates/hello.ko" in made.deb_files()
    assert f"/usr/lib/modules/{release}/updates/hello.ko" in made.rpm_query("--list")
    # where tools find it; two builds of one driver are in nobody's way
    assert f"/usr/share/virt-rt/drivers/{release}/hello.json" in made.deb_files()
    subprocess.run(["dpkg-deb", "--extract", str(made.deb), str(tmp_path / "root")], check=True)
    copyright_text = tmp_path / f"root/usr/share/doc/virt-rt-driver-hello-{release}/copyright"
    assert "Copy it as you like.\n" in copyright_text.read_text()
    # the kernel's modules are told anew, unless it goes together with its driver
    scripts = made.deb_scripts(tmp_path / "control")
    assert machine.run(scripts["postrm"], "remove") == (0, [])
    machine.file(f"usr/lib/modules/{release}/modules.order")
    assert machine.run(scripts["postinst"], "configure", "") == (0, [f"depmod {release}"])
    assert machine.run(scripts["postrm"], "remove") == (0, [f"depmod {release}"])
    assert machine.run(made.rpm_scripts()["postun"], "0") == (0, [f"depmod {release}"])
    assert machine.run(made.rpm_scripts()["postun"], "1") == (0, [])
