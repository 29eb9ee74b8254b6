"""RTC: time in every format, alarms, periodic and update interrupts, memory sizes."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import product
from typing import Any

import pytest

from devproc.devices import rtc as module

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, WEEKDAY, DAY, MONTH, YEAR = range(10)
A, B, C, D, CENTURY = 0x0A, 0x0B, 0x0C, 0x0D, 0x32
SET, PIE, AIE, UIE, DM, H24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
ANY = 0xC0
S = 10**9
GIB, MIB = 1 << 30, 1 << 20


@pytest.fixture
def rtc(bench: Any) -> Any:
    return bench("rtc")


def get(rtc: Any, i: int) -> int:
    rtc.outb(0, i)
    value: int = rtc.inb(1)
    return value


def put(rtc: Any, i: int, value: int) -> None:
    rtc.outb(0, i)
    rtc.outb(1, value)


def at(rtc: Any, *when: int) -> Any:
    rtc.wall_ns = int(datetime(*when, tzinfo=UTC).timestamp()) * S  # type: ignore[arg-type, misc]
    return rtc


def clock(rtc: Any) -> list[int]:
    return [get(rtc, i) for i in (CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS)]


# -- time


def test_the_time_is_utc_in_bcd_by_default(rtc: Any) -> None:
    assert clock(rtc) == [0x20, 0x23, 0x11, 0x14, 3, 0x22, 0x13, 0x20]


def test_binary_mode(rtc: Any) -> None:
    put(rtc, B, DM | H24)
    assert clock(rtc) == [20, 23, 11, 14, 3, 22, 13, 20]


@pytest.mark.parametrize(
    ("hour", "bcd", "binary"),
    [(0, 0x12, 12), (1, 0x01, 1), (11, 0x11, 11), (12, 0x92, 0x8C), (13, 0x81, 0x81), (23, 0x91, 0x8B)],
)
def test_twelve_hour_mode_reads_and_writes(rtc: Any, hour: int, bcd: int, binary: int) -> None:
    at(rtc, 2024, 1, 1, hour)
    for mode, register in ((0, bcd), (DM, binary)):
        put(rtc, B, mode)
        assert get(rtc, HOURS) == register
        put(rtc, HOURS, register)
        put(rtc, B, DM | H24)
        assert get(rtc, HOURS) == hour


@pytest.mark.parametrize(
    ("when", "weekday"), [((2000, 2, 29), 3), ((2024, 12, 31), 3), ((2026, 11, 22), 1), ((1999, 12, 31), 6)]
)
def test_dates_and_weekdays(rtc: Any, when: tuple[int, int, int], weekday: int) -> None:
    put(at(rtc, *when), B, DM | H24)
    century, year, month, day, wd, *_ = clock(rtc)
    assert (century * 100 + year, month, day, wd) == (*when, weekday)


def test_set_freezes_the_time_and_its_release_sets_it(rtc: Any) -> None:
    put(rtc, B, SET | DM | H24)
    rtc.advance(5 * S)
    assert get(rtc, SECONDS) == 20
    for i, value in (
        (CENTURY, 20),
        (YEAR, 30),
        (MONTH, 6),
        (DAY, 15),
        (HOURS, 1),
        (MINUTES, 2),
        (SECONDS, 3),
    ):
        put(rtc, i, value)
    put(rtc, B, DM | H24)
    rtc.advance(61 * S)
    assert clock(rtc) == [20, 30, 6, 15, 7, 1, 3, 4]


def test_set_and_release_without_a_change_loses_only_the_time_between(rtc: Any) -> None:
    put(rtc, B, SET | H24)
    rtc.advance(7 * S)
    put(rtc, B, H24)
    assert get(rtc, SECONDS) == 0x20


def test_a_field_written_while_running_moves_the_clock(rtc: Any) -> None:
    put(rtc, MINUTES, 0x59)
    rtc.advance(60 * S)
    assert (get(rtc, HOURS), get(rtc, MINUTES)) == (0x23, 0x00)


def test_the_offset_survives_a_restore(rtc: Any) -> None:
    put(rtc, YEAR, 0x31)
    assert get(rtc.fork(), YEAR) == 0x31


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({MONTH: 99, DAY: 99}, [23, 12, 31]),
        ({MONTH: 0, DAY: 0}, [23, 1, 1]),
        ({MONTH: 2, DAY: 31}, [23, 2, 28]),
        ({YEAR: 24, MONTH: 2, DAY: 31}, [24, 2, 29]),
        ({HOURS: 255, MINUTES: 255, SECONDS: 255}, [23, 11, 14]),
    ],
)
def test_an_impossible_time_is_brought_into_range(
    rtc: Any, fields: dict[int, int], expected: list[int]
) -> None:
    """Threat 2."""
    put(rtc, B, SET | DM | H24)
    for i, value in fields.items():
        put(rtc, i, value)
    put(rtc, B, DM | H24)
    assert clock(rtc)[1:4] == expected
    assert get(rtc, HOURS) <= 23


@pytest.mark.parametrize("when", [(0, 0, 0, 0), (99, 99, 12, 31), (255, 255, 255, 255)])
def test_the_ends_of_the_calendar_hold(rtc: Any, when: tuple[int, int, int, int]) -> None:
    """Threat 3."""
    put(rtc, B, SET | DM | H24)
    for i, value in zip((CENTURY, YEAR, MONTH, DAY), when, strict=True):
        put(rtc, i, value)
    put(rtc, B, DM | H24 | AIE | UIE)
    for i in (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM):
        put(rtc, i, ANY)
    rtc.sleep(400 * 86400 * S)
    century, year, month, day, *_ = clock(rtc)
    assert 1 <= century * 100 + year <= 9999
    assert 1 <= month <= 12
    assert 1 <= day <= 31
    rtc.fork()


# -- registers A to D


def test_uip_warns_of_the_update_for_244_microseconds(rtc: Any) -> None:
    assert get(rtc, A) == 0x26
    rtc.advance(S - 245_000)
    assert get(rtc, A) == 0x26
    rtc.advance(2_000)
    assert get(rtc, A) == 0xA6
    rtc.advance(242_999)
    assert (get(rtc, A), get(rtc, SECONDS)) == (0xA6, 0x20)
    rtc.advance(1)
    assert (get(rtc, A), get(rtc, SECONDS)) == (0x26, 0x21)


def test_uip_stays_clear_while_set(rtc: Any) -> None:
    put(rtc, B, SET | H24)
    rtc.advance(S - 1000)
    assert get(rtc, A) == 0x26


def test_uip_cannot_be_written(rtc: Any) -> None:
    put(rtc, A, 0xFF)
    assert get(rtc, A) == 0x7F


def test_the_battery_is_good_and_d_is_read_only(rtc: Any) -> None:
    put(rtc, D, 0)
    assert get(rtc, D) == 0x80


def test_set_clears_uie(rtc: Any) -> None:
    put(rtc, B, SET | UIE | H24)
    assert get(rtc, B) == SET | H24


# -- interrupts


def test_the_update_interrupt_comes_once_per_second_when_c_is_read(rtc: Any) -> None:
    put(rtc, B, UIE | H24)
    get(rtc, C)
    for edges in range(1, 4):
        rtc.advance(S)
        assert rtc.edges["irq"] == edges
        assert get(rtc, C) & 0x90 == 0x90
        assert get(rtc, C) == 0x00


def test_without_reading_c_there_is_no_second_edge_and_no_deadline(rtc: Any) -> None:
    put(rtc, B, UIE | PIE | H24)
    rtc.advance(10 * S)
    assert rtc.edges["irq"] == 1
    assert rtc.model.deadline_ns is None


@pytest.mark.parametrize(("rate", "freq_hz"), [(1, 256), (2, 128), (3, 8192), (6, 1024), (15, 2)])
def test_the_periodic_interrupt_keeps_its_rate(rtc: Any, rate: int, freq_hz: int) -> None:
    """Threat 1: at most 8192 interrupts a second, each after a read of C."""
    put(rtc, A, 0x20 | rate)
    put(rtc, B, PIE | H24)
    get(rtc, C)
    reads = 0
    end = rtc.now_ns + S
    while rtc.model.deadline_ns is not None and rtc.model.deadline_ns <= end:
        rtc.advance(rtc.model.deadline_ns - rtc.now_ns)
        assert get(rtc, C) & 0xC0 == 0xC0
        reads += 1
    assert rtc.edges["irq"] == reads == rtc.model.counters()["interrupts"] == freq_hz


@pytest.mark.parametrize("a", [0x20, 0x06, 0x70])
def test_no_rate_or_a_stopped_divider_gives_no_periodic_interrupt(rtc: Any, a: int) -> None:
    put(rtc, A, a)
    put(rtc, B, PIE | H24)
    assert rtc.model.deadline_ns is None
    rtc.advance(S // 2)
    assert get(rtc, C) & 0x40 == 0


def test_flags_are_set_without_their_enable_bits(rtc: Any) -> None:
    rtc.advance(2 * S)
    assert get(rtc, C) == 0x50
    assert not rtc.edges


def test_the_update_flag_waits_for_the_second(rtc: Any) -> None:
    rtc.advance(S - 1)
    assert get(rtc, C) & 0x10 == 0
    rtc.advance(1)
    assert get(rtc, C) & 0x10


def test_moving_the_time_moves_the_alarm(rtc: Any) -> None:
    set_alarm(rtc, 0x22, 0x30, 0x00)
    put(rtc, MINUTES, 0x29)
    rtc.advance(40 * S)
    assert rtc.edges["irq"] == 1


def test_enabling_a_flag_that_is_set_interrupts(rtc: Any) -> None:
    rtc.advance(S)
    put(rtc, B, UIE | H24)
    assert rtc.edges["irq"] == 1


def set_alarm(rtc: Any, hours: int, minutes: int, seconds: int, enable: int = AIE) -> None:
    for i, value in ((HOURS_ALARM, hours), (MINUTES_ALARM, minutes), (SECONDS_ALARM, seconds)):
        put(rtc, i, value)
    get(rtc, C)
    put(rtc, B, enable | H24)


@pytest.mark.parametrize(
    ("alarm", "seconds"),
    [
        ((0x22, 0x13, 0x21), 1),
        ((0x22, 0x14, 0x00), 40),
        ((0x22, 0x13, 0x20), 86400),  # now: tomorrow
        ((0x22, 0x13, 0x19), 86399),
        ((0x00, 0x00, 0x00), 6400),
        ((ANY, ANY, ANY), 1),
        ((0xFF, ANY, 0x05), 45),
        ((ANY, 0x00, 0x00), 2800),
        ((0x03, ANY, ANY), 17200),
        ((ANY, 0x13, ANY), 1),
    ],
)
def test_the_alarm_rings_on_its_second(rtc: Any, alarm: tuple[int, int, int], seconds: int) -> None:
    set_alarm(rtc, *alarm)
    rtc.advance(seconds * S - 1)
    assert not rtc.edges
    rtc.advance(1)
    assert rtc.edges["irq"] == 1
    assert get(rtc, C) & 0xA0 == 0xA0


def test_the_alarm_flag_is_set_without_its_interrupt(rtc: Any) -> None:
    set_alarm(rtc, 0x22, 0x13, 0x25, enable=0)
    rtc.advance(4 * S)
    assert get(rtc, C) & 0x20 == 0
    rtc.advance(S)
    assert get(rtc, C) & 0x20


def test_a_twelve_hour_alarm_knows_the_afternoon(rtc: Any) -> None:
    for i, value in ((HOURS_ALARM, 0x91), (MINUTES_ALARM, 0), (SECONDS_ALARM, 0)):
        put(rtc, i, value)
    put(rtc, B, AIE)
    rtc.advance(2800 * S)
    assert rtc.edges["irq"] == 1


@pytest.mark.parametrize("alarm", [(0x24, ANY, ANY), (ANY, 0x60, ANY), (ANY, ANY, 0x75), (0xBF, 0xBF, 0xBF)])
def test_an_impossible_alarm_never_rings(rtc: Any, alarm: tuple[int, int, int]) -> None:
    set_alarm(rtc, *alarm)
    assert rtc.model.deadline_ns is None
    rtc.sleep(3 * 86400 * S)
    assert not rtc.edges


def test_an_alarm_missed_while_the_process_slept_rings_late_and_once(rtc: Any) -> None:
    set_alarm(rtc, 0x22, 0x14, 0x00)
    rtc.sleep(5 * 86400 * S)
    assert rtc.edges["irq"] == 1


@pytest.mark.parametrize("jump", [10 * 365 * 86400 * S, -10 * 365 * 86400 * S, 3 * S, -3 * S])
def test_a_wall_clock_that_jumps_does_no_harm(rtc: Any, jump: int) -> None:
    """Threat 4."""
    set_alarm(rtc, 0x22, 0x14, 0x00)
    rtc.wall_ns += jump
    rtc.advance(120 * S)
    assert rtc.edges["irq"] <= 1
    get(rtc, C)
    rtc.advance(86400 * S)
    assert rtc.edges["irq"] <= 2


def test_the_search_for_an_alarm_is_short(rtc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threat 4: from any second to any alarm, today or tomorrow."""
    candidates = module._candidates
    steps = 0

    class Counted:
        def __init__(self, *args: int) -> None:
            self.values = candidates(*args)

        def __iter__(self) -> Iterator[int]:
            nonlocal steps
            for value in self.values:
                steps += 1
                yield value

    monkeypatch.setattr(module, "_candidates", Counted)
    for now_s in (0, 1, 43199, 86398, 86399):
        for alarm in product((0, 0x23, ANY), repeat=3):
            rtc.model._alarm = list(alarm)
            steps = 0
            assert rtc.model._next_alarm_s(now_s) > now_s
            assert steps <= 2 * (24 + 60 + 60)


# -- memory


def test_memory_keeps_what_is_written_and_survives_a_restore(rtc: Any) -> None:
    for i in (0x0E, 0x0F, 0x31, 0x33, 0x7F):
        put(rtc, i, i ^ 0xFF)
    other = rtc.fork()
    for i in (0x0E, 0x0F, 0x31, 0x33, 0x7F):
        assert get(other, i) == i ^ 0xFF


def test_the_index_has_seven_bits(rtc: Any) -> None:
    """Threat 5."""
    put(rtc, 0x8F, 0x55)
    assert get(rtc, 0x0F) == 0x55
    for i in range(256):
        put(rtc, i, 0x11)
        assert 0 <= get(rtc, i) <= 0xFF


def test_a_word_write_sets_index_and_data(rtc: Any) -> None:
    rtc.model.write(0, 0, 2, 0x990F)
    assert get(rtc, 0x0F) == 0x99


@pytest.mark.parametrize(
    ("below", "above", "ext_kib", "above_16m", "high"),
    [
        (1 * MIB, 0, 0, 0, 0),
        (8 * MIB, 0, 7 * 1024, 0, 0),
        (256 * MIB, 0, 0xFFFF, (240 * MIB) >> 16, 0),
        (3328 * MIB, 5 * GIB, 0xFFFF, (3312 * MIB) >> 16, 5 * GIB >> 16),
        (3328 * MIB, 1 << 44, 0xFFFF, (3312 * MIB) >> 16, 0xFFFFFF),
    ],
)
def test_memory_sizes(bench: Any, below: int, above: int, ext_kib: int, above_16m: int, high: int) -> None:
    rtc = bench("rtc", mem_below_4g=below, mem_above_4g=above)

    def word(i: int) -> int:
        return get(rtc, i) | get(rtc, i + 1) << 8

    assert word(0x15) == 640
    assert word(0x17) == word(0x30) == ext_kib
    assert word(0x34) == above_16m
    assert word(0x5B) | get(rtc, 0x5D) << 16 == high
