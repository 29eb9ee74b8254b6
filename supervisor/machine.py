"""What sits where: the devices of the machine, their ports, interrupt lines and parameters (ARCHITECTURE.md).

Data, and the functions of the configuration that choose it; nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final

from devproc.catalog import CATALOG, Entry
from devproc.record import record
from devproc.wire import Scalar, Space
from kvmcore import acpi, layout
from kvmcore.errors import ConfigError
from kvmcore.mptable import PciInterrupt
from supervisor.config import RunConfig
from supervisor.console import open_serial, open_virtio_consoles
from supervisor.disks import open_disk
from supervisor.host import Opener
from supervisor.nets import open_net
from supervisor.shares import open_share
from supervisor.vsocks import open_vsock

SERIAL_BASES: Final = (0x3F8, 0x2F8, 0x3E8, 0x2E8)
SERIAL_GSIS: Final = (4, 3, 4, 3)
PIT_GSI: Final = 0
RTC_GSI: Final = 8
SCI_GSI: Final = 9
I8042_BASE: Final = 0x60
PORT_B: Final = 0x61  # one owner: KVM's PIT or the pit process, the i8042 process has the ports around it
PIT_BASE: Final = 0x40
RTC_BASE: Final = 0x70
PCI_CONFIG_BASE: Final = 0xCF8
ACPI_PM_BASE: Final = 0x600
PVPANIC_BASE: Final = 0x505
PIC_BASES: Final = (0x20, 0xA0)
ELCR_BASE: Final = 0x4D0
IOAPIC_PINS: Final = 24
BUS_SIZE: Final = 1 << 16  # io ports


@record
class Placement:
    """[base, base + size) on the io bus goes to `space` of the device, starting at `offset`."""

    base: int
    size: int
    space: Space
    offset: int = 0


@record
class Instance:
    """One device process.

    Attributes:
        gsi: the line that its `irq` descriptor drives as an edge, or a PCI function's INTA as a level.
        params: the values of the entry's parameters, less those that `opens` gives.
        pci_slot: it is function 0 of this device on bus 0.
        opens: opens the entry's descriptors that `Spawner` does not make itself; None if there are none.
    """

    name: str
    entry: Entry
    ports: tuple[Placement, ...] = ()
    gsi: int | None = None
    params: tuple[Scalar, ...] = ()
    pci_slot: int | None = None  # bus 0, function 0 of this device number
    opens: Opener | None = None

    def coalesced(self) -> list[int]:
        """Its ports whose writes KVM may put aside."""
        return [
            place.base + offset - place.offset
            for place in self.ports
            for offset in self.entry.coalesced(place.space)
        ]


@record
class Function:
    """A virtio function before it has its slot: instance name, kind, its own parameters, its opener.

    `params` come after the two that every virtio kind has first, the sizes of guest memory.
    """

    name: str
    kind: str
    params: tuple[Scalar, ...] = ()
    opens: Opener | None = None


_VHOST_USER: Final = {"block": "vhost-user-blk", "net": "vhost-user-net", "fs": "vhost-user-fs"}


def virtio_functions(config: RunConfig) -> Iterator[Function]:
    """The virtio functions that `config` asks for, in the order of their slots."""
    for n, net in enumerate(config.net, 1):
        kind = "virtio-net-stream" if net.passt else "virtio-net"
        yield Function(f"net{n}", kind, opens=partial(open_net, net))
    if config.rng:
        yield Function("rng", "virtio-rng")
    for n, disk in enumerate(config.block, 1):
        formats = int(disk.format == "qcow2"), int(disk.backing_format == "qcow2")
        use = disk.block_size, disk.queues, disk.bps, disk.iops, disk.id.encode()
        params = (int(disk.ro), int(disk.sparse), *use, *formats, int(disk.packed_queue))
        yield Function(f"block{n}", "virtio-blk", params, partial(open_disk, disk))
    if consoles := config.virtio_consoles():
        names = b"\0".join(port.name.encode() for port in consoles)
        yield Function("console", "virtio-console", (names,), partial(open_virtio_consoles, consoles))
    for vsock in config.vsock:
        yield Function("vsock", "virtio-vsock", (vsock.cid,), open_vsock)
    if config.balloon:
        yield Function("balloon", "virtio-balloon")
    for n, shared in enumerate(config.shared_dir, 1):
        use_fs = shared.tag.encode(), int(shared.ro)
        yield Function(f"fs{n}", "virtio-fs", use_fs, partial(open_share, shared))
    for n, vhost in enumerate(config.vhost_user, 1):
        from supervisor.vhosts import open_vhost_user  # noqa: PLC0415 - no other VM pays for the protocol

        yield Function(f"vhost{n}", _VHOST_USER[vhost.type], opens=partial(open_vhost_user, vhost))


_PCI_GSIS: Final = (5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23)
_PCI_SLOTS: Final = 32
_INTA: Final = 0


def pci_interrupts() -> tuple[PciInterrupt, ...]:
    """How the slots of bus 0 are wired, whether they are taken or not: INTA of each, over the free lines."""
    return tuple(
        PciInterrupt(slot, _INTA, _PCI_GSIS[(slot - 1) % len(_PCI_GSIS)]) for slot in range(1, _PCI_SLOTS)
    )


def acpi_machine(config: RunConfig, mem_size: int, ecam_buses: int) -> acpi.Machine:
    """What the ACPI tables say of the machine; `mem_size` in bytes."""
    isa = [
        acpi.IsaDevice(f"COM{n}", acpi.SERIAL_HID, SERIAL_BASES[n - 1], 8, SERIAL_GSIS[n - 1], n)
        for n in range(1, 5)
    ]
    isa += [
        acpi.IsaDevice("RTC", acpi.RTC_HID, RTC_BASE, 2, RTC_GSI),
        acpi.IsaDevice("TIMR", acpi.PIT_HID, PIT_BASE, 4, PIT_GSI),
        acpi.IsaDevice("PEVT", acpi.PVPANIC_HID, PVPANIC_BASE, 1),
    ]
    high = layout.high_mmio(mem_size)
    return acpi.Machine(
        apic_ids=tuple(range(config.cpus)),
        pm_port=ACPI_PM_BASE,
        sci_gsi=SCI_GSI,
        reset_port=I8042_BASE + 4,
        reset_value=0xFE,
        isa_devices=tuple(isa),
        pci_config_port=PCI_CONFIG_BASE,
        pci_io=(layout.PCI_IO, layout.PCI_IO_SIZE),
        pci_mmio=(layout.PCI_MMIO, layout.PCI_MMIO_SIZE),
        pci_high_mmio=(high, layout.HIGH_MMIO_SIZE),
        pci_interrupts=pci_interrupts(),
        ecam_buses=ecam_buses,
    )


def kinds(config: RunConfig) -> list[str]:
    """The catalogue names that `instances` will ask for."""
    return list(dict.fromkeys(i.entry.name for i in instances(config, 0, 0)))


def instances(config: RunConfig, mem_below_4g: int, mem_above_4g: int) -> tuple[Instance, ...]:
    """Every device of the machine that `config` describes; sizes in bytes.

    Raises:
        ConfigError: there are not enough slots on bus 0.
    """
    split = config.irqchip == "split"
    devices = [
        Instance(
            f"serial{port.num}",
            CATALOG["serial"],
            (Placement(SERIAL_BASES[port.num - 1], 8, Space.PORT),),
            gsi=SERIAL_GSIS[port.num - 1],
            opens=partial(open_serial, port),
        )
        for port in config.serial_ports()
    ]
    devices.append(
        Instance(
            "rtc",
            CATALOG["rtc"],
            (Placement(RTC_BASE, 2, Space.PORT),),
            gsi=RTC_GSI,
            params=(mem_below_4g, mem_above_4g),
        )
    )
    keyboard = Placement(I8042_BASE, 5, Space.PORT)
    around = (Placement(I8042_BASE, 1, Space.PORT), Placement(I8042_BASE + 2, 3, Space.PORT, 2))
    devices.append(Instance("i8042", CATALOG["i8042"], around if split else (keyboard,)))
    if split:
        timer = (Placement(PIT_BASE, 4, Space.PORT), Placement(PORT_B, 1, Space.PORT2))
        devices.append(Instance("pit", CATALOG["pit"], timer, gsi=PIT_GSI))
    devices += [
        Instance("acpi-pm", CATALOG["acpi-pm"], (Placement(ACPI_PM_BASE, 16, Space.PORT),), gsi=SCI_GSI),
        Instance("pvpanic", CATALOG["pvpanic"], (Placement(PVPANIC_BASE, 1, Space.PORT),)),
        Instance("pci-host", CATALOG["pci-host"], pci_slot=0),
    ]
    functions = list(virtio_functions(config))
    if len(functions) >= _PCI_SLOTS:
        raise ConfigError(f"{len(functions)} virtio devices: expected at most {_PCI_SLOTS - 1}")
    devices += [
        Instance(
            f.name,
            CATALOG[f.kind],
            gsi=line.gsi,
            params=(mem_below_4g, mem_above_4g, *f.params),
            pci_slot=line.device,
            opens=f.opens,
        )
        for f, line in zip(functions, pci_interrupts(), strict=False)
    ]
    return tuple(devices)
