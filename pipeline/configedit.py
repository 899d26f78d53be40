"""Edits a kernel's configuration, and finds the fewest lines of a fragment that ask for the result.

Runs inside the kernel's builder, standard library only. Fragments are merged and completed as recipes/steps/kernel.sh
does it, before and after; what is in between is a person in the kernel's own menu, or a list of settings. The menu
shows the same closed world: what nobody asked for is off, also where it comes into sight only now.

Below `IN`: `source/`, the kernel tree; `kernel-configs/`, fragments and the contract; `contract.py`, `fragment.py`,
`kconfig-why.c` and `kconfig-trial.c`. One of: `menu`, a program that edits a `.config` on the terminal, and `settings`,
a fragment. With the menu, `start` may be a configuration to begin with. Environment: `ARCH`, `ROLE`, `FRAGMENTS`,
`CONTRACT` as kernel.sh has them; the last of the fragments is the one that is edited.

Leaves in `OUT`: `config`, the configuration as it was edited; `fragment`, the text that asks for it; `changes.json`:
`asked` and `implied`, lists of [symbol, from, to]. Exit status: 0 when it is fine; 2 when a line did not take or the
contract is broken, told on stderr; 1 for a fault.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

try:
    from pipeline import contract, fragment
except ImportError:  # in the step their files lie beside this one
    import contract  # type: ignore[import-not-found, no-redef]
    import fragment  # type: ignore[import-not-found, no-redef]

IN, OUT, WORK = Path("/build/in"), Path("/build/out"), Path("/build/work")

#: What kconfig's own programs are linked from.
OBJECTS = "confdata expr lexer.lex menu parser.tab preprocess symbol util".split()

Values = dict[str, str]


class Kconfig:
    """The kernel's own kconfig: its make rules, and programs of ours that run in their environment."""

    def __init__(self, source: Path, obj: Path) -> None:
        """`obj` is the directory for objects; the configuration at work is its `.config`."""
        self.source, self.obj = source, obj
        obj.mkdir(parents=True, exist_ok=True)
        (obj / "nothing").touch()

    def command(self, *arguments: str) -> list[str]:
        """A make command; the compilers are those of the build, whose answers configurations depend on."""
        cc = f"{os.environ.get('CROSS_COMPILE', '')}gcc"
        return ["make", "-s", "-C", f"{self.source}", f"O={self.obj}", f"CC={cc}", "HOSTCC=gcc", *arguments]

    def merged(self, layers: Sequence[Path]) -> contract.Config:
        """The final configuration that fragments give; it is the one at work then."""
        merge = [f"{self.source}/scripts/kconfig/merge_config.sh", "-m", "-Q", "-O", f"{self.obj}", "nothing"]
        _quietly([*merge, *map(str, layers)], self.obj)
        wanted = (self.obj / ".config").rename(self.obj / "wanted.config")
        _quietly(self.command(f"KCONFIG_ALLCONFIG={wanted}", "allnoconfig"), self.obj)
        _quietly(self.command("olddefconfig"), self.obj)
        return self.read()

    def read(self) -> contract.Config:
        """The configuration at work."""
        return contract.parse_config((self.obj / ".config").read_text(), "the configuration")

    def link(self, program: str) -> None:
        """Make a program of ours, `kconfig-<program>.c`, to be run as config-prog."""
        kconfig = self.obj / "scripts" / "kconfig"
        includes = [f"-I{self.source}/scripts/include", f"-I{self.source}/scripts/kconfig"]
        objects = [f"{kconfig}/{name}.o" for name in OBJECTS]
        output = ["-o", f"{kconfig}/{program}"]
        _quietly(["gcc", "-O1", *includes, *output, f"{IN}/kconfig-{program}.c", *objects], self.obj)

    def explain(self, questions: str) -> str:
        """What kconfig says about lines of `SYMBOL=wanted` that did not take."""
        self.link("why")
        (self.obj / "broken").write_text(questions)
        done = subprocess.run(
            self.command("config", "config-prog=why"), cwd=self.obj, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"WHY_SYMBOLS": f"{self.obj}/broken"}, check=False,
        )  # fmt: skip
        return done.stdout

    def edit(self, start: str) -> contract.Config:
        """Let a person edit a configuration on the terminal; the one at work when they leave."""
        program = self.obj / "scripts" / "kconfig" / "menu"
        program.write_bytes((IN / "menu").read_bytes())
        program.chmod(0o755)
        (self.obj / ".config").write_text(start)
        if subprocess.run(self.command("config", "config-prog=menu"), cwd=self.obj, check=False).returncode:
            raise SystemExit(2)  # it has said why: too small a terminal, or one that it does not know
        return self.read()


class Trials:
    """What requests would give, in milliseconds each."""

    def __init__(self, kconfig: Kconfig) -> None:
        """Starts the program that answers."""
        kconfig.link("trial")
        self._obj = kconfig.obj
        self._process = subprocess.Popen(
            kconfig.command("config", "config-prog=trial"), cwd=kconfig.obj, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.closed = [line.strip() for line in iter(self._line, "\n")]

    def _line(self) -> str:
        assert self._process.stdout is not None  # noqa: S101 - Popen's type cannot say so
        line = self._process.stdout.readline()
        if not line:
            raise ChildProcessError("kconfig ended without an answer")
        return line

    def closing(self, named: Iterable[str]) -> str:
        """Lines by which all else stays off: what can be asked for, but is not `named`."""
        known = set(named)
        return "".join(f"# CONFIG_{s} is not set\n" for s in dict.fromkeys(self.closed) if s not in known)

    def result(self, requests: Mapping[str, str]) -> contract.Config:
        """The final configuration that requests would give."""
        asked, answer = self._obj / "trial.in", self._obj / "trial.out"
        lines = "".join(f"{fragment.line_of(s, v)}\n" for s, v in requests.items())
        asked.write_text(lines + self.closing(requests))
        assert self._process.stdin is not None  # noqa: S101 - Popen's type cannot say so
        self._process.stdin.write(f"{asked} {answer}\n")
        self._process.stdin.flush()
        if self._line() != "0\n":
            raise ChildProcessError("kconfig could not read or write a configuration")
        return contract.parse_config(answer.read_text(), "a trial")

    def close(self) -> None:
        """End the program."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


def changed(before: contract.Config, after: contract.Config) -> dict[str, tuple[str, str]]:
    """From and to, by symbol, sorted."""
    symbols = sorted(before.values.keys() | after.values.keys())
    return {s: (before[s], after[s]) for s in symbols if before[s] != after[s]}


def minimal(lines: Values, enough: Callable[[Values], bool]) -> Values:
    """Those of some lines that are needed: without any one of them, what is left is not `enough`.

    Lines that turn something off go first: where either of two would do, it is better to say what is on.
    """
    needed = dict(lines)

    def thin(symbols: list[str]) -> bool:
        rest = {s: v for s, v in needed.items() if s not in symbols}
        if enough(rest):
            for symbol in symbols:
                del needed[symbol]
            return True
        half = len(symbols) // 2
        return half > 0 and any([thin(symbols[:half]), thin(symbols[half:])])

    while needed and thin(sorted(needed, key=lambda s: (needed[s] != "n", s))):
        pass
    return needed


def requests_of(layers: Iterable[Path]) -> Values:
    """What fragments ask for together, by symbol; none of them is no fault."""
    found: Values = {}
    for path in layers:
        found |= {r.symbol: r.value for r in contract.parse_fragment(path.read_text(), path.name)}
    return found


def untaken(config: contract.Config, requests: Mapping[str, str]) -> set[str]:
    """Symbols of requests that did not take."""
    return {symbol for symbol, value in requests.items() if config[symbol] != value}


def needed_lines(trials: Trials, rest: Values, own: Values, target: contract.Config) -> dict[str, str | None]:
    """What must change in a fragment that asks for `own`, after others that ask for `rest`, to get `target`.

    None is for a line that is no longer needed. A request that did not take before is left for the contract to refuse.
    """
    lines = {s: to for s, (_, to) in changed(trials.result({**rest, **own}), target).items()}
    kept = {s: v for s, v in own.items() if s not in lines}
    all_lines = {**rest, **kept, **lines}
    broken = untaken(trials.result(all_lines), all_lines)

    def enough(chosen: Values) -> bool:
        requests = {**rest, **kept, **chosen}
        found = trials.result(requests)
        return found.values == target.values and untaken(found, requests) <= broken

    chosen = minimal(lines, enough) if enough(lines) else lines
    return {s: chosen.get(s) for s in lines if s in chosen or s in own}


def main() -> int:
    """Edit, and leave what came of it; the exit status."""
    configs = IN / "kernel-configs"
    names = os.environ["FRAGMENTS"].split()
    layers = [configs / name for name in names]
    kconfig = Kconfig(IN / "source", WORK / "obj")
    _tell("merging the fragments of the configuration")
    before = kconfig.merged(layers)
    text = (kconfig.obj / ".config").read_text()
    trials = Trials(kconfig)
    rest, own = requests_of(layers[:-1]), requests_of(layers[-1:])
    settings = IN / "settings"
    given = requests_of([settings]) if settings.is_file() else {}
    if given:
        after = trials.result({**rest, **own, **given})
    else:
        start = IN / "start"
        if start.is_file():
            text = start.read_text()
        named = {r.symbol for r in contract.parse_fragment(text, "start")}
        after = kconfig.edit(text + trials.closing(named))
    edited = kconfig.obj / ("trial.out" if given else ".config")
    (OUT / "config").write_bytes(edited.read_bytes())
    _tell("looking for the fewest lines that ask for this")
    lines = needed_lines(trials, rest, own, after)
    trials.close()
    lines |= {s: given[s] for s in untaken(after, given)}  # refused below, with the reason
    new = WORK / "new" / names[-1]
    new.parent.mkdir(parents=True)
    new.write_text(fragment.edited(layers[-1].read_text(), lines))
    (OUT / "fragment").write_bytes(new.read_bytes())
    differences = changed(before, after)
    asked = [s for s in differences if s in lines]
    document = {
        "asked": [[s, *differences[s]] for s in asked],
        "implied": [[s, *both] for s, both in differences.items() if s not in asked],
    }
    (OUT / "changes.json").write_text(json.dumps(document, indent=1))
    if not differences and not lines:
        return 0
    _tell("merging again, and holding the result against the contract")
    final = kconfig.merged([*layers[:-1], new])
    if status := judged(kconfig, configs, names[:-1], new):
        return status
    if different := changed(final, after):
        print(f"config: fragments cannot ask for this: {' '.join(different)}", file=sys.stderr)
        return 2
    return 0


def judged(kconfig: Kconfig, configs: Path, others: Sequence[str], new: Path) -> int:
    """Hold the configuration at work against fragments and contract, as kernel.sh does; an exit status."""
    check = [sys.executable, "-B", f"{IN}/contract.py", "--config", f"{kconfig.obj}/.config"]
    check += [
        "--contract",
        os.environ["CONTRACT"],
        "--role",
        os.environ["ROLE"],
        "--arch",
        os.environ["ARCH"],
    ]
    check += ["--source", f"{kconfig.source}"]
    layers = [*others, f"{new}"]
    asked = subprocess.run(
        [*check, "--list-broken", *layers], cwd=configs, stdout=subprocess.PIPE, text=True, check=False
    )
    if asked.returncode or not asked.stdout:
        return asked.returncode
    (WORK / "why").write_text(kconfig.explain(asked.stdout))
    told = subprocess.run(
        [*check, "--why", f"{WORK}/why", *layers], cwd=configs, stderr=subprocess.PIPE, text=True, check=False
    )
    print(told.stderr.replace(f"{WORK}/new/", ""), end="", file=sys.stderr)
    return 2


def _tell(line: str) -> None:
    print(line, flush=True)


def _quietly(command: Sequence[str], where: Path) -> None:
    """Run a command; its output is shown only when it fails."""
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, sep="", file=sys.stderr)
        raise ChildProcessError(f"{command[0]} ended with {done.returncode}")


if __name__ == "__main__":
    sys.exit(main())
