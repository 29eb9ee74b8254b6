"""The I/O APIC of a split interrupt chip: 24 pins, each with the message that it sends to the local APICs.

Spec: Intel 82093AA datasheet (290566-001), section 3; Linux, Documentation/virt/kvm/api.rst 5
(KVM_EXIT_IOAPIC_EOI).  An edge pin is a route in KVM, signalled by its irqfd without coming here; a level
pin's state is kept here.  Left out: the APIC bus (arbitration is read-only zero) and the EOI register of
later versions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from kvmcore.irq import IOAPIC_PINS, MsiMessage

# Offsets from the base address
IOREGSEL: Final = 0x00
IOWIN: Final = 0x10

# Registers by IOREGSEL
IOAPICID: Final = 0x00
IOAPICVER: Final = 0x01
IOAPICARB: Final = 0x02
IOREDTBL: Final = 0x10  # two for each pin, the low half first

_VERSION: Final = (IOAPIC_PINS - 1) << 16 | 0x11
_ID_BITS: Final = 0xF << 24

# Redirection entry
_VECTOR: Final = 0xFF
_DELMOD: Final = 7 << 8
_DESTMOD: Final = 1 << 11
_DELIVS: Final = 1 << 12
_REMOTE_IRR: Final = 1 << 14
_LEVEL: Final = 1 << 15
_MASKED: Final = 1 << 16
_READ_ONLY: Final = _DELIVS | _REMOTE_IRR
_WRITABLE: Final = (0xFF << 56 | 0x1FFFF) & ~_READ_ONLY

_MSI_BASE: Final = 0xFEE00000
_MSI_ASSERT: Final = 1 << 14

_FLOATING: Final = 0xFFFFFFFF


class IoApic:
    """The chip; its caller serializes.

    Args:
        deliver: sends a message to the local APICs (`Vm.signal_msi`).

    Threats:
        1. guest selects a register that does not exist -> reads all ones, writes vanish.
        2. guest accesses with another size, or beside the two registers -> all ones, nothing.
        3. guest acknowledges what was not asserted, or for ever asserts -> one message per EOI, no loop.
    """

    def __init__(self, deliver: Callable[[MsiMessage], None]) -> None:
        self._deliver = deliver
        self._ioregsel = 0
        self._id = 0
        self._redirection = [_MASKED] * IOAPIC_PINS
        self._level = [False] * IOAPIC_PINS

    def read(self, offset: int, size: int) -> int:
        """The value of a guest read of `size` bytes."""
        if size == 4 and offset == IOREGSEL:
            return self._ioregsel
        if size == 4 and offset == IOWIN:
            return self._register()
        return (1 << 8 * size) - 1

    def _register(self) -> int:
        match self._ioregsel:
            case n if IOREDTBL <= n < IOREDTBL + 2 * IOAPIC_PINS:
                pin, high = divmod(n - IOREDTBL, 2)
                return self._redirection[pin] >> 32 * high & 0xFFFFFFFF
            case n if n == IOAPICID:
                return self._id
            case n if n == IOAPICVER:
                return _VERSION
            case n if n == IOAPICARB:
                return 0
        return _FLOATING

    def write(self, offset: int, size: int, data: int) -> Mapping[int, MsiMessage | None]:
        """A guest write; returns pin -> message for the pins whose route in KVM has changed."""
        if size != 4:
            return {}
        if offset == IOREGSEL:
            self._ioregsel = data & 0xFF
        elif offset == IOWIN and self._ioregsel == IOAPICID:
            self._id = data & _ID_BITS
        elif offset == IOWIN and IOREDTBL <= self._ioregsel < IOREDTBL + 2 * IOAPIC_PINS:
            pin, high = divmod(self._ioregsel - IOREDTBL, 2)
            return self._redirect(pin, data << 32 * high, 0xFFFFFFFF << 32 * high)
        return {}

    def _redirect(self, pin: int, data: int, half: int) -> Mapping[int, MsiMessage | None]:
        before = self.route(pin)
        mask = _WRITABLE & half
        entry = self._redirection[pin] & ~mask | data & mask
        if not entry & _LEVEL:
            entry &= ~_REMOTE_IRR  # an edge has nothing to remember; Linux unsticks a pin this way
        self._redirection[pin] = entry
        self._service(pin)
        after = self.route(pin)
        return {pin: after} if after != before else {}

    def route(self, pin: int) -> MsiMessage | None:
        """What KVM's routing table holds for this pin's GSI.

        Nothing for a masked edge pin, so that its irqfd is ignored as the datasheet says of edges while
        masked.  A level pin keeps its message: nothing signals that GSI, but KVM takes from the route
        which vectors' EOIs it must report, and one may be in service.
        """
        entry = self._redirection[pin]
        return None if entry & _MASKED and not entry & _LEVEL else self._message(entry)

    @staticmethod
    def _message(entry: int) -> MsiMessage:
        """SDM volume 3, 11.11: destination in address 19:12, its mode in bit 2; asserted."""
        logical = 1 << 2 if entry & _DESTMOD else 0
        return MsiMessage(
            _MSI_BASE | entry >> 56 << 12 | logical,
            entry & (_VECTOR | _DELMOD) | (_LEVEL if entry & _LEVEL else 0) | _MSI_ASSERT,
        )

    def set_level(self, pin: int, level: bool) -> None:
        """Drive a pin.  A rising edge is lost while masked; a level waits."""
        rising = level and not self._level[pin]
        self._level[pin] = level
        entry = self._redirection[pin]
        if entry & _LEVEL:
            self._service(pin)
        elif rising and not entry & _MASKED:
            self._deliver(self._message(entry))

    def _service(self, pin: int) -> None:
        """Send a level pin's message if it is asserted, unmasked and not in service already."""
        entry = self._redirection[pin]
        if self._level[pin] and entry & (_LEVEL | _MASKED | _REMOTE_IRR) == _LEVEL:
            self._redirection[pin] = entry | _REMOTE_IRR
            self._deliver(self._message(entry))

    def end_of_interrupt(self, vector: int) -> list[int]:
        """A local APIC has finished `vector`.

        Returns the level pins that were in service.  They have fallen: their sources, which are edges, are to
        be asked whether to raise them again, as KVM does with its own chip (KVM_IRQFD_FLAG_RESAMPLE).
        """
        ended = []
        for pin, entry in enumerate(self._redirection):
            if entry & (_LEVEL | _REMOTE_IRR) == _LEVEL | _REMOTE_IRR and entry & _VECTOR == vector:
                self._redirection[pin] = entry & ~_REMOTE_IRR
                self._level[pin] = False
                ended.append(pin)
        return ended
