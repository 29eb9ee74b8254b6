"""PCI configuration access and the supervisor's own shadow of each function (PCI 3.0, 3.2.2.3 and 6).

The shadow keeps what decides where things are mapped (command register, BARs), taken from the
guest's writes and never from what a device answers; a device process cannot move a BAR.

Left out: bridges and buses other than 0.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

COMMAND = 0x04
COMMAND_IO, COMMAND_MEMORY = 0x1, 0x2
BAR0 = 0x10
_BARS = 6
CONFIG_SIZE = 256


class ConfigSpace(Protocol):
    """The owner of a function's configuration space: a device process behind its proxy."""

    def config_write(self, offset: int, size: int, data: int) -> None: ...


@dataclass(frozen=True)
class Bar:
    """One base address register as the function declares it before it starts; `size` a power of two."""

    index: int
    kind: str  # "io", "mem32" or "mem64" (which also takes register index + 1)
    size: int


@dataclass(frozen=True)
class Mapping:
    """Where a BAR is decoded now."""

    bar: Bar
    base: int


class FunctionShadow:
    """What the guest has written to the registers that place a function's BARs."""

    def __init__(self, bars: tuple[Bar, ...] = ()) -> None:
        self.bars = bars
        self._command = 0
        self._registers = [0] * _BARS

    def write(self, offset: int, size: int, data: int) -> bool:
        """Note a configuration write; True if any mapping may have changed."""
        before = self.mappings()
        for i in range(size):
            at, byte = offset + i, data >> 8 * i & 0xFF
            if COMMAND <= at < COMMAND + 2:
                self._command = _put(self._command, at - COMMAND, byte)
            elif BAR0 <= at < BAR0 + 4 * _BARS:
                n, part = divmod(at - BAR0, 4)
                self._registers[n] = _put(self._registers[n], part, byte)
        return self.mappings() != before

    def mappings(self) -> tuple[Mapping, ...]:
        """Every BAR that is decoded: enabled in the command register, and at an address."""
        found = []
        for bar in self.bars:
            enable = COMMAND_IO if bar.kind == "io" else COMMAND_MEMORY
            value = self._registers[bar.index]
            limit = 1 << 16 if bar.kind == "io" else 1 << 32
            if bar.kind == "mem64":
                value |= self._registers[bar.index + 1] << 32
                limit = 1 << 64
            # The low bits are hard-wired; all ones is the guest asking for the size, not an address.
            base = value & ~(bar.size - 1) & (limit - 1)
            if self._command & enable and base and base + bar.size < limit:
                found.append(Mapping(bar, base))
        return tuple(found)


def _put(value: int, part: int, byte: int) -> int:
    return value & ~(0xFF << 8 * part) | byte << 8 * part


class PciBus:
    """Writes to the configuration space of bus 0, by mechanism #1 (0xcf8) and ECAM.

    Reads, the address latch and functions that do not exist are the exit loop's.

    Args:
        address: CONFIG_ADDRESS as the guest last wrote it.
        remap: called with the device number and its mappings after a write that moved a BAR.
    """

    def __init__(self, address: Callable[[], int], remap: Callable[[int, tuple[Mapping, ...]], None]) -> None:
        self._functions: dict[int, tuple[ConfigSpace, FunctionShadow]] = {}
        self._address = address
        self._remap = remap
        self._lock = threading.Lock()  # a vCPU must not remap while another does

    def add(self, slot: int, owner: ConfigSpace, shadow: FunctionShadow) -> None:
        """Function 0 of device `slot` (0..31)."""
        assert slot not in self._functions and 0 <= slot < 32
        self._functions[slot] = (owner, shadow)

    def port_write(self, offset: int, size: int, data: int) -> None:
        """`offset` from 0xcf8."""
        address = self._address()
        self._write(address >> 8 & 0xFFFF, (address & 0xFC) + (offset & 3), size, data)

    def ecam_write(self, offset: int, size: int, data: int) -> None:
        self._write(offset >> 12, offset & 0xFFF, size, data)

    def _write(self, bdf: int, offset: int, size: int, data: int) -> None:
        """`bdf`: bus << 8 | device << 3 | function."""
        found = None if bdf & 0x7 or bdf >> 8 else self._functions.get(bdf >> 3)
        if found is None:  # the exit loop knew it, so another vCPU has moved the address meanwhile
            return
        owner, shadow = found
        with self._lock:
            owner.config_write(offset, size, data)
            if shadow.write(offset, size, data):
                self._remap(bdf >> 3, shadow.mappings())
