"""What is asked for: builders, platforms and guests, read from `recipes/` and validated.

Unknown keys and wrong types are refused with the file, the line and what was expected.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from pipeline.cpuplan import PlanError, guest_plan
from pipeline.errors import UserError

Name = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9][a-z0-9.-]*\Z", max_length=63)]
Package = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9][a-z0-9+.-]+\Z")]
Unit = Annotated[
    str, msgspec.Meta(pattern=r"\A[A-Za-z0-9:_.@-]+\.(service|timer|socket|target|mount|path|swap)\Z")
]
#: A name of qemu's for an emulated machine, such as `x86_64-softmmu`.
QemuTarget = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9_]+-softmmu\Z")]
Arch = Literal["amd64"]
Line = Annotated[str, msgspec.Meta(pattern=r"\A[^\n]*\Z", min_length=1)]
#: One kernel parameter; quoting inside a command line is not worth the traps it brings.
Parameter = Annotated[str, msgspec.Meta(pattern=r"\A[^\s\"'\\,;][^\s\"'\\]*\Z")]


class Builder(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A container image in which steps run: a Debian suite and the packages asked of it."""

    description: Line
    suite: Name
    packages: Annotated[tuple[Package, ...], msgspec.Meta(min_length=1)]


class PlatformKernel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which source the platform's kernels are built from, and their configuration fragments.

    Fragments are paths below `kernel-configs/`; of two lines about one symbol the later one counts.
    """

    source: Name
    host: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    guest: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]


class PlatformQemu(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which source qemu is built from, and for which machines."""

    source: Name
    targets: Annotated[tuple[QemuTarget, ...], msgspec.Meta(min_length=1)]


class Platform(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A machine type we build for."""

    description: Line
    arch: Arch
    kernel: PlatformKernel
    qemu: PlatformQemu


class GuestImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a guest's disk holds. Sizes in MiB; keys as in an `authorized_keys` file."""

    suite: Name
    disk_mib: Annotated[int, msgspec.Meta(ge=128, le=65536)]
    packages: Annotated[tuple[Package, ...], msgspec.Meta(min_length=1)]
    masked_units: tuple[Unit, ...] = ()
    console_login: bool = False
    ssh_authorized_keys: tuple[Annotated[str, msgspec.Meta(pattern=r"\A(ssh-|ecdsa-|sk-)[^\n]+\Z")], ...] = ()


class GuestCmdline(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Kernel parameters beside those that the CPU plan gives."""

    extra: tuple[Parameter, ...] = ()


class Guest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One virtual machine. Memory in MiB; the first `housekeeping_vcpus` vCPUs are not isolated.

    `ssh_port` is the TCP port on the host's loopback that leads to the guest's ssh; none by default.
    """

    description: Line
    platform: Name
    vcpus: Annotated[int, msgspec.Meta(ge=2, le=288)]
    housekeeping_vcpus: Annotated[int, msgspec.Meta(ge=1)]
    memory_mib: Annotated[int, msgspec.Meta(ge=128)]
    ssh_port: Annotated[int, msgspec.Meta(ge=1, le=65535)] | None = None
    image: GuestImage
    cmdline: GuestCmdline = GuestCmdline()


class Recipes(msgspec.Struct, frozen=True, kw_only=True):
    """Everything asked for, by name."""

    builders: dict[str, Builder]
    platforms: dict[str, Platform]
    guests: dict[str, Guest]


T = TypeVar("T", bound=msgspec.Struct)


def load(root: Path) -> Recipes:
    """Read `recipes/` below the checkout `root`."""
    recipes = root / "recipes"
    loaded = Recipes(
        builders={
            path.stem: read(path, Builder, root) for path in sorted((recipes / "builders").glob("*.toml"))
        },
        platforms={
            path.stem: read(path, Platform, root) for path in sorted((recipes / "platforms").glob("*.toml"))
        },
        guests={path.stem: read(path, Guest, root) for path in sorted((recipes / "guests").glob("*.toml"))},
    )
    if not loaded.platforms:
        raise UserError(f"{recipes / 'platforms'} has no platform", "run doit in a checkout of virt-rt")
    for kind, names in (("guests", loaded.guests), ("platforms", loaded.platforms)):
        for name in names:
            if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", name):
                raise UserError(
                    f"recipes/{kind}/{name}.toml: {name} does not fit into host names and paths",
                    "name the file with lower-case letters, digits and '-' only",
                )
    for name, guest in loaded.guests.items():
        if guest.platform not in loaded.platforms:
            path = recipes / "guests" / f"{name}.toml"
            raise UserError(
                f"{_place(path, root, 'platform')}: there is no platform {guest.platform}",
                f"write one of: {', '.join(loaded.platforms)}",
            )
        try:
            guest_plan(guest.vcpus, guest.housekeeping_vcpus)
        except PlanError as error:
            path = recipes / "guests" / f"{name}.toml"
            raise UserError(
                f"{_place(path, root, 'housekeeping_vcpus')}: {error.message}", error.hint
            ) from None
    for name in loaded.platforms:
        if all(guest.platform != name for guest in loaded.guests.values()):
            raise UserError(
                f"recipes/platforms/{name}.toml: no guest runs on this platform",
                f'write a recipes/guests/NAME.toml with platform = "{name}"',
            )
    return loaded


def read(path: Path, kind: type[T], root: Path) -> T:
    """Read one recipe; a UserError names file, line and what was expected."""
    shown = path.relative_to(root)
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise UserError(f"{shown} is missing", "restore it with git") from None
    except UnicodeDecodeError:
        raise UserError(f"{shown} is not UTF-8 text", "save it as UTF-8") from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{shown}: not TOML: {error}", "mend that line") from None
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        reason, _, where = str(error).partition(" - at ")
        steps = re.findall(r"\.?([\w-]+)|\[(\d+|\.\.\.)\]", where.strip("`").removeprefix("$"))
        keys = [name or index for name, index in steps]
        unknown = re.search(r"unknown field `(.+)`", reason)
        if unknown:
            keys.append(unknown[1])
            fields = ", ".join(_fields(kind, keys[:-1]))
            raise UserError(
                f"{_place(path, root, *keys)}: unknown key {unknown[1]}", f"known keys here: {fields}"
            ) from None
        reason = reason[0].lower() + reason[1:]
        raise UserError(f"{_place(path, root, *keys)}: {'.'.join(keys) or 'recipe'}: {reason}", "") from None


def _fields(kind: Any, keys: list[str]) -> list[str]:
    """Names that a table of the recipe may have."""
    for key in keys:
        kind = next((f.type for f in msgspec.structs.fields(kind) if f.encode_name == key), kind)
    return [field.encode_name for field in msgspec.structs.fields(kind)]


def _place(path: Path, root: Path, *keys: str) -> str:
    """`file:line` of a key; the nearest enclosing table when the key itself is not written."""
    return f"{path.relative_to(root)}:{line_of(path.read_text(), list(keys))}"


def line_of(text: str, keys: list[str]) -> int:
    """Line (from 1) at which a key path stands in TOML text, or of what encloses it.

    The parser that gives the values keeps no positions, so another one is asked for them, and only
    when there is an error to report.
    """
    import tree_sitter
    import tree_sitter_toml

    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_toml.language()))
    best, depth = 1, 0

    def consider(found: list[str], line: int) -> None:
        nonlocal best, depth
        shared = 0
        while shared < min(len(found), len(keys)) and found[shared] == keys[shared]:
            shared += 1
        if shared == len(found) and shared > depth:
            best, depth = line, shared

    def key_names(node: Any) -> list[str]:
        if node.type == "dotted_key":
            return [name for child in node.children for name in key_names(child)]
        if node.type in ("bare_key", "quoted_key"):
            return [node.text.decode().strip("\"'")]
        return []

    def visit(node: Any, prefix: list[str]) -> None:
        if node.type == "pair":
            here = prefix + key_names(node.children[0])
            consider(here, node.start_point[0] + 1)
            for child in node.children[1:]:
                visit(child, here)
        elif node.type in ("table", "table_array_element"):
            named = next((key_names(child) for child in node.children if key_names(child)), [])
            consider(prefix + named, node.start_point[0] + 1)
            for child in node.children:
                if child.type == "pair":
                    visit(child, prefix + named)
        elif node.type == "array":
            items = [child for child in node.children if child.type not in ("[", "]", ",", "comment")]
            for index, child in enumerate(items):
                consider([*prefix, str(index)], child.start_point[0] + 1)
                visit(child, [*prefix, str(index)])
        else:
            for child in node.children:
                visit(child, prefix)

    visit(parser.parse(text.encode()).root_node, [])
    return best
