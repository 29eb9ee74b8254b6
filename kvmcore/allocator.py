"""Hands out I/O ports, MMIO addresses and interrupt lines so that no two devices get the same one.

Lowest address that fits first, so a machine described twice is laid out twice the same.  Left out: moving
what the guest has placed itself; a guest's BAR writes are followed by the supervisor's PCI shadow.
"""

from __future__ import annotations

from bisect import insort
from typing import NamedTuple

from kvmcore import layout
from kvmcore.errors import ConfigError


class Exhausted(ConfigError):
    """There is no room left for what was asked."""


class Overlap(ConfigError):
    """The range asked for belongs to someone else, or lies outside the space."""


class Region(NamedTuple):
    """[base, end) in the units of its space, and who has it."""

    base: int
    end: int
    name: str

    @property
    def size(self) -> int:
        return self.end - self.base


class Space:
    """Non-overlapping named regions in [base, end)."""

    def __init__(self, name: str, base: int, end: int) -> None:
        self.name = name
        self.base = base
        self.end = end
        self._regions: list[Region] = []

    @property
    def regions(self) -> tuple[Region, ...]:
        """Everything handed out, in ascending order."""
        return tuple(self._regions)

    def allocate(self, name: str, size: int, align: int = 1) -> Region:
        """The lowest free region of `size` whose base is a multiple of `align`, a power of two.

        Raises:
            Exhausted: no gap is big enough.
            ValueError: `size` or `align` cannot be meant.
        """
        if size <= 0 or align <= 0 or align & (align - 1):
            raise ValueError(f"{name}: size {size}, alignment {align}")
        base = _align(self.base, align)
        for taken in self._regions:
            if base + size <= taken.base:
                break
            base = max(base, _align(taken.end, align))
        if base + size > self.end:
            raise Exhausted(
                f"{self.name}: no room for {size:#x} for {name}, {self.free_total():#x} left in pieces"
            )
        return self._take(Region(base, base + size, name))

    def claim(self, name: str, base: int, size: int = 1) -> Region:
        """Exactly [base, base + size).

        Raises:
            Overlap: it is not free, or not inside the space.
            ValueError: `size` cannot be meant.
        """
        if size <= 0:
            raise ValueError(f"{name}: size {size}")
        region = Region(base, base + size, name)
        if region.base < self.base or region.end > self.end:
            raise Overlap(f"{self.name}: {name} at [{base:#x}, {region.end:#x}) is outside the space")
        for taken in self._regions:
            if taken.base < region.end and region.base < taken.end:
                raise Overlap(f"{self.name}: {name} at [{base:#x}, {region.end:#x}) overlaps {taken.name}")
        return self._take(region)

    def free(self, region: Region) -> None:
        """Give back what `allocate` or `claim` returned.

        Raises:
            ValueError: it is not taken.
        """
        self._regions.remove(region)

    def free_total(self) -> int:
        """How much is left, in however many pieces."""
        return self.end - self.base - sum(r.size for r in self._regions)

    def _take(self, region: Region) -> Region:
        insort(self._regions, region)
        return region


class Resources:
    """The spaces that PCI functions draw from, for a machine with `mem_size` bytes of RAM.

    `gsi` holds every pin of the I/O APIC from the first PCI one on; lines that legacy devices have there
    (RTC, SCI) are claimed by whoever places those devices.  `messages` are the GSIs that are no pin.
    """

    def __init__(self, mem_size: int) -> None:
        high = layout.high_mmio(mem_size)
        self.io = Space("I/O ports", layout.PCI_IO, layout.PCI_IO + layout.PCI_IO_SIZE)
        self.mmio = Space("32-bit MMIO", layout.PCI_MMIO, layout.PCI_MMIO + layout.PCI_MMIO_SIZE)
        self.high_mmio = Space("64-bit MMIO", high, high + layout.HIGH_MMIO_SIZE)
        self.gsi = Space("interrupt lines", layout.GSI_PCI_FIRST, layout.GSI_COUNT)
        self.messages = Space("message-signalled interrupts", layout.GSI_COUNT, layout.GSI_MAX)


def _align(value: int, align: int) -> int:
    return (value + align - 1) & -align
