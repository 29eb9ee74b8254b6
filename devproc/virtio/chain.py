"""A descriptor chain, parsed into one validated value before anything acts on it (virtio 1.2, 2.6 to 2.8).

The walk differs between the ring formats; what is checked of the elements does not and is here.  Left out:
limits of a device type on the shape of a chain, which its model checks by `read_size` and `write_size`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import Struct
from typing import Final, NamedTuple, Protocol

from devproc.virtio.spec import DESC_F_WRITE, DESC_SIZE
from kvmcore.memory import GuestMemory

CHAIN_MAX: Final = 1024
"""The most elements of a chain (2.7.4.1 allows a limit): IOV_MAX, so that one readv or writev takes it."""

_BYTES_MAX: Final = 1 << 32  # 2.7.5.2

Descriptor = tuple[int, int, int, int]
"""(addr, len, and as the format has them: flags and next, or id and flags)."""


class ChainError(Exception):
    """The driver broke the specification: the device needs a reset, the VM lives; the text is one line."""


class Span(NamedTuple):
    """[gpa, gpa + size): wholly RAM, never empty, clear of the queue's own ring."""

    gpa: int
    size: int


class Chain(NamedTuple):
    """One buffer of the driver; a tuple, because a frozen dataclass takes more than twice as long to make.

    `id` is what the used element will carry; `read_size` and `write_size` are bytes in total;
    `descriptors` is how many the chain takes in the ring itself (an indirect table is one).
    """

    id: int
    readable: tuple[Span, ...]
    writable: tuple[Span, ...]
    read_size: int
    write_size: int
    descriptors: int


class Queue(Protocol):
    """The device's end of a virtqueue, whichever its format.

    One thread owns it.  The constructor of both formats is
    `(memory, features, size, desc, driver, device, position=...)`, with the guest-physical addresses of the
    descriptor, driver and device areas, and raises ChainError for areas that no driver may give.
    """

    @property
    def size(self) -> int:
        """Entries, or in a packed ring descriptors."""

    def pop(self) -> Chain | None:
        """The next chain that the driver has made available, in its order.

        None: there is none now, and the driver has been asked to notify for the next one.  A device that
        stops before None comes back by itself: until then the driver is asked not to notify.

        Raises:
            ChainError: the driver broke the specification; the queue is of no further use.
        """

    def unpop(self, chain: Chain) -> None:
        """Give back the chain that was popped last: the next `pop` reads it from the ring again.

        It may then be another one, or an error.  AssertionError: it was not the last; that is our bug.
        """

    def push(self, chain: Chain, written: int) -> None:
        """Return a popped chain, with its first `written` bytes (of the writable part) filled in.

        Chains may come back in any order.  AssertionError: `written` is more than the chain takes, or the
        chain is not out; either is our bug.
        """

    def push_together(self, used: Sequence[tuple[Chain, int]]) -> None:
        """`push` several, which the driver sees all at once: the buffers of one merged frame."""

    def wants_interrupt(self) -> bool:
        """Whether the driver wants one for what was pushed since this was last asked."""

    @property
    def position(self) -> int:
        """Where the next `pop` is, for `position=` of a queue to be restored.

        Nothing may be out: a device that keeps a chain for later gives it back by `unpop` meanwhile.
        """


class Areas:
    """The guest-physical areas of a ring, which no element of a chain may touch.

    Args:
        areas: name, gpa, size in bytes and alignment of each.

    Attributes:
        ranges: from and to which guest-physical address each is.
        views: its bytes.

    Raises:
        ChainError: one is misaligned or not wholly RAM.
    """

    def __init__(self, memory: GuestMemory, areas: Sequence[tuple[str, int, int, int]]) -> None:
        self._memory: Final = memory
        self.ranges: Final = [(gpa, gpa + size) for _, gpa, size, _ in areas]
        for name, gpa, size, align in areas:
            if gpa % align or not memory.holds(gpa, size):
                raise ChainError(
                    f"{name} area at {gpa:#x}: expected {size:#x} bytes of RAM at a multiple of {align}"
                )
        self.views: Final = memory.views((gpa, size) for _, gpa, size, _ in areas)
        self._low: Final = min(low for low, _ in self.ranges)
        self._high: Final = max(high for _, high in self.ranges)

    def table(self, gpa: int, size: int, layout: Struct) -> list[Descriptor]:
        """One copy of an indirect table of `size` bytes (2.7.5.3, 2.8.7).

        Raises:
            ChainError: no table, longer than a chain may be, or not wholly RAM.
        """
        if not 0 < size <= CHAIN_MAX * DESC_SIZE or size % DESC_SIZE:
            raise ChainError(f"an indirect table of {size} bytes, expected 1 to {CHAIN_MAX} descriptors")
        if not self._memory.holds(gpa, size):
            raise ChainError(f"an indirect table at {gpa:#x}, size {size:#x}: not RAM")
        return list(layout.iter_unpack(self._memory.read(gpa, size)))

    def chain(self, id: int, elements: Sequence[tuple[int, int, int]], descriptors: int) -> Chain:
        """The chain of `elements`, each (gpa, size, flags), taking `descriptors` of the ring.

        Raises:
            ChainError: an element is empty, not RAM, in the ring, or readable after a writable one; too
                many elements, or too many bytes.
        """
        if len(elements) > CHAIN_MAX:
            raise ChainError(f"chain {id}: {len(elements)} elements, at most {CHAIN_MAX}")
        holds, low, high = self._memory.holds, self._low, self._high
        readable: list[Span] = []
        writable: list[Span] = []
        read_size = write_size = 0
        for gpa, size, flags in elements:
            if not size:
                raise ChainError(f"chain {id}: an empty element at {gpa:#x}")
            if not holds(gpa, size):
                raise ChainError(f"chain {id}: an element at {gpa:#x}, size {size:#x}: not RAM")
            if gpa < high and gpa + size > low and self._aliases(gpa, size):
                raise ChainError(f"chain {id}: an element at {gpa:#x}, size {size:#x}: in the ring itself")
            if flags & DESC_F_WRITE:
                writable.append(Span(gpa, size))
                write_size += size
            elif writable:
                raise ChainError(f"chain {id}: a readable element after a writable one")
            else:
                readable.append(Span(gpa, size))
                read_size += size
        if read_size + write_size > _BYTES_MAX:
            raise ChainError(f"chain {id}: {read_size + write_size:#x} bytes, at most {_BYTES_MAX:#x}")
        return Chain(id, tuple(readable), tuple(writable), read_size, write_size, descriptors)

    def _aliases(self, gpa: int, size: int) -> bool:
        return any(gpa < high and gpa + size > low for low, high in self.ranges)


def part(spans: Iterable[Span], offset: int, size: int) -> tuple[Span, ...]:
    """Bytes [offset, offset + size) of what `spans` are one after the other; shorter where they end."""
    found: list[Span] = []
    for span in spans:
        gpa, length = span
        if offset >= length:
            offset -= length
            continue
        if size <= 0:
            break
        if offset or length > size:
            length = min(length - offset, size)
            found.append(Span(gpa + offset, length))
            offset = 0
        else:
            found.append(span)
        size -= length
    return tuple(found)
