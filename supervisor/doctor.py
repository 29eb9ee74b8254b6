"""What this host offers, by trying it: KVM and its extensions, the probe guest, every layer of the jail.

Left out: what one VM may additionally need (memory, files, descriptors); `vmsup run` says that by itself.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from devproc import jail, syscalls, zygote
from devproc.catalog import CATALOG
from devproc.channel import ChannelClosed
from devproc.wire import PeerError
from kvmcore import probe
from kvmcore.errors import KvmError, VmsupError
from kvmcore.kvm import Kvm
from kvmcore.mailbox import Mailbox
from supervisor.procstatus import ProcStatus
from supervisor.spawn import host_id

OFFERED: Final = "offered"
NO_HUGE_PAGES: Final = ("never", "deny")
_SHMEM: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_DEVICE: Final = "pci-host"  # the process whose jail is tried: it needs nothing but its channels
_OWN_ID: Final = "own host uid"
_NAMESPACES: Final = {
    "user": syscalls.CLONE_NEWUSER,
    "pid": syscalls.CLONE_NEWPID,
    "mount": syscalls.CLONE_NEWNS,
    "net": syscalls.CLONE_NEWNET,
    "ipc": syscalls.CLONE_NEWIPC,
    "uts": syscalls.CLONE_NEWUTS,
    "cgroup": syscalls.CLONE_NEWCGROUP,
}


@dataclass(frozen=True)
class KvmReport:
    """/dev/kvm: `extensions` by KVM's name for them, `error` the one line that says why it is unusable."""

    present: bool
    permitted: bool
    api_version: int | None
    extensions: dict[str, int]
    instructions: dict[str, str]
    error: str | None

    @property
    def no_stock_kernel(self) -> str | None:
        """Why this KVM cannot run a stock kernel; None if it can."""
        return self.error or probe.first_failure(self.instructions)


@dataclass(frozen=True)
class JailReport:
    """Layer -> OFFERED or why not; `lacking` are those without which the full jail refuses to start."""

    layers: dict[str, str]
    lacking: tuple[str, ...]
    landlock_abi: int | None


@dataclass(frozen=True)
class Report:
    """What `examine` found, as user `uid`; `huge_pages` is the host's policy for those of shared memory."""

    uid: int
    kvm: KvmReport
    jail: JailReport
    huge_pages: str

    @property
    def kvm_runs_stock_kernel(self) -> bool:
        return self.kvm.no_stock_kernel is None

    @property
    def can_run(self) -> bool:
        """Whether `vmsup run` can start a VM here, with the full jail."""
        return self.kvm.error is None and not self.jail.lacking

    def as_json(self) -> dict[str, Any]:
        return {
            "can_run": self.can_run,
            "user": {"uid": self.uid, "root": self.uid == 0},
            "kvm": {
                "present": self.kvm.present,
                "permitted": self.kvm.permitted,
                "api_version": self.kvm.api_version,
                "error": self.kvm.error,
                "extensions": self.kvm.extensions,
                "instructions": self.kvm.instructions,
                "stock_kernel": self.kvm_runs_stock_kernel,
            },
            "memory": {"huge_pages": self.huge_pages},
            "jail": {
                "layers": self.jail.layers,
                "lacking": list(self.jail.lacking),
                "landlock_abi": self.jail.landlock_abi,
            },
        }

    def text(self) -> str:
        """For people; what is missing comes with its reason."""
        kvm = self.kvm
        lines = [f"KVM: {kvm.error or f'usable, API version {kvm.api_version}'}"]
        if kvm.extensions:
            absent = [name for name, value in kvm.extensions.items() if not value]
            lines.append(f"  extensions: {len(kvm.extensions) - len(absent)} of {len(kvm.extensions)}")
            lines += [f"    {name}: absent" for name in absent]
        if kvm.instructions:
            ran = sum(answer == probe.OK for answer in kvm.instructions.values())
            lines.append(f"  guest kernel instructions: {ran} of {len(kvm.instructions)} groups ran")
            lines += [f"    {name}: {a}" for name, a in kvm.instructions.items() if a != probe.OK]
        if kvm.error is None:
            why = kvm.no_stock_kernel
            lines.append(
                f"  {'can' if why is None else 'cannot'} run a stock kernel" + (f": {why}" if why else "")
            )
        lines.append(f"guest memory: huge pages: {self.huge_pages}")
        if self.huge_pages in NO_HUGE_PAGES:
            lines.append(f"  guests are faster with 'advise' in {_SHMEM}")
        lines.append(f"jail, as {'root' if self.uid == 0 else f'uid {self.uid}'}:")
        said = {step.name: f" ({step.describe(CATALOG[_DEVICE])})" for step in jail.STEPS}
        lines += [f"  {name}{said.get(name, '')}: {answer}" for name, answer in self.jail.layers.items()]
        if self.jail.landlock_abi is not None:
            lines.append(f"  Landlock ABI {self.jail.landlock_abi}")
        lines.append("vmsup can run here" if self.can_run else "vmsup cannot run here")
        return "\n".join(lines)


def examine() -> Report:
    """Try everything; takes a second or two.  Nothing that fails here raises: it is what the report says."""
    # The jail first: its zygote is to be forked, as in a real start, before /dev/kvm is opened.
    return Report(
        uid=os.geteuid(), jail=_examine_jail(), kvm=_examine_kvm(), huge_pages=_examine_huge_pages()
    )


def _examine_huge_pages(path: Path = _SHMEM) -> str:
    """The word in brackets of "always within_size [advise] never", and "never" for a kernel without."""
    try:
        return path.read_text(encoding="ascii").partition("[")[2].partition("]")[0]
    except OSError:
        return "never"


def _examine_kvm(path: str = "/dev/kvm") -> KvmReport:
    present = os.path.exists(path)
    try:
        with Kvm(path) as kvm:
            extensions = {cap.name: kvm.check(cap) for cap in (*probe.REQUIRED, *probe.OPTIONAL)}
            missing = [cap.name for cap in probe.REQUIRED if not extensions[cap.name]]
            error = f"this KVM lacks {', '.join(missing)}" if missing else None
            instructions = {} if missing else probe.instructions(kvm)
            return KvmReport(present, True, kvm.api_version, extensions, instructions, error)
    except KvmError as e:
        return KvmReport(present, os.access(path, os.R_OK | os.W_OK), None, {}, {}, str(e))


def _examine_jail() -> JailReport:
    layers: dict[str, str] = {}
    for name, flag in _NAMESPACES.items():
        _, failure = probe.bounded(lambda _, f=flag: syscalls.unshare(syscalls.CLONE_NEWUSER | f))  # type: ignore[misc]
        layers[f"{name} namespace"] = failure or OFFERED
    steps = [s.name for s in jail.plan(jail.Mode.FULL) if not s.always]
    notes, failure = probe.bounded(_try_jail, zygote.READY_WITHIN_S)
    layers |= dict.fromkeys([*steps, _OWN_ID], failure or OFFERED)
    lacking = steps if failure else []
    for level, name, why in (note.split("\t", 2) for note in notes):
        layers[name] = why
        if int(level) >= logging.WARNING:
            lacking.append(name)
    abi_told, _ = probe.bounded(_try_landlock)
    return JailReport(layers, tuple(lacking), int(abi_told[0]) if abi_told else None)


def _try_jail(tell: Callable[[str], None]) -> None:
    """Start a device process in as much of the jail as can be had; tell (level, layer, why) of the rest."""
    _access, its_access = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control, its_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    log = os.open(os.devnull, os.O_WRONLY)
    own_id = host_id(0)
    try:
        pid = zygote.start(mode=jail.Mode.BEST_EFFORT).spawn(
            _DEVICE,
            "doctor",
            [log, its_access.fileno(), its_control.fileno(), *Mailbox.create().fds],
            host_id=own_id,
            mode=jail.Mode.BEST_EFFORT,
        )
        its_control.close()
        greeting = zygote.await_ready(zygote.control_channel(control), _DEVICE, jail.Mode.BEST_EFFORT)
    except ChannelClosed:
        raise VmsupError("the device process died") from None
    except (zygote.SpawnError, PeerError) as e:
        raise VmsupError(str(e)) from None
    for level, text in greeting.notes:
        name, _, why = text.removeprefix("jail: ").partition(": ")
        tell(f"{level}\t{name}\t{why}")
    status = ProcStatus.of(_DEVICE, pid, os.getpid())
    if not own_id:
        tell(f"{logging.DEBUG}\t{_OWN_ID}\tonly root can give each device another uid")
    elif status is None or status.uid != own_id:
        tell(f"{logging.WARNING}\t{_OWN_ID}\tthe device process does not have it")


def _try_landlock(tell: Callable[[str], None]) -> None:
    """Tell the ABI, after denying this process everything it can deny."""
    no_new_privs = next(s for s in jail.STEPS if s.name == "no-gain")
    no_new_privs.apply(jail.Context(CATALOG[_DEVICE], jail.Mode.FULL, (), None, -1))
    tell(str(syscalls.landlock_restrict()))
