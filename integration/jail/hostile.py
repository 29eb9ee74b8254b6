"""A device model that turns on its jail: reading offset n makes attempt n of `ATTEMPTS`.

The value read is 0 when the attempt succeeded and the errno when it was refused; a process that is killed for
it gives no value at all.  Attempts are raw system calls, so that no library in between refuses them.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
from collections.abc import Callable
from typing import ClassVar

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
# Mapped when the module is imported, before the jail: mov $20, %eax (getpid of i386); int $0x80; ret
_CODE = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
_CODE.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")
_CODE_AT = ctypes.addressof(ctypes.c_char.from_buffer(_CODE))
_INT80 = ctypes.CFUNCTYPE(ctypes.c_int)(_CODE_AT)
_X32 = 0x4000_0000
_PAGE = ctypes.create_string_buffer(4096)
_me = 0


def _sys(nr: int, *args: int | bytes | None) -> int:
    words = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in args]
    result: int = _libc.syscall(ctypes.c_long(nr), *words)
    if result == -1:
        raise OSError(ctypes.get_errno(), "refused")
    return result


def _forks(nr: int, *args: int) -> Callable[[], None]:
    def attempt() -> None:
        if _sys(nr, *args) == 0:
            os._exit(0)

    return attempt


def _int80() -> None:
    if _INT80() <= 0:
        raise OSError(38, "refused")


def _calls(nr: int, *args: int | bytes | None) -> Callable[[], object]:
    return lambda: _sys(nr, *args)


_RW, _RX, _RWX = 3, 5, 7
_ANON = 0x22
_AT_FDCWD = -100
_O_TMPFILE = 0o20200000
_CLONE_NEWUSER = 0x1000_0000


def _process_vm() -> None:
    here = struct.pack("=QQ", ctypes.addressof(_PAGE), 8)
    _sys(310, _me, here, 1, here, 1, 0)


def _seccomp() -> None:
    _PAGE[0:8] = struct.pack("=HBBI", 6, 0, 0, 0x7FFF0000)  # return ALLOW
    _sys(317, 1, 0, struct.pack("=H6xQ", 1, ctypes.addressof(_PAGE)))


def _msghdr(control: bytes) -> bytes:
    _PAGE[64:72] = b"x" * 8
    base = ctypes.addressof(_PAGE)
    _PAGE[0:16] = struct.pack("=QQ", base + 64, 1)
    _PAGE[128 : 128 + len(control)] = control
    return struct.pack("=QI4xQQQQi4x", 0, 0, base, 1, base + 128, len(control), 0)


def _send_fd() -> None:
    _sys(46, 4, _msghdr(struct.pack("=Qiii4x", 20, 1, 1, 1)), 0)


def _recvmsg() -> None:
    with contextlib.suppress(BlockingIOError):
        _sys(47, 3, _msghdr(bytes(24)), 0x40)


ATTEMPTS: tuple[tuple[str, Callable[[], object]], ...] = (
    ("open / for reading", _calls(257, _AT_FDCWD, b"/", 0, 0)),
    ("open by open(2)", _calls(2, b"/", 0, 0)),
    ("create a file without a name", _calls(257, _AT_FDCWD, b"/tmp", _O_TMPFILE | 2, 0o600)),
    ("list the root", _calls(80, b"/")),
    ("read the password file's status", _calls(4, b"/etc/passwd", ctypes.addressof(_PAGE))),
    ("unix socket", _calls(41, 1, 1, 0)),
    ("unix socketpair", _calls(53, 1, 1, 0, ctypes.addressof(_PAGE))),
    ("inet socket", _calls(41, 2, 1, 0)),
    ("netlink socket", _calls(41, 16, 3, 0)),
    ("vsock socket", _calls(41, 40, 1, 0)),
    ("fork", _forks(57)),
    ("clone", _forks(56, 17, 0, 0, 0, 0)),
    ("vfork by clone3", _forks(435, ctypes.addressof(_PAGE), 64)),
    ("new user namespace", _calls(272, _CLONE_NEWUSER)),
    ("exec", _calls(59, b"/bin/true", 0, 0)),
    ("traceme", _calls(101, 0, 0, 0, 0)),
    ("read memory by process_vm_readv", _process_vm),
    ("signal to itself", lambda: _sys(62, _me, 0)),
    ("signal to its group", _calls(62, 0, 0)),
    ("executable memory", _calls(9, 0, 4096, _RWX, _ANON, -1, 0)),
    ("memory made executable", lambda: _sys(10, _sys(9, 0, 4096, _RW, _ANON, -1, 0), 4096, _RX)),
    ("shared memory mapping", _calls(9, 0, 4096, _RW, 0x21, -1, 0)),
    ("memfd", _calls(319, b"escape", 0)),
    ("secret memory", _calls(447, 0)),
    ("io_uring", lambda: _sys(425, 4, ctypes.addressof(ctypes.create_string_buffer(120)))),
    ("userfaultfd", _calls(323, 1)),
    ("bpf map", _calls(321, 0, struct.pack("=5I52x", 2, 4, 4, 1, 0), 72)),
    ("perf", _calls(298, struct.pack("=IIQ48x", 1, 64, 0), 0, -1, -1, 0)),
    ("keyring", _calls(250, 0, -3, 1)),
    ("mount", _calls(165, b"none", b"/mnt", b"tmpfs", 0, None)),  # the stand-in's mounts are private
    ("chroot", _calls(161, b"/")),
    ("pipe", _calls(22, ctypes.addressof(_PAGE))),
    ("duplicate a descriptor", _calls(32, 2)),
    ("eventfd", _calls(290, 0, 0)),
    ("epoll", _calls(291, 0)),
    ("timer descriptor", _calls(283, 1, 0)),
    ("pidfd of itself", lambda: _sys(434, _me, 0)),
    ("prctl: dumpable again", _calls(157, 4, 1)),
    ("prctl: own parent-death signal", _calls(157, 1, 0)),
    ("another filter", _seccomp),
    ("more descriptors by prlimit", _calls(302, 0, 7, struct.pack("=QQ", 64, 64), 0)),
    ("close a channel's neighbour", _calls(3, 0)),
    ("a descriptor in a message", _send_fd),
    ("a receive with room for descriptors", _recvmsg),
    ("read of the access channel by read(2)", _calls(0, 3, ctypes.addressof(_PAGE), 0)),
    ("write to /dev/null on 1", _calls(1, 1, b"x", 1)),
    ("ioctl", _calls(16, 3, 0x541B, ctypes.addressof(_PAGE))),
    ("nanosleep", _calls(35, struct.pack("=QQ", 0, 1), 0)),
    ("getpid", _calls(39)),
    ("x32 getpid", _calls(_X32 | 39)),
    ("i386 getpid by int 0x80", _int80),
)


class Hostile:
    """Ports: `irq`, never used."""

    TABLES: ClassVar[tuple[object, ...]] = ()

    def __init__(self, *, irq: Callable[[], None]) -> None:
        global _me  # noqa: PLW0603  (the attempts are plain functions; getpid would be one of its own)
        _me = os.getpid()
        self.deadline_ns = None
        self.wants_input = False

    def read(self, space: int, offset: int, size: int) -> int:
        try:
            ATTEMPTS[offset][1]()
        except OSError as e:
            return e.errno or 0xFFFF
        return 0

    def write(self, space: int, offset: int, size: int, data: int) -> None:
        raise ZeroDivisionError("as a broken model would")

    def save(self) -> bytes:
        return b""

    def restore(self, state: bytes) -> None:
        pass

    def counters(self) -> dict[str, int]:
        return {}
