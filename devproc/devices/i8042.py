"""The two things a PC without a keyboard still asks of its 8042: the reset line and port B.

Spec: IBM PC AT Technical Reference (1984), keyboard controller and system-board ports.  Left out: the
controller.  There is no keyboard, mouse or A20 gate, and a driver should find that out fast: the output
buffer always looks full, so Linux's i8042_flush() gives up after 16 bytes with "No controller found"
instead of waiting seconds for a self-test; the input buffer always looks empty, so `reboot=k` never waits.
Where a PIT process owns port B (0x61), the supervisor routes that port there and not here.
"""

from __future__ import annotations

from typing import Annotated, Final

from devproc import state
from devproc.ports import Signal
from devproc.record import record
from devproc.regs import Model, Register, Table
from devproc.state import Range
from devproc.wire import Space

STATUS_OBF: Final = 0x01
PORTB_WRITABLE, PORTB_REFRESH, PORTB_OUT2 = 0x03, 0x10, 0x20
# Commands 0xF0-0xFF pulse those of the four output port lines whose bit is 0; line 0 is the system reset.
PULSE, LINE_RESET = 0xF0, 0x01


@record
class I8042State:
    control: Annotated[int, Range(0, PORTB_WRITABLE)]
    refresh: bool


class I8042(Model):
    """The reset line and port B.

    Ports:
        reset: raised when the guest pulses the system reset line.

    Threats:
        1. The guest asks for a reset over and over → each is one more edge of the same event, and counted.
        2. The guest sends commands and data that expect an answer → nothing is kept of them.
    """

    TABLES = (
        Table(
            Space.PORT,
            5,
            (
                Register("DATA", 0, "RW", "data: always 0xff", "keyboard controller", reset=0xFF, mask=0),
                Register("PORTB", 1, "RW", "GATE2, SPKR, refresh, OUT2", "port 61", reset=0x20, mask=0x03),
                Register("STATUS", 4, "RO", "status: OBF, never IBF", "status register", reset=STATUS_OBF),
                Register("COMMAND", 4, "WO", "command: pulse the output port", "controller commands"),
            ),
        ),
    )

    def __init__(self, *, reset: Signal) -> None:
        super().__init__()
        self._reset = reset
        self._control = 0
        self._refresh = False
        self._counts = {"resets": 0, "ignored_commands": 0}

    def read_DATA(self) -> int:
        return 0xFF

    def write_DATA(self, _data: int) -> None:
        self._counts["ignored_commands"] += 1

    def read_PORTB(self) -> int:
        self._refresh = not self._refresh  # loops that wait for refresh cycles count changes of this bit
        return self._control | (PORTB_REFRESH if self._refresh else 0) | PORTB_OUT2

    def write_PORTB(self, data: int) -> None:
        self._control = data & PORTB_WRITABLE

    def read_STATUS(self) -> int:
        return STATUS_OBF

    def write_COMMAND(self, data: int) -> None:
        if data & PULSE == PULSE and not data & LINE_RESET:
            self._counts["resets"] += 1
            self._reset()
        else:
            self._counts["ignored_commands"] += 1

    def save(self) -> bytes:
        return state.pack(I8042State(self._control, self._refresh))

    def restore(self, data: bytes) -> None:
        s = state.unpack(I8042State, data)
        self._control = s.control
        self._refresh = s.refresh

    def counters(self) -> dict[str, int]:
        return {**super().counters(), **self._counts}
