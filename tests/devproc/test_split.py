"""devproc.virtio.split: what only split rings have; `test_chain` has the rest.

In virtio 1.2:

| section | statement | test |
|---|---|---|
| 2.7 | queue size a power of 2 | test_chain: a_size_that_... |
| 2.7.1 | alignment of the areas | the_areas_may_lie_... |
| 2.7.5.2 | no loops | a_loop_... |
| 2.7.5.3.1 | no table in a table, no INDIRECT with NEXT | a_table_in_a_table_..., indirect_and_next_... |
| 2.7.5.3.2 | WRITE ignored beside INDIRECT | the_write_flag_... |
| 2.7.5.3.2 | normal descriptors followed by an indirect one | a_table_may_follow_... |
| 2.7.6, 2.7.6.1 | idx only increases, by at most the queue size | an_index_that_... |
| 2.7.7.2 | used_event ignored without EVENT_IDX, flags with it | only_the_negotiated_... |
| 2.7.10.2 | flags 0 with EVENT_IDX, 0 or 1 without | flags_of_the_used_ring_... |
| 2.7.13.3 | idx wraps at 65536 | indices_wrap |
"""

from __future__ import annotations

from collections.abc import Callable
from struct import pack

import pytest

from devproc.driver import SplitDriver
from devproc.virtio.chain import Chain, ChainError, Queue, Span
from devproc.virtio.spec import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    F_EVENT_IDX,
    F_INDIRECT_DESC,
)
from devproc.virtio.split import SplitQueue, split_queue
from kvmcore.memory import GuestMemory

Kind = Callable[..., Queue]
SIZE = 8
TABLE = 0x20000


class Ends:
    """A driver and a device on one ring."""

    def __init__(self, kind: Kind = SplitQueue, features: int = F_INDIRECT_DESC, position: int = 0) -> None:
        self.memory = GuestMemory.create([(0, 1 << 20)])
        self.driver = d = SplitDriver(self.memory, 0x1000, SIZE, features, position, extent=0x10000)
        self.queue = kind(self.memory, features, SIZE, d.desc, d.driver, d.device, position)

    def table(self, *descriptors: tuple[int, int, int, int]) -> None:
        self.memory.write(TABLE, b"".join(pack("<QIHH", *d) for d in descriptors))

    def avail(self, **words: int) -> None:
        at = {"flags": 0, "used_event": 4 + 2 * SIZE}
        for name, value in words.items():
            self.memory.write(self.driver.driver + at[name], pack("<H", value))

    def used_flags(self) -> int:
        return int.from_bytes(self.memory.read(self.driver.device, 2), "little")

    def avail_event(self) -> int:
        return int.from_bytes(self.memory.read(self.driver.device + 4 + 8 * SIZE, 2), "little")

    def use_one(self) -> None:
        self.driver.request(1)
        chain = self.queue.pop()
        assert chain is not None
        self.queue.push(chain, 1)


kinds = pytest.mark.parametrize("kind", [SplitQueue, split_queue], ids=["python", "C"])


@pytest.fixture(params=[SplitQueue, split_queue], ids=["python", "C"])
def ends(request: pytest.FixtureRequest) -> Ends:
    return Ends(request.param)


def test_an_index_that_runs_ahead_is_an_error(ends: Ends) -> None:
    """Threat 1."""
    ends.driver.idx = SIZE + 1
    with pytest.raises(ChainError, match=r"avail.idx 0x9 is 9 ahead, 0 are out: size 8"):
        ends.queue.pop()


def test_an_index_that_runs_backwards_is_an_error(ends: Ends) -> None:
    """Threat 1."""
    for _ in range(3):
        ends.use_one()
    ends.driver.idx = 2
    with pytest.raises(ChainError, match="65535 ahead"):
        ends.queue.pop()


def test_chains_that_are_out_take_their_place_in_the_ring(ends: Ends) -> None:
    """Threat 1."""
    for _ in range(SIZE):
        ends.driver.request(1)
    assert sum(1 for _ in iter(ends.queue.pop, None)) == SIZE
    ends.driver.idx += 1
    with pytest.raises(ChainError, match="1 ahead, 8 are out: size 8"):
        ends.queue.pop()


@kinds
def test_the_areas_may_lie_at_their_least_alignment(kind: Kind) -> None:
    memory = GuestMemory.create([(0, 1 << 20)])
    queue = kind(memory, F_EVENT_IDX, 2, 0x40010, 0x40102, 0x40204)
    memory.write(0x40010, pack("<QIHH", 0x50000, 4, DESC_F_WRITE, 0))
    memory.write(0x40102, pack("<HHHHH", 0, 1, 0, 0, 0))
    chain = queue.pop()
    assert chain == Chain(0, (), (Span(0x50000, 4),), 0, 4, 1)
    queue.push(chain, 3)
    assert memory.read(0x40204, 22) == pack("<HHIIIIH", 0, 1, 0, 3, 0, 0, 0)
    assert queue.pop() is None
    assert memory.read(0x40204 + 20, 2) == pack("<H", 1)


@pytest.mark.parametrize("head", [SIZE, 0x7FFF, 0xFFFF])
def test_a_head_beyond_the_table_is_an_error(head: int, ends: Ends) -> None:
    """Threat 2."""
    ends.driver.offer(head)
    with pytest.raises(ChainError, match=f"chain {head}: descriptor {head} of a table of 8"):
        ends.queue.pop()


def test_a_next_beyond_its_table_is_an_error(ends: Ends) -> None:
    """Threat 2."""
    ends.driver.descriptor(0, 0x30000, 1, DESC_F_NEXT, SIZE)
    ends.driver.offer(0)
    with pytest.raises(ChainError, match="chain 0: descriptor 8 of a table of 8"):
        ends.queue.pop()
    ends.table((0x30000, 1, DESC_F_NEXT, 1), (0x30000, 1, DESC_F_NEXT, 2), (0x30000, 1, 0, 0))
    ends.driver.descriptor(0, TABLE, 32, DESC_F_INDIRECT)
    with pytest.raises(ChainError, match="chain 0: descriptor 2 of an indirect table of 2"):
        ends.queue.pop()


@pytest.mark.parametrize("length", [1, 2, SIZE])
def test_a_loop_is_an_error(length: int, ends: Ends) -> None:
    """Threat 3."""
    for i in range(length):
        ends.driver.descriptor(i, 0x30000, 1, DESC_F_NEXT, (i + 1) % length)
    ends.driver.offer(0)
    with pytest.raises(ChainError, match="chain 0: a loop in the table of 8"):
        ends.queue.pop()


def test_a_chain_may_take_the_whole_table(ends: Ends) -> None:
    ends.driver.request(*[b"x"] * SIZE)
    chain = ends.queue.pop()
    assert chain is not None
    assert chain.descriptors == chain.read_size == SIZE


def test_a_loop_in_a_table_is_an_error(ends: Ends) -> None:
    """Threat 3."""
    ends.table((0x30000, 1, DESC_F_NEXT, 1), (0x30000, 1, DESC_F_NEXT, 0))
    ends.driver.descriptor(0, TABLE, 32, DESC_F_INDIRECT)
    ends.driver.offer(0)
    with pytest.raises(ChainError, match="chain 0: a loop in the indirect table of 2"):
        ends.queue.pop()


def test_a_table_is_followed_by_next_and_need_not_be_full(ends: Ends) -> None:
    ends.table((0x30000, 1, DESC_F_NEXT, 2), (0, 0, DESC_F_INDIRECT, 9), (0x40000, 2, DESC_F_WRITE, 7))
    ends.driver.descriptor(3, TABLE, 48, DESC_F_INDIRECT)
    ends.driver.offer(3)
    assert ends.queue.pop() == Chain(3, (Span(0x30000, 1),), (Span(0x40000, 2),), 1, 2, 1)


@pytest.mark.parametrize("flags", [0, DESC_F_WRITE])
def test_a_table_may_follow_normal_descriptors(flags: int, ends: Ends) -> None:
    ends.table((0x40000, 2, 0, 0))
    ends.driver.descriptor(5, 0x30000, 1, DESC_F_NEXT, 2)
    ends.driver.descriptor(2, TABLE, 16, DESC_F_INDIRECT | flags)
    ends.driver.offer(5)
    assert ends.queue.pop() == Chain(5, (Span(0x30000, 1), Span(0x40000, 2)), (), 3, 0, 2)


def test_the_write_flag_beside_indirect_is_ignored(ends: Ends) -> None:
    ends.table((0x40000, 2, 0, 0))
    ends.driver.descriptor(0, TABLE, 16, DESC_F_INDIRECT | DESC_F_WRITE)
    ends.driver.offer(0)
    assert ends.queue.pop() == Chain(0, (Span(0x40000, 2),), (), 2, 0, 1)


def test_a_table_in_a_table_is_an_error(ends: Ends) -> None:
    """Threat 4."""
    ends.table((0x30000, 1, DESC_F_NEXT, 1), (TABLE, 16, DESC_F_INDIRECT, 0))
    ends.driver.descriptor(0, TABLE, 32, DESC_F_INDIRECT)
    ends.driver.offer(0)
    with pytest.raises(ChainError, match="an indirect table inside another"):
        ends.queue.pop()


def test_indirect_and_next_in_one_descriptor_are_an_error(ends: Ends) -> None:
    """Threat 4."""
    ends.driver.descriptor(0, TABLE, 16, DESC_F_INDIRECT | DESC_F_NEXT, 1)
    ends.driver.offer(0)
    with pytest.raises(ChainError, match="INDIRECT and NEXT"):
        ends.queue.pop()


@pytest.mark.parametrize(
    ("gpa", "size", "why"),
    [
        (TABLE, 0, "table of 0 bytes"),
        (TABLE, 15, "table of 15 bytes"),
        (TABLE, 17, "table of 17 bytes"),
        (TABLE, 0xFFFF_FFF0, "table of 4294967280 bytes"),
        ((1 << 20) - 16, 32, "not RAM"),
        ((1 << 64) - 16, 16, "not RAM"),
    ],
)
def test_a_table_of_a_wrong_size_or_place_is_an_error(gpa: int, size: int, why: str, ends: Ends) -> None:
    """Threat 4."""
    ends.driver.descriptor(0, gpa, size, DESC_F_INDIRECT)
    ends.driver.offer(0)
    with pytest.raises(ChainError, match=why):
        ends.queue.pop()


def test_a_head_that_is_out_is_not_taken_again(ends: Ends) -> None:
    """Threat 6."""
    head = ends.driver.request(1)
    chain = ends.queue.pop()
    assert chain is not None
    ends.driver.offer(head)
    with pytest.raises(ChainError, match=f"chain {head}: made available again"):
        ends.queue.pop()
    ends.queue.push(chain, 1)
    assert ends.queue.pop() == chain


@kinds
@pytest.mark.parametrize("event_idx", [False, True])
def test_only_the_negotiated_suppression_of_interrupts_counts(kind: Kind, event_idx: bool) -> None:
    """Threat 7."""
    ends = Ends(kind, F_EVENT_IDX * event_idx)
    for flags, used_event, by_flags, by_event in [
        (0, 0, True, True),
        (1, 1, False, True),
        (0xFFFE, 0xFFFF, True, False),
        (0xFFFF, 3, False, True),
        (0, 5, True, False),
    ]:
        ends.avail(flags=flags, used_event=used_event)
        ends.use_one()
        assert ends.queue.wants_interrupt() == (by_event if event_idx else by_flags)


@kinds
def test_an_interrupt_is_wanted_even_after_as_many_as_indices_can_tell(kind: Kind) -> None:
    """Threat 7: used.idx is again what it was."""
    ends = Ends(kind, F_EVENT_IDX)
    ends.driver.descriptor(0, 0x30000, 1, DESC_F_WRITE)
    ends.avail(used_event=0)
    for idx in range(1, 0x10001):
        ends.driver.idx = idx
        chain = ends.queue.pop()
        assert chain is not None
        ends.queue.push(chain, 1)
    assert ends.queue.wants_interrupt()


@kinds
def test_flags_of_the_used_ring_suppress_kicks_only_without_event_idx(kind: Kind) -> None:
    for features in (0, F_EVENT_IDX):
        ends = Ends(kind, features)
        seen = set()
        for _ in range(3):
            assert ends.queue.pop() is None
            seen.add(("idle", ends.used_flags()))
            ends.driver.request(1)
            chain = ends.queue.pop()
            assert chain is not None
            seen.add(("busy", ends.used_flags()))
            ends.queue.push(chain, 0)
        assert seen == {("idle", 0), ("busy", 0 if features else 1)}
        assert ends.avail_event() == (2 if features else 0)


def test_kicks_are_on_after_a_restore_whatever_the_flags_were(ends: Ends) -> None:
    ends.memory.write(ends.driver.device, b"\x01")  # it was saved while busy
    assert ends.queue.pop() is None
    assert ends.used_flags() == 0


@kinds
def test_indices_wrap(kind: Kind) -> None:
    for features in (0, F_EVENT_IDX):
        ends = Ends(kind, features, position=0xFFFD)
        for number in range(8):
            assert ends.queue.pop() is None
            ends.driver.interrupts(1)
            ends.driver.request(1)
            assert ends.driver.kick_wanted()
            chain = ends.queue.pop()
            assert chain is not None
            ends.queue.push(chain, 1)
            assert ends.queue.wants_interrupt()
            assert [u.written for u in ends.driver.used()] == [1]
            assert ends.queue.position == ends.driver.idx == (0xFFFD + number + 1) & 0xFFFF
