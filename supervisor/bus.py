"""The io and mmio buses: who owns which address, kept free of overlaps and handed whole to the exit loop.

A claim belongs to a device process (the exit loop talks to it without entering Python) or to a handler
in the supervisor (rare: PCI configuration, the split interrupt chip).  What nobody claims floats: reads
are all ones, writes vanish, both counted by the exit loop.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Protocol

from devproc.record import record
from devproc.wire import Space
from kvmcore.errors import ConfigError
from kvmcore.exitloop import Core, Route


class Handler(Protocol):
    """An owner inside the supervisor; offsets count from the claim's start, sizes are 1, 2, 4 or 8."""

    def read(self, offset: int, size: int) -> int: ...
    def write(self, offset: int, size: int, data: int) -> None: ...


@record
class Callbacks:
    """A Handler made of two functions."""

    read: Callable[[int, int], int]
    write: Callable[[int, int, int], None]


@record
class DeviceTarget:
    """A device process: its number in the exit loop, and where in which of its spaces the claim starts."""

    index: int
    space: Space
    offset: int = 0


@record
class Checked:
    """A device's registers whose writes come here first: the exit loop reads from the device itself."""

    index: int
    space: Space
    offset: int
    write: Callable[[int, int, int], None]

    def read(self, offset: int, size: int) -> int:
        """Never reached; all ones if it were."""
        return (1 << 8 * size) - 1


@record
class PciConfig:
    """A PCI configuration window: the exit loop reads from the functions itself, writes come here."""

    write: Callable[[int, int, int], None]

    def read(self, offset: int, size: int) -> int:
        """Never reached; all ones if it were."""
        return (1 << 8 * size) - 1


@record
class Claim:
    """[start, start + size) belongs to `owner`."""

    start: int
    size: int
    owner: str
    target: DeviceTarget | Handler

    @property
    def end(self) -> int:
        return self.start + self.size


class Bus:
    """One address space of `size` bytes: claims sorted by start, never overlapping."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self._claims: list[Claim] = []  # replaced whole: vCPU threads look things up meanwhile

    def replace(self, owner: str, claims: Iterable[Claim]) -> None:
        """Give `owner` these claims instead of all it had.

        Raises:
            ConfigError: out of the bus or overlapping another's; the bus is then as it was.
        """
        kept = [c for c in self._claims if c.owner != owner]
        merged = sorted([*kept, *claims], key=lambda c: c.start)
        for c in merged:
            if c.size <= 0 or c.start < 0 or c.end > self.size:
                raise ConfigError(f"{self.name} bus: {c.owner} at {c.start:#x}+{c.size:#x} is outside")
        for a, b in itertools.pairwise(merged):
            if a.end > b.start:
                raise ConfigError(
                    f"{self.name} bus: {a.owner} [{a.start:#x}, {a.end:#x}) overlaps "
                    f"{b.owner} [{b.start:#x}, {b.end:#x})"
                )
        self._claims = merged

    def insert(self, claim: Claim) -> None:
        """Add one claim to its owner's.

        Raises:
            ConfigError: as `replace`.
        """
        self.replace(claim.owner, [*(c for c in self._claims if c.owner == claim.owner), claim])

    def claims(self) -> tuple[Claim, ...]:
        return tuple(self._claims)

    def handler(self, addr: int) -> tuple[Handler, int]:
        """The supervisor's own handler of `addr`, and the offset in its claim.

        Raises:
            LookupError: a device process or nobody owns it.
        """
        claims = self._claims
        at = bisect_right(claims, addr, key=lambda c: c.start) - 1
        if at >= 0:
            claim = claims[at]
            if addr < claim.end and not isinstance(claim.target, DeviceTarget):
                return claim.target, addr - claim.start
        raise LookupError(f"{self.name} {addr:#x}")

    def routes(self) -> list[Route]:
        return [_route(c) for c in self._claims]


def _route(claim: Claim) -> Route:
    match claim.target:
        case DeviceTarget(index, space, offset):
            return Route.device(claim.start, claim.size, index, space, offset)
        case Checked(index, space, offset):
            return Route.checked(claim.start, claim.size, index, space, offset)
        case PciConfig():
            return Route.pci_config(claim.start, claim.size, Space.CONFIG)
        case _:
            return Route.python(claim.start, claim.size)


class Buses:
    """Both buses of a machine, published to the exit loop together."""

    def __init__(self, core: Core, io_size: int, mmio_size: int) -> None:
        self._core = core
        self.io = Bus("io", io_size)
        self.mmio = Bus("mmio", mmio_size)

    def place(self, owner: str, claims: Iterable[Claim]) -> bool:
        """Put what `owner` has in memory where the guest has moved it, and publish that.

        False if something else is there: `owner` then has nothing, and the others keep what they have.
        """
        placed = True
        try:
            self.mmio.replace(owner, claims)
        except ConfigError:
            self.mmio.replace(owner, ())
            placed = False
        self.publish()
        return placed

    def publish(self) -> None:
        """Swap the exit loop's table for what is claimed now."""
        self._core.set_routes(self.io.routes(), self.mmio.routes())
