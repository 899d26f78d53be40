"""What the tuning sets, and whether it is in force: kernel, command line, isolation, sysctls, services, pages.

Each check is a generator of findings over a machine and a plan.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace

from . import findings
from .findings import Finding, guarded
from .machine import Machine, UnreadableError, cpulist, parse_cpulist, parse_mask
from .planfile import HugePages, Plan, Setting

_CPU = "/sys/devices/system/cpu"
_VENDORS = ("kvm_intel", "kvm_amd")
#: The module that is for CPUs of another make, by the `vendor_id` of /proc/cpuinfo.
_FOREIGN = {"GenuineIntel": "kvm_amd", "AuthenticAMD": "kvm_intel", "HygonGenuine": "kvm_intel"}
_BOOT_ENTRY = "boot the entry that the tuning installs, not the fallback; see /proc/cmdline"
#: The release of the kernel that this host was proven with; of the package virt-rt-host.
_KERNEL = "/usr/share/virt-rt/kernel"
#: Where a unit's file may be (systemd.unit(5)).
_UNIT_DIRECTORIES = (
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
)


def kernel(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """PREEMPT_RT by the running kernel's version, and by its configuration where that can be read.

    Where the host's package says which kernel is meant, it is that one and no other.
    """
    name, wanted, remedy = "kernel", "PREEMPT_RT", "boot the platform's real-time host kernel"
    meant = machine.optional(_KERNEL)
    version = machine.text("/proc/version")
    release = machine.text("/proc/sys/kernel/osrelease")
    says = "PREEMPT_RT" in version.split()
    configured = _config(machine, release)
    if configured is None:
        got = f"{release}, {'' if says else 'not '}PREEMPT_RT; its configuration cannot be read"
    else:
        got = f"{release}, {'' if says else 'not '}PREEMPT_RT, configured {'with' if configured else 'without'} it"
    good = says and configured is not False
    if meant:
        good = good and release == meant
        wanted = f"{meant}, PREEMPT_RT"
        remedy = f"boot {meant}; virt-rt-tuning apply makes it the kernel that starts by itself"
    yield findings.judge(name, good, wanted, got, remedy)


def _config(machine: Machine, release: str) -> bool | None:
    """Whether the configuration has PREEMPT_RT, None when no configuration is readable."""
    packed = machine.path("/proc/config.gz")
    try:
        text = gzip.decompress(packed.read_bytes()).decode(errors="replace")
    except (FileNotFoundError, PermissionError):
        found = machine.optional(f"/boot/config-{release}")
        if found is None:
            return None
        text = found
    except (OSError, EOFError) as error:
        raise UnreadableError(f"/proc/config.gz: {error}") from None
    return "CONFIG_PREEMPT_RT=y" in text.splitlines()


def split_options(text: str) -> list[str]:
    """A command line's options for the kernel: quotes keep white space in, and what follows `--` is init's.

    Source: next_arg() in lib/cmdline.c.
    """
    options: list[str] = []
    option, quoted = "", False
    for letter in f"{text} ":
        if letter == '"':
            quoted = not quoted
        elif letter.isspace() and not quoted:
            if option == "--":
                break
            options += [option] if option else []
            option = ""
        else:
            option += letter
    return options


def _key(option: str) -> str:
    # The kernel takes a dash and an underscore in a parameter's name for the same (parameq, kernel/params.c).
    return option.partition("=")[0].replace("-", "_")


def command_line(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """Every option of the plan is there, and nothing else is said about the same parameter.

    Of two values the kernel mostly takes the later one, but of two isolations the first: any other value is
    therefore refused, wherever it stands. The same option twice does no harm.
    """
    got = split_options(machine.text("/proc/cmdline"))
    wanted = [option for each in plan.command_line for option in split_options(each.name)]
    missing: list[str] = []
    contradicted: list[str] = []
    # of what a plan does not name this is refused: a host without it loses what the plan was made for
    for key in dict.fromkeys([*map(_key, wanted), "highres"]):
        asked = [option.partition("=")[2] for option in wanted if _key(option) == key]
        found = [(option, option.partition("=")[2]) for option in got if _key(option) == key]
        names = [option for option in wanted if _key(option) == key]
        missing += [name for name, value in zip(names, asked) if value not in [each for _, each in found]]
        contradicted += [option for option, value in found if value not in asked]
        in_order = list(dict.fromkeys(value for _, value in found if value in asked))
        if not set(asked) - set(in_order) and in_order != list(dict.fromkeys(asked)):
            contradicted.append(f"{key} in another order")
    told = [f"missing: {' '.join(missing)}"] if missing else []
    told += [f"contradicted: {' '.join(contradicted)}"] if contradicted else []
    yield findings.judge(
        "command line",
        not told,
        " ".join(wanted),
        "; ".join(told) or f"all {len(wanted)} options of the plan",
        _BOOT_ENTRY,
    )


def isolated(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """The CPUs that the running kernel's scheduler leaves alone."""
    yield _isolation(machine, plan, "isolated CPUs", "isolated")


def tickless(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """The CPUs on which the running kernel stops its tick."""
    yield _isolation(machine, plan, "CPUs without tick", "nohz_full")


def _isolation(machine: Machine, plan: Plan, name: str, file: str) -> Finding:
    found = parse_cpulist(machine.text(f"{_CPU}/{file}"))
    return findings.judge(name, found == plan.isolated, cpulist(plan.isolated), cpulist(found), _BOOT_ENTRY)


def new_interrupts(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """Where interrupts go that are set up from now on (`irqaffinity=`)."""
    default = parse_mask(machine.text("/proc/irq/default_smp_affinity"))
    yield findings.judge(
        "new interrupts",
        bool(default) and set(default) <= set(plan.housekeeping),
        f"within CPUs {cpulist(plan.housekeeping)}",
        f"on CPUs {cpulist(default)}",
        f"boot with irqaffinity={cpulist(plan.housekeeping)}",
    )


def sysctls(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """Every sysctl of the plan."""
    for each in plan.sysctl:
        # Dots separate, and a slash is a dot within a name, as sysctl(8) has it.
        path = "/proc/sys/" + each.name.translate(str.maketrans("./", "/."))
        name, remedy = f"sysctl {each.name}", f"sysctl -w {each.name}={each.value}"
        yield from guarded(name, _value(machine, name, path, each, remedy))


def throttling(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """Whether real-time threads leave the others a share of each period; without is a choice, never a default."""
    name = "real-time throttling"
    runtime = machine.number("/proc/sys/kernel/sched_rt_runtime_us")
    period = machine.number("/proc/sys/kernel/sched_rt_period_us")
    chosen = plan.sysctl_value("kernel.sched_rt_runtime_us")
    off = "off: a real-time thread that never sleeps takes its CPU for ever"
    if runtime == -1:
        if chosen == "-1":
            yield findings.warn(name, "off, as chosen", off)
        else:
            remedy = "sysctl -w kernel.sched_rt_runtime_us=950000, or choose it in the platform's recipe"
            yield findings.fail(name, "on: the plan does not switch it off", off, remedy)
        return
    share = f"{runtime} of {period} us"
    wanted = f"{chosen} of {period} us" if chosen not in (None, "-1") else f"950000 of {period} us or more"
    if chosen == "-1":
        wanted, good = "off, as chosen", False
    else:
        good = str(runtime) == chosen if chosen is not None else runtime * 100 >= period * 95
    remedy = f"sysctl -w kernel.sched_rt_runtime_us={chosen or 950000}"
    yield findings.judge(name, good, wanted, share, remedy)


def module_parameters(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """Every module parameter of the plan, as the loaded module has it.

    Of the two modules that drive a CPU's virtualization only the one for this CPU may be expected, and it must
    be there, whatever the plan says of their absence.
    """
    vendor = machine.cpuinfo[0].get("vendor_id", "") if machine.cpuinfo else ""
    foreign = _FOREIGN.get(vendor, "")
    for each in plan.module_parameters:
        module, _, parameter = each.name.partition("/")
        name = f"module {module}.{parameter}"
        if not machine.exists(f"/sys/module/{module}"):
            if module == foreign:
                yield findings.ok(name, f"{module} is for CPUs of another make", each.value)
            elif module not in _VENDORS and _may_lack(machine, each):
                yield findings.ok(name, f"not there: {each.absent}", each.value)
            else:
                remedy = f"modprobe {module}"
                yield findings.fail(name, each.value, f"{module} is not loaded", remedy)
            continue
        path = f"/sys/module/{module}/parameters/{parameter}"
        kept = replace(each, absent="") if module in _VENDORS else each
        remedy = f"see /etc/modprobe.d; unload {module} and load it again, or boot again"
        yield from guarded(name, _value(machine, name, path, kept, remedy))


def files(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """Every value that the tuning writes below /sys and /proc at boot."""
    for each in plan.files:
        remedy = f"echo {each.value} >{each.name}; the tuning's boot service does it, see its status"
        yield from guarded(each.name, _value(machine, each.name, each.name, each, remedy))


def _may_lack(machine: Machine, setting: Setting) -> bool:
    """Whether the plan says that a setting may be missing, and its witness is there."""
    return bool(setting.absent) and (not setting.witness or machine.exists(setting.witness))


def _value(machine: Machine, name: str, path: str, setting: Setting, remedy: str) -> Iterator[Finding]:
    got, wanted = machine.optional(path), setting.value
    if got is None and _may_lack(machine, setting):
        yield findings.ok(name, f"not there: {setting.absent}", wanted)
        return
    if got is None:
        yield findings.unknown(name, wanted, f"{path} is not there", "boot the platform's host kernel")
        return
    good = _normal(path, got) == _normal(path, wanted)
    yield findings.judge(name, good, wanted, " ".join(got.split()) or "(empty)", remedy)


def _normal(path: str, text: str) -> str:
    """One spelling for values that the kernel takes for the same."""
    words = text.split()
    chosen = [word for word in words if word.startswith("[") and word.endswith("]")]
    if len(chosen) == 1:  # one of several, as in /sys/kernel/mm/transparent_hugepage/enabled
        return chosen[0][1:-1]
    if path.endswith(("cpumask", "affinity")):
        return f"CPUs {parse_mask(text)}"
    if path.startswith("/sys/module/"):
        return {"Y": "1", "y": "1", "N": "0", "n": "0"}.get(text.strip(), text.strip())
    return " ".join(words)


def services(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """Units that would wake up beside real-time work: masked or not installed, and not running."""
    units = [each.name for each in plan.masked_services]
    if not units:
        return
    if machine.live and shutil.which("systemctl") and machine.path("/run/systemd/system").is_dir():
        states = _asked(units)
    else:
        states = {unit: _filed(machine, unit) for unit in units}
    for unit in units:
        got = states[unit]
        good = got in ("masked", "not installed")
        yield findings.judge(f"service {unit}", good, "masked", got, f"systemctl mask --now {unit}")


def _asked(units: list[str]) -> dict[str, str]:
    """The state of each unit as systemd has it."""
    command = ["systemctl", "show", "--property=Id,LoadState,ActiveState", "--", *units]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnreadableError(f"systemctl show: {error}") from None
    blocks = done.stdout.strip().split("\n\n")
    if done.returncode or len(blocks) != len(units):
        raise UnreadableError(f"systemctl show: {done.stderr.strip() or 'not a state for each unit'}")
    states = {}
    for unit, block in zip(units, blocks):
        fields = dict(line.partition("=")[::2] for line in block.splitlines())
        load, active = fields.get("LoadState", ""), fields.get("ActiveState", "")
        if not load or not active:
            raise UnreadableError(f"systemctl show: no state of {unit}")
        if active not in ("inactive", "failed"):
            states[unit] = f"{active}, though {load}" if load != "loaded" else active
        else:
            states[unit] = {"masked": "masked", "not-found": "not installed"}.get(
                load, f"{active}, but not masked: anything may start it"
            )
    return states


def _filed(machine: Machine, unit: str) -> str:
    """The state of a unit by its files alone; the first directory that has one counts."""
    for directory in _UNIT_DIRECTORIES:
        path = machine.path(f"{directory}/{unit}")
        if path.is_symlink() and str(path.readlink()) == "/dev/null":
            return "masked"
        if path.is_symlink() or path.exists():
            return f"installed in {directory}, and not masked"
    return "not installed"


def hugepages(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """Huge pages on the nodes where guests want them."""
    for each in plan.hugepages:
        name = f"huge pages of {each.size_kib} KiB, node {each.node}"
        yield from guarded(name, _pages(machine, name, each))


def _pages(machine: Machine, name: str, wanted: HugePages) -> Iterator[Finding]:
    pages = f"hugepages-{wanted.size_kib}kB"
    path = f"/sys/devices/system/node/node{wanted.node}/hugepages/{pages}/nr_hugepages"
    count = machine.number(path)
    yield findings.judge(
        name,
        count >= wanted.count,
        f"{wanted.count} or more",
        str(count),
        f"echo {wanted.count} >{path} soon after boot, while memory is in one piece",
    )


def choices(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """What the platform's recipe traded for latency, so that nobody forgets."""
    for each in plan.choices:
        yield findings.warn(f"choice: {each.name}", "a known trade", f"{each.value} ({each.reason})")
