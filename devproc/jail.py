"""The jail of a device process: a list of steps that can be read before they run (ARCHITECTURE.md).

Spec: user_namespaces(7), pid_namespaces(7), pivot_root(2), capabilities(7), prctl(2), getrlimit(2),
landlock(7), seccomp(2), seccomp_unotify(2).  Two processes walk the list: the *zygote* makes the process, in
namespaces of its own from the first, and the *device* does the rest.  Left out: cgroups, which need a
delegation that an ordinary user may not have.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import resource
import signal
import struct
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final, Literal

import prctl

from devproc import syscalls
from devproc.catalog import FD_FIRST, FD_LOG, Entry, Params, shared_directory
from devproc.channel import Channel
from devproc.record import record
from devproc.wire import Listener
from policies.compile import SETUP_MARK

INSIDE_ID: Final = 1  # the only uid and gid that exist in the jail; not 0, so nothing there is ever "root"
SETUP_CALLS: Final = ("seccomp", "sendmsg", "close", "prlimit64")
"""What the first filter lets through beyond the policy, marked, for the step that loads the second."""

IDS: Final = struct.Struct("=i")
"""What the zygote tells a device: 0 when its ids are mapped, or an error number."""

_NAMESPACES: Final = (
    syscalls.CLONE_NEWUSER
    | syscalls.CLONE_NEWPID
    | syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWNET
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWUTS
    | syscalls.CLONE_NEWCGROUP
)
# capabilities(7): NOROOT, NO_SETUID_FIXUP, NO_CAP_AMBIENT_RAISE, each with its lock, and KEEP_CAPS' lock.
_SECUREBITS: Final = 0x03 | 0x0C | 0x20 | 0xC0
_ROOM: Final = 1 << 16  # bytes; less than malloc maps by themselves
_NEW_ROOT: Final = "/proc"  # where the new root is mounted: any directory every host has
_READ_BENEATH: Final = syscalls.LANDLOCK_ACCESS_FS_READ_FILE | syscalls.LANDLOCK_ACCESS_FS_READ_DIR
_WRITE_BENEATH: Final = (
    syscalls.LANDLOCK_ACCESS_FS_WRITE_FILE
    | syscalls.LANDLOCK_ACCESS_FS_REMOVE_DIR
    | syscalls.LANDLOCK_ACCESS_FS_REMOVE_FILE
    | syscalls.LANDLOCK_ACCESS_FS_MAKE_DIR
    | syscalls.LANDLOCK_ACCESS_FS_MAKE_REG
    | syscalls.LANDLOCK_ACCESS_FS_MAKE_SYM
    | syscalls.LANDLOCK_ACCESS_FS_REFER
    | syscalls.LANDLOCK_ACCESS_FS_TRUNCATE
)
_FD_SCRATCH: Final = 512  # above every slot, below the usual soft limit of 1024
# Until its listener is sent: as many as all processes of its user may have under way in messages (unix(7),
# ETOOMANYREFS), such as the listeners of the user's other devices.
_FD_LAUNCH: Final = 256
_FD_MAX: Final = 0xFFFF_FFFF

CAP_DAC_OVERRIDE, CAP_SETGID, CAP_SETUID, CAP_SYS_ADMIN, CAP_SETFCAP = 1, 6, 7, 21, 31
_NO_MDWE: Final = "PR_SET_MDWE came with Linux 6.3"
# Switches of Debian's and of Ubuntu's kernels, and where they keep ordinary users from user namespaces.
_ADMIN_ONLY: Final = (
    ("/proc/sys/kernel/unprivileged_userns_clone", "0"),
    ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1"),
)


Who = Literal["zygote", "device"]


class Mode(enum.Enum):
    """How much of the jail is asked for; no mode ever slides into another by itself."""

    FULL = "full"  # every step, or no device
    BEST_EFFORT = "best-effort"  # a step that fails is a warning
    NONE = "none"  # a process of its own, and that is all


class JailError(Exception):
    """A step of the jail failed."""

    def __init__(self, step: str, cause: OSError | str) -> None:
        if isinstance(cause, OSError):
            path = f" ({cause.filename})" if cause.filename else ""
            cause = f"{cause.strerror or cause}{path}"
        super().__init__(f"jail: {step}: {cause}")
        self.step = step


class NotOffered(Exception):
    """This kernel lacks the layer; it is recorded, and the other layers stand."""


class Context:
    """What the steps of one device process work on.

    Attributes:
        entry: the device's kind.
        mode: how much jail.
        fds: the descriptors of slots 2.., wherever they are now.
        filters: the two seccomp programs, `policies.compile.compile_notify`; None in mode "none".
        ids: a pipe that says whether its ids are mapped; in the device it is in the slot after all others.
        params: the entry's parameters, of which one may be a limit.
        pid: zygote only: the process as it sees it, once there is one.
        failed: zygote only: why there is none.
        control: device only: the control channel, once the slots are filled.
        namespaced: whether it has its own namespaces; steps that would otherwise act on the host ask.
        notes: (logging level, text) of what did not go as asked, for the control channel.
    """

    def __init__(
        self,
        entry: Entry,
        mode: Mode,
        fds: Sequence[int],
        filters: tuple[bytes, bytes] | None,
        ids: int,
        params: Params | None = None,
    ) -> None:
        self.entry = entry
        self.mode = mode
        self.fds = fds
        self.filters = filters
        self.ids = ids
        self.params = params or {}
        self.pid: int | None = None
        self.failed: str | None = None
        self.control: Channel | None = None
        self.namespaced = False
        self.notes: list[tuple[int, str]] = []


@record
class Step:
    """One layer: who runs it, what it says before it runs, what it does.

    `always`: it is taken in mode "none" too, because it is hygiene rather than a layer.
    `apply` raises OSError, JailError or NotOffered.
    """

    name: str
    who: Who
    describe: Callable[[Entry], str]
    apply: Callable[[Context], None]
    always: bool = False


def plan(mode: Mode, who: Who | None = None, without: Collection[str] = frozenset()) -> tuple[Step, ...]:
    """The steps of `mode` in order, all of them or those of one process, except layers named in `without`."""
    return tuple(
        s
        for s in STEPS
        if (s.always or (mode is not Mode.NONE and s.name not in without)) and (who is None or s.who == who)
    )


def enter(steps: Iterable[Step], ctx: Context) -> None:
    """Take `steps`; what did not go as asked but is allowed to is in `ctx.notes`.

    Raises:
        JailError: a step failed, except in mode "best-effort".
    """
    for step in steps:
        try:
            step.apply(ctx)
        except NotOffered as e:
            ctx.notes.append((10, f"jail: {step.name}: not offered by this kernel: {e}"))
        except (OSError, JailError) as e:
            error = e if isinstance(e, JailError) else JailError(step.name, e)
            if ctx.mode is not Mode.BEST_EFFORT:
                raise error from e
            ctx.notes.append((30, str(error)))


def fork(contexts: Sequence[Context]) -> Context | None:
    """Make the processes that `contexts` ask for, from the zygote; None there, in each of them its context.

    They are the zygote's siblings, children of the supervisor.  What cannot be made has `failed`.
    """
    for ctx in contexts:
        enter(plan(ctx.mode, "zygote", ctx.entry.without), ctx)
    if os.geteuid() == 0 and any(ctx.namespaced for ctx in contexts):
        os.setgroups([])  # setgroups is denied for good inside; an ordinary user cannot drop groups at all
    return _clone(contexts)


def _clone(contexts: Sequence[Context]) -> Context | None:
    flags = [syscalls.CLONE_PARENT | (_NAMESPACES if ctx.namespaced else 0) for ctx in contexts]
    mine, made = syscalls.clone(flags)
    if mine is not None:
        return contexts[mine]
    again = []
    for ctx, pid in zip(contexts, made, strict=True):
        if pid > 0:
            ctx.pid = pid
            continue
        why = f"clone: {os.strerror(-pid)}"
        error = JailError("namespaces" if ctx.namespaced else "process", why)
        if ctx.namespaced and ctx.mode is Mode.BEST_EFFORT:
            ctx.notes.append((30, str(error)))
            ctx.namespaced = False
            again.append(ctx)
        else:
            ctx.failed = str(error)
    return _clone(again) if again else None


def _namespaces(ctx: Context) -> None:
    ctx.namespaced = True  # `fork` makes it so


def await_ids(ctx: Context) -> None:
    """In the device, before the steps after "descriptors": what the zygote has made it maps ids for later.

    Raises:
        JailError: they cannot be mapped, except in mode "best-effort".
    """
    enter([_MAPPED], ctx)


def _mapped(ctx: Context) -> None:
    word = os.read(ctx.ids, IDS.size)
    os.close(ctx.ids)
    err = IDS.unpack(word)[0] if word else errno.ESRCH  # the zygote is gone
    if err:
        raise OSError(err, f"mapping the ids: {os.strerror(err)}")


def _identity(ctx: Context) -> None:
    if not ctx.namespaced:
        raise JailError("identity", "there is no user namespace whose id could be taken")
    # Uid 0 does not exist here, so this drops no capability: the mounts still need them.
    os.setresgid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
    os.setresuid(INSIDE_ID, INSIDE_ID, INSIDE_ID)


def _descriptors(ctx: Context) -> None:
    # Out of the slots' way first.
    spare = [fcntl.fcntl(fd, fcntl.F_DUPFD, _FD_SCRATCH) for fd in (*ctx.fds, ctx.ids)]
    for slot, fd in enumerate(spare, FD_LOG):
        os.dup2(fd, slot, inheritable=False)
    ctx.ids = FD_LOG + len(ctx.fds)
    syscalls.close_range(ctx.ids + 1, _FD_MAX)


def _root(ctx: Context) -> None:
    if not ctx.namespaced:  # it would be the host's mounts that we detach
        raise JailError("root", "there is no mount namespace of its own")
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    shared = shared_directory(ctx.entry)
    if shared is not None:
        _share(shared, read_only=bool(ctx.params["read_only"]))
        return
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
    syscalls.mount("none", _NEW_ROOT, "tmpfs", flags, "size=4k,nr_inodes=1,mode=0555")
    _pivot()
    syscalls.mount("none", "/", None, flags | syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY)


def _pivot() -> None:
    os.chdir(_NEW_ROOT)
    syscalls.pivot_root(".", ".")  # stacks the old root on the new one, and this takes it off again
    syscalls.umount(".", syscalls.MNT_DETACH)
    os.chdir("/")


def _share(fd: int, *, read_only: bool) -> None:
    """Make the directory `fd` the root; `fd` is then that root, and leads to no mount of the host's."""
    # A descriptor from another mount namespace cannot be bound, what its path leads to in this one can.
    path = os.readlink(f"/proc/self/fd/{fd}")
    ours = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if not os.path.samestat(os.fstat(ours), os.fstat(fd)):
        raise JailError("root", f"{path} is not the directory any more that was to be shared")
    # With the mounts below it: an unprivileged namespace may not take what they hide out of hiding.
    syscalls.mount(f"/proc/self/fd/{ours}", _NEW_ROOT, None, syscalls.MS_BIND | syscalls.MS_REC)
    os.close(ours)
    _pivot()
    attributes = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC
    syscalls.mount_setattr("/", attributes | (syscalls.MOUNT_ATTR_RDONLY if read_only else 0))
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    os.dup2(root, fd, inheritable=False)
    os.close(root)


def _limits(ctx: Context) -> None:
    fsize = ctx.entry.fsize if isinstance(ctx.entry.fsize, int) else ctx.params[ctx.entry.fsize]
    assert isinstance(fsize, int)
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_DATA, ctx.entry.data_mib << 20),
        (resource.RLIMIT_FSIZE, fsize),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_NPROC, 0),
        # "seccomp" takes back all that are not its own.
        (resource.RLIMIT_NOFILE, max(_FD_LAUNCH, ctx.entry.descriptors_max)),
    ):
        resource.setrlimit(limit, (value, value))


def _capabilities(ctx: Context) -> None:
    _drop_capabilities()


def _drop_capabilities(keep: int = 0) -> None:
    syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_CLEAR_ALL)
    syscalls.bound_capabilities(keep)
    syscalls.prctl(syscalls.PR_SET_SECUREBITS, _SECUREBITS)  # python-prctl does not know the last two
    syscalls.drop_capabilities(keep)


def _no_gain(ctx: Context) -> None:
    prctl.set_no_new_privs(1)
    prctl.set_dumpable(0)


def _parent(ctx: Context) -> None:
    prctl.set_pdeathsig(signal.SIGKILL)  # if it is dead already, nobody takes the messages still to come


def _memory(ctx: Context) -> None:
    try:
        syscalls.prctl(syscalls.PR_SET_MDWE, syscalls.PR_MDWE_REFUSE_EXEC_GAIN)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        raise NotOffered(_NO_MDWE) from None


def _landlock(ctx: Context) -> None:
    try:
        shared = shared_directory(ctx.entry)
        rights = _READ_BENEATH if ctx.params.get("read_only") else _READ_BENEATH | _WRITE_BENEATH
        syscalls.landlock_restrict(shared, rights)
    except OSError as e:
        if e.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        raise NotOffered(e.strerror or "no Landlock") from None


def _seccomp(ctx: Context) -> None:
    assert ctx.filters is not None and ctx.control is not None
    first, second = ctx.filters
    frame = ctx.control.frame(Listener())
    syscalls.reserve_heap(_ROOM)  # a recorder's filter asks about brk, too, and nobody answers it yet
    listener = syscalls.seccomp_load(first, syscalls.SECCOMP_FILTER_FLAG_NEW_LISTENER)
    # The mark tells these calls from the same ones made later, which the listener is told of.
    syscalls.send_descriptor(ctx.control.fileno(), frame, listener, SETUP_MARK)
    syscalls.close(listener, SETUP_MARK)
    syscalls.limit(resource.RLIMIT_NOFILE, ctx.entry.descriptors_max, SETUP_MARK)
    syscalls.seccomp_load(second, mark=SETUP_MARK)


def _root_of(entry: Entry) -> str:
    if shared_directory(entry) is None:
        return "an empty, read-only tmpfs; nothing else mounted"
    return "the shared directory, nosuid, nodev, noexec, read-only if asked for; nothing above it"


def _landlock_of(entry: Entry) -> str:
    if shared_directory(entry) is None:
        return "every file, TCP and signal right denied"
    return "every TCP and signal right denied; of files, all but what sharing needs, below the root"


def _numbers(fds: range) -> str:
    return f"{fds[0]}" if len(fds) == 1 else f"{fds[0]}-{fds[-1]}"


STEPS: Final = (
    Step(
        "namespaces", "zygote",
        lambda e: "own user, pid, mount, net, ipc, uts and cgroup namespaces; one id, mapped from outside",
        _namespaces,
    ),
    Step(
        "descriptors", "device",
        lambda e: "0 and 1 /dev/null (the zygote's), 2 log, 3 access, 4 control, 5 mailbox, 6 bell, "
        + "".join(f"{_numbers(fds)} {d.name}, " for d, fds in e.own_slots())
        + "all others closed",
        _descriptors,
        always=True,
    ),
    Step("identity", "device", lambda e: f"uid and gid {INSIDE_ID}, the only ones there are", _identity),
    Step("root", "device", _root_of, _root),
    Step(
        "limits", "device",
        lambda e: f"data {e.data_mib} MiB, file size {e.fsize}, no core, no locked memory, no children, "
        f"{e.descriptors_max} descriptors",
        _limits,
    ),
    Step(
        "capabilities", "device",
        lambda e: "none, in any set; the bounding set empty, securebits locked",
        _capabilities,
    ),
    Step("no-gain", "device", lambda e: "no_new_privs; not dumpable, so not traceable", _no_gain),
    Step(
        # After every change of credentials, because each clears it.
        "parent", "device", lambda e: "SIGKILL when the supervisor dies", _parent, always=True,
    ),
    Step("memory", "device", lambda e: "no memory ever becomes executable (MDWE)", _memory),
    Step("landlock", "device", _landlock_of, _landlock),
    Step(
        "seccomp", "device",
        lambda e: f"policies/{e.name}.policy; anything else is reported to the supervisor, which kills",
        _seccomp,
    ),
)  # fmt: skip
assert FD_FIRST == FD_LOG + 5
_MAPPED: Final = Step("namespaces", "device", STEPS[0].describe, _mapped)  # the second half of that step


def lacking() -> dict[str, str]:
    """Layers that this kernel does not have, each with the reason; asked without taking any."""
    lacks = {}
    try:
        syscalls.prctl(syscalls.PR_GET_MDWE)
    except OSError:
        lacks["memory"] = _NO_MDWE
    try:
        syscalls.landlock_abi()
    except OSError as e:
        lacks["landlock"] = e.strerror or "no Landlock"
    return lacks


def drop_privileges(keep: int = 0) -> None:
    """The supervisor's own last step before the guest runs: no capability but `keep`, no way to gain one.

    For the calling thread and those it starts afterwards.  And for the process: its user cannot trace it, it
    dumps no core.  Raises OSError.
    """
    _renounce(keep)
    # Both would show the guest's memory.
    prctl.set_dumpable(0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def confine_zygote(shares: bool) -> None:
    """The zygote's last step before it serves: no capability but `zygote_capabilities`, no way to gain one.

    It stays dumpable, or an ordinary user's could not write the id maps of what it forks.  Raises OSError.
    """
    _renounce(zygote_capabilities(shares))


def zygote_capabilities(shares: bool) -> int:
    """The mask of what root's zygote keeps: the right to map other ids than its own, CAP_SYS_ADMIN only where
    this host lets nobody else make a user namespace, and where a directory is shared, which may be root's,
    CAP_SETFCAP: without it uid 0 cannot be mapped (user_namespaces(7))."""
    keep = 1 << CAP_SETUID | 1 << CAP_SETGID | (1 << CAP_SETFCAP if shares else 0)
    return keep | 1 << CAP_SYS_ADMIN if any(_reads(path, value) for path, value in _ADMIN_ONLY) else keep


def _reads(path: str, value: str) -> bool:
    try:
        with open(path, encoding="ascii") as f:
            return f.read().strip() == value
    except OSError:  # this kernel has no such switch
        return False


def _renounce(keep: int) -> None:
    if os.geteuid() == 0:
        _drop_capabilities(keep)
    else:  # the bounding set needs CAP_SETPCAP to change, and without new privileges bounds nothing
        syscalls.drop_capabilities()
    prctl.set_no_new_privs(1)


def forbid_gain() -> None:
    """no_new_privs for the calling thread, which lets an ordinary user load seccomp filters."""
    prctl.set_no_new_privs(1)


def die_with_parent() -> None:
    """SIGKILL this process when the thread that forked it ends."""
    prctl.set_pdeathsig(signal.SIGKILL)


def title(name: str) -> None:
    """Show `name` as this process's name in ps and top."""
    prctl.set_name(name)
    prctl.set_proctitle(f"vmsup: {name}")
