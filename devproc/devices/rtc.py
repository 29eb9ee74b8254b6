"""Real-time clock and CMOS memory of a PC: MC146818A (Motorola data sheet, 1984) behind ports 0x70 and 0x71.

The clock is the host's UTC plus an offset that setting the time changes; the day of the week follows from
the date.  CMOS memory holds the sizes of RAM where a PC BIOS leaves them (Ralf Brown's CMOS map) and the
century at 0x32.  Left out: the square wave, daylight saving (DSE is kept and does nothing), power failure
(VRT is always 1), stopping the clock by the divider bits, and the NMI mask in bit 7 of the index, which is
dropped.
"""

from __future__ import annotations

from calendar import monthrange
from datetime import datetime, timedelta
from typing import Annotated, Final

from devproc import state
from devproc.ports import Clock, Signal
from devproc.record import record
from devproc.regs import INDEXED, Model, Register, Table
from devproc.state import U8, Length, Range
from devproc.wire import Space

NS: Final = 10**9
DAY_S: Final = 86400
EPOCH: Final = datetime(1970, 1, 1)
FIRST_S: Final = (datetime(1, 1, 1) - EPOCH) // timedelta(seconds=1)
LAST_S: Final = (datetime(9999, 12, 31, 23, 59, 59) - EPOCH) // timedelta(seconds=1)
TICK_HZ: Final = 32768
UPDATE_WARNING_NS: Final = 244_000  # t_BUC: UIP is set this long before an update
RECHECK_NS: Final = 60 * NS  # the wall clock may jump while we wait on the monotonic one

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, DAY_OF_WEEK, DAY, MONTH, YEAR = range(10)
CENTURY: Final = 0x32
TIME: Final = (SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY, MONTH, YEAR, CENTURY)
ALARM: Final = (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM)
ANY: Final = 0xC0  # an alarm byte with both top bits set matches everything

A_UIP, A_DV, A_DV_RUN, A_RS = 0x80, 0x70, 0x20, 0x0F
B_SET, B_PIE, B_AIE, B_UIE, B_DM, B_24H = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
C_IRQF, C_PF, C_AF, C_UF = 0x80, 0x40, 0x20, 0x10
PM: Final = 0x80  # in HOURS, with the 12-hour clock


@record
class RtcState:
    registers: Annotated[tuple[U8, ...], Length(114, 114)]
    index: Annotated[int, Range(0, 127)]
    a: Annotated[int, Range(0, 0x7F)]
    b: U8
    flags: Annotated[int, Range(0, 0x70)]
    irqf: bool
    alarm: Annotated[tuple[U8, ...], Length(3, 3)]
    frozen: Annotated[tuple[U8, ...], Length(8, 8)]
    offset_s: Annotated[int, Range(-(1 << 40), 1 << 40)]
    seen_ns: Annotated[int, Range(FIRST_S * NS, (LAST_S + 1) * NS)]

    def __post_init__(self) -> None:
        if self.flags & ~(C_PF | C_AF | C_UF):
            raise ValueError(f"register C flags {self.flags:#x} do not exist")
        if self.irqf != bool(self.flags & self.b):
            raise ValueError("IRQF is not what registers B and C make it")


class Rtc(Model):
    """The clock and its memory.

    Ports:
        irq: raised on each rising edge of IRQF.
        clock: paces the interrupts.
        wall: nanoseconds since 1970-01-01 UTC; may jump.
        mem_below_4g, mem_above_4g: bytes of RAM, for the memory size bytes.

    Threats:
        1. The guest asks for 8192 interrupts a second → each needs a read of register C after the last one,
           and there is at most one in 122 µs.
        2. The guest sets an impossible time or alarm → the time is brought into range, the alarm never rings.
        3. The guest sets the time to either end of the calendar → it stays within the years 1 and 9999.
        4. The wall clock jumps by years → finding the next alarm takes a bounded number of steps.
        5. The guest puts anything in the index → 7 bits are used, and there are 128 bytes.
    """

    TABLES = (
        Table(
            Space.PORT,
            2,
            (
                Register("INDEX", 0, "WO", "which of the 128 bytes DATA is", "port 70", mask=0x7F),
                Register("DATA", 1, "RW", "the byte", "port 71"),
            ),
        ),
        Table(
            INDEXED,
            128,
            (
                Register("SECONDS", SECONDS, "RW", "0-59", "table 3", via="TIME"),
                Register("SECONDS_ALARM", SECONDS_ALARM, "RW", "0-59 or any", "table 3", via="ALARM"),
                Register("MINUTES", MINUTES, "RW", "0-59", "table 3", via="TIME"),
                Register("MINUTES_ALARM", MINUTES_ALARM, "RW", "0-59 or any", "table 3", via="ALARM"),
                Register("HOURS", HOURS, "RW", "0-23, or 1-12 and PM", "table 3", via="TIME"),
                Register("HOURS_ALARM", HOURS_ALARM, "RW", "as HOURS, or any", "table 3", via="ALARM"),
                Register("DAY_OF_WEEK", DAY_OF_WEEK, "RW", "1-7, Sunday is 1", "table 3", via="TIME"),
                Register("DAY", DAY, "RW", "1-31", "table 3", via="TIME"),
                Register("MONTH", MONTH, "RW", "1-12", "table 3", via="TIME"),
                Register("YEAR", YEAR, "RW", "0-99", "table 3", via="TIME"),
                Register("A", 0x0A, "RW", "UIP, divider, rate", "register A", reset=0x26, mask=0x7F),
                Register("B", 0x0B, "RW", "SET, interrupt enables, modes", "register B", reset=B_24H),
                Register("C", 0x0C, "RO", "IRQF, PF, AF, UF; a read clears", "register C"),
                Register("D", 0x0D, "RO", "VRT: the battery is good", "register D", reset=0x80, stored=True),
                *(
                    Register(f"RAM_{i:02X}", i, "RW", "CMOS memory", "CMOS map", stored=True)
                    for i in range(0x0E, 128)
                    if i != CENTURY
                ),
                Register("CENTURY", CENTURY, "RW", "0-99", "ACPI 6.5 table 5.9", via="TIME"),
            ),
        ),
    )

    def __init__(
        self, *, irq: Signal, clock: Clock, wall: Clock, mem_below_4g: int, mem_above_4g: int
    ) -> None:
        super().__init__()
        self._irq = irq
        self._clock = clock
        self._wall = wall
        self._index = 0
        self._a = 0x26
        self._b = B_24H
        self._flags = 0
        self._irqf = False
        self._alarm = [0, 0, 0]
        self._frozen = [0] * len(TIME)  # the time registers while SET is 1
        self._offset_s = 0
        self._seen_ns = self._now_ns()  # the flags are right up to here
        self._deadline_ns: int | None = None
        self._interrupts = 0
        self._fill_memory_sizes(mem_below_4g, mem_above_4g)

    # -- registers

    def write_INDEX(self, data: int) -> None:
        self._index = data & 0x7F

    def read_DATA(self) -> int:
        return self.read(INDEXED, self._index, 1)

    def write_DATA(self, data: int) -> None:
        self.write(INDEXED, self._index, 1, data)

    def read_TIME(self, offset: int) -> int:
        return (self._frozen if self._b & B_SET else self._encoded_time())[TIME.index(offset)]

    def write_TIME(self, offset: int, data: int) -> None:
        self._see()
        time = self._frozen if self._b & B_SET else self._encoded_time()
        time[TIME.index(offset)] = data
        if not self._b & B_SET:
            self._set_time(time)
        self._arm()

    def read_ALARM(self, offset: int) -> int:
        return self._alarm[ALARM.index(offset)]

    def write_ALARM(self, offset: int, data: int) -> None:
        self._see()
        self._alarm[ALARM.index(offset)] = data
        self._arm()

    def read_A(self) -> int:
        updating = not self._b & B_SET and self._now_ns() % NS >= NS - UPDATE_WARNING_NS
        return self._a | (A_UIP if updating else 0)

    def write_A(self, data: int) -> None:
        self._see()
        self._a = data & 0x7F
        self._arm()

    def read_B(self) -> int:
        return self._b

    def write_B(self, data: int) -> None:
        self._see()
        was = self._b
        self._b = data & ~B_UIE if data & B_SET else data
        if data & ~was & B_SET:
            self._frozen = self._encoded_time()
        if was & ~data & B_SET:
            self._set_time(self._frozen)
        self._raise()
        self._arm()

    def read_C(self) -> int:
        self._see()
        c = self._flags | (C_IRQF if self._irqf else 0)
        self._flags = 0
        self._irqf = False
        self._arm()
        return c

    # -- the host's side

    @property
    def deadline_ns(self) -> int | None:
        return self._deadline_ns

    def on_deadline(self, now_ns: int) -> None:
        self._see()
        self._arm()

    def save(self) -> bytes:
        return state.pack(
            RtcState(
                registers=self.stored_values(),
                index=self._index,
                a=self._a,
                b=self._b,
                flags=self._flags,
                irqf=self._irqf,
                alarm=tuple(self._alarm),
                frozen=tuple(self._frozen),
                offset_s=self._offset_s,
                seen_ns=self._seen_ns,
            )
        )

    def restore(self, data: bytes) -> None:
        s = state.unpack(RtcState, data)
        self.check_stored(s.registers)
        self.restore_stored(s.registers)
        self._index = s.index
        self._a = s.a
        self._b = s.b
        self._flags = s.flags
        self._irqf = s.irqf
        self._alarm = list(s.alarm)
        self._frozen = list(s.frozen)
        self._offset_s = s.offset_s
        self._seen_ns = s.seen_ns
        self._arm()

    def counters(self) -> dict[str, int]:
        return {**super().counters(), "interrupts": self._interrupts}

    # -- time

    def _now_ns(self) -> int:
        """The RTC's own time since 1970."""
        return min(max(self._wall() + self._offset_s * NS, FIRST_S * NS), LAST_S * NS)

    def _encode(self, value: int) -> int:
        return value if self._b & B_DM else value // 10 << 4 | value % 10

    def _decode(self, data: int) -> int:
        return data if self._b & B_DM else (data >> 4) * 10 + (data & 0x0F)

    def _encoded_time(self) -> list[int]:
        """The registers TIME as they read now."""
        t = EPOCH + timedelta(seconds=self._now_ns() // NS)
        hours = self._encode(t.hour)
        if not self._b & B_24H:
            hours = self._encode(t.hour % 12 or 12) | (PM if t.hour >= 12 else 0)
        rest = (t.isoweekday() % 7 + 1, t.day, t.month, t.year % 100, t.year // 100)
        return [self._encode(t.second), self._encode(t.minute), hours, *map(self._encode, rest)]

    def _decode_hours(self, data: int) -> int:
        """0-23, or more for a byte that is no hour."""
        if self._b & B_24H:
            return self._decode(data)
        hour = self._decode(data & ~PM)
        return hour % 12 + (12 if data & PM else 0) if 1 <= hour <= 12 else 24

    def _set_time(self, encoded: list[int]) -> None:
        """Move the offset so that it is the time in `encoded`, each field brought into range."""
        second, minute, _, _, day, month, year, century = map(self._decode, encoded)
        year = min(max(century * 100 + year, 1), 9999)
        month = min(max(month, 1), 12)
        t = datetime(
            year,
            month,
            min(max(day, 1), monthrange(year, month)[1]),
            min(self._decode_hours(encoded[TIME.index(HOURS)]), 23),
            min(minute, 59),
            min(second, 59),
        )
        self._offset_s = (t - EPOCH) // timedelta(seconds=1) - self._wall() // NS
        self._seen_ns = self._now_ns()

    # -- interrupts

    def _period_shift(self) -> int | None:
        """log2 of the periodic interrupt's period in ticks of 32.768 kHz (table 5); None: off."""
        rate = self._a & A_RS
        if not rate or self._a & A_DV != A_DV_RUN:
            return None
        return rate - 1 if rate > 2 else rate + 6

    def _next_alarm_s(self, after_s: int) -> int | None:
        """The first second after `after_s` that the alarm matches; None: never."""
        second, minute, hour = self._alarm
        seconds = _candidates(second, self._decode(second), 60)
        minutes = _candidates(minute, self._decode(minute), 60)
        hours = _candidates(hour, self._decode_hours(hour), 24)
        start = (after_s + 1) % DAY_S
        today = after_s + 1 - start
        for day in (0, DAY_S):
            for h in hours:
                if day + h * 3600 + 3599 < start:
                    continue
                for m in minutes:
                    if day + h * 3600 + m * 60 + 59 < start:
                        continue
                    for s in seconds:
                        at = day + h * 3600 + m * 60 + s
                        if at >= start:
                            return today + at
        return None

    def _see(self) -> None:
        """Set the flags for what has happened since the last time, and the interrupt that follows."""
        was, now = self._seen_ns, self._now_ns()
        self._seen_ns = now
        if now <= was:  # the wall clock may go back
            return
        shift = self._period_shift()
        if shift is not None and (now * TICK_HZ // NS) >> shift != (was * TICK_HZ // NS) >> shift:
            self._flags |= C_PF
        if not self._b & B_SET and now // NS > was // NS:
            self._flags |= C_UF
            alarm_s = self._next_alarm_s(was // NS)
            if alarm_s is not None and alarm_s <= now // NS:
                self._flags |= C_AF
        self._raise()

    def _raise(self) -> None:
        before = self._irqf
        self._irqf = bool(self._flags & self._b & (C_PF | C_AF | C_UF))
        if self._irqf and not before:
            self._interrupts += 1
            self._irq()

    def _arm(self) -> None:
        """Set the deadline to the next event that would interrupt."""
        self._deadline_ns = None
        if self._irqf:
            return  # the line is up: no further edge before register C is read
        seen = self._seen_ns
        events: list[int] = []
        shift = self._period_shift()
        if self._b & B_PIE and shift is not None:
            tick = ((seen * TICK_HZ // NS >> shift) + 1) << shift
            events.append(-(-tick * NS // TICK_HZ))
        if self._b & B_UIE:
            events.append((seen // NS + 1) * NS)
        if self._b & B_AIE and not self._b & B_SET:
            alarm_s = self._next_alarm_s(seen // NS)
            if alarm_s is not None:
                events.append(alarm_s * NS)
        if events:
            self._deadline_ns = self._clock() + min(min(events) - self._now_ns(), RECHECK_NS)

    def _fill_memory_sizes(self, below_4g: int, above_4g: int) -> None:
        base_kib = 640
        extended_kib = min(max(below_4g - (1 << 20), 0) >> 10, 0xFFFF)
        above_16m = min(max(below_4g - (16 << 20), 0) >> 16, 0xFFFF)
        high = min(above_4g >> 16, 0xFFFFFF)
        for first, size, value in (
            (0x15, 2, base_kib),
            (0x17, 2, extended_kib),
            (0x30, 2, extended_kib),
            (0x34, 2, above_16m),
            (0x5B, 3, high),
        ):
            for i, byte in enumerate(value.to_bytes(size, "little")):
                self.stored[f"RAM_{first + i:02X}"] = byte


def _candidates(raw: int, value: int, limit: int) -> range:
    """The values in [0, limit) that an alarm byte matches."""
    if raw & ANY == ANY:
        return range(limit)
    return range(value, value + 1) if value < limit else range(0)
