"""Which child is which, and what became of it: pid to name to cause."""

from __future__ import annotations

import os
import signal
from typing import Any

from devproc.record import record
from kvmcore.errors import VmsupError
from policies.parse import DIRECTORY
from policies.syscalls import NAMES


@record
class Refused:
    """A system call (x86-64 number, six arguments) that the policy of `device`, a `kind`, does not allow."""

    device: str
    kind: str
    pid: int
    nr: int
    args: tuple[int, ...]

    @property
    def name(self) -> str:
        return NAMES.get(self.nr, "unknown")

    def as_json(self) -> dict[str, Any]:
        """For machines: pointers and flags in hexadecimal, since JSON's readers cut numbers to 53 bits."""
        policy = str(DIRECTORY / f"{self.kind}.policy")
        args = [f"{a:#x}" for a in self.args]
        return {"device": self.device, "pid": self.pid, "nr": self.nr, "name": self.name, "args": args,
                "policy": policy}  # fmt: skip


class DeviceDied(VmsupError):
    """A device process is gone or useless: `name` and, in one phrase, why; `refused` is what it tried."""

    def __init__(self, name: str, cause: str, refused: Refused | None = None) -> None:
        super().__init__(f"{name}: {cause}")
        self.name = name
        self.cause = cause
        self.refused = refused

    def __reduce__(self) -> tuple[type[DeviceDied], tuple[str, str, Refused | None]]:
        return DeviceDied, (self.name, self.cause, self.refused)  # another process may be told


@record
class Fate:
    """What waitid said of a child; `over`: it is gone (and not merely stopped)."""

    pid: int
    over: bool
    cause: str


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def cause(info: os.waitid_result) -> str:
    """What became of a child, as a phrase."""
    match info.si_code:
        case os.CLD_EXITED:
            return f"exited with status {info.si_status}"
        case os.CLD_STOPPED:
            return f"stopped by {_signal_name(info.si_status)}"
        case _:
            return f"killed by {_signal_name(info.si_status)}"


def collect(options: int = os.WNOHANG) -> Fate | None:
    """The next child that ended or was stopped; None when there is none now (or no child at all)."""
    try:
        info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WSTOPPED | options)
    except ChildProcessError:
        return None
    if info is None:
        return None
    return Fate(info.si_pid, info.si_code != os.CLD_STOPPED, cause(info))
