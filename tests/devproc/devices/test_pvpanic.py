"""pvpanic: what it offers and what a panic does."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def port(bench: Any) -> Any:
    return bench("pvpanic")


def test_reading_gives_the_supported_events(port: Any) -> None:
    assert port.inb(0) == 0x03


def test_panicked_raises_the_signal(port: Any) -> None:
    port.outb(0, 0x01)
    assert port.edges["panic"] == 1


def test_crashloaded_is_the_guests_own_business(port: Any) -> None:
    port.outb(0, 0x02)
    assert not port.edges
    assert port.model.counters()["crashloaded"] == 1


def test_panics_without_end_are_counted_edges(port: Any) -> None:
    """Threat 1."""
    for _ in range(1000):
        port.outb(0, 0x01)
    assert port.edges["panic"] == port.model.counters()["panicked"] == 1000


def test_unknown_events_are_ignored_and_counted(port: Any) -> None:
    """Threat 2."""
    port.outb(0, 0xFC)
    assert not port.edges
    assert port.model.counters()["unknown_events"] == 1
