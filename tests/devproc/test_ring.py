"""devproc._ring: the split queue in C and the one in Python are the same, on rings of any content."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from struct import pack
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from devproc.virtio.chain import Chain, ChainError, Queue
from devproc.virtio.spec import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, F_EVENT_IDX, F_INDIRECT_DESC
from devproc.virtio.split import SplitQueue, split_queue
from kvmcore.memory import GuestMemory

RAM = ((0, 1 << 16), (1 << 20, 1 << 16), (1 << 32, 1 << 31))
DESC, DRIVER, DEVICE, TABLE, BUFFERS = 0x1000, 0x2002, 0x3004, 0x4001, 0x8000
EDGES = (DESC, DRIVER, DEVICE, 1 << 16, 1 << 20, 17 << 16, 1 << 32)
U64 = (1 << 64) - 1


class End:
    """A device's end with a memory of its own, in which the guest writes what it likes."""

    def __init__(self, kind: Callable[..., Queue], features: int, size: int, position: int) -> None:
        self.memory = GuestMemory.create(RAM)
        self.queue = kind(self.memory, features, size, DESC, DRIVER, DEVICE, position)
        self.size = size
        self.out: list[Chain] = []
        self.store(DRIVER + 2, position)

    def store(self, gpa: int, *values: int) -> None:
        self.memory.write(gpa, pack(f"<{len(values)}H", *(value & 0xFFFF for value in values)))

    def descriptor(self, table: int, index: int, addr: int, size: int, flags: int, next: int) -> None:
        self.memory.write(table + 16 * index, pack("<QIHH", addr, size, flags, next))

    def offer(self, head: int, ahead: int) -> None:
        idx = int.from_bytes(self.memory.read(DRIVER + 2, 2), "little")
        self.store(DRIVER + 4 + 2 * (idx % self.size), head)
        self.store(DRIVER + 2, idx + ahead)

    def wish(self, flags: int, event: int) -> None:
        """`event` as the distance from where the driver is."""
        idx = int.from_bytes(self.memory.read(DRIVER + 2, 2), "little")
        self.store(DRIVER, flags)
        self.store(DRIVER + 4 + 2 * self.size, idx + event)

    def pop(self) -> Chain | None:
        chain = self.queue.pop()
        if chain is not None:
            self.out.append(chain)
        return chain

    def unpop(self, which: int) -> None:
        if self.out:
            self.queue.unpop(self.out[-1 - which % min(2, len(self.out))])
            self.out.pop()

    def push(self, which: int, written: int) -> None:
        if self.out:
            chain = self.out[which % len(self.out)]
            self.queue.push(chain, written)
            self.out.remove(chain)

    def push_together(self, count: int) -> None:
        used, self.out = self.out[:count], self.out[count:]
        self.queue.push_together([(chain, chain.write_size // 2) for chain in used])

    def wants_interrupt(self) -> bool:
        return self.queue.wants_interrupt()

    def position(self) -> int:
        return self.queue.position


def outcome(end: End, what: str, arguments: tuple[int, ...]) -> Any:
    try:
        return getattr(end, what)(*arguments)
    except (ChainError, AssertionError) as e:
        return type(e), str(e)


class Guest:
    """A driver that mostly does what it should; `steps` are what it and the device do."""

    def __init__(self, random: Random, size: int) -> None:
        self.random = random
        self.size = size

    def steps(self) -> list[tuple[str, tuple[int, ...]]]:
        random, found = self.random, []
        for _ in range(random.randrange(1, 8)):
            for _ in range(random.randrange(3)):
                found += self.chain()
            found += [("pop", ())] * random.randrange(1, 5)
            found += random.sample(
                [
                    ("unpop", (random.choice([0, 0, 1]),)),
                    ("push", (random.randrange(4), random.choice([0, 0, 1, 16, 1000, 1 << 32, -1]))),
                    ("push_together", (random.randrange(5),)),
                    ("wants_interrupt", ()),
                    ("wish", (random.choice([0, 1, 2, 0xFFFF]), random.randrange(-4, 4))),
                    ("position", ()),
                ],
                random.randrange(6),
            )
        return found

    def chain(self) -> list[tuple[str, tuple[int, ...]]]:
        """Write one, direct, indirect or half of each, and offer it."""
        random = self.random
        first = random.randrange(self.size)
        count = random.randint(1, min(4, self.size))
        places = [(first + i) % self.size for i in range(count)]
        inner = random.randint(1, 4) if random.random() < 0.4 else 0
        found = self.list(DESC, places, TABLE if inner else 0, 16 * inner)
        if inner:
            found += self.list(TABLE, list(range(inner)), 0, 0)
        ahead = 1 if random.random() < 0.95 else random.choice([0, 2, self.size, 0xFFFF])
        found.append(
            ("offer", (first if random.random() < 0.97 else random.choice([self.size, 0xFFFF]), ahead))
        )
        return found

    def list(self, table: int, places: list[int], addr: int, size: int) -> list[tuple[str, tuple[int, ...]]]:
        """Descriptors that follow each other, the last one a table at `addr` if there is one."""
        random, found = self.random, []
        writable = random.randint(0, len(places))
        for i, place in enumerate(places):
            last = i == len(places) - 1
            flags = DESC_F_WRITE * (i >= writable) | DESC_F_NEXT * (not last)
            next = 0xFFFF if last else places[i + 1]
            d = [BUFFERS + random.randrange(0x1000), random.choice([1, 16, 512]), flags, next]
            if last and addr:
                d = [addr, size, DESC_F_INDIRECT, 0]
            if random.random() < 0.15:
                at, value = random.choice(
                    [
                        (0, random.choice(EDGES) - random.choice([0, d[1], 1, -15])),
                        (0, random.choice([0, U64, U64 - 15])),
                        (1, random.choice([0, d[1] - 1, d[1] + 1, 1 << 14, 1 << 15, 1 << 31, U64])),
                        (2, random.choice([d[2] ^ 1 << random.randrange(3), 0xFFF8, 0xFFFF])),
                        (3, random.choice([*places, len(places), self.size])),
                    ]
                )
                d[at] = value & U64
            found.append(
                ("descriptor", (table, place, d[0], d[1] & 0xFFFFFFFF, d[2] & 0xFFFF, d[3] & 0xFFFF))
            )
        return found


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([0, F_INDIRECT_DESC, F_EVENT_IDX, F_INDIRECT_DESC | F_EVENT_IDX, F_INDIRECT_DESC]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([0, 0x7FFF, 0xFFFE]),
    st.randoms(use_true_random=True),
)
def test_both_do_the_same_with_any_ring(features: int, size: int, position: int, random: Random) -> None:
    """The same chains, errors to the letter, wishes for interrupts and positions; and the same memory."""
    ours, reference = (End(kind, features, size, position) for kind in (split_queue, SplitQueue))
    for what, arguments in Guest(random, size).steps():
        assert outcome(ours, what, arguments) == outcome(reference, what, arguments)
    for gpa, length in RAM[:2]:
        assert ours.memory.read(gpa, length) == reference.memory.read(gpa, length)


def test_both_find_the_same_in_chains_as_long_as_there_can_be() -> None:
    for count, last in ((1024, 0), (1025, 0), (1023, DESC_F_NEXT), (2048, DESC_F_NEXT)):
        found = []
        for kind in (split_queue, SplitQueue):
            memory = GuestMemory.create([(0, 1 << 20)])
            queue = kind(memory, F_INDIRECT_DESC, 2048, 0x10000, 0x20000, 0x30000)
            for i in range(count):
                more = DESC_F_NEXT if i < count - 1 else last
                memory.write(0x10000 + 16 * i, pack("<QIHH", 0x40000 + i, 1, more, (i + 1) % 2048))
            memory.write(0x20000, pack("<HHH", 0, 1, 0))
            try:
                found.append(repr(queue.pop()))
            except ChainError as e:
                found.append(str(e))
        assert found[0] == found[1]


def test_both_take_four_gibibytes_and_not_a_byte_more() -> None:
    for more in (0, 1):
        found = []
        for kind in (split_queue, SplitQueue):
            end = End(kind, 0, 8, 0)
            for i, size in enumerate((1 << 31, (1 << 31) - 1, 1 + more)):
                end.descriptor(DESC, i, 1 << 32, size, DESC_F_NEXT * (i < 2), i + 1)
            end.offer(0, 1)
            found.append(outcome(end, "pop", ()))
        assert found[0] == found[1]
        assert (found[0][0] is ChainError) == bool(more)
