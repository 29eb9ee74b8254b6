from itertools import pairwise

import pytest

from kvmcore import layout
from kvmcore.errors import ConfigError
from kvmcore.layout import GIB, KIB, MIB, E820Type

LOW_STRUCTURES = [
    (layout.GDT, 0x20),
    (layout.IDT, 8),
    (layout.ZERO_PAGE, 4 * KIB),
    (layout.PML4, 4 * KIB),
    (layout.PDPT, 4 * KIB),
    (layout.PD, 4 * KIB),
    (layout.CMDLINE, 64 * KIB),
    (layout.EBDA, KIB),
    (layout.RSDP, 64 * KIB),
    (layout.MP_TABLE, 60 * KIB),
    (layout.VM_GENERATION_ID, 4 * KIB),
    (layout.KERNEL, MIB),
]
GAP_STRUCTURES = [
    (layout.ECAM, layout.ecam_size(layout.ECAM_BUSES_MAX)),
    (layout.PCI_MMIO, layout.PCI_MMIO_SIZE),
    (layout.IOAPIC, layout.IOAPIC_SIZE),
    (layout.LAPIC, layout.LAPIC_SIZE),
    (layout.IDENTITY_MAP, layout.PAGE_SIZE),
    (layout.TSS, layout.TSS_SIZE),
]


def overlapping(ranges):
    ordered = sorted(ranges)
    return [(a, b) for a, b in pairwise(ordered) if a[0] + a[1] > b[0]]


@pytest.mark.parametrize("mem_size", [256 * MIB, layout.GAP, 5 * GIB, 100 * GIB])
def test_nothing_in_the_layout_overlaps(mem_size):
    high = (layout.high_mmio(mem_size), layout.HIGH_MMIO_SIZE)
    assert overlapping([*layout.ram_regions(mem_size), *GAP_STRUCTURES, high]) == []
    assert overlapping(LOW_STRUCTURES) == []


def test_gap_structures_are_inside_the_gap():
    assert all(base >= layout.GAP and base + size <= layout.GAP_END for base, size in GAP_STRUCTURES)


def test_page_structures_are_page_aligned():
    for gpa in (layout.ZERO_PAGE, layout.PML4, layout.PDPT, layout.PD, layout.IDENTITY_MAP, layout.TSS):
        assert gpa % layout.PAGE_SIZE == 0


def test_full_ecam_is_aligned_to_its_own_size():
    # PCI Express Base 6.0 section 7.2.2: the base is aligned to the size of the window.
    assert layout.ECAM % layout.ecam_size(layout.ECAM_BUSES_MAX) == 0


def test_the_generation_id_is_in_a_page_that_no_guest_uses_otherwise():
    page = layout.VM_GENERATION_ID
    assert page % layout.PAGE_SIZE == 0
    assert not any(entry.gpa <= page < entry.gpa + entry.size for entry in layout.e820(GIB, 1))


def test_mp_table_is_where_the_specification_lets_a_guest_look():
    assert 0xF0000 <= layout.MP_TABLE < 0x100000
    assert layout.MP_TABLE % 16 == 0


def test_rsdp_is_where_the_specification_lets_a_guest_look():
    assert 0xE0000 <= layout.RSDP < 0x100000
    assert layout.RSDP % 16 == 0


def test_small_memory_is_one_region():
    assert layout.ram_regions(256 * MIB) == ((0, 256 * MIB),)


def test_memory_up_to_the_gap_is_one_region():
    assert layout.ram_regions(0xD0000000) == ((0, 0xD0000000),)


def test_memory_continues_at_4_gib():
    assert layout.ram_regions(5 * GIB) == ((0, 0xD0000000), (4 * GIB, 5 * GIB - 0xD0000000))


@pytest.mark.parametrize("mem_size", [0, -4096, 4095, MIB + 1])
def test_odd_memory_sizes_are_refused(mem_size):
    with pytest.raises(ConfigError, match="multiple of 4096"):
        layout.ram_regions(mem_size)


def test_e820_leaves_out_ebda_and_bios_area():
    assert layout.e820(256 * MIB) == (
        (0, 0x9FC00, E820Type.RAM),
        (MIB, 255 * MIB, E820Type.RAM),
    )


def test_e820_of_a_big_guest_with_ecam_is_in_order():
    entries = layout.e820(5 * GIB, ecam_buses=1)
    assert entries == (
        (0, 0x9FC00, E820Type.RAM),
        (MIB, 0xD0000000 - MIB, E820Type.RAM),
        (0xD0000000, MIB, E820Type.RESERVED),
        (4 * GIB, 5 * GIB - 0xD0000000, E820Type.RAM),
    )


def test_e820_of_a_tiny_guest_stays_inside_its_ram():
    assert layout.e820(64 * KIB) == ((0, 64 * KIB, E820Type.RAM),)
    assert layout.e820(MIB) == ((0, 0x9FC00, E820Type.RAM),)


def test_high_mmio_begins_at_4_gib_or_above_ram():
    assert layout.high_mmio(256 * MIB) == 4 * GIB
    assert layout.high_mmio(5 * GIB) == 4 * GIB + (5 * GIB - 0xD0000000)
    assert layout.high_mmio(0xD0000000 + 4096) == 4 * GIB + 2 * MIB
