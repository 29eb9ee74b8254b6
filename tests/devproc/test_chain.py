"""devproc.virtio.chain: what holds for both ring formats, each driven by its own driver.

In virtio 1.2:

| section | statement | test |
|---|---|---|
| 2.7.4.1 | no assumption about the arrangement of descriptors | any_chains_... |
| 2.7.4.2, 2.8.17 | writable elements after readable ones | a_bad_element_... |
| 2.7.5.2 | at most 2^32 bytes | four_gibibytes_... |
| 2.7.5.3.1, 2.8.19 | INDIRECT only if negotiated | an_indirect_table_needs_... |
| 2.7.7.2, 2.8.10 | interrupts as the driver asked | an_interrupt_... |
| 2.7.8.2, 2.8.15 | data and length before the used index or flags | nothing_is_seen_... |
| 2.8.9, 5.1.6.4.1 | the buffers of one merged frame are seen together | what_is_pushed_together_... |
| 2.7.10.2, 2.8.10 | notifications suppressed, and asked for again | a_kick_..., a_chain_added_while_... |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devproc.driver import Driver, PackedDriver, SplitDriver
from devproc.virtio.chain import CHAIN_MAX, Areas, Chain, ChainError, Queue, Span, part
from devproc.virtio.packed import PackedQueue
from devproc.virtio.spec import DESC_F_WRITE, F_EVENT_IDX, F_INDIRECT_DESC
from devproc.virtio.split import SplitQueue, split_queue
from kvmcore.memory import GuestMemory

RAM = ((0, 1 << 20), (4 << 20, 1 << 20))
RING = 0x1000
ALL = F_EVENT_IDX | F_INDIRECT_DESC
FORMATS: list[tuple[type[SplitDriver | PackedDriver], Callable[..., Queue]]] = [
    (SplitDriver, SplitQueue),
    (PackedDriver, PackedQueue),
]
formats = pytest.mark.parametrize(
    "kind", [*FORMATS, (SplitDriver, split_queue)], ids=["split", "packed", "C"]
)
in_python = pytest.mark.parametrize("kind", FORMATS, ids=["split", "packed"])
"""What looks inside, or interferes at a fence; integration/fuzz/ring.c does so in C."""


class Looking:
    """A ring's 16-bit words, where the driver looks for what is used after every store."""

    def __init__(self, queue: Queue, driver: Driver) -> None:
        self._driver = driver
        self.seen: list[list[tuple[int, int, bytes]]] = []
        name = "_used_words" if isinstance(queue, SplitQueue) else "_ring_words"
        self._words = getattr(queue, name)
        setattr(queue, name, self)

    def __getitem__(self, at: int) -> int:
        return int(self._words[at])

    def __setitem__(self, at: int, value: int) -> None:
        self._words[at] = value
        self.seen.append([tuple(u) for u in self._driver.used()])


class Racing(GuestMemory):
    """Memory in which `meanwhile` happens at every fence, as on another processor."""

    meanwhile: Callable[[], object] = staticmethod(lambda: None)

    def fence(self) -> None:
        super().fence()
        self.meanwhile()


@pytest.fixture
def memory() -> Iterator[Racing]:
    memory = Racing.create(RAM)
    yield memory
    memory.meanwhile = lambda: None


def connect(kind: Any, memory: GuestMemory, size: int = 8, features: int = ALL) -> tuple[Driver, Queue]:
    driver = kind[0](memory, RING, size, features, extent=0x80000)
    return driver, kind[1](memory, features, size, driver.desc, driver.driver, driver.device)


def drain(queue: Queue) -> list[Chain]:
    return list(iter(queue.pop, None))


def use(queue: Queue) -> None:
    """Use all there is, and so have the driver notify for the next."""
    for chain in drain(queue):
        queue.push(chain, 0)


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        (0, 6, [(0, 2), (10, 3), (20, 1)]),
        (0, 99, [(0, 2), (10, 3), (20, 1)]),
        (1, 3, [(1, 1), (10, 2)]),
        (2, 3, [(10, 3)]),
        (5, 1, [(20, 1)]),
        (6, 1, []),
        (1, 0, []),
    ],
)
def test_a_part_of_spans_counts_bytes(offset: int, size: int, expected: list[tuple[int, int]]) -> None:
    assert part([Span(0, 2), Span(10, 3), Span(20, 1)], offset, size) == tuple(expected)


@formats
def test_a_chain_says_all_that_a_device_needs(kind: Any, memory: Racing) -> None:
    driver, queue = connect(kind, memory)
    readable, writable = (Span(0x90000, 3), Span(0x90000, 3)), (Span(4 << 20, 0x1000),)
    ids = [driver.add(readable, writable), driver.add((), writable, indirect=True)]
    assert drain(queue) == [
        Chain(ids[0], readable, writable, 6, 0x1000, 3),
        Chain(ids[1], (), writable, 0, 0x1000, 1),
    ]


@formats
def test_what_is_used_comes_back_with_its_length_and_data_in_any_order(kind: Any, memory: Racing) -> None:
    driver, queue = connect(kind, memory)
    ids = [driver.request(b"in", 3, 3), driver.request(b"x"), driver.request(4, indirect=True)]
    chains = drain(queue)
    for chain, data in zip(reversed(chains), (b"", b"", b"abcd"), strict=True):
        queue.push(chain, memory.copy_in(chain.writable, data))
    assert [tuple(u) for u in driver.used()] == [(ids[2], 0, b""), (ids[1], 0, b""), (ids[0], 4, b"abcd")]


@in_python
def test_nothing_is_seen_before_it_is_complete(kind: Any, memory: Racing) -> None:
    driver, queue = connect(kind, memory)
    id = driver.request(b"x", 4)
    (chain,) = drain(queue)
    memory.copy_in(chain.writable, b"abc")
    looking = Looking(queue, driver)
    queue.push(chain, 3)
    assert looking.seen == [[(id, 3, b"abc")]]


@in_python
def test_what_is_pushed_together_is_seen_together(kind: Any, memory: Racing) -> None:
    driver, queue = connect(kind, memory, size=5 if kind[0] is PackedDriver else 4)
    looking = Looking(queue, driver)
    for _ in range(4):  # over the end of the ring
        driver.interrupts(3)
        ids = [driver.request(2), driver.request(b"x"), driver.request(1)]
        queue.push_together([(c, c.write_size) for c in drain(queue)])
        *before, last = looking.seen
        assert [u[:2] for u in last] == list(zip(ids, (2, 0, 1), strict=True))
        assert not any(before)
        assert queue.wants_interrupt()
        looking.seen.clear()


@formats
def test_a_popped_chain_can_be_given_back(kind: Any, memory: Racing) -> None:
    driver, queue = connect(kind, memory, size=4)
    for _ in range(5):  # over the end of the ring
        driver.request(b"a", 1, 1)
        first = queue.pop()
        assert first is not None
        queue.unpop(first)
        assert queue.pop() == first
        assert queue.pop() is None
        queue.push(first, 0)
        assert [u.id for u in driver.used()] == [first.id]


@formats
def test_giving_back_another_than_the_last_chain_is_our_bug(kind: Any, memory: Racing) -> None:
    driver, queue = connect(kind, memory)
    driver.request(1)
    driver.request(1)
    first, second = drain(queue)
    queue.push(second, 0)
    with pytest.raises(AssertionError, match="was not popped last"):
        queue.unpop(first)


@formats
@pytest.mark.parametrize("features", [0, F_EVENT_IDX])
def test_a_restored_queue_goes_on_where_it_was(kind: Any, features: int, memory: Racing) -> None:
    driver, queue = connect(kind, memory, 4, features)
    for _ in range(11):
        ids = [driver.request(b"in", 1), driver.request(1)]
        assert driver.kick_wanted()
        (first, second) = drain(queue)
        queue.push(second, 1)
        queue.push(first, 0)
        assert [u.id for u in driver.used()] == ids[::-1]
        assert [first.id, second.id] == ids
        queue = kind[1](memory, features, 4, driver.desc, driver.driver, driver.device, queue.position)
        assert queue.pop() is None


@formats
def test_a_position_with_chains_out_is_our_bug(kind: Any, memory: Racing) -> None:
    driver, queue = connect(kind, memory)
    driver.request(1)
    chain = queue.pop()
    assert chain is not None
    with pytest.raises(AssertionError, match="1 chains are out"):
        _ = queue.position
    queue.unpop(chain)
    assert kind[1](memory, ALL, 8, driver.desc, driver.driver, driver.device, queue.position).pop() == chain


@formats
def test_a_wrong_push_is_our_bug(kind: Any, memory: Racing) -> None:
    driver, queue = connect(kind, memory)
    driver.request(b"abc", 5)
    chain = queue.pop()
    assert chain is not None
    for written in (-1, 6):
        with pytest.raises(AssertionError, match="into a chain of 5"):
            queue.push(chain, written)
    queue.push(chain, 5)
    with pytest.raises(AssertionError, match="is not out"):
        queue.push(chain, 5)
    assert len(driver.used()) == 1


@formats
@pytest.mark.parametrize("features", [0, F_EVENT_IDX], ids=["flags", "event_idx"])
def test_a_kick_is_wanted_only_for_the_first_chain_after_none(
    kind: Any, features: int, memory: Racing
) -> None:
    driver, queue = connect(kind, memory, 8, features)
    assert queue.pop() is None
    for _ in range(20):
        driver.request(1)
        assert driver.kick_wanted()
        busy = queue.pop()
        assert busy is not None
        driver.request(2)
        assert not driver.kick_wanted()
        for chain in (busy, *drain(queue)):
            queue.push(chain, 0)
        assert len(driver.used()) == 2


@in_python
@pytest.mark.parametrize("features", [0, F_EVENT_IDX], ids=["flags", "event_idx"])
def test_a_chain_added_while_kicks_are_switched_on_is_not_lost(
    kind: Any, features: int, memory: Racing
) -> None:
    driver, queue = connect(kind, memory, 8, features)
    driver.request(1)
    assert queue.pop() is not None
    # The driver has loaded the old wish, so it does not kick.
    memory.meanwhile = lambda: driver.request(2)
    chain = queue.pop()
    assert chain is not None
    assert chain.write_size == 2


@formats
@pytest.mark.parametrize("features", [0, F_EVENT_IDX], ids=["flags", "event_idx"])
def test_an_interrupt_is_wanted_once_for_what_was_pushed(kind: Any, features: int, memory: Racing) -> None:
    driver, queue = connect(kind, memory, 4, features)
    driver.interrupts(1)
    assert not queue.wants_interrupt()
    for _ in range(10):
        for _ in range(2):
            driver.request(1)
        for chain in drain(queue):
            queue.push(chain, 1)
        assert queue.wants_interrupt()
        assert not queue.wants_interrupt()
        assert len(driver.used()) == 2
        driver.interrupts(0)
        driver.request(1)
        use(queue)
        assert not queue.wants_interrupt()
        assert len(driver.used()) == 1
        driver.interrupts(1)


@in_python
@pytest.mark.parametrize("features", [0, F_EVENT_IDX], ids=["flags", "event_idx"])
def test_an_interrupt_asked_for_before_the_fence_is_given(kind: Any, features: int, memory: Racing) -> None:
    driver, queue = connect(kind, memory, 4, features)
    driver.interrupts(0)
    driver.request(1)
    (chain,) = drain(queue)
    queue.push(chain, 1)
    memory.meanwhile = lambda: driver.interrupts(1)
    assert queue.wants_interrupt()


@formats
def test_an_interrupt_comes_with_the_chain_that_was_named(kind: Any, memory: Racing) -> None:
    driver, queue = connect(kind, memory, 8)
    wanted = []
    for _ in range(7):  # to a place that moves through the ring, and over its end
        driver.interrupts(4)
        for number in range(1, 6):
            driver.request(1)
            use(queue)
            wanted += [number] * queue.wants_interrupt()
        assert len(driver.used()) == 5
    assert wanted == [4] * 7


@pytest.mark.parametrize(
    ("gpa", "size", "flags", "why"),
    [
        (0x90000, 0, 0, "empty"),
        (0x100000, 1, 0, "not RAM"),
        (0xFFFFF, 2, 0, "not RAM"),
        (0xFFFFF, 0x400000, DESC_F_WRITE, "not RAM"),  # from RAM to RAM, over the hole
        ((1 << 64) - 1, 2, DESC_F_WRITE, "not RAM"),  # over the end of the address space
        (0, 0xFFFF_FFFF, 0, "not RAM"),
        (RING - 1, 2, 0, "in the ring itself"),
        (RING, 1, DESC_F_WRITE, "in the ring itself"),
    ],
)
@pytest.mark.parametrize("indirect", [False, True])
@formats
def test_a_bad_element_is_an_error(
    kind: Any, indirect: bool, gpa: int, size: int, flags: int, why: str, memory: Racing
) -> None:
    """Threat 5 of SplitQueue, 4 of PackedQueue."""
    driver, queue = connect(kind, memory)
    element = (Span(gpa, size),)
    before = (Span(0x90000, 1),)
    driver.add(before + (() if flags else element), element if flags else (), indirect=indirect)
    with pytest.raises(ChainError, match=why):
        queue.pop()


@formats
@pytest.mark.parametrize("area", ["desc", "driver", "device"])
def test_no_area_of_the_ring_is_written_by_its_own_chains(kind: Any, area: str, memory: Racing) -> None:
    driver, queue = connect(kind, memory)
    driver.add((), (Span(getattr(driver, area) + 3, 1),))
    with pytest.raises(ChainError, match="in the ring itself"):
        queue.pop()


def test_between_the_areas_of_a_ring_is_memory_like_any_other(memory: Racing) -> None:
    for driver, device in ((0x3000, 0x5000), (0x5000, 0x3000)):
        queue = SplitQueue(memory, 0, 8, 0x1000, driver, device)
        memory.write(0x1000, bytes.fromhex("0040000000000000 00100000 0000 0000"))
        memory.write(driver, bytes.fromhex("0000 0100 0000"))
        assert queue.pop() == Chain(0, (Span(0x4000, 0x1000),), (), 0x1000, 0, 1)
        memory.write(driver, bytes(6))


@pytest.mark.parametrize("writable", [False, True])
def test_four_gibibytes_are_the_most_that_a_chain_may_have(writable: bool) -> None:
    memory = GuestMemory.create([(0, 6 << 30)])
    areas = Areas(memory, [("descriptor", 0, 16, 16)])
    half = (1 << 20, 1 << 31, DESC_F_WRITE * writable)
    chain = areas.chain(0, [(1 << 20, 1 << 31, 0), half], 2)
    assert chain.read_size + chain.write_size == 1 << 32
    with pytest.raises(ChainError, match="at most 0x100000000"):
        areas.chain(0, [(1 << 20, 1 << 31, 0), half, (1 << 20, 1, DESC_F_WRITE)], 3)


@formats
def test_a_readable_element_after_a_writable_one_is_an_error(kind: Any, memory: Racing) -> None:
    areas = Areas(memory, [("descriptor", 0, 16, 16)])
    with pytest.raises(ChainError, match="readable element after a writable one"):
        areas.chain(0, [(0x90000, 1, DESC_F_WRITE), (0x90000, 1, 0)], 2)
    with pytest.raises(ChainError, match="readable element after a writable one"):
        driver, queue = connect(kind, memory)
        table = [(0x90000, 1, DESC_F_WRITE), (0x90000, 1, 0)]
        driver._offer(table)
        queue.pop()


@formats
def test_a_chain_has_at_most_as_many_elements_as_one_readv_takes(kind: Any, memory: Racing) -> None:
    driver, queue = connect(kind, memory)
    driver.add([Span(0x90000, 1)] * CHAIN_MAX, (), indirect=True)
    chain = queue.pop()
    assert chain is not None
    assert len(chain.readable) == CHAIN_MAX
    driver.add([Span(0x90000, 1)] * (CHAIN_MAX + 1), (), indirect=True)
    with pytest.raises(ChainError, match="16400 bytes, expected 1 to 1024 descriptors"):
        queue.pop()
    driver, queue = connect(kind, memory, 2048)
    driver.add([Span(0x90000, 1)] * (CHAIN_MAX + 1), ())
    with pytest.raises(ChainError, match="1025 elements, at most 1024"):
        queue.pop()


@formats
def test_an_indirect_table_needs_the_feature(kind: Any, memory: Racing) -> None:
    driver, queue = connect(kind, memory, 8, F_EVENT_IDX)
    driver.request(1, indirect=True)
    with pytest.raises(ChainError, match="not negotiated"):
        queue.pop()


@formats
@pytest.mark.parametrize("area", range(3))
@pytest.mark.parametrize(("gpa", "why"), [(0x8001, "multiple of"), (0xFFFFC, "RAM"), (1 << 63, "RAM")])
def test_areas_that_no_driver_may_give_are_refused(
    kind: Any, area: int, gpa: int, why: str, memory: Racing
) -> None:
    areas = [0x10000, 0x20000, 0x30000]
    kind[1](memory, 0, 8, *areas)
    areas[area] = gpa + 4 * (kind[0] is PackedDriver and gpa == 0xFFFFC)
    with pytest.raises(ChainError, match=("descriptor", "driver", "device")[area] + " area.*" + why):
        kind[1](memory, 0, 8, *areas)


@formats
@pytest.mark.parametrize("size", [0, 3, 32769, 65536])
def test_a_size_that_the_specification_forbids_is_refused(kind: Any, size: int, memory: Racing) -> None:
    if size == 3 and kind[0] is PackedDriver:
        kind[1](memory, 0, size, 0x1000, 0x2000, 0x3000)
        return
    with pytest.raises(ChainError, match=f"queue size {size}"):
        kind[1](memory, 0, size, 0x1000, 0x2000, 0x3000)


Shape = tuple[list[int], list[int], bool]
shapes = st.tuples(
    st.lists(st.integers(1, 40), max_size=3), st.lists(st.integers(1, 40), max_size=3), st.booleans()
).filter(lambda s: bool(s[0] or s[1]))


@formats
@settings(max_examples=60)
@given(st.lists(st.lists(shapes, max_size=4), max_size=12), st.randoms(), st.sampled_from([8, 16]))
def test_any_chains_are_popped_as_they_were_added(
    kind: Any, batches: list[list[Shape]], random: Any, size: int
) -> None:
    """With any chains still out, in any order of use, whether the driver kicks or the device looks."""
    memory = GuestMemory.create(RAM)
    driver, queue = connect(kind, memory, size)
    driver.interrupts(1)
    out: list[tuple[Chain, bytes]] = []
    done: list[tuple[int, bytes]] = []
    for batch in batches:
        expected = []
        for readable, writable, indirect in batch:
            if driver.free < (1 if indirect else len(readable) + len(writable)):
                continue
            ins = [random.randbytes(n) for n in readable]
            id = driver.request(*ins, *writable, indirect=indirect)
            expected.append((id, b"".join(ins), sum(readable), sum(writable)))
        found = drain(queue)
        assert expected == [
            (c.id, memory.copy_out(c.readable, 999), c.read_size, c.write_size) for c in found
        ]
        out += [(c, random.randbytes(random.randint(0, c.write_size))) for c in found]
        random.shuffle(out)
        for chain, data in out[: random.randint(0, len(out))]:
            queue.push(chain, memory.copy_in(chain.writable, data))
            out.remove((chain, data))
            done.append((chain.id, data))
        assert queue.wants_interrupt() == bool(done)
        assert [(u.id, u.data) for u in driver.used()] == done
        driver.interrupts(1)
        done.clear()


@settings(max_examples=60)
@given(st.lists(shapes, min_size=1, max_size=8))
def test_both_formats_give_the_same_chains(chains: list[Shape]) -> None:
    found = []
    for kind in FORMATS:
        memory = GuestMemory.create(RAM)
        driver, queue = connect(kind, memory, 64)
        for number, (readable, writable, indirect) in enumerate(chains):
            at = 0x90000 + 0x1000 * number
            driver.add(
                [Span(at + 64 * i, n) for i, n in enumerate(readable)],
                [Span(at + 512 + 64 * i, n) for i, n in enumerate(writable)],
                indirect=indirect,
            )
        found.append([c._replace(id=0) for c in drain(queue)])
    assert found[0] == found[1]
    assert len(found[0]) == len(chains)


near = st.sampled_from([0, 1, 2, 7, 8, 9, 15, 16, 0x7FFF, 0x8000, 0xFFFF])
pokes = st.tuples(st.integers(0, 0x200), st.one_of(near, st.integers(0, 0xFFFF)))


@formats
@settings(max_examples=100)
@given(
    st.lists(shapes, max_size=4),
    st.lists(pokes, max_size=12),
    st.lists(st.one_of(pokes, st.none()), max_size=40),
)
def test_no_memory_gives_anything_but_valid_chains_or_an_error(
    kind: Any, chains: list[Shape], before: list[tuple[int, int]], between: list[tuple[int, int] | None]
) -> None:
    """Rings that held valid chains, with any words of rings and tables changed, also between the calls."""
    memory = GuestMemory.create(RAM)
    driver, queue = connect(kind, memory)
    for readable, writable, indirect in chains:
        if driver.free >= 6:
            driver.request(*map(bytes, readable), *writable, indirect=indirect)
    for word, value in before:
        memory.write(RING + 2 * word, value.to_bytes(2, "little"))
    areas = [(driver.desc, 128), (driver.driver, 4), (driver.device, 4)]
    out: list[Chain] = []
    try:
        for poke in between:
            if poke is not None:
                memory.write(RING + 2 * poke[0], poke[1].to_bytes(2, "little"))
            chain = queue.pop()
            if chain is None:
                for old in out:
                    queue.push(old, old.write_size)
                out.clear()
                queue.wants_interrupt()
                continue
            out.append(chain)
            spans = chain.readable + chain.writable
            assert 0 < len(spans) <= CHAIN_MAX
            assert chain.read_size + chain.write_size == sum(s.size for s in spans)
            memory.views(spans)
            assert all(s.size and (s.gpa >= a + n or s.gpa + s.size <= a) for s in spans for a, n in areas)
            assert len(out) <= queue.size
            assert len({c.id for c in out}) == len(out)
    except ChainError as e:
        assert "\n" not in str(e)
