"""ACPI fixed hardware: the timer, its event, and S5."""

from __future__ import annotations

from typing import Any

import pytest

PM1_STS, PM1_EN, PM1_CNT, PM_TMR = 0, 2, 4, 8
SLP_EN = 0x2000
HALF_S = (1 << 31) / 3_579_545  # between changes of the timer's top bit


@pytest.fixture
def pm(bench: Any) -> Any:
    return bench("acpi-pm")


def read(pm: Any, offset: int, size: int = 2) -> int:
    value: int = pm.model.read(0, offset, size)
    return value


def write(pm: Any, offset: int, data: int, size: int = 2) -> None:
    pm.model.write(0, offset, size, data)


def test_the_timer_runs_at_3_579545_mhz(pm: Any) -> None:
    assert read(pm, PM_TMR, 4) == 0
    pm.advance(10**9)
    assert read(pm, PM_TMR, 4) == 3_579_545


def test_the_timer_wraps_at_32_bits(pm: Any) -> None:
    pm.advance(int(2 * HALF_S * 10**9) + 10**9)
    assert read(pm, PM_TMR, 4) == pytest.approx(3_579_545, abs=10)


def test_sci_is_always_enabled(pm: Any) -> None:
    write(pm, PM1_CNT, 0)
    assert read(pm, PM1_CNT) == 0x0001


@pytest.mark.parametrize("size", [2, 4])
def test_slp_typ_5_powers_off(pm: Any, size: int) -> None:
    write(pm, PM1_CNT, 5 << 10)
    assert not pm.edges
    write(pm, PM1_CNT, 5 << 10 | SLP_EN, size)
    assert pm.edges["poweroff"] == 1
    assert read(pm, PM1_CNT) == 5 << 10 | 1  # SLP_EN reads 0


def test_slp_en_in_a_byte_of_its_own_uses_the_type_written_before(pm: Any) -> None:
    write(pm, PM1_CNT, 5 << 10)
    write(pm, PM1_CNT + 1, (5 << 10 | SLP_EN) >> 8, 1)
    assert pm.edges["poweroff"] == 1


def test_powering_off_without_end_is_counted_edges(pm: Any) -> None:
    """Threat 1."""
    for _ in range(1000):
        write(pm, PM1_CNT, 5 << 10 | SLP_EN)
    assert pm.edges["poweroff"] == pm.model.counters()["poweroffs"] == 1000


@pytest.mark.parametrize("kind", [0, 1, 3, 4, 6, 7])
def test_other_sleep_states_are_ignored(pm: Any, kind: int) -> None:
    """Threat 3."""
    write(pm, PM1_CNT, kind << 10 | SLP_EN)
    assert not pm.edges
    assert pm.model.counters()["ignored_sleeps"] == 1


def test_the_timers_event_comes_once_per_half_turn_until_cleared(pm: Any) -> None:
    """Threat 2."""
    write(pm, PM1_EN, 1)
    pm.advance(int(HALF_S * 10**9) - 10**6)
    assert (read(pm, PM1_STS), pm.edges["irq"]) == (0, 0)
    pm.advance(2 * 10**6)
    assert (read(pm, PM1_STS), pm.edges["irq"]) == (1, 1)
    pm.advance(int(HALF_S * 10**9))
    assert pm.edges["irq"] == 1
    write(pm, PM1_STS, 1)
    assert read(pm, PM1_STS) == 0
    pm.advance(int(HALF_S * 10**9))
    assert pm.edges["irq"] == 2


def test_enabling_a_pending_event_interrupts(pm: Any) -> None:
    pm.advance(int(HALF_S * 10**9) + 10**6)
    assert not pm.edges
    write(pm, PM1_EN, 1)
    assert pm.edges["irq"] == 1


def test_status_bits_are_cleared_only_by_ones(pm: Any) -> None:
    pm.advance(int(HALF_S * 10**9) + 10**6)
    write(pm, PM1_STS, 0xFFFE)
    assert read(pm, PM1_STS) == 1
    write(pm, PM1_STS, 0x01, 1)
    assert read(pm, PM1_STS) == 0


def test_a_process_that_slept_for_hours_sees_one_event(pm: Any) -> None:
    write(pm, PM1_EN, 1)
    pm.sleep(10 * 3600 * 10**9)
    assert pm.edges["irq"] == 1
