"""System calls of x86-64 by name, and the shape of the arguments that policies compare.

Numbers: arch/x86/entry/syscalls/syscall_64.tbl up to Linux 6.18's 469; shapes: include/linux/syscalls.h.
Left out: the x32 numbers (512 to 547), which every filter of ours kills, and the kernel's probes (335, 336).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final, NamedTuple

AUDIT_ARCH_X86_64: Final = 0xC000003E  # linux/audit.h: EM_X86_64 | 64-bit | little-endian
X32_BIT: Final = 0x40000000  # asm/unistd.h: numbers from here on are the x32 ABI's

_FROM_0: Final = """
read write open close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask
rt_sigreturn ioctl pread64 pwrite64 readv writev access pipe select sched_yield mremap msync mincore
madvise shmget shmat shmctl dup dup2 pause nanosleep getitimer alarm setitimer getpid sendfile socket
connect accept sendto recvfrom sendmsg recvmsg shutdown bind listen getsockname getpeername socketpair
setsockopt getsockopt clone fork vfork execve exit wait4 kill uname semget semop semctl shmdt msgget
msgsnd msgrcv msgctl fcntl flock fsync fdatasync truncate ftruncate getdents getcwd chdir fchdir rename
mkdir rmdir creat link unlink symlink readlink chmod fchmod chown fchown lchown umask gettimeofday
getrlimit getrusage sysinfo times ptrace getuid syslog getgid setuid setgid geteuid getegid setpgid
getppid getpgrp setsid setreuid setregid getgroups setgroups setresuid getresuid setresgid getresgid
getpgid setfsuid setfsgid getsid capget capset rt_sigpending rt_sigtimedwait rt_sigqueueinfo rt_sigsuspend
sigaltstack utime mknod uselib personality ustat statfs fstatfs sysfs getpriority setpriority
sched_setparam sched_getparam sched_setscheduler sched_getscheduler sched_get_priority_max
sched_get_priority_min sched_rr_get_interval mlock munlock mlockall munlockall vhangup modify_ldt
pivot_root _sysctl prctl arch_prctl adjtimex setrlimit chroot sync acct settimeofday mount umount2 swapon
swapoff reboot sethostname setdomainname iopl ioperm create_module init_module delete_module
get_kernel_syms query_module quotactl nfsservctl getpmsg putpmsg afs_syscall tuxcall security gettid
readahead setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr
removexattr lremovexattr fremovexattr tkill time futex sched_setaffinity sched_getaffinity set_thread_area
io_setup io_destroy io_getevents io_submit io_cancel get_thread_area lookup_dcookie epoll_create
epoll_ctl_old epoll_wait_old remap_file_pages getdents64 set_tid_address restart_syscall semtimedop
fadvise64 timer_create timer_settime timer_gettime timer_getoverrun timer_delete clock_settime
clock_gettime clock_getres clock_nanosleep exit_group epoll_wait epoll_ctl tgkill utimes vserver mbind
set_mempolicy get_mempolicy mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr
kexec_load waitid add_key request_key keyctl ioprio_set ioprio_get inotify_init inotify_add_watch
inotify_rm_watch migrate_pages openat mkdirat mknodat fchownat futimesat newfstatat unlinkat renameat
linkat symlinkat readlinkat fchmodat faccessat pselect6 ppoll unshare set_robust_list get_robust_list
splice tee sync_file_range vmsplice move_pages utimensat epoll_pwait signalfd timerfd_create eventfd
fallocate timerfd_settime timerfd_gettime accept4 signalfd4 eventfd2 epoll_create1 dup3 pipe2
inotify_init1 preadv pwritev rt_tgsigqueueinfo perf_event_open recvmmsg fanotify_init fanotify_mark
prlimit64 name_to_handle_at open_by_handle_at clock_adjtime syncfs sendmmsg setns getcpu process_vm_readv
process_vm_writev kcmp finit_module sched_setattr sched_getattr renameat2 seccomp getrandom memfd_create
kexec_file_load bpf execveat userfaultfd membarrier mlock2 copy_file_range preadv2 pwritev2 pkey_mprotect
pkey_alloc pkey_free statx io_pgetevents rseq
"""

_FROM_424: Final = """
pidfd_send_signal io_uring_setup io_uring_enter io_uring_register open_tree move_mount fsopen fsconfig
fsmount fspick pidfd_open clone3 close_range openat2 pidfd_getfd faccessat2 process_madvise epoll_pwait2
mount_setattr quotactl_fd landlock_create_ruleset landlock_add_rule landlock_restrict_self memfd_secret
process_mrelease futex_waitv set_mempolicy_home_node cachestat fchmodat2 map_shadow_stack futex_wake
futex_wait futex_requeue statmount listmount lsm_get_self_attr lsm_set_self_attr lsm_list_modules mseal
setxattrat getxattrat listxattrat removexattrat open_tree_attr file_getattr file_setattr
"""

SYSCALLS: Final = MappingProxyType(
    {name: nr for nr, name in enumerate(_FROM_0.split())}
    | {name: nr for nr, name in enumerate(_FROM_424.split(), 424)}
)
"""Name -> number."""

NAMES: Final = MappingProxyType({nr: name for name, nr in SYSCALLS.items()})
"""Number -> name."""


class Argument(NamedTuple):
    """One argument: its name in the kernel's prototype, and whether the kernel reads only 32 bits of it."""

    name: str
    is_32_bit: bool


def _arguments(prototype: str) -> tuple[Argument, ...]:
    return tuple(Argument(word.removesuffix(":32"), word.endswith(":32")) for word in prototype.split())


# Marked ":32": int, unsigned int, pid_t, mode_t, and what is declared longer but cut to 32 bits
# before use (the descriptors of mmap and readv, the flags of clone).  A descriptor's name starts with "fd".
_PROTOTYPES: Final = {
    "read": "fd:32 buf count",
    "write": "fd:32 buf count",
    "open": "filename flags:32 mode:32",
    "close": "fd:32",
    "fstat": "fd:32 statbuf",
    "poll": "ufds nfds:32 timeout_ms:32",
    "lseek": "fd:32 offset whence:32",
    "mmap": "addr len prot flags fd:32 off",
    "mprotect": "addr len prot",
    "munmap": "addr len",
    "brk": "brk",
    "rt_sigaction": "sig:32 act oact sigsetsize",
    "rt_sigprocmask": "how:32 set oset sigsetsize",
    "rt_sigreturn": "",
    "ioctl": "fd:32 cmd:32 arg",
    "pread64": "fd:32 buf count pos",
    "pwrite64": "fd:32 buf count pos",
    "readv": "fd:32 vec vlen",
    "writev": "fd:32 vec vlen",
    "select": "n:32 inp outp exp tvp",
    "sched_yield": "",
    "mremap": "addr old_len new_len flags new_addr",
    "madvise": "start len behavior:32",
    "dup": "fd:32",
    "dup2": "fd_old:32 fd_new:32",
    "nanosleep": "rqtp rmtp",
    "getpid": "",
    "socket": "family:32 type:32 protocol:32",
    "connect": "fd:32 uservaddr addrlen:32",
    "accept": "fd:32 upeer_sockaddr upeer_addrlen",
    "accept4": "fd:32 upeer_sockaddr upeer_addrlen flags:32",
    "sendto": "fd:32 buf len flags:32 addr addr_len:32",
    "recvfrom": "fd:32 ubuf size flags:32 addr addr_len",
    "sendmsg": "fd:32 msg flags:32",
    "recvmsg": "fd:32 msg flags:32",
    "shutdown": "fd:32 how:32",
    "bind": "fd:32 umyaddr addrlen:32",
    "listen": "fd:32 backlog:32",
    "socketpair": "family:32 type:32 protocol:32 usockvec",
    "setsockopt": "fd:32 level:32 optname:32 optval optlen:32",
    "getsockopt": "fd:32 level:32 optname:32 optval optlen",
    "clone": "flags:32 newsp parent_tidptr child_tidptr tls",
    "clone3": "uargs size",
    "exit": "error_code:32",
    "exit_group": "error_code:32",
    "kill": "pid:32 sig:32",
    "tkill": "pid:32 sig:32",
    "tgkill": "tgid:32 pid:32 sig:32",
    "fcntl": "fd:32 cmd:32 arg",
    "fsync": "fd:32",
    "fdatasync": "fd:32",
    "ftruncate": "fd:32 length",
    "fchmod": "fd:32 mode:32",
    "fstatfs": "fd:32 buf",
    "getdents64": "fd:32 dirent count:32",
    "prctl": "option:32 arg2 arg3 arg4 arg5",
    "gettid": "",
    "futex": "uaddr op:32 val:32 utime uaddr2 val3:32",
    "sched_setaffinity": "pid:32 len:32 user_mask_ptr",
    "sched_getaffinity": "pid:32 len:32 user_mask_ptr",
    "sched_setscheduler": "pid:32 policy:32 param",
    "restart_syscall": "",
    "clock_gettime": "which_clock:32 tp",
    "clock_getres": "which_clock:32 tp",
    "clock_nanosleep": "which_clock:32 flags:32 rqtp rmtp",
    "epoll_wait": "fd_epoll:32 events maxevents:32 timeout:32",
    "epoll_pwait": "fd_epoll:32 events maxevents:32 timeout:32 sigmask sigsetsize",
    "epoll_ctl": "fd_epoll:32 op:32 fd:32 event",
    "openat": "fd_dir:32 filename flags:32 mode:32",
    "newfstatat": "fd_dir:32 filename statbuf flag:32",
    "mkdirat": "fd_dir:32 pathname mode:32",
    "unlinkat": "fd_dir:32 pathname flag:32",
    "linkat": "fd_old:32 oldname fd_new:32 newname flags:32",
    "symlinkat": "oldname fd_new:32 newname",
    "readlinkat": "fd_dir:32 pathname buf bufsiz:32",
    "renameat2": "fd_old:32 oldname fd_new:32 newname flags:32",
    "utimensat": "fd_dir:32 filename utimes flags:32",
    "openat2": "fd_dir:32 filename how usize",
    "pselect6": "n:32 inp outp exp tsp sig",
    "ppoll": "ufds nfds:32 tsp sigmask sigsetsize",
    "set_robust_list": "head len",
    "fallocate": "fd:32 mode:32 offset len",
    "timerfd_create": "clockid:32 flags:32",
    "timerfd_settime": "fd:32 flags:32 utmr otmr",
    "eventfd2": "count:32 flags:32",
    "preadv": "fd:32 vec vlen pos_l pos_h",
    "pwritev": "fd:32 vec vlen pos_l pos_h",
    "preadv2": "fd:32 vec vlen pos_l pos_h flags:32",
    "pwritev2": "fd:32 vec vlen pos_l pos_h flags:32",
    "prlimit64": "pid:32 resource:32 new_rlim old_rlim",
    "getrandom": "ubuf len flags:32",
    "seccomp": "op:32 flags:32 uargs",
    "statx": "fd_dir:32 filename flags:32 mask:32 buffer",
    "rseq": "rseq rseq_len:32 flags:32 sig:32",
    "pkey_mprotect": "start len prot pkey:32",
    "close_range": "fd:32 fd_max:32 flags:32",
}

ARGUMENTS: Final = MappingProxyType({name: _arguments(p) for name, p in _PROTOTYPES.items()})
"""Name -> arguments, for the calls that policies have had reason to name."""
