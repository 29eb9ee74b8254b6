"""The messages of vhost-user, both ends', without I/O.

Spec: QEMU's docs/interop/vhost-user.rst, "Message Specification" and "Front-end message types"; numbers are
in the machine's own byte order, which here is little-endian.  `parse` checks a message's kind, flags, size
and number of descriptors, and every field that has a limit.  The invariant: *any bytes give a payload or
MessageError*.  Left out: what nobody here speaks, which is dirty logging, postcopy, the IOTLB, in-flight
tracking, slots of memory one by one, what a back end asks, and everything of single kinds of device.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from devproc.record import record

F_PROTOCOL_FEATURES: Final = 1 << 30
"""The feature bit by which protocol features are offered and accepted; no driver ever sees it."""

PROTOCOL_F_MQ: Final = 1 << 0
PROTOCOL_F_REPLY_ACK: Final = 1 << 3
PROTOCOL_F_CONFIG: Final = 1 << 9

HEADER_SIZE: Final = 12
REGIONS_MAX: Final = 8
"""Regions in a memory table, and so descriptors with one message."""
CONFIG_MAX: Final = 256
"""Bytes of a device's configuration space that a message can carry."""
PAYLOAD_MAX: Final = 12 + CONFIG_MAX
VRINGS_MAX: Final = 256

_VERSION: Final = 1
_VERSION_MASK: Final = 0x3
_REPLY: Final = 1 << 2
_NEED_REPLY: Final = 1 << 3
_NO_FD: Final = 1 << 8
_HEADER: Final = struct.Struct("<III")
_U64: Final = struct.Struct("<Q")
_STATE: Final = struct.Struct("<II")
_ADDR: Final = struct.Struct("<IIQQQQ")
_TABLE: Final = struct.Struct("<II")
_REGION: Final = struct.Struct("<QQQQ")
_CONFIG: Final = struct.Struct("<III")


class MessageError(Exception):
    """The other end does not speak vhost-user as this module knows it; one line."""


class Request(enum.IntEnum):
    """What a front end asks of a back end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    SET_CONFIG = 25


class Header(NamedTuple):
    """`size` is the payload's, in bytes; `request` need not be one that is known here."""

    request: int
    reply: bool
    need_reply: bool
    size: int


class VringState(NamedTuple):
    """A number of ring `vring`: its size, where it goes on, or whether it is enabled."""

    vring: int
    num: int


class VringAddr(NamedTuple):
    """Where ring `vring` is: front-end user addresses, which a memory region translates."""

    vring: int
    flags: int
    descriptor: int
    used: int
    available: int
    log: int


class VringFile(NamedTuple):
    """Ring `vring` has the eventfd that comes along; without one, it has none from now on."""

    vring: int
    has_fd: bool


class MemoryRegion(NamedTuple):
    """`size` bytes of guest memory, which start at `mmap_offset` of the descriptor that comes along."""

    guest_address: int
    size: int
    user_address: int
    mmap_offset: int


@record
class ConfigSpace:
    """Bytes of the device's configuration from `offset` on; GET_CONFIG carries as many as its answer."""

    offset: int
    data: bytes
    flags: int = 0


Memory = tuple[MemoryRegion, ...]
Payload = int | VringState | VringAddr | VringFile | ConfigSpace | Memory | None


class _Codec(NamedTuple):
    pack: Callable[[Any], bytes]
    parse: Callable[[bytes], Payload]
    fds: Callable[[Any], int] = lambda _payload: 0


def _unpack(layout: struct.Struct, body: bytes) -> tuple[int, ...]:
    if len(body) != layout.size:
        raise MessageError(f"a payload of {len(body)} bytes, expected {layout.size}")
    return layout.unpack(body)


def _vring(index: int) -> int:
    if index >= VRINGS_MAX:
        raise MessageError(f"vring {index}, expected one below {VRINGS_MAX}")
    return index


def _parse_none(body: bytes) -> None:
    if body:
        raise MessageError(f"a payload of {len(body)} bytes, expected none")


def _parse_state(body: bytes) -> VringState:
    index, num = _unpack(_STATE, body)
    return VringState(_vring(index), num)


def _parse_addr(body: bytes) -> VringAddr:
    index, *rest = _unpack(_ADDR, body)
    return VringAddr(_vring(index), *rest)


def _parse_file(body: bytes) -> VringFile:
    (value,) = _unpack(_U64, body)
    if value >= _NO_FD << 1:
        raise MessageError(f"unknown bits in a vring's file, {value:#x}")
    return VringFile(value & (_NO_FD - 1), not value & _NO_FD)


def _parse_table(body: bytes) -> Memory:
    count, _padding = _unpack(_TABLE, body[: _TABLE.size])
    if not 0 < count <= REGIONS_MAX:
        raise MessageError(f"{count} memory regions, expected 1 to {REGIONS_MAX}")
    if len(body) != _TABLE.size + count * _REGION.size:
        raise MessageError(f"{count} memory regions in {len(body)} bytes")
    return tuple(map(MemoryRegion._make, _REGION.iter_unpack(body[_TABLE.size :])))


def _pack_table(regions: Memory) -> bytes:
    return _TABLE.pack(len(regions), 0) + b"".join(_REGION.pack(*r) for r in regions)


def _parse_config(body: bytes) -> ConfigSpace:
    offset, size, flags = _unpack(_CONFIG, body[: _CONFIG.size])
    data = body[_CONFIG.size :]
    if len(data) != size or offset + size > CONFIG_MAX:
        raise MessageError(f"configuration [{offset}, {offset + size}) in {len(data)} bytes")
    return ConfigSpace(offset, data, flags)


_NONE = _Codec(lambda _: b"", _parse_none)
_NUMBER = _Codec(_U64.pack, lambda body: _unpack(_U64, body)[0])
_VRING_STATE = _Codec(lambda s: _STATE.pack(*s), _parse_state)
_VRING_ADDR = _Codec(lambda a: _ADDR.pack(*a), _parse_addr)
_VRING_FILE = _Codec(
    lambda f: _U64.pack(f.vring | (0 if f.has_fd else _NO_FD)), _parse_file, lambda f: int(f.has_fd)
)
_MEMORY = _Codec(_pack_table, _parse_table, len)
_CONFIG_SPACE = _Codec(lambda c: _CONFIG.pack(c.offset, len(c.data), c.flags) + c.data, _parse_config)

_ASKS: Final[dict[int, _Codec]] = {
    Request.GET_FEATURES: _NONE,
    Request.SET_FEATURES: _NUMBER,
    Request.SET_OWNER: _NONE,
    Request.RESET_OWNER: _NONE,
    Request.SET_MEM_TABLE: _MEMORY,
    Request.SET_VRING_NUM: _VRING_STATE,
    Request.SET_VRING_ADDR: _VRING_ADDR,
    Request.SET_VRING_BASE: _VRING_STATE,
    Request.GET_VRING_BASE: _VRING_STATE,
    Request.SET_VRING_KICK: _VRING_FILE,
    Request.SET_VRING_CALL: _VRING_FILE,
    Request.SET_VRING_ERR: _VRING_FILE,
    Request.GET_PROTOCOL_FEATURES: _NONE,
    Request.SET_PROTOCOL_FEATURES: _NUMBER,
    Request.GET_QUEUE_NUM: _NONE,
    Request.SET_VRING_ENABLE: _VRING_STATE,
    Request.GET_CONFIG: _CONFIG_SPACE,
    Request.SET_CONFIG: _CONFIG_SPACE,
}
_ANSWERS: Final[dict[int, _Codec]] = {
    Request.GET_FEATURES: _NUMBER,
    Request.GET_PROTOCOL_FEATURES: _NUMBER,
    Request.GET_QUEUE_NUM: _NUMBER,
    Request.GET_VRING_BASE: _VRING_STATE,
    Request.GET_CONFIG: _CONFIG_SPACE,
}


def answered(request: Request) -> bool:
    """Whether it has an answer of its own; any other is acknowledged, if the front end asks for that."""
    return request in _ANSWERS


def pack(request: Request, payload: Payload = None, *, need_reply: bool = False) -> bytes:
    """A request; its descriptors, of which the payload says how many, are the caller's to send along."""
    body = _ASKS[request].pack(payload)
    return _HEADER.pack(request, _VERSION | (_NEED_REPLY if need_reply else 0), len(body)) + body


def pack_reply(request: Request, payload: Payload) -> bytes:
    """What answers `request`: its answer, or a u64 that acknowledges it, 0 for success.

    GET_CONFIG is refused by None.
    """
    body = b"" if payload is None else _answer(request).pack(payload)
    return _HEADER.pack(request, _VERSION | _REPLY, len(body)) + body


def parse_header(data: bytes) -> Header:
    """The header of whatever comes.

    Raises:
        MessageError: it is not `HEADER_SIZE` bytes, of another version, has unknown flags, or a payload that
            no message has.
    """
    request, flags, size = _unpack(_HEADER, data)
    if flags & _VERSION_MASK != _VERSION or flags & ~(_VERSION_MASK | _REPLY | _NEED_REPLY):
        raise MessageError(f"request {request} with flags {flags:#x}, expected version {_VERSION}")
    if size > PAYLOAD_MAX:
        raise MessageError(f"request {request} with a payload of {size} bytes, expected {PAYLOAD_MAX}")
    return Header(request, bool(flags & _REPLY), bool(flags & _NEED_REPLY), size)


def parse(header: Header, body: bytes, fds: int) -> tuple[Request, Payload]:
    """What a front end asks, which came with `fds` descriptors.

    Raises:
        MessageError: it is not a request that is known here, or is malformed.
    """
    try:
        request = Request(header.request)
    except ValueError:
        raise MessageError(f"unknown request {header.request}") from None
    if header.reply:
        raise MessageError(f"{request.name}: an answer to what was not asked")
    codec = _ASKS[request]
    payload = _named(request, codec, body)
    if fds != (expected := codec.fds(payload)):
        raise MessageError(f"{request.name}: {fds} descriptors, expected {expected}")
    return request, payload


def parse_reply(request: Request, header: Header, body: bytes) -> Payload:
    """What answers `request`; descriptors may not come with it.

    Raises:
        MessageError: this does not, or it is malformed.
    """
    if header.request != request or not header.reply:
        raise MessageError(f"request {header.request} where an answer to {request.name} is due")
    return _named(request, _answer(request), body)


def _answer(request: Request) -> _Codec:
    return _ANSWERS.get(request, _NUMBER)


def _named(request: Request, codec: _Codec, body: bytes) -> Payload:
    try:
        return codec.parse(body)
    except MessageError as e:
        raise MessageError(f"{request.name}: {e}") from None
