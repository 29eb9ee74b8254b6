"""The FUSE protocol, 7.31 and later: requests parsed into checked values, replies packed; no I/O.

Spec: Linux include/uapi/linux/fuse.h; virtio 1.2, section 5.11.6.  A request is `fuse_in_header` and what its
opcode has after it, a reply `fuse_out_header` and likewise.  Every name is one component: not empty, no ".",
no "..", no "/", no NUL, at most NAME_MAX bytes.  Left out: extended attributes, locks, ioctl, poll, DAX, and
protocols before 7.31, which Linux had before virtiofs.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from enum import IntEnum
from struct import Struct
from typing import Final

from devproc.record import record

MAJOR: Final = 7
MINOR: Final = 31
ROOT_ID: Final = 1
NAME_MAX: Final = 255
TARGET_MAX: Final = 4095  # of a symbolic link: PATH_MAX with its NUL
FORGETS_MAX: Final = 65536  # in one request
UNKNOWN_INO: Final = 0xFFFF_FFFF

IN_HEADER: Final = Struct("<IIQQIIII")  # len opcode unique nodeid uid gid pid extlen and padding
OUT_HEADER: Final = Struct("<IiQ")  # len error unique
ENTRY_SIZE: Final = 128  # struct fuse_entry_out
DIRENT: Final = Struct("<QQII")  # ino off namelen type; then the name, padded to 8

_INIT_IN: Final = Struct("<4I")
_INIT_OUT: Final = Struct("<4I2H2I2HI28x")
_FORGET_IN: Final = Struct("<Q")
_BATCH_FORGET_IN: Final = Struct("<II")
_FORGET_ONE: Final = Struct("<QQ")
_GETATTR_IN: Final = Struct("<IIQ")
_SETATTR_IN: Final = Struct("<II6Q8I")
_MKNOD_IN: Final = Struct("<4I")
_MKDIR_IN: Final = Struct("<2I")
_RENAME_IN: Final = Struct("<Q")
_RENAME2_IN: Final = Struct("<QII")
_LINK_IN: Final = Struct("<Q")
_OPEN_IN: Final = Struct("<2I")
_CREATE_IN: Final = Struct("<4I")
_TRANSFER_IN: Final = Struct("<QQIIQII")  # of READ, WRITE, READDIR and READDIRPLUS
_RELEASE_IN: Final = Struct("<QIIQ")
_FSYNC_IN: Final = Struct("<QII")
_FALLOCATE_IN: Final = Struct("<3QII")
_LSEEK_IN: Final = Struct("<2QII")

_ATTR: Final = Struct("<6Q10I")
_ENTRY_OUT: Final = Struct("<4Q2I")
_ATTR_OUT: Final = Struct("<QII")
_OPEN_OUT: Final = Struct("<QII")
_WRITE_OUT: Final = Struct("<II")
_LSEEK_OUT: Final = Struct("<Q")
_STATFS_OUT: Final = Struct("<5Q4I24x")

# Flags of INIT
ASYNC_READ: Final = 1 << 0
ATOMIC_O_TRUNC: Final = 1 << 3
BIG_WRITES: Final = 1 << 5
AUTO_INVAL_DATA: Final = 1 << 12
DO_READDIRPLUS: Final = 1 << 13
READDIRPLUS_AUTO: Final = 1 << 14
PARALLEL_DIROPS: Final = 1 << 18
MAX_PAGES: Final = 1 << 22
CACHE_SYMLINKS: Final = 1 << 23

# Which fields of SETATTR count
FATTR_MODE: Final = 1 << 0
FATTR_UID: Final = 1 << 1
FATTR_GID: Final = 1 << 2
FATTR_SIZE: Final = 1 << 3
FATTR_ATIME: Final = 1 << 4
FATTR_MTIME: Final = 1 << 5
FATTR_FH: Final = 1 << 6
FATTR_ATIME_NOW: Final = 1 << 7
FATTR_MTIME_NOW: Final = 1 << 8

_GETATTR_FH: Final = 1 << 0
_OFFSET_MAX: Final = (1 << 63) - 1


class Opcode(IntEnum):
    """The opcodes that are known; all others are answered by ENOSYS."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46


SILENT: Final = frozenset((Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT))
"""What has no reply."""


class Refused(Exception):
    """The request is answered by an error number."""

    def __init__(self, error: int) -> None:
        super().__init__(errno.errorcode.get(error, str(error)))
        self.errno = error


@record
class Header:
    """`opcode` may be unknown; `size` is what the request says that it is long."""

    size: int
    opcode: int
    unique: int
    nodeid: int


@record
class Init:
    major: int
    minor: int
    max_readahead: int
    flags: int


@record
class SetAttr:
    """`fh` is None unless the request is about an open file; times in seconds and nanoseconds."""

    valid: int
    fh: int | None
    size: int
    atime: tuple[int, int]
    mtime: tuple[int, int]
    mode: int
    uid: int
    gid: int


@record
class Transfer:
    """READ, WRITE, READDIR, READDIRPLUS: `size` bytes from `offset` on."""

    fh: int
    offset: int
    size: int


@record
class Create:
    flags: int
    mode: int
    name: bytes


@record
class Rename:
    newdir: int
    flags: int
    name: bytes
    to_name: bytes


@record
class Fallocate:
    fh: int
    offset: int
    size: int
    mode: int


@record
class LSeek:
    fh: int
    offset: int
    whence: int


@record
class Attributes:
    """struct fuse_attr; times in nanoseconds since the epoch."""

    ino: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    mode: int
    nlink: int
    uid: int
    gid: int
    blksize: int

    def pack(self) -> bytes:
        """The 88 bytes of it; rdev is always 0."""
        times = [divmod(ns, 10**9) for ns in (self.atime_ns, self.mtime_ns, self.ctime_ns)]
        return _ATTR.pack(
            self.ino,
            self.size,
            self.blocks,
            *(s & (1 << 64) - 1 for s, _ in times),
            *(ns for _, ns in times),
            self.mode,
            min(self.nlink, 0xFFFF_FFFF),
            self.uid,
            self.gid,
            0,
            self.blksize,
            0,
        )


def header(data: bytes) -> Header:
    """The header of a request, in exactly its bytes."""
    size, opcode, unique, nodeid, *_ = IN_HEADER.unpack(data)
    return Header(size, opcode, unique, nodeid)


def _unpack(layout: Struct, data: bytes) -> tuple[int, ...]:
    """The first bytes of `data`; what a later protocol has after them does not matter."""
    if len(data) < layout.size:
        raise Refused(errno.EINVAL)
    return layout.unpack_from(data)


def _strings(data: bytes, count: int) -> list[bytes]:
    """The NUL-terminated strings that `data` consists of."""
    *found, rest = data.split(b"\0")
    if rest or len(found) != count:
        raise Refused(errno.EINVAL)
    return found


def check_name(name: bytes) -> bytes:
    """One component of a path.

    Raises:
        Refused: ENAMETOOLONG, or EINVAL for what is none.
    """
    if len(name) > NAME_MAX:
        raise Refused(errno.ENAMETOOLONG)
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise Refused(errno.EINVAL)
    return name


def _offset(offset: int) -> int:
    if offset > _OFFSET_MAX:
        raise Refused(errno.EINVAL)
    return offset


# What follows the header, by opcode; each raises Refused.


def init(data: bytes) -> Init:
    return Init(*_unpack(_INIT_IN, data))


def name(data: bytes) -> bytes:
    """LOOKUP, UNLINK, RMDIR."""
    (found,) = _strings(data, 1)
    return check_name(found)


def forgets(opcode: int, nodeid: int, data: bytes) -> Iterator[tuple[int, int]]:
    """FORGET, BATCH_FORGET: nodes, and how many look-ups each loses."""
    if opcode == Opcode.FORGET:
        yield nodeid, _unpack(_FORGET_IN, data)[0]
        return
    count, _ = _unpack(_BATCH_FORGET_IN, data)
    end = _BATCH_FORGET_IN.size + count * _FORGET_ONE.size
    if count > FORGETS_MAX or end > len(data):
        raise Refused(errno.EINVAL)
    yield from _FORGET_ONE.iter_unpack(data[_BATCH_FORGET_IN.size : end])


def getattr_fh(data: bytes) -> int | None:
    """GETATTR: the open file that is meant, if one is."""
    flags, _, fh = _unpack(_GETATTR_IN, data)
    return fh if flags & _GETATTR_FH else None


def setattr(data: bytes) -> SetAttr:
    valid, _, fh, size, _, *times, mode, _, uid, gid, _ = _unpack(_SETATTR_IN, data)
    atime, mtime, _, atime_ns, mtime_ns, _ = times
    return SetAttr(
        valid,
        fh if valid & FATTR_FH else None,
        _offset(size),
        (atime, atime_ns),
        (mtime, mtime_ns),
        mode,
        uid,
        gid,
    )


def symlink(data: bytes) -> tuple[bytes, bytes]:
    """(name, target)."""
    found, target = _strings(data, 2)
    if len(target) > TARGET_MAX:
        raise Refused(errno.ENAMETOOLONG)
    if not target:
        raise Refused(errno.ENOENT)
    return check_name(found), target


def mknod(data: bytes) -> Create:
    mode, *_ = _unpack(_MKNOD_IN, data)
    return Create(0, mode, name(data[_MKNOD_IN.size :]))


def mkdir(data: bytes) -> Create:
    mode, _ = _unpack(_MKDIR_IN, data)
    return Create(0, mode, name(data[_MKDIR_IN.size :]))


def create(data: bytes) -> Create:
    flags, mode, _, _ = _unpack(_CREATE_IN, data)
    return Create(flags, mode, name(data[_CREATE_IN.size :]))


def rename(opcode: int, data: bytes) -> Rename:
    layout = _RENAME_IN if opcode == Opcode.RENAME else _RENAME2_IN
    newdir, *more = _unpack(layout, data)
    before, after = _strings(data[layout.size :], 2)
    return Rename(newdir, more[0] if more else 0, check_name(before), check_name(after))


def link(data: bytes) -> tuple[int, bytes]:
    """(node, its new name)."""
    (node,) = _unpack(_LINK_IN, data)
    return node, name(data[_LINK_IN.size :])


def open_flags(data: bytes) -> int:
    return _unpack(_OPEN_IN, data)[0]


def transfer(data: bytes) -> Transfer:
    fh, offset, size, *_ = _unpack(_TRANSFER_IN, data)
    return Transfer(fh, _offset(offset), size)


TRANSFER_SIZE: Final = _TRANSFER_IN.size


def release(data: bytes) -> int:
    """RELEASE, RELEASEDIR: the file that is closed."""
    return _unpack(_RELEASE_IN, data)[0]


def fsync(data: bytes) -> int:
    """FSYNC, FSYNCDIR: the open file."""
    return _unpack(_FSYNC_IN, data)[0]


def fallocate(data: bytes) -> Fallocate:
    fh, offset, size, mode, _ = _unpack(_FALLOCATE_IN, data)
    return Fallocate(fh, _offset(offset), _offset(size), mode)


def lseek(data: bytes) -> LSeek:
    fh, offset, whence, _ = _unpack(_LSEEK_IN, data)
    return LSeek(fh, _offset(offset), whence)


# Replies: what follows the header.


def init_out(max_readahead: int, flags: int, max_write: int, max_pages: int) -> bytes:
    """`max_readahead` and `max_write` in bytes."""
    return _INIT_OUT.pack(MAJOR, MINOR, max_readahead, flags, 0, 0, max_write, 1, max_pages, 0, 0)


def attr_out(attributes: Attributes, valid_s: int) -> bytes:
    """For `valid_s` seconds the driver need not ask again."""
    return _ATTR_OUT.pack(valid_s, 0, 0) + attributes.pack()


def entry_out(nodeid: int, attributes: Attributes, valid_s: int) -> bytes:
    """Node ids are never used twice, so the generation is always 0."""
    return _ENTRY_OUT.pack(nodeid, 0, valid_s, valid_s, 0, 0) + attributes.pack()


NO_ENTRY: Final = bytes(ENTRY_SIZE)
"""In READDIRPLUS: no node, the driver looks it up when it needs it."""


def open_out(fh: int) -> bytes:
    return _OPEN_OUT.pack(fh, 0, 0)


def write_out(size: int) -> bytes:
    return _WRITE_OUT.pack(size, 0)


def lseek_out(offset: int) -> bytes:
    return _LSEEK_OUT.pack(offset)


def statfs_out(
    blocks: int, bfree: int, bavail: int, files: int, ffree: int, bsize: int, namelen: int, frsize: int
) -> bytes:
    """As in statfs(2)."""
    return _STATFS_OUT.pack(blocks, bfree, bavail, files, ffree, bsize, namelen, frsize, 0)


def dirent(ino: int, after: int, kind: int, entry: bytes) -> bytes:
    """An entry of a directory, of a DT_ `kind`; `after` is the offset of the next one."""
    size = DIRENT.size + len(entry)
    return (DIRENT.pack(ino, after, len(entry), kind) + entry).ljust(size + -size % 8, b"\0")


def dirent_size(entry: bytes) -> int:
    return -(-(DIRENT.size + len(entry)) // 8) * 8
