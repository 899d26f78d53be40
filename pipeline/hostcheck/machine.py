"""A machine as /proc, /sys and /dev show it, below any root, so that a recorded tree is read like a live one.

Nothing here guesses: a file that should be there and is not raises `UnreadableError`, and so does one whose
content is not of its form.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

#: `PF_KTHREAD` in field 9 of /proc/PID/stat (include/linux/sched.h).
_KERNEL_THREAD = 0x0020_0000
#: Field 41 of /proc/PID/stat (include/uapi/linux/sched.h).
POLICIES = {0: "other", 1: "fifo", 2: "rr", 3: "batch", 5: "idle", 6: "deadline", 7: "ext"}
REALTIME = ("fifo", "rr", "deadline")


class UnreadableError(Exception):
    """Something cannot be read, or not understood; the text is one line that says what and why."""


def parse_cpulist(text: str) -> tuple[int, ...]:
    """CPU numbers, ascending, of a list in the kernel's format (`0,2-3`); none for empty text.

    `(null)` is none, too: so the kernel prints a mask that it never allocated, for example that of
    `nohz_full` when the option is not given. Raises `UnreadableError` for anything else.
    """
    text = text.strip()
    cpus: set[int] = set()
    for part in text.split(",") if text not in ("", "(null)") else ():
        first, dash, last = part.partition("-")
        if not _number(first) or (dash and not _number(last)):
            raise UnreadableError(f"not a CPU list: {text[:40]!r}")
        span = range(int(first), int(last if dash else first) + 1)
        if not span or span[-1] > 65535:
            raise UnreadableError(f"not a CPU list: {text[:40]!r}")
        cpus.update(span)
    return tuple(sorted(cpus))


def _number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def cpulist(cpus: Iterable[int]) -> str:
    """CPU numbers as the kernel prints them (`0,2-3`); `none` for none."""
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"


def parse_mask(text: str) -> tuple[int, ...]:
    """CPU numbers of a hexadecimal mask in groups of 32 bits (`00000000,0000000f`)."""
    try:
        mask = int(text.strip().replace(",", ""), 16)
    except ValueError:
        raise UnreadableError(f"not a CPU mask: {text.strip()[:40]!r}") from None
    return tuple(cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1)


@dataclass(frozen=True)
class Thread:
    """A thread as the scheduler sees it.

    pid is that of its process; policy a value of `POLICIES`, or the number of one that is not there;
    priority that of real-time policies, else 0; cpus those it may run on; last where it ran last.
    """

    pid: int
    tid: int
    name: str
    state: str
    kernel: bool
    policy: str
    priority: int
    cpus: tuple[int, ...]
    last: int

    @property
    def schedule(self) -> str:
        """Policy and priority, for a reader."""
        return f"{self.policy} {self.priority}" if self.policy in ("fifo", "rr") else self.policy


class Machine:
    """Reads below `root`; `live` is whether that is this machine, so that its programs can be asked."""

    def __init__(self, root: Path, live: bool | None = None) -> None:
        self.root = root
        self.live = root.resolve() == Path("/") if live is None else live

    def path(self, name: str) -> Path:
        """Where an absolute path of the machine is."""
        return self.root / name.lstrip("/")

    def exists(self, name: str) -> bool:
        """Whether a path leads somewhere; raises `UnreadableError` when that may not be seen."""
        return self.mode(name) is not None

    def mode(self, name: str) -> int | None:
        """A file's type and rights as stat(2) has them; None when there is no such file."""
        try:
            return self.path(name).stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UnreadableError(f"{name}: {error.strerror or error}") from None

    def optional(self, name: str) -> str | None:
        """A file's text without white space around it; None when there is no such file."""
        try:
            return self.path(name).read_text(errors="replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UnreadableError(f"{name}: {error.strerror or error}") from None

    def text(self, name: str) -> str:
        """A file's text without white space around it; raises `UnreadableError` when there is none."""
        found = self.optional(name)
        if found is None:
            raise UnreadableError(f"{name} is not there")
        return found

    def number(self, name: str) -> int:
        """A file's whole number."""
        text = self.text(name)
        try:
            return int(text)
        except ValueError:
            raise UnreadableError(f"{name}: not a number: {text[:40]!r}") from None

    def names(self, directory: str) -> list[str]:
        """What is in a directory, sorted; nothing when there is no such directory."""
        try:
            return sorted(path.name for path in self.path(directory).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UnreadableError(f"{directory}: {error.strerror or error}") from None

    def numbered(self, directory: str, prefix: str = "") -> list[int]:
        """The numbers in a directory's names that are `prefix` and a number, ascending."""
        names = (name[len(prefix) :] for name in self.names(directory) if name.startswith(prefix))
        return sorted(int(name) for name in names if _number(name))

    # CPUs -------------------------------------------------------------------------------------

    @cached_property
    def cpuinfo(self) -> tuple[dict[str, str], ...]:
        """/proc/cpuinfo, one dictionary for each CPU that is online."""
        blocks = self.text("/proc/cpuinfo").split("\n\n")
        pairs = [[line.partition(":") for line in block.splitlines()] for block in blocks]
        found = [{key.strip(): value.strip() for key, _, value in block} for block in pairs]
        cpus = tuple(each for each in found if "processor" in each)
        if not cpus:
            raise UnreadableError("/proc/cpuinfo names no processor")
        return cpus

    @cached_property
    def flags(self) -> frozenset[str]:
        """The flags that all CPUs have."""
        return frozenset.intersection(*(frozenset(each.get("flags", "").split()) for each in self.cpuinfo))

    @property
    def virtual(self) -> bool:
        """Whether this is a virtual machine, as far as its hypervisor says so."""
        return "hypervisor" in self.flags

    # Threads ----------------------------------------------------------------------------------

    def processes(self) -> list[int]:
        """Process ids, ascending."""
        found = self.numbered("/proc")
        if not found:
            raise UnreadableError("/proc has no processes")
        return found

    def arguments(self, pid: int) -> list[str]:
        """A process's command line; empty for kernel threads and for processes that have ended."""
        try:
            raw = self.path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return []
        except OSError as error:
            raise UnreadableError(f"/proc/{pid}/cmdline: {error.strerror or error}") from None
        return raw.decode(errors="replace").rstrip("\0").split("\0") if raw else []

    def threads(self, pid: int) -> Iterator[Thread]:
        """A process's threads by id; those that end meanwhile are left out."""
        for tid in self.numbered(f"/proc/{pid}/task"):
            directory = f"/proc/{pid}/task/{tid}"
            try:
                yield self._thread(pid, tid, directory)
            except UnreadableError:
                if self.exists(directory):
                    raise

    def _thread(self, pid: int, tid: int, directory: str) -> Thread:
        # The name, field 2, may hold anything; fields 3 and up follow its last parenthesis (proc(5)).
        head, _, tail = self.text(f"{directory}/stat").rpartition(")")
        fields = tail.split()
        allowed = status_field(self.text(f"{directory}/status"), "Cpus_allowed_list", directory)
        try:
            policy = int(fields[38])
            return Thread(
                pid=pid,
                tid=tid,
                name=head.partition("(")[2],
                state=fields[0],
                kernel=bool(int(fields[6]) & _KERNEL_THREAD),
                policy=POLICIES.get(policy, str(policy)),
                priority=int(fields[37]),
                cpus=parse_cpulist(allowed),
                last=int(fields[36]),
            )
        except (IndexError, ValueError):
            raise UnreadableError(f"{directory}/stat: not of its form") from None


def status_field(text: str, key: str, where: str) -> str:
    """A field of a file such as /proc/PID/status (`Key: value`)."""
    for line in text.splitlines():
        found, colon, value = line.partition(":")
        if colon and found == key:
            return value.strip()
    raise UnreadableError(f"{where}: no {key}")
