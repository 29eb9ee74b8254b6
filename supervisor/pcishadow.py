"""PCI configuration access and the supervisor's own shadow of each function (PCI 3.0, 3.2.2.3 and 6).

The configuration address latch and ECAM decoding live here, because they choose the process an access
goes to.  The shadow keeps what decides where things are mapped (command register, BARs), taken from the
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
_ENABLE = 1 << 31


class ConfigSpace(Protocol):
    """The owner of a function's configuration space: a device process behind its proxy."""

    def config_read(self, offset: int, size: int) -> int: ...
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
    """Bus 0: configuration mechanism #1 at 0xcf8, and ECAM.

    Args:
        remap: called with the device number and its mappings after a write that moved a BAR.
    """

    def __init__(self, remap: Callable[[int, tuple[Mapping, ...]], None]) -> None:
        self._functions: dict[int, tuple[ConfigSpace, FunctionShadow]] = {}
        self._remap = remap
        self._lock = threading.Lock()  # a vCPU must not remap while another does
        self._address = 0
        self.absent = 0  # accesses to functions that do not exist

    def add(self, slot: int, owner: ConfigSpace, shadow: FunctionShadow) -> None:
        """Function 0 of device `slot` (0..31)."""
        assert slot not in self._functions and 0 <= slot < 32
        self._functions[slot] = (owner, shadow)

    def port_read(self, offset: int, size: int) -> int:
        """0xcf8..0xcff.  CONFIG_ADDRESS is a 32-bit register: narrower accesses to it are not decoded."""
        if offset < 4:
            return self._address if (offset, size) == (0, 4) else (1 << 8 * size) - 1
        if not self._address & _ENABLE:
            return (1 << 8 * size) - 1
        return self._read(self._address >> 8 & 0xFFFF, (self._address & 0xFC) + offset - 4, size)

    def port_write(self, offset: int, size: int, data: int) -> None:
        if offset < 4:
            if (offset, size) == (0, 4):
                self._address = data & (_ENABLE | 0xFFFFFC)
        elif self._address & _ENABLE:
            self._write(self._address >> 8 & 0xFFFF, (self._address & 0xFC) + offset - 4, size, data)

    def ecam_read(self, offset: int, size: int) -> int:
        return self._read(offset >> 12, offset & 0xFFF, size)

    def ecam_write(self, offset: int, size: int, data: int) -> None:
        self._write(offset >> 12, offset & 0xFFF, size, data)

    def _read(self, bdf: int, offset: int, size: int) -> int:
        found = self._function(bdf)
        if found is None or offset % size or size > 4:
            self.absent += 1
            return (1 << 8 * size) - 1
        return found[0].config_read(offset, size)

    def _write(self, bdf: int, offset: int, size: int, data: int) -> None:
        found = self._function(bdf)
        if found is None or offset % size or size > 4:
            self.absent += 1
            return
        owner, shadow = found
        with self._lock:
            owner.config_write(offset, size, data)
            if shadow.write(offset, size, data):
                self._remap(bdf >> 3, shadow.mappings())

    def _function(self, bdf: int) -> tuple[ConfigSpace, FunctionShadow] | None:
        """`bdf`: bus << 8 | device << 3 | function."""
        return None if bdf & 0x7 or bdf >> 8 else self._functions.get(bdf >> 3)
