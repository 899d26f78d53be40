"""Sends ICMP echo requests out of one network interface, and counts what comes back (RFC 792).

Usage: INTERFACE OWN-ADDRESS ADDRESS COUNT. Prints `COUNT of COUNT came back`; exit status 0 when all did. Each request
is repeated until it is answered or `PATIENCE_S` have passed since the first one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import time

PATIENCE_S = 60.0

REQUEST, REPLY = 8, 0

#: Seconds until a request is repeated.
REPEAT_S = 0.5


def checksum(packet: bytes) -> int:
    """RFC 1071; `packet` has an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(packet) // 2}H", packet))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def request(identity: int, number: int) -> bytes:
    """One echo request of 64 bytes."""
    data = bytes(56)
    empty = struct.pack("!BBHHH", REQUEST, 0, 0, identity, number) + data
    return struct.pack("!BBHHH", REQUEST, 0, checksum(empty), identity, number) + data


def is_reply(packet: bytes, identity: int, number: int) -> bool:
    """Whether an IPv4 packet is the answer to that request."""
    header = (packet[0] & 0x0F) * 4
    if len(packet) < header + 8:
        return False
    kind, _, _, of, count = struct.unpack("!BBHHH", packet[header : header + 8])
    return (kind, of, count) == (REPLY, identity, number)


def main() -> int:
    """See the module."""
    interface, own, other, wanted = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    identity, answered = os.getpid() & 0xFFFF, 0
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        link.bind((own, 0))
        end = time.monotonic() + PATIENCE_S
        while answered < wanted and time.monotonic() < end:
            # Before the other side is known there is nowhere to send it.
            with contextlib.suppress(OSError):
                link.sendto(request(identity, answered), (other, 0))
            until = time.monotonic() + REPEAT_S
            while (left := until - time.monotonic()) > 0:
                link.settimeout(left)
                with contextlib.suppress(TimeoutError):
                    packet, (source, _) = link.recvfrom(2048)
                    if source == other and is_reply(packet, identity, answered):
                        answered += 1
                        break
    print(f"{answered} of {wanted} came back")
    return 0 if answered == wanted else 1


if __name__ == "__main__":
    sys.exit(main())
