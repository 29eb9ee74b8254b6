"""Linux system calls that Python 3.11 does not wrap, x86-64, each raising OSError with the call's name.

Spec: the Linux manual pages, section 2, of the same names.  Left out: everything `os`, `resource`,
`fcntl` or python-prctl already offer, unless it has to carry a mark.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from typing import Final

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

_NR: Final = {
    "close": 3,
    "sendmsg": 46,
    "capset": 126,
    "pivot_root": 155,
    "prctl": 157,
    "mount": 165,
    "umount2": 166,
    "unshare": 272,
    "prlimit64": 302,
    "fallocate": 285,
    "seccomp": 317,
    "close_range": 436,
    "landlock_create_ruleset": 444,
    "landlock_restrict_self": 446,
}
_CAPABILITY_VERSION_3: Final = 0x2008_0522
_BPF_INSN_SIZE: Final = 8

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

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


def _call(name: str, *args: int | bytes | ctypes.Array[ctypes.c_char] | None, path: str | None = None) -> int:
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


def drop_capabilities(keep: int = 0) -> None:
    """Leave only the mask `keep` permitted and effective, and nothing inheritable, known or not."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    low, high = keep & 0xFFFF_FFFF, keep >> 32
    _call("capset", header, struct.pack("=6I", low, low, 0, high, high, 0))


def close_range(first: int, last: int) -> None:
    """Close every descriptor in [first, last]."""
    _call("close_range", first, last, 0)


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """Give back, zero or reserve [offset, offset + size) of a file, by the FALLOC_FL_* of `mode`."""
    _call("fallocate", fd, mode, offset, size)


def seccomp_load(program: bytes, flags: int = 0, mark: int = 0) -> int:
    """Load a classic BPF `program` (8-byte instructions) on top of those in force; needs no_new_privs.

    `mark` is the sixth argument, which the call does not have, but which the filters in force can see.
    Returns the listener's descriptor with SECCOMP_FILTER_FLAG_NEW_LISTENER, otherwise 0.
    """
    code = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("=H6xQ", len(program) // _BPF_INSN_SIZE, ctypes.addressof(code))
    return _call("seccomp", SECCOMP_SET_MODE_FILTER, flags, fprog, 0, 0, mark)


def send_descriptor(sock: int, frame: bytes, fd: int, mark: int) -> None:
    """Send `frame` by `sock` with `fd` as SCM_RIGHTS; `mark`: see `seccomp_load`."""
    data = ctypes.create_string_buffer(frame, len(frame))
    vector = ctypes.create_string_buffer(struct.pack("=QQ", ctypes.addressof(data), len(frame)))
    header = struct.pack("=Qiii4x", socket.CMSG_LEN(4), socket.SOL_SOCKET, socket.SCM_RIGHTS, fd)
    control = ctypes.create_string_buffer(header, len(header))
    at = ctypes.addressof(vector), 1, ctypes.addressof(control), len(header)
    _call("sendmsg", sock, struct.pack("=QI4xQQQQi4x", 0, 0, *at, 0), 0, 0, 0, mark)


def close(fd: int, mark: int) -> None:
    """close(2); `mark`: see `seccomp_load`."""
    _call("close", fd, 0, 0, 0, 0, mark)


def limit(resource: int, value: int, mark: int) -> None:
    """Set the soft and hard limit on a RLIMIT_ `resource`; `mark`: see `seccomp_load`."""
    _call("prlimit64", 0, resource, struct.pack("=QQ", value, value), None, 0, mark)


def landlock_abi() -> int:
    """Raises OSError: ENOSYS or EOPNOTSUPP when the kernel has no Landlock, or has it switched off."""
    return _call("landlock_create_ruleset", None, 0, 1)


def landlock_deny_all() -> int:
    """Forbid every new file, TCP and signal right Landlock knows; returns the ABI used.

    Raises:
        OSError: as `landlock_abi`.
    """
    abi = min(landlock_abi(), len(_LANDLOCK_RIGHTS))
    ruleset = _call("landlock_create_ruleset", struct.pack("=QQQ", *_LANDLOCK_RIGHTS[abi - 1]), 24, 0)
    try:
        _call("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)
    return abi
