"""The MSI-X table and pending bits of a function, kept by the supervisor (PCI 3.0, 6.8.2).

They are here because an entry is interrupt routing: what the guest writes becomes KVM's routing table, by
which the device's eventfd then reaches a local APIC without coming here.  A masked vector has no irqfd, so
its eventfd keeps what the device signals: that it is readable *is* the pending bit, and KVM injects it when
the vector is unmasked (Linux, Documentation/virt/kvm/api.rst, 4.75 KVM_IRQFD).  Left out: messages to
anywhere but local APICs, which would be writes to memory.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Sequence
from typing import Final, Protocol

from kvmcore.irq import GsiRouter, MsiMessage

# Message Control
CONTROL: Final = 2  # from the start of the capability
ENABLE: Final = 1 << 15
FUNCTION_MASK: Final = 1 << 14

PBA: Final = 0x1000  # from the start of the table, in the part of the BAR that is ours

# A table entry
_ENTRY: Final = 16
_DATA: Final = 8
_VECTOR_CONTROL: Final = 12
_MASKED: Final = 1
_WRITABLE: Final = ((1 << 64) - 4) | 0xFFFFFFFF << 8 * _DATA | _MASKED << 8 * _VECTOR_CONTROL

_LOCAL_APICS: Final = 0xFEE  # bits 63:20 of a message's address (Intel SDM volume 3, 11.11.1)


class Irqfds(Protocol):
    """The part of `kvmcore.kvm.Vm` that is needed."""

    def irqfd(self, eventfd: int, gsi: int, resample: int | None = None, deassign: bool = False) -> None: ...


class Msix:
    """The table of one function.

    Args:
        eventfds: one for each vector; the device holds them too.
        first_gsi: vector n has `first_gsi` + n to itself.

    Threats:
        1. guest writes with a size or alignment that PCI does not know, or past the table -> nothing.
        2. guest aims a message at memory -> it goes nowhere.
        3. guest masks while the device signals -> no event is lost, none is delivered while masked.
        4. device signals without end -> the guest's interrupt, coalesced; nobody here is woken.
    """

    def __init__(self, vm: Irqfds, router: GsiRouter, eventfds: Sequence[int], first_gsi: int) -> None:
        self._vm = vm
        self._router = router
        self._eventfds = eventfds
        self._first_gsi = first_gsi
        self._entries = [_MASKED << 8 * _VECTOR_CONTROL] * len(eventfds)
        self._assigned: set[int] = set()  # vectors whose eventfd is KVM's now
        self._control = 0
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> int:
        """A guest read, from the table's start."""
        with self._lock:
            if offset < PBA:
                return _slice(self._entries, _ENTRY, offset, size)
            return _slice([self._pending()], -(-len(self._entries) // 64) * 8, offset - PBA, size)

    def write(self, offset: int, size: int, data: int) -> None:
        """A guest write, from the table's start.  Raises KvmError."""
        n, at = divmod(offset, _ENTRY)
        if size not in (4, 8) or offset % size or n >= len(self._entries):
            return
        mask = _WRITABLE & ((1 << 8 * size) - 1) << 8 * at
        with self._lock:
            self._entries[n] = self._entries[n] & ~mask | data << 8 * at & mask
            self._wire(n)

    def set_control(self, control: int) -> None:
        """What Message Control is now.  Raises KvmError."""
        with self._lock:
            if control == self._control:
                return
            self._control = control
            for n in range(len(self._entries)):
                self._wire(n)

    def _wire(self, n: int) -> None:
        """Give vector `n` to KVM, or take it back, as the masks now say."""
        entry, gsi, eventfd = self._entries[n], self._first_gsi + n, self._eventfds[n]
        masked = entry >> 8 * _VECTOR_CONTROL & _MASKED
        if self._control & (ENABLE | FUNCTION_MASK) != ENABLE or masked:
            if n in self._assigned:
                self._vm.irqfd(eventfd, gsi, deassign=True)
                self._assigned.remove(n)
            return
        address, data = entry & (1 << 64) - 1, entry >> 8 * _DATA & 0xFFFFFFFF
        self._router.update({gsi: MsiMessage(address, data) if address >> 20 == _LOCAL_APICS else None})
        if n not in self._assigned:
            self._vm.irqfd(eventfd, gsi)
            self._assigned.add(n)
            # KVM has injected what was pending but leaves it to be read; what comes now it takes itself.
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(eventfd)

    def _pending(self) -> int:
        poll = select.poll()
        vectors = {fd: n for n, fd in enumerate(self._eventfds) if n not in self._assigned}
        for fd in vectors:
            poll.register(fd, select.POLLIN)
        return sum(1 << vectors[fd] for fd, _ in poll.poll(0))


def _slice(words: Sequence[int], width: int, offset: int, size: int) -> int:
    """`size` bytes at `offset` of little-endian `words` of `width` bytes each; zero past their end."""
    data = b"".join(word.to_bytes(width, "little") for word in words)
    return int.from_bytes(data[offset : offset + size], "little")
