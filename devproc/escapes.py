"""Attempts to get out of a jail, and the device model that makes them: reading offset n makes attempt n.

The value read is 0 when the attempt succeeded and the errno when it was refused; a process that dies of it
gives no value at all.  Attempts are raw system calls of x86-64, so that no library in between refuses them,
and are told what only the supervisor knows (`Prey`), so that none fails for want of a guess.  Each is chosen
such that its success changes nothing outside the process that makes it.  Left out: taps; reboot, kexec, swap,
the clock, whose success could not be undone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from devproc.catalog import CATALOG, FD_ACCESS, FD_CONTROL, FD_FIRST, FD_LOG, Entry, Param, Region
from devproc.record import replace
from devproc.wire import U64_MAX, Space
from policies.syscalls import SYSCALLS, X32_BIT

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_PAGE_SIZE: Final = mmap.PAGESIZE
# mov $20, %eax (getpid of i386); int $0x80; ret
_INT80_CODE: Final = b"\xb8\x14\x00\x00\x00\xcd\x80\xc3"


@dataclass(frozen=True)
class Prey:
    """What an attempt is told: the supervisor's pid as the host has it, and where its guest memory is.

    `me` is the pid of the process that makes the attempt as it sees it, `scratch` memory of its own that
    begins at `page`, `int80` code there that makes an i386 call.
    """

    supervisor: int
    memory_at: int
    memory_fd: int
    me: int
    scratch: mmap.mmap
    page: int
    int80: Callable[[], int]


@dataclass(frozen=True)
class Attempt:
    """One row of the escape matrix; `run` raises the OSError it is refused with.

    `exits`: success is seen by the process's end, with status 0.
    """

    group: str
    name: str
    run: Callable[[Prey], object]
    exits: bool = False


Argument = int | bytes | ctypes.Array[ctypes.c_char] | None
Told = Argument | Callable[[Prey], Argument]


def _call(nr: int, *args: Argument) -> int:
    words = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in args]
    result: int = _libc.syscall(ctypes.c_long(nr), *words, *(ctypes.c_ulong(0),) * (6 - len(args)))
    if result == -1:
        raise OSError(ctypes.get_errno(), "refused")
    return result


def _sys(name: str, *args: Argument) -> int:
    return _call(SYSCALLS[name], *args)


def _tries(name: str, *args: Told) -> Callable[[Prey], object]:
    """Make the call; arguments may depend on what the attempt is told."""
    return lambda prey: _sys(name, *(a(prey) if callable(a) else a for a in args))


def _reaches(error: int, name: str, *args: Told) -> Callable[[Prey], None]:
    """A call with nonsense for arguments, which the kernel finds (`error`) only once it has permitted it."""

    def attempt(prey: Prey) -> None:
        try:
            _tries(name, *args)(prey)
        except OSError as e:
            if e.errno != error:
                raise

    return attempt


def _forks(name: str, *args: Told) -> Callable[[Prey], None]:
    def attempt(prey: Prey) -> None:
        if _tries(name, *args)(prey) == 0:
            os._exit(0)

    return attempt


def _in_turn(*attempts: Callable[[Prey], object]) -> Callable[[Prey], None]:
    """Attempts of which all must succeed."""

    def attempt(prey: Prey) -> None:
        for one in attempts:
            one(prey)

    return attempt


def _often(times: int, name: str, *args: Told) -> Callable[[Prey], None]:
    return _in_turn(*(_tries(name, *args),) * times)


def _opens(path: str, flags: int = os.O_RDONLY) -> Callable[[Prey], object]:
    """Open `path`, in which {s} and {fd} are the supervisor's pid and its guest memory's descriptor."""
    return lambda prey: _sys(
        "openat", _AT_FDCWD, path.format(s=prey.supervisor, fd=prey.memory_fd).encode(), flags, 0o600
    )


def _page(prey: Prey) -> int:
    return prey.page


def _supervisor(prey: Prey) -> int:
    return prey.supervisor


def _me(prey: Prey) -> int:
    return prey.me


def _text(prey: Prey) -> int:
    """The page of this process's own code that a C function starts in."""
    function = ctypes.cast(_libc.getpid, ctypes.c_void_p).value
    assert function is not None
    return function & -_PAGE_SIZE


_AT_FDCWD = -100
_PRIVATE, _SHARED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
_FIXED = 0x10
_R, _W, _X = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC
_GIB = 1 << 30
_SIGCHLD, _SIGSYS = 17, 31
_CLONE_PARENT = 0x8000
_CLONE_NEWTIME = 0x80
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNS = 0x1000_0000, 0x2000_0000, 0x2_0000
_CLONE_NEWNET, _CLONE_NEWIPC, _CLONE_NEWUTS = 0x4000_0000, 0x0800_0000, 0x0400_0000
_O_TMPFILE = 0o20200000


def _length(size: int) -> Callable[[Prey], Argument]:
    """A socklen_t that the kernel may write to."""
    return lambda prey: ctypes.create_string_buffer(struct.pack("=I", size))


def _fresh(prey: Prey) -> int:
    """The address of a new private page."""
    return _sys("mmap", 0, _PAGE_SIZE, _R | _W, _PRIVATE, -1, 0)


def _iovec(address: int, size: int) -> bytes:
    return struct.pack("=QQ", address, size)


def _process_vm(name: str) -> Callable[[Prey], object]:
    """Read or write the first bytes of the supervisor's guest memory."""

    def attempt(prey: Prey) -> None:
        _sys(name, prey.supervisor, _iovec(prey.page, 8), 1, _iovec(prey.memory_at, 8), 1, 0)

    return attempt


def _pidfd(prey: Prey) -> int:
    return _sys("pidfd_open", prey.supervisor, 0)


def _filter(flags: int) -> Callable[[Prey], None]:
    def attempt(prey: Prey) -> None:
        _sys("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        prey.scratch[0:8] = struct.pack("=HBBI", 6, 0, 0, 0x7FFF0000)  # return ALLOW
        _sys("seccomp", 1, flags, struct.pack("=H6xQ", 1, prey.page))

    return attempt


def _message(prey: Prey, control: bytes) -> bytes:
    """A struct msghdr of eight bytes with `control` as its ancillary data."""
    base = prey.page
    prey.scratch[0:16] = _iovec(base + 64, 8)
    prey.scratch[64:72] = b"x" * 8
    prey.scratch[128 : 128 + len(control)] = control
    return struct.pack("=QI4xQQQQi4x", 0, 0, base, 1, base + 128, len(control), 0)


def _sends_descriptors(count: int) -> Callable[[Prey], object]:
    def attempt(prey: Prey) -> None:
        size = 16 + 4 * count  # struct cmsghdr: length, SOL_SOCKET, SCM_RIGHTS
        control = struct.pack(f"=Qii{count}i", size, 1, 1, *(FD_LOG,) * count)
        _sys("sendmsg", FD_CONTROL, _message(prey, control + bytes(-size % 8)), 0)

    return attempt


def _receives(name: str, *after: Argument) -> Callable[[Prey], None]:
    def attempt(prey: Prey) -> None:
        message = ctypes.create_string_buffer(_message(prey, bytes(24)) + bytes(8))
        with contextlib.suppress(BlockingIOError):
            _sys(name, FD_ACCESS, message, *after)

    return attempt


def _peeks(*address: Told) -> Callable[[Prey], None]:
    """Look at what waits in the access channel (MSG_PEEK, MSG_DONTWAIT), and who sent it."""
    look = _tries("recvfrom", FD_ACCESS, lambda p: p.page + 128, 8, 0x42, *address)

    def attempt(prey: Prey) -> None:
        with contextlib.suppress(BlockingIOError):
            look(prey)

    return attempt


def _makes_directory(prey: Prey) -> None:
    name = f"/tmp/vmsup-escape-{prey.me}".encode()
    _sys("mkdir", name, 0o700)
    os.rmdir(name)


def _makes_fifo(prey: Prey) -> None:
    name = f"/tmp/vmsup-escape-{prey.me}-fifo".encode()
    _sys("mknod", name, 0o10600, 0)
    os.unlink(name)


def _watches(prey: Prey) -> None:
    _sys("inotify_add_watch", _sys("inotify_init1", 0), b"/", 0x100)


def _memfd_made_executable(prey: Prey) -> None:
    fd = _sys("memfd_create", b"escape", 0)
    os.ftruncate(fd, _PAGE_SIZE)
    _sys("mmap", 0, _PAGE_SIZE, _R | _X, mmap.MAP_SHARED, fd, 0)


def _made_executable(prey: Prey) -> None:
    _sys("mprotect", _fresh(prey), _PAGE_SIZE, _R | _X)


def _shared_segment(prey: Prey) -> None:
    _sys("shmctl", _sys("shmget", 0, _PAGE_SIZE, 0o1600), 0, 0)  # made, and removed again


def _message_queue(prey: Prey) -> None:
    _sys("msgctl", _sys("msgget", 0, 0o1600), 0, 0)


def _nested(flags: int) -> Callable[[Prey], object]:
    return _tries("unshare", _CLONE_NEWUSER | flags)


def _clone3(prey: Prey) -> None:
    if _sys("clone3", bytes(64), 64) == 0:
        os._exit(0)


def _int80(prey: Prey) -> None:
    if prey.int80() <= 0:
        raise OSError(errno.ENOSYS, "refused")


def _x32(prey: Prey) -> None:
    _call(X32_BIT | SYSCALLS["getpid"])


def _as(group: str, *rows: tuple[str, Callable[[Prey], object]]) -> Iterator[Attempt]:
    return (Attempt(group, name, run) for name, run in rows)


ATTEMPTS: Final = (
    *_as(
        "files",
        ("open the root directory", _opens("/")),
        ("open it by open(2)", _tries("open", b"/", 0, 0)),
        ("open it by openat2", _tries("openat2", _AT_FDCWD, b"/", bytes(24), 24)),
        ("a handle of the root directory", _tries("open_tree", _AT_FDCWD, b"/", 0)),
        ("open the password file", _opens("/etc/passwd")),
        ("open /dev/kvm", _opens("/dev/kvm", os.O_RDWR)),
        ("open /dev/null", _opens("/dev/null", os.O_RDWR)),
        ("make a file without a name", _opens("/tmp", _O_TMPFILE | os.O_RDWR)),
        ("make a directory", _makes_directory),
        ("make a named pipe", _makes_fifo),
        ("status of the password file", _tries("stat", b"/etc/passwd", _page)),
        ("the same by newfstatat", _tries("newfstatat", _AT_FDCWD, b"/etc/passwd", _page, 0)),
        ("the same by statx", _tries("statx", _AT_FDCWD, b"/etc/passwd", 0, 0x7FF, _page)),
        ("test access to the password file", _tries("access", b"/etc/passwd", os.R_OK)),
        ("extended attributes of the root", _tries("listxattr", b"/", _page, 0)),
        ("change the working directory", _tries("chdir", b"/etc")),
        ("name of the working directory", _tries("getcwd", _page, _PAGE_SIZE)),
        ("space of the file system", _tries("statfs", b"/etc", _page)),
        ("watch a directory", _watches),
        ("watch every file", _tries("fanotify_init", 0, 0)),
        ("status of an own descriptor", _tries("fstat", FD_ACCESS, _page)),
    ),
    *_as(
        "proc",
        ("write own memory", _opens("/proc/self/mem", os.O_RDWR)),
        ("own executable", _tries("readlink", b"/proc/self/exe", _page, _PAGE_SIZE)),
        ("own memory map", _opens("/proc/self/maps")),
        ("supervisor's memory", _opens("/proc/{s}/mem", os.O_RDWR)),
        ("supervisor's memory map", _opens("/proc/{s}/maps")),
        ("supervisor's environment", _opens("/proc/{s}/environ")),
        ("supervisor's guest memory", _opens("/proc/{s}/fd/{fd}", os.O_RDWR)),
        ("supervisor's root directory", _opens("/proc/{s}/root")),
        ("supervisor's namespaces", _opens("/proc/{s}/ns/net")),
        ("a kernel parameter", _opens("/proc/sys/kernel/hostname", os.O_WRONLY)),
    ),
    *_as(
        "sockets",
        ("unix stream", _tries("socket", 1, 1, 0)),
        ("unix datagram", _tries("socket", 1, 2, 0)),
        ("unix pair", _tries("socketpair", 1, 1, 0, _page)),
        ("inet stream", _tries("socket", 2, 1, 0)),
        ("inet datagram", _tries("socket", 2, 2, 0)),
        ("inet raw", _tries("socket", 2, 3, 1)),
        ("inet6 stream", _tries("socket", 10, 1, 0)),
        ("multipath TCP", _tries("socket", 2, 1, 262)),
        ("netlink route", _tries("socket", 16, 3, 0)),
        ("netlink audit", _tries("socket", 16, 3, 9)),
        ("netlink kernel events", _tries("socket", 16, 3, 15)),
        ("packet", _tries("socket", 17, 3, 0x0300)),
        ("vsock", _tries("socket", 40, 1, 0)),
        ("kernel crypto", _tries("socket", 38, 5, 0)),
        ("xdp", _tries("socket", 44, 3, 0)),
        ("bluetooth", _tries("socket", 31, 3, 1)),
    ),
    *_as(
        "channels",
        ("a descriptor in a message", _sends_descriptors(1)),
        ("a flood of descriptors in a message", _sends_descriptors(250)),
        ("receive with room for descriptors", _receives("recvmsg", 0x40)),
        ("the same, many messages", _receives("recvmmsg", 1, 0x40, 0)),
        ("peek at the access channel", _peeks()),
        ("ask a frame's sender for its address", _peeks(_page, _length(110))),
        ("read the access channel by read(2)", _tries("read", FD_ACCESS, _page, 0)),
        ("write it by write(2)", _tries("write", FD_CONTROL, b"\x00", 0)),
        ("room for a flood of frames", _tries("setsockopt", FD_CONTROL, 1, 7, struct.pack("=i", _GIB), 4)),
        ("the supervisor's credentials", _tries("getsockopt", FD_CONTROL, 1, 17, _page, _length(12))),
        ("give a channel a name", _tries("bind", FD_ACCESS, struct.pack("=H", 1), 2)),
        ("name of a channel", _tries("getsockname", FD_ACCESS, _page, _length(110))),
        ("bytes waiting, by ioctl", _tries("ioctl", FD_ACCESS, 0x541B, _page)),
        ("flags of a descriptor", _tries("fcntl", FD_ACCESS, 3, 0)),
        ("signals from a descriptor", _tries("fcntl", FD_ACCESS, 8, _me)),
        ("close a channel's neighbour", _tries("close", 0)),
        ("write to /dev/null on 1", _tries("write", 1, b"x", 1)),
        ("seek", _tries("lseek", 0, 0, 0)),
    ),
    *_as(
        "descriptors",
        ("duplicate one", _tries("dup", FD_LOG)),
        ("duplicate over another", _tries("dup2", FD_LOG, 1)),
        ("a flood of duplicates", _often(512, "dup", FD_LOG)),
        ("pipe", _tries("pipe", _page)),
        ("eventfd", _tries("eventfd", 0, 0)),
        ("epoll", _tries("epoll_create1", 0)),
        ("timer descriptor", _tries("timerfd_create", 1, 0)),
        ("signal descriptor", _tries("signalfd4", -1, bytes(8), 8, 0)),
        ("memfd", _tries("memfd_create", b"escape", 0)),
        ("secret memory", _tries("memfd_secret", 0)),
        ("raise the limit by prlimit", _tries("prlimit64", 0, 7, struct.pack("=QQ", 512, 512), 0)),
        ("raise the limit by setrlimit", _tries("setrlimit", 7, struct.pack("=QQ", 512, 512))),
    ),
    *_as(
        "processes",
        ("fork", _forks("fork")),
        ("clone", _forks("clone", _SIGCHLD, 0, 0, 0, 0)),
        ("clone3", _clone3),
        ("a child of its parent", _forks("clone", _CLONE_PARENT | _SIGCHLD, 0, 0, 0, 0)),
        ("a child in a user namespace", _forks("clone", _CLONE_NEWUSER | _SIGCHLD, 0, 0, 0, 0)),
    ),
    Attempt("processes", "exec", _tries("execve", b"/bin/true", None, None), exits=True),
    Attempt("processes", "execveat", _tries("execveat", _AT_FDCWD, b"/bin/true", None, None, 0), exits=True),
    *_as(
        "namespaces",
        ("user", _nested(0)),
        ("mount", _nested(_CLONE_NEWNS)),
        ("network", _nested(_CLONE_NEWNET)),
        ("pid", _nested(_CLONE_NEWPID)),
        ("ipc", _nested(_CLONE_NEWIPC)),
        ("host name", _nested(_CLONE_NEWUTS)),
        ("time", _nested(_CLONE_NEWTIME)),
        ("the supervisor's network", _tries("setns", _pidfd, _CLONE_NEWNET)),
        ("mount a file system", _tries("mount", b"none", b"/mnt", b"tmpfs", 0, None)),
        ("make a file system to mount", _tries("fsopen", b"tmpfs", 0)),
        ("chroot", _tries("chroot", b"/")),
        ("pivot the root", _reaches(errno.ENOENT, "pivot_root", b"/no/such", b"/no/such")),
        ("set the host name", _reaches(errno.EINVAL, "sethostname", b"", 65)),
    ),
    *_as(
        "others",
        ("ask to be traced", _tries("ptrace", 0, 0, 0, 0)),
        ("trace the supervisor", _tries("ptrace", 0x4206, _supervisor, 0, 0)),  # SEIZE: it does not stop
        ("read guest memory by process_vm_readv", _process_vm("process_vm_readv")),
        ("write it by process_vm_writev", _process_vm("process_vm_writev")),
        ("a descriptor of the supervisor", _pidfd),
        ("guest memory by pidfd_getfd", _tries("pidfd_getfd", _pidfd, lambda p: p.memory_fd, 0)),
        ("compare itself with the supervisor", _tries("kcmp", _supervisor, _supervisor, 0, 0, 0)),
        ("the supervisor's limits", _tries("prlimit64", _supervisor, 7, None, _page)),
        ("the supervisor's futexes", _tries("get_robust_list", _supervisor, _page, lambda p: p.page + 8)),
        ("the supervisor's session", _tries("getsid", _supervisor)),
        ("the supervisor's processors", _tries("sched_getaffinity", _supervisor, _PAGE_SIZE, _page)),
        ("the supervisor's priority", _tries("getpriority", 0, _supervisor)),
    ),
    *_as(
        "signals",
        ("to the supervisor", _tries("kill", _supervisor, 0)),
        ("to a thread of the supervisor", _tries("tgkill", _supervisor, _supervisor, 0)),
        ("to the supervisor by pidfd", _tries("pidfd_send_signal", _pidfd, 0, None, 0)),
        ("to itself", _tries("kill", _me, 0)),
        ("to its group", _tries("kill", 0, 0)),
        ("to everybody", _tries("kill", -1, 0)),
        ("ignore SIGSYS", _tries("rt_sigaction", _SIGSYS, struct.pack("=QQQQ", 1, 0, 0, 0), None, 8)),
        ("block every signal", _tries("rt_sigprocmask", 0, b"\xff" * 8, None, 8)),
        ("a signal stack", _tries("sigaltstack", None, _page)),
        ("alarm", _tries("alarm", 1000)),
        ("a timer", _tries("timer_create", 1, None, _page)),
    ),
    *_as(
        "memory",
        ("executable memory", _tries("mmap", 0, _PAGE_SIZE, _R | _W | _X, _PRIVATE, -1, 0)),
        ("memory made executable", _made_executable),
        ("own code made writable", _tries("mprotect", _text, _PAGE_SIZE, _R | _W | _X)),
        ("a memfd made executable", _memfd_made_executable),
        ("readable means executable", _tries("personality", 0x0400000)),
        ("shared memory", _tries("mmap", 0, _PAGE_SIZE, _R | _W, _SHARED, -1, 0)),
        ("shared executable memory", _tries("mmap", 0, _PAGE_SIZE, _R | _W | _X, _SHARED, -1, 0)),
        ("the page at 0", _tries("mmap", 0, _PAGE_SIZE, _R | _W, _PRIVATE | _FIXED, -1, 0)),
        ("System V shared memory", _shared_segment),
        ("System V messages", _message_queue),
        ("memory that is never swapped", _tries("mlock", _page, _PAGE_SIZE)),
        ("a protection key", _tries("pkey_alloc", 0, 0)),
        ("segments of its own", _tries("modify_ldt", 0, _page, 16)),
        ("advice about its pages", _tries("madvise", lambda p: p.page & -_PAGE_SIZE, _PAGE_SIZE, 0)),
        ("a barrier on every processor", _tries("membarrier", 0, 0, 0)),
        ("userfaultfd", _tries("userfaultfd", 1)),
    ),
    *_as(
        "exhaustion",
        ("a gibibyte mapped", _tries("mmap", 0, _GIB, _R | _W, _PRIVATE, -1, 0)),
        ("a mapping grown to a gibibyte", _tries("mremap", _fresh, _PAGE_SIZE, _GIB, 1)),
        ("a higher priority", _tries("setpriority", 0, 0, -20)),
        ("real-time scheduling", _tries("sched_setscheduler", 0, 1, struct.pack("=i", 1))),
        ("out of SCHED_BATCH", _tries("sched_setscheduler", 0, 0, struct.pack("=i", 0))),
        ("another processor", _tries("sched_setaffinity", 0, 8, b"\xff" * 8)),
        ("real-time I/O", _tries("ioprio_set", 1, 0, 1 << 13)),
        ("a limit on CPU time lifted", _tries("prlimit64", 0, 0, struct.pack("=QQ", U64_MAX, U64_MAX), None)),
    ),
    *_as(
        "hiding",
        ("survive its parent", _tries("prctl", 1, 0, 0, 0, 0)),
        ("parent of orphans", _tries("prctl", 36, 1, 0, 0, 0)),
        ("another name", _tries("prctl", 15, b"kworker/0:0", 0, 0, 0)),
        ("dumpable again", _tries("prctl", 4, 1, 0, 0, 0)),
        ("another group", _tries("setpgid", 0, 0)),
        ("become root", _tries("setuid", 0)),
        ("leave its groups", _tries("setgroups", 0, None)),
        ("another filter", _filter(0)),
        ("another filter, and its listener", _filter(8)),
    ),
    *_as(
        "kernel",
        ("x32 call", _x32),
        ("i386 call by int 0x80", _int80),
        ("io_uring", _tries("io_uring_setup", 4, lambda p: ctypes.create_string_buffer(120))),
        ("asynchronous I/O", _tries("io_setup", 1, lambda p: ctypes.create_string_buffer(8))),
        ("bpf map", _tries("bpf", 0, struct.pack("=5I52x", 2, 4, 4, 1, 0), 72)),
        ("performance counters", _tries("perf_event_open", struct.pack("=IIQ48x", 1, 64, 0), 0, -1, -1, 0)),
        ("session keyring", _tries("keyctl", 0, -3, 1)),
        ("a key", _tries("add_key", b"user", b"escape", b"x", 1, -2)),
        ("load a module", _reaches(errno.EFAULT, "init_module", None, 4096, None)),
        ("unload a module", _reaches(errno.ENOENT, "delete_module", b"no_such_module", os.O_NONBLOCK)),
        ("I/O ports", _tries("ioperm", 0x80, 1, 1)),
        ("the kernel's log", _tries("syslog", 10, None, 0)),
        ("accounting", _reaches(errno.ENOENT, "acct", b"/no/such")),
        ("its own Landlock domain", _tries("landlock_create_ruleset", None, 0, 1)),
        ("the clock's discipline", _tries("adjtimex", lambda p: ctypes.create_string_buffer(208))),
    ),
    *_as(
        "knowledge",
        ("own pid", _tries("getpid")),
        ("own uid", _tries("getuid")),
        ("the kernel's version", _tries("uname", _page)),
        ("the host's load and memory", _tries("sysinfo", _page)),
        ("its own resource use", _tries("getrusage", 0, _page)),
        ("another clock", _tries("clock_gettime", 7, _page)),
        ("sleep", _tries("nanosleep", struct.pack("=QQ", 0, 1), None)),
        ("random numbers", _tries("getrandom", _page, 8, 0)),
        ("which processor", _tries("getcpu", _page, None, None)),
    ),
)  # fmt: skip


_F_ADD_SEALS, _F_SEAL_WRITE, _F_SEAL_FUTURE_WRITE = 1033, 0x8, 0x10
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02
_MEMORY: Final = FD_FIRST  # catalog.virtio_descriptors

ON_MEMORY: Final = tuple(
    _as(
        "guest memory",
        ("map it once more", _tries("mmap", 0, _PAGE_SIZE, _R | _W, mmap.MAP_SHARED, _MEMORY, 0)),
        ("map it executable", _tries("mmap", 0, _PAGE_SIZE, _R | _X, mmap.MAP_SHARED, _MEMORY, 0)),
        ("read it as a file", _tries("pread64", _MEMORY, _page, 8, 0)),
        ("write it as a file", _tries("pwrite64", _MEMORY, bytes(8), 8, 0)),
        ("its size and owner", _tries("fstat", _MEMORY, _page)),
        ("its seals", _tries("fcntl", _MEMORY, _F_ADD_SEALS + 1, 0)),
        ("a hole in it", _tries("fallocate", _MEMORY, _KEEP_SIZE | _PUNCH_HOLE, 0, _PAGE_SIZE)),
        ("another descriptor of it", _tries("dup", _MEMORY)),
        ("open it anew", _opens(f"/proc/self/fd/{_MEMORY}", os.O_RDWR)),
        ("lock it", _tries("flock", _MEMORY, 2)),
        # What the seals refuse, with or without a jail; the supervisor would die of SIGBUS.
        ("truncate it", _tries("ftruncate", _MEMORY, 0)),
        ("grow it", _tries("ftruncate", _MEMORY, _GIB)),
        ("grow it by allocating", _tries("fallocate", _MEMORY, 0, _GIB, _PAGE_SIZE)),
        ("seal it against writing", _tries("fcntl", _MEMORY, _F_ADD_SEALS, _F_SEAL_WRITE)),
        ("seal it against new writers", _tries("fcntl", _MEMORY, _F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)),
    )
)
"""What else a device tries that is given guest memory."""


def attempts(victim: Entry) -> tuple[Attempt, ...]:
    """What is tried from the jail of `victim`."""
    return (*ATTEMPTS, *(ON_MEMORY if victim.guest_memory else ()))


class Attacker:
    """Ports: those of the device whose jail it is in, never used.

    Args:
        supervisor, memory_at, memory_fd: see `Prey`.
    """

    TABLES: ClassVar[tuple[object, ...]] = ()
    shadows: ClassVar[Mapping[int, Callable[[], int | None]]] = {}
    deadline_ns = None

    def __init__(self, *, supervisor: int, memory_at: int, memory_fd: int, **ports: object) -> None:
        # Made before the jail, in which nothing executable can be.
        code, scratch = mmap.mmap(-1, _PAGE_SIZE, prot=_R | _W | _X), mmap.mmap(-1, 2 * _PAGE_SIZE)
        code.write(_INT80_CODE)
        at, page = (ctypes.addressof(ctypes.c_char.from_buffer(m)) for m in (code, scratch))
        int80 = ctypes.CFUNCTYPE(ctypes.c_int)(at)
        self._code = code  # to live as long as the function that it is
        self._ports = ports  # memory that is let go would close its descriptor
        self._prey = Prey(supervisor, memory_at, memory_fd, os.getpid(), scratch, page, int80)

    def read(self, space: int, offset: int, size: int) -> int:
        try:
            (*ATTEMPTS, *ON_MEMORY)[offset].run(self._prey)
        except OSError as e:
            return e.errno or errno.EIO
        return 0

    def write(self, space: int, offset: int, size: int, data: int) -> None:
        pass

    def stop(self) -> None:
        pass

    def save(self) -> bytes:
        return b""

    def restore(self, state: bytes) -> None:
        pass

    def counters(self) -> dict[str, int]:
        return {}


def attacker(name: str, victim: str, without: frozenset[str] = frozenset()) -> Entry:
    """The catalogue entry of an `Attacker` with the descriptors and limits of `victim`.

    Args:
        name: the entry's.
        victim: a catalogue name; its policy, with the slots of this entry, is what the filter is to be.
        without: layers of the jail to leave out.
    """
    entry = CATALOG[victim]
    return replace(
        entry,
        name=name,
        summary="attempts to escape",
        module=__name__,
        model=Attacker.__name__,
        regions=(Region(Space.PORT, len(attempts(entry)) + 8, "one attempt per offset"),),
        params=(
            *entry.params,
            Param("supervisor", 1, (1 << 31) - 1, "its pid"),
            Param("memory_at", 0, U64_MAX, "the address of its guest memory"),
            Param("memory_fd", 0, (1 << 31) - 1, "the descriptor of its guest memory"),
        ),
        sources=(),
        without=without,
    )
