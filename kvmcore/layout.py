"""Where everything sits in guest-physical memory: the one place that knows (ARCHITECTURE.md).

Boot structures lie where Documentation/arch/x86/boot.rst leaves room for a loader.  Firmware tables lie in
the BIOS area [0xe0000, 0x100000), which E820 does not list as RAM, so no guest takes it for its own use:
RSDP and ACPI tables in the first half, where ACPI 6.5 section 5.2.5.1 lets a guest search, the MP floating
pointer and its table in the second (MultiProcessor Specification 1.4, chapter 4, place c).  Not at 0x0 as
crosvm once did: there the table shares 1,280 bytes with the interrupt vectors and the BIOS data area,
Linux would take its bytes at 0x40e for the EBDA pointer, and some forty processors would fill it.

Left out: I/O ports and which device takes what (supervisor/machine.py), and the guest's physical address
width, which bounds the RAM size and is known only to KVM.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

from kvmcore.errors import ConfigError

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
PAGE_SIZE: Final = 4 * KIB

# Boot structures, in the first RAM entry.
GDT: Final = 0x500
IDT: Final = 0x520
ZERO_PAGE: Final = 0x7000
BOOT_STACK: Final = 0x8000  # grows down into the zero page, whose last 276 bytes are padding
PML4: Final = 0x9000
PDPT: Final = 0xA000
PD: Final = 0xB000
IDENTITY_MAPPED: Final = GIB  # by the boot page tables; kernel, zero page and command line must be inside
CMDLINE: Final = 0x20000
EBDA: Final = 0x9FC00  # also the end of the first RAM entry

# Firmware tables, in the BIOS area.
RSDP: Final = 0xE0000  # the other ACPI tables follow it
MP_TABLE: Final = 0xF0000  # the floating pointer, then the configuration table
VM_GENERATION_ID: Final = 0xFF000  # 16 bytes, alone in their page
BIOS_END: Final = MIB

KERNEL: Final = 0x200000

# The 32-bit gap.
GAP: Final = 4 * GIB - 768 * MIB
GAP_END: Final = 4 * GIB
ECAM: Final = GAP  # 1 MiB of configuration space per bus
ECAM_BUSES_MAX: Final = 256
PCI_MMIO: Final = 0xE0000000
PCI_MMIO_SIZE: Final = MIB
IOAPIC: Final = 0xFEC00000
IOAPIC_SIZE: Final = PAGE_SIZE
LAPIC: Final = 0xFEE00000
LAPIC_SIZE: Final = MIB  # the whole range is where MSI messages are sent
# Intel hosts without unrestricted guests run real mode as vm86 and need these pages; three for
# KVM_SET_TSS_ADDR, and right below, where KVM itself would put it, one for KVM_SET_IDENTITY_MAP_ADDR.
TSS: Final = 0xFFFBD000
TSS_SIZE: Final = 3 * PAGE_SIZE
IDENTITY_MAP: Final = TSS - PAGE_SIZE

# Above RAM: 64-bit BARs.  With it a 16 GiB guest still fits the 36 address bits that every host has.
HIGH_MMIO_SIZE: Final = 16 * GIB
HIGH_MMIO_ALIGN: Final = 2 * MIB

# I/O ports for BARs and interrupt lines for functions.
PCI_IO: Final = 0xC000
PCI_IO_SIZE: Final = 0x10000 - PCI_IO
GSI_PCI_FIRST: Final = 5
GSI_COUNT: Final = 24  # the pins of one 82093AA I/O APIC
GSI_MAX: Final = 4096  # KVM's limit; those that are no pin carry MSI messages
IOAPIC_ID: Final = (
    0  # as the chip resets; xAPICs (version 0x14) share no bus, so a processor's id may be equal
)


class E820Type(IntEnum):
    """Address range types (ACPI 6.5 table 15.1)."""

    RAM = 1
    RESERVED = 2


class E820Entry(NamedTuple):
    """[gpa, gpa + size) in bytes."""

    gpa: int
    size: int
    type: E820Type


def low_ram_end(mem_size: int) -> int:
    """The end of RAM below the 32-bit gap, for `mem_size` bytes of RAM."""
    return min(mem_size, GAP)


def ram_regions(mem_size: int) -> tuple[tuple[int, int], ...]:
    """The (gpa, size) of each stretch of `mem_size` bytes of RAM, split around the 32-bit gap.

    Raises:
        ConfigError: `mem_size` is not a positive multiple of the page size.
    """
    if mem_size <= 0 or mem_size % PAGE_SIZE:
        raise ConfigError(f"memory of {mem_size} bytes: expected a positive multiple of {PAGE_SIZE}")
    low = low_ram_end(mem_size)
    return ((0, low),) if low == mem_size else ((0, low), (GAP_END, mem_size - low))


def e820(mem_size: int, ecam_buses: int = 0) -> tuple[E820Entry, ...]:
    """The memory map a guest with `mem_size` bytes of RAM is told, in ascending order.

    With `ecam_buses` the configuration window is listed as reserved: Linux uses a window only if the firmware
    says, here or in ACPI, that nothing else lives there.

    Raises:
        ConfigError: as `ram_regions`.
    """
    entries = []
    for gpa, size in ram_regions(mem_size):
        if gpa == 0:
            entries.append(E820Entry(0, min(size, EBDA), E820Type.RAM))
            if size > BIOS_END:
                entries.append(E820Entry(BIOS_END, size - BIOS_END, E820Type.RAM))
            if ecam_buses:
                entries.append(E820Entry(ECAM, ecam_size(ecam_buses), E820Type.RESERVED))
        else:
            entries.append(E820Entry(gpa, size, E820Type.RAM))
    return tuple(entries)


def ecam_size(buses: int) -> int:
    """The bytes of configuration space for `buses` buses (1 to ECAM_BUSES_MAX), from ECAM on."""
    return buses * MIB


def high_mmio(mem_size: int) -> int:
    """Where 64-bit device addresses begin: 4 GiB or the end of RAM, rounded up to 2 MiB."""
    gpa, size = ram_regions(mem_size)[-1]
    return max(GAP_END, -(-(gpa + size) // HIGH_MMIO_ALIGN) * HIGH_MMIO_ALIGN)
