"""AML is disassembled and compiled again by iasl; tables are read by offset, as in ACPI 6.5 chapter 5."""

import re
import shutil
import struct
import subprocess

import pytest

from kvmcore import acpi, layout
from kvmcore.acpi import IsaDevice, Machine
from kvmcore.errors import ConfigError
from kvmcore.mptable import PciInterrupt

MACHINE = Machine(
    apic_ids=(0, 1),
    pm_port=0x600,
    sci_gsi=9,
    reset_port=0x64,
    reset_value=0xFE,
    isa_devices=(
        IsaDevice("COM1", acpi.SERIAL_HID, 0x3F8, 8, gsi=4, uid=1),
        IsaDevice("COM2", acpi.SERIAL_HID, 0x2F8, 8, gsi=3, uid=2),
        IsaDevice("COM3", acpi.SERIAL_HID, 0x3E8, 8, gsi=4, uid=3),
        IsaDevice("RTC", acpi.RTC_HID, 0x70, 2, gsi=8),
        IsaDevice("TIMR", acpi.PIT_HID, 0x40, 4, gsi=0),
        IsaDevice("PEVT", acpi.PVPANIC_HID, 0x505, 1),
    ),
    pci_config_port=0xCF8,
    pci_io=(0xC000, 0x4000),
    pci_mmio=(0xE0000000, 0x100000),
    pci_high_mmio=(0x100000000, 0x400000000),
    pci_interrupts=(PciInterrupt(1, 0, 5), PciInterrupt(2, 0, 16), PciInterrupt(31, 3, 5)),
    ecam_buses=1,
)
MANY = MACHINE._replace(apic_ids=tuple(range(300)))
BARE = MACHINE._replace(apic_ids=(0,), isa_devices=(), pci_interrupts=(), ecam_buses=0)


def u(data, offset, size):
    return int.from_bytes(data[offset : offset + size], "little")


class Tables:
    """What a guest finds that begins at the RSDP; every signature, length and checksum is looked at."""

    def __init__(self, machine):
        self.blob = acpi.build(machine)
        rsdp = self.blob[:36]
        assert rsdp[:8] == b"RSD PTR "
        assert sum(rsdp[:20]) % 256 == 0
        assert sum(rsdp) % 256 == 0
        assert (rsdp[15], u(rsdp, 16, 4), u(rsdp, 20, 4)) == (2, 0, 36)
        self.by_signature = {}
        xsdt = self.table(u(rsdp, 24, 8))
        for offset in range(36, len(xsdt), 8):
            self.table(u(xsdt, offset, 8))
        fadt = self["FACP"]
        self.facs_gpa = u(fadt, 132, 8)
        self.table(u(fadt, 140, 8))

    def table(self, gpa):
        assert gpa % 16 == 0
        at = gpa - layout.RSDP
        table = self.blob[at : at + u(self.blob, at + 4, 4)]
        assert sum(table) % 256 == 0
        self.by_signature[table[:4].decode()] = table
        return table

    def __getitem__(self, signature):
        return self.by_signature[signature]

    def madt(self):
        """[(type, body)] of the interrupt controller structures."""
        madt, at, found = self["APIC"], 44, []
        while at < len(madt):
            found.append((madt[at], madt[at + 2 : at + madt[at + 1]]))
            at += madt[at + 1]
        assert at == len(madt)
        return found


def madt_of(machine, kind, form):
    return [struct.unpack(form, body) for found, body in Tables(machine).madt() if found == kind]


@pytest.fixture
def iasl(tmp_path):
    program = shutil.which("iasl")
    if program is None:
        pytest.skip("no iasl (Debian package acpica-tools)")

    def disassemble_and_compile(table):
        """The source iasl sees in `table`, and the table it makes of that source."""
        original, source, again = (tmp_path / n for n in ("table.dat", "table.dsl", "again.aml"))
        original.write_bytes(table)
        for command in ([program, "-d", original], [program, "-oa", "-we", "-p", again, source]):
            run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
            assert run.returncode == 0, run.stdout + run.stderr
        assert "0 Errors, 0 Warnings" in run.stdout
        return source.read_text(), again.read_bytes()

    return disassemble_and_compile


@pytest.mark.parametrize("machine", [MACHINE, MANY, BARE])
def test_dsdt_is_the_very_bytes_that_iasl_makes_of_its_source(iasl, machine):
    dsdt = Tables(machine)["DSDT"]
    _, again = iasl(dsdt)
    assert again[36:] == dsdt[36:]  # after the header, in which the compiler signs


@pytest.mark.parametrize("signature", ["FACP", "APIC", "MCFG", "XSDT"])
@pytest.mark.parametrize("machine", [MACHINE, MANY])
def test_tables_are_the_very_bytes_that_iasl_makes_of_its_source(iasl, signature, machine):
    table = Tables(machine)[signature]
    _, again = iasl(table)
    assert again[36:] == table[36:]


def test_dsdt_declares_the_machine(iasl):
    source = " ".join(iasl(Tables(MACHINE)["DSDT"])[0].split())
    for wanted in (
        'EisaId ("PNP0501")', 'EisaId ("PNP0B00")', 'EisaId ("PNP0100")', '_HID, "QEMU0001"', '"ACPI0007"',
        'EisaId ("PNP0A08")', '_CID, EisaId ("PNP0A03")', 'EisaId ("PNP0C02")',
        "IO (Decode16, 0x03F8, // Range Minimum 0x03F8,", "0x0505, // Range Minimum",
        "Memory32Fixed (ReadWrite, 0xD0000000, // Address Base 0x00100000, // Address Length",
        "0xC000, // Range Minimum 0xFFFF, // Range Maximum",
        "0xE0000000, // Range Minimum 0xE00FFFFF, // Range Maximum",
        "0x0000000100000000, // Range Minimum 0x00000004FFFFFFFF, // Range Maximum",
        "Package (0x04) { 0x0001FFFF, Zero, Zero, 0x05 }",
        "Package (0x04) { 0x0002FFFF, Zero, Zero, 0x10 }",
        "Package (0x04) { 0x001FFFFF, 0x03, Zero, 0x05 }",
        "Name (\\_S5, Package (0x04) // _S5_: S5 System State { 0x05,",
    ):  # fmt: skip
        assert wanted in source


def test_the_interpreter_of_linux_finds_the_generation_id(tmp_path):
    program = shutil.which("acpiexec")
    if program is None:
        pytest.skip("no acpiexec (Debian package acpica-tools)")
    dsdt = tmp_path / "dsdt"
    dsdt.write_bytes(Tables(BARE)["DSDT"])
    ask = "; ".join(f"execute \\_SB.VGEN.{name}" for name in ("ADDR", "_CID", "_DDN"))
    said = subprocess.run([program, "-b", ask, dsdt], capture_output=True, text=True, check=False).stdout
    assert re.findall(r"\[Integer\] = ([0-9A-F]+)", said) == [f"{layout.VM_GENERATION_ID:016X}", "0" * 16]
    # It makes ids capital, as in the list of Linux's driver.
    assert re.findall(r'"(V\w+)"', said) == ["VMGENCTR", "VM_GEN_COUNTER", "VM_Gen_Counter"]


def test_isa_interrupts_are_edges_and_shared_only_where_two_have_one(iasl):
    source = " ".join(iasl(Tables(MACHINE)["DSDT"])[0].split())
    assert source.count("IRQ (Edge, ActiveHigh, Shared, ) {4}") == 2
    assert source.count("IRQ (Edge, ActiveHigh, Exclusive, ) {3}") == 1
    assert source.count("IRQ (Edge, ActiveHigh, Exclusive, ) {8}") == 1


def test_without_ecam_there_is_no_mcfg_and_no_pci_express_root(iasl):
    tables = Tables(BARE)
    assert "MCFG" not in tables.by_signature
    source = iasl(tables["DSDT"])[0]
    assert '_HID, EisaId ("PNP0A03")' in source
    assert "PNP0A08" not in source and "PNP0C02" not in source


def test_fadt_is_revision_6_and_the_fixed_hardware_model():
    fadt = Tables(MACHINE)["FACP"]
    assert (len(fadt), fadt[8], fadt[131]) == (276, 6, 5)
    assert not u(fadt, 112, 4) & 1 << 20  # HW_REDUCED_ACPI
    assert u(fadt, 48, 4) == 0  # SMI_CMD: always in ACPI mode
    assert u(fadt, 46, 2) == 9  # SCI_INT


def test_fadt_register_blocks_are_the_acpi_pm_devices():
    fadt = Tables(MACHINE)["FACP"]
    assert (u(fadt, 56, 4), u(fadt, 64, 4), u(fadt, 76, 4)) == (0x600, 0x604, 0x608)
    assert (fadt[88], fadt[89], fadt[91]) == (4, 2, 4)
    assert struct.unpack("<BBBBQ", fadt[148:160]) == (1, 32, 0, 0, 0x600)
    assert struct.unpack("<BBBBQ", fadt[172:184]) == (1, 16, 0, 0, 0x604)
    assert struct.unpack("<BBBBQ", fadt[208:220]) == (1, 32, 0, 0, 0x608)
    assert u(fadt, 80, 4) == u(fadt, 84, 4) == fadt[92] == fadt[93] == 0  # no GPEs
    assert u(fadt, 112, 4) & 1 << 8  # TMR_VAL_EXT


def test_fadt_reset_register():
    fadt = Tables(MACHINE)["FACP"]
    assert u(fadt, 112, 4) & 1 << 10  # RESET_REG_SUP
    assert struct.unpack("<BBBBQ", fadt[116:128]) == (1, 8, 0, 1, 0x64)
    assert fadt[128] == 0xFE


def test_fadt_says_what_processors_and_buttons_can():
    fadt = Tables(MACHINE)["FACP"]
    flags = u(fadt, 112, 4)
    assert flags & 1 << 0 and flags & 1 << 2  # WBINVD, PROC_C1
    assert flags & 1 << 4 and flags & 1 << 5  # no fixed power and sleep buttons
    assert u(fadt, 96, 2) > 100 and u(fadt, 98, 2) > 1000  # no C2, no C3
    assert fadt[108] == 0x32  # CENTURY


@pytest.mark.parametrize("present", [False, True])
def test_fadt_tells_guests_whether_to_probe_the_keyboard_controller(present):
    boot_arch = u(Tables(MACHINE._replace(i8042=present))["FACP"], 109, 2)
    assert bool(boot_arch & 1 << 1) == present
    assert boot_arch & 1 << 0  # legacy devices
    assert boot_arch & 1 << 2  # no VGA
    assert not boot_arch & 1 << 5  # there is a CMOS RTC


def test_facs_is_aligned_and_long_enough():
    tables = Tables(MACHINE)
    assert tables.facs_gpa % 64 == 0
    facs = tables.blob[tables.facs_gpa - layout.RSDP :][:64]
    assert (facs[:4], u(facs, 4, 4), facs[32]) == (b"FACS", 64, 2)


def test_madt_lists_processors_and_the_8259s():
    madt = Tables(MACHINE)["APIC"]
    assert (u(madt, 36, 4), u(madt, 40, 4)) == (0xFEE00000, 1)
    assert madt_of(MACHINE, 0, "<BBI") == [(0, 0, 1), (1, 1, 1)]
    assert madt_of(MACHINE, 9, "<HIII") == []


def test_processors_from_id_255_on_are_x2apics():
    assert madt_of(MANY, 0, "<BBI") == [(i, i, 1) for i in range(255)]
    assert madt_of(MANY, 9, "<HIII") == [(0, i, 1, i) for i in range(255, 300)]
    assert madt_of(MANY, 10, "<HIB3s") == [(0, 0xFFFFFFFF, 1, bytes(3))]


def test_one_ioapic_has_every_line():
    assert madt_of(MACHINE, 1, "<BBII") == [(0, 0, 0xFEC00000, 0)]


def test_sci_is_an_edge_and_pci_lines_below_16_are_levels():
    edge_high, level_low = 0b0101, 0b1111
    assert madt_of(MACHINE, 2, "<BBIH") == [(0, 9, 9, edge_high), (0, 5, 5, level_low)]


def test_nmi_is_lint1_of_every_processor():
    assert madt_of(MACHINE, 4, "<BHB") == [(0xFF, 0, 1)]


def test_mcfg_has_the_window_and_its_buses():
    mcfg = Tables(MACHINE._replace(ecam_buses=256))["MCFG"]
    assert struct.unpack("<QHBB", mcfg[44:56]) == (0xD0000000, 0, 0, 255)


def test_tables_stay_below_the_mp_table():
    acpi.build(MACHINE._replace(apic_ids=tuple(range(1000))))
    with pytest.raises(ConfigError, match="ACPI tables for 4000 vCPUs"):
        acpi.build(MACHINE._replace(apic_ids=tuple(range(4000))))
