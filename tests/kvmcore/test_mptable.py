"""Read back by a parser written from the MultiProcessor Specification 1.4, chapter 4, and nothing else."""

from hypothesis import given
from hypothesis import strategies as st

from kvmcore import layout, mptable
from kvmcore.mptable import PciInterrupt

BIOS_AREA = 0xE0000


def u(data, offset, size):
    return int.from_bytes(data[offset : offset + size], "little")


class MpTable:
    """What an operating system that knows only the specification finds in [0xe0000, 0x100000)."""

    def __init__(self, bios_area):
        # 4.1: on a 16-byte boundary, in 0xf0000-0xfffff, sixteen bytes that sum to zero.
        for base in range(0x10000, 0x20000, 16):
            pointer = bios_area[base : base + 16]
            if pointer[:4] == b"_MP_":
                break
        assert pointer[:4] == b"_MP_"
        assert pointer[8] == 1  # length in paragraphs
        assert pointer[9] == 4  # spec_rev
        assert sum(pointer) % 256 == 0
        assert pointer[11] == 0  # a configuration table is present
        assert pointer[12:16] == bytes(4)  # no IMCR: virtual wire mode
        table = bios_area[u(pointer, 4, 4) - BIOS_AREA :]
        # 4.2
        assert table[:4] == b"PCMP"
        length = u(table, 4, 2)
        assert table[6] == 4
        assert sum(table[:length]) % 256 == 0
        assert u(table, 28, 4) == 0  # no OEM table
        count, self.lapic = u(table, 34, 2), u(table, 36, 4)
        assert u(table, 40, 2) == 0  # no extended entries
        # 4.3: entries are sorted by type, processors are 20 bytes, all others 8
        self.processors, self.buses, self.ioapics, self.io, self.local, types, at = [], {}, [], [], [], [], 44
        for _ in range(count):
            entry = table[at:]
            types.append(entry[0])
            at += 20 if entry[0] == 0 else 8
            if entry[0] == 0:
                self.processors.append((entry[1], entry[2], entry[3], u(entry, 4, 4), u(entry, 8, 4)))
            elif entry[0] == 1:
                self.buses[entry[1]] = entry[2:8].decode()
            elif entry[0] == 2:
                self.ioapics.append((entry[1], entry[3], u(entry, 4, 4)))
            elif entry[0] == 3:
                self.io.append((entry[1], u(entry, 2, 2), entry[4], entry[5], entry[6], entry[7]))
            else:
                assert entry[0] == 4
                self.local.append(
                    (entry[1], u(entry, 2, 2), self.buses[entry[4]], entry[5], entry[6], entry[7])
                )
        assert types == sorted(types)
        assert at == length

    def wiring(self, bus):
        """{source on bus: I/O APIC pin} of the interrupts that have their bus's own polarity and trigger."""
        return {
            source: pin
            for kind, flags, number, source, ioapic, pin in self.io
            if (kind, flags, self.buses[number]) == (0, 0, bus) and ioapic == self.ioapics[0][0]
        }


def parse(*args, **kwargs):
    area = bytearray(0x20000)
    table = mptable.build(*args, **kwargs)
    area[layout.MP_TABLE - BIOS_AREA : layout.MP_TABLE - BIOS_AREA + len(table)] = table
    assert len(area) == 0x20000
    return MpTable(bytes(area))


def test_first_processor_is_the_bootstrap_processor():
    table = parse([0, 1, 2])
    assert [(apic_id, flags) for apic_id, _, flags, _, _ in table.processors] == [(0, 3), (1, 1), (2, 1)]


def test_processors_carry_the_cpuid_they_are_given():
    assert parse([0], signature=0x306C3, features=0xFABFBFF).processors == [(0, 0x14, 3, 0x306C3, 0xFABFBFF)]


def test_one_enabled_ioapic_at_its_address():
    assert parse([0]).ioapics == [(0, 1, 0xFEC00000)]


def test_local_apic_address():
    assert parse([0]).lapic == 0xFEE00000


def test_buses_are_pci_and_isa():
    assert parse([0]).buses == {0: "PCI   ", 1: "ISA   "}


def test_isa_interrupts_are_wired_as_kvm_wires_them():
    assert parse([0]).wiring("ISA   ") == {irq: irq for irq in range(16) if irq != 2}


def test_pci_interrupts_are_named_by_device_and_pin():
    table = parse([0], [PciInterrupt(1, 0, 5), PciInterrupt(31, 3, 23)])
    assert table.wiring("PCI   ") == {1 << 2 | 0: 5, 31 << 2 | 3: 23}


def test_pin_that_pci_uses_has_no_isa_source():
    table = parse([0], [PciInterrupt(1, 0, 5), PciInterrupt(2, 0, 10)])
    assert {5, 10} & set(table.wiring("ISA   ")) == set()
    pins = [entry[5] for entry in table.io]
    assert len(pins) == len(set(pins))


def test_line_shared_by_two_functions_is_listed_for_both():
    assert parse([0], [PciInterrupt(1, 0, 5), PciInterrupt(2, 0, 5)]).wiring("PCI   ") == {4: 5, 8: 5}


def test_legacy_pic_reaches_lint0_of_the_bootstrap_processor_and_nmi_every_lint1():
    assert parse([3, 0]).local == [(3, 0, "ISA   ", 0, 3, 0), (1, 0, "ISA   ", 0, 0xFF, 1)]


def test_processors_beyond_8_bit_ids_are_left_to_acpi():
    assert [p[0] for p in parse(range(300)).processors] == list(range(255))


@given(
    st.integers(1, 300),
    st.lists(st.builds(PciInterrupt, st.integers(0, 31), st.integers(0, 3), st.integers(5, 23))),
)
def test_any_machine_gives_a_sound_table_that_fits(vcpus, interrupts):
    table = parse(range(vcpus), interrupts)
    assert len(table.processors) == min(vcpus, 255)
    assert layout.MP_TABLE + len(mptable.build(range(vcpus), interrupts)) <= layout.VM_GENERATION_ID
