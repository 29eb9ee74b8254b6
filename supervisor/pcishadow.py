"""PCI configuration access and the supervisor's own shadow of each function (PCI 3.0, 3.2.2.3 and 6).

The shadow keeps what decides where things are mapped (command register, BAR), taken from the guest's writes
and never from what a device answers; a device process cannot move a BAR.

Left out: bridges and buses other than 0; I/O and 64-bit BARs, and more than one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, Protocol

COMMAND: Final = 0x04
COMMAND_MEMORY: Final = 0x2
BAR0: Final = 0x10
CONFIG_SIZE: Final = 256  # of a function's 4 KiB, what any of its registers is in


class Function(Protocol):
    """Takes the writes to one function's configuration space."""

    def config_write(self, offset: int, size: int, data: int) -> None: ...


class FunctionShadow:
    """What the guest has written to a function's configuration space; its one BAR has `bar_size` bytes."""

    def __init__(self, bar_size: int) -> None:
        self._bar_size = bar_size
        self._written = bytearray(CONFIG_SIZE)

    def write(self, offset: int, size: int, data: int) -> None:
        if offset + size <= CONFIG_SIZE:
            self._written[offset : offset + size] = data.to_bytes(size, "little")

    def read(self, offset: int, size: int) -> int:
        """What the guest wrote last, 0 at first; the function itself may answer otherwise."""
        return int.from_bytes(self._written[offset : offset + size], "little")

    @property
    def base(self) -> int | None:
        """Where the BAR is decoded; None: disabled in the command register, or at no address."""
        # The low bits are hard-wired; all ones is the guest asking for the size, not an address.
        base = self.read(BAR0, 4) & -self._bar_size
        at_an_address = 0 < base < (1 << 32) - self._bar_size
        return base if self.read(COMMAND, 2) & COMMAND_MEMORY and at_an_address else None


class PciBus:
    """Writes to the configuration space of bus 0, by mechanism #1 (0xcf8) and ECAM.

    Reads, the address latch and functions that do not exist are the exit loop's.

    Args:
        address: CONFIG_ADDRESS as the guest last wrote it.
        settle: called after every write, which may have moved a BAR.
    """

    def __init__(self, address: Callable[[], int], settle: Callable[[], None]) -> None:
        self._functions: dict[int, Function] = {}
        self._address = address
        self._settle = settle
        self._lock = threading.Lock()  # a vCPU must not remap while another does

    def add(self, slot: int, function: Function) -> None:
        """Function 0 of device `slot` (0..31)."""
        assert slot not in self._functions and 0 <= slot < 32
        self._functions[slot] = function

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
        with self._lock:
            found.config_write(offset, size, data)
            self._settle()
