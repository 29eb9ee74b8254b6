"""Guest memory that stands still: what a device sees of a guest that writes while it looks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from devproc.driver import Driver, PackedDriver, SplitDriver
from devproc.fuzz.private import PrivateMemory, new_copy
from devproc.virtio import spec
from devproc.virtio.chain import Queue
from devproc.virtio.packed import PackedQueue
from devproc.virtio.split import SplitQueue
from kvmcore.errors import MemoryFault
from kvmcore.memory import GuestMemory

SIZE = 1 << 16
GPA = 0x1000
BUFFER = 0x8000
FORMATS = pytest.mark.parametrize("packed", [False, True])


class Busy(GuestMemory):
    """Memory of a guest that does something whenever a device orders its stores and loads."""

    meanwhile: Callable[[], object]

    def fence(self) -> None:
        super().fence()
        self.meanwhile()


class Bench:
    """A queue of a device in private memory, and its driver in the guest's."""

    def __init__(self, packed: bool) -> None:
        self.guest = Busy.create([(0, SIZE)])
        self.guest.meanwhile = lambda: None
        self.seen: list[tuple[int, int, bytes]] = []
        self.wrote: list[tuple[int, bytes]] = []
        self.queues: list[PackedQueue | SplitQueue] = []
        self.memory = PrivateMemory(
            self.guest,
            new_copy(SIZE),
            lambda: [(q._areas.ranges, packed) for q in self.queues],
            lambda *what: self.seen.append(what),
            lambda *what: self.wrote.append(what),
        )
        features = spec.F_RING_PACKED if packed else 0
        self.driver: Driver = (PackedDriver if packed else SplitDriver)(self.guest, GPA, 8, extent=0x4000)
        kind = PackedQueue if packed else SplitQueue
        areas = self.driver.desc, self.driver.driver, self.driver.device
        self.queues.append(kind(self.memory, features, 8, *areas))

    @property
    def queue(self) -> Queue:
        return self.queues[0]


@pytest.fixture
def bench(packed: bool) -> Bench:
    return Bench(packed)


def test_a_part_stays_as_it_was_until_the_operation_ends() -> None:
    bench = Bench(packed=False)
    bench.guest.write(BUFFER, b"before")
    bench.memory.begin()
    assert bench.memory.read(BUFFER, 6) == b"before"
    bench.guest.write(BUFFER, b"behind")
    assert bench.memory.read(BUFFER, 6) == b"before"
    bench.memory.end()
    bench.memory.begin()
    assert bench.memory.read(BUFFER, 6) == b"behind"
    assert [what for what in bench.seen if what[0] >= BUFFER] == [
        (BUFFER, 0, b"before"),
        (BUFFER + 2, 0, b"hind"),
    ]


def test_what_the_device_writes_reaches_the_guest_at_the_end_and_nothing_else_does() -> None:
    bench = Bench(packed=False)
    bench.memory.begin()
    bench.memory.write(BUFFER + 1, b"ours")
    bench.guest.write(BUFFER, b"theirs")  # a neighbour, meanwhile
    assert bench.guest.read(BUFFER, 6) == b"theirs"
    bench.memory.end()
    assert bench.guest.read(BUFFER, 6) == b"tourss"
    assert bench.wrote == [(BUFFER + 1, b"ours")]


@FORMATS
def test_chains_go_through_and_come_back(bench: Bench) -> None:
    for n in range(20):  # around the ring
        id = bench.driver.request(b"question %d" % n, 16)
        bench.memory.begin()
        chain = bench.queue.pop()
        assert chain is not None and chain.id == id
        question = bench.memory.copy_out(chain.readable, chain.read_size)
        bench.memory.copy_in(chain.writable, question[::-1])
        bench.queue.push(chain, len(question))
        assert bench.queue.wants_interrupt()
        assert bench.queue.pop() is None
        bench.memory.end()
        ((_, _, answer),) = bench.driver.used()
        assert answer == (b"question %d" % n)[::-1]


@FORMATS
def test_a_chain_that_comes_while_notifications_are_asked_for_is_seen(bench: Bench) -> None:
    came: list[int] = []

    def come() -> None:
        if not came:
            came.append(bench.driver.request(b"late", 4))

    bench.guest.meanwhile = come
    bench.memory.begin()
    chain = bench.queue.pop()
    assert chain is not None and chain.id == came[0]
    assert bench.memory.copy_out(chain.readable, 4) == b"late"
    assert {fence for _, fence, data in bench.seen if data} >= {1}


@FORMATS
def test_a_buffer_that_the_guest_uses_again_is_looked_at_again(bench: Bench) -> None:
    """Used in the first half of an operation, and given again before the second."""
    bench.driver.request(b"first ")
    bench.memory.begin()
    chain = bench.queue.pop()
    assert chain is not None
    assert bench.memory.copy_out(chain.readable, 6) == b"first "
    bench.queue.push(chain, 0)

    def again() -> None:
        if bench.driver.used():
            bench.driver.request(b"second")  # at the same address: nothing is out

    bench.guest.meanwhile = again
    later = bench.queue.pop()
    assert later is not None and later.readable == chain.readable
    assert bench.memory.copy_out(later.readable, 6) == b"second"


@FORMATS
def test_a_driver_sees_a_used_chain_only_when_all_of_it_is_there(
    bench: Bench, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        bench.driver.request(64)
    bench.memory.begin()
    chains = [bench.queue.pop() for _ in range(3)]
    for chain in chains:
        assert chain is not None
        bench.memory.copy_in(chain.writable, b"x" * 64)
        bench.queue.push(chain, 64)
    order: list[int] = []

    class View:
        """The guest's memory, of which each store is noted."""

        def __init__(self, view: memoryview) -> None:
            self.view = view

        def __getitem__(self, key: slice) -> memoryview:
            return self.view[key]

        def __setitem__(self, key: slice, data: bytes) -> None:
            order.append(key.start)
            self.view[key] = data

    monkeypatch.setattr(bench.guest, "_view", View(bench.guest._view))
    bench.memory.end()
    monkeypatch.undo()
    words = [bench.driver.desc + 16 * n + 14 for n in (2, 1, 0)] if packed else [bench.driver.device + 2]
    assert [at & ~1 for at in order[-len(words) :]] == words
    assert len(bench.driver.used()) == 3


def test_pages_that_are_given_back_are_zeros_on_both_sides() -> None:
    bench = Bench(packed=False)
    bench.guest.write(BUFFER, b"x" * 4096)
    bench.memory.begin()
    assert bench.memory.read(BUFFER, 1) == b"x"
    bench.memory.discard(BUFFER, 4096)
    assert bench.memory.read(BUFFER, 1) == b"\0"
    bench.memory.end()
    assert bench.guest.read(BUFFER, 4096) == bytes(4096)
    assert bench.wrote == [(BUFFER, bytes(4096))]


def test_what_is_not_ram_is_refused_as_ever() -> None:
    with pytest.raises(MemoryFault):
        Bench(packed=False).memory.read(SIZE - 1, 2)
