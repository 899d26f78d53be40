"""The verdict on a host on which our packages were installed: answers in, findings out; pure, standard library only.

It fails closed: a finding is fine only when its answer is there, whole and as expected. Where apt or dpkg refuses,
the finding has their own words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

try:
    from pipeline import gate
except ImportError:  # in the step its file lies beside this one
    import gate  # type: ignore[import-not-found, no-redef]

#: Settings of apt with which it would take what nobody signed.
LAX = (
    "APT::Get::AllowUnauthenticated",
    "Acquire::AllowInsecureRepositories",
    "Acquire::AllowWeakRepositories",
    "Acquire::AllowDowngradeToInsecureRepositories",
)

#: How the ids of our boot entries begin: see `09_virt-rt` and `11_virt-rt-plain` of the tuning.
MEANT, PLAIN = "virt-rt-host-", "virt-rt-plain-"

#: Characters that a finding shows of what a command said.
SHOWN = 600


@dataclass(frozen=True, slots=True)
class Expectations:
    """What is promised of the host.

    release     the kernel release of the RT host kernel
    parameters  those of its command line that the plan has
    isolation   names of those that the fallback entry must not have
    packages    version by name of the packages that were asked for, as the repository's index has them
    """

    release: str
    parameters: tuple[str, ...]
    isolation: tuple[str, ...]
    packages: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of GRUB's menu.

    `id` is what `grub-reboot` takes: that of the entry, behind those of its submenus and `>`. `kernel` is the
    kernel's path and `initrd` its initramfs's, empty when there is none; `parameters` is the command line.
    """

    title: str
    id: str
    kernel: str
    parameters: tuple[str, ...]
    initrd: str

    @property
    def release(self) -> str:
        """The release that the kernel's file name tells."""
        return self.kernel.rpartition("/vmlinuz-")[2]


def entries(menu: str) -> list[Entry]:
    """The entries of a `grub.cfg` that start a kernel, in the menu's order; MalformedError when it cannot be read."""
    found: list[Entry] = []
    blocks: list[dict[str, str]] = []
    for line in menu.splitlines():
        words = line.split()
        if words and words[-1] == "{":
            blocks.append({"kind": words[0], "title": "", "id": ""})
            if words[0] in ("menuentry", "submenu"):
                title = re.match(r"\s*\w+ '((?:[^']|'\\'')*)'", line)
                name = re.search(r"\$menuentry_id_option '([^']*)' \{$", line)
                if title is None or (name is None and words[0] == "submenu"):
                    raise gate.MalformedError(f"not a menu entry of grub-mkconfig's: {line.strip()[:80]!r}")
                blocks[-1] |= {
                    "title": title[1].replace("'\\''", "'"),
                    "id": name[1] if name else title[1],
                }
        elif words == ["}"]:
            if not blocks:
                raise gate.MalformedError("the menu has an end without a beginning")
            closed = blocks.pop()
            if closed["kind"] == "menuentry" and "linux" in closed:
                path = ">".join(block["id"] for block in [*blocks, closed])
                kernel, *parameters = closed["linux"].split()
                found.append(
                    Entry(closed["title"], path, kernel, tuple(parameters), closed.get("initrd", ""))
                )
        elif blocks and len(words) > 1 and words[0] in ("linux", "initrd"):
            blocks[-1][words[0]] = " ".join(words[1:])
    if blocks:
        raise gate.MalformedError("the menu is cut short")
    if not found:
        raise gate.MalformedError("the menu has no entry that starts a kernel")
    return found


def default(menu: str) -> Entry:
    """The entry that a `grub.cfg` starts by itself; MalformedError when that is not its first one."""
    chosen = set(re.findall(r'^\s*set default="(.*)"$', menu, re.MULTILINE)) - {"${next_entry}"}
    if chosen != {"0"}:
        raise gate.MalformedError(f"GRUB starts {', '.join(sorted(chosen)) or 'nothing'} and not entry 0")
    first = entries(menu)[0]
    top = re.search(r"^(menuentry|submenu) '", menu, re.MULTILINE)
    if (
        top is None
        or top[1] != "menuentry"
        or ">" in first.id
        or f"'{first.id}'" not in menu[top.start() :].splitlines()[0]
    ):
        raise gate.MalformedError("the menu's first entry does not start a kernel")
    return first


def words_of(answer: gate.Answer) -> str:
    """What apt or dpkg mean to tell: their errors and warnings, else their last line; and the exit status."""
    lines = [line.strip() for line in answer.text.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(("E:", "W:", "Err:", "dpkg: error"))] or lines[-1:]
    return f"exit status {answer.status}: {'; '.join(said) or 'nothing said'}"[:SHOWN]


def judge(raw: bytes, wanted: Expectations) -> list[gate.Finding]:
    """Hold everything that the host sent over its port against what was promised.

    Always the same findings in the same order, but for one case: when the answers as a whole cannot be
    trusted (see `gate.parse_answers`), that is the only finding.
    """
    try:
        answers = gate.parse_answers(raw)
    except gate.MalformedError as error:
        return [gate.Finding("answers", "all of them, with their checksum", str(error), False)]
    findings = [gate.Finding("answers", "all of them, with their checksum", f"{len(answers)} answers", True)]

    def answer(name: str) -> gate.Answer:
        if name not in answers:
            raise gate.MalformedError(f"no answer named {name}")
        return answers[name]

    def told(name: str) -> str:
        """What was said by a command that has to succeed and to say something."""
        if answer(name).status or not answer(name).text.strip():
            raise gate.MalformedError(f"{name}: {words_of(answer(name))}")
        return answer(name).text.strip()

    def check(name: str, promise: str, examine: Callable[[], tuple[str, bool]]) -> None:
        try:
            got, ok = examine()
        except gate.MalformedError as error:
            got, ok = str(error), False
        findings.append(gate.Finding(name, promise, got, ok))

    def same(name: str, promise: str, of: str) -> None:
        check(name, promise, lambda: (told(of), told(of) == promise))

    def succeeds(name: str, of: str) -> None:
        def examine() -> tuple[str, bool]:
            if answer(of).status:
                return words_of(answer(of)), False
            return "exit status 0", True

        check(name, "exit status 0", examine)

    def nothing(name: str, of: str) -> None:
        def examine() -> tuple[str, bool]:
            said = answer(of).text.strip()
            return f"exit status {answer(of).status}: {said}"[:SHOWN] if said or answer(
                of
            ).status else "nothing", (not said and not answer(of).status)

        check(name, "nothing", examine)

    def lax() -> tuple[str, bool]:
        settings = dict(re.findall(r'^(\S+) "(.*)";$', told("apt_settings"), re.MULTILINE))
        if "Dir::Etc::sourceparts" not in settings:
            raise gate.MalformedError("not apt's settings")
        found = [name for name in LAX if settings.get(name, "") not in ("", "0", "false", "no")]
        return ", ".join(found) or "none of them is set", not found

    def before() -> tuple[str, bool]:
        # find fails for what is not there, and says so
        found = [line for line in answer("sources_before").text.splitlines() if line.startswith("/")]
        return ", ".join(found) or "none", not found

    def installed() -> tuple[str, bool]:
        states = _packages(told("packages"))
        got = {name: states.get(name, ("not installed", ""))[:2] for name in wanted.packages}
        return ", ".join(" ".join((name, *state)).strip() for name, state in got.items()) or "none", bool(
            got
        ) and all(state == ("ii", wanted.packages[name]) for name, state in got.items())

    def all_installed() -> tuple[str, bool]:
        states = _packages(told("packages"))
        off = [f"{name} {state}" for name, (state, _) in sorted(states.items()) if state != "ii"]
        return ", ".join(off)[:SHOWN] or f"{len(states)} packages, all ii", not off

    def started() -> tuple[str, bool]:
        entry = default(told("menu"))
        missing = [each for each in wanted.parameters if each not in entry.parameters]
        lacking = _lacking(entry, told("boot"))
        got = (
            f"{entry.title}: {entry.kernel}" + _list("; lacks ", missing) + _list("; not in /boot: ", lacking)
        )
        return got, (
            entry.id.startswith(MEANT)
            and entry.release == wanted.release
            and bool(entry.initrd)
            and not missing
            and not lacking
        )

    def fallback() -> tuple[str, bool]:
        found = plain(entries(told("menu")), wanted)
        got = ", ".join(entry.title for entry in found)
        return got or f"no entry of {wanted.release} without isolation", bool(found) and not any(
            _lacking(entry, told("boot")) for entry in found
        )

    def own() -> tuple[str, bool]:
        release = told("release")
        found = [entry for entry in entries(told("menu")) if entry.release == release]
        usable = [entry for entry in found if not _lacking(entry, told("boot"))]
        return ", ".join(entry.title for entry in usable) or f"no entry of {release}", bool(usable)

    same("host running", "running", "running")
    nothing("host failed units", "failed")
    check("host version", "Debian's kernel", lambda: (told("version"), "Debian" in told("version").split()))
    check(
        "host release", f"not {wanted.release}", lambda: (told("release"), told("release") != wanted.release)
    )
    check("signatures", "apt takes nothing unsigned", lax)
    check("sources before", "none", before)
    succeeds("menu before", "menu_before")
    succeeds("network", "network")
    succeeds("repository added", "sources")
    succeeds("apt-get update", "update")
    succeeds("apt-get install", "install")
    check(
        "asked packages",
        ", ".join(f"{name} ii {version}" for name, version in wanted.packages.items()) or "at least one",
        installed,
    )
    check("all packages", "every one ii", all_installed)
    nothing("dpkg --verify", "verify")
    same("kernel that is meant", wanted.release, "meant")
    succeeds("menu checked", "menu_check")
    check("default entry", f"{wanted.release} with the plan's parameters and an initramfs", started)
    check("fallback entry", f"{wanted.release} without isolation", fallback)
    check("entry of Debian's kernel", "the kernel that runs", own)
    nothing("nothing chosen", "environment")
    check(
        "environment block",
        "where it lies on the disk",
        lambda: (told("environment_block"), _offset(told("environment_block")) > 0),
    )
    succeeds("downloads removed", "clean")
    succeeds("space given back", "trim")
    return findings


def plain(menu: Iterable[Entry], wanted: Expectations) -> list[Entry]:
    """Entries of the RT kernel without isolation, the fallback first."""
    return [
        entry
        for entry in menu
        if entry.id.startswith(PLAIN)
        and entry.release == wanted.release
        and not any(each.partition("=")[0] in wanted.isolation for each in entry.parameters)
    ]


def record(raw: bytes) -> dict[str, Any]:
    """What the stack proof needs of the host, as far as it was told: `entries` and `environment_offset`, in bytes."""
    try:
        answers = gate.parse_answers(raw)
        menu = entries(answers["menu"].text)
        offset = _offset(answers["environment_block"].text.strip())
    except (gate.MalformedError, KeyError):
        return {"entries": [], "environment_offset": None}
    return {
        "entries": [
            {"title": each.title, "id": each.id, "release": each.release, "parameters": list(each.parameters)}
            for each in menu
        ],
        "environment_offset": offset,
    }


def log(raw: bytes) -> str:
    """Everything that was said, for a reader."""
    try:
        answers = gate.parse_answers(raw)
    except gate.MalformedError as error:
        return f"{error}\n"
    return "".join(
        f"--- {name}: exit status {answer.status}\n{answer.text.rstrip()}\n"
        for name, answer in answers.items()
    )


def _packages(text: str) -> dict[str, tuple[str, str]]:
    """State and version by package, from lines `ii  name version`."""
    found: dict[str, tuple[str, str]] = {}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) not in (2, 3):
            raise gate.MalformedError(f"not a package: {line[:60]!r}")
        found[fields[1]] = (fields[0], fields[2] if len(fields) == 3 else "")
    return found


def _lacking(entry: Entry, boot: str) -> list[str]:
    """Files of an entry that are not in /boot."""
    there = set(boot.split())
    return [
        path for path in (entry.kernel, entry.initrd) if path and path.removeprefix("/boot/") not in there
    ]


def _offset(text: str) -> int:
    if not text.isdecimal() or int(text) % 512:
        raise gate.MalformedError(f"not a place on a disk: {text[:60]!r}")
    return int(text)


def _list(before: str, words: Iterable[str]) -> str:
    return before + ", ".join(words) if words else ""
