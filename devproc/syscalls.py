"""Linux system calls that Python 3.11 does not wrap, x86-64, each raising OSError with the call's name.

Spec: the Linux manual pages, section 2, of the same names.  Left out: everything `os`, `resource`,
`fcntl` or python-prctl already offer, unless it has to carry a mark.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import socket
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

CLONE_PARENT: Final = 0x0000_8000
CLONE_NEWNS: Final = 0x0002_0000
CLONE_NEWCGROUP: Final = 0x0200_0000
CLONE_NEWUTS: Final = 0x0400_0000
CLONE_NEWIPC: Final = 0x0800_0000
CLONE_NEWUSER: Final = 0x1000_0000
CLONE_NEWPID: Final = 0x2000_0000
CLONE_NEWNET: Final = 0x4000_0000

MS_RDONLY: Final = 0x1
MS_NOSUID: Final = 0x2
MS_NODEV: Final = 0x4
MS_NOEXEC: Final = 0x8
MS_REMOUNT: Final = 0x20
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 0x4_0000
MNT_DETACH: Final = 0x2

MOUNT_ATTR_RDONLY: Final = 0x1
MOUNT_ATTR_NOSUID: Final = 0x2
MOUNT_ATTR_NODEV: Final = 0x4
MOUNT_ATTR_NOEXEC: Final = 0x8
AT_FDCWD: Final = -100
AT_EMPTY_PATH: Final = 0x1000
AT_RECURSIVE: Final = 0x8000

RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08
RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
UTIME_NOW: Final = (1 << 30) - 1
UTIME_OMIT: Final = (1 << 30) - 2

LANDLOCK_ACCESS_FS_WRITE_FILE: Final = 1 << 1
LANDLOCK_ACCESS_FS_READ_FILE: Final = 1 << 2
LANDLOCK_ACCESS_FS_READ_DIR: Final = 1 << 3
LANDLOCK_ACCESS_FS_REMOVE_DIR: Final = 1 << 4
LANDLOCK_ACCESS_FS_REMOVE_FILE: Final = 1 << 5
LANDLOCK_ACCESS_FS_MAKE_DIR: Final = 1 << 7
LANDLOCK_ACCESS_FS_MAKE_REG: Final = 1 << 8
LANDLOCK_ACCESS_FS_MAKE_SYM: Final = 1 << 12
LANDLOCK_ACCESS_FS_REFER: Final = 1 << 13
LANDLOCK_ACCESS_FS_TRUNCATE: Final = 1 << 14

PR_CAPBSET_DROP: Final = 24
PR_SET_SECUREBITS: Final = 28
PR_SET_MDWE: Final = 65
PR_GET_MDWE: Final = 66
PR_MDWE_REFUSE_EXEC_GAIN: Final = 1
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10

SECCOMP_SET_MODE_FILTER: Final = 1
SECCOMP_FILTER_FLAG_NEW_LISTENER: Final = 1 << 3

_MAP_FIXED: Final = 0x10  # <asm-generic/mman-common.h>

_NR: Final = {
    "close": 3,
    "mmap": 9,
    "sendmsg": 46,
    "capset": 126,
    "pivot_root": 155,
    "prctl": 157,
    "mount": 165,
    "umount2": 166,
    "getdents64": 217,
    "unshare": 272,
    "utimensat": 280,
    "fallocate": 285,
    "prlimit64": 302,
    "renameat2": 316,
    "seccomp": 317,
    "statx": 332,
    "close_range": 436,
    "openat2": 437,
    "mount_setattr": 442,
    "landlock_create_ruleset": 444,
    "landlock_add_rule": 445,
    "landlock_restrict_self": 446,
}
_NR_CLONE: Final = 56
_CAPABILITY_VERSION_3: Final = 0x2008_0522
_BPF_INSN_SIZE: Final = 8
_LANDLOCK_RULE_PATH_BENEATH: Final = 1
_OPEN_HOW: Final = struct.Struct("=QQQ")  # flags, mode, resolve
# struct statx: mask blksize, nlink uid gid mode, ino size blocks, four times (seconds, nanoseconds), dev
_STATX: Final = struct.Struct("=II8xIIIH2xQQQ8x" + "qI4x" * 4 + "8xII")
_STATX_SIZE: Final = 256
_STATX_BASIC_STATS, _STATX_BTIME = 0x7FF, 0x800
_DIRENT: Final = struct.Struct("=QqHB")  # struct linux_dirent64: d_ino d_off d_reclen d_type

# Every right of Landlock ABI n, n from 1: file system, network, scope.  Handling a right and then adding no
# rule denies it; an ABI above the last one known here is asked for the last one's.
_LANDLOCK_RIGHTS: Final = (
    (0x1FFF, 0, 0),
    (0x3FFF, 0, 0),  # 2: refer
    (0x7FFF, 0, 0),  # 3: truncate
    (0x7FFF, 0x3, 0),  # 4: bind and connect TCP
    (0xFFFF, 0x3, 0),  # 5: ioctl on a device
    (0xFFFF, 0x3, 0x3),  # 6: abstract Unix sockets and signals outside the domain
)


# Not buffers of ctypes: it makes a class for each size, and every device process would make its own.
class _Program(ctypes.Structure):  # struct sock_fprog
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


class _Vector(ctypes.Structure):  # struct iovec
    _fields_ = (("base", ctypes.c_char_p), ("len", ctypes.c_size_t))


class _Message(ctypes.Structure):  # struct msghdr
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint),
        ("iov", ctypes.POINTER(_Vector)),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_char_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Capabilities(ctypes.Structure):  # struct __user_cap_header_struct
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_prctl = _libc.prctl
_prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
_malloc, _free = _libc.malloc, _libc.free
_malloc.argtypes, _malloc.restype, _free.argtypes = (ctypes.c_size_t,), ctypes.c_void_p, (ctypes.c_void_p,)
# Without giving the interpreter's lock away, which a child could not ask back from threads it does not have.
_clone = ctypes.PyDLL(None, use_errno=True).syscall
_clone.restype = ctypes.c_long
_clone.argtypes = (ctypes.c_long,) * 6
# Found now, not in each child.
_before_fork = ctypes.pythonapi.PyOS_BeforeFork
_after_fork_parent = ctypes.pythonapi.PyOS_AfterFork_Parent
_after_fork_child = ctypes.pythonapi.PyOS_AfterFork_Child


def _call(
    name: str,
    *args: int | bytes | ctypes.Array[ctypes.c_char] | ctypes._CArgObject | None,
    path: str | None = None,
) -> int:
    """Raises OSError with the call's name (and `path`)."""
    # A plain int would be passed as a 32-bit C int: the upper half of the register would be garbage.
    words = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in args]
    result: int = _syscall(ctypes.c_long(_NR[name]), *words)
    if result == -1:
        err = ctypes.get_errno()
        raise OSError(err, f"{name}: {os.strerror(err)}", path)
    return result


def unshare(flags: int) -> None:
    """Leave the namespaces named by CLONE_NEW* `flags`; the pid namespace is that of the next child."""
    _call("unshare", flags)


def clone(flags: Sequence[int]) -> tuple[int | None, list[int]]:
    """`os.fork`, once for each of CLONE_* `flags`, for a process of one thread.

    In a child: which one it is; in the parent None, and for each its pid or the negative error number.

    The C library does not notice, so what it does at a fork is left undone: it is all about other threads.
    """
    words = [f | signal.SIGCHLD for f in flags]
    made = [0] * len(words)
    _before_fork()
    # Next to nothing else: each page that is written to between two of them, both have for themselves.
    for n, word in enumerate(words):
        pid = _clone(_NR_CLONE, word, 0, 0, 0, 0)
        if pid == 0:
            _after_fork_child()
            return n, []
        made[n] = pid if pid != -1 else -ctypes.get_errno()
    _after_fork_parent()
    return None, made


def mount(source: str, target: str, fstype: str | None, flags: int, options: str | None = None) -> None:
    """Mount, remount or change the propagation of `target`."""
    kind = None if fstype is None else fstype.encode()
    data = None if options is None else options.encode()
    _call("mount", source.encode(), target.encode(), kind, flags, data, path=target)


def umount(target: str, flags: int) -> None:
    """Unmount `target`."""
    _call("umount2", target.encode(), flags, path=target)


def pivot_root(new_root: str, put_old: str) -> None:
    """Make `new_root` the root; the old one appears at `put_old`."""
    _call("pivot_root", new_root.encode(), put_old.encode(), path=new_root)


def prctl(option: int, *args: int) -> int:
    """prctl(2) for the options python-prctl lacks."""
    return _call("prctl", option, *args, *(0,) * (4 - len(args)))


def bound_capabilities(keep: int = 0) -> None:
    """Leave only the mask `keep` in the bounding set."""
    for capability in range(64):
        if not keep >> capability & 1 and _prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == -1:
            err = ctypes.get_errno()
            if err == errno.EINVAL:  # past the last one of this kernel
                return
            raise OSError(err, f"prctl: {os.strerror(err)}")


def drop_capabilities(keep: int = 0) -> None:
    """Leave only the mask `keep` permitted and effective, and nothing inheritable, known or not."""
    header = _Capabilities(_CAPABILITY_VERSION_3, 0)
    low, high = keep & 0xFFFF_FFFF, keep >> 32
    _call("capset", ctypes.byref(header), struct.pack("=6I", low, low, 0, high, high, 0))


def reserve_heap(size: int) -> None:
    """Have malloc keep `size` bytes that it need not ask for later, nor write to now."""
    _free(_malloc(size))


def close_range(first: int, last: int) -> None:
    """Close every descriptor in [first, last]."""
    _call("close_range", first, last, 0)


def map_over(address: int, size: int, fd: int, offset: int) -> None:
    """Have `size` bytes of the file `fd`, shared, in place of what is mapped at `address`."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    _call("mmap", address, size, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, offset)


def mount_setattr(path: str, attributes: int) -> None:
    """Add MOUNT_ATTR_* `attributes` to the mount at `path` and to all below it."""
    _call(
        "mount_setattr",
        AT_FDCWD,
        path.encode(),
        AT_RECURSIVE,
        struct.pack("=4Q", attributes, 0, 0, 0),
        32,
        path=path,
    )


class Stat(NamedTuple):
    """What statx(2) says of a file; times in nanoseconds since the epoch, `blocks` of 512 bytes.

    `btime_ns` is 0 where the file system does not know when a file was made.
    """

    dev: tuple[int, int]
    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    blksize: int
    blocks: int
    atime_ns: int
    btime_ns: int
    ctime_ns: int
    mtime_ns: int


def statx(fd: int) -> Stat:
    """What `fd` is, whether it can be read or is a mere O_PATH."""
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    _call("statx", fd, b"", AT_EMPTY_PATH, _STATX_BASIC_STATS | _STATX_BTIME, buffer)
    _, blksize, nlink, uid, gid, mode, ino, size, blocks, *times, major, minor = _STATX.unpack_from(
        buffer.raw
    )
    ns = (s * 10**9 + part for s, part in zip(times[::2], times[1::2], strict=True))
    return Stat((major, minor), ino, mode, nlink, uid, gid, size, blksize, blocks, *ns)


def openat2(dirfd: int, path: bytes, flags: int, mode: int, resolve: int) -> int:
    """Open `path` from `dirfd` on, as far as RESOLVE_* `resolve` lets it lead; the descriptor."""
    return _call("openat2", dirfd, path, _OPEN_HOW.pack(flags, mode, resolve), _OPEN_HOW.size)


class Dirent(NamedTuple):
    """An entry of a directory; `next` is where the one after it is, for lseek(2)."""

    ino: int
    next: int
    type: int
    name: bytes


def getdents64(fd: int, size: int) -> list[Dirent]:
    """The next entries of a directory, as many as the kernel puts into `size` bytes; none: its end."""
    buffer = ctypes.create_string_buffer(size)
    end = _call("getdents64", fd, buffer, size)
    data = buffer.raw[:end]
    found, at = [], 0
    while at < end:
        ino, after, length, kind = _DIRENT.unpack_from(data, at)
        name = data[at + _DIRENT.size : at + length]
        found.append(Dirent(ino, after, kind, name[: name.index(0)]))
        at += length
    return found


def renameat2(dirfd: int, name: bytes, to_dirfd: int, to_name: bytes, flags: int) -> None:
    """Rename, with RENAME_* `flags`."""
    _call("renameat2", dirfd, name, to_dirfd, to_name, flags)


def utimensat(dirfd: int, name: bytes, times: bytes, flags: int) -> None:
    """Set the two struct timespec of `times`: of access, of modification."""
    _call("utimensat", dirfd, name, times, flags)


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """Give back, zero or reserve [offset, offset + size) of a file, by the FALLOC_FL_* of `mode`."""
    _call("fallocate", fd, mode, offset, size)


def seccomp_load(program: bytes, flags: int = 0, mark: int = 0) -> int:
    """Load a classic BPF `program` (8-byte instructions) on top of those in force; needs no_new_privs.

    `mark` is the sixth argument, which the call does not have, but which the filters in force can see.
    Returns the listener's descriptor with SECCOMP_FILTER_FLAG_NEW_LISTENER, otherwise 0.
    """
    fprog = _Program(len(program) // _BPF_INSN_SIZE, program)
    return _call("seccomp", SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(fprog), 0, 0, mark)


def send_descriptor(sock: int, frame: bytes, fd: int, mark: int) -> None:
    """Send `frame` by `sock` with `fd` as SCM_RIGHTS; `mark`: see `seccomp_load`."""
    control = struct.pack("=Qiii4x", socket.CMSG_LEN(4), socket.SOL_SOCKET, socket.SCM_RIGHTS, fd)
    vector = _Vector(frame, len(frame))
    message = _Message(None, 0, ctypes.pointer(vector), 1, control, len(control), 0)
    _call("sendmsg", sock, ctypes.byref(message), 0, 0, 0, mark)


def close(fd: int, mark: int) -> None:
    """close(2); `mark`: see `seccomp_load`."""
    _call("close", fd, 0, 0, 0, 0, mark)


def limit(resource: int, value: int, mark: int) -> None:
    """Set the soft and hard limit on a RLIMIT_ `resource`; `mark`: see `seccomp_load`."""
    _call("prlimit64", 0, resource, struct.pack("=QQ", value, value), None, 0, mark)


def landlock_abi() -> int:
    """Raises OSError: ENOSYS or EOPNOTSUPP when the kernel has no Landlock, or has it switched off."""
    return _call("landlock_create_ruleset", None, 0, 1)


def landlock_restrict(beneath: int | None = None, rights: int = 0) -> int:
    """Forbid every new file, TCP and signal right Landlock knows; returns the ABI used.

    Args:
        beneath: a directory below which LANDLOCK_ACCESS_FS_* `rights` stay, as far as this ABI knows them.

    Raises:
        OSError: as `landlock_abi`.
    """
    abi = min(landlock_abi(), len(_LANDLOCK_RIGHTS))
    handled = _LANDLOCK_RIGHTS[abi - 1]
    ruleset = _call("landlock_create_ruleset", struct.pack("=QQQ", *handled), 24, 0)
    try:
        if beneath is not None:
            rule = struct.pack("=Qi", rights & handled[0], beneath)
            _call("landlock_add_rule", ruleset, _LANDLOCK_RULE_PATH_BENEATH, rule, 0)
        _call("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)
    return abi
