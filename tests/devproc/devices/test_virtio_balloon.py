"""The balloon: real rings in a real memfd, whose blocks say what the host has got back."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devproc.devices.virtio_balloon import (
    DEFLATE,
    F_DEFLATE_ON_OOM,
    F_PAGE_REPORTING,
    F_STATS_VQ,
    FREE_PAGE,
    INFLATE,
    PAGE_SIZE,
    PFNS_MAX,
    REPORTING,
    STATS,
    VirtioBalloon,
)
from devproc.virtio import spec
from devproc.virtio.chain import Span

ALL = spec.F_VERSION_1 | F_STATS_VQ | F_DEFLATE_ON_OOM | F_PAGE_REPORTING
FREE = 8 << 20  # above the rings; the first of FREE_PAGES that the tests give away
FREE_PAGES = 64
NUM_PAGES, ACTUAL = 0, 4


class Guest:
    """A driver on a bench, with pages of its own that hold something."""

    def __init__(self, bench: Any, features: int = ALL) -> None:
        self.bench = bench
        self.model: VirtioBalloon = bench.model
        self.memory = bench.memory
        self.driver = bench.driver()
        self.driver.start(features)
        self.bench.pump()
        for page in range(FREE_PAGES):
            self.memory.write(FREE + page * PAGE_SIZE, b"in use")

    def blocks(self) -> int:
        """Pages that the host holds for the guest."""
        return os.fstat(self.memory.fd).st_blocks * 512 // PAGE_SIZE

    def send(self, queue: int, *parts: bytes | int) -> None:
        """One buffer to the end."""
        self.driver.queues[queue].request(*parts)
        self.driver.kick(queue)
        self.bench.pump()

    def pages(self, queue: int, pfns: list[int]) -> None:
        self.send(queue, struct.pack(f"<{len(pfns)}I", *pfns))
        assert len(self.driver.queues[queue].used()) == 1

    def count(self, name: str) -> int:
        return self.model.counters()[name]

    def used_pages(self) -> Iterator[int]:
        for page in range(FREE_PAGES):
            if self.memory.read(FREE + page * PAGE_SIZE, 6) == b"in use":
                yield page


@pytest.fixture
def guest(bench: Any) -> Guest:
    return Guest(bench("virtio-balloon"))


FIRST = FREE // PAGE_SIZE


def test_inflating_gives_pages_back_to_the_host(guest: Guest) -> None:
    before = guest.blocks()
    guest.pages(INFLATE, [FIRST + n for n in (3, 4, 5, 9)])
    assert before - guest.blocks() == 4
    assert set(range(FREE_PAGES)) - set(guest.used_pages()) == {3, 4, 5, 9}
    assert guest.count("inflated_pages") == 4
    assert guest.bench.edges[f"irq{INFLATE + 1}"] == 1


def test_a_page_above_4_gib_has_a_number_too(guest: Guest) -> None:
    guest.memory.write(1 << 32, b"high")
    guest.pages(INFLATE, [(1 << 32) // PAGE_SIZE])
    assert guest.memory.read(1 << 32, 4) == bytes(4)


def test_a_page_that_the_guest_takes_again_is_there(guest: Guest) -> None:
    guest.pages(INFLATE, [FIRST])
    before = guest.blocks()
    guest.pages(DEFLATE, [FIRST])
    guest.memory.write(FREE, b"again")
    assert guest.blocks() - before == 1
    assert guest.count("deflated_pages") == 1


def test_deflating_gives_nothing_back(guest: Guest) -> None:
    guest.pages(DEFLATE, [FIRST])
    assert guest.memory.read(FREE, 6) == b"in use"


def test_the_target_is_a_configuration_change(guest: Guest) -> None:
    assert guest.driver.config(NUM_PAGES, 4) == 0
    generation = guest.driver.get(spec.CONFIG_GENERATION, 1)
    guest.model.set("target_mib", 3)
    assert guest.driver.config(NUM_PAGES, 4) == 3 * 256
    assert guest.driver.get(spec.CONFIG_GENERATION, 1) != generation
    assert guest.bench.edges["irq0"] == 1


def test_the_target_is_at_most_all_of_memory(guest: Guest) -> None:
    guest.model.set("target_mib", 1 << 20)
    assert guest.driver.config(NUM_PAGES, 4) * PAGE_SIZE == guest.memory.size


def test_actual_is_what_the_driver_says_until_it_resets_the_device(guest: Guest) -> None:
    guest.driver.set_config(ACTUAL, 4, 0x1_0100)
    assert guest.driver.config(ACTUAL, 4) == 0x1_0100
    assert guest.count("actual_mib") == 257
    guest.model.set("target_mib", 1)
    guest.driver.reset()
    assert guest.driver.config(ACTUAL, 4) == 0
    assert guest.driver.config(NUM_PAGES, 4) == 256, "it is the host's wish, not the driver's"


@pytest.mark.parametrize("queue", [FREE_PAGE, REPORTING], ids=["Linux 6.1", "specification"])
def test_reported_pages_are_given_back_without_being_in_the_balloon(guest: Guest, queue: int) -> None:
    before = guest.blocks()
    ring = guest.driver.queues[queue]
    ring.add([], [Span(FREE, 8 * PAGE_SIZE), Span(FREE + 16 * PAGE_SIZE, PAGE_SIZE)])
    guest.driver.kick(queue)
    guest.bench.pump()
    assert len(ring.used()) == 1
    assert before - guest.blocks() == 9
    assert guest.count("reported_bytes") == 9 * PAGE_SIZE


def stats(*entries: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<HQ", *e) for e in entries)


def test_a_refresh_asks_the_driver_for_new_statistics(guest: Guest) -> None:
    guest.send(STATS, stats((5, 64 << 20), (4, 1 << 20)))
    ring = guest.driver.queues[STATS]
    assert not ring.used(), "the device keeps it to ask with"
    assert guest.count("total_bytes") == 64 << 20 and guest.count("updates") == 1
    before = guest.bench.edges[f"irq{STATS + 1}"]
    guest.model.set("refresh", 1)
    assert len(ring.used()) == 1
    assert guest.bench.edges[f"irq{STATS + 1}"] == before + 1
    guest.send(STATS, stats((4, 2 << 20)))
    assert guest.count("free_bytes") == 2 << 20 and guest.count("updates") == 2
    assert "total_bytes" not in guest.model.counters()


def test_a_refresh_before_there_is_a_driver_is_nothing(bench: Any) -> None:
    bench("virtio-balloon").model.set("refresh", 1)


def test_a_reset_ends_the_conversation_about_statistics(guest: Guest) -> None:
    guest.send(STATS, stats((4, 77)))
    guest.driver.start(ALL)
    assert "free_bytes" not in guest.model.counters()
    guest.model.set("refresh", 1)
    assert not guest.driver.queues[STATS].used()


@pytest.mark.parametrize("twin", [False, True], ids=["saved", "restored"])
def test_the_device_still_has_the_statistics_buffer_after_save(guest: Guest, twin: bool) -> None:
    guest.model.set("target_mib", 2)
    guest.send(STATS, stats((4, 77)))
    bench = guest.bench.fork() if twin else guest.bench
    bench.model.save()
    assert bench.model.counters()["free_bytes"] == 77
    assert bench.model.read_num_pages() == 512
    bench.pump()
    bench.model.set("refresh", 1)
    assert len(guest.driver.queues[STATS].used()) == 1


# -- threats


@pytest.mark.parametrize("pfn", [(16 << 20) // PAGE_SIZE, (1 << 32) // PAGE_SIZE + 256, 0xFFFF_FFFF])
def test_a_page_that_is_not_ram_is_counted(guest: Guest, pfn: int) -> None:
    """Threat 1."""
    before = guest.blocks()
    guest.pages(INFLATE, [pfn])
    guest.pages(DEFLATE, [pfn])
    assert guest.blocks() == before
    assert guest.count("refused_pages") == 2
    assert not guest.driver.status & spec.DEVICE_NEEDS_RESET


def test_a_run_that_leaves_ram_is_left_alone_as_a_whole(guest: Guest) -> None:
    """Threat 1."""
    last = (16 << 20) - PAGE_SIZE
    guest.memory.write(last, b"in use")
    guest.pages(INFLATE, [last // PAGE_SIZE, last // PAGE_SIZE + 1])
    assert guest.memory.read(last, 6) == b"in use"
    assert guest.count("refused_pages") == 2


@pytest.mark.parametrize("queue", [INFLATE, DEFLATE])
def test_a_buffer_of_too_many_page_numbers_needs_a_reset(guest: Guest, queue: int) -> None:
    """Threat 2."""
    guest.pages(queue, [FIRST] * PFNS_MAX)
    guest.send(queue, bytes(4 * PFNS_MAX + 4))
    assert guest.driver.status & spec.DEVICE_NEEDS_RESET
    assert guest.memory.read(0, PAGE_SIZE) == bytes(PAGE_SIZE)
    guest.driver.start(ALL)
    guest.pages(queue, [FIRST + 1])


def test_the_same_page_in_any_order_is_given_back_once(guest: Guest) -> None:
    """Threat 3."""
    guest.pages(INFLATE, [FIRST + n for n in (2, 1, 2, 0, 1, 2)])
    assert guest.count("inflated_pages") == 3
    assert next(guest.used_pages()) == 3


def test_giving_a_ring_away_hurts_that_device_only(guest: Guest) -> None:
    """Threat 3."""
    ring = guest.driver.queues[INFLATE]
    guest.send(INFLATE, struct.pack("<I", ring.desc // PAGE_SIZE))
    guest.driver.notify(INFLATE)
    guest.bench.pump()
    guest.driver.start(ALL)
    guest.pages(INFLATE, [FIRST])


def test_only_whole_pages_are_taken_from_a_report(guest: Guest) -> None:
    """Threat 4."""
    ring = guest.driver.queues[REPORTING]
    ring.add([], [Span(FREE + 1, 2 * PAGE_SIZE), Span(FREE + 8 * PAGE_SIZE + 9, PAGE_SIZE - 9)])
    guest.driver.kick(REPORTING)
    guest.bench.pump()
    assert set(range(FREE_PAGES)) - set(guest.used_pages()) == {1}


def test_one_buffer_at_a_time(guest: Guest) -> None:
    """Threat 5."""
    ring = guest.driver.queues[INFLATE]
    for n in range(5):
        ring.request(struct.pack("<I", FIRST + n))
    guest.driver.kick(INFLATE)
    assert len(ring.used()) == 1
    assert guest.model.deadline_ns == 0, "at once, but after the accesses that wait"
    guest.bench.pump()
    assert len(ring.used()) == 4


def test_statistics_that_are_nonsense_are_not_taken(guest: Guest) -> None:
    """Threat 6."""
    guest.send(STATS, stats((4, 1), (0xFFFF, 2), (10, 3)) + b"odd")
    assert guest.count("free_bytes") == 1
    ring = guest.driver.queues[STATS]
    guest.send(STATS, 64)
    assert [u.written for u in ring.used()] == [0], "the one before"
    assert guest.count("updates") == 2 and "free_bytes" not in guest.model.counters()
    guest.send(STATS, stats(*[(4, n) for n in range(100)]))
    assert guest.count("free_bytes") == 63


@pytest.mark.parametrize("queue", [STATS, FREE_PAGE, REPORTING])
def test_a_queue_without_its_feature_is_not_looked_at(bench: Any, queue: int) -> None:
    """Threat 7."""
    guest = Guest(bench("virtio-balloon"), spec.F_VERSION_1)
    guest.driver.queues[queue].add([], [Span(FREE, PAGE_SIZE)])
    guest.driver.notify(queue)
    guest.bench.pump()
    assert guest.memory.read(FREE, 6) == b"in use"
    assert not guest.driver.queues[queue].used()
    assert not guest.driver.status & spec.DEVICE_NEEDS_RESET


@given(pfns=st.lists(st.integers(FIRST - 2, FIRST + FREE_PAGES - 1), max_size=40), packed=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_exactly_the_pages_that_were_named_are_given_back(bench: Any, pfns: list[int], packed: bool) -> None:
    guest = Guest(bench("virtio-balloon"), ALL | (spec.F_RING_PACKED if packed else 0))
    named = {pfn - FIRST for pfn in pfns}
    if pfns:
        guest.pages(INFLATE, pfns)
    assert set(guest.used_pages()) == set(range(FREE_PAGES)) - named
    assert guest.count("inflated_pages") == len(named)
