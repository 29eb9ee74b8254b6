"""A flattened device tree with Android's fstab in it, for setup_data (`--android-fstab`).

Devicetree Specification 0.4, chapter 5, version 17 of the format.  The nodes are those that Android's first
stage init reads: /firmware/android with vendor properties and one fstab child per partition.  Left out: any
description of the machine, which a PC guest takes from ACPI or the MP table.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

from kvmcore.bootfile import BootFile
from kvmcore.errors import ConfigError

Node: TypeAlias = Mapping[str, "bytes | Node"]  # property or child by name, properties first

FSTAB_MAX: Final = 64 << 10  # bytes of a file; a real one has a few lines

_HEADER: Final = struct.Struct(">10I")
_MAGIC: Final = 0xD00DFEED
_VERSION, _COMPATIBLE_VERSION = 17, 16
_BEGIN_NODE, _END_NODE, _PROP, _END = 1, 2, 3, 9
_NAME: Final = re.compile(r"[0-9A-Za-z,._+-]{1,31}")
_VENDOR: Final = "#dt-vendor"


class Mount(NamedTuple):
    """One line of an fstab; the field names are the properties that Android reads."""

    partition: str
    dev: str
    type: str
    mnt_flags: str
    fsmgr_flags: str


class Fstab(NamedTuple):
    """`vendor` maps a property of /firmware/android/vendor to the path of the file with its value."""

    mounts: tuple[Mount, ...] = ()
    vendor: Mapping[str, str] = MappingProxyType({})


def parse_fstab(text: str, path: str) -> Fstab:
    """Lines of `device /partition type mount-flags fs_mgr-flags`, or `#dt-vendor property file - -`.

    Blank lines and other lines that begin with # are comments.

    Raises:
        ConfigError: names `path`, the line, and what was expected.
    """
    mounts: dict[str, Mount] = {}
    vendor: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or (words[0].startswith("#") and words[0] != _VENDOR):
            continue
        where = f"fstab {path}:{number}"
        if len(words) != 5:
            raise ConfigError(f"{where}: expected device, mount point, type, mount flags, fs_mgr flags")
        first, second, *rest = words
        if first == _VENDOR:
            if not _NAME.fullmatch(second) or second in vendor:
                raise ConfigError(
                    f"{where}: expected a new property of at most 31 characters, found {second!r}"
                )
            vendor[second] = rest[0]
        else:
            partition = second.removeprefix("/")
            if partition == second or not _NAME.fullmatch(partition) or partition in ("compatible", *mounts):
                raise ConfigError(f"{where}: expected a new mount point like /vendor, found {second!r}")
            mounts[partition] = Mount(partition, first, *rest)
    return Fstab(tuple(mounts.values()), vendor)


def android(path: str) -> bytes:
    """The device tree blob for the fstab at `path` and the files it names.

    Raises:
        ConfigError: a file cannot be read or used.
    """
    fstab = parse_fstab(_read("fstab", path), path)
    vendor = {name: _string(_read(f"{_VENDOR} {name}", file)) for name, file in fstab.vendor.items()}
    mounts = {
        m.partition: {
            "compatible": _string(f"android,{m.partition}"),
            "dev": _string(m.dev),
            "type": _string(m.type),
            "mnt_flags": _string(m.mnt_flags),
            "fsmgr_flags": _string(m.fsmgr_flags),
        }
        for m in fstab.mounts
    }
    return encode(
        {
            "#address-cells": struct.pack(">I", 2),
            "#size-cells": struct.pack(">I", 2),
            "firmware": {
                "android": {
                    "compatible": _string("android,firmware"),
                    "vendor": vendor,
                    "fstab": {"compatible": _string("android,fstab"), **mounts},
                }
            },
        }
    )


def encode(root: Node) -> bytes:
    """The blob for a tree."""
    strings = bytearray()
    offsets: dict[str, int] = {}

    def encode_node(name: str, node: Node) -> bytes:
        parts = [struct.pack(">I", _BEGIN_NODE), _padded(_string(name))]
        for key, value in node.items():
            if isinstance(value, bytes):
                if key not in offsets:
                    offsets[key] = len(strings)
                    strings.extend(_string(key))
                parts += [struct.pack(">III", _PROP, len(value), offsets[key]), _padded(value)]
            else:
                parts.append(encode_node(key, value))
        parts.append(struct.pack(">I", _END_NODE))
        return b"".join(parts)

    structure = encode_node("", root) + struct.pack(">I", _END)
    reservations = bytes(16)  # none, but for the entry that ends the list
    at_structure = _HEADER.size + len(reservations)
    at_strings = at_structure + len(structure)
    header = _HEADER.pack(
        _MAGIC, at_strings + len(strings), at_structure, at_strings, _HEADER.size,
        _VERSION, _COMPATIBLE_VERSION, 0, len(strings), len(structure),
    )  # fmt: skip
    return header + reservations + structure + bytes(strings)


def _read(what: str, path: str) -> str:
    with BootFile(what, path) as file:
        if file.size > FSTAB_MAX:
            raise file.error(f"{file.size} bytes, expected at most {FSTAB_MAX}")
        try:
            text = file.read(0, file.size, "text").decode()
        except UnicodeDecodeError as e:
            raise file.error(f"expected UTF-8 text: {e.reason} at byte {e.start}") from None
        if "\0" in text:
            raise file.error("expected text without NUL")
        return text


def _string(text: str) -> bytes:
    return text.encode() + b"\0"


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
