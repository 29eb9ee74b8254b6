"""8254: six modes, latches, read-back, BCD, interrupts that never storm, and port B."""

from __future__ import annotations

import re
from typing import Any

import pytest

from devproc.wire import Space

CONTROL = 3
HZ = 1_193_182
S = 10**9
LATCHED = 0xC0


@pytest.fixture
def pit(bench: Any) -> Any:
    return bench("pit")


def ns(ticks: int) -> int:
    return -(-ticks * S // HZ)


def program(pit: Any, counter: int, mode: int, count: int, bcd: int = 0) -> None:
    pit.outb(CONTROL, counter << 6 | 0x30 | mode << 1 | bcd)
    pit.outb(counter, count & 0xFF)
    pit.outb(counter, count >> 8)


def count(pit: Any, counter: int) -> int:
    pit.outb(CONTROL, counter << 6)
    low = pit.inb(counter)
    value: int = low | pit.inb(counter) << 8
    return value


def status(pit: Any, counter: int) -> int:
    pit.outb(CONTROL, 0xE0 | 2 << counter)
    value: int = pit.inb(counter)
    return value


def portb(pit: Any) -> int:
    value: int = pit.inb(0, Space.PORT2)
    return value


def gate2(pit: Any, level: int) -> None:
    pit.outb(0, level, Space.PORT2)


def out(pit: Any, counter: int = 2) -> int:
    return status(pit, counter) >> 7


def wave(pit: Any, ticks: int, counter: int = 2) -> str:
    """OUT in the middle of each of the next ticks."""
    pit.advance(420)
    levels = ""
    for _ in range(ticks):
        levels += str(out(pit, counter))
        pit.now_ns += S // HZ + 1
    return levels


# -- modes, on counter 2 with its gate up


@pytest.fixture
def two(pit: Any) -> Any:
    gate2(pit, 1)
    return pit


def test_mode_0_goes_high_at_terminal_count_and_stays(two: Any) -> None:
    program(two, 2, 0, 5)
    assert wave(two, 12) == "000001111111"


def test_mode_0_counts_on_below_zero(two: Any) -> None:
    program(two, 2, 0, 5)
    two.advance(ns(7))
    assert count(two, 2) == 0xFFFE


def test_mode_0_stops_while_the_gate_is_low(two: Any) -> None:
    program(two, 2, 0, 1000)
    two.advance(ns(100))
    gate2(two, 0)
    two.advance(S)
    assert count(two, 2) == 900
    gate2(two, 1)
    two.advance(ns(100))
    assert count(two, 2) == 800


def test_mode_0_first_byte_of_a_new_count_stops_the_old_one(two: Any) -> None:
    program(two, 2, 0, 2)
    two.advance(ns(3))
    assert out(two) == 1
    two.outb(2, 0x10)
    assert out(two) == 0
    two.advance(S)
    two.outb(2, 0x00)
    two.advance(ns(15))
    assert out(two) == 0
    two.advance(ns(2))
    assert out(two) == 1


def test_mode_1_is_one_shot_from_the_gate_and_retriggers(two: Any) -> None:
    program(two, 2, 1, 4)
    assert wave(two, 6) == "111111"
    gate2(two, 0)
    gate2(two, 1)
    assert wave(two, 3) == "000"
    gate2(two, 0)
    gate2(two, 1)
    assert wave(two, 6) == "000011"


def test_mode_1_takes_a_new_count_at_the_next_trigger(two: Any) -> None:
    program(two, 2, 1, 4)
    gate2(two, 0)
    gate2(two, 1)
    two.outb(2, 2)
    two.outb(2, 0)
    assert wave(two, 6) == "000011"
    gate2(two, 0)
    gate2(two, 1)
    assert wave(two, 4) == "0011"


def test_mode_2_is_low_for_the_last_tick_of_each_period(two: Any) -> None:
    program(two, 2, 2, 4)
    assert wave(two, 12) == "111011101110"


def test_mode_2_counts_from_n_to_one(two: Any) -> None:
    program(two, 2, 2, 3)
    seen = []
    for _ in range(7):
        seen.append(count(two, 2))
        two.advance(S // HZ + 1)
    assert seen == [3, 2, 1, 3, 2, 1, 3]


@pytest.mark.parametrize(("n", "expected"), [(4, "110011001100"), (5, "111001110011"), (2, "101010101010")])
def test_mode_3_is_a_square_wave(two: Any, n: int, expected: str) -> None:
    program(two, 2, 3, n)
    assert wave(two, 12) == expected


def test_mode_3_counts_down_by_two_in_each_half(two: Any) -> None:
    program(two, 2, 3, 6)
    seen = []
    for _ in range(7):
        seen.append(count(two, 2))
        two.advance(S // HZ + 1)
    assert seen == [6, 4, 2, 6, 4, 2, 6]


@pytest.mark.parametrize("mode", [2, 3, 6, 7])
def test_periodic_modes_hold_high_while_the_gate_is_low_and_start_over(two: Any, mode: int) -> None:
    program(two, 2, mode, 100)
    two.advance(ns(99))
    assert out(two) == 0
    gate2(two, 0)
    assert out(two) == 1
    two.advance(S)
    gate2(two, 1)
    assert count(two, 2) == 100


@pytest.mark.parametrize("mode", [2, 3])
def test_periodic_modes_take_a_new_count_at_the_end_of_the_period(two: Any, mode: int) -> None:
    program(two, 2, mode, 4)
    two.advance(ns(1))
    two.outb(2, 10)
    two.outb(2, 0)
    assert status(two, 2) & 0x40
    two.advance(ns(3))
    assert count(two, 2) == 10
    assert not status(two, 2) & 0x40


def test_after_the_switch_every_look_sees_the_new_period(two: Any) -> None:
    def switched() -> Any:
        pit = two.fork()
        pit.now_ns += ns(10) + 400  # 2 ticks and a half into the new period of 1000
        return pit

    program(two, 2, 3, 8)
    two.outb(2, 1000 & 0xFF)
    two.outb(2, 1000 >> 8)
    assert portb(switched()) & 0x20
    stopped = switched()
    gate2(stopped, 0)
    assert count(stopped, 2) == 1000 - 2 * 2
    rewritten = switched()
    rewritten.outb(2, 50)
    rewritten.outb(2, 0)
    rewritten.advance(ns(900))
    assert status(rewritten, 2) & 0x40
    rewritten.advance(ns(100))
    assert not status(rewritten, 2) & 0x40


def test_mode_4_strobes_for_one_tick(two: Any) -> None:
    program(two, 2, 4, 3)
    assert wave(two, 8) == "11101111"


def test_mode_5_strobes_after_the_gate_rises(two: Any) -> None:
    program(two, 2, 5, 3)
    assert wave(two, 5) == "11111"
    gate2(two, 0)
    gate2(two, 1)
    assert wave(two, 6) == "111011"


def test_a_count_of_zero_is_65536(two: Any) -> None:
    program(two, 2, 0, 0)
    two.advance(ns(65535))
    assert out(two) == 0
    two.advance(ns(2))
    assert out(two) == 1


# -- reading and writing


def test_bcd_counts_in_decimal(two: Any) -> None:
    program(two, 2, 2, 0x1000, bcd=1)
    two.advance(ns(1))
    assert count(two, 2) == 0x0999
    program(two, 2, 0, 0x0000, bcd=1)
    two.advance(ns(1))
    assert count(two, 2) == 0x9999


@pytest.mark.parametrize(("rw", "expected"), [(1, 0x0034), (2, 0x3400)])
def test_one_byte_counts(two: Any, rw: int, expected: int) -> None:
    two.outb(CONTROL, 0x80 | rw << 4)
    two.outb(2, 0x34)
    assert two.inb(2) == 0x34
    two.outb(CONTROL, 0x80)
    assert two.inb(2) == 0x34
    two.advance(ns(expected + 1))
    assert out(two) == 1


def test_a_latched_count_holds_until_it_is_read_whole(two: Any) -> None:
    program(two, 2, 0, 0x1234)
    two.outb(CONTROL, 0x80)
    two.advance(ns(0x101))
    two.outb(CONTROL, 0x80)  # ignored: the first latch is still unread
    assert two.inb(2) == 0x34
    two.advance(ns(0x100))
    assert two.inb(2) == 0x12
    assert two.inb(2) == 0x33  # live again


def test_read_back_latches_status_and_counts_of_several_counters(two: Any) -> None:
    program(two, 0, 2, 1000)
    program(two, 2, 3, 500)
    two.outb(CONTROL, LATCHED | 0x0A)
    two.advance(S)
    assert two.inb(0) == 0x80 | 0x30 | 2 << 1
    assert two.inb(0) | two.inb(0) << 8 == 1000
    assert two.inb(2) == 0x80 | 0x30 | 3 << 1
    assert two.inb(2) | two.inb(2) << 8 == 500


def test_a_control_word_starts_over_with_the_low_byte(two: Any) -> None:
    program(two, 2, 0, 0x1234)
    two.inb(2)
    program(two, 2, 0, 0x5678)
    assert [two.inb(2), two.inb(2)] == [0x78, 0x56]


def test_null_count_is_set_until_a_count_is_loaded(two: Any) -> None:
    two.outb(CONTROL, 0xB4)
    assert status(two, 2) == 0x80 | 0x40 | 0x30 | 2 << 1
    two.outb(2, 1)
    assert status(two, 2) & 0x40
    two.outb(2, 1)
    assert not status(two, 2) & 0x40


@pytest.mark.parametrize("mode", range(8))
@pytest.mark.parametrize("bcd", [0, 1])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 0x9999, 0xABCD, 0xFFFF])
def test_every_count_in_every_mode_does_no_harm(pit: Any, mode: int, bcd: int, n: int) -> None:
    """Threat 3."""
    for counter in range(3):
        program(pit, counter, mode, n, bcd)
        pit.outb(counter, 0x55)  # half of another count
        for ticks in (0, 1, 2, 65535, 65536, 10**7):
            pit.sleep(ns(ticks))
            assert 0 <= count(pit, counter) <= 0xFFFF
            assert status(pit, counter) >= 0
    pit.fork()


# -- interrupts


@pytest.mark.parametrize("mode", [2, 3])
def test_counter_0_interrupts_at_exactly_its_rate(pit: Any, mode: int) -> None:
    program(pit, 0, mode, 11932)  # HZ=100
    pit.advance(10 * S)
    assert pit.edges["irq"] == 10 * HZ // 11932
    assert pit.model.counters()["coalesced"] == 0


def test_rate_does_not_drift_when_every_wake_up_is_late(pit: Any) -> None:
    program(pit, 0, 2, 11932)
    end = pit.now_ns + 10 * S
    while pit.model.deadline_ns <= end:
        pit.sleep(pit.model.deadline_ns - pit.now_ns + 300_000)
    assert pit.edges["irq"] == pytest.approx(10 * HZ / 11932, abs=1)


def test_a_new_rate_starts_at_the_end_of_the_period(pit: Any) -> None:
    program(pit, 0, 2, 11932)
    pit.advance(ns(6000))
    pit.outb(0, 1193 & 0xFF)
    pit.outb(0, 1193 >> 8)
    pit.advance(ns(5900))
    assert not pit.edges
    pit.advance(ns(32 + 100 * 1193))
    assert pit.edges["irq"] == pit.model.counters()["interrupts"] == 101


def test_mode_0_interrupts_once(pit: Any) -> None:
    program(pit, 0, 0, 1000)
    pit.advance(ns(1000) - 1)
    assert not pit.edges
    pit.advance(10 * S)
    assert pit.edges["irq"] == 1
    assert pit.model.deadline_ns is None


def test_mode_4_interrupts_after_its_strobe(pit: Any) -> None:
    program(pit, 0, 4, 1000)
    pit.advance(ns(1001) - 1)
    assert not pit.edges
    pit.advance(S)
    assert pit.edges["irq"] == 1


@pytest.mark.parametrize("mode", [1, 5])
def test_hardware_triggered_modes_never_fire_on_counter_0(pit: Any, mode: int) -> None:
    program(pit, 0, mode, 100)
    pit.advance(S)
    assert not pit.edges


def test_leaving_mode_0_before_terminal_count_raises_out(pit: Any) -> None:
    program(pit, 0, 0, 1000)
    pit.outb(CONTROL, 0x34)
    assert pit.edges["irq"] == 1


def test_reprogramming_stops_the_old_interrupt(pit: Any) -> None:
    program(pit, 0, 2, 1000)
    pit.outb(CONTROL, 0x30)
    assert pit.model.deadline_ns is None
    pit.advance(S)
    assert not pit.edges


def test_an_edge_that_is_due_is_not_lost_to_a_write(pit: Any) -> None:
    program(pit, 0, 0, 1000)
    pit.now_ns += ns(2000)  # the access comes before the deadline is served
    pit.outb(CONTROL, 0x30)
    assert pit.edges["irq"] == 1


def test_other_counters_do_not_interrupt(pit: Any) -> None:
    gate2(pit, 1)
    program(pit, 1, 2, 18)
    program(pit, 2, 3, 1000)
    pit.advance(S)
    assert not pit.edges
    assert pit.model.deadline_ns is None


@pytest.mark.parametrize(("mode", "n"), [(2, 1), (2, 2), (3, 1), (3, 2), (2, 100)])
def test_periods_of_a_few_ticks_interrupt_at_most_every_200_microseconds(pit: Any, mode: int, n: int) -> None:
    """Threat 1."""
    program(pit, 0, mode, n)
    pit.advance(S)
    assert 4900 <= pit.edges["irq"] <= 5000


def test_ticks_missed_while_the_process_slept_are_one_interrupt(pit: Any) -> None:
    """Threat 2."""
    program(pit, 0, 2, 11932)
    pit.sleep(60 * S)
    assert pit.edges["irq"] == 1
    assert pit.model.counters()["coalesced"] == 60 * HZ // 11932 - 1
    pit.advance(S)
    assert pit.edges["irq"] == pytest.approx(101, abs=1)


def test_no_count_written_means_no_interrupt(pit: Any) -> None:
    assert pit.model.deadline_ns is None
    pit.outb(CONTROL, 0x34)
    pit.outb(0, 0x10)
    assert pit.model.deadline_ns is None


# -- port B


def test_port_b_shows_gate_speaker_and_out2(pit: Any) -> None:
    program(pit, 2, 0, 100)
    for value in (0, 1, 2, 3):
        pit.outb(0, 0xFC | value, Space.PORT2)
        assert portb(pit) & 0xEF == value
    pit.advance(ns(101))
    assert portb(pit) & 0xEF == 0x23


def test_port_b_refresh_toggles_with_the_clock(pit: Any) -> None:
    seen = 0
    last = portb(pit) & 0x10
    for _ in range(1000):
        pit.advance(1000)
        seen += (portb(pit) & 0x10) != last
        last = portb(pit) & 0x10
    assert seen == pytest.approx(1_000_000 / 15_085, abs=1)


def test_linux_calibrates_the_tsc_with_counter_2(pit: Any) -> None:
    # arch/x86/kernel/tsc.c: pit_calibrate_tsc() waits for OUT2, quick_pit_calibrate() for the high byte
    latch = HZ // 20
    pit.outb(0, (portb(pit) & ~0x02) | 0x01, Space.PORT2)
    program(pit, 2, 0, latch)
    start = pit.now_ns
    while not portb(pit) & 0x20:
        pit.advance(10_000)
    assert pit.now_ns - start == pytest.approx(S / 20, abs=20_000)

    program(pit, 2, 0, 0xFFFF)
    high = []
    for _ in range(1000):
        pit.advance(1000)
        pit.inb(2)
        high.append(pit.inb(2))
    assert high[0] == 0xFF
    assert high[-1] == (0xFFFF - 1_000_000 * HZ // S) >> 8
    assert high == sorted(high, reverse=True)


def test_a_state_too_far_from_now_to_be_saved_again_later_is_refused(pit: Any) -> None:
    state = pit.model.save()
    for field in ("elapsed_ns", "switch_in_ns"):
        far = re.sub(
            rb'"%s":-?\d+' % field.encode(), b'"%s":%d' % (field.encode(), -(1 << 63)), state, count=1
        )
        with pytest.raises(ValueError, match="from now"):
            pit.model.restore(far)
