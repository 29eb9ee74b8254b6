"""The ACPI tables of the machine: RSDP, XSDT, FADT, FACS, MADT, DSDT, and MCFG if there is an ECAM window.

ACPI specification 6.5, chapter 5; PCI Firmware Specification 3.3, section 4.1.2 (MCFG).  The hardware model
is the fixed one, not the hardware-reduced: the PM timer and the PM1 registers are the acpi-pm device's.

Interrupts: pin n of the I/O APIC is GSI n for every n, IRQ 0 included, as KVM wires both its irqchips
(arch/x86/kvm/irq_comm.c, default_routing), so there is no override for the timer.  There is one for the SCI,
which would otherwise be level and active low: ours is an eventfd that KVM turns into an edge.  Lines below
16 that PCI uses are overridden the other way, for they would otherwise be ISA edges.

Left out: GPEs, and with them the event of a generation id that changes while the guest runs; buttons, sleep
states but S5, C-states beyond C1, _OSC, hot-plug.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from typing import Final, NamedTuple

from kvmcore import aml, layout
from kvmcore.errors import ConfigError
from kvmcore.mptable import PciInterrupt

SERIAL_HID: Final = "PNP0501"
PIT_HID: Final = "PNP0100"
RTC_HID: Final = "PNP0B00"
PVPANIC_HID: Final = "QEMU0001"
VM_GENERATION_ID_SIZE: Final = 16
S5_SLP_TYP: Final = 5  # what the acpi-pm device takes for power-off

_OEM_ID: Final = b"VMSUP ".ljust(6)
_OEM_TABLE_ID: Final = b"VMSUPVM ".ljust(8)
_ALIGN: Final = 64  # what the FACS needs; the others follow suit

_HEADER: Final = struct.Struct("<4sIBB6s8sI4sI")
_RSDP: Final = struct.Struct("<8sB6sBIIQB3x")
_FACS: Final = struct.Struct("<4sI24xB31x")
_FADT: Final = struct.Struct("<IIxBHIBBBB8I8B4H5BHxI12sBHBQQ" + "12s" * 10 + "8s")
_GAS: Final = struct.Struct(
    "<BBBBQ"
)  # generic address structure: space, bit width, bit offset, access, address
_LAPIC: Final = struct.Struct("<BBBBI")
_IOAPIC: Final = struct.Struct("<BBBxII")
_OVERRIDE: Final = struct.Struct("<BBBBIH")
_LAPIC_NMI: Final = struct.Struct("<BBBHB")
_X2APIC: Final = struct.Struct("<BBxxIII")
_X2APIC_NMI: Final = struct.Struct("<BBHIB3x")
_MCFG_ENTRY: Final = struct.Struct("<QHBB4x")

# FADT: IA-PC boot architecture flags, fixed feature flags
_LEGACY_DEVICES: Final = 1 << 0
_8042: Final = 1 << 1
_NO_VGA: Final = 1 << 2
_NO_ASPM: Final = 1 << 4
_WBINVD: Final = 1 << 0
_PROC_C1: Final = 1 << 2
_NO_FIXED_POWER_BUTTON: Final = 1 << 4
_NO_FIXED_SLEEP_BUTTON: Final = 1 << 5
_NO_FIXED_RTC_WAKE: Final = 1 << 6
_TMR_VAL_EXT: Final = 1 << 8  # a 32-bit PM timer
_RESET_REG_SUP: Final = 1 << 10

# MADT
_PCAT_COMPAT: Final = 1 << 0  # there are two 8259As as well
_ENABLED: Final = 1 << 0
_XAPIC_IDS: Final = 0xFF  # ids from here on need the x2APIC structures
_HIGH_EDGE: Final = 0b01_01
_LOW_LEVEL: Final = 0b11_11

_SYSTEM_IO: Final = 1
_NO_GAS: Final = bytes(_GAS.size)


class IsaDevice(NamedTuple):
    """What a guest finds by its id `hid`: `size` ports from `port`, and an interrupt line or none."""

    name: str  # four characters at most, A-Z and 0-9, unique
    hid: str
    port: int
    size: int
    gsi: int | None = None
    uid: int = 0


class Machine(NamedTuple):
    """What the tables say.  Windows are (base, size) in bytes or ports, of what PCI BARs may be given."""

    apic_ids: tuple[int, ...]  # of every processor, ascending; the first is the bootstrap processor
    pm_port: int  # PM1_EVT at +0 (4), PM1_CNT at +4 (2), PM_TMR at +8 (4)
    sci_gsi: int
    reset_port: int
    reset_value: int
    isa_devices: tuple[IsaDevice, ...]
    pci_config_port: int
    pci_io: tuple[int, int]
    pci_mmio: tuple[int, int]
    pci_high_mmio: tuple[int, int]
    pci_interrupts: tuple[PciInterrupt, ...] = ()
    ecam_buses: int = 0  # 0: no ECAM window
    century_index: int = 0x32  # in CMOS memory
    i8042: bool = False  # whether there is a keyboard controller worth probing


def build(machine: Machine, base: int = layout.RSDP) -> bytes:
    """All tables, to be written at `base`, a multiple of 64, where the RSDP will be.

    Raises:
        ConfigError: they do not fit below the MP table (some 1,500 processors).
    """
    blob = bytearray(_aligned(_RSDP.size + 4))

    def place(data: bytes) -> int:
        gpa = base + len(blob)
        blob.extend(data.ljust(_aligned(len(data)), b"\0"))
        return gpa

    facs = place(_FACS.pack(b"FACS", _FACS.size, 2))
    dsdt = place(_table(b"DSDT", 2, _dsdt(machine)))
    tables = [
        place(_table(b"FACP", 6, _fadt(machine, facs, dsdt))),
        place(_table(b"APIC", 6, b"".join(_madt(machine)))),
    ]
    if machine.ecam_buses:
        entry = _MCFG_ENTRY.pack(layout.ECAM, 0, 0, machine.ecam_buses - 1)
        tables.append(place(_table(b"MCFG", 1, bytes(8) + entry)))
    xsdt = place(_table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)))
    blob[: _RSDP.size] = _rsdp(xsdt)
    if base + len(blob) > layout.MP_TABLE:
        processors = len(machine.apic_ids)
        raise ConfigError(f"ACPI tables for {processors} vCPUs: {len(blob)} bytes, expected at most 65536")
    return bytes(blob)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _with_checksum(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([-sum(data) & 0xFF]) + data[at + 1 :]


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    size = _HEADER.size + len(body)
    header = _HEADER.pack(signature, size, revision, 0, _OEM_ID, _OEM_TABLE_ID, 1, b"VMSP", 1)
    return _with_checksum(header + body, at=9)


def _rsdp(xsdt: int) -> bytes:
    size = _RSDP.size
    first = _with_checksum(_RSDP.pack(b"RSD PTR ", 0, _OEM_ID, 2, 0, size, xsdt, 0)[:20], at=8)
    return _with_checksum(first + struct.pack("<IQB3x", size, xsdt, 0), at=32)


def _gas(port: int, bits: int, access: int = 0) -> bytes:
    return _GAS.pack(_SYSTEM_IO, bits, 0, access, port)


def _fadt(machine: Machine, facs: int, dsdt: int) -> bytes:
    event, control, timer = machine.pm_port, machine.pm_port + 4, machine.pm_port + 8
    return _FADT.pack(
        0, 0,  # the 32-bit FIRMWARE_CTRL and DSDT: the 64-bit ones are given
        0, machine.sci_gsi,
        0, 0, 0, 0, 0,  # no SMI_CMD: the machine is always in ACPI mode
        event, 0, control, 0, 0, timer, 0, 0,
        4, 2, 0, 4, 0, 0, 0, 0,  # their lengths, and GPE1_BASE and CST_CNT
        0xFFFF, 0xFFFF,  # P_LVL2_LAT and P_LVL3_LAT: no C2, no C3
        0, 0,  # FLUSH_SIZE, FLUSH_STRIDE: WBINVD works
        0, 0,  # no clock throttling
        0, 0, machine.century_index,  # no day and month alarms
        _LEGACY_DEVICES | _NO_VGA | _NO_ASPM | (_8042 if machine.i8042 else 0),
        _WBINVD | _PROC_C1 | _NO_FIXED_POWER_BUTTON | _NO_FIXED_SLEEP_BUTTON | _NO_FIXED_RTC_WAKE
        | _TMR_VAL_EXT | _RESET_REG_SUP,
        _gas(machine.reset_port, bits=8, access=1), machine.reset_value,
        0, 5,  # ARM_BOOT_ARCH; minor version 5 of major 6
        facs, dsdt,
        _gas(event, bits=32), _NO_GAS, _gas(control, bits=16), _NO_GAS, _NO_GAS, _gas(timer, bits=32),
        _NO_GAS, _NO_GAS, _NO_GAS, _NO_GAS,
        b"VMSUP",
    )  # fmt: skip


def _madt(machine: Machine) -> Iterator[bytes]:
    yield struct.pack("<II", layout.LAPIC, _PCAT_COMPAT)
    for uid, apic_id in enumerate(machine.apic_ids):
        if apic_id < _XAPIC_IDS:
            # The UID has 8 bits here too, which is enough: ids ascend, so no UID is bigger than its id.
            yield _LAPIC.pack(0, _LAPIC.size, uid, apic_id, _ENABLED)
        else:
            yield _X2APIC.pack(9, _X2APIC.size, apic_id, _ENABLED, uid)
    yield _IOAPIC.pack(1, _IOAPIC.size, layout.IOAPIC_ID, layout.IOAPIC, 0)
    yield _OVERRIDE.pack(2, _OVERRIDE.size, 0, machine.sci_gsi, machine.sci_gsi, _HIGH_EDGE)
    for gsi in sorted({p.gsi for p in machine.pci_interrupts if p.gsi < 16}):
        yield _OVERRIDE.pack(2, _OVERRIDE.size, 0, gsi, gsi, _LOW_LEVEL)
    yield _LAPIC_NMI.pack(4, _LAPIC_NMI.size, 0xFF, 0, 1)  # every processor, its LINT1
    if any(apic_id >= _XAPIC_IDS for apic_id in machine.apic_ids):
        yield _X2APIC_NMI.pack(10, _X2APIC_NMI.size, 0, 0xFFFFFFFF, 1)


def _dsdt(machine: Machine) -> bytes:
    users = Counter(d.gsi for d in machine.isa_devices)
    return aml.scope(
        "\\_SB",
        *(_processor(uid) for uid in range(len(machine.apic_ids))),
        *(_isa_device(d, shared=users[d.gsi] > 1) for d in machine.isa_devices),
        *_ecam(machine.ecam_buses),
        _vm_generation_id(),
        _pci_root(machine),
    ) + aml.name("\\_S5", aml.package(*map(aml.integer, (S5_SLP_TYP, 0, 0, 0))))


def _processor(uid: int) -> bytes:
    return aml.device(f"C{uid:03X}", _id("ACPI0007"), aml.name("_UID", aml.integer(uid)))


def _isa_device(device: IsaDevice, shared: bool) -> bytes:
    descriptors = [aml.io(device.port, device.size)]
    if device.gsi is not None:
        descriptors.append(aml.irq(device.gsi, shared))
    return aml.device(
        device.name,
        _id(device.hid),
        aml.name("_UID", aml.integer(device.uid)),
        aml.name("_CRS", aml.resources(*descriptors)),
    )


def _ecam(buses: int) -> Iterator[bytes]:
    """The window as a motherboard resource, without which Linux does not trust the MCFG."""
    if buses:
        window = aml.memory32_fixed(layout.ECAM, layout.ecam_size(buses))
        yield aml.device("ECAM", _id("PNP0C02"), aml.name("_CRS", aml.resources(window)))


def _vm_generation_id() -> bytes:
    """Where the VM's generation id is (Microsoft's "Virtual Machine Generation ID", 2012).

    Guests know it by the compatible ids: the one of the specification, and the one that has ACPI's form.
    """
    ids = aml.package(aml.string("VMGENCTR"), aml.string("VM_Gen_Counter"))
    low, high = layout.VM_GENERATION_ID & 0xFFFFFFFF, layout.VM_GENERATION_ID >> 32
    return aml.device(
        "VGEN",
        _id("VMSP0001"),
        aml.name("_CID", ids),
        aml.name("_DDN", aml.string("VM_Gen_Counter")),
        aml.name("ADDR", aml.package(aml.integer(low), aml.integer(high))),
    )


def _pci_root(machine: Machine) -> bytes:
    routes = (
        aml.package(*map(aml.integer, (p.device << 16 | 0xFFFF, p.pin, 0, p.gsi)))
        for p in sorted(set(machine.pci_interrupts))
    )
    return aml.device(
        "PCI0",
        _id("PNP0A08" if machine.ecam_buses else "PNP0A03"),
        aml.name("_CID", aml.hardware_id("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_SEG", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        aml.name(
            "_CRS",
            aml.resources(
                aml.bus_window(0, machine.ecam_buses or 1),
                aml.io(machine.pci_config_port, 8),
                aml.io_window(*machine.pci_io),
                aml.memory32_window(*machine.pci_mmio),
                aml.memory64_window(*machine.pci_high_mmio),
            ),
        ),
        aml.name("_PRT", aml.package(*routes)),
    )


def _id(hid: str) -> bytes:
    return aml.name("_HID", aml.hardware_id(hid))
