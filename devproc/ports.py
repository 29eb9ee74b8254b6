"""What a device model is handed, and what it must offer: ports, not powers.

A model gets callables, a monotonic clock and (if it does DMA) a guest memory; it can name no file,
socket or time of its own.  `devproc/child.py` builds the real ports from descriptors; tests build
fake ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Signal = Callable[[], None]
"""One edge: writes 1 to an eventfd (an interrupt to KVM, or an event to the supervisor)."""

Clock = Callable[[], int]
"""Nanoseconds; monotonic for intervals, since the epoch for the wall clock."""

Entropy = Callable[[int], bytes]
"""Up to that many random bytes; fewer, or none, when the host has no more now."""


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

    @property
    def deadline_ns(self) -> int | None:
        """When (on the monotonic clock) `on_deadline` wants to be called; None: never."""

    def on_deadline(self, now_ns: int) -> None:
        """The deadline has passed; must move `deadline_ns` forward or clear it."""

    def save(self) -> bytes:
        """The whole state, packed (msgpack through `devproc.state`), at most wire.STATE_MAX bytes."""

    def restore(self, state: bytes) -> None:
        """Take a saved state, checking every value.

        Raises:
            ValueError: the state is not one that `save` of this kind can have produced.
        """

    def counters(self) -> dict[str, int]:
        """What was counted: guest nonsense, bytes, interrupts."""
