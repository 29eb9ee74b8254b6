"""What the drivers of virtio devices put into their queues: where mutation begins (virtio 1.2, section 5)."""

from __future__ import annotations

from itertools import product
from struct import pack
from typing import Final, NamedTuple

from devproc.fuse import IN_HEADER, Opcode
from devproc.vhost.message import Request, VringState, pack_reply


class Shape(NamedTuple):
    """A chain: what is read, `sizes` of two elements to read and two to write; for `queue`, or for each."""

    data: bytes
    sizes: tuple[int, int, int, int]
    queue: int | None = None


SHAPES: Final = (Shape(b"", (0, 0, 64, 0)), Shape(b"some bytes", (10, 0, 0, 0)), Shape(b"", (0, 0, 1, 2000)))
_HEADER: Final = bytes(12)  # virtio_net_hdr, 5.1.6
_ETHERNET: Final = b"\xff" * 6 + b"\x02net\0\1" + b"\x08\x06" + bytes(46)


def _fuse(opcode: int, body: bytes = b"", node: int = 1, room: int = 144, queue: int = 1) -> Shape:
    """A request with a reply of up to `room` bytes (5.11.6)."""
    header = IN_HEADER.pack(IN_HEADER.size + len(body), opcode, 7, node, 0, 0, 0, 0)
    return Shape(header + body, (len(header), len(body), 16, room), queue)


def _transfer(fh: int, offset: int, size: int) -> bytes:
    return pack("<QQIIQII", fh, offset, size, 0, 0, 0, 0)


def _setattr(valid: int, fh: int = 0, size: int = 0, mode: int = 0, uid: int = 0) -> bytes:
    return pack("<II6Q8I", valid, 0, fh, size, 0, 1 << 30, 1 << 31, 0, 5, 10**9, 0, mode, 0, uid, 0, 0)


def _packet(
    op: int, host: int, more: bytes = b"", flags: int = 0, room: int = 1 << 18, type: int = 1
) -> Shape:
    """A packet of the guest's port 1 (5.10.6)."""
    header = pack("<QQIIIHHIII", 3, 2, 1, host, len(more), type, op, flags, room, 0)
    return Shape(header + more, (len(header), len(more), 0, 0), 1)


# What the tree of a bench has, and a name that is new; nodes and files are numbered from the first one on.
_NAMES: Final = (b"file\0", b"big\0", b"secret\0", b"dir\0", b"link\0", b"pipe\0", b"new\0")
_NODES: Final = (1, 2)
_INIT: Final = _fuse(Opcode.INIT, pack("<4I", 7, 38, 1 << 17, 0xFFFF_FFFF), 0)
_CREATE: Final = _fuse(Opcode.CREATE, pack("<4I", 0o102, 0o644, 0, 0) + b"new\0")
_ROOM: Final = (Shape(b"", (0, 0, 44, 1500), 0),) * 4
_HOST_PORT: Final = 1 << 30  # of the first program that calls
_VHOST_USER: Final = ("vhost-user-blk", "vhost-user-net", "vhost-user-fs")

SHAPES_OF: Final[dict[str, tuple[Shape, ...]]] = {
    # 5.2.6: type, reserved, sector; data (zeros, where nothing is said); status
    "virtio-blk": (
        *(Shape(pack("<IIQ", 0, 0, at), (16, 0, 512, 1)) for at in (0, 127, 128, 1 << 55)),
        Shape(pack("<IIQ", 0, 0, 3), (16, 0, 1025, 0)),
        *(Shape(pack("<IIQ", 1, 0, at), (16, 512, 1, 0)) for at in (0, 127, 128)),
        Shape(pack("<IIQ", 4, 0, 0), (16, 0, 1, 0)),
        Shape(pack("<IIQ", 8, 0, 0), (16, 0, 20, 1)),
        *(
            Shape(pack("<IIQ", kind, 0, 0) + pack("<QII", at, count, flags), (16, 16, 1, 0))
            for kind, at, count, flags in product((11, 13), (0, 120), (1, 8, 9), (0, 1, 2))
        ),
        Shape(pack("<IIQ", 99, 0, 0), (16, 0, 1, 0)),
    ),
    # 5.1.6, and the commands of 5.1.6.5
    "virtio-net": tuple(
        [Shape(b"", (0, 0, 1526, 0), queue) for queue in (0, 2)]
        + [Shape(_HEADER + _ETHERNET, (12, 60, 0, 0), queue) for queue in (1, 3)]
        + [
            Shape(pack("<BB", group, command) + more, (2, len(more), 1, 0), queue)
            for queue in (2, 8)
            for group, command, more in (
                (0, 0, b"\1"), (1, 0, pack("<II", 0, 0)), (1, 1, _ETHERNET[6:12]), (2, 0, b"\5\0"),
                (3, 0, b"\0\0\0\0"), (4, 0, b"\1\0"), (4, 0, b"\xff\xff"), (5, 0, bytes(8)),
            )
        ]
    ),
    # 5.3.6.2: port, event, value
    "virtio-console": tuple(
        Shape(pack("<IHH", port, event, value), (8, 0, 0, 0), 3)
        for port, event, value in product((0, 1, 3, 4), (0, 3, 6), (0, 1))
    ),
    # 5.5.6: page numbers; statistics as tag, value
    "virtio-balloon": (
        *(Shape(pack("<II", *pages), (8, 0, 0, 0)) for pages in product((1, 64), (2, 1 << 31))),
        *(Shape(pack("<HQ", tag, 1 << 20), (10, 0, 0, 0), 2) for tag in (0, 4, 99)),
        Shape(pack("<I", 1), (4, 0, 0, 0)),
    ),
    # 5.11.6, and <linux/fuse.h>
    "virtio-fs": (
        _INIT,
        _fuse(Opcode.INIT, pack("<4I", 7, 30, 0, 0), 0), _fuse(Opcode.INIT, pack("<4I", 8, 0, 0, 0), 0),
        *(_fuse(Opcode.LOOKUP, name) for name in _NAMES), _fuse(Opcode.LOOKUP, b"file\0", 2),
        *(_fuse(op, name) for op in (Opcode.UNLINK, Opcode.RMDIR) for name in (b"file\0", b"dir\0")),
        *(_fuse(op, body + b"new\0", node)
          for op, body in (
              (Opcode.MKNOD, pack("<4I", 0o100644, 0, 0, 0)), (Opcode.MKNOD, pack("<4I", 0o10644, 0, 0, 0)),
              (Opcode.MKDIR, pack("<2I", 0o755, 0)), (Opcode.LINK, pack("<Q", 2)),
              (Opcode.CREATE, pack("<4I", 0o1202, 0, 0, 0)),
          )
          for node in _NODES),
        _CREATE, _fuse(Opcode.CREATE, pack("<4I", 2, 0, 0, 0) + b"file\0"),
        _fuse(Opcode.SYMLINK, b"new\0dir/file\0"), _fuse(Opcode.SYMLINK, b"dir\0dir/file\0", 2),
        _fuse(Opcode.SYMLINK, b"new\0\0"),
        *(_fuse(Opcode.RENAME, pack("<Q", to) + b"file\0new\0") for to in _NODES),
        *(_fuse(Opcode.RENAME2, pack("<QII", 1, how, 0) + names)
          for how in (0, 1, 2, 4) for names in (b"file\0new\0", b"dir\0file\0")),
        *(_fuse(op, body, node, room)
          for op, body, room in (
              (Opcode.GETATTR, pack("<IIQ", 0, 0, 0), 104), (Opcode.GETATTR, pack("<IIQ", 1, 0, 1), 104),
              (Opcode.READLINK, b"", 4096), (Opcode.READLINK, b"", 2), (Opcode.STATFS, b"", 80),
              *((Opcode.OPEN, pack("<2I", flags, 0), 16) for flags in (0, 1, 2, 3, 0o1001, 0o2001)),
              (Opcode.OPENDIR, bytes(8), 16),
              *((Opcode.SETATTR, _setattr(*how), 104)
                for how in ((1, 0, 0, 0o600), (2, 0, 0, 0, 1), (6,), (8, 0, 7), (72, 1, 9), (16,), (32,),
                            (432,))),
          )
          for node in _NODES),
        *(_fuse(op, _transfer(1, offset, size), node, room)
          for op, node in ((Opcode.READ, 2), (Opcode.READDIR, 1), (Opcode.READDIRPLUS, 1))
          for offset, size, room in ((0, 4096, 4096), (2, 200, 300), (0, 8, 100), (5000, 60, 60))),
        *(_fuse(op, body, node, 0)
          for op, node, body in (
              (Opcode.RELEASE, 2, pack("<QIIQ", 1, 0, 0, 0)), (Opcode.FSYNC, 2, pack("<QII", 1, 0, 0)),
              (Opcode.RELEASEDIR, 1, pack("<QIIQ", 1, 0, 0, 0)), (Opcode.FSYNCDIR, 1, pack("<QII", 1, 0, 0)),
          )),
        *(_fuse(Opcode.WRITE, _transfer(1, offset, 11) + b"hello again", 2, 8) for offset in (0, 5000)),
        _fuse(Opcode.WRITE, _transfer(1, 0, 12) + b"hello again", 2, 8),
        *(_fuse(Opcode.FALLOCATE, pack("<3QII", 1, 2, 3, mode, 0), 2, 0) for mode in (0, 1, 3, 16, 8)),
        *(_fuse(Opcode.LSEEK, pack("<2QII", 1, 0, whence, 0), 2, 8) for whence in (2, 3, 4)),
        *(_fuse(Opcode.FORGET, pack("<Q", 1), node, 0, 0) for node in _NODES),
        _fuse(Opcode.BATCH_FORGET, pack("<II4Q", 2, 0, 2, 1, 3, 1), 0, 0, 0),
        _fuse(Opcode.BATCH_FORGET, pack("<II4Q", 3, 0, 2, 1, 3, 1), 0, 0, 0),
        _fuse(Opcode.INTERRUPT, pack("<Q", 7), 0, 0, 0), _fuse(Opcode.DESTROY), _fuse(99),
    ),
    # 5.10.6: what is received into; requests to each sort of port, what may follow, an answer to who calls
    "virtio-vsock": (
        *(Shape(b"", (0, 0, 44, room), 0) for room in (0, 1, 100, 1500)),
        *(_packet(1, port, room=room) for port in range(4) for room in (0, 10, 1 << 18)),
        *(_packet(op, port, flags=flags)
          for op, flags in ((2, 0), (3, 0), (4, 1), (4, 2), (4, 3), (6, 0), (7, 0), (9, 0))
          for port in (0, 2, _HOST_PORT)),
        *(_packet(5, port, b"to the host" * count) for port in (0, _HOST_PORT) for count in (0, 1, 200)),
        *(_packet(1, 0, type=2), _packet(3, 0, type=2)),
        Shape(b"", (0, 0, 8, 0), 2), Shape(b"", (0, 0, 3, 0), 2),
    ),
}  # fmt: skip
SHAPES_OF["virtio-net-stream"] = SHAPES_OF["virtio-net"]

FIRST_OF: Final[dict[str, tuple[tuple[Shape | bytes | int, ...], ...]]] = {
    "virtio-fs": (
        (_INIT, _fuse(Opcode.LOOKUP, b"file\0"), _fuse(Opcode.OPEN, pack("<2I", 2, 0), 2, 16)),
        (_INIT, _fuse(Opcode.OPENDIR, bytes(8), 1, 16)),
        (_INIT, _CREATE),
        *((_INIT, _fuse(Opcode.LOOKUP, name)) for name in _NAMES[1:-1]),
    ),
    **dict.fromkeys(_VHOST_USER, ((b"\1",), ())),
    "virtio-vsock": (
        (*_ROOM, _packet(1, 0), _packet(5, 0, b"to the host")),
        (*_ROOM, _packet(1, 0), 0, _packet(5, 0, b"to the host")),
        (*_ROOM, _packet(1, 0, room=10), b""),
        (*_ROOM, _packet(1, 2)),
        (*_ROOM, b"CONNECT 1\n", _packet(2, _HOST_PORT)),
    ),
}
"""How some inputs begin: what a driver sends, what a program says that calls, how much the programs take."""

_ANSWERS: Final = (
    *(pack_reply(Request.GET_VRING_BASE, VringState(ring, base)) for ring, base in product((0, 1), (0, 5))),
    pack_reply(Request.GET_FEATURES, 1),
)

TEXTS_OF: Final[dict[str, tuple[bytes, ...]]] = {
    "virtio-vsock": (
        b"", b"\xff", b"CONNECT 1\n", b"CONNECT 1\nand more", b"CONNECT 4294967296\n", b"CONNECT",
        b"CONNECT 12345678901234567890\n", b"from the host",
    ),
    **dict.fromkeys(_VHOST_USER, (b"", b"\1", b"\2", b"\3", b"\4", *_ANSWERS)),
}  # fmt: skip
"""What comes from the host."""
