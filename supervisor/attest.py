"""`vmsup jail inspect`: what the kernel says confines each process of a running VM, beside what was declared.

Spec: proc(5), namespaces(7), capabilities(7), PTRACE_SECCOMP_GET_FILTER in ptrace(2).  The kernel hides much
of a process that is not dumpable from everybody but root; a field that cannot be seen is "hidden" and proves
nothing.  Left out, because no kernel shows them of another process: `UNSEEN`, which selftest tries.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from devproc import jail
from devproc.catalog import (
    CATALOG,
    FD_ACCESS,
    FD_BELL,
    FD_CONTROL,
    FD_LOG,
    FD_MAILBOX,
    Entry,
    shared_directory,
)
from kvmcore.errors import ConfigError
from policies.compile import compile_notify
from policies.parse import load
from supervisor import exchange as exchange_process
from supervisor import janitor as janitor_process
from supervisor.procstatus import NAMESPACES

UNSEEN: Final = ("securebits", "the parent-death signal", "MDWE", "Landlock")

_OWN: Final = "its own"
_OWNER: Final = "the shared directory's owner's"
_CONFINED: Final = "all nosuid, nodev, noexec"
_NONE: Final = "none"
_CAPABILITIES: Final = ("Inh", "Prm", "Eff", "Bnd", "Amb")
_LIMITED: Final = "limited"  # by a parameter, so each instance to its own
_LIMITS: Final = ("core file size", "data size", "file size", "locked memory", "processes", "open files")
# Kinds of descriptors and what the kernel shows them as; all others are whatever the user named.
_SHOWN: Final = {"signal": "eventfd", "kick": "eventfd", "memory": "memory", "directory": "directory"}
_MOUNT_FLAGS: Final = ("ro", "nosuid", "nodev", "noexec")

Verdict = Literal["as declared", "differs", "hidden"]


@dataclass(frozen=True)
class Finding:
    """One field of one process; `found` is None where it is hidden."""

    process: str
    pid: int
    layer: str
    field: str
    declared: str
    found: str | None

    @property
    def verdict(self) -> Verdict:
        if self.found is None:
            return "hidden"
        return "as declared" if self.found == self.declared else "differs"

    def __str__(self) -> str:
        found = "is hidden" if self.found is None else f"found {self.found or 'nothing'}"
        return f"{self.process}: {self.field}: declared {self.declared}, {found}"


@dataclass(frozen=True)
class Report:
    """Every field of every process, as user `uid` sees it; `lacking`: layers this kernel has not, and why."""

    uid: int
    findings: tuple[Finding, ...]
    lacking: Mapping[str, str]

    @property
    def unproven(self) -> list[Finding]:
        return [f for f in self.findings if f.verdict != "as declared"]

    def as_json(self) -> dict[str, Any]:
        return {
            "uid": self.uid,
            "proven": not self.unproven,
            "unseen": list(UNSEEN),
            "lacking": dict(self.lacking),
            "findings": [asdict(f) | {"verdict": f.verdict} for f in self.findings],
        }

    def text(self) -> str:
        """For people: the counts of each process, then what is not as declared, then what is hidden."""
        lines = [f"{'NAME':10} {'PID':>7} {'AS DECLARED':>11} {'DIFFERS':>7} {'HIDDEN':>6}"]
        processes = list(dict.fromkeys((f.process, f.pid) for f in self.findings))
        for name, pid in processes:
            verdicts = [f.verdict for f in self.findings if f.pid == pid]
            counts = [verdicts.count(v) for v in ("as declared", "differs", "hidden")]
            lines.append(f"{name:10} {pid:>7} {counts[0]:>11} {counts[1]:>7} {counts[2]:>6}")
        lines += [f"DIFFERS: {f}" for f in self.unproven if f.verdict == "differs"]
        for name, pid in processes:
            hidden = [f.field for f in self.findings if f.pid == pid and f.verdict == "hidden"]
            if hidden:
                lines.append(f"hidden from uid {self.uid}: {name}: {', '.join(hidden)}")
        lines += [f"not offered by this kernel: {layer}: {why}" for layer, why in self.lacking.items()]
        lines.append(f"shown to nobody: {', '.join(UNSEEN)}; vmsup jail selftest tries what they forbid")
        return "\n".join(lines)


class _Process:
    """What /proc shows of one process; OSError where it shows nothing."""

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid

    def text(self, path: str) -> str:
        with open(f"/proc/{self.pid}/{path}", encoding="utf-8", errors="replace") as f:
            return f.read()

    def link(self, path: str) -> str:
        return os.readlink(f"/proc/{self.pid}/{path}")

    def list(self, path: str) -> list[str]:
        return os.listdir(f"/proc/{self.pid}/{path}")

    def status(self, key: str) -> str:
        """A line of `status`, in every thread; the threads' words with " / " between where they differ."""
        words: dict[str, None] = {}
        for thread in self.list("task"):
            lines = self.text(f"task/{thread}/status").splitlines()
            value = next(v for k, _, v in (line.partition(":") for line in lines) if k == key)
            words[" ".join(value.split())] = None
        return " / ".join(words)

    def capabilities(self, which: str) -> str:
        mask = self.status(f"Cap{which}")
        return _NONE if set(mask) == {"0"} else mask

    def limit(self, name: str, expected: str) -> str:
        """Soft and hard limit; one word where they are the same, and `expected` where that says enough."""
        line = next(x for x in self.text("limits").splitlines() if x.startswith(f"Max {name} "))
        found = " ".join(dict.fromkeys(line[26:].split()[:2]))
        return _LIMITED if expected == _LIMITED and found.isdecimal() else found

    def mappings(self, wrong: Callable[[str, str], bool]) -> str:
        """The mappings for which `wrong` of their permissions and path is true."""
        found = []
        for line in self.text("maps").splitlines():
            _, permissions, _, _, _, *path = line.split(maxsplit=5)
            if wrong(permissions, "".join(path)):
                found.append(f"{permissions} {''.join(path) or 'anonymous'}")
        return ", ".join(found) or _NONE


Look = Callable[[], str]
Row = tuple[str, str, str, Look]  # layer, field, what is declared, how to see what is


def attest(
    devices: Sequence[tuple[str, int, Entry]],
    supervisor: int,
    zygote: int | None = None,
    janitor: int | None = None,
    exchange: int | None = None,
) -> Report:
    """Look at every process of a VM.

    Args:
        devices: the name, the pid and the declared kind of each device process.
        supervisor: its pid.
        zygote, janitor, exchange: their pids, if they are to be looked at.
    """
    head = _Process("supervisor", supervisor)
    processes = [_Process(name, pid) for name, pid, _ in devices]
    findings: list[Finding] = []

    def compare(process: _Process, rows: Sequence[Row]) -> None:
        for layer, name, declared, look in rows:
            findings.append(Finding(process.name, process.pid, layer, name, declared, _seen(look)))

    compare(head, _supervisor(head))
    if zygote is not None:
        nursery = _Process("zygote", zygote)
        shares = any(shared_directory(entry) is not None for _, _, entry in devices)
        compare(nursery, _zygote(nursery, shares))
    for name, pid, keep in (
        ("janitor", janitor, janitor_process.CAPABILITIES),
        ("exchange", exchange, exchange_process.CAPABILITIES),
    ):
        if pid is not None:
            helper = _Process(name, pid)
            compare(helper, _helper(helper, keep))
    for process, (_, _, entry) in zip(processes, devices, strict=True):
        others = [head, *(p for p in processes if p is not process)]
        compare(process, _device(process, entry, head, others))
    return Report(os.geteuid(), tuple(findings), jail.lacking())


def of_vm(answer: Mapping[str, Any]) -> Report:
    """`attest` for the VM that gave `answer` to the request "ps" (supervisor/control.py).

    Raises:
        ConfigError: it is not a VM of this version.
    """
    try:
        kinds = answer["kinds"]
        devices = [(name, pid, CATALOG[kinds[name]]) for name, pid in answer["processes"]]
        return attest(devices, answer["pid"], answer["zygote"], answer["janitor"], answer.get("exchange"))
    except (KeyError, TypeError, ValueError) as e:
        raise ConfigError(f"the VM does not say what its processes are: {e!r}") from None


def _seen(look: Look) -> str | None:
    try:
        return look()
    except (FileNotFoundError, ProcessLookupError):
        return "no such process"
    except OSError:
        return None


def _supervisor(process: _Process, keep: int = 0) -> list[Row]:
    # Of a process of root's it cannot be seen.
    dumpable: list[Row] = [("no-gain", "dumpable", "no", _dumpable(process))] * (not _is_root(process))
    return [
        *_renounced(process, keep),
        *dumpable,
        ("seccomp", "seccomp mode", "2", lambda: process.status("Seccomp")),
        ("memory", "writable and executable memory", _NONE, _executable(process)),
    ]


def _helper(process: _Process, keep: int) -> list[Row]:
    return [
        *_supervisor(process, keep),
        ("memory", "guest memory", _NONE, _guest_memory(process)),
        ("limits", "threads", "1", lambda: str(len(process.list("task")))),
    ]


def _renounced(process: _Process, keep: int) -> list[Row]:
    """What `jail.drop_privileges` does to root, and what an ordinary user has anyway."""
    sets = list(_CAPABILITIES)
    if not _is_root(process):
        sets.remove("Bnd")  # which it may not change, and which without new privileges bounds nothing
        keep = 0
    return [
        ("no-gain", "no_new_privs", "1", lambda: process.status("NoNewPrivs")),
        *_capabilities(process, [s for s in sets if s in ("Inh", "Amb")]),
        *_capabilities(process, [s for s in sets if s not in ("Inh", "Amb")], keep),
    ]


def _zygote(process: _Process, shares: bool) -> list[Row]:
    return [
        *_renounced(process, jail.zygote_capabilities(shares)),
        ("descriptors", "descriptors", "0, 1, 2, 3", lambda: ", ".join(sorted(process.list("fd"), key=int))),
        ("memory", "guest memory", _NONE, _guest_memory(process)),
        ("memory", "writable and executable memory", _NONE, _executable(process)),
        ("limits", "threads", "1", lambda: str(len(process.list("task")))),
    ]


def _device(process: _Process, entry: Entry, head: _Process, others: Sequence[_Process]) -> list[Row]:
    status = process.status
    by_root = _is_root(head)
    shares = shared_directory(entry) is not None
    page = load(entry.name, entry.slots())
    fsize = _LIMITED if isinstance(entry.fsize, str) else entry.fsize
    limits = [str(v) for v in (0, entry.data_mib << 20, fsize, 0, 0, entry.descriptors_max)]

    def namespaces() -> str:
        theirs = _of_all(others, lambda p: " ".join(p.link(f"ns/{n}") for n in NAMESPACES))
        shared = set(" ".join(theirs).split())
        return " ".join(n for n in NAMESPACES if process.link(f"ns/{n}") not in shared)

    def identity(key: str) -> str:
        """As root each device has a user of its own, or of what it shares; otherwise the supervisor's."""
        mine = status(key)
        if by_root and shares:
            owner = os.stat(f"/proc/{process.pid}/root/")
            own = owner.st_uid if key == "Uid" else owner.st_gid
            return _OWNER if set(mine.split()) == {str(own)} else mine
        one = len(set(mine.split())) == 1
        return _OWN if by_root and one and mine not in _of_all(others, lambda p: p.status(key)) else mine

    def id_map(kind: str) -> str:
        return " ".join(process.text(f"{kind}_map").split())

    def inner_id(key: str) -> str:
        return f"{jail.INSIDE_ID} {status(key).split()[0]} 1"

    def root() -> str:
        if not shares:
            return ", ".join(process.list("root/")) or "empty"
        return (
            "a directory"
            if os.path.samefile(f"/proc/{process.pid}/root", f"/proc/{process.pid}/cwd")
            else "?"
        )

    def mounts() -> str:
        found = [line.split() for line in process.text("mountinfo").splitlines()]
        if shares:  # it may be shared read-only, and there may be others below it
            lacking = [m[4] for m in found if not {"nosuid", "nodev", "noexec"} <= set(m[5].split(","))]
            return f"without all flags: {', '.join(lacking)}" if lacking else _CONFINED
        return "; ".join(f"{m[4]} {','.join(f for f in m[5].split(',') if f in _MOUNT_FLAGS)}" for m in found)

    def policy() -> str:
        return _digest(installed_filters(process.pid))

    def groups(p: _Process) -> str:
        return p.status("Groups") or _NONE

    def declared_groups() -> str:
        return _NONE if by_root else groups(head)  # an ordinary user cannot drop any

    def declared_identity(key: str) -> str:
        return (_OWNER if shares else _OWN) if by_root else head.status(key)

    return [
        ("namespaces", "namespaces of its own", " ".join(NAMESPACES), namespaces),
        ("namespaces", "pid in its own namespace", f"{process.pid} 1", lambda: status("NSpid")),
        ("namespaces", "uid map", _seen(lambda: inner_id("Uid")) or "", lambda: id_map("uid")),
        ("namespaces", "gid map", _seen(lambda: inner_id("Gid")) or "", lambda: id_map("gid")),
        ("namespaces", "setgroups", "deny", lambda: process.text("setgroups").strip()),
        ("identity", "uids", _seen(lambda: declared_identity("Uid")) or "", lambda: identity("Uid")),
        ("identity", "gids", _seen(lambda: declared_identity("Gid")) or "", lambda: identity("Gid")),
        ("identity", "groups", _seen(declared_groups) or "", lambda: groups(process)),
        ("descriptors", "descriptors", _declared(entry), lambda: _held(process, entry)),
        ("root", "root directory", "a directory" if shares else "empty", root),
        ("root", "mounts", _CONFINED if shares else f"/ {','.join(_MOUNT_FLAGS)}", mounts),
        *(
            ("limits", f"limit on {name}", value, lambda n=name, v=value: process.limit(n, v))
            for name, value in zip(_LIMITS, limits, strict=True)
        ),
        *_capabilities(process, _CAPABILITIES),
        ("no-gain", "no_new_privs", "1", lambda: status("NoNewPrivs")),
        ("no-gain", "dumpable", "no", _dumpable(process)),
        ("parent", "parent", str(head.pid), lambda: status("PPid")),
        ("limits", "threads", "1", lambda: str(len(process.list("task")))),
        ("memory", "writable and executable memory", _NONE, _executable(process)),
        ("memory", "guest memory", "mapped" if entry.guest_memory else _NONE, _guest_memory(process)),
        ("seccomp", "seccomp mode", "2", lambda: status("Seccomp")),
        ("seccomp", "seccomp filters", "2", lambda: status("Seccomp_filters")),
        ("seccomp", "policy", _digest(compile_notify(page, jail.SETUP_CALLS)), policy),
    ]


def _of_all(processes: Sequence[_Process], look: Callable[[_Process], str]) -> set[str]:
    """What `look` gives for those that are still there; raises PermissionError if it is hidden of one."""
    values = set()
    for process in processes:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            values.add(look(process))
    return values


def _is_root(process: _Process) -> bool:
    return _seen(lambda: process.status("Uid")) == "0 0 0 0"


def _capabilities(process: _Process, sets: Sequence[str], keep: int = 0) -> list[Row]:
    declared = f"{keep:016x}" if keep else _NONE
    return [
        ("capabilities", f"capabilities {s}", declared, lambda s=s: process.capabilities(s))  # type: ignore[misc]
        for s in sets
    ]


def _dumpable(process: _Process) -> Look:
    def look() -> str:
        # The kernel gives the files of a process that is not dumpable to root.
        owner = os.stat(f"/proc/{process.pid}/fd").st_uid
        return "no" if owner != int(process.status("Uid").split()[0]) else "yes, or it is root's"

    return look


def _executable(process: _Process) -> Look:
    return lambda: process.mappings(lambda permissions, _: {"w", "x"} <= set(permissions))


def _guest_memory(process: _Process) -> Look:
    def look() -> str:
        # Any other memfd could be the guest's under another name.
        found = process.mappings(
            lambda _, path: path.startswith("/memfd:") and not path.startswith("/memfd:mailbox")
        )
        return _NONE if found == _NONE else "mapped"

    return look


def _declared(entry: Entry) -> str:
    kinds = {0: "null", 1: "null", FD_LOG: "pipe", FD_ACCESS: "socket", FD_CONTROL: "socket"}
    kinds |= {FD_MAILBOX: "mailbox", FD_BELL: "eventfd"}
    for d, numbers in entry.own_slots():
        if d.kind != "line":
            kinds |= dict.fromkeys(numbers, _SHOWN.get(d.kind, "stream"))
    return ", ".join(f"{fd} {kind}" for fd, kind in sorted(kinds.items()))


def _held(process: _Process, entry: Entry) -> str:
    streams = {fd for d, numbers in entry.own_slots() if d.kind not in _SHOWN for fd in numbers}
    # What it has opened since is a matter of its policy and its limit.
    held = {
        int(fd): _kind(process, fd) for fd in process.list("fd") if not entry.opens or int(fd) < entry.held
    }
    for fd in (fd for d, numbers in entry.own_slots() if d.kind == "line" for fd in numbers):
        if held.get(fd) == "socket":  # a connection, which comes and goes
            del held[fd]
    for fd in streams & held.keys():
        if held[fd] in ("pipe", "socket", "null", "terminal", "file"):  # whatever the user gave the console
            held[fd] = "stream"
    return ", ".join(f"{fd} {kind}" for fd, kind in sorted(held.items()))


def _kind(process: _Process, fd: str) -> str:
    target = process.link(f"fd/{fd}")
    if target == "/dev/null":
        return "null"
    if target.startswith("/memfd:guest-memory"):
        return "memory"
    if target.startswith("/memfd:mailbox"):
        return "mailbox"
    if not target.startswith("/"):
        return target.removeprefix("anon_inode:").strip("[]").partition(":")[0]
    mode = os.stat(f"/proc/{process.pid}/fd/{fd}").st_mode
    if stat.S_ISDIR(mode):
        return "directory"
    if stat.S_ISCHR(mode) and target.startswith(("/dev/pts/", "/dev/tty", "/dev/console")):
        return "terminal"
    return "file" if stat.S_ISREG(mode) and not target.startswith("/memfd:") else target


_PTRACE_SEIZE, _PTRACE_INTERRUPT, _PTRACE_DETACH = 0x4206, 0x4207, 17
_PTRACE_SECCOMP_GET_FILTER = 0x420C
_WALL = 0x4000_0000
_BPF_INSN_SIZE = 8
_FILTERS_MAX = 16
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def installed_filters(pid: int) -> list[bytes]:
    """The seccomp programs in force in `pid`, in the order they were loaded; it stands still meanwhile.

    Raises:
        ProcessLookupError: there is no such process.
        OSError: only root may ask, or this kernel was built without CONFIG_CHECKPOINT_RESTORE.
    """
    if os.geteuid() != 0:
        raise PermissionError(errno.EPERM, "only root may ask")
    _ptrace(_PTRACE_SEIZE, pid, 0, None)
    try:
        _ptrace(_PTRACE_INTERRUPT, pid, 0, None)
        os.waitpid(pid, _WALL)
        programs: list[bytes] = []
        while len(programs) < _FILTERS_MAX:
            try:
                size = _ptrace(_PTRACE_SECCOMP_GET_FILTER, pid, len(programs), None)
            except OSError as e:
                if e.errno in (errno.ENOENT, errno.EINVAL):  # no more of them, or none at all
                    break
                raise
            buffer = ctypes.create_string_buffer(size * _BPF_INSN_SIZE)
            _ptrace(_PTRACE_SECCOMP_GET_FILTER, pid, len(programs), buffer)
            programs.append(buffer.raw)
        return programs
    finally:
        _ptrace(_PTRACE_DETACH, pid, 0, None)


def _ptrace(request: int, pid: int, addr: int, data: ctypes.Array[ctypes.c_char] | None) -> int:
    result: int = _libc.ptrace(request, pid, addr, data)
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def _digest(programs: Sequence[bytes]) -> str:
    """SHA-256 over the programs, shortened for people."""
    return hashlib.sha256(b"".join(programs)).hexdigest()[:16] if programs else _NONE
