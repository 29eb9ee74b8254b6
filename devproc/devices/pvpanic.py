"""A port by which the guest says that its kernel has panicked (QEMU docs/specs/pvpanic, the ISA device).

Left out: the PCI variant and the newer "shutdown" event (bit 2).
"""

from __future__ import annotations

from typing import Final

from devproc import state
from devproc.ports import Signal
from devproc.record import record
from devproc.regs import Model, Register, Table
from devproc.wire import Space

PANICKED, CRASHLOADED = 0x01, 0x02
SUPPORTED: Final = PANICKED | CRASHLOADED


@record
class PvPanicState:
    pass


class PvPanic(Model):
    """The event port.

    Ports:
        panic: raised when the guest reports a panic that nothing in it will handle.

    Threats:
        1. The guest reports without end → each write is one more edge of the same event, and counted.
        2. The guest sets bits that mean nothing → they are ignored and counted.
    """

    TABLES = (
        Table(
            Space.PORT,
            1,
            (Register("EVENT", 0, "RW", "events: panicked, crashloaded", "ISA device", reset=SUPPORTED),),
        ),
    )

    def __init__(self, *, panic: Signal) -> None:
        super().__init__()
        self._panic = panic
        self._counts = {"panicked": 0, "crashloaded": 0, "unknown_events": 0}

    def read_EVENT(self) -> int:
        return SUPPORTED

    def write_EVENT(self, data: int) -> None:
        if data & PANICKED:
            self._counts["panicked"] += 1
            self._panic()
        if data & CRASHLOADED:  # a crash kernel takes over in the guest: nothing for us to do
            self._counts["crashloaded"] += 1
        if data & ~SUPPORTED:
            self._counts["unknown_events"] += 1

    def save(self) -> bytes:
        return state.pack(PvPanicState())

    def restore(self, data: bytes) -> None:
        state.unpack(PvPanicState, data)

    def counters(self) -> dict[str, int]:
        return {**super().counters(), **self._counts}
