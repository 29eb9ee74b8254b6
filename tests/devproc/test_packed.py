"""devproc.virtio.packed: what only packed rings have; `test_chain` has the rest.

In virtio 1.2:

| section | statement | test |
|---|---|---|
| 2.8.1 | wrap counters | a_ring_of_any_size_... |
| 2.8.3, 2.8.4 | WRITE in a used descriptor: something was written | a_used_descriptor_... |
| 2.8.6 | the id is in the last descriptor; one used descriptor for the list | a_list_is_used_... |
| 2.8.7 | of a table's flags only WRITE counts; WRITE ignored beside INDIRECT | of_a_table_... |
| 2.8.10 | event suppression, DESC only with EVENT_IDX | suppression_... |
| 2.8.10.1, 2.8.11 | alignment, any size | the_areas_may_lie_..., a_ring_of_any_size_... |
| 2.8.15 | only descriptors whose AVAIL bit has changed | what_was_used_..., a_list_that_is_not_... |
| 2.8.17 | lists fit in the ring | a_list_without_end_... |
| 2.8.19 | INDIRECT not in a list | indirect_in_a_list_... |
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import pack

import pytest

from devproc.driver import PackedDriver
from devproc.virtio.chain import Chain, ChainError, Span
from devproc.virtio.packed import PackedQueue
from devproc.virtio.spec import (
    DESC_F_AVAIL,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_USED,
    DESC_F_WRITE,
    F_EVENT_IDX,
    F_INDIRECT_DESC,
)
from kvmcore.memory import GuestMemory

SIZE = 8
TABLE = 0x20000
WRAP = 1 << 15


class Ends:
    """A driver and a device on one ring."""

    def __init__(self, features: int = F_INDIRECT_DESC, size: int = SIZE, position: int = WRAP) -> None:
        self.memory = GuestMemory.create([(0, 1 << 20)])
        self.driver = d = PackedDriver(self.memory, 0x1000, size, features, position, extent=0x10000)
        self.queue = PackedQueue(self.memory, features, size, d.desc, d.driver, d.device, position)

    def put(self, *descriptors: tuple[int, int, int, int]) -> None:
        """(addr, len, id, flags) from the ring's start, all of them available in the first lap."""
        for i, (addr, size, id, flags) in enumerate(descriptors):
            self.driver.descriptor(i, addr, size, id, flags | DESC_F_AVAIL)

    def ring(self, index: int) -> bytes:
        return self.memory.read(self.driver.desc + 16 * index, 16)

    def use(self, written: int) -> Chain:
        chain = self.queue.pop()
        assert chain is not None
        self.queue.push(chain, written)
        return chain


@pytest.fixture
def ends() -> Iterator[Ends]:
    yield Ends()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("features", [0, F_EVENT_IDX])
def test_a_ring_of_any_size_goes_round(size: int, features: int) -> None:
    for start in (0, size - 1, WRAP, WRAP | size - 1):
        ends = Ends(features, size, start)
        for _ in range(3 * size + 1):
            assert ends.queue.pop() is None
            ends.driver.interrupts(1)
            id = ends.driver.request(b"x", *[1] * (size > 2))
            assert ends.driver.kick_wanted()
            assert ends.use(size > 2).id == id
            assert ends.queue.wants_interrupt()
            assert [u.id for u in ends.driver.used()] == [id]


def test_a_list_is_used_by_one_descriptor_in_the_place_of_its_first(ends: Ends) -> None:
    ends.put(
        (0x30000, 1, 0x111, DESC_F_NEXT),
        (0x30001, 2, 0x222, DESC_F_NEXT),
        (0x30003, 3, 0x333, DESC_F_WRITE),
        (0x30006, 4, 0x444, 0),
    )
    rest = [ends.ring(i) for i in (1, 2)]
    chain = ends.use(2)
    assert chain == Chain(0x333, (Span(0x30000, 1), Span(0x30001, 2)), (Span(0x30003, 3),), 3, 3, 3)
    assert ends.ring(0) == pack("<QIHH", 0x30000, 2, 0x333, DESC_F_AVAIL | DESC_F_USED | DESC_F_WRITE)
    assert [ends.ring(i) for i in (1, 2)] == rest
    ends.use(0)
    assert ends.ring(3) == pack("<QIHH", 0x30006, 0, 0x444, DESC_F_AVAIL | DESC_F_USED)


def test_a_used_descriptor_says_whether_anything_was_written(ends: Ends) -> None:
    for written in (0, 5):
        ends.driver.request(b"in", 5)
        ends.use(written)
        assert [u.written for u in ends.driver.used()] == [written]  # which checks WRITE


def test_what_was_used_is_not_available(ends: Ends) -> None:
    for _ in range(2 * SIZE):
        ends.driver.request(1)
        ends.use(1)
        assert ends.queue.pop() is None
        ends.driver.used()


@pytest.mark.parametrize("flags", [0, DESC_F_USED, DESC_F_AVAIL | DESC_F_USED])
def test_a_list_that_is_not_wholly_available_is_an_error(flags: int, ends: Ends) -> None:
    """Threat 2."""
    ends.driver.descriptor(0, 0x30000, 1, 0, DESC_F_AVAIL | DESC_F_NEXT)
    ends.driver.descriptor(1, 0x30000, 1, 0, flags)
    with pytest.raises(ChainError, match="descriptor 1: in a list, but not available"):
        ends.queue.pop()


def test_a_list_over_the_ring_s_end_has_the_bits_of_both_laps() -> None:
    """Threat 2."""
    ends = Ends(position=WRAP | SIZE - 1)
    ends.driver.descriptor(SIZE - 1, 0x30000, 1, 0, DESC_F_AVAIL | DESC_F_NEXT)
    ends.driver.descriptor(0, 0x30000, 1, 0, DESC_F_AVAIL)
    with pytest.raises(ChainError, match="descriptor 0: in a list, but not available"):
        ends.queue.pop()
    ends.driver.descriptor(0, 0x30000, 1, 9, DESC_F_USED)
    chain = ends.queue.pop()
    assert chain == Chain(9, (Span(0x30000, 1),) * 2, (), 2, 0, 2)


@pytest.mark.parametrize("out", [0, 3])
def test_a_list_without_end_is_an_error(out: int, ends: Ends) -> None:
    """Threat 1."""
    for _ in range(out):
        ends.driver.request(b"x")
        assert ends.queue.pop() is not None
    for i in range(out, SIZE):
        ends.driver.descriptor(i, 0x30000, 1, 0x99, DESC_F_AVAIL | DESC_F_NEXT)
    for i in range(out):
        ends.driver.descriptor(i, 0x30000, 1, 0x99, DESC_F_USED)  # it would fit but for what is out
    with pytest.raises(ChainError, match=f"longer than the {SIZE - out} descriptors that are free"):
        ends.queue.pop()


def test_a_list_may_take_the_whole_ring(ends: Ends) -> None:
    for _ in range(3):
        ends.driver.request(*[b"x"] * SIZE)
        assert ends.use(0).descriptors == SIZE
        assert len(ends.driver.used()) == 1


def test_a_full_ring_has_nothing_more_available(ends: Ends) -> None:
    """Threat 1: the driver marks a descriptor of a list that is out as available for the next lap."""
    ends.driver.request(*[b"x"] * SIZE)
    assert ends.queue.pop() is not None
    ends.driver.descriptor(0, 0x30000, 1, 5, DESC_F_USED)
    with pytest.raises(ChainError, match="longer than the 0 descriptors"):
        ends.queue.pop()


@pytest.mark.parametrize(
    "descriptors",
    [
        [(TABLE, 16, 0, DESC_F_INDIRECT | DESC_F_NEXT), (0x30000, 1, 0, 0)],
        [(0x30000, 1, 0, DESC_F_NEXT), (TABLE, 16, 0, DESC_F_INDIRECT)],
    ],
)
def test_indirect_in_a_list_is_an_error(descriptors: list[tuple[int, int, int, int]], ends: Ends) -> None:
    """Threat 3."""
    ends.memory.write(TABLE, pack("<QIHH", 0x30000, 1, 0, 0))
    ends.put(*descriptors)
    with pytest.raises(ChainError, match="INDIRECT in a list"):
        ends.queue.pop()


@pytest.mark.parametrize(
    ("gpa", "size", "why"),
    [
        (TABLE, 0, "table of 0 bytes"),
        (TABLE, 17, "table of 17 bytes"),
        (TABLE, 0xFFFF_FFF0, "table of 4294967280 bytes"),
        ((1 << 20) - 16, 32, "not RAM"),
    ],
)
def test_a_table_of_a_wrong_size_or_place_is_an_error(gpa: int, size: int, why: str, ends: Ends) -> None:
    """Threat 3."""
    ends.put((gpa, size, 0, DESC_F_INDIRECT))
    with pytest.raises(ChainError, match=why):
        ends.queue.pop()


@pytest.mark.parametrize("beside", [0, DESC_F_WRITE])
def test_of_a_table_s_flags_only_write_counts(beside: int, ends: Ends) -> None:
    ends.memory.write(
        TABLE,
        pack("<QIHH", 0x30000, 1, 0xFFFF, 0xFFFF & ~DESC_F_WRITE)
        + pack("<QIHH", 0x40000, 2, 1, DESC_F_WRITE),
    )
    ends.put((TABLE, 32, 7, DESC_F_INDIRECT | beside))
    assert ends.queue.pop() == Chain(7, (Span(0x30000, 1),), (Span(0x40000, 2),), 1, 2, 1)


def test_an_id_that_is_out_is_not_taken_again(ends: Ends) -> None:
    """Threat 5."""
    ends.put((0x30000, 1, 7, 0), (0x30000, 1, 7, 0))
    assert ends.queue.pop() is not None
    with pytest.raises(ChainError, match="chain 7: made available again"):
        ends.queue.pop()


def test_the_areas_may_lie_at_their_least_alignment(ends: Ends) -> None:
    memory = ends.memory
    queue = PackedQueue(memory, F_EVENT_IDX, 2, 0x40010, 0x40104, 0x40108)
    assert queue.pop() is None
    assert memory.read(0x40104, 8) == bytes(4) + pack("<HH", WRAP, 2)
    memory.write(0x40010, pack("<QIHH", 0x50000, 4, 1, DESC_F_AVAIL | DESC_F_WRITE))
    assert queue.pop() == Chain(1, (), (Span(0x50000, 4),), 0, 4, 1)
    assert queue.pop() is None
    assert memory.read(0x40104, 8) == bytes(4) + pack("<HH", WRAP | 1, 2)


@pytest.mark.parametrize(
    ("features", "event", "flags", "wanted"),
    [
        (0, 0, 0, True),
        (0, 0, 1, False),
        (0, 5, 2, True),  # not negotiated, so it means nothing
        (F_EVENT_IDX, 0, 0, True),
        (F_EVENT_IDX, WRAP | 2, 1, False),
        (F_EVENT_IDX, 0, 3, True),  # reserved
        (F_EVENT_IDX, WRAP | 1, 2, False),
        (F_EVENT_IDX, WRAP | 2, 2, True),
        (F_EVENT_IDX, WRAP | 4, 2, True),
        (F_EVENT_IDX, WRAP | 5, 2, False),
        (F_EVENT_IDX, 2, 2, False),  # the same place, in the next lap
        (F_EVENT_IDX, WRAP | 0x7FFF, 2, False),
        (F_EVENT_IDX, 0x7FFF, 2, False),
        (F_EVENT_IDX, WRAP | 1, 0xFFFE, False),  # reserved bits mean nothing
        (0, 0, 0xFFFD, False),
    ],
)
def test_suppression_of_interrupts(features: int, event: int, flags: int, wanted: bool) -> None:
    """Threat 6: descriptors 2 to 4 of the first lap are used."""
    ends = Ends(features)
    ends.driver.request(b"1", b"2")
    ends.use(0)
    ends.queue.wants_interrupt()
    ends.driver.request(b"1", b"2", b"3")
    ends.use(0)
    ends.memory.write(ends.driver.driver, pack("<HH", event, flags))
    assert ends.queue.wants_interrupt() is wanted


def test_suppression_of_interrupts_over_the_ring_s_end() -> None:
    """Threat 6: descriptors 6 and 7 of the first lap and 0 of the second are used."""
    for event, wanted in [(WRAP | 5, 0), (WRAP | 6, 1), (WRAP | 7, 1), (0, 1), (1, 0), (WRAP, 0), (7, 0)]:
        ends = Ends(F_EVENT_IDX, position=WRAP | 6)
        ends.driver.request(b"1", b"2", b"3")
        ends.use(0)
        ends.memory.write(ends.driver.driver, pack("<HH", event, 2))
        assert ends.queue.wants_interrupt() == wanted


def test_an_interrupt_is_wanted_after_more_than_the_ring_holds() -> None:
    """Threat 6: the place that the driver named was passed two laps ago."""
    ends = Ends(F_EVENT_IDX)
    ends.driver.interrupts(1)
    for _ in range(2 * SIZE):
        ends.driver.request(b"x")
        ends.use(0)
        ends.driver.used()
    assert ends.queue.wants_interrupt()


@pytest.mark.parametrize(("features", "idle", "busy"), [(0, 0, 1), (F_EVENT_IDX, 2, 2)])
def test_suppression_of_kicks(features: int, idle: int, busy: int) -> None:
    ends = Ends(features)
    for number in range(SIZE + 1):
        assert ends.queue.pop() is None
        at = number % SIZE | WRAP * (number < SIZE) if features else 0
        assert ends.memory.read(ends.driver.device, 4) == pack("<HH", at, idle)
        ends.driver.request(b"x")
        ends.use(0)
        assert ends.memory.read(ends.driver.device, 4) == pack("<HH", at, busy)
        ends.driver.used()


def test_kicks_are_on_after_a_restore_whatever_the_flags_were() -> None:
    for features, on in ((0, 0), (F_EVENT_IDX, 2)):
        ends = Ends(features)
        ends.memory.write(ends.driver.device + 2, b"\x01")  # it was saved while busy
        assert ends.queue.pop() is None
        assert ends.memory.read(ends.driver.device + 2, 2) == pack("<H", on)
