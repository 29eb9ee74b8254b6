"""How a VM ended: the exit code and the one line that says why (ARCHITECTURE.md)."""

from __future__ import annotations

from devproc.record import record
from kvmcore import errors
from supervisor.reaper import DeviceDied


@record
class Ending:
    """`line` is for stderr, None when there is nothing to say; `died` is the device that was the reason."""

    code: int
    line: str | None = None
    died: DeviceDied | None = None


POWEROFF = Ending(errors.EXIT_POWEROFF)
STOPPED = Ending(errors.EXIT_POWEROFF, "stopped by the user")
RESET = Ending(errors.EXIT_RESET, "the guest asked for a reset")
TRIPLE_FAULT = Ending(errors.EXIT_RESET, "the guest reset itself by a triple fault")
PANIC = Ending(errors.EXIT_PANIC, "the guest panicked")


def crash(line: str) -> Ending:
    return Ending(errors.EXIT_CRASH, line)


def device_died(died: DeviceDied) -> Ending:
    return Ending(errors.EXIT_CRASH, str(died), died)


def by_signal(number: int, name: str) -> Ending:
    """The shell's convention: 128 + the signal's number."""
    return Ending(128 + number, f"ended by {name}")
