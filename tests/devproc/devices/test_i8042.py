"""i8042: the reset line, port B, and probes that end fast."""

from __future__ import annotations

from typing import Any

import pytest

DATA, PORTB, STATUS, COMMAND = 0, 1, 4, 4


@pytest.fixture
def kbc(bench: Any) -> Any:
    return bench("i8042")


def test_command_fe_resets(kbc: Any) -> None:
    kbc.outb(COMMAND, 0xFE)
    assert kbc.edges["reset"] == 1


@pytest.mark.parametrize("command", [0xF0, 0xFA, 0xFC])
def test_pulsing_line_zero_with_others_resets(kbc: Any, command: int) -> None:
    kbc.outb(COMMAND, command)
    assert kbc.edges["reset"] == 1


@pytest.mark.parametrize("command", [0x00, 0x20, 0x60, 0xAA, 0xD1, 0xEE, 0xF1, 0xFD, 0xFF])
def test_nothing_else_resets(kbc: Any, command: int) -> None:
    """Threat 2."""
    before = kbc.model.save()
    kbc.outb(COMMAND, command)
    kbc.outb(DATA, 0xFE)
    assert not kbc.edges
    assert kbc.model.save() == before
    assert kbc.model.counters()["ignored_commands"] == 2


def test_resets_without_end_are_counted_edges(kbc: Any) -> None:
    """Threat 1."""
    for _ in range(1000):
        kbc.outb(COMMAND, 0xFE)
    assert kbc.edges["reset"] == kbc.model.counters()["resets"] == 1000


def test_linux_kb_wait_never_waits(kbc: Any) -> None:
    assert not kbc.inb(STATUS) & 0x02


def test_linux_i8042_flush_gives_up_after_sixteen_bytes(kbc: Any) -> None:
    for _ in range(17):
        assert kbc.inb(STATUS) & 0x01
        assert kbc.inb(DATA) == 0xFF


def test_port_b_keeps_gate_and_speaker_with_out2_set(kbc: Any) -> None:
    kbc.outb(PORTB, 0xFF)
    assert kbc.inb(PORTB) & ~0x10 == 0x23
    kbc.outb(PORTB, 0x00)
    assert kbc.inb(PORTB) & ~0x10 == 0x20


def test_port_b_shows_memory_being_refreshed(kbc: Any) -> None:
    assert kbc.inb(PORTB) & 0x10 != kbc.inb(PORTB) & 0x10


def test_ports_62_and_63_are_nobodys(kbc: Any) -> None:
    assert kbc.model.read(0, 2, 2) == 0xFFFF
    assert kbc.model.counters()["unclaimed_reads"] == 2
