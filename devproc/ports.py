"""What a device model is handed, and what it must offer: ports, not powers.

A model gets callables, a monotonic clock and (if it does DMA) a guest memory; it can name no file,
socket or time of its own.  `devproc/child.py` builds the real ports from descriptors; tests build
fake ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from devproc._ring import Ring
from devproc.vhost.message import Header

Signal = Callable[[], None]
"""One edge: writes 1 to an eventfd (an interrupt to KVM, or an event to the supervisor)."""

Clock = Callable[[], int]
"""Nanoseconds; monotonic for intervals, since the epoch for the wall clock."""

Entropy = Callable[[int], bytes]
"""Up to that many random bytes; fewer, or none, when the host has no more now."""

Buffer = bytes | bytearray | memoryview

Say = Callable[[str], None]
"""One line for the user, with the device's name before it."""


class HostError(Exception):
    """The host's end of a port is gone, and the device cannot go on without; one line."""


class Output(Protocol):
    """A byte sink on the host that may be slow."""

    @property
    def room(self) -> int:
        """How many bytes `write` takes now; 0 while the host does not drain."""

    def write(self, data: bytes) -> int:
        """Queue up to `room` bytes of `data` for the host, never blocking; returns how many were taken."""

    def listen(self, on_room: Callable[[], None]) -> None:
        """Have `on_room` called when there is room again after there was none."""


class Input(Protocol):
    """A byte source on the host."""

    def read(self, limit: int) -> bytes:
        """Up to `limit` bytes, never blocking; b"" when there are none now."""

    def listen(self, wanted: Callable[[], bool], on_input: Callable[[], None]) -> None:
        """Have `on_input` called when there may be bytes; `wanted` is asked before each wait."""


class Kick(Protocol):
    """Edges from KVM or the supervisor."""

    def listen(self, on_kick: Callable[[], None]) -> None:
        """Have `on_kick` called after an edge; several before the loop looks are one."""


class Disk(Protocol):
    """Bytes on the host.  Who calls keeps offset + size within `size`.

    All of these raise OSError when the host cannot do all of it: a full or failing host, or an image that
    someone has made shorter.
    """

    @property
    def size(self) -> int:
        """Bytes; a multiple of 512."""

    def read(self, offset: int, into: Sequence[memoryview]) -> None:
        """Fill `into`."""

    def write(self, offset: int, data: Sequence[memoryview]) -> None:
        """Write `data`; it is on stable storage after the next `flush`."""

    def flush(self) -> None:
        """Put everything written so far on stable storage."""

    def discard(self, offset: int, size: int) -> None:
        """Nobody needs these bytes any more; what they read as is undefined."""

    def zero(self, offset: int, size: int, *, unmap: bool) -> None:
        """Make these bytes zeros; `unmap`: without keeping room for them, where that is possible."""

    def extend(self, length: int) -> None:
        """Have `length` bytes, no fewer than now; the new ones are zeros, or what the host has put there."""

    def close(self) -> None:
        """There is nothing more to come; what is kept in memory goes to the host."""


class File(Disk, Protocol):
    """A disk as it lies there, which an image format may need longer."""

    @property
    def length(self) -> int:
        """Where it ends, in bytes."""

    def serve(self, ring: Ring, left: int, least: int, *, writable: bool) -> tuple[int, int, int]:
        """Serve a disk's requests from the ring, as long as they are plain reads and writes that succeed.

        Until `left` bytes were moved, where each request counts as `least` bytes at least.  Returns what is
        left of them, and how many reads and writes were served.
        """


class Link(Protocol):
    """A queue of an Ethernet interface on the host: whole frames, each behind a `virtio_net_hdr`.

    The header is the 12 bytes of virtio 1.2, section 5.1.6, whose `num_buffers` is not the link's to fill.
    """

    @property
    def offloads(self) -> bool:
        """Whether checksums and segmentation may be left to the host, and by it to the guest."""

    @property
    def up(self) -> bool:
        """Whether there is still somebody at the other end; once gone it does not come back."""

    @property
    def tap(self) -> int:
        """The descriptor at which `receive` and `send` are readv(2) and writev(2), in C too; -1 for none."""

    def receive(self, buffers: Sequence[Buffer]) -> int:
        """The next frame into `buffers`, one after the other: its size with header, 0 when there is none now.

        One that is longer than `buffers` together is cut off, so let them have a byte more than is wanted.
        """

    def send(self, buffers: Sequence[Buffer]) -> bool | None:
        """Send header and frame, `buffers` one after the other: True, or None if the host refuses them.

        False: no room now; `on_room` will be called.
        """

    def offload(self, *, checksum: bool, tso4: bool, tso6: bool, ecn: bool) -> None:
        """What the receiver does itself: checksums, segmentation of TCP over IPv4, over IPv6, with ECN."""

    def listen(
        self,
        wanted: Callable[[], bool],
        on_frame: Callable[[], None],
        on_room: Callable[[], None],
        on_down: Callable[[], None],
    ) -> None:
        """Have `on_frame` called when there may be a frame; `wanted` is asked before each wait.

        `on_room` when `send` has room again, `on_down` when `up` has become false.
        """


class Line(Protocol):
    """A place for a connection with a program on the host: a stream of bytes each way, while there is one.

    `receive`, `send` and `shut` raise OSError when the other end is gone.
    """

    @property
    def number(self) -> int:
        """Which place this is, in the words of `Exchange`."""

    def open(self) -> None:
        """There is a connection in this place."""

    def receive(self, buffers: Sequence[Buffer]) -> int | None:
        """Bytes into `buffers`, one after the other: how many; None: none now, 0: there are no more."""

    def send(self, buffers: Sequence[Buffer]) -> int:
        """The first bytes of `buffers`, one after the other: how many; 0 while the host does not drain."""

    def shut(self, *, receive: bool = False, send: bool = False) -> None:
        """Nothing more is received, which the sender will hear of; or sent, which the receiver will."""

    def close(self) -> None:
        """The connection is over and the place empty; what was sent still arrives."""

    def listen(
        self,
        wants_read: Callable[[], bool],
        wants_write: Callable[[], bool],
        on_readable: Callable[[], None],
        on_writable: Callable[[], None],
    ) -> None:
        """While it is open: both wants are asked before each wait, and the others called when it is so."""


class Exchange(Protocol):
    """Connects with programs on the host, in places that are empty."""

    def dial(self, port: int) -> bool:
        """Ask for the program that listens at `port`, which `on_call` will tell of; False: not so fast."""

    def listen(self, on_call: Callable[[bool, int | None], None]) -> None:
        """Have `on_call` called for each `dial`, in their order, with True; with False when a program calls.

        With it comes the place of the connection; None: there is nobody, or no empty place.
        """


class Shared(Protocol):
    """A port that another program can be given a share in: guest memory, a kick, a signal."""

    @property
    def fd(self) -> int:
        """For the backend that hands it over."""


class SharedSignal(Shared, Protocol):
    """A `Signal` that another program can be given a share in."""

    def __call__(self) -> None: ...


class SharedKick(Shared, Kick, Protocol):
    """A `Kick` that another program can be given a share in."""


class BackEnd(Protocol):
    """A vhost-user back end: a program on the host that serves a function's rings."""

    @property
    def up(self) -> bool:
        """Whether it is still there; once gone it does not come back."""

    def send(self, message: bytes, shared: Sequence[Shared] = ()) -> None:
        """Send a message, and with it a share in each of `shared`; vanishes when there is nobody."""

    def hang_up(self, why: str) -> None:
        """End the conversation, as if the other end had."""

    def listen(self, on_answer: Callable[[Header, bytes], None], on_gone: Callable[[str], None]) -> None:
        """Have `on_answer` called for each message that comes, with its payload; `on_gone` when `up` ends.

        What `on_gone` is told is the rest of a sentence about the back end.
        """


class Watched:
    """The loop's side of a port that has something to wait for: the base of every backend but a signal.

    The model's side is the kind's own protocol, such as `Input`.  None of these may block; the two that act
    may raise HostError.

    Args:
        fd: what select is to watch.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @property
    def wants_read(self) -> bool:
        """Whether to wait until `fd` is readable; asked before each wait."""
        return False

    @property
    def wants_write(self) -> bool:
        """Whether to wait until `fd` is writable; asked before each wait.  Stop gives it a while."""
        return False

    def on_readable(self) -> None:
        """`fd` is readable."""

    def on_writable(self, idle: bool) -> None:
        """`fd` is writable; unless `idle`, accesses keep coming and what is small may wait."""


class Device(Protocol):
    """A device model as `devproc/child.py` drives it.  None of these may raise on guest input.

    The constructor takes the catalogue entry's descriptors (as ports), parameters and sources by name, all
    keyword-only; an array of descriptors is a tuple of ports.  `mem_below_4g` and `mem_above_4g` go into
    `memory` where there is one.  What the host does reaches the model by what it has told its ports.
    """

    def read(self, space: int, offset: int, size: int) -> int:
        """The value a guest read of `size` bytes gives; fits in `size` bytes."""

    def write(self, space: int, offset: int, size: int, data: int) -> None:
        """A guest write of the low `size` bytes of `data`."""

    def writes(self, space: int, offset: int, data: bytes) -> None:
        """As many writes of a byte, one after the other, as `data` has."""

    @property
    def shadows(self) -> Mapping[int, Callable[[], int | None]]:
        """Offsets in Space.PORT, and what a read of the byte gives; None while it changes anything."""

    @property
    def deadline_ns(self) -> int | None:
        """When (on the monotonic clock) `on_deadline` wants to be called; None: never."""

    def on_deadline(self, now_ns: int) -> None:
        """The deadline has passed; must move `deadline_ns` forward or clear it."""

    def set(self, name: str, value: int) -> None:
        """A setting of the catalogue entry has this value from now on; it is in its range."""

    def stop(self) -> None:
        """`Stop` has come: nothing follows, and the host's files are to be as others expect them."""

    def save(self) -> bytes:
        """The whole state, packed (msgpack through `devproc.state`), at most wire.STATE_MAX bytes."""

    def restore(self, state: bytes) -> None:
        """Take a saved state, checking every value.

        Raises:
            ValueError: the state is not one that `save` of this kind can have produced.
        """

    def counters(self) -> dict[str, int]:
        """What was counted: guest nonsense, bytes, interrupts."""
