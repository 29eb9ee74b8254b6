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


class Output(Protocol):
    """A byte sink on the host that may be slow."""

    @property
    def room(self) -> int:
        """How many bytes `write` takes now; 0 while the host does not drain."""

    def write(self, data: bytes) -> int:
        """Queue up to `room` bytes of `data` for the host, never blocking; returns how many were taken."""


class Input(Protocol):
    """A byte source on the host."""

    def read(self, limit: int) -> bytes:
        """Up to `limit` bytes, never blocking; b"" when there are none now."""


class Device(Protocol):
    """A device model as `devproc/child.py` drives it.  None of these may raise on guest input.

    The constructor takes the catalogue entry's descriptors and parameters by name, plus `clock` and
    `wall` (both `Clock`), all keyword-only; a model declares only the ones it uses, and the child passes
    `clock`/`wall` only to models whose catalogue entry asks for them.
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

    @property
    def wants_input(self) -> bool:
        """Whether the child should watch the input descriptor now."""

    def on_input(self) -> None:
        """The input descriptor is readable; take what fits."""

    def on_output(self) -> None:
        """The output has room again."""

    def save(self) -> bytes:
        """The whole state, packed (msgpack through `devproc.state`), at most wire.STATE_MAX bytes."""

    def restore(self, state: bytes) -> None:
        """Take a saved state, checking every value.

        Raises:
            ValueError: the state is not one that `save` of this kind can have produced.
        """

    def counters(self) -> dict[str, int]:
        """What was counted: guest nonsense, bytes, interrupts."""
