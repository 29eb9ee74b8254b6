"""The driver of a virtio function on a bench: operations on queues, and what must hold of what comes back.

It starts the device as Linux does (devproc/driver.py), so that an input begins where the work begins.  Most
chains are as they should be, or the parser is all that is ever reached; a `Twist` makes one wrong in one
way.  After that, and after a register of the common configuration or of configuration space was written past
the driver, what the driver believes of the device may be wrong, and only the model's own behaviour is looked
at until RESTART.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from devproc.driver import NotReady, PciDriver, SplitDriver
from devproc.fuzz.finding import Finding
from devproc.fuzz.inputs import Twist, sizes
from devproc.ports import Device
from devproc.record import replace
from devproc.virtio import spec
from devproc.virtio.chain import Span
from devproc.virtio.device import TransportState
from devproc.wire import Space
from kvmcore.memory import GuestMemory

BASE: Final = 0x1000
EXTENT: Final = 0x3000  # of a queue: rings, tables and buffers
_PACKED: Final = 8
_WITHOUT_LAST: Final = 16
_BAR0: Final = 0x10
_WITHOUT: Final = ((1 << 24) - 1, spec.F_INDIRECT_DESC, spec.F_EVENT_IDX)
_SIZE: Final = 16
_TABLES: Final = 128  # bytes that the indirect tables of one chain take, with their alignment


class Guest:
    """The driver.

    Args:
        model: the device.
        kick: by queue, has the device notified.
        discards: whether the device gives memory back, which the driver does not see.
    """

    def __init__(
        self, model: Device, memory: GuestMemory, kick: Callable[[int], None], discards: bool
    ) -> None:
        self.memory = memory
        self._model = model
        self._kick = kick
        self._discards = discards
        self._fresh = _state(model)
        self._pci = PciDriver(model, memory, BASE, EXTENT)
        self._enabled = 0
        self._start(0, _SIZE)
        self._end = BASE + EXTENT * len(self._pci.queues)

    def _start(self, choice: int, size: int) -> None:
        features = self._pci.offered()
        for bit, mask in enumerate(_WITHOUT):
            if choice >> bit & 1:
                features &= ~mask
        if not choice & _PACKED:
            features &= ~spec.F_RING_PACKED
        queues = self._pci.get(spec.NUM_QUEUES, 2)
        self._enabled = queues - 1 if choice & _WITHOUT_LAST else queues
        self._pci.start(features | spec.F_VERSION_1, size=size, enabled=self._enabled)
        self.spoilt = self._discards  # the rings may be what the guest has given away

    def rings(self) -> bytes:
        """The part of memory that the driver uses."""
        return self.memory.read(0, self._end)

    def reset(self, rings: bytes) -> None:
        """Memory as it was; the driver's and the model's own state are the snapshot's."""
        self.memory.write(0, rings)

    def write(self, space: int, offset: int, size: int, data: int) -> None:
        """A register access of the guest's, past the driver."""
        if space == Space.CONFIG or offset < spec.BAR_ISR:
            self.spoilt = True
        self._model.write(space, offset, size, data)

    def chain(self, index: int, four: int, twist: int, data: bytes) -> None:
        """Make a chain available; nothing, where there is no room for it."""
        if index >= len(self._pci.queues):
            return
        queue = self._pci.queues[index]
        read, read_more, write, write_more = sizes(four)
        size = sum((read, read_more, write, write_more))
        data = data[: read + read_more].ljust(read + read_more, b"\0")
        parts = [p for p in (data[:read], data[read:]) if p]
        room = [n for n in (write, write_more) if n]
        indirect = twist == Twist.INDIRECT and not self.spoilt
        needed = 1 if indirect else len(parts) + len(room)
        if not size or size + _TABLES > queue.left or needed > queue.free:
            return
        if twist in (Twist.PLAIN, Twist.INDIRECT) or not isinstance(queue, SplitDriver):
            queue.add(map(queue.place, parts), map(queue.room, room), indirect=indirect)
            return
        self.spoilt = True
        _twisted(queue, twist, [queue.place(p) for p in parts], [queue.room(n) for n in room])

    def kick(self, index: int, *, look: bool) -> list[tuple[int, int, int]]:
        """Notify a queue; what was used, as (queue, id, written).  `look`: at all of memory, too.

        Raises:
            Finding: what came back is wrong.
        """
        queues = self._pci.queues
        if index >= len(queues):
            return []
        look = look and not self.spoilt and not self._discards
        before = bytearray(self.rings()) if look else bytearray()
        allowed = [span for queue in queues[: self._enabled] for span in _writable(queue)] if look else []
        self._kick(index)
        if look:
            self._compare(before, allowed)
        # Where the device has nothing, it takes a kick to see that it has used something.
        return self.reap([n for n, q in enumerate(queues) if look or n == index or q._offered])

    def _compare(self, before: bytearray, allowed: list[Span]) -> None:
        now = self.rings()
        for gpa, size in allowed:
            before[gpa : gpa + size] = now[gpa : gpa + size]
        if before != now:
            at = next(i for i, (a, b) in enumerate(zip(before, now, strict=True)) if a != b)
            raise Finding("memory", f"the device has written to {at:#x}, which is not its to write")

    def reap(self, indices: Iterable[int]) -> list[tuple[int, int, int]]:
        """What the device has used since of these queues; raises Finding."""
        if self.spoilt:
            return []
        queues = self._pci.queues
        try:
            found = [(n, id, written) for n in indices for id, written, _ in queues[n].done()]
        except AssertionError as e:
            raise Finding("used", str(e)) from None
        if not found:
            return found
        for n in {n for n, _, _ in found}:
            if n >= self._enabled:
                raise Finding("used", f"a chain of queue {n}, which is not enabled, is used")
            queues[n].interrupts(1)
        return found

    def restart(self, choice: int, shift: int) -> None:
        """Reset the device, see that it is as new, and start it again.

        Args:
            choice: bits 0 to 2 take features away: the device's own, indirect, event index; bit 3 takes
                packed rings; bit 4 leaves the last queue as it is, not enabled.
            shift: log2 of the queues' size.

        Raises:
            Finding: it is not.
        """
        try:
            self._pci.reset()
        except NotReady as e:
            raise Finding("reset", str(e)) from None
        self._check_bar()
        state = _state(self._model)
        if state != self._fresh:
            changed = [
                name for name in state.__match_args__ if getattr(state, name) != getattr(self._fresh, name)
            ]
            raise Finding("reset", f"not as in a new device: {', '.join(changed)}")
        try:
            self._start(choice, 1 << shift)
        except (NotReady, AssertionError):
            self.spoilt = True  # features that it does not take, or a register that was written before
            return
        for n, (driver, setup) in enumerate(zip(self._pci.queues, _state(self._model).queues, strict=True)):
            begin = 0 if isinstance(driver, SplitDriver) else 1 << 15
            if setup.position not in (begin, None):
                raise Finding("reset", f"queue {n} begins at {setup.position}")

    def _check_bar(self) -> None:
        """Size BAR 0 as a firmware does (PCI 3.0, 6.2.5.1), and leave it as it was."""
        pci = self._model
        before = pci.read(Space.CONFIG, _BAR0, 4)
        pci.write(Space.CONFIG, _BAR0, 4, 0xFFFF_FFFF)
        size = -(pci.read(Space.CONFIG, _BAR0, 4) & ~0xF) & 0xFFFF_FFFF
        pci.write(Space.CONFIG, _BAR0, 4, before)
        if size & (size - 1) or size <= max(self._pci.where.values()):
            raise Finding("bar", f"BAR 0 is of {size:#x} bytes")


def _twisted(queue: SplitDriver, twist: int, read: list[Span], write: list[Span]) -> None:
    """A chain that is wrong in one way; its descriptors are the last of the table."""
    elements = [(gpa, size, 0) for gpa, size in read] + [
        (gpa, size, spec.DESC_F_WRITE) for gpa, size in write
    ]
    gpa, size, flags = elements[-1]
    match twist:
        case Twist.OUTSIDE:
            elements[-1] = (1 << 40, size, flags)
        case Twist.OVERFLOW:
            elements[-1] = ((1 << 64) - 8, size, flags)
        case Twist.EMPTY:
            elements[-1] = (gpa, 0, flags)
        case Twist.HUGE:
            elements[-1] = (gpa, 0xFFFF_FFFF, flags)
        case Twist.RING:
            elements[-1] = (queue.device, size, flags)
        case Twist.BACKWARDS:
            elements.reverse()
        case Twist.NESTED:
            inner = queue._table([(gpa, size, flags)])
            outer = queue._table([(*inner, spec.DESC_F_INDIRECT)])
            elements = [(*outer, spec.DESC_F_INDIRECT)]
    first = queue.size - len(elements)
    for i, (gpa, size, flags) in enumerate(elements):
        last = i == len(elements) - 1
        more = not last or twist == Twist.LOOP
        following = first if last else first + i + 1
        queue.descriptor(first + i, gpa, size, flags | (spec.DESC_F_NEXT if more else 0), following)
    if twist == Twist.HEAD:
        queue.offer(queue.size)
    else:
        queue.offer(max(first, 0))
    if twist == Twist.AHEAD:
        queue.idx = queue.idx + queue.size + 1


def _writable(queue: Any) -> list[Span]:
    """What the device may write of a queue: its area, and the writable parts of the chains it has."""
    spans = [s for offered in queue._offered.values() for s in offered.writable]
    if isinstance(queue, SplitDriver):
        return [*spans, Span(queue.device, 6 + 8 * queue.size)]
    return [*spans, Span(queue.device, 4), Span(queue.desc, 16 * queue.size)]


def _state(model: Any) -> TransportState:
    """What a reset must undo: the transport's state but for registers, which are PCI's."""
    state: TransportState = model.save_transport()
    return replace(state, registers=(), generation=0)
