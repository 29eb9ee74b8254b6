"""The MP floating pointer and configuration table: processors and interrupt wiring for `acpi=off`.

Intel MultiProcessor Specification 1.4, chapter 4.  Interrupts are wired as KVM wires them by default, pin n
of the I/O APIC to GSI n, the timer's IRQ 0 to pin 0 included (arch/x86/kvm/irq_comm.c, default_routing), so
one table serves the kernel's irqchip and the split one.  Left out: extended entries, more than one I/O APIC,
and processors whose APIC id needs more than 8 bits, which only ACPI can name.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from kvmcore import layout

_FLOATING: Final = struct.Struct("<4sIBBBB4x")  # signature, table, length/16, revision, checksum, feature 1
_HEADER: Final = struct.Struct("<4sHBB8s12sIHHIHBx")
_PROCESSOR: Final = struct.Struct("<BBBBII8x")
_BUS: Final = struct.Struct("<BB6s")
_IOAPIC: Final = struct.Struct("<BBBBI")
_INTERRUPT: Final = struct.Struct("<BBHBBBB")  # both I/O and local interrupt assignment entries

_REVISION: Final = 4  # 1.4
_APIC_VERSION: Final = 0x14  # an integrated xAPIC
_CPU_ENABLED: Final = 1 << 0
_CPU_BOOTSTRAP: Final = 1 << 1
_IOAPIC_ENABLED: Final = 1 << 0
_INT, _NMI, _EXTINT = 0, 1, 3
_CONFORMS: Final = 0  # polarity and trigger of its bus: ISA active high, edge; PCI active low, level
_PCI_BUS, _ISA_BUS = 0, 1
_CASCADE: Final = 2  # the second 8259A's input to the first, never a source
_ALL_APICS: Final = 0xFF


class PciInterrupt(NamedTuple):
    """Pin `pin` (0 is INTA) of device number `device` on bus 0 is wired to line `gsi`."""

    device: int
    pin: int
    gsi: int


def build(
    apic_ids: Sequence[int],
    pci_interrupts: Iterable[PciInterrupt] = (),
    signature: int = 0x600,
    features: int = 0x201,
    gpa: int = layout.MP_TABLE,
) -> bytes:
    """The floating pointer, to be written at `gpa`, and right behind it the table it points to.

    The first of `apic_ids` is the bootstrap processor; `signature` and `features` are CPUID.1 EAX and EDX.
    """
    pci = sorted(set(pci_interrupts))
    # A pin has one source: Linux takes the first entry for a pin and would make a PCI line an ISA edge.
    pci_gsis = {p.gsi for p in pci}
    isa = [irq for irq in range(16) if irq != _CASCADE and irq not in pci_gsis]
    entries = [
        *(
            _PROCESSOR.pack(
                0, apic_id, _APIC_VERSION, _CPU_ENABLED | (not i) * _CPU_BOOTSTRAP, signature, features
            )
            for i, apic_id in enumerate(apic_ids)
            if apic_id < _ALL_APICS
        ),
        _BUS.pack(1, _PCI_BUS, b"PCI   "),
        _BUS.pack(1, _ISA_BUS, b"ISA   "),
        _IOAPIC.pack(2, layout.IOAPIC_ID, 0x11, _IOAPIC_ENABLED, layout.IOAPIC),
        *(_INTERRUPT.pack(3, _INT, _CONFORMS, _ISA_BUS, irq, layout.IOAPIC_ID, irq) for irq in isa),
        *(
            _INTERRUPT.pack(3, _INT, _CONFORMS, _PCI_BUS, p.device << 2 | p.pin, layout.IOAPIC_ID, p.gsi)
            for p in pci
        ),
        # Virtual wire mode: the 8259A pair drives LINT0 of the bootstrap processor, NMI every LINT1.
        _INTERRUPT.pack(4, _EXTINT, _CONFORMS, _ISA_BUS, 0, apic_ids[0], 0),
        _INTERRUPT.pack(4, _NMI, _CONFORMS, _ISA_BUS, 0, _ALL_APICS, 1),
    ]
    body = b"".join(entries)
    table = _with_checksum(
        _HEADER.pack(
            b"PCMP", _HEADER.size + len(body), _REVISION, 0, b"VMSUP".ljust(8), b"VMSUP".ljust(12),
            0, 0, len(entries), layout.LAPIC, 0, 0,
        ) + body,
        at=7,
    )  # fmt: skip
    floating = _FLOATING.pack(b"_MP_", gpa + _FLOATING.size, _FLOATING.size // 16, _REVISION, 0, 0)
    return _with_checksum(floating, at=10) + table


def _with_checksum(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([-sum(data) & 0xFF]) + data[at + 1 :]
