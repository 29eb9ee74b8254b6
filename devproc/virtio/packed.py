"""The device's end of a packed virtqueue (virtio 1.2, section 2.8).

As in `split`, what the guest may change is read once, indices and flags by one aligned 16-bit access each;
the flags of a list's first descriptor, which make all of the list available, are loaded before the rest.
Left out: VIRTIO_F_IN_ORDER, VIRTIO_F_NOTIFICATION_DATA.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final

from devproc.virtio.chain import Areas, Chain, ChainError
from devproc.virtio.spec import (
    DESC_ALIGN,
    DESC_F_AVAIL,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_USED,
    DESC_F_WRITE,
    DESC_SIZE,
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    PACKED_EVENT_ALIGN,
    PACKED_EVENT_SIZE,
    QUEUE_SIZE_MAX,
    RING_EVENT_FLAGS_DESC,
    RING_EVENT_FLAGS_DISABLE,
    RING_EVENT_FLAGS_ENABLE,
)
from kvmcore.memory import GuestMemory

_DESC: Final = Struct("<QIHH")  # addr, len, id, flags
_USED: Final = Struct("<IH")  # len and id, 8 bytes into the descriptor
_BOTH: Final = DESC_F_AVAIL | DESC_F_USED
_OFF_WRAP, _FLAGS = 0, 1  # 16-bit items of an event suppression structure
_WRAP: Final = 1 << 15  # the wrap counter above a 15-bit offset


class PackedQueue:
    """See `chain.Queue`.

    Args:
        features: what was negotiated; F_INDIRECT_DESC and F_EVENT_IDX matter here.
        size: descriptors, not necessarily a power of 2.
        desc, driver, device: the areas: descriptor ring, driver and device event suppression.
        position: offset of the next available descriptor, with the wrap counter as bit 15.

    Threats:
        1. A list longer than what is left of the ring, so also one without end → ChainError.
        2. A list whose later descriptors were not made available → ChainError.
        3. An indirect table without the feature, chained, of no or odd length, too long, or outside RAM
           → ChainError; it is copied once.
        4. Elements outside RAM, empty, in the ring itself, in the wrong order, or more than 4 GiB
           → ChainError.
        5. The same buffer id made available again while it is out → ChainError.
        6. Event suppression of any value → at worst an interrupt too many or too few.
    """

    def __init__(
        self,
        memory: GuestMemory,
        features: int,
        size: int,
        desc: int,
        driver: int,
        device: int,
        position: int = _WRAP,
    ) -> None:
        if not 0 < size <= QUEUE_SIZE_MAX:
            raise ChainError(f"queue size {size}: expected 1 to {QUEUE_SIZE_MAX}")
        self.size: Final = size
        self._memory: Final = memory
        self._areas: Final = Areas(
            memory,
            (
                ("descriptor", desc, DESC_SIZE * size, DESC_ALIGN),
                ("driver", driver, PACKED_EVENT_SIZE, PACKED_EVENT_ALIGN),
                ("device", device, PACKED_EVENT_SIZE, PACKED_EVENT_ALIGN),
            ),
        )
        self._ring, driver_event, device_event = self._areas.views
        self._ring_words: Final = self._ring.cast("H")
        self._driver_event: Final = driver_event.cast("H")
        self._device_event: Final = device_event.cast("H")
        self._indirect: Final = bool(features & F_INDIRECT_DESC)
        self._event_idx: Final = bool(features & F_EVENT_IDX)
        self._next_avail = self._next_used = position & ~_WRAP
        self._avail_wrap = self._used_wrap = bool(position & _WRAP)
        self._out: dict[int, tuple[int, bool]] = {}  # buffer id: where in the ring its list was
        self._free = size  # descriptors that are not out
        self._unannounced = 0  # descriptors used since wants_interrupt was last asked
        self._notified = False  # whether device event suppression lets the driver notify

    def pop(self) -> Chain | None:
        at = self._next_avail
        if not self._available(self._ring_words[8 * at + 7], self._avail_wrap):
            self._let_notify()
            # A driver that added a list meanwhile may have loaded the old wish: look again after the store.
            self._memory.fence()
            if not self._available(self._ring_words[8 * at + 7], self._avail_wrap):
                return None
        elif self._notified and not self._event_idx:
            self._device_event[_FLAGS] = RING_EVENT_FLAGS_DISABLE
            self._notified = False
        chain = self._walk(at)
        if chain.id in self._out:
            raise ChainError(f"chain {chain.id}: made available again before it was used")
        self._out[chain.id] = at, self._avail_wrap
        self._free -= chain.descriptors
        self._next_avail, self._avail_wrap = self._moved(at, self._avail_wrap, chain.descriptors)
        return chain

    def unpop(self, chain: Chain) -> None:
        at, wrap = self._out.pop(chain.id)
        last = self._moved(at, wrap, chain.descriptors) == (self._next_avail, self._avail_wrap)
        assert last, f"chain {chain.id} was not popped last"
        self._free += chain.descriptors
        self._next_avail, self._avail_wrap = at, wrap

    def push(self, chain: Chain, written: int) -> None:
        at, flags = self._fill(chain, written)
        self._ring_words[at] = flags  # after all else of the descriptor, which is the driver's now

    def push_together(self, used: Sequence[tuple[Chain, int]]) -> None:
        filled = [self._fill(chain, written) for chain, written in used]
        for at, flags in reversed(filled):  # the driver goes in order: until it sees the first it sees none
            self._ring_words[at] = flags

    def _fill(self, chain: Chain, written: int) -> tuple[int, int]:
        """Write a used descriptor but for its flags: (where these are in the ring, their value)."""
        assert 0 <= written <= chain.write_size, f"{written} bytes into a chain of {chain.write_size}"
        assert chain.id in self._out, f"chain {chain.id} is not out"
        del self._out[chain.id]
        self._free += chain.descriptors
        at, wrap = self._next_used, self._used_wrap
        _USED.pack_into(self._ring, at * DESC_SIZE + 8, min(written, 0xFFFF_FFFF), chain.id)
        self._next_used, self._used_wrap = self._moved(at, wrap, chain.descriptors)
        self._unannounced += chain.descriptors
        return 8 * at + 7, (_BOTH if wrap else 0) | (DESC_F_WRITE if written else 0)

    def wants_interrupt(self) -> bool:
        used, self._unannounced = self._unannounced, 0
        if not used:
            return False
        self._memory.fence()  # the used descriptors were stored before the driver's wish is loaded
        flags = self._driver_event[_FLAGS] & 3
        if flags == RING_EVENT_FLAGS_DESC and self._event_idx and used < self.size:
            event = self._driver_event[_OFF_WRAP]
            lap = 0 if bool(event & _WRAP) == self._used_wrap else self.size
            return 0 < self._next_used + lap - (event & ~_WRAP) <= used
        return flags != RING_EVENT_FLAGS_DISABLE

    @property
    def position(self) -> int:
        assert not self._out, f"{len(self._out)} chains are out"
        return self._next_avail | (_WRAP if self._avail_wrap else 0)

    def _available(self, flags: int, wrap: bool) -> bool:
        return flags & _BOTH == (DESC_F_AVAIL if wrap else DESC_F_USED)

    def _let_notify(self) -> None:
        if self._event_idx:
            self._device_event[_OFF_WRAP] = self._next_avail | (_WRAP if self._avail_wrap else 0)
        if not self._notified:
            self._device_event[_FLAGS] = RING_EVENT_FLAGS_DESC if self._event_idx else RING_EVENT_FLAGS_ENABLE
            self._notified = True

    def _moved(self, at: int, wrap: bool, descriptors: int) -> tuple[int, bool]:
        at += descriptors
        if 0 <= at < self.size:
            return at, wrap
        return at % self.size, not wrap

    def _walk(self, at: int) -> Chain:
        ring, unpack, wrap = self._ring, _DESC.unpack_from, self._avail_wrap
        elements: list[tuple[int, int, int]] = []
        for count in range(1, self._free + 1):
            addr, length, buffer_id, flags = unpack(ring, at * DESC_SIZE)
            if not self._available(flags, wrap):
                raise ChainError(f"descriptor {at}: in a list, but not available")
            if flags & DESC_F_INDIRECT:
                if flags & DESC_F_NEXT or count > 1:
                    raise ChainError(f"descriptor {at}: INDIRECT in a list")
                if not self._indirect:
                    raise ChainError(f"descriptor {at}: INDIRECT was not negotiated")
                # 2.8.7: as many elements as the table has, of whose flags only WRITE means anything.
                table = self._areas.table(addr, length, _DESC)
                elements = [(addr, length, flags) for addr, length, _, flags in table]
                return self._areas.chain(buffer_id, elements, 1)
            elements.append((addr, length, flags))
            if not flags & DESC_F_NEXT:
                return self._areas.chain(buffer_id, elements, count)
            at, wrap = self._moved(at, wrap, 1)
        raise ChainError(f"descriptor {at}: a list longer than the {self._free} descriptors that are free")
