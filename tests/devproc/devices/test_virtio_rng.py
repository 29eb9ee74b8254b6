"""The random numbers as a driver asks for them."""

from __future__ import annotations

from typing import Any

import pytest

from devproc.devices.virtio_rng import FILL_MAX
from devproc.driver import PciDriver
from devproc.virtio import spec
from devproc.virtio.chain import Span
from devproc.virtio.device import BATCH

V1 = spec.F_VERSION_1
EVERY_RING = spec.F_INDIRECT_DESC | spec.F_EVENT_IDX | spec.F_RING_PACKED


@pytest.fixture(params=[V1, V1 | EVERY_RING], ids=["split", "packed"])
def rng(request: pytest.FixtureRequest, bench: Any) -> tuple[Any, PciDriver]:
    device = bench("virtio-rng")
    driver = device.driver()
    driver.start(request.param)
    device.pump()
    return device, driver


Rng = tuple[Any, PciDriver]


def test_buffers_are_filled_and_each_with_other_bytes(rng: Rng) -> None:
    device, driver = rng
    driver.queues[0].request(64)
    driver.queues[0].request(8, 8)
    device.kick("kick", 0)
    assert [u.data for u in driver.queues[0].used()] == [b"\1" * 64, b"\2" * 16]
    assert device.edges == {"irq1": 1}
    assert device.model.counters()["bytes"] == 80


def test_nothing_beyond_the_buffer_is_written(rng: Rng) -> None:
    device, driver = rng
    room = driver.queues[0].room(64)
    driver.queues[0].add([], [Span(room.gpa + 16, 32)])
    device.kick("kick", 0)
    assert device.memory.read(*room) == bytes(16) + b"\1" * 32 + bytes(16)


def test_a_huge_buffer_is_filled_in_part(rng: Rng) -> None:
    """Threat 1."""
    device, driver = rng
    driver.queues[0].add([], [Span(8 << 20, 4 << 20)])
    device.kick("kick", 0)
    (used,) = driver.queues[0].used()
    assert used.written == FILL_MAX
    assert device.memory.read((8 << 20) + FILL_MAX, 16) == bytes(16)


def test_what_is_readable_is_given_back_unread(rng: Rng) -> None:
    """Threat 2."""
    device, driver = rng
    driver.queues[0].request(b"nothing to fill")
    driver.queues[0].request(b"before", 4)
    device.kick("kick", 0)
    assert [(u.written, u.data) for u in driver.queues[0].used()] == [(0, b""), (4, b"\2" * 4)]
    assert driver.status == 0x0F


def test_many_buffers_are_filled_in_turns(rng: Rng) -> None:
    """Threat 3."""
    device, driver = rng
    for _ in range(BATCH + 1):
        driver.queues[0].request(1)
    driver.notify(0)
    assert len(driver.queues[0].used()) == BATCH
    device.pump()
    assert len(driver.queues[0].used()) == 1


def test_a_host_without_randomness_gives_fewer_bytes_and_never_others(rng: Rng) -> None:
    """Threat 4."""
    device, driver = rng
    device.model._entropy = lambda size: b"abc"[:size]
    driver.queues[0].request(16)
    driver.queues[0].request(2)
    device.kick("kick", 0)
    assert [u.data for u in driver.queues[0].used()] == [b"abc", b"ab"]
