"""The kernel-config contract: a final `.config` is what was asked for, or it is refused.

Two things are checked. Every line of every fragment took (the last fragment that names a symbol wins), and
every rule of the contract holds. Nothing passes for want of evidence: a missing file, a line that cannot be
read, a rule for an unknown role, a contract without a rule for this kernel are errors of their own.

Standard library only and without imports of ours, for it also runs inside the build step:

    contract.py --config FILE --contract FILE --role ROLE --arch ARCH [--source TREE] [--why FILE] FRAGMENT...

Exit status: 0 kept, 1 broken (a block for each symbol on standard error), 2 an input that cannot be judged.
`--list-broken` prints `SYMBOL=wanted` lines instead and exits 0: what to ask the kernel's kconfig about; its
answers, lines of `SYMBOL<tab>text`, come back with `--why`.
"""

import argparse
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

Role = Literal["host", "guest"]
Version = tuple[int, ...]

ROLES: tuple[Role, ...] = get_args(Role)
SCOPES: Mapping[str, tuple[Role, ...]] = {"host": ("host",), "guest": ("guest",), "both": ROLES}

_ASSIGNMENT = re.compile(r'CONFIG_(\w+)=([ynm]|-?\d+|0[xX][0-9a-fA-F]+|"(?:[^"\\]|\\.)*")')
_UNSET = re.compile(r"# CONFIG_(\w+) is not set")
_HEADER = re.compile(r"# Linux/(\w+) (\d+(?:\.\d+)*)\S* Kernel Configuration")
_DEFINITION = re.compile(r"^[ \t]*(?:menu)?config[ \t]+(\w+)", re.MULTILINE)
_SYMBOL = re.compile(r"\w+")
_RULE_KEYS = frozenset({"symbol", "value", "scope", "arch", "since", "before", "why"})
# The header of a .config names ARCH as make was given it, or the source directory of the building machine.
_SOURCE_ARCH = {"x86_64": "x86"}


class ContractInputError(ValueError):
    """An input cannot be judged: one line of what is wrong, one of what to do."""


@dataclass(frozen=True, slots=True)
class Config:
    """A final `.config`: kernel version, architecture as its header names it, and the symbols that are not `n`."""

    version: Version
    arch: str
    values: Mapping[str, str]

    def __getitem__(self, symbol: str) -> str:
        """Return the value as a `.config` spells it; `n` for what is absent or "is not set"."""
        return self.values.get(symbol, "n")


@dataclass(frozen=True, slots=True)
class Request:
    """One line of a fragment; `where` is `file:line`."""

    symbol: str
    value: str
    where: str


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of the contract: on the kernels it is for, the symbol has one of the `allowed` values."""

    symbol: str
    allowed: tuple[str, ...]
    roles: tuple[Role, ...]
    arch: tuple[str, ...]
    since: Version
    before: Version
    why: str
    where: str

    def applies(self, role: Role, arch: str, version: Version) -> bool:
        """Say whether this kernel is one of those the entry is for; `arch` is the kernel's ARCH name."""
        return (
            role in self.roles
            and (not self.arch or arch in self.arch)
            and self.since <= version
            and (not self.before or version < self.before)
        )


@dataclass(frozen=True, slots=True)
class Breach:
    """A symbol that is not what it must be; `where` is the fragment line or the contract entry."""

    symbol: str
    wanted: tuple[str, ...]
    got: str
    where: str
    why: str


def parse_config(text: str, name: str) -> Config:
    """Read a final `.config` (or an unpacked /proc/config.gz); `name` is for messages."""
    header = _HEADER.search(text)
    if header is None:
        raise ContractInputError(
            f"{name}: no '# Linux/<arch> <version> Kernel Configuration' line\n"
            "give the .config that kconfig wrote, not a fragment"
        )
    values = {r.symbol: r.value for r in parse_fragment(text, name) if r.value != "n"}
    return Config(_version(header[2]), header[1], values)


def parse_fragment(text: str, name: str) -> tuple[Request, ...]:
    """Read a fragment: assignments, `# CONFIG_X is not set` lines, comments and empty lines, nothing else."""
    requests: list[Request] = []
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{name}:{number}"
        if found := _ASSIGNMENT.fullmatch(line):
            requests.append(Request(found[1], found[2], where))
        elif found := _UNSET.fullmatch(line):
            requests.append(Request(found[1], "n", where))
        elif line and not line.startswith("#"):
            raise ContractInputError(
                f"{where}: {line!r} is not a line of a kernel configuration\n"
                "write CONFIG_X=y, =m, =n, a number or a \"text\", '# CONFIG_X is not set', or a # comment"
            )
    return tuple(requests)


def merge_requests(fragments: Iterable[tuple[Request, ...]]) -> tuple[Request, ...]:
    """Return one request a symbol, the last; no fragments, or one that asks for nothing, is an error."""
    last: dict[str, Request] = {}
    count = 0
    for fragment in fragments:
        count += 1
        if not fragment:
            raise ContractInputError(
                f"fragment number {count} asks for nothing\ntake it out of the list, or mend it"
            )
        last.update({request.symbol: request for request in fragment})
    if not last:
        raise ContractInputError("no configuration fragments\nname at least one")
    return tuple(last.values())


def parse_contract(text: str, name: str) -> tuple[Rule, ...]:
    """Read `contract.toml`; an unknown key, a missing one or an empty contract is an error."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ContractInputError(f"{name}: {error}\nmend the TOML") from error
    if unknown := tables.keys() - {"required", "forbidden"}:
        raise ContractInputError(
            f"{name}: unknown table {min(unknown)!r}\na contract has [[required]] and [[forbidden]] entries"
        )
    rules: list[Rule] = []
    for kind in ("required", "forbidden"):
        entries = tables.get(kind, [])
        if not isinstance(entries, list):
            raise ContractInputError(f"{name}: {kind!r} is no list of entries\nwrite [[{kind}]]")
        rules += [_rule(entry, kind, f"{name}: {kind}[{i}]") for i, entry in enumerate(entries, 1)]
    if not rules:
        raise ContractInputError(
            f"{name}: an empty contract\na contract that asks for nothing proves nothing"
        )
    return tuple(rules)


def select_rules(rules: Iterable[Rule], role: Role, arch: str, version: Version) -> tuple[Rule, ...]:
    """Return the rules for this kernel; none at all is an error."""
    chosen = tuple(rule for rule in rules if rule.applies(role, arch, version))
    if not chosen:
        raise ContractInputError(
            f"the contract has no entry for {role} kernels {_dotted(version)} of {arch}\n"
            "add entries with this scope, architecture and version"
        )
    return chosen


def check_requests(config: Config, requests: Iterable[Request]) -> tuple[Breach, ...]:
    """Return the requests that did not take."""
    return tuple(
        Breach(r.symbol, (r.value,), config[r.symbol], r.where, "this fragment asks for it")
        for r in requests
        if config[r.symbol] != r.value
    )


def check_rules(config: Config, rules: Iterable[Rule]) -> tuple[Breach, ...]:
    """Return the rules that do not hold; `rules` are those for this kernel (`select_rules`)."""
    return tuple(
        Breach(r.symbol, r.allowed, config[r.symbol], r.where, r.why)
        for r in rules
        if config[r.symbol] not in r.allowed
    )


def check_arch(config: Config, arch: str) -> None:
    """Refuse a configuration of another architecture than `arch`, the kernel's ARCH name."""
    if config.arch not in (arch, _SOURCE_ARCH.get(arch)):
        raise ContractInputError(
            f"this is a configuration for Linux/{config.arch}, not for {arch}\n"
            "build it with the ARCH that it is judged by"
        )


def check_known(source: Path, rules: Iterable[Rule]) -> None:
    """Refuse a rule whose symbol no Kconfig file of the tree defines: misspelt, it is always absent."""
    known: set[str] = set()
    for file in source.rglob("Kconfig*"):
        if file.is_file():
            known.update(_DEFINITION.findall(file.read_text(encoding="utf-8", errors="replace")))
    for rule in rules:
        if rule.symbol not in known:
            raise ContractInputError(
                f"{rule.where}: this kernel has no symbol {rule.symbol}\n"
                "correct the name, or bound the entry with since/before where the symbol was renamed"
            )


def describe(breach: Breach, explanations: Mapping[str, Sequence[str]]) -> str:
    """Return the block of lines that tells one breach; `explanations` are kconfig's, by symbol."""
    lines = [
        f"CONFIG_{breach.symbol}: wanted {' or '.join(breach.wanted)}, got {breach.got}",
        f"  {breach.where}: {breach.why}",
    ]
    lines += [f"  kconfig: {text}" for text in explanations.get(breach.symbol, ())]
    return "\n".join(lines)


def _rule(entry: object, kind: str, where: str) -> Rule:
    if not isinstance(entry, dict):
        raise ContractInputError(f"{where}: not a table\nwrite [[{kind}]] and its keys below it")
    keys = _RULE_KEYS if kind == "required" else _RULE_KEYS - {"value"}
    if unknown := entry.keys() - keys:
        raise ContractInputError(
            f"{where}: unknown key {min(unknown)!r}\nknown are {', '.join(sorted(keys))}"
        )
    symbol = _text(entry, "symbol", where)
    where = f"{where} {symbol}"
    if not _SYMBOL.fullmatch(symbol) or symbol.startswith("CONFIG_"):
        raise ContractInputError(f"{where}: not a symbol's name\nwrite it without CONFIG_")
    scope = _text(entry, "scope", where)
    if scope not in SCOPES:
        raise ContractInputError(f"{where}: unknown scope {scope!r}\nwrite one of {', '.join(SCOPES)}")
    return Rule(
        symbol=symbol,
        allowed=_allowed(entry.get("value", "y"), where) if kind == "required" else ("n",),
        roles=SCOPES[scope],
        arch=_names(entry.get("arch"), where),
        since=_bound(entry, "since", where),
        before=_bound(entry, "before", where),
        why=_text(entry, "why", where),
        where=where,
    )


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ContractInputError(f'{where}: no {key}\nwrite {key} = "..."')
    return value


def _allowed(value: object, where: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, str | int) and not isinstance(v, bool) for v in values):
        raise ContractInputError(
            f'{where}: value is {value!r}\nwrite "y", "m", a number, a text, or a list of them'
        )
    # As a .config spells them: tristates and numbers bare, texts quoted.
    return tuple(str(v) if isinstance(v, int) or v in ("y", "m", "n") else f'"{v}"' for v in values)


def _names(value: object, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise ContractInputError(f'{where}: arch is {value!r}\nwrite a list such as ["x86_64"]')
    return tuple(value)


def _bound(entry: Mapping[str, Any], key: str, where: str) -> Version:
    if key not in entry:
        return ()
    text = _text(entry, key, where)
    if not re.fullmatch(r"\d+(\.\d+)*", text):
        raise ContractInputError(f'{where}: {key} is {text!r}\nwrite a kernel version such as "6.12"')
    return _version(text)


def _version(text: str) -> Version:
    return tuple(int(part) for part in text.split("."))


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ContractInputError(f"{path}: {reason}\nname a file that can be read") from error


def _explanations(path: Path | None) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in _read(path).splitlines() if path else ():
        symbol, _, text = line.partition("\t")
        found.setdefault(symbol, []).append(text)
    return found


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Check a final kernel .config against fragments and contract."
    )
    parser.add_argument("--config", type=Path, required=True, help="the final .config")
    parser.add_argument("--contract", type=Path, required=True, help="contract.toml")
    parser.add_argument("--role", choices=ROLES, required=True)
    parser.add_argument("--arch", required=True, help="the kernel's ARCH name, such as x86_64")
    parser.add_argument(
        "--source", type=Path, help="kernel tree: refuse rules whose symbol it does not define"
    )
    parser.add_argument("--why", type=Path, help="kconfig's explanations: lines of SYMBOL<tab>text")
    parser.add_argument("--list-broken", action="store_true", help="print SYMBOL=wanted lines, exit 0")
    parser.add_argument("fragments", type=Path, nargs="+", metavar="FRAGMENT")
    return parser.parse_args(argv)


def _breaches(options: argparse.Namespace) -> tuple[Breach, ...]:
    config = parse_config(_read(options.config), str(options.config))
    check_arch(config, options.arch)
    rules = parse_contract(_read(options.contract), str(options.contract))
    chosen = select_rules(rules, cast(Role, options.role), options.arch, config.version)
    if options.source is not None:
        check_known(options.source, chosen)
    requests = merge_requests([parse_fragment(_read(path), str(path)) for path in options.fragments])
    return check_requests(config, requests) + check_rules(config, chosen)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    options = _arguments(argv)
    try:
        breaches = _breaches(options)
        explanations = _explanations(options.why)
    except ContractInputError as error:
        print(f"contract: {error}", file=sys.stderr)
        return 2
    if options.list_broken:
        for question in sorted({f"{breach.symbol}={breach.wanted[0]}" for breach in breaches}):
            print(question)
        return 0
    if breaches:
        print(*(describe(breach, explanations) for breach in breaches), sep="\n\n", file=sys.stderr)
        print(f"\ncontract: {len(breaches)} broken in {options.config}", file=sys.stderr)
        print("change the named fragment line, or ask for what it depends on", file=sys.stderr)
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
