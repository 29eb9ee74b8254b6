"""Encodes the little ACPI Machine Language that a DSDT of declarations needs.

ACPI specification 6.5, chapter 20 (grammar) and section 6.4 (resource data types).  Every function returns
the encoding of one term.  Left out: everything that is executed, and name paths of more than one segment.
"""

from __future__ import annotations

import re
import struct
from functools import partial

_EISA_ID = re.compile(r"[A-Z]{3}[0-9A-F]{4}")


def integer(value: int) -> bytes:
    """The shortest constant for 0 <= `value` < 2^64."""
    if value < 2:
        return bytes([value])  # ZeroOp, OneOp
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4)):
        if value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    return b"\x0e" + value.to_bytes(8, "little")


def string(text: str) -> bytes:
    return b"\x0d" + text.encode("ascii") + b"\0"


def package(*elements: bytes) -> bytes:
    return b"\x12" + _with_length(bytes([len(elements)]) + b"".join(elements))


def name(path: str, value: bytes) -> bytes:
    return b"\x08" + _path(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    return b"\x10" + _with_length(_path(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    return b"\x5b\x82" + _with_length(_path(path) + b"".join(terms))


def hardware_id(text: str) -> bytes:
    """The value of a _HID or _CID: a compressed EISA id ("PNP0501") where it is one, else a string."""
    if not _EISA_ID.fullmatch(text):
        return string(text)
    a, b, c = (ord(letter) - 0x40 for letter in text[:3])
    return b"\x0c" + (a << 26 | b << 21 | c << 16 | int(text[3:], 16)).to_bytes(4, "big")


def resources(*descriptors: bytes) -> bytes:
    """The buffer that is the value of a _CRS."""
    data = b"".join(descriptors) + b"\x79\0"  # end tag; a checksum of 0 means none
    return b"\x11" + _with_length(integer(len(data)) + data)


def io(port: int, size: int) -> bytes:
    """I/O port descriptor: `size` ports from `port`, 16-bit decode."""
    return struct.pack("<BBHHBB", 0x47, 1, port, port, 1, size)


def irq(line: int, shared: bool) -> bytes:
    """IRQ descriptor: active high, edge, as an ISA device."""
    return struct.pack("<BHB", 0x23, 1 << line, 0x01 | shared << 4)


def memory32_fixed(base: int, size: int) -> bytes:
    return struct.pack("<BHBII", 0x86, 9, 1, base, size)


def _window(kind: int, type_flags: int, tag: int, form: str, base: int, size: int) -> bytes:
    """Address space descriptor of a bridge that passes [base, base + size) down; both ends are fixed."""
    body = struct.pack(f"<BBB5{form}", kind, 0x0C, type_flags, 0, base, base + size - 1, 0, size)
    return struct.pack("<BH", tag, len(body)) + body


bus_window = partial(_window, 2, 0, 0x88, "H")
io_window = partial(_window, 1, 3, 0x88, "H")  # ISA and non-ISA ranges
memory32_window = partial(_window, 0, 1, 0x87, "I")  # read-write, not cacheable
memory64_window = partial(_window, 0, 1, 0x8A, "Q")


def _path(path: str) -> bytes:
    root, segment = path[: path.startswith("\\")], path.lstrip("\\")
    return root.encode("ascii") + segment.ljust(4, "_").encode("ascii")


def _with_length(body: bytes) -> bytes:
    """PkgLength, which counts itself: one byte up to 63, else the low four bits and one to three bytes."""
    if len(body) + 1 < 1 << 6:
        return bytes([len(body) + 1]) + body
    for extra in (1, 2, 3):
        total = len(body) + 1 + extra
        if total < 1 << (4 + 8 * extra):
            break
    return bytes([extra << 6 | total & 0xF]) + (total >> 4).to_bytes(extra, "little") + body
