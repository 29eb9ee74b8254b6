"""The device's end of a split virtqueue (virtio 1.2, section 2.7).

The three areas belong to the guest, which may change any byte at any time: each index and each descriptor
is read once, checked, and only then used.  An index is one aligned 16-bit load or store, as an item of a
cast memoryview is (struct's pack_into is not: it clears first).  On x86 loads keep their order, stores
keep theirs, and only a load may overtake an earlier store; that one order is GuestMemory.fence.
Left out: VIRTIO_F_IN_ORDER, VIRTIO_F_NOTIFICATION_DATA.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final

from devproc._ring import Ring
from devproc.virtio.chain import Areas, Chain, ChainError, Span
from devproc.virtio.spec import (
    AVAIL_F_NO_INTERRUPT,
    DESC_ALIGN,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_SIZE,
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    QUEUE_SIZE_MAX,
    SPLIT_DEVICE_ALIGN,
    SPLIT_DRIVER_ALIGN,
    USED_F_NO_NOTIFY,
)
from kvmcore.memory import GuestMemory

_DESC: Final = Struct("<QIHH")  # addr, len, flags, next
_USED_ELEM: Final = Struct("<II")  # id, len
_FLAGS, _IDX, _RING = 0, 1, 2  # 16-bit items of the available ring; flags and idx of the used ring too
_MASK: Final = 0xFFFF


def split_queue(
    memory: GuestMemory, features: int, size: int, desc: int, driver: int, device: int, position: int = 0
) -> Ring:
    """What `SplitQueue` is, in C (_ring.c); the arguments are the same, and so is whatever it does."""
    spans = [(region.gpa, region.size) for region in memory.regions]
    return Ring(
        tuple((gpa, view) for (gpa, _), view in zip(spans, memory.views(spans), strict=True)),
        _areas(memory, size, desc, driver, device).ranges,
        size,
        indirect=bool(features & F_INDIRECT_DESC),
        event_idx=bool(features & F_EVENT_IDX),
        position=position,
        classes=(Chain, Span, ChainError),
    )


def _areas(memory: GuestMemory, size: int, desc: int, driver: int, device: int) -> Areas:
    if not 0 < size <= QUEUE_SIZE_MAX or size & (size - 1):
        raise ChainError(f"queue size {size}: expected a power of 2, at most {QUEUE_SIZE_MAX}")
    return Areas(
        memory,
        (
            ("descriptor", desc, DESC_SIZE * size, DESC_ALIGN),
            ("driver", driver, 6 + 2 * size, SPLIT_DRIVER_ALIGN),
            ("device", device, 6 + 8 * size, SPLIT_DEVICE_ALIGN),
        ),
    )


class SplitQueue:
    """See `chain.Queue`.

    Args:
        features: what was negotiated; F_INDIRECT_DESC and F_EVENT_IDX matter here.
        size: entries, a power of 2.
        desc, driver, device: the areas: descriptor table, available ring, used ring.
        position: the free-running index of the next available entry.

    Threats:
        1. avail.idx runs ahead of what the queue can hold, or backwards → ChainError.
        2. A head or `next` beyond its table → ChainError.
        3. A loop → ChainError after as many descriptors as the table has.
        4. An indirect table without the feature, inside another, followed by NEXT, of no or odd length, too
           long, or outside RAM → ChainError; it is copied once.
        5. Elements outside RAM, empty, in the ring itself, in the wrong order, or more than 4 GiB
           → ChainError.
        6. The same head made available again while it is out → ChainError, so a model may key by `Chain.id`.
        7. used_event, flags and reserved bits of any value → at worst an interrupt too many or too few.
    """

    def __init__(
        self,
        memory: GuestMemory,
        features: int,
        size: int,
        desc: int,
        driver: int,
        device: int,
        position: int = 0,
    ) -> None:
        self._areas: Final = _areas(memory, size, desc, driver, device)
        self.size: Final = size
        self._memory: Final = memory
        self._desc, avail, self._used = self._areas.views
        self._avail: Final = avail.cast("H")
        self._used_words: Final = self._used.cast("H")
        self._used_event: Final = _RING + size  # after the available ring
        self._avail_event: Final = _RING + 4 * size  # after the used ring
        self._indirect: Final = bool(features & F_INDIRECT_DESC)
        self._event_idx: Final = bool(features & F_EVENT_IDX)
        self._next_avail = self._seen = self._next_used = position
        self._out: dict[int, int] = {}  # head: where in the available ring it was
        self._unannounced = 0  # pushed since wants_interrupt was last asked
        self._notified = False  # whether flags in the used ring ask for notifications; never with EVENT_IDX

    def pop(self) -> Chain | None:
        at = self._next_avail
        if at == self._seen and not self._look(at):
            return None
        head = self._avail[_RING + (at & (self.size - 1))]
        if head in self._out:
            raise ChainError(f"chain {head}: made available again before it was used")
        chain = self._walk(head)
        self._out[head] = at
        self._next_avail = (at + 1) & _MASK
        return chain

    def unpop(self, chain: Chain) -> None:
        at = (self._next_avail - 1) & _MASK
        assert self._out.get(chain.id) == at, f"chain {chain.id} was not popped last"
        del self._out[chain.id]
        self._next_avail = at

    def push(self, chain: Chain, written: int) -> None:
        self._fill(self._next_used, chain, written)
        self._publish(1)

    def push_together(self, used: Sequence[tuple[Chain, int]]) -> None:
        for at, (chain, written) in enumerate(used, self._next_used):
            self._fill(at, chain, written)
        self._publish(len(used))

    def _fill(self, at: int, chain: Chain, written: int) -> None:
        assert 0 <= written <= chain.write_size, f"{written} bytes into a chain of {chain.write_size}"
        assert chain.id in self._out, f"chain {chain.id} is not out"
        del self._out[chain.id]
        _USED_ELEM.pack_into(self._used, 4 + 8 * (at & (self.size - 1)), chain.id, min(written, 0xFFFF_FFFF))

    def _publish(self, count: int) -> None:
        self._next_used = at = (self._next_used + count) & _MASK
        self._used_words[_IDX] = at  # after the data and the elements (2.7.8.2)
        self._unannounced += count

    def wants_interrupt(self) -> bool:
        pushed, self._unannounced = self._unannounced, 0
        if not pushed:
            return False
        self._memory.fence()  # used.idx was stored before the driver's wish is loaded
        if self._event_idx:  # one of the entries just written is the one that used_event names (2.7.7.2)
            return (self._next_used - self._avail[self._used_event] - 1) & _MASK < pushed
        return not self._avail[_FLAGS] & AVAIL_F_NO_INTERRUPT

    @property
    def position(self) -> int:
        assert not self._out, f"{len(self._out)} chains are out"
        return self._next_avail

    def _look(self, at: int) -> bool:
        """Whether the driver has made more available; if not, it has been asked to notify."""
        if self._advance(at):
            if self._notified:
                self._used_words[_FLAGS] = USED_F_NO_NOTIFY
                self._notified = False
            return True
        if self._event_idx:
            self._used_words[self._avail_event] = at
        elif not self._notified:
            self._used_words[_FLAGS] = 0
            self._notified = True
        # A driver that added a chain meanwhile may have loaded the old wish: look again after the store.
        self._memory.fence()
        return self._advance(at)

    def _advance(self, at: int) -> bool:
        self._seen = seen = self._avail[_IDX]
        waiting = (seen - at) & _MASK
        if waiting + len(self._out) > self.size:
            raise ChainError(
                f"avail.idx {seen:#x} is {waiting} ahead, {len(self._out)} are out: size {self.size}"
            )
        return waiting > 0

    def _walk(self, head: int) -> Chain:
        table, unpack, limit, index = self._desc, _DESC.unpack_from, self.size, head
        elements: list[tuple[int, int, int]] = []
        direct = 0
        while True:
            if index >= limit:
                raise ChainError(f"chain {head}: descriptor {index} of a table of {limit}")
            addr, length, flags, following = unpack(table, index * DESC_SIZE)
            direct += 1
            if flags & DESC_F_INDIRECT:
                if flags & DESC_F_NEXT:
                    raise ChainError(f"chain {head}: INDIRECT and NEXT in one descriptor")
                self._walk_table(head, addr, length, elements)
                break
            elements.append((addr, length, flags))
            if not flags & DESC_F_NEXT:
                break
            if direct == limit:
                raise ChainError(f"chain {head}: a loop in the table of {limit} descriptors")
            index = following
        return self._areas.chain(head, elements, direct)

    def _walk_table(self, head: int, gpa: int, size: int, elements: list[tuple[int, int, int]]) -> None:
        """Append the elements of an indirect table."""
        if not self._indirect:
            raise ChainError(f"chain {head}: INDIRECT was not negotiated")
        table = self._areas.table(gpa, size, _DESC)
        index = 0
        for _ in table:
            addr, length, flags, following = table[index]
            if flags & DESC_F_INDIRECT:
                raise ChainError(f"chain {head}: an indirect table inside another")
            elements.append((addr, length, flags))
            if not flags & DESC_F_NEXT:
                return
            index = following
            if index >= len(table):
                raise ChainError(f"chain {head}: descriptor {index} of an indirect table of {len(table)}")
        raise ChainError(f"chain {head}: a loop in the indirect table of {len(table)} descriptors")
