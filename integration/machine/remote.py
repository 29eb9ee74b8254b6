"""The other end of remote.S: a guest that reads, writes and counts interrupts as it is told.

What a driver does is then written in Python, by `devproc.driver`; every access is a real processor's and
every interrupt KVM's.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from typing import Any, Final

from devproc.wire import Space
from integration.machine.conftest import Machine
from kvmcore import layout

# remote.S has the same
_COUNTS: Final = 0x12000
_ISR: Final = 0x13000
_CAUSES: Final = 0x13008

_CHUNK: Final = 1024  # bytes under way to the guest at once
CONFIG_ADDRESS: Final = 0xCF8


class Remote:
    """The guest; what it is asked for is done in order."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        assert machine.process.stdin is not None and machine.process.stdout is not None
        self._to = machine.process.stdin.fileno()
        self._from = machine.process.stdout.fileno()
        machine.wait_for(b"\n")

    def _ask(
        self, what: str, width: int, addr: int, value: int = 0, data: bytes = b"", answer: int = 0
    ) -> bytes:
        os.write(self._to, struct.pack("<c3Q", what.encode(), width, addr, value) + data)
        got = b""
        while len(got) < answer + 8:
            more = os.read(self._from, 65536)
            assert more, self.machine.errors()
            got += more
        return got

    def read(self, addr: int, size: int) -> int:
        """A load of `size` bytes."""
        return int.from_bytes(self._ask("r", size, addr), "little")

    def write(self, addr: int, size: int, value: int) -> None:
        """A store."""
        self._ask("w", size, addr, value)

    def inp(self, port: int, size: int) -> int:
        return int.from_bytes(self._ask("i", size, port), "little")

    def outp(self, port: int, size: int, value: int) -> None:
        self._ask("o", size, port, value)

    def interrupts(self, vector: int) -> int:
        """How often `vector` has come."""
        return self.read(_COUNTS + 8 * vector, 8)

    def acknowledge_at(self, addr: int) -> None:
        """From now on every interrupt reads the ISR status at `addr`, as a handler of INTA does."""
        self.write(_ISR, 8, addr)

    def causes(self) -> int:
        """What it has read there, all together."""
        return self.read(_CAUSES, 1)

    def power_off(self) -> int:
        """The VM's exit code."""
        os.write(self._to, struct.pack("<c3Q", b"q", 0, 0, 0))
        return self.machine.end()


class RemoteMemory:
    """The guest's memory as `devproc.driver` uses a GuestMemory."""

    def __init__(self, guest: Remote) -> None:
        self._guest = guest

    def read(self, gpa: int, size: int) -> bytes:
        return self._guest._ask("R", size, gpa, answer=size)[:size] if size else b""

    def write(self, gpa: int, data: bytes) -> None:
        for at in range(0, len(data), _CHUNK):
            chunk = data[at : at + _CHUNK]
            self._guest._ask("W", len(chunk), gpa + at, data=chunk)

    def copy_out(self, spans: Iterable[tuple[int, int]], limit: int) -> bytes:
        return b"".join(self.read(gpa, size) for gpa, size in spans)[:limit]

    def views(self, spans: Iterable[tuple[int, int]]) -> list[RemoteView]:
        return [RemoteView(self, gpa) for gpa, _ in spans]

    def fence(self) -> None:
        """A request is an exit, which is a fence."""


class RemoteView:
    """What the driver uses of a memoryview: slices of bytes, and `width` bytes as one item."""

    def __init__(self, memory: RemoteMemory, gpa: int, width: int = 1) -> None:
        self._memory = memory
        self._gpa = gpa
        self._width = width

    def cast(self, kind: str) -> RemoteView:
        return RemoteView(self._memory, self._gpa, struct.calcsize(kind))

    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return self._memory.read(self._gpa + at.start, at.stop - at.start)
        return int.from_bytes(self._memory.read(self._gpa + self._width * at, self._width), "little")

    def __setitem__(self, at: int | slice, value: Any) -> None:
        if isinstance(at, slice):
            self._memory.write(self._gpa + at.start, value)
        else:
            self._memory.write(self._gpa + self._width * at, value.to_bytes(self._width, "little"))


class RemoteFunction:
    """A PCI function as `devproc.driver.PciDriver` uses it; configuration space by ECAM."""

    def __init__(self, guest: Remote, slot: int) -> None:
        self.guest = guest
        self.slot = slot

    @property
    def base(self) -> int:
        """Where BAR 0 is."""
        return self.read(Space.CONFIG, 0x10, 4)

    def _at(self, space: int, offset: int) -> int:
        return offset + (self.base if space == Space.BAR0 else layout.ECAM + (self.slot << 15))

    def read(self, space: int, offset: int, size: int) -> int:
        return self.guest.read(self._at(space, offset), size)

    def write(self, space: int, offset: int, size: int, data: int) -> None:
        self.guest.write(self._at(space, offset), size, data)

    def read_by_ports(self, offset: int, size: int) -> int:
        """Configuration space by mechanism #1."""
        self.guest.outp(CONFIG_ADDRESS, 4, 1 << 31 | self.slot << 11 | offset & 0xFC)
        return self.guest.inp(CONFIG_ADDRESS + 4 + (offset & 3), size)
