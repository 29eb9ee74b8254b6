"""ACPI fixed hardware: PM1 event and control blocks and the power management timer.

Spec: ACPI 6.5, section 4.8.3.  The timer has 32 bits (the FADT's TMR_VAL_EXT) and there is no legacy mode:
SCI_EN reads 1.  Left out: buttons, the RTC wake-up, bus master status and every sleep state but S5.
"""

from __future__ import annotations

from typing import Annotated, Final

from devproc import state
from devproc.ports import Clock, Signal
from devproc.record import record
from devproc.regs import Model, Register, Table
from devproc.state import U16, U64, Length
from devproc.wire import Space

PM_TIMER_HZ: Final = 3_579_545
TMR_STS: Final = 0x0001
SCI_EN: Final = 0x0001
SLP_EN: Final = 0x2000
SLP_TYP_SHIFT, SLP_TYP_MASK = 10, 7
SLP_TYP_S5: Final = 5  # what the DSDT's \_S5 says
NS: Final = 10**9


@record
class AcpiPmState:
    registers: Annotated[tuple[U16, ...], Length(3, 3)]
    elapsed_ns: U64
    overflows: U64
    sci: bool


class AcpiPm(Model):
    """The fixed registers at PM base.

    Ports:
        irq: raised when an enabled event first becomes pending (the SCI).
        poweroff: raised when the guest enters S5.
        clock: drives the timer.

    Threats:
        1. The guest powers off over and over → each is one more edge of the same event, and counted.
        2. The guest enables the timer's interrupt → it comes at most once per 2^31 ticks (ten minutes).
        3. The guest selects another sleep state → ignored and counted.
    """

    TABLES = (
        Table(
            Space.PORT,
            16,
            (
                # Of the events only the timer's can happen here, so no other bit is implemented.
                Register("PM1_STS", 0, "W1C", "events", "4.8.3.1.1", size=2, mask=TMR_STS, stored=True),
                Register("PM1_EN", 2, "RW", "event enable", "4.8.3.1.2", size=2, mask=0x0721, stored=True),
                Register(
                    "PM1_CNT", 4, "RW", "control", "4.8.3.2.1", size=2, reset=SCI_EN, mask=0x1C02, stored=True
                ),
                Register("PM_TMR", 8, "RO", "timer, 3.579545 MHz", "4.8.3.3", size=4),
            ),
        ),
    )

    def __init__(self, *, irq: Signal, poweroff: Signal, clock: Clock) -> None:
        super().__init__()
        self._irq = irq
        self._poweroff = poweroff
        self._clock = clock
        self._zero_ns = clock()
        self._overflows = 0  # changes of the timer's top bit that PM1_STS has seen
        self._sci = False
        self._counts = {"poweroffs": 0, "ignored_sleeps": 0}

    def read_PM_TMR(self) -> int:
        return self._ticks() & 0xFFFFFFFF

    def write_PM1_STS(self, _data: int) -> None:
        self._update_sci()

    def write_PM1_EN(self, _data: int) -> None:
        self._update_sci()

    def write_PM1_CNT(self, data: int) -> None:
        if not data & SLP_EN:
            return
        if (data >> SLP_TYP_SHIFT) & SLP_TYP_MASK == SLP_TYP_S5:
            self._counts["poweroffs"] += 1
            self._poweroff()
        else:
            self._counts["ignored_sleeps"] += 1

    @property
    def deadline_ns(self) -> int | None:
        return self._zero_ns + -(-((self._overflows + 1) << 31) * NS // PM_TIMER_HZ)

    def on_deadline(self, now_ns: int) -> None:
        overflows = (now_ns - self._zero_ns) * PM_TIMER_HZ // NS >> 31
        if overflows > self._overflows:
            self._overflows = overflows
            self.stored["PM1_STS"] |= TMR_STS
            self._update_sci()

    def save(self) -> bytes:
        elapsed_ns = self._clock() - self._zero_ns
        return state.pack(AcpiPmState(self.stored_values(), elapsed_ns, self._overflows, self._sci))

    def restore(self, data: bytes) -> None:
        s = state.unpack(AcpiPmState, data)
        self.check_stored(s.registers)
        if s.overflows > s.elapsed_ns * PM_TIMER_HZ // NS >> 31:
            raise ValueError(f"{s.overflows} overflows of the timer in {s.elapsed_ns} ns")
        self.restore_stored(s.registers)
        self._zero_ns = self._clock() - s.elapsed_ns
        self._overflows = s.overflows
        self._sci = s.sci

    def counters(self) -> dict[str, int]:
        return {**super().counters(), **self._counts}

    def _ticks(self) -> int:
        return (self._clock() - self._zero_ns) * PM_TIMER_HZ // NS

    def _update_sci(self) -> None:
        before = self._sci
        self._sci = bool(self.stored["PM1_STS"] & self.stored["PM1_EN"])
        if self._sci and not before:
            self._irq()
