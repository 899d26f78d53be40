"""Boots guests both ways, under emulation and by their own launch scripts, and has the gate judge them.

Runs inside the lab's builder, standard library only. What the guest has to say is asked by a unit that
systemd takes from its credentials (systemd.system-credentials(7)), which qemu hands over as files of fw_cfg: every
board has it, with and without firmware that could tell of SMBIOS strings. Neither the image nor its kernel's command
line is changed for the proof (the scripts add what emulation needs). The answers come back over a virtio-serial port
of their own.

Below `IN`: `artifacts/<platform>/` as the products lie there; `virt-rt-proof.sh` and `virt-rt-proof.service`
of `recipes/lab/`; `expected.json`, by guest: `isolated`, `housekeeping` (vCPU numbers), `unwanted` (units),
`duration_s`, `interval_us`. Environment: `PLATFORM`; `BOOT_TIMEOUT_SECONDS` for each boot, default 240.

Leaves in `OUT` `boot.json` and `console-<guest>-{outside,inside}.log`, whatever the guests do. Exit status: 0
when every finding is fine, 1 when one is not, each named on stderr; 2 when the step was called wrongly.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

try:
    from pipeline import gate
except ImportError:  # in the step its file lies beside this one
    import gate  # type: ignore[import-not-found, no-redef]

#: Raised when the meaning of a field of boot.json changes.
SCHEMA = 1

IN, OUT, WORK = Path("/build/in"), Path("/build/out"), Path("/build/work")

#: How the kernel is found, and the launch script that boots so.
BOOTS = {"outside": "kvmqemu.sh", "inside": "kvmqemu-rfs.sh"}

#: Latencies that cyclictest counts one by one, microseconds.
HISTOGRAM_US = 10_000

#: Seconds a boot may take unless the environment says otherwise: some 30 under emulation on two idle cores.
LIMIT_S = 240

#: Seconds that a launch script has to end when its time is up.
PATIENCE_S = 30

#: What fw_cfg calls a credential, in at most 55 bytes: so the unit's name is short, and what wants it is what every
#: system has as a unit with a name no longer, the mount of its root.
CREDENTIAL, CREDENTIAL_BYTES = "opt/io.systemd.credentials/{}", 55
UNIT, WANTED_BY = "p.service", "-.mount"

#: Lines of the console and of qemu's messages that are shown when a boot ends badly.
TAIL = 15


@dataclass(frozen=True, slots=True)
class Run:
    """How one boot went.

    `answers` is all that came over the guest's port, perhaps nothing; `ended` says how qemu ended, and is
    empty when it ended by itself with status 0. Times are seconds since qemu's start: `to_login` until
    systemd had started everything, when ssh lets people in (None when that was never heard of), `total` until
    the end.
    """

    answers: bytes
    ended: str
    messages: str
    to_login: float | None
    total: float


def proof_arguments(expected: gate.Expectations, scripts: Path, work: Path) -> list[str]:
    """Arguments for qemu that put the proof into the guest and give it a port to answer on.

    `scripts` holds the unit and its script; the credentials, and later the answers, are files in `work`.
    """
    variables = {
        "ISOLATED": ",".join(map(str, expected.isolated)),
        "MEASURED_COUNT": len(expected.isolated),
        "HOUSEKEEPING": ",".join(map(str, expected.housekeeping)),
        "DURATION_SECONDS": expected.duration_s,
        "INTERVAL_US": expected.interval_us,
        "HISTOGRAM_US": HISTOGRAM_US,
        "UNWANTED_UNITS": " ".join(expected.unwanted),
    }
    unit = (scripts / "virt-rt-proof.service").read_text()
    settings = " ".join(f'"{name}={value}"' for name, value in variables.items())
    unit = unit.replace("@ENVIRONMENT@", settings)
    credentials = {
        f"systemd.extra-unit.{UNIT}": unit,
        f"systemd.unit-dropin.{WANTED_BY}": f"[Unit]\nWants={UNIT}\n",
        "virt-rt.proof": (scripts / "virt-rt-proof.sh").read_text(),
    }
    arguments = ["-no-reboot"]
    for number, (credential, text) in enumerate(credentials.items()):
        path = work / f"credential-{number}"
        path.write_text(text)
        arguments += ["-fw_cfg", f"name={CREDENTIAL.format(credential)},file={path}"]
    return [
        *arguments,
        *("-device", "virtio-serial-pci"),
        *("-chardev", f"file,id=proof,path={work / 'answers'}"),
        *("-device", "virtserialport,chardev=proof,name=virt-rt.proof"),
    ]


def boot(script: Path, console: Path, work: Path, arguments: list[str], limit_s: float) -> Run:
    """Run a launch script under emulation, nothing kept, until the guest powers off or time is up."""
    answers = work / "answers"
    answers.write_bytes(b"")
    environment = os.environ | {
        "EMULATE": "1",
        "SNAPSHOT": "1",
        "CONSOLE": str(console),
        "STATE_DIR": str(work / "state"),
        "SSH_PORT": "",
        "TMPDIR": str(work),
    }
    started = time.monotonic()
    to_login, ended = None, ""
    with (work / "messages").open("w+b") as messages:
        with subprocess.Popen(
            [script, "--", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=messages,
            stderr=messages,
        ) as process:
            while process.poll() is None:
                if to_login is None and b"\n" in answers.read_bytes():
                    to_login = time.monotonic() - started
                late = time.monotonic() - started - limit_s
                if late > 0:
                    ended = f"not finished after {limit_s:g} s"
                    # The script takes qemu along when it is told to end, at once from the third time on.
                    process.terminate() if late < PATIENCE_S else process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
        messages.seek(0)
        said = messages.read().decode(errors="replace")
    if not ended and process.returncode < 0:
        ended = f"the launch script was killed by signal {-process.returncode}"
    elif not ended and process.returncode:
        ended = f"qemu ended with status {process.returncode}"
    return Run(answers.read_bytes(), ended, said, to_login, time.monotonic() - started)


def judge(run: Run, expected: gate.Expectations) -> list[gate.Finding]:
    """The gate's findings, behind one about qemu itself."""
    got = run.ended or "ended with status 0"
    machine = gate.Finding("machine", "qemu ends by itself", got, not run.ended)
    return [machine, *gate.judge(run.answers, expected)]


def report(run: Run, findings: list[gate.Finding]) -> dict[str, Any]:
    """One boot's part of boot.json; None where the guest did not tell."""
    try:
        measured: object = gate.latencies(run.answers)
    except gate.MalformedError:
        measured = None
    try:
        told = {name: answer.text.strip() for name, answer in gate.parse_answers(run.answers).items()}
    except gate.MalformedError:
        told = {}
    return {
        "ok": all(finding.ok for finding in findings),
        "seconds_to_login": run.to_login and round(run.to_login, 1),
        "seconds_total": round(run.total, 1),
        "findings": [asdict(finding) for finding in findings],
        "cmdline": told.get("cmdline"),
        "latencies_us": measured,
    }


def prove(guest: str, built: Path, expected: gate.Expectations, limit_s: float) -> dict[str, Any]:
    """Boot one guest both ways; the guest's part of boot.json. `built` is the platform's directory."""
    boots = {}
    for way, script in BOOTS.items():
        console = OUT / f"console-{guest}-{way}.log"
        console.touch()
        work = WORK / f"{guest}-{way}"
        work.mkdir()
        run = boot(
            built / "launch" / guest / script, console, work, proof_arguments(expected, IN, work), limit_s
        )
        findings = judge(run, expected)
        boots[way] = report(run, findings)
        failed = [finding for finding in findings if not finding.ok]
        for finding in failed:
            print(
                f"{guest} {way}: {finding.name}: wanted {finding.wanted}; got {finding.got}", file=sys.stderr
            )
        if run.ended:
            log = console.read_text(errors="replace")
            for line in [*run.messages.splitlines()[-TAIL:], *log.splitlines()[-TAIL:]]:
                print(f"{guest} {way}: | {line}", file=sys.stderr)
        print(f"{guest} {way}: {len(findings) - len(failed)} of {len(findings)} fine in {run.total:.0f} s")
    return {"ok": all(part["ok"] for part in boots.values()), "boots": boots}


def digests(built: Path) -> dict[str, str]:
    """sha256 (hex) of what was booted, by path below `built`: kernel, disks, scripts, qemu, firmware."""
    found = {}
    for path in sorted(path for path in built.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            found[path.relative_to(built).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def main() -> int:
    """Boot every guest; see the module for what is read and left."""
    try:
        built = IN / "artifacts" / os.environ["PLATFORM"]
        limit_s = float(os.environ.get("BOOT_TIMEOUT_SECONDS", LIMIT_S))
        release = (built / "kernel" / "guest" / "kernelrelease").read_text().strip()
        expected = {
            guest: gate.Expectations(
                isolated=tuple(said["isolated"]),
                housekeeping=tuple(said["housekeeping"]),
                release=release,
                unwanted=tuple(said["unwanted"]),
                duration_s=said["duration_s"],
                interval_us=said["interval_us"],
            )
            for guest, said in json.loads((IN / "expected.json").read_text()).items()
        }
        if not expected:
            raise ValueError("expected.json names no guest")
    except (KeyError, ValueError, OSError) as error:
        print(f"boot proof: {type(error).__name__}: {error}", file=sys.stderr)
        print("give the step all inputs and variables that its module names", file=sys.stderr)
        return 2
    guests = {guest: prove(guest, built, expected[guest], limit_s) for guest in expected}
    ok = all(part["ok"] for part in guests.values())
    verdict = {
        "schema": SCHEMA,
        "platform": os.environ["PLATFORM"],
        "evidence": "emulated",
        "latency_verdict": "emulated: not evidence of latency",
        "ok": ok,
        "booted_sha256": digests(built),
        "guests": guests,
    }
    (OUT / "boot.json").write_text(json.dumps(verdict, indent=2, sort_keys=True) + "\n")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
