"""A kernel's System.map as an ELF file without contents, so that a debugger knows its functions by name.

For kernels that were built without debug information: names and addresses are all that it has.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

from pipeline.errors import UserError

#: The number of an architecture in an ELF header (`e_machine`), by Debian's name of it: <linux/elf-em.h>.
MACHINES = {"amd64": 62}
#: The part of the kernel's image that is code, and its whole.
CODE, IMAGE = ("_stext", "_etext"), ("_text", "_end")
_HEADER, _SECTION, _SYMBOL = "<16sHHIQQQIHHHHHH", "<IIQQQQIIQQ", "<IBBHQQ"
_SYMTAB, _STRTAB, _NOBITS = 2, 3, 8
_ALLOC, _WRITE, _EXECUTE = 2, 1, 4
_GLOBAL_FUNCTION, _GLOBAL_OBJECT, _LOCAL_FUNCTION, _LOCAL_OBJECT = 0x12, 0x11, 0x02, 0x01


def write(system_map: Path, arch: str, target: Path) -> None:
    """Write the ELF file `target` of a System.map; `UserError` when that is none."""
    symbols = _read(system_map)
    at = {name: address for address, _, name in symbols}
    if any(name not in at for name in (*CODE, *IMAGE)):
        raise UserError(f"{system_map} is no System.map of a kernel", "build the kernel again")
    code, data = (at[CODE[0]], at[CODE[1]]), (at[CODE[1]], at[IMAGE[1]])
    strings, local = bytearray(b"\0"), [struct.pack(_SYMBOL, 0, 0, 0, 0, 0, 0)]
    public: list[bytes] = []
    inside = [each for each in symbols if code[0] <= each[0] < data[1]]
    for (address, kind, name), (following, _, _) in pairwise([*inside, (data[1], "", "")]):
        is_code = address < code[1]
        packed = struct.pack(
            _SYMBOL,
            len(strings),
            (_GLOBAL_FUNCTION if is_code else _GLOBAL_OBJECT)
            if kind.isupper()
            else (_LOCAL_FUNCTION if is_code else _LOCAL_OBJECT),
            0,
            1 if is_code else 2,
            address,
            following - address,
        )
        (public if kind.isupper() else local).append(packed)
        strings += name.encode() + b"\0"
    names = b"\0.text\0.data\0.symtab\0.strtab\0.shstrtab\0"
    table = b"".join((*local, *public))
    begin = struct.calcsize(_HEADER)
    places = (begin, begin + len(table), begin + len(table) + len(strings))

    def section(name: bytes, *fields: int) -> bytes:
        return struct.pack(_SECTION, names.index(name + b"\0"), *fields)

    sections = (
        struct.pack(_SECTION, *([0] * 10)),
        section(b".text", _NOBITS, _ALLOC | _EXECUTE, code[0], begin, code[1] - code[0], 0, 0, 16, 0),
        section(b".data", _NOBITS, _ALLOC | _WRITE, data[0], begin, data[1] - data[0], 0, 0, 16, 0),
        section(b".symtab", _SYMTAB, 0, 0, places[0], len(table), 4, len(local), 8, struct.calcsize(_SYMBOL)),
        section(b".strtab", _STRTAB, 0, 0, places[1], len(strings), 0, 0, 1, 0),
        section(b".shstrtab", _STRTAB, 0, 0, places[2], len(names), 0, 0, 1, 0),
    )
    # 64 bits, the least significant byte first; an executable
    identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = struct.pack(
        _HEADER,
        identity,
        2,
        MACHINES[arch],
        1,
        0,
        0,
        places[2] + len(names),
        0,
        begin,
        0,
        0,
        struct.calcsize(_SECTION),
        len(sections),
        len(sections) - 1,
    )
    target.write_bytes(b"".join((header, table, strings, names, *sections)))


def _read(system_map: Path) -> list[tuple[int, str, str]]:
    """Address, kind (`nm`'s letter) and name of every symbol, by address."""
    found = []
    for line in system_map.read_text(errors="replace").splitlines():
        address, _, rest = line.partition(" ")
        kind, _, name = rest.partition(" ")
        try:
            found.append((int(address, 16), kind, name))
        except ValueError:
            raise UserError(f"{system_map} is no System.map of a kernel", "build the kernel again") from None
    return sorted(found, key=lambda each: each[0])
