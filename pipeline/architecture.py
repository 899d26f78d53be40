"""The tables that describe architectures: the only place where their names differ."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import UserError


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one architecture is called by whom.

    debian   Debian's name of it
    kernel   the kernel's `ARCH`
    image    the boot image that the kernel's make builds and qemu loads
    console  the serial console of qemu's default board
    """

    debian: str
    kernel: str
    image: str
    console: str


ARCHITECTURES = {
    "amd64": Architecture(debian="amd64", kernel="x86_64", image="bzImage", console="ttyS0"),
}


def architecture(name: str) -> Architecture:
    """The table's row of that Debian architecture."""
    try:
        return ARCHITECTURES[name]
    except KeyError:
        raise UserError(
            f"architecture {name} is not supported", f"use one of: {', '.join(ARCHITECTURES)}"
        ) from None
