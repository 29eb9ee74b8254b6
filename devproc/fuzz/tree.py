"""A file system in memory, by the system calls that backends/directory.py makes: what a bench shares.

Spec: the Linux manual pages, section 2, of the calls' names.  A descriptor is a `Descriptor`.  What a caller
has to check before is asserted, what the kernel says of a tree is said with its error number.  Left out:
other users, mounts, holes, times but those that are set, and more than the calls below.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from struct import Struct
from typing import Final

from devproc import syscalls
from devproc.syscalls import Dirent, Stat

INODES_MAX: Final = 20
SIZE_MAX: Final = 1 << 14
_I63: Final = (1 << 63) - 1
_NAME_MAX, _PATH_MAX, _IOV_MAX = 255, 4096, 1024
_BLOCK: Final = 512
_FIRST: Final = 2  # the places of "." and ".."
_MADE_NS: Final = 1_600_000_000_000_000_000
_TIMES: Final = Struct("=qQqQ")
_READ, _WRITE, _SEARCH = 4, 2, 1
_ALWAYS: Final = os.O_CLOEXEC | os.O_NOFOLLOW
_KNOWN: Final = (
    _ALWAYS | os.O_PATH | os.O_CREAT | os.O_EXCL | os.O_NOCTTY | os.O_NONBLOCK | os.O_ACCMODE | os.O_APPEND
    | os.O_DSYNC | os.O_SYNC
)  # fmt: skip
_RESOLVE: Final = (
    syscalls.RESOLVE_BENEATH
    | syscalls.RESOLVE_NO_SYMLINKS
    | syscalls.RESOLVE_NO_MAGICLINKS
    | syscalls.RESOLVE_NO_XDEV
)


class Volume:
    """How many inodes were ever made, and how many descriptors are open."""

    def __init__(self) -> None:
        self.made = self.opened = 0


class Inode:
    """A file, a directory with `names` (each with its place, which is another for each new name), a link."""

    def __init__(self, volume: Volume, mode: int, data: bytes = b"") -> None:
        if volume.made >= INODES_MAX:
            raise _error(errno.ENOSPC)
        volume.made += 1
        self.volume: Final = volume
        self.number: Final = volume.made
        self.mode = mode
        self.data = data
        self.times_ns = (_MADE_NS, _MADE_NS)  # of access, of modification
        self.names: dict[bytes, tuple[int, Inode]] = {}
        self.last = _FIRST
        self.parent: Inode | None = None
        self.nlink = 2 if stat.S_ISDIR(mode) else 0

    @property
    def kind(self) -> int:
        return stat.S_IFMT(self.mode)

    def enter(self, name: bytes, inode: Inode) -> Inode:
        """Have `inode` by a name that there is not yet."""
        assert name not in self.names
        self.last += 1
        self.names[name] = self.last, inode
        if inode.kind == stat.S_IFDIR:
            inode.parent = self
            self.nlink += 1
        else:
            inode.nlink += 1
        return inode

    def leave(self, name: bytes) -> Inode:
        _, inode = self.names.pop(name)
        if inode.kind == stat.S_IFDIR:
            self.nlink -= 1
        else:
            inode.nlink -= 1
        return inode


class Descriptor:
    """An open file; `flags` are those of open(2)."""

    def __init__(self, inode: Inode, flags: int) -> None:
        inode.volume.opened += 1
        self.inode: Final = inode
        self.flags: Final = flags
        self.at = 0
        self.is_open = True

    @property
    def can_write(self) -> bool:
        return bool(self.flags + 1 & 2)


def planted() -> Descriptor:
    """The O_PATH descriptor of a new directory with something of everything."""
    volume = Volume()
    top = Inode(volume, stat.S_IFDIR | 0o755)
    top.enter(b"file", Inode(volume, stat.S_IFREG | 0o644, b"hello, world"))
    top.enter(b"big", Inode(volume, stat.S_IFREG | 0o644, bytes(range(256)) * 20))
    top.enter(b"secret", Inode(volume, stat.S_IFREG | 0o200))
    top.enter(b"link", Inode(volume, stat.S_IFLNK | 0o777, b"dir/file"))
    top.enter(b"pipe", Inode(volume, stat.S_IFIFO | 0o644))
    below = top.enter(b"dir", Inode(volume, stat.S_IFDIR | 0o755))
    below.enter(b"file", Inode(volume, stat.S_IFREG | 0o644))
    below.enter(b"dir", Inode(volume, stat.S_IFDIR | 0o755))
    return Descriptor(top, os.O_PATH)


# -- the calls


def geteuid() -> int:
    return 0


getegid = geteuid


def openat2(at: Descriptor, path: bytes, flags: int, mode: int, resolve: int) -> Descriptor:
    assert at.is_open and resolve == _RESOLVE
    assert flags & _ALWAYS == _ALWAYS and not flags & ~_KNOWN
    assert not mode & ~0o7777 and (flags & os.O_CREAT or not mode)
    if len(path) >= _PATH_MAX:
        raise _error(errno.ENAMETOOLONG)
    inode = at.inode
    *above, last = path.split(b"/")
    for name in above:
        inode = _child(inode, name)
        if inode.kind == stat.S_IFLNK:
            raise _error(errno.ELOOP)
    if flags & os.O_CREAT:
        assert flags & os.O_EXCL
        return Descriptor(_new(inode, last, stat.S_IFREG | mode), flags)
    if path != b".":
        inode = _child(inode, last)
    if not flags & os.O_PATH:
        _check_open(inode, flags)
    return Descriptor(inode, flags)


def _check_open(inode: Inode, flags: int) -> None:
    access = flags & os.O_ACCMODE
    if inode.kind == stat.S_IFLNK:
        raise _error(errno.ELOOP)
    if inode.kind == stat.S_IFDIR and access != os.O_RDONLY:
        raise _error(errno.EISDIR)
    # The fourth access mode gives neither, and asks for both.
    _check(inode, (_READ, _WRITE, _READ | _WRITE, _READ | _WRITE)[access])
    if inode.kind == stat.S_IFIFO and access == os.O_WRONLY:
        raise _error(errno.ENXIO)


def close(fd: Descriptor) -> None:
    assert fd.is_open
    fd.is_open = False
    fd.inode.volume.opened -= 1


def statx(fd: Descriptor) -> Stat:
    assert fd.is_open
    inode, (atime_ns, mtime_ns) = fd.inode, fd.inode.times_ns
    size = len(inode.data)
    return Stat(
        (0, 1), inode.number, inode.mode, inode.nlink, 0, 0, size, 4096, -(-size // _BLOCK),
        atime_ns, _MADE_NS, _MADE_NS, mtime_ns,
    )  # fmt: skip


def readlink(path: bytes, *, dir_fd: Descriptor) -> bytes:
    assert dir_fd.is_open and path == b"" and dir_fd.inode.kind == stat.S_IFLNK
    return dir_fd.inode.data


def mkdir(name: bytes, mode: int, *, dir_fd: Descriptor) -> None:
    assert dir_fd.is_open and not mode & ~0o7777
    _new(dir_fd.inode, name, stat.S_IFDIR | mode)


def symlink(target: bytes, name: bytes, *, dir_fd: Descriptor) -> None:
    assert dir_fd.is_open and 0 < len(target) < _PATH_MAX and b"\0" not in target
    _new(dir_fd.inode, name, stat.S_IFLNK | 0o777, target)


def link(
    name: bytes, to_name: bytes, *, src_dir_fd: Descriptor, dst_dir_fd: Descriptor, follow_symlinks: bool
) -> None:
    assert src_dir_fd.is_open and dst_dir_fd.is_open and not follow_symlinks
    inode, to = _child(src_dir_fd.inode, name), dst_dir_fd.inode
    _check_new(to, to_name)
    if inode.kind == stat.S_IFDIR:
        raise _error(errno.EPERM)
    to.enter(to_name, inode)


def unlink(name: bytes, *, dir_fd: Descriptor) -> None:
    assert dir_fd.is_open
    inode = _child(dir_fd.inode, name)
    _check(dir_fd.inode, _WRITE)
    if inode.kind == stat.S_IFDIR:
        raise _error(errno.EISDIR)
    dir_fd.inode.leave(name)


def rmdir(name: bytes, *, dir_fd: Descriptor) -> None:
    assert dir_fd.is_open
    inode = _child(dir_fd.inode, name)
    _check(dir_fd.inode, _WRITE)
    if inode.kind != stat.S_IFDIR:
        raise _error(errno.ENOTDIR)
    if inode.names:
        raise _error(errno.ENOTEMPTY)
    dir_fd.inode.leave(name)
    inode.nlink = 0


def renameat2(at: Descriptor, name: bytes, to_at: Descriptor, to_name: bytes, flags: int) -> None:
    assert at.is_open and to_at.is_open
    assert flags in (0, syscalls.RENAME_NOREPLACE, syscalls.RENAME_EXCHANGE)
    parent, to, exchange = at.inode, to_at.inode, flags == syscalls.RENAME_EXCHANGE
    inode, other = _child(parent, name), _found(to, to_name)
    if other is not None and flags == syscalls.RENAME_NOREPLACE:
        raise _error(errno.EEXIST)
    if other is None and exchange:
        raise _error(errno.ENOENT)
    if inode in _above(to):
        raise _error(errno.EINVAL)
    if other in _above(parent):
        raise _error(errno.EINVAL if exchange else errno.ENOTEMPTY)
    if inode is other:
        return
    for directory in (parent, to):
        _check(directory, _WRITE)
    if not exchange and other is not None:
        if inode.kind == stat.S_IFDIR != other.kind:
            raise _error(errno.ENOTDIR)
        if inode.kind != stat.S_IFDIR == other.kind:
            raise _error(errno.EISDIR)
    if parent is not to:  # its ".." becomes another
        for moved in (inode, other) if exchange else (inode,):
            if moved is not None and moved.kind == stat.S_IFDIR:
                _check(moved, _WRITE)
    if not exchange and other is not None and other.names:
        raise _error(errno.ENOTEMPTY)
    parent.leave(name)
    if other is not None:
        to.leave(to_name)
        if exchange:
            parent.enter(name, other)
        elif other.kind == stat.S_IFDIR:
            other.nlink = 0
    to.enter(to_name, inode)


def fchmod(fd: Descriptor, mode: int) -> None:
    assert fd.is_open and not fd.flags & os.O_PATH and not mode & ~0o7777
    fd.inode.mode = fd.inode.kind | mode


def utimensat(fd: Descriptor, path: bytes, times: bytes, flags: int) -> None:
    assert fd.is_open and path == b"" and flags == syscalls.AT_EMPTY_PATH
    seconds_and_ns = _TIMES.unpack(times)
    found = []
    for s, ns, now in zip(seconds_and_ns[::2], seconds_and_ns[1::2], fd.inode.times_ns, strict=True):
        assert ns < 10**9 or ns in (syscalls.UTIME_NOW, syscalls.UTIME_OMIT)
        omitted = ns == syscalls.UTIME_OMIT
        found.append(now if omitted else _MADE_NS if ns == syscalls.UTIME_NOW else s * 10**9 + ns)
    fd.inode.times_ns = found[0], found[1]


def fstatvfs(fd: Descriptor) -> os.statvfs_result:
    assert fd.is_open
    blocks, free = INODES_MAX * SIZE_MAX // _BLOCK, INODES_MAX - fd.inode.volume.made
    return os.statvfs_result((_BLOCK, _BLOCK, blocks, blocks, blocks, INODES_MAX, free, free, 0, _NAME_MAX))


def ftruncate(fd: Descriptor, size: int) -> None:
    assert fd.is_open and not fd.flags & os.O_PATH and 0 <= size <= _I63
    if not fd.can_write:
        raise _error(errno.EINVAL)
    if size > SIZE_MAX:
        raise _error(errno.EFBIG)
    fd.inode.data = fd.inode.data[:size].ljust(size, b"\0")


def fsync(fd: Descriptor) -> None:
    assert fd.is_open and not fd.flags & os.O_PATH


def fallocate(fd: Descriptor, mode: int, offset: int, size: int) -> None:
    assert fd.is_open and 0 <= offset <= _I63 and 0 <= size <= _I63
    if not size:
        raise _error(errno.EINVAL)
    if not fd.can_write:
        raise _error(errno.EBADF)
    end = offset + size
    if end > SIZE_MAX:
        raise _error(errno.EFBIG)
    data = fd.inode.data
    if not mode & syscalls.FALLOC_FL_KEEP_SIZE:
        data = data.ljust(end, b"\0")
    if mode & (syscalls.FALLOC_FL_PUNCH_HOLE | syscalls.FALLOC_FL_ZERO_RANGE):
        data = (data[:offset] + bytes(size) + data[end:])[: len(data)]
    fd.inode.data = data


def preadv(fd: Descriptor, into: Sequence[memoryview], offset: int) -> int:
    assert fd.is_open and fd.inode.kind == stat.S_IFREG
    assert len(into) <= _IOV_MAX and 0 <= offset <= _I63
    if not fd.flags + 1 & 1:
        raise _error(errno.EBADF)
    start = offset
    for view in into:
        data = fd.inode.data[offset : offset + len(view)]
        view[: len(data)] = data
        offset += len(data)
    return offset - start


def pwritev(fd: Descriptor, parts: Sequence[memoryview], offset: int) -> int:
    assert fd.is_open and fd.inode.kind == stat.S_IFREG
    assert len(parts) <= _IOV_MAX and 0 <= offset <= _I63
    if not fd.can_write:
        raise _error(errno.EBADF)
    new, old = b"".join(parts), fd.inode.data
    if not new:
        return 0
    if fd.flags & os.O_APPEND:
        offset = len(old)
    if offset >= SIZE_MAX:
        raise _error(errno.EFBIG)
    new = new[: SIZE_MAX - offset]
    fd.inode.data = old[:offset].ljust(offset, b"\0") + new + old[offset + len(new) :]
    return len(new)


def lseek(fd: Descriptor, offset: int, whence: int) -> int:
    assert fd.is_open and not fd.flags & os.O_PATH and 0 <= offset <= _I63
    if whence == os.SEEK_SET:
        fd.at = offset
        return offset
    assert whence in (os.SEEK_DATA, os.SEEK_HOLE) and fd.inode.kind == stat.S_IFREG
    size = len(fd.inode.data)
    if offset >= size:
        raise _error(errno.ENXIO)
    return offset if whence == os.SEEK_DATA else size


def getdents64(fd: Descriptor, size: int) -> list[Dirent]:
    assert fd.is_open and fd.inode.kind == stat.S_IFDIR
    inode, found = fd.inode, list[Dirent]()
    if not inode.nlink:
        raise _error(errno.ENOENT)
    entries = [(b".", (1, inode)), (b"..", (_FIRST, inode.parent or inode)), *inode.names.items()]
    for name, (place, entry) in entries:
        if place <= fd.at:
            continue
        size -= -(-(20 + len(name)) // 8) * 8
        if size < 0:
            if not found:
                raise _error(errno.EINVAL)
            break
        found.append(Dirent(entry.number, place, entry.kind >> 12, name))
    if found:
        fd.at = found[-1].next
    return found


CALLS: Final = {
    call.__name__: call
    for call in (
        geteuid, openat2, close, statx, readlink, mkdir, symlink, link, unlink, rmdir, renameat2, fchmod,
        utimensat, fstatvfs, ftruncate, fsync, fallocate, preadv, pwritev, lseek, getdents64,
    )
} | {"getegid": getegid}  # fmt: skip


# -- inside


def _found(directory: Inode, name: bytes) -> Inode | None:
    assert name not in (b"", b".", b"..") and b"/" not in name and b"\0" not in name
    if directory.kind != stat.S_IFDIR:
        raise _error(errno.ENOTDIR)
    _check(directory, _SEARCH)
    if len(name) > _NAME_MAX:
        raise _error(errno.ENAMETOOLONG)
    entry = directory.names.get(name)
    return None if entry is None else entry[1]


def _child(directory: Inode, name: bytes) -> Inode:
    inode = _found(directory, name)
    if inode is None:
        raise _error(errno.ENOENT)
    return inode


def _check_new(directory: Inode, name: bytes) -> None:
    if _found(directory, name) is not None:
        raise _error(errno.EEXIST)
    assert directory.nlink, "what is removed cannot be reached"
    _check(directory, _WRITE)


def _new(directory: Inode, name: bytes, mode: int, data: bytes = b"") -> Inode:
    _check_new(directory, name)
    return directory.enter(name, Inode(directory.volume, mode, data))


def _above(directory: Inode) -> list[Inode]:
    """It, and what it is in."""
    found = [directory]
    while (parent := found[-1].parent) is not None:
        found.append(parent)
    return found


def _check(inode: Inode, wanted: int) -> None:
    """What its owner may do."""
    if wanted & ~(inode.mode >> 6):
        raise _error(errno.EACCES)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
