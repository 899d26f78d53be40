"""Boots an emulated RT host in which a guest runs under KVM by its launch scripts and its service, and has the gate
judge it.

Runs inside the lab's builder, standard library only. Everything is what ships: the host kernel, the host's
tuning with plan and check tool, qemu, the guest's kernel, disk, launch scripts and service. Ours are the board, which
qemu emulates in software, and a small disk with the lab's own files: the script that acts in the host and tells what it
sees over a virtio-serial port, and what the guest is handed. The host is told of it by systemd credentials
(systemd.system-credentials(7)), so that its own disk holds nothing of the lab.

Below `IN`: `disk.qcow2` and `labhost.json` of the host on which apt installed the packages; `host/kernelrelease`;
`artifacts/<platform>/` with what those packages were made of, laid out as they install it; `launch/` and
`tuning/root/` for a guest that is given the board's devices, shown in the host instead of those that are installed;
`tools/`, which the guest gets as a disk: the driver `irqlat`, to which its script is added; `virt-rt-measure`;
`virt-rt-stack*` of `recipes/lab/`; `expected.json`, the fields of `stackgate.Expectations` but those that `prove`
adds; `measurement.json`, see `stackmeasure`. Environment: `PLATFORM`; `SABOTAGE`, what of `stackgate.SABOTAGES` is
broken before it is judged, separated by spaces; `STACK_TIMEOUT_SECONDS` for the whole run, default `LIMIT_S`.

Leaves in `OUT` `stack.json`, `console-host.log` and `console-guest.log`, whatever happens in there, in `records/` the
directories that host and guest sent, and in `measurement/` the measurement that was among them, with its verdict. Exit
status: 0 when every finding is fine, 1 when one is not, each named on stderr; 2 when the step was called wrongly.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

try:
    from pipeline import bootproof, gate, labboard, stackgate, stackmeasure, stackrecords
except ImportError:  # in the step their files lie beside this one
    import bootproof  # type: ignore[import-not-found, no-redef]
    import gate  # type: ignore[import-not-found, no-redef]
    import labboard  # type: ignore[import-not-found, no-redef]
    import stackgate  # type: ignore[import-not-found, no-redef]
    import stackmeasure  # type: ignore[import-not-found, no-redef]
    import stackrecords  # type: ignore[import-not-found, no-redef]

#: Raised when the meaning of a field of stack.json changes.
SCHEMA = 1

IN, OUT, WORK = Path("/build/in"), Path("/build/out"), Path("/build/work")

#: Where a platform's artifacts are on a host.
INSTALLED = "opt/virt-rt"

#: Seconds for all of it, and for each boot of the guest within.
LIMIT_S, BOOT_S = 2400, 600

#: Sizes of the lab's disk and of the one on it for the guest, MiB.
LAB_MIB, TOOLS_MIB = 32, 8

#: Addresses of the NIC's physical function, and of its virtual one in the guest (RFC 5737).
NEAR, FAR = "192.0.2.1", "192.0.2.2"

#: The device of the host's own: the bus is that of its root port, the third.
SPINNING = "0000:03:00.0"

#: What the lab's disk holds of `recipes/lab/`, by its name there.
SCRIPTS = {
    "host": "virt-rt-stack-host.sh",
    "settle": "virt-rt-stack-settle.sh",
    "qemu": "virt-rt-stack-qemu.sh",
    "echo": "virt-rt-stack-echo.py",
    "late": "virt-rt-stack-late-host.sh",
    "disturb": "virt-rt-stack-disturb.sh",
}

#: The phases of the run, each with the answer that ends it.
PHASES = {
    "host boot": "running",
    "preflight": "devices_before",
    "guest boot": "booted",
    "audits": "audit_back",
    "devices used": "used",
    "measured": "guest_measured",
    "made late": "late_interrupt",
    "guest shut down": "devices_after",
    "records": "records_host",
    "guest boot, kernel inside": "inside_guest",
    "kill and cleanup": "devices_cleaned_again",
    "host reboot": "again_running",
    "guest boot, as a service": "service_guest",
    "service stopped": "service_devices_after",
}

#: Lines of the host's console that are shown when the run ends badly.
TAIL = 20


def assignments(variables: dict[str, object]) -> str:
    """Lines that shells and systemd (EnvironmentFile) read alike; no value may have a quote or a `$`."""
    lines = []
    for name, value in variables.items():
        if any(character in str(value) for character in "\"'$`\\\n"):
            raise ValueError(f"{name}: no value for an environment file: {value!r}")
        lines.append(f'{name}="{value}"\n')
    return "".join(lines)


def guest_credentials(variables: dict[str, object]) -> dict[str, bytes]:
    """What the guest is handed, by file name: the agent, and units that run it with those variables."""
    settings = " ".join(f'"{name}={value}"' for name, value in variables.items())

    def unit(file: str) -> str:
        return (IN / file).read_text().replace("@ENVIRONMENT@", settings)

    return {
        "agent": labboard.credential("virt-rt.stack", (IN / "virt-rt-stack-tools.sh").read_text()),
        "alone": labboard.credential(
            "systemd.extra-unit.virt-rt-stack-alone.service", unit("virt-rt-stack-alone.service")
        ),
        "dropin": labboard.credential(
            "systemd.unit-dropin.multi-user.target~virt-rt-stack", "[Unit]\nWants=virt-rt-stack.service\n"
        ),
        "unit": labboard.credential(
            "systemd.extra-unit.virt-rt-stack.service", unit("virt-rt-stack-guest.service")
        ),
    }


def host_credentials() -> dict[str, bytes]:
    """What the host is handed, by file name: units that bring the lab's disk, and run the script on it."""
    return {
        "lab": labboard.credential(
            "systemd.extra-unit.virt-rt-lab.service", (IN / "virt-rt-stack-lab.service").read_text()
        ),
        "stack": labboard.credential(
            "systemd.extra-unit.virt-rt-stack.service", (IN / "virt-rt-stack.service").read_text()
        ),
        "dropin-lab": labboard.credential(
            "systemd.unit-dropin.sysinit.target~virt-rt-lab", "[Unit]\nRequires=virt-rt-lab.service\n"
        ),
        "dropin-stack": labboard.credential(
            "systemd.unit-dropin.multi-user.target~virt-rt-stack", "[Unit]\nWants=virt-rt-stack.service\n"
        ),
    }


def lab_disk(
    disk: Path,
    platform: str,
    guest: str,
    variables: dict[str, object],
    guests: dict[str, object],
    asked: dict[str, dict[str, Any]],
) -> None:
    """Make the disk with the lab's files.

    `variables` are those of the script in the host, `guests` of the agent; `asked` are requests to measure, by place.
    """
    tree = WORK / "lab"
    for directory in ("credentials", "state", "instead"):
        (tree / directory).mkdir(parents=True)
    for name, file in SCRIPTS.items():
        shutil.copyfile(IN / file, tree / name)
        (tree / name).chmod(0o755)
    (tree / "environment").write_text(assignments(variables))
    for name, content in guest_credentials(guests).items():
        (tree / "credentials" / name).write_bytes(content)
    (tree / "state" / "part").write_text("first_boot\n")
    (tree / "state" / "answers").write_text("")
    start: dict[str, object] = {
        "QEMU": "/run/virt-rt-lab/qemu",
        "CONSOLE": "/dev/virtio-ports/virt-rt.console",
        "SNAPSHOT": 1,
        # longer than the host waits: a guest that does not shut down is not to end by qemu's being told to
        "SHUTDOWN_SECONDS": 300,
        "SSH_PORT": "",
        "QMP": "",
        "CMDLINE_EXTRA": "quiet systemd.show_status=no systemd.unit=virt-rt-stack-alone.service",
    }
    (tree / "guest.conf").write_text(assignments(start))
    instead = {
        f"etc/virt-rt/guests/{guest}.conf": tree / "guest.conf",
        "usr/share/virt-rt/plan.json": IN / "tuning/root/usr/share/virt-rt/plan.json",
    }
    for script in sorted((IN / "launch").iterdir()):
        instead[f"{INSTALLED}/{platform}/launch/{guest}/{script.name}"] = script
    for place, source in instead.items():
        (tree / "instead" / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tree / "instead" / place)
    tools = WORK / "tools"
    shutil.copytree(IN / "tools", tools)
    for name, file in {"agent": "virt-rt-stack-guest.sh", "late": "virt-rt-stack-late-guest.sh"}.items():
        shutil.copyfile(IN / file, tools / name)
    shutil.copyfile(IN / "virt-rt-measure", tools / "virt-rt-measure")
    for place, request in asked.items():
        where = tree / "request.json" if place == "host" else tools / "request.json"
        where.write_text(json.dumps(request))
    make_disk(tools, tree / "tools", TOOLS_MIB)
    make_disk(tree, disk, LAB_MIB)


def make_disk(tree: Path, disk: Path, mib: int) -> None:
    """A disk with nothing but an ext4 file system, filled from a directory."""
    with disk.open("wb") as whole:
        whole.truncate(mib << 20)
    command = [
        "mke2fs",
        "-q",
        "-F",
        "-t",
        "ext4",
        "-m",
        "0",
        "-E",
        "root_owner=0:0",
        "-d",
        str(tree),
        str(disk),
    ]
    subprocess.run(command, check=True, env=os.environ | {"LC_ALL": "C.UTF-8"})


def plain_entry(host: dict[str, Any]) -> tuple[str, int]:
    """The boot entry without isolation, and where GRUB's environment is, of what is known of the host's disk.

    ValueError unless there is exactly one such entry.
    """
    found = [
        entry["id"]
        for entry in host["entries"]
        if entry["id"].startswith("virt-rt-plain-virt-rt-host-") and entry["release"] == host["release"]
    ]
    if len(found) != 1:
        raise ValueError(f"boot entries of {host['release']} without isolation: {', '.join(found) or 'none'}")
    return found[0], host["environment_offset"]


def phases(at: dict[str, float], total: float) -> dict[str, float]:
    """Seconds of each phase that was finished, and of what came after."""
    seconds, before = {}, 0.0
    for phase, answer in PHASES.items():
        if answer in at:
            seconds[phase] = round(at[answer] - before, 1)
            before = at[answer]
    return seconds | {"power off": round(total - before, 1)}


def prove(
    platform: str, sabotages: Collection[str], limit_s: float
) -> tuple[list[gate.Finding], dict[str, Any]]:
    """Run the host, judge it: the findings, and what is recorded beside them."""
    built = IN / "artifacts" / platform
    expected = stackgate.Expectations(
        **json.loads((IN / "expected.json").read_text()),
        release=(IN / "host" / "kernelrelease").read_text().strip(),
        guest_release=(built / "kernel/guest/kernelrelease").read_text().strip(),
        installed=bootproof.digests(built),
    )
    guest = f"guest-{expected.guest}"
    asked = stackmeasure.requests(
        json.loads((IN / "measurement.json").read_text()),
        {"host": expected.release, guest: expected.guest_release},
        (IN / "tuning/root/usr/share/virt-rt/plan.json").read_bytes(),
    )
    begun_s = int(time.time())
    variables: dict[str, object] = {
        "BUILT": f"/{INSTALLED}/{platform}",
        "GUEST": expected.guest,
        "RT_VCPU": expected.vcpu,
        "RT_CPU": expected.cpu,
        "SPARE_CPU": expected.other_cpu,
        "REST_CPUS": expected.emulator,
        "PHYSICAL": expected.physical,
        "FUNCTION": expected.function,
        "SPINNING": SPINNING,
        "BOOT_SECONDS": BOOT_S,
        "ECHOES": expected.echoes,
        "NEAR": NEAR,
        "FAR": FAR,
        "SABOTAGE": " ".join(sabotages),
    }
    guests: dict[str, object] = {
        "ECHOES": expected.echoes,
        "FAR": FAR,
        "MASKED": " ".join(expected.masked),
        "PLACE": guest,
        "INTERRUPTS": expected.interrupts,
        "ISOLATED": expected.isolated.partition(",")[0].partition("-")[0],
        "SABOTAGE": " ".join(sabotages),
    }
    lab, answers = WORK / "lab.raw", WORK / "answers"
    lab_disk(lab, platform, expected.guest, variables, guests, asked)
    credentials = {name: WORK / f"credential-{name}" for name in host_credentials()}
    for name, content in host_credentials().items():
        credentials[name].write_bytes(content)
    disk = labboard.Host(built / "qemu", IN / "disk.qcow2", WORK)
    disk.lay_over()
    if "isolation-removed" in sabotages:
        disk.choose(*plain_entry(json.loads((IN / "labhost.json").read_text())))
    host = [*disk.arguments(), "-drive", f"if=none,id=lab,format=raw,cache=unsafe,file={lab}"]
    host += ["-device", "virtio-blk-pci,drive=lab,serial=virt-rt-lab"]
    ports = {"virt-rt.stack": answers, "virt-rt.records": WORK / "records"}
    ports["virt-rt.console"] = OUT / "console-guest.log"
    board = labboard.board(expected.machine, host, OUT / "console-host.log", ports, credentials.values())
    # a device of the host's own, whose interrupts disturb
    board += ["-device", "pcie-root-port,id=port3,chassis=3,slot=3", "-device", "edu,bus=port3"]
    run = labboard.run([str(disk.qemu), *board], answers, WORK / "messages", limit_s)
    got = run.ended or "powered off"
    machine = gate.Finding("machine", "the host powers itself off", got, not run.ended)
    received = stackrecords.receive(WORK / "records", OUT / "records")
    measurement = OUT / stackmeasure.MEASUREMENT
    stackmeasure.gather(
        OUT / "records", measurement, asked, stackmeasure.expectations(platform, asked, begun_s)
    )
    found = [
        machine,
        *stackgate.judge(run.answers, expected, received),
        stackmeasure.judge(measurement, IN / "virt-rt-measure"),
        *stackmeasure.attribute(OUT / "records" / "host", measurement),
    ]
    return found, {
        "booted_sha256": expected.installed,
        "seconds": phases(run.at, run.total),
        "seconds_total": round(run.total, 1),
        "told": stackgate.record(run.answers),
    }


def main() -> int:
    """Do it all; see the module for what is read and left."""
    for console in ("console-host.log", "console-guest.log"):
        (OUT / console).touch()
    try:
        platform, sabotages = os.environ["PLATFORM"], os.environ["SABOTAGE"].split()
        if not stackgate.SABOTAGES.keys() >= set(sabotages):
            raise ValueError(f"SABOTAGE: {sabotages}, known: {', '.join(stackgate.SABOTAGES)}")
        limit_s = float(os.environ.get("STACK_TIMEOUT_SECONDS", LIMIT_S))
        findings, recorded = prove(platform, sabotages, limit_s)
    except (KeyError, TypeError, ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"stack proof: {type(error).__name__}: {error}", file=sys.stderr)
        print("give the step all inputs and variables that its module names", file=sys.stderr)
        return 2
    ok = all(finding.ok for finding in findings)
    verdict = {
        "schema": SCHEMA,
        "platform": platform,
        "evidence": "emulated",
        "latency_verdict": "emulated: not evidence of latency",
        "sabotages": sabotages,
        "ok": ok,
        "findings": [asdict(finding) for finding in findings],
        **recorded,
    }
    (OUT / "stack.json").write_text(json.dumps(verdict, indent=2, sort_keys=True) + "\n")
    failed = [finding for finding in findings if not finding.ok]
    for finding in failed:
        print(f"{finding.name}: wanted {finding.wanted}; got {finding.got}", file=sys.stderr)
    if failed:
        log = (OUT / "console-host.log").read_text(errors="replace")
        for line in log.splitlines()[-TAIL:]:
            print(f"host: | {line}", file=sys.stderr)
    print(f"{len(findings) - len(failed)} of {len(findings)} fine in {recorded['seconds_total']:.0f} s")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
