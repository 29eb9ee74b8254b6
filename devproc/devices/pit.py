"""Programmable interval timer of a PC: Intel 8254 (order 231164-005) and port B, which gates counter 2.

Nothing ticks: each counter is a load time, and count, OUT and the next interrupt are worked out from the
clock.  A count starts when it is written and not at the next CLK pulse, so all is within one tick (838 ns)
of the chip.  Left out: the speaker's sound, and the parity and channel check bits of port B, which read 0.
"""

from __future__ import annotations

from typing import Annotated, Final

from devproc import state
from devproc.ports import Clock, Signal
from devproc.record import record
from devproc.regs import Model, Register, Table
from devproc.state import I64, U8, U16, U64, Length, Range
from devproc.wire import Space

PIT_HZ: Final = 1_193_182
NS: Final = 10**9
MIN_PERIOD_NS: Final = 200_000  # of periodic interrupts; the same limit as KVM's min_timer_period_us
REFRESH_NS: Final = 15_085  # port B bit 4 changes with every memory refresh, 18 ticks

LSB, MSB, BOTH = 1, 2, 3  # RW1, RW0 of the control word
READ_BACK: Final = 3  # SC1, SC0
READ_BACK_NO_COUNT, READ_BACK_NO_STATUS = 0x20, 0x10
STATUS_OUT, STATUS_NULL = 0x80, 0x40
PORTB_GATE2, PORTB_SPKR, PORTB_REFRESH, PORTB_OUT2 = 0x01, 0x02, 0x10, 0x20
_SPAN_NS: Final = 1 << 62  # what is restored must not, as time goes on, outgrow what can be saved


class Counter:
    """One counter.  Times are nanoseconds of the clock, counts are ticks.

    `loaded` is the count being counted down (the counting element's first value) since `start_ns`; `reload`
    is the count register; `null` says that `reload` has not been loaded yet.  In modes 2 and 3 it will be at
    `switch_ns`, the end of the period, in modes 1 and 5 on the next trigger.  While GATE stops the counter
    `frozen` is how far it got.
    """

    def __init__(
        self,
        *,
        mode: int = 3,
        bcd: bool = False,
        rw: int = BOTH,
        reload: int | None = None,
        loaded: int | None = None,
        null: bool = True,
        start_ns: int = 0,
        switch_ns: int = 0,
        gate: bool = True,
        frozen: int | None = None,
        first_byte: int | None = None,
        second_next: bool = False,
        latch: int | None = None,
        status: int | None = None,
    ) -> None:
        self.mode = mode
        self.bcd = bcd
        self.rw = rw
        self.reload = reload
        self.loaded = loaded
        self.null = null
        self.start_ns = start_ns
        self.switch_ns = switch_ns
        self.gate = gate
        self.frozen = frozen
        self.first_byte = first_byte  # of a count being written
        self.second_next = second_next  # the next read gives the high byte
        self.latch = latch
        self.status = status

    def program(self, mode: int, rw: int, bcd: bool) -> None:
        """A control word: OUT takes its initial level and counting waits for a count."""
        self.mode, self.rw, self.bcd = mode, rw, bcd
        self.reload = self.loaded = self.frozen = self.first_byte = self.latch = self.status = None
        self.null = True
        self.second_next = False

    def sync(self, now_ns: int) -> None:
        """Load the new count if the period it waited for is over; comes before any other look at `now_ns`."""
        if (
            self.null
            and self.loaded
            and self.mode in (2, 3)
            and self.frozen is None
            and now_ns >= self.switch_ns
        ):
            self._load(self.switch_ns)

    def write(self, data: int, now_ns: int) -> None:
        """A byte of the count."""
        if self.rw == BOTH and self.first_byte is None:
            self.first_byte = data
            if self.mode == 0:  # the first byte stops the count and takes OUT low
                self.loaded = self.frozen = None
            return
        raw = data if self.rw == LSB else data << 8
        if self.first_byte is not None:
            raw |= self.first_byte
            self.first_byte = None
        self.reload = self._count(raw)
        self.null = True
        if self.mode in (0, 4) or (self.mode in (2, 3) and self.loaded is None):
            self._load(now_ns)
            if not self.gate:
                self.frozen = 0
        elif self.loaded is not None and self.mode in (2, 3) and self.frozen is None:
            periods = self.elapsed(now_ns) // self.loaded + 1
            self.switch_ns = self.start_ns + ticks_ns(periods * self.loaded)

    def read(self, now_ns: int) -> int:
        """A byte of the latched status, the latched count or the count."""
        if self.status is not None:
            status, self.status = self.status, None
            return status
        value = self.value(now_ns) if self.latch is None else self.latch
        high = self.rw == MSB or self.second_next
        if self.rw == BOTH:
            self.second_next = not self.second_next
        if not self.second_next:
            self.latch = None
        return value >> 8 if high else value & 0xFF

    def set_gate(self, level: bool, now_ns: int) -> None:
        if level == self.gate:
            return
        self.gate = level
        if not level:
            if self.loaded is not None and self.mode not in (1, 5):
                self.frozen = self.elapsed(now_ns)
        elif self.mode in (0, 4):
            if self.frozen is not None:
                self.start_ns = now_ns - ticks_ns(self.frozen)
                self.frozen = None
        elif self.reload is not None:  # trigger, or restart of the period
            self._load(now_ns)

    def elapsed(self, now_ns: int) -> int:
        return (now_ns - self.start_ns) * PIT_HZ // NS if self.frozen is None else self.frozen

    def value(self, now_ns: int) -> int:
        """The count as a guest reads it."""
        n = self.loaded
        if n is None:
            return 0
        d = self.elapsed(now_ns)
        if self.mode == 2:
            count = n - d % n
        elif self.mode == 3:  # by two, twice per period
            d %= n
            half = (n + 1) // 2
            count = (n & ~1) - 2 * (d if d < half else d - half)
        else:  # it goes on below zero
            count = n - d
        if not self.bcd:
            return count & 0xFFFF
        return int(str(count % 10000), 16)

    def out(self, now_ns: int) -> bool:
        n = self.loaded
        if n is None:
            return self.mode != 0
        d = self.elapsed(now_ns)
        match self.mode:
            case 0 | 1:
                return d >= n
            case 2:
                return not self.gate or d % n != n - 1
            case 3:
                return not self.gate or d % n < (n + 1) // 2
            case _:
                return d != n

    def next_rise_ns(self, after_ns: int) -> int | None:
        """When OUT next goes high after `after_ns`, as long as nothing is written; None: it does not.

        Asked of counter 0 only, which modes 1 and 5 never load: its gate does not move.
        """
        n = self.loaded
        if n is None or self.frozen is not None:
            return None
        if self.mode in (2, 3):
            return self.start_ns + ticks_ns((self.elapsed(after_ns) // n + 1) * n)
        rise_ns = self.start_ns + ticks_ns(n if self.mode == 0 else n + 1)
        return rise_ns if rise_ns > after_ns else None

    def latch_count(self, now_ns: int) -> None:
        if self.latch is None:  # a second latch command before the read is ignored
            self.latch = self.value(now_ns)

    def latch_status(self, now_ns: int) -> None:
        if self.status is None:
            self.status = (
                (STATUS_OUT if self.out(now_ns) else 0)
                | (STATUS_NULL if self.null else 0)
                | self.rw << 4
                | self.mode << 1
                | self.bcd
            )

    def _load(self, now_ns: int) -> None:
        self.loaded = self.reload
        self.start_ns = now_ns
        self.frozen = None
        self.null = False

    def _count(self, raw: int) -> int:
        """The ticks that 16 bits stand for; 0 is the largest count, and 1 is no period (modes 2 and 3)."""
        if self.bcd:
            count = sum(10**i * (raw >> 4 * i & 0xF) for i in range(4)) % 10000 or 10000
        else:
            count = raw or 0x10000
        return max(count, 2) if self.mode in (2, 3) else count


def ticks_ns(ticks: int) -> int:
    """The first whole nanosecond at which `ticks` have passed."""
    return -(-ticks * NS // PIT_HZ)


Count = Annotated[int, Range(1, 0x10000)]


@record
class CounterState:
    mode: Annotated[int, Range(0, 5)]
    bcd: bool
    rw: Annotated[int, Range(LSB, BOTH)]
    reload: Count | None
    loaded: Count | None
    null: bool
    elapsed_ns: I64
    switch_in_ns: I64
    gate: bool
    frozen: U64 | None
    first_byte: U8 | None
    second_next: bool
    latch: U16 | None
    status: U8 | None

    def __post_init__(self) -> None:
        if self.loaded is not None and self.mode in (2, 3) and self.loaded < 2:
            raise ValueError("a period of one tick")
        if self.frozen is not None and (self.gate or self.loaded is None):
            raise ValueError("frozen without a reason")
        if not self.null and self.reload is None:
            raise ValueError("loaded from nothing")


@record
class PitState:
    counters: Annotated[tuple[CounterState, ...], Length(3, 3)]
    speaker: bool
    due_in_ns: I64 | None
    hold_ns: Annotated[int, Range(0, MIN_PERIOD_NS)]

    def __post_init__(self) -> None:
        if not (self.counters[0].gate and self.counters[1].gate):
            raise ValueError("the gates of counters 0 and 1 are always high")


class Pit(Model):
    """Three counters, the control word and port B.

    Ports:
        irq: raised when OUT of counter 0 rises.
        clock: all counts come from it.

    Threats:
        1. The guest asks for an interrupt every tick or two → periodic interrupts are at least 200 µs apart.
        2. The process was not run for a while → ticks missed are one interrupt, and counted.
        3. The guest writes counts and control words in any order, in halves, in BCD that is none → every
           count is between 1 and 65536 ticks, and the work per access is constant.
    """

    TABLES = (
        Table(
            Space.PORT,
            4,
            (
                Register("COUNTER0", 0, "RW", "count: interrupt 0", "programming", via="COUNTER"),
                Register("COUNTER1", 1, "RW", "count: memory refresh", "programming", via="COUNTER"),
                Register("COUNTER2", 2, "RW", "count: speaker", "programming", via="COUNTER"),
                Register("CONTROL", 3, "WO", "control word, latch, read-back", "control word format"),
            ),
        ),
        Table(
            Space.PORT2,
            1,
            (
                Register(
                    "PORTB", 0, "RW", "GATE2, SPKR, refresh, OUT2", "port 61", reset=PORTB_OUT2, mask=0x03
                ),
            ),
        ),
    )

    def __init__(self, *, irq: Signal, clock: Clock) -> None:
        super().__init__()
        self._irq = irq
        self._clock = clock
        self._counters = [Counter(), Counter(), Counter(gate=False)]
        self._speaker = False
        self._due_ns: int | None = None
        self._not_before_ns = clock()
        self._counts = {"interrupts": 0, "coalesced": 0}

    def read_COUNTER(self, offset: int) -> int:
        now = self._clock()
        counter = self._counters[offset]
        counter.sync(now)
        return counter.read(now)

    def write_COUNTER(self, offset: int, data: int) -> None:
        now = self._clock()
        counter = self._counters[offset]
        if offset != 0:
            counter.sync(now)
            counter.write(data, now)
            return
        self.on_deadline(now)
        counter.write(data, now)
        self._arm(now)

    def write_CONTROL(self, data: int) -> None:
        now = self._clock()
        self.on_deadline(now)
        select = data >> 6
        if select == READ_BACK:
            self._read_back(data, now)
            return
        counter = self._counters[select]
        counter.sync(now)
        rw = data >> 4 & 3
        if rw == 0:
            counter.latch_count(now)
            return
        mode = data >> 1 & 7
        was_high = counter.out(now)
        counter.program(mode if mode < 6 else mode & 3, rw, bool(data & 1))
        if select == 0:
            if counter.out(now) and not was_high:
                self._fire(now)
            self._arm(now)

    def read_PORTB(self) -> int:
        now = self._clock()
        counter = self._counters[2]
        counter.sync(now)
        return (
            (PORTB_GATE2 if counter.gate else 0)
            | (PORTB_SPKR if self._speaker else 0)
            | (PORTB_REFRESH if now // REFRESH_NS & 1 else 0)
            | (PORTB_OUT2 if counter.out(now) else 0)
        )

    def write_PORTB(self, data: int) -> None:
        now = self._clock()
        counter = self._counters[2]
        counter.sync(now)
        counter.set_gate(bool(data & PORTB_GATE2), now)
        self._speaker = bool(data & PORTB_SPKR)

    @property
    def deadline_ns(self) -> int | None:
        return self._due_ns

    def on_deadline(self, now_ns: int) -> None:
        due = self._due_ns
        counter = self._counters[0]
        if due is not None and now_ns >= due:
            if counter.loaded and counter.mode in (2, 3):
                self._counts["coalesced"] += (now_ns - due) * PIT_HZ // NS // counter.loaded
            self._fire(now_ns)
            counter.sync(now_ns)
            self._arm(now_ns)
        else:
            counter.sync(now_ns)

    def save(self) -> bytes:
        now = self._clock()
        return state.pack(
            PitState(
                counters=tuple(
                    CounterState(
                        mode=c.mode,
                        bcd=c.bcd,
                        rw=c.rw,
                        reload=c.reload,
                        loaded=c.loaded,
                        null=c.null,
                        elapsed_ns=now - c.start_ns,
                        switch_in_ns=c.switch_ns - now,
                        gate=c.gate,
                        frozen=c.frozen,
                        first_byte=c.first_byte,
                        second_next=c.second_next,
                        latch=c.latch,
                        status=c.status,
                    )
                    for c in self._counters
                ),
                speaker=self._speaker,
                due_in_ns=None if self._due_ns is None else self._due_ns - now,
                hold_ns=max(0, self._not_before_ns - now),
            )
        )

    def restore(self, data: bytes) -> None:
        s = state.unpack(PitState, data)
        for c in s.counters:
            if max(abs(c.elapsed_ns), abs(c.switch_in_ns)) > _SPAN_NS:
                raise ValueError(f"{c.elapsed_ns} ns and {c.switch_in_ns} ns: more than {_SPAN_NS} from now")
        now = self._clock()
        self._counters = [
            Counter(
                mode=c.mode,
                bcd=c.bcd,
                rw=c.rw,
                reload=c.reload,
                loaded=c.loaded,
                null=c.null,
                start_ns=now - c.elapsed_ns,
                switch_ns=now + c.switch_in_ns,
                gate=c.gate,
                frozen=c.frozen,
                first_byte=c.first_byte,
                second_next=c.second_next,
                latch=c.latch,
                status=c.status,
            )
            for c in s.counters
        ]
        self._speaker = s.speaker
        self._due_ns = None if s.due_in_ns is None else now + s.due_in_ns
        self._not_before_ns = now + s.hold_ns

    def counters(self) -> dict[str, int]:
        return {**super().counters(), **self._counts}

    def _read_back(self, data: int, now_ns: int) -> None:
        for i, counter in enumerate(self._counters):
            if data & 2 << i:
                counter.sync(now_ns)
                if not data & READ_BACK_NO_COUNT:
                    counter.latch_count(now_ns)
                if not data & READ_BACK_NO_STATUS:
                    counter.latch_status(now_ns)

    def _fire(self, now_ns: int) -> None:
        self._not_before_ns = now_ns + MIN_PERIOD_NS
        self._counts["interrupts"] += 1
        self._irq()

    def _arm(self, now_ns: int) -> None:
        """Set the deadline to the next rise of OUT 0 after `now_ns`."""
        counter = self._counters[0]
        self._due_ns = counter.next_rise_ns(now_ns)
        if self._due_ns is not None and counter.mode in (2, 3):
            self._due_ns = max(self._due_ns, self._not_before_ns)
