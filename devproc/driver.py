"""The guest's half, for tests and fuzzing: real rings in real memory (virtio 1.2, 2.7, 2.8), and PCI (4.1).

Written apart from `devproc.virtio`, so that each half checks the other.  A driver keeps to the
specification unless its raw methods are called: `SplitDriver.descriptor` and `offer`,
`PackedDriver.descriptor`, or `PciDriver.get` and `put`.  What a device gives back is checked: an
AssertionError is the device's bug.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from struct import Struct
from typing import Final, NamedTuple, Protocol

from devproc.virtio import spec
from devproc.virtio.chain import Span
from devproc.wire import Space
from kvmcore.memory import GuestMemory

_DESC: Final = Struct("<QIHH")  # address, length, and the last two as the format has them
_ADDR_LEN_ID: Final = Struct("<QIH")
_USED_ELEM: Final = Struct("<II")
_RESET_READS: Final = 100_000


class Used(NamedTuple):
    """A chain that the device has used: `data` is the first `written` bytes of its writable part."""

    id: int
    written: int
    data: bytes


class _Offered(NamedTuple):
    """A chain that the device has: its writable part, and the ring's descriptors that it takes."""

    writable: tuple[Span, ...]
    descriptors: tuple[int, ...]


class Driver(ABC):
    """One virtqueue in [gpa, gpa + extent): the rings first, buffers and indirect tables after them.

    Args:
        features: as negotiated; F_EVENT_IDX matters here.
        position: where both ends start, as `chain.Queue.position` gives it.

    `desc`, `driver` and `device` are the addresses to tell the device.
    """

    def __init__(
        self, memory: GuestMemory, gpa: int, size: int, features: int, sizes: Sequence[int], extent: int
    ) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = bool(features & spec.F_EVENT_IDX)
        self._next = gpa
        self._end = gpa + extent
        self.desc, self.driver, self.device = (self.room(count, 16).gpa for count in sizes)
        for area, count in zip((self.desc, self.driver, self.device), sizes, strict=True):
            memory.write(area, bytes(count))
        self._heap = self._next
        self._offered: dict[int, _Offered] = {}
        self._added = 0  # since kick_wanted was last asked

    def room(self, size: int, align: int = 1) -> Span:
        """`size` bytes for a buffer; given back all at once when the device has no chain left."""
        gpa = self._next + -self._next % align
        assert gpa + size <= self._end, f"no room for {size} more bytes"
        self._next = gpa + size
        return Span(gpa, size)

    def place(self, data: bytes) -> Span:
        """`data` in a buffer of its own."""
        span = self.room(len(data))
        self.memory.write(span.gpa, data)
        return span

    def request(self, *parts: bytes | int, indirect: bool = False) -> int:
        """Make one chain available: bytes are readable elements, an int is that much writable room.

        Returns its id.
        """
        readable = [self.place(p) for p in parts if isinstance(p, bytes)]
        writable = [self.room(p) for p in parts if isinstance(p, int)]
        return self.add(readable, writable, indirect=indirect)

    def add(self, readable: Iterable[Span], writable: Iterable[Span], *, indirect: bool = False) -> int:
        """Make a chain of these elements available, through an indirect table or not; returns its id."""
        writable = tuple(writable)
        elements = [(*s, 0) for s in readable] + [(*s, spec.DESC_F_WRITE) for s in writable]
        if indirect:
            elements = [(*self._table(elements), spec.DESC_F_INDIRECT)]
        assert len(elements) <= self.free, f"{len(elements)} descriptors, {self.free} are free"
        id, descriptors = self._offer(elements)
        self._offered[id] = _Offered(writable, descriptors)
        return id

    def used(self) -> list[Used]:
        """What the device has used since this was last asked, in its order."""
        return [
            Used(id, written, self.memory.copy_out(writable, written))
            for id, written, writable in self.done()
        ]

    def done(self) -> list[tuple[int, int, tuple[Span, ...]]]:
        """As `used`: (id, written, the writable part) of each, and nothing is read from there."""
        found = []
        while (done := self._reap()) is not None:
            id, written = done
            assert id in self._offered, f"chain {id} was used, but is not the device's"
            writable, descriptors = self._offered.pop(id)
            size = sum([s.size for s in writable])
            assert written <= size, f"chain {id}: {written} bytes written into {size}"
            found.append((id, written, writable))
            self._released(id, descriptors)
        if not self._offered:
            self._next = self._heap
        return found

    @property
    def left(self) -> int:
        """Bytes that there is still room for."""
        return self._end - self._next

    @property
    def outstanding(self) -> int:
        """How many chains the device has."""
        return len(self._offered)

    def kick_wanted(self) -> bool:
        """Whether the device wants to be notified of what was added since this was last asked."""
        added, self._added = self._added, 0
        self.memory.fence()
        return added > 0 and self._kick_wanted(added)

    @property
    @abstractmethod
    def free(self) -> int:
        """How many descriptors of the ring are free."""

    @abstractmethod
    def interrupts(self, after: int) -> None:
        """Ask for an interrupt once `after` more chains are used; 0: for none.

        More than 1 needs F_EVENT_IDX, and in a packed ring chains of one descriptor.
        """

    @abstractmethod
    def _table(self, elements: Sequence[tuple[int, int, int]]) -> Span: ...

    @abstractmethod
    def _offer(self, elements: Sequence[tuple[int, int, int]]) -> tuple[int, tuple[int, ...]]:
        """Make elements (gpa, size, flags) available: (id, ring descriptors)."""

    @abstractmethod
    def _reap(self) -> tuple[int, int] | None:
        """The next used (id, written)."""

    @abstractmethod
    def _released(self, id: int, descriptors: tuple[int, ...]) -> None: ...

    @abstractmethod
    def _kick_wanted(self, added: int) -> bool: ...

    def _load16(self, gpa: int) -> int:
        return int.from_bytes(self.memory.read(gpa, 2), "little")

    def _store16(self, gpa: int, value: int) -> None:
        self.memory.write(gpa, (value & 0xFFFF).to_bytes(2, "little"))

    def _pack(self, layout: Struct, gpa: int, *values: int) -> None:
        self.memory.write(gpa, layout.pack(*values))

    def _unpack(self, layout: Struct, gpa: int) -> tuple[int, ...]:
        return layout.unpack(self.memory.read(gpa, layout.size))


class SplitDriver(Driver):
    """The driver of a split virtqueue; descriptors are taken in no particular order."""

    def __init__(
        self,
        memory: GuestMemory,
        gpa: int,
        size: int,
        features: int = 0,
        position: int = 0,
        extent: int = 1 << 20,
    ) -> None:
        areas = (16 * size, 6 + 2 * size, 6 + 8 * size)
        super().__init__(memory, gpa, size, features, areas, extent)
        # Each word is one access of the processor, and a tenth of the time of one by `memory`.
        self._descriptors, driver, self._used = memory.views(
            zip((self.desc, self.driver, self.device), areas, strict=True)
        )
        self._words, self._used_words = driver.cast("H"), self._used.cast("H")
        self._free = [i * 5 % size for i in range(size)] if size % 5 else list(range(size))
        self._seen = position
        self.idx = position
        self._used_words[1] = position

    @property
    def idx(self) -> int:
        """avail.idx, which makes everything before it available; writable, also to nonsense."""
        return self._words[1]

    @idx.setter
    def idx(self, value: int) -> None:
        self._words[1] = value & 0xFFFF

    def descriptor(self, index: int, addr: int, size: int, flags: int, next: int = 0) -> None:
        """Write one descriptor of the table, whatever it says."""
        self._descriptors[16 * index : 16 * index + 16] = _DESC.pack(addr, size, flags, next)

    def offer(self, head: int) -> None:
        """Put `head` into the available ring, whatever it is."""
        words = self._words
        at = words[1]
        words[2 + at % self.size] = head
        words[1] = at + 1 & 0xFFFF
        self._added += 1

    @property
    def free(self) -> int:
        return len(self._free)

    def interrupts(self, after: int) -> None:
        if self.event_idx:  # an index that was just passed is the farthest away
            self._words[2 + self.size] = self._seen + after - 1 & 0xFFFF
        else:
            self._words[0] = 0 if after else spec.AVAIL_F_NO_INTERRUPT

    def _table(self, elements: Sequence[tuple[int, int, int]]) -> Span:
        last = len(elements) - 1
        return self.place(
            b"".join(
                _DESC.pack(gpa, size, flags | (spec.DESC_F_NEXT if i < last else 0), i + 1)
                for i, (gpa, size, flags) in enumerate(elements)
            )
        )

    def _offer(self, elements: Sequence[tuple[int, int, int]]) -> tuple[int, tuple[int, ...]]:
        taken = [self._free.pop() for _ in elements]
        for index, next, (gpa, size, flags) in zip(taken, taken[1:], elements, strict=False):
            self.descriptor(index, gpa, size, flags | spec.DESC_F_NEXT, next)
        self.descriptor(taken[-1], *elements[-1])
        self.offer(taken[0])
        return taken[0], tuple(taken)

    def _reap(self) -> tuple[int, int] | None:
        if self._used_words[1] == self._seen:
            return None
        at = 4 + 8 * (self._seen % self.size)
        id, written = _USED_ELEM.unpack(self._used[at : at + 8])
        self._seen = (self._seen + 1) & 0xFFFF
        return id, written

    def _released(self, id: int, descriptors: tuple[int, ...]) -> None:
        self._free += descriptors

    def _kick_wanted(self, added: int) -> bool:
        if self.event_idx:
            event = self._used_words[2 + 4 * self.size]
            return (self.idx - 1 - event) & 0xFFFF < added
        return not self._used_words[0] & spec.USED_F_NO_NOTIFY


class PackedDriver(Driver):
    """The driver of a packed virtqueue; buffer ids are taken in no particular order."""

    def __init__(
        self,
        memory: GuestMemory,
        gpa: int,
        size: int,
        features: int = 0,
        position: int = 1 << 15,
        extent: int = 1 << 20,
    ) -> None:
        super().__init__(memory, gpa, size, features, (16 * size, 4, 4), extent)
        self._ids = [i * 5 % size for i in range(size)] if size % 5 else list(range(size))
        self._free = size
        # Positions count on without end: the wrap counter is 1 in the even laps.
        self._put = self._seen = (position & 0x7FFF) + (0 if position >> 15 else size)
        if not position >> 15:  # the lap before, all used
            for i in range(size):
                self.descriptor(i, 0, 0, 0, spec.DESC_F_AVAIL | spec.DESC_F_USED)
        for i in range(position & 0x7FFF):
            self.descriptor(i, 0, 0, 0, (spec.DESC_F_AVAIL | spec.DESC_F_USED) * (position >> 15))

    def descriptor(self, index: int, addr: int, size: int, id: int, flags: int) -> None:
        """Write one descriptor of the ring, whatever it says; its flags last."""
        self._pack(_ADDR_LEN_ID, self.desc + 16 * index, addr, size, id)
        self._store16(self.desc + 16 * index + 14, flags)

    @property
    def free(self) -> int:
        return self._free if self._ids else 0

    def available(self, at: int) -> int:
        """The flags that make the descriptor at position `at` available."""
        return spec.DESC_F_AVAIL if self._wrap(at) else spec.DESC_F_USED

    def interrupts(self, after: int) -> None:
        if after and self.event_idx:
            at = self._seen + after - 1
            self._store16(self.driver, at % self.size | self._wrap(at) << 15)
            self._store16(self.driver + 2, spec.RING_EVENT_FLAGS_DESC)
        else:
            flags = spec.RING_EVENT_FLAGS_ENABLE if after else spec.RING_EVENT_FLAGS_DISABLE
            self._store16(self.driver + 2, flags)

    def _wrap(self, at: int) -> int:
        return 1 - at // self.size % 2

    def _table(self, elements: Sequence[tuple[int, int, int]]) -> Span:
        return self.place(b"".join(_DESC.pack(gpa, size, 0, f) for gpa, size, f in elements))

    def _offer(self, elements: Sequence[tuple[int, int, int]]) -> tuple[int, tuple[int, ...]]:
        id = self._ids.pop()
        first, count = self._put, len(elements)
        for i in reversed(range(count)):  # the first makes all of them available
            gpa, size, flags = elements[i]
            flags |= self.available(first + i) | (spec.DESC_F_NEXT if i < count - 1 else 0)
            self.descriptor((first + i) % self.size, gpa, size, id, flags)
        self._put += count
        self._free -= count
        self._added += count
        return id, tuple((first + i) % self.size for i in range(count))

    def _reap(self) -> tuple[int, int] | None:
        at = self.desc + 16 * (self._seen % self.size)
        both = spec.DESC_F_AVAIL | spec.DESC_F_USED
        if self._load16(at + 14) & both != both * self._wrap(self._seen):
            return None
        _, written, id, flags = self._unpack(_DESC, at)
        assert bool(flags & spec.DESC_F_WRITE) == (written > 0), f"chain {id}: WRITE, and {written} bytes"
        return id, written

    def _released(self, id: int, descriptors: tuple[int, ...]) -> None:
        self._seen += len(descriptors)
        self._free += len(descriptors)
        self._ids.append(id)

    def _kick_wanted(self, added: int) -> bool:
        event, flags = self._load16(self.device), self._load16(self.device + 2)
        if flags != spec.RING_EVENT_FLAGS_DESC:
            return bool(flags == spec.RING_EVENT_FLAGS_ENABLE)
        return any(
            event == at % self.size | self._wrap(at) << 15 for at in range(self._put - added, self._put)
        )


class Function(Protocol):
    """A PCI function as its driver sees it: a device model, or what passes accesses on to one."""

    def read(self, space: int, offset: int, size: int) -> int: ...
    def write(self, space: int, offset: int, size: int, data: int) -> None: ...


class NotReady(Exception):
    """The device did not take what the driver did as the specification has it; one line."""


class PciDriver:
    """Brings a function up and down as Linux's virtio_pci_modern.c does, access by access.

    `queues` are its rings once `start` has made them, `extent` bytes for each from `gpa` on; `where` is,
    for each structure (a `spec.CAP_` type), its offset in BAR 0.

    Args:
        memory: guest memory, shared with the device.
    """

    def __init__(
        self, function: Function, memory: GuestMemory, gpa: int = 1 << 20, extent: int = 1 << 20
    ) -> None:
        self.function = function
        self.memory = memory
        self.gpa = gpa
        self.extent = extent
        self.queues: list[Driver] = []
        self.where: dict[int, int] = {}
        self.msix = 0
        self._multiplier = 0
        self._find_structures()

    def get(self, at: int, size: int) -> int:
        """Read from the common configuration."""
        return self.function.read(Space.BAR0, self.where[spec.CAP_COMMON_CFG] + at, size)

    def put(self, at: int, size: int, data: int) -> None:
        """Write to the common configuration."""
        self.function.write(Space.BAR0, self.where[spec.CAP_COMMON_CFG] + at, size, data)

    def config(self, at: int, size: int) -> int:
        """Read from the device configuration."""
        return self.function.read(Space.BAR0, self.where[spec.CAP_DEVICE_CFG] + at, size)

    def set_config(self, at: int, size: int, data: int) -> None:
        """Write to the device configuration."""
        self.function.write(Space.BAR0, self.where[spec.CAP_DEVICE_CFG] + at, size, data)

    def isr(self) -> int:
        """Read, and by that clear, the ISR status."""
        return self.function.read(Space.BAR0, self.where[spec.CAP_ISR_CFG], 1)

    @property
    def status(self) -> int:
        return self.get(spec.DEVICE_STATUS, 1)

    def add_status(self, bits: int) -> None:
        """Set more bits of the device status."""
        self.put(spec.DEVICE_STATUS, 1, self.status | bits)

    def offered(self) -> int:
        """The features that the device offers."""
        low, high = (self._feature(select) for select in (0, 1))
        return low | high << 32

    def reset(self) -> None:
        """Reset the device, and wait until it is done (4.1.4.3.2)."""
        self.put(spec.DEVICE_STATUS, 1, 0)
        if all(self.status for _ in range(_RESET_READS)):
            raise NotReady(f"status {self.status:#x} after a reset")
        self.queues = []

    def negotiate(self, features: int) -> None:
        """Reset, and accept `features`; NotReady if the device does not agree."""
        self.reset()
        self.add_status(spec.ACKNOWLEDGE)
        self.add_status(spec.DRIVER)
        for select in (0, 1):
            self.put(spec.DRIVER_FEATURE_SELECT, 4, select)
            self.put(spec.DRIVER_FEATURE, 4, features >> 32 * select & 0xFFFF_FFFF)
        self.add_status(spec.FEATURES_OK)
        if not self.status & spec.FEATURES_OK:
            raise NotReady(f"features {features:#x} are not accepted")

    def start(
        self,
        features: int = spec.F_VERSION_1,
        *,
        size: int = 0,
        msix: bool = True,
        enabled: int | None = None,
    ) -> None:
        """From reset to DRIVER_OK with all queues, `size` entries each [the most that each can have].

        Vector 0 is for the configuration, vector n + 1 for queue n; the first `enabled` queues are enabled
        [all].
        """
        pci = self.function
        command = pci.read(Space.CONFIG, 4, 2) & ~0x0400
        pci.write(Space.CONFIG, 4, 2, command | 0x0006 | (0x0400 if msix else 0))
        self.negotiate(features)
        pci.write(Space.CONFIG, self.msix + 2, 2, 0x8000 if msix else 0)
        if msix:
            self._vector(spec.CONFIG_MSIX_VECTOR, 0)
        for index in range(self.get(spec.NUM_QUEUES, 2)):
            self._set_up(index, features, size, msix)
        for index in range(len(self.queues))[:enabled]:
            self.put(spec.QUEUE_SELECT, 2, index)
            self.put(spec.QUEUE_ENABLE, 2, 1)
        self.add_status(spec.DRIVER_OK)

    def kick(self, index: int) -> None:
        """Notify the queue by its register, as if no ioeventfd took it, unless the device needs no notice."""
        if self.queues[index].kick_wanted():
            self.notify(index)

    def notify(self, index: int) -> None:
        """Notify the queue, whether or not the device wants that."""
        self.put(spec.QUEUE_SELECT, 2, index)
        at = self.where[spec.CAP_NOTIFY_CFG] + self._multiplier * self.get(spec.QUEUE_NOTIFY_OFF, 2)
        self.function.write(Space.BAR0, at, 2, index)

    def _find_structures(self) -> None:
        read = self.function.read
        assert read(Space.CONFIG, 0, 2) == spec.PCI_VENDOR
        assert read(Space.CONFIG, 6, 2) & 0x10, "no capabilities"
        at = read(Space.CONFIG, 0x34, 1)
        for _ in range(48):
            if not at:
                return
            id, after, _, kind = (read(Space.CONFIG, at + i, 1) for i in range(4))
            if id == 0x11:
                self.msix = at
            elif id == 0x09:
                # A driver writes the BAR and the offset of the PCI_CFG window: they may be anything by now.
                assert kind == spec.CAP_PCI_CFG or read(Space.CONFIG, at + spec.CAP_BAR, 1) == 0
                self.where.setdefault(kind, read(Space.CONFIG, at + spec.CAP_OFFSET, 4))
                if kind == spec.CAP_NOTIFY_CFG:
                    self._multiplier = read(Space.CONFIG, at + spec.CAP_NOTIFY_OFF_MULTIPLIER, 4)
            at = after
        raise NotReady("the list of capabilities has a loop")

    def _feature(self, select: int) -> int:
        self.put(spec.DEVICE_FEATURE_SELECT, 4, select)
        return self.get(spec.DEVICE_FEATURE, 4)

    def _set_up(self, index: int, features: int, size: int, msix: bool) -> None:
        self.put(spec.QUEUE_SELECT, 2, index)
        most = self.get(spec.QUEUE_SIZE, 2)
        assert most and not self.get(spec.QUEUE_ENABLE, 2), f"queue {index} is not to be had"
        kind = PackedDriver if features & spec.F_RING_PACKED else SplitDriver
        gpa = self.gpa + index * self.extent
        queue = kind(self.memory, gpa, min(size, most) or most, features, extent=self.extent)
        self.put(spec.QUEUE_SIZE, 2, queue.size)
        for at, gpa in (
            (spec.QUEUE_DESC, queue.desc),
            (spec.QUEUE_DRIVER, queue.driver),
            (spec.QUEUE_DEVICE, queue.device),
        ):
            self.put(at, 4, gpa & 0xFFFF_FFFF)
            self.put(at + 4, 4, gpa >> 32)
        if msix:
            self._vector(spec.QUEUE_MSIX_VECTOR, index + 1)
        queue.interrupts(1)
        self.queues.append(queue)

    def _vector(self, at: int, vector: int) -> None:
        self.put(at, 2, vector)
        if self.get(at, 2) != vector:
            raise NotReady(f"vector {vector} is not to be had")
