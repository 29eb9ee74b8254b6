"""Kernel constants that policies may name, with their x86-64 values.

Values: the Linux 6.1 user-space headers named beside each group.  Error numbers come from `errno`, whose
values on x86-64 Linux are the kernel's.  Left out: descriptor slots, which the caller passes in.
"""

from __future__ import annotations

import errno
from types import MappingProxyType
from typing import Final

CONSTANTS: Final = MappingProxyType(
    {
        # mmap(2), mprotect(2), mremap(2): asm-generic/mman-common.h, linux/mman.h
        "PROT_NONE": 0x0, "PROT_READ": 0x1, "PROT_WRITE": 0x2, "PROT_EXEC": 0x4, "PROT_GROWSDOWN": 0x1000000,
        "PROT_GROWSUP": 0x2000000, "MAP_SHARED": 0x1, "MAP_PRIVATE": 0x2, "MAP_SHARED_VALIDATE": 0x3,
        "MAP_FIXED": 0x10, "MAP_ANONYMOUS": 0x20, "MAP_32BIT": 0x40, "MAP_GROWSDOWN": 0x100,
        "MAP_LOCKED": 0x2000, "MAP_NORESERVE": 0x4000, "MAP_POPULATE": 0x8000, "MAP_NONBLOCK": 0x10000,
        "MAP_STACK": 0x20000, "MAP_HUGETLB": 0x40000, "MAP_SYNC": 0x80000, "MAP_FIXED_NOREPLACE": 0x100000,
        "MREMAP_MAYMOVE": 0x1, "MREMAP_FIXED": 0x2, "MREMAP_DONTUNMAP": 0x4,
        # madvise(2): asm-generic/mman-common.h
        "MADV_NORMAL": 0x0, "MADV_RANDOM": 0x1, "MADV_SEQUENTIAL": 0x2, "MADV_WILLNEED": 0x3,
        "MADV_DONTNEED": 0x4, "MADV_FREE": 0x8, "MADV_REMOVE": 0x9, "MADV_DONTFORK": 0xa, "MADV_DOFORK": 0xb,
        "MADV_MERGEABLE": 0xc, "MADV_UNMERGEABLE": 0xd, "MADV_HUGEPAGE": 0xe, "MADV_NOHUGEPAGE": 0xf,
        "MADV_DONTDUMP": 0x10, "MADV_DODUMP": 0x11, "MADV_WIPEONFORK": 0x12, "MADV_KEEPONFORK": 0x13,
        "MADV_COLD": 0x14, "MADV_PAGEOUT": 0x15, "MADV_POPULATE_READ": 0x16, "MADV_POPULATE_WRITE": 0x17,
        "MADV_DONTNEED_LOCKED": 0x18,
        # prctl(2): linux/prctl.h
        "PR_SET_PDEATHSIG": 0x1, "PR_GET_PDEATHSIG": 0x2, "PR_GET_DUMPABLE": 0x3, "PR_SET_DUMPABLE": 0x4,
        "PR_SET_KEEPCAPS": 0x8, "PR_SET_NAME": 0xf, "PR_GET_NAME": 0x10, "PR_GET_SECCOMP": 0x15,
        "PR_SET_SECCOMP": 0x16, "PR_CAPBSET_READ": 0x17, "PR_CAPBSET_DROP": 0x18, "PR_GET_SECUREBITS": 0x1b,
        "PR_SET_SECUREBITS": 0x1c, "PR_SET_TIMERSLACK": 0x1d, "PR_SET_MM": 0x23,
        "PR_SET_CHILD_SUBREAPER": 0x24, "PR_SET_NO_NEW_PRIVS": 0x26, "PR_GET_NO_NEW_PRIVS": 0x27,
        "PR_CAP_AMBIENT": 0x2f,
        "PR_SET_SYSCALL_USER_DISPATCH": 0x3b, "PR_SET_VMA": 0x53564d41, "PR_SET_PTRACER": 0x59616d61,
        # futex(2): linux/futex.h
        "FUTEX_WAIT": 0x0, "FUTEX_WAKE": 0x1, "FUTEX_REQUEUE": 0x3, "FUTEX_CMP_REQUEUE": 0x4,
        "FUTEX_WAKE_OP": 0x5, "FUTEX_LOCK_PI": 0x6, "FUTEX_UNLOCK_PI": 0x7, "FUTEX_WAIT_BITSET": 0x9,
        "FUTEX_WAKE_BITSET": 0xa, "FUTEX_PRIVATE_FLAG": 0x80, "FUTEX_CLOCK_REALTIME": 0x100,
        # clone(2): linux/sched.h
        "CLONE_VM": 0x100, "CLONE_FS": 0x200, "CLONE_FILES": 0x400, "CLONE_SIGHAND": 0x800,
        "CLONE_PIDFD": 0x1000, "CLONE_PTRACE": 0x2000, "CLONE_VFORK": 0x4000, "CLONE_PARENT": 0x8000,
        "CLONE_THREAD": 0x10000, "CLONE_NEWNS": 0x20000, "CLONE_SYSVSEM": 0x40000, "CLONE_SETTLS": 0x80000,
        "CLONE_PARENT_SETTID": 0x100000, "CLONE_CHILD_CLEARTID": 0x200000, "CLONE_DETACHED": 0x400000,
        "CLONE_UNTRACED": 0x800000, "CLONE_CHILD_SETTID": 0x1000000, "CLONE_NEWCGROUP": 0x2000000,
        "CLONE_NEWUTS": 0x4000000, "CLONE_NEWIPC": 0x8000000, "CLONE_NEWUSER": 0x10000000,
        "CLONE_NEWPID": 0x20000000, "CLONE_NEWNET": 0x40000000, "CLONE_IO": 0x80000000, "CLONE_NEWTIME": 0x80,
        # socket(2): asm-generic/socket.h, linux/socket.h, linux/net.h
        "AF_UNSPEC": 0x0, "AF_UNIX": 0x1, "AF_INET": 0x2, "AF_INET6": 0xa, "AF_NETLINK": 0x10,
        "AF_PACKET": 0x11, "AF_ALG": 0x26, "AF_VSOCK": 0x28, "SOCK_STREAM": 0x1, "SOCK_DGRAM": 0x2,
        "SOCK_RAW": 0x3, "SOCK_SEQPACKET": 0x5, "SOCK_CLOEXEC": 0x80000, "SOCK_NONBLOCK": 0x800,
        "SOL_SOCKET": 0x1, "SO_ERROR": 0x4, "SO_RCVBUF": 0x8, "SO_SNDBUF": 0x7, "SO_PEERCRED": 0x11,
        "MSG_OOB": 0x1, "MSG_PEEK": 0x2, "MSG_DONTROUTE": 0x4, "MSG_CTRUNC": 0x8, "MSG_TRUNC": 0x20,
        "MSG_DONTWAIT": 0x40, "MSG_WAITALL": 0x100, "MSG_NOSIGNAL": 0x4000, "MSG_MORE": 0x8000,
        "MSG_CMSG_CLOEXEC": 0x40000000, "SHUT_RD": 0x0, "SHUT_WR": 0x1, "SHUT_RDWR": 0x2,
        # fcntl(2): asm-generic/fcntl.h, linux/fcntl.h
        "F_DUPFD": 0x0, "F_GETFD": 0x1, "F_SETFD": 0x2, "F_GETFL": 0x3, "F_SETFL": 0x4, "F_GETLK": 0x5,
        "F_SETLK": 0x6, "F_SETLKW": 0x7, "F_SETOWN": 0x8, "F_GETOWN": 0x9, "F_OFD_GETLK": 0x24,
        "F_OFD_SETLK": 0x25, "F_OFD_SETLKW": 0x26, "F_DUPFD_CLOEXEC": 0x406, "F_SETPIPE_SZ": 0x407,
        "F_GETPIPE_SZ": 0x408, "F_ADD_SEALS": 0x409, "F_GET_SEALS": 0x40a, "FD_CLOEXEC": 0x1,
        # open(2), openat(2): asm-generic/fcntl.h
        "O_RDONLY": 0x0, "O_WRONLY": 0x1, "O_RDWR": 0x2, "O_ACCMODE": 0x3, "O_CREAT": 0x40, "O_EXCL": 0x80,
        "O_NOCTTY": 0x100, "O_TRUNC": 0x200, "O_APPEND": 0x400, "O_NONBLOCK": 0x800, "O_DSYNC": 0x1000,
        "O_DIRECT": 0x4000, "O_LARGEFILE": 0x8000, "O_DIRECTORY": 0x10000, "O_NOFOLLOW": 0x20000,
        "O_NOATIME": 0x40000, "O_CLOEXEC": 0x80000, "O_SYNC": 0x101000, "O_PATH": 0x200000,
        "O_TMPFILE": 0x410000, "AT_FDCWD": 0xffffffffffffff9c, "AT_EMPTY_PATH": 0x1000,
        "AT_SYMLINK_NOFOLLOW": 0x100, "AT_REMOVEDIR": 0x200,
        # lseek(2), fallocate(2), preadv2(2): linux/fs.h, linux/falloc.h
        "SEEK_SET": 0x0, "SEEK_CUR": 0x1, "SEEK_END": 0x2, "SEEK_DATA": 0x3, "SEEK_HOLE": 0x4,
        "FALLOC_FL_KEEP_SIZE": 0x1, "FALLOC_FL_PUNCH_HOLE": 0x2, "FALLOC_FL_COLLAPSE_RANGE": 0x8,
        "FALLOC_FL_ZERO_RANGE": 0x10, "RWF_HIPRI": 0x1, "RWF_DSYNC": 0x2, "RWF_SYNC": 0x4, "RWF_NOWAIT": 0x8,
        "RWF_APPEND": 0x10,
        # ioctl(2): asm-generic/ioctls.h, linux/if_tun.h, linux/fs.h
        "TCGETS": 0x5401, "TCSETS": 0x5402, "TCSETSW": 0x5403, "TCSETSF": 0x5404, "TCGETS2": 0x802c542a,
        "TCSETSW2": 0x402c542c, "TIOCGWINSZ": 0x5413,
        "TIOCSTI": 0x5412, "FIONREAD": 0x541b, "FIONBIO": 0x5421, "FIOCLEX": 0x5451, "FIONCLEX": 0x5450,
        "TUNSETIFF": 0x400454ca, "TUNSETPERSIST": 0x400454cb, "TUNSETOWNER": 0x400454cc,
        "TUNSETOFFLOAD": 0x400454d0, "TUNSETVNETHDRSZ": 0x400454d8, "TUNGETFEATURES": 0x800454cf,
        "BLKDISCARD": 0x1277, "BLKGETSIZE64": 0x80081272, "BLKZEROOUT": 0x127f,
        # ioctl(2) on a seccomp listener: linux/seccomp.h
        "SECCOMP_IOCTL_NOTIF_RECV": 0xc0502100,
        # clock_gettime(2): linux/time.h
        "CLOCK_REALTIME": 0x0, "CLOCK_MONOTONIC": 0x1, "CLOCK_PROCESS_CPUTIME_ID": 0x2,
        "CLOCK_THREAD_CPUTIME_ID": 0x3, "CLOCK_MONOTONIC_RAW": 0x4, "CLOCK_REALTIME_COARSE": 0x5,
        "CLOCK_MONOTONIC_COARSE": 0x6, "CLOCK_BOOTTIME": 0x7,
        # kill(2), tgkill(2): asm/signal.h
        "SIGHUP": 0x1, "SIGINT": 0x2, "SIGQUIT": 0x3, "SIGILL": 0x4, "SIGTRAP": 0x5, "SIGABRT": 0x6,
        "SIGBUS": 0x7, "SIGFPE": 0x8, "SIGKILL": 0x9, "SIGUSR1": 0xa, "SIGSEGV": 0xb, "SIGUSR2": 0xc,
        "SIGPIPE": 0xd, "SIGALRM": 0xe, "SIGTERM": 0xf, "SIGCHLD": 0x11, "SIGCONT": 0x12, "SIGSTOP": 0x13,
        "SIGSYS": 0x1f, "SIG_BLOCK": 0x0, "SIG_UNBLOCK": 0x1, "SIG_SETMASK": 0x2,
        # epoll_ctl(2), sched_setscheduler(2), getrandom(2), prlimit(2)
        "EPOLL_CTL_ADD": 0x1, "EPOLL_CTL_DEL": 0x2, "EPOLL_CTL_MOD": 0x3, "SCHED_OTHER": 0x0,
        "SCHED_FIFO": 0x1, "SCHED_RR": 0x2, "SCHED_BATCH": 0x3, "SCHED_IDLE": 0x5,
        "GRND_NONBLOCK": 0x1, "GRND_RANDOM": 0x2,
        "RLIMIT_CORE": 0x4, "RLIMIT_DATA": 0x2, "RLIMIT_FSIZE": 0x1, "RLIMIT_MEMLOCK": 0x8,
        "RLIMIT_NOFILE": 0x7, "RLIMIT_NPROC": 0x6,
    }
)  # fmt: skip
"""Name -> value as the 64-bit argument that user space passes."""

ERRNOS: Final = MappingProxyType({name: number for number, name in errno.errorcode.items()})
"""Name -> error number."""

ERRNO_MAX: Final = 4095  # include/linux/err.h MAX_ERRNO; seccomp(2) clamps to it
