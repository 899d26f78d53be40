"""Architectures: what each is told, and that all of them go through the same code."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pipeline import archive, contract, image, kernel, libvirt, locks, packagerecipe, qemu, settings
from pipeline.action import Action
from pipeline.architecture import ARCHITECTURES, BUILD, architecture
from pipeline.debian import AptRoot
from pipeline.errors import UserError
from pipeline.locking import Locker, Request
from pipeline.project import Project
from pipeline.sources import Sources
from tests.local_archive import LocalArchive, make_key, missing_tools

ROOT = Path(__file__).resolve().parent.parent
#: A platform of each architecture; the first is that of the machine that builds.
NATIVE, CROSSED = "qemu-q35", "qemu-virt-arm64"

#: Words by which code would ask for an architecture.
NAMED = re.compile(
    r"\b(amd64|arm64|x86_64|x86-64|aarch64|i386|bzImage|ttyS0|ttyAMA0|q35|BOOTX64|BOOTAA64|x64|aa64)\b"
)
#: Where such a word stands in code all the same, and why.
ALLOWED = {
    "pipeline/architecture.py": "the table",
    "pipeline/contract.py": "it runs alone, and reads the kernel's own name of x86_64 in the head of a configuration",
    "pipeline/hostcheck/hardware.py": "it runs alone on a host, and tells of its CPU",
    "pipeline/labboard.py": "it runs alone; the lab's emulated host is one board",
    "pipeline/labhost.py": "the lab's emulated host is one board, and so is its console",
    "pipeline/project.py": "the name of the default platform",
    "pipeline/symbolfile.py": "a format's own numbers of machines, by their names",
    "recipes/steps/lab-disk.sh": "its table; the lab's emulated host is one board",
}


@pytest.fixture(scope="module")
def project() -> Project:
    return Project(ROOT)


# One code ----------------------------------------------------------------------------------------------


def words_of_python(text: str) -> Iterator[str]:
    """Every literal of a module but its docstrings."""
    tree = ast.parse(text)
    documented = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            yield node.value


def words_of_shell(text: str) -> Iterator[str]:
    """Every line of a script but its comments."""
    for line in text.splitlines():
        yield re.sub(r"(^|\s)#.*", "", line)


def test_no_architecture_is_named_outside_of_the_tables() -> None:
    named = set()
    for path in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "recipes" / "steps").glob("*.sh")]:
        words = words_of_python if path.suffix == ".py" else words_of_shell
        if any(NAMED.search(word) for word in words(path.read_text())):
            named.add(path.relative_to(ROOT).as_posix())
    assert named - set(ALLOWED) == set()
    assert set(ALLOWED) - named == set(), "these name none any more"


def test_the_test_sees_a_name_in_code() -> None:
    assert [word for word in words_of_python('"""amd64"""\nif arch == "arm64": pass') if NAMED.search(word)]
    assert not any(NAMED.search(word) for word in words_of_python('"""amd64"""\n# arm64\n'))
    assert not any(NAMED.search(word) for word in words_of_shell("true # on amd64"))
    assert any(NAMED.search(word) for word in words_of_shell("case $ARCH in arm64) ;; esac"))


def made(project: Project, platform: str) -> dict[str, Action]:
    """The platform's actions by name, in which its own name and its guests' are written alike."""
    guests = sorted(project.recipes.guests_of(platform), key=len, reverse=True)

    def alike(name: str) -> str:
        kind, _, rest = name.partition(":")
        for word, instead in ((platform, "PLATFORM"), *((guest, "GUEST") for guest in guests)):
            rest = rest.replace(word, instead)
        return f"{kind}:{rest}"

    return {
        alike(action.name): action
        for action in project.graph
        if (action.place or "").startswith(f"{platform}/")
    }


def test_both_architectures_go_through_the_same_steps(project: Project) -> None:
    native, crossed = made(project, NATIVE), made(project, CROSSED)
    # the lab emulates one board whole; drivers are compiled for the machine that builds
    alone = {name for name in native if name.split(":")[0] in ("stack", "labhost", "driver", "stack-tuning")}
    alone |= {name for name in native if re.match(r"(stack|lab|driver).*|package:PLATFORM:driver", name)}
    assert set(native) - alone == set(crossed) - {"lab:PLATFORM"}
    for name in set(native) & set(crossed):
        a, b = native[name], crossed[name]
        assert (a.kind, a.version, a.script and a.script.digest) == (
            b.kind,
            b.version,
            b.script and b.script.digest,
        ), name


def test_what_compiles_is_told_for_whom(project: Project) -> None:
    graph = project.graph
    for name in ("kernel:{}:host", "kernel:{}:guest", "qemu:{}"):
        assert graph[name.format(NATIVE)].environment["CROSS_COMPILE"] == ""
        assert graph[name.format(CROSSED)].environment["CROSS_COMPILE"] == "aarch64-linux-gnu-"
        builders = [graph[name.format(platform)].builder for platform in (NATIVE, CROSSED)]
        assert builders[1] == f"{builders[0]}-arm64"
    assert graph[f"kernel:{CROSSED}:host"].environment["KERNEL_TARGETS"] == "Image modules"
    assert graph[f"kernel:{CROSSED}:guest"].environment["KERNEL_TARGETS"] == "Image modules vmlinux"


def test_another_architectures_machines_are_emulated_by_a_qemu_that_runs_here(project: Project) -> None:
    graph, platforms = project.graph, project.recipes.platforms
    assert qemu.emulator_of(NATIVE, platforms[NATIVE]) == f"qemu:{NATIVE}"
    name = qemu.emulator_of(CROSSED, platforms[CROSSED])
    emulator, product = graph[name], graph[f"qemu:{CROSSED}"]
    assert (emulator.arch, product.arch) == (BUILD, "arm64")
    for key in ("TARGETS", "BOARD", "DEVICES", "FIRMWARE", "PREFIX"):
        assert emulator.environment[key] == product.environment[key]
    assert (emulator.environment["CROSS_COMPILE"], emulator.environment["RUNNER"]) == ("", "")
    assert product.environment["RUNNER"] == "qemu-aarch64"
    assert (emulator.environment["ACCELERATORS"], product.environment["ACCELERATORS"]) == ("tcg", "kvm tcg")
    assert emulator.place is None


def test_an_unknown_architecture_names_those_that_there_are() -> None:
    with pytest.raises(UserError, match="architecture sparc64 is not supported") as caught:
        architecture("sparc64")
    assert caught.value.hint == "use one of: amd64, arm64"


# What each is told -------------------------------------------------------------------------------------


def test_parameters_of_one_architecture_are_not_on_anothers_command_line(project: Project) -> None:
    recipes, table = project.recipes, project.settings
    lines = {
        name: dict(
            word.partition("=")[::2]
            for word, _ in settings.host_command_line(
                recipes.plans[name], table, (), recipes.platforms[name].arch
            )
        )
        for name in (NATIVE, CROSSED)
    }
    of_x86 = {
        "tsc", "intel_pstate", "amd_pstate", "processor.max_cstate", "intel_idle.max_cstate", "intel_iommu", "iommu",
    }  # fmt: skip
    of_arm = {"iommu.passthrough", "cpuidle.off", "kvm.halt_poll_ns"}
    assert set(lines[NATIVE]) - set(lines[CROSSED]) == of_x86
    assert set(lines[CROSSED]) - set(lines[NATIVE]) == of_arm
    for name in ("isolcpus", "nohz_full", "rcu_nocbs", "irqaffinity", "cpufreq.default_governor"):
        assert name in lines[CROSSED]


def test_modules_and_files_of_one_architecture_are_not_set_on_another(project: Project) -> None:
    found = settings.resolve(project.recipes.plans[CROSSED], project.settings, (), "arm64")
    assert found["module_parameters"] == []  # KVM is no module there
    assert {s.name for s in found["sysctl"]} >= {"kernel.sched_rt_runtime_us", "vm.stat_interval"}


def test_a_choice_that_sets_nothing_on_the_platforms_architecture_is_refused(project: Project) -> None:
    platform = msgspec.structs.replace(project.recipes.platforms[CROSSED], choices=("nx-huge-pages-off",))
    with pytest.raises(UserError, match="nx-huge-pages-off sets nothing on arm64"):
        settings.chosen(ROOT, CROSSED, platform, project.settings)
    fine = msgspec.structs.replace(platform, choices=("idle-poll",))
    choices = settings.chosen(ROOT, CROSSED, fine, project.settings)
    line = dict(
        settings.host_command_line(project.recipes.plans[CROSSED], project.settings, choices, "arm64")
    )
    assert "nohlt" in line and "idle=poll" not in line


def test_a_guest_is_told_its_own_console(project: Project) -> None:
    recipes = project.recipes
    lines = {
        name: image.command_line(guest, recipes.platforms[guest.platform])
        for name, guest in recipes.guests.items()
    }
    assert "console=ttyS0 " in lines["rt-guest"]
    assert "console=ttyAMA0 " in lines["rt-guest-arm64"]
    assert lines["rt-guest-arm64"].replace("ttyAMA0", "ttyS0") == lines["rt-guest"]


@pytest.mark.parametrize("boot", ["outside", "inside"])
def test_the_libvirt_domain_of_a_guest_is_of_its_board(boot: str, project: Project, tmp_path: Path) -> None:
    recipes = project.recipes
    guests = {
        name: msgspec.structs.replace(guest, boot=boot) for name, guest in recipes.guests_of(CROSSED).items()
    }
    action = libvirt.libvirt(
        ROOT, "rt-guest-arm64", recipes.platforms[CROSSED], guests, recipes.plans[CROSSED]
    )
    texts = {name: file.content.decode() for name, file in action.files.items()}
    assert [name for name in texts if name.startswith("board-")] == ["board-virt.xml.j2"]
    domain = libvirt.render(libvirt.DOMAIN, action.parameters, texts)
    assert '<type arch="aarch64" machine="virt">' in domain
    assert ("kernel/guest/Image<" if boot == "outside" else "AAVMF_VARS.fd") in domain
    assert not re.search(r"tsc|hpet|smm|vmport|<apic|OVMF|isa-serial|x86_64", domain)
    assert ("AAVMF_CODE" in libvirt.render(libvirt.DEFINE, action.parameters, texts)) == (boot == "inside")
    if shutil.which("virt-xml-validate") is None or shutil.which("xmllint") is None:
        pytest.skip("virt-xml-validate is not installed (libvirt-clients, libxml2-utils)")
    (tmp_path / "domain.xml").write_text(domain)
    command = ["virt-xml-validate", str(tmp_path / "domain.xml"), "domain"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("role", kernel.ROLES)
def test_the_contract_has_entries_of_each_architecture(role: contract.Role) -> None:
    text = (ROOT / "kernel-configs" / kernel.CONTRACT).read_text()
    rules = contract.parse_contract(text, "contract.toml")
    chosen = {
        each.debian: {rule.symbol for rule in contract.select_rules(rules, role, each.kernel, (6, 12))}
        for each in ARCHITECTURES.values()
    }
    both = chosen["amd64"] & chosen["arm64"]
    assert {"PREEMPT_RT", "NO_HZ_FULL", "CPU_ISOLATION"} <= both
    assert (
        chosen["arm64"] - both
        == {
            "host": {"KVM", "ARM_SMMU_V3", "SERIAL_AMBA_PL011_CONSOLE"},
            "guest": {"SERIAL_AMBA_PL011_CONSOLE"},
        }[role]
    )
    assert (
        chosen["amd64"] - both
        == {
            "host": {"KVM_INTEL", "KVM_AMD", "INTEL_IOMMU", "AMD_IOMMU", "IRQ_REMAP"},
            "guest": {"KVM_GUEST"},
        }[role]
    )


def test_what_a_package_says_of_its_architecture(project: Project) -> None:
    recipe = packagerecipe.load(ROOT)["qemu"]
    texts = {arch: [each.what for each in recipe.of_architecture(arch).licences] for arch in ARCHITECTURES}
    assert [what for what in texts["arm64"] if "OVMF" in what or "SeaBIOS" in what] == []
    assert [what for what in texts["amd64"] if "AAVMF" in what] == []
    assert "qemu" in texts["amd64"] and "qemu" in texts["arm64"]
    described = msgspec.json.decode(
        project.graph[f"package:{CROSSED}:qemu"].files["description.json"].content
    )
    assert (described["arch"], described["rpm_arch"]) == ("arm64", "aarch64")
    for_kernel = project.graph[f"package:{CROSSED}:kernel-image-host"]
    described = msgspec.json.decode(for_kernel.files["description.json"].content)
    assert described["variables"]["boot_loaders"] == "grub-efi-arm64 | systemd-boot"


def test_the_plan_of_both_is_of_one_checkout(project: Project) -> None:
    states = project.plan([f"kernel:{NATIVE}:host", f"kernel:{CROSSED}:host"])
    assert {"builder:kernel", "builder:kernel-arm64", "source:linux-rt"} <= set(states)
    keys = project.graph.keys
    assert keys[f"kernel:{NATIVE}:host"] != keys[f"kernel:{CROSSED}:host"]


# Packages of another architecture ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if missing := missing_tools():
        pytest.skip(f"{', '.join(missing)} not there")
    home = tmp_path_factory.mktemp("keys") / "archive"
    return home, make_key(home)


@pytest.fixture
def debian(tmp_path: Path, key: tuple[Path, Path]) -> LocalArchive:
    both = LocalArchive(tmp_path / "archive", *key, arches=("amd64", "arm64"))
    for arch in both.arches:
        both.package("base", essential=True, arch=arch)
        both.package("libtool", depends="libbase", arch=arch, multi_arch="same")
        both.package("libbase", arch=arch, multi_arch="same")
    both.package("compiler", depends="libtool")
    both.publish()
    return both


def locker(debian: LocalArchive, tmp_path: Path) -> Locker:
    (tmp_path / "scratch").mkdir(exist_ok=True)
    sources = Sources(tmp_path / "git", tmp_path / "scratch", debian.archives, lambda line: None)
    return Locker(sources, tmp_path / "apt")


def test_a_builder_has_libraries_of_two_architectures(debian: LocalArchive, tmp_path: Path) -> None:
    request = Request("builder/x", BUILD, "test", ("compiler", "libtool:arm64"))
    locked = locker(debian, tmp_path).lock_packages(request)
    # of the other architecture what was asked for, and nothing that is essential there
    assert [p.name for p in locked.packages] == [
        "base", "compiler", "libbase", "libbase:arm64", "libtool", "libtool:arm64",
    ]  # fmt: skip
    assert {p.arch for p in locked.packages if p.name.endswith(":arm64")} == {"arm64"}
    text = locks.encode_packages(locks.PackagesLock(sets=(locked,)))
    (tmp_path / "lock").write_bytes(text)
    assert locks.load_packages(tmp_path / "lock").get("builder/x") == locked


def test_a_package_of_the_wrong_architecture_is_refused() -> None:
    package = locks.LockedPackage(
        name="libtool",
        version="1",
        arch="arm64",
        archive="debian",
        path="a_1_arm64.deb",
        sha256="0" * 64,
        size=1,
    )
    with pytest.raises(ValueError, match="libtool is not for amd64"):
        locks.PackageSet(name="builder/x", arch="amd64", suite="test", request=(), packages=(package,))


def test_locked_packages_of_another_architecture_stay_when_others_move(
    debian: LocalArchive, tmp_path: Path
) -> None:
    """A pin without an architecture would be the native package's alone."""
    debian.package("libtool", "2", arch="arm64", multi_arch="same")
    debian.publish()
    apt = AptRoot(tmp_path / "apt2", "test", BUILD, debian.archives, foreign=("arm64",))
    apt.update()
    apt.pin([("libtool:arm64", "1")])
    versions = {p.name: p.version for p in apt.resolve(["libtool:arm64"])}
    assert versions["libtool:arm64"] == "1"
    apt.pin([])
    assert {p.name: p.version for p in apt.resolve(["libtool:arm64"])}["libtool:arm64"] == "2"


# What was built ------------------------------------------------------------------------------------------


class Built:
    """Outputs of actions that the store has; kernels and qemu are not built for a test."""

    def __init__(self, project: Project, scratch: Path) -> None:
        self.project, self.scratch = project, scratch

    def __call__(self, name: str, output: str) -> Path:
        """An output of an action; that of a directory is unpacked."""
        result = self.project.store.lookup(self.project.graph.keys[name])
        if result is None:
            pytest.skip(f"not built yet, and not for a test: `doit {name}` builds it")
        blob, kind = result.outputs[output]
        path = self.project.store.path(blob.digest)
        if kind == "file":
            return path
        target = self.scratch / name.replace(":", "-") / output
        if not target.exists():
            target.mkdir(parents=True)
            archive.unpack(path, target)
        return target


@pytest.fixture(scope="module")
def built(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    yield Built(project, tmp_path_factory.mktemp("built"))
    project.store.close()


def elf_machine(path: Path) -> int:
    """Which machine an ELF file is for (e_machine, two bytes at 18)."""
    head = path.read_bytes()[:20]
    assert head[:4] == b"\x7fELF", path
    return int.from_bytes(head[18:20], "little")


AARCH64 = 183
X86_64 = 62


@pytest.mark.slow
@pytest.mark.parametrize("role", kernel.ROLES)
def test_the_kernel_that_was_compiled_across_is_one(role: contract.Role, built: Built) -> None:
    name = f"kernel:{CROSSED}:{role}"
    head = built(name, "Image").read_bytes()[:64]
    assert head[56:60] == b"ARM\x64"  # Documentation/arch/arm64/booting.rst
    assert head[:2] == b"MZ"  # UEFI starts it
    config = contract.parse_config(built(name, "config").read_text(), "config")
    contract.check_arch(config, "arm64")
    text = (ROOT / "kernel-configs" / kernel.CONTRACT).read_text()
    rules = contract.select_rules(
        contract.parse_contract(text, "contract.toml"), role, "arm64", config.version
    )
    assert contract.check_rules(config, rules) == ()
    modules = list(built(name, "modules").rglob("*.ko"))
    assert modules and {elf_machine(path) for path in modules} == {AARCH64}
    programs = [built(name, "headers") / "scripts" / each for each in ("basic/fixdep", "mod/modpost")]
    assert {elf_machine(path) for path in programs} == {AARCH64}
    if role == "guest":
        assert elf_machine(built(name, "vmlinux")) == AARCH64


@pytest.mark.slow
def test_qemu_that_was_compiled_across_runs_there_and_the_emulator_here(built: Built) -> None:
    for name, machine in ((f"qemu:{CROSSED}", AARCH64), (f"emulator:{CROSSED}", X86_64)):
        program = built(name, "bin") / "qemu-system-aarch64"
        assert elf_machine(program) == machine
        assert (built(name, "share") / "qemu" / architecture("arm64").board.code).is_file()


@pytest.mark.slow
def test_packages_name_the_architecture_in_each_formats_words(built: Built) -> None:
    from pipeline.packagefile import examine

    for what in ("kernel-image-host", "kernel-headers-host", "kernel-image-guest", "qemu"):
        (deb,) = built(f"package:{CROSSED}:{what}", "deb").glob("*.deb")
        (rpm,) = built(f"package:{CROSSED}:{what}", "rpm").glob("*.rpm")
        assert (examine(deb).arch, examine(rpm).arch) == ("arm64", "aarch64")


@pytest.mark.slow
def test_programs_in_packages_bring_their_own_architectures_libraries(built: Built, tmp_path: Path) -> None:
    (deb,) = built(f"package:{CROSSED}:qemu", "deb").glob("*.deb")
    subprocess.run(["dpkg-deb", "--extract", deb, tmp_path], check=True)
    prefix = tmp_path / "opt/virt-rt" / CROSSED / "qemu"
    programs = [path for path in (prefix / "bin").iterdir() if path.is_file()]
    libraries = list((prefix / "lib").iterdir())
    assert {path.name for path in libraries} >= {"ld-linux-aarch64.so.1", "libc.so.6", "libglib-2.0.so.0"}
    assert {elf_machine(path) for path in (*programs, *libraries)} == {AARCH64}


@pytest.mark.slow
def test_apt_of_that_architecture_sees_the_packages(built: Built, tmp_path: Path) -> None:
    name = f"repo:{CROSSED}"
    apt = built(name, "apt")
    channel = next(path.name for path in (apt / "dists").iterdir())
    assert {path.name for path in (apt / "dists" / channel / "main").iterdir()} == {"binary-arm64"}
    key = tmp_path / "key.asc"
    shutil.copyfile(built(name, "key.asc"), key)
    for place in ("state/lists/partial", "cache/archives/partial", "etc"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "state/status").touch()
    (tmp_path / "sources.list").write_text(
        f"deb [signed-by={key} arch=arm64] {apt.as_uri()} {channel} main\n"
    )
    options = {
        "Dir::State": tmp_path / "state", "Dir::Cache": tmp_path / "cache", "Dir::Etc": tmp_path / "etc",
        "Dir::State::status": tmp_path / "state/status", "Dir::Etc::sourcelist": tmp_path / "sources.list",
        "Dir::Etc::sourceparts": "none", "APT::Architecture": "arm64", "APT::Architectures": "arm64",
        "APT::Sandbox::User": "root",
    }  # fmt: skip
    flags = [word for key_, value in options.items() for word in ("-o", f"{key_}={value}")]

    def run(*command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    run("apt-get", *flags, "update", "-o", "APT::Update::Error-Mode=any")
    found = run("apt-cache", *flags, "show", f"qemu-kvm-rt-{CROSSED}", f"virt-rt-host-{CROSSED}")
    assert "Architecture: arm64\n" in found


@pytest.mark.slow
def test_dnf_of_that_architecture_sees_the_packages(built: Built, tmp_path: Path) -> None:
    if shutil.which("dnf") is None:
        pytest.skip("dnf is not there")
    yum = built(f"repo:{CROSSED}", "yum")
    channel = next(path.name for path in yum.iterdir())
    assert "aarch64" in {path.name for path in (yum / channel).iterdir()}
    command = [
        "dnf", "-q", "--forcearch", "aarch64", f"--repofrompath=ours,{(yum / channel / 'aarch64').as_uri()}",
        "--repo=ours", f"--setopt=cachedir={tmp_path}", "--nogpgcheck", "repoquery", "--qf", "%{name} %{arch}\n",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = {tuple(line.split()) for line in done.stdout.splitlines() if line}
    assert (f"qemu-kvm-rt-{CROSSED}", "aarch64") in found
    assert {arch for _, arch in found} == {"aarch64", "noarch"}
