import itertools

import pytest

from devproc.catalog import CATALOG
from kvmcore import layout
from supervisor import machine
from supervisor.config import (
    BlockConfig,
    NetConfig,
    RunConfig,
    SerialConfig,
    SharedDirConfig,
    VhostUserConfig,
    VsockConfig,
)

GIB = 1 << 30


def instances(irqchip):
    return machine.instances(RunConfig("k", irqchip=irqchip), GIB, 0)


def ports(irqchip):
    return sorted((p.base, p.base + p.size, i.name) for i in instances(irqchip) for p in i.ports)


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_no_two_devices_share_a_port(irqchip):
    for (_, end, _), (start, _, _) in itertools.pairwise(ports(irqchip)):
        assert end <= start


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_every_port_lies_in_a_region_of_its_device(irqchip):
    for i in instances(irqchip):
        for p in i.ports:
            region = next(r for r in i.entry.regions if r.space is p.space)
            assert p.offset + p.size <= region.size, i.name


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_a_device_has_a_line_exactly_if_it_has_an_irq_descriptor(irqchip):
    for i in instances(irqchip):
        assert (i.gsi is not None) == any(d.name == "irq" for d in i.entry.descriptors), i.name


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_every_devices_parameters_fit_its_catalogue_entry(irqchip):
    names = [i.name for i in instances(irqchip)]
    assert len(names) == len(set(names))
    for i in instances(irqchip):
        i.entry.check_params(i.params)


def test_every_kind_of_device_is_in_some_machine():
    everything = RunConfig(
        "k",
        irqchip="split",
        serial=(SerialConfig(1, hardware="virtio-console"),),
        block=(BlockConfig("disk"),),
        net=(NetConfig(tap_name="tap"), NetConfig(passt=True)),
        shared_dir=(SharedDirConfig("directory", "tag"),),
        vsock=(VsockConfig(3, "socket"),),
        vhost_user=(
            VhostUserConfig("block", "socket"),
            VhostUserConfig("net", "socket"),
            VhostUserConfig("fs", "socket", tag="other"),
        ),
        balloon=True,
    )
    kinds = {i.entry.name for i in machine.instances(everything, GIB, 0)}
    assert kinds == CATALOG.keys()


def test_the_ports_of_the_virtio_console_are_told_apart_by_name():
    ports = tuple(
        SerialConfig(n, hardware="virtio-console", name=name) for n, name in ((2, "agent"), (1, ""))
    )
    console = next(i for i in machine.instances(RunConfig("k", serial=ports), GIB, 0) if i.name == "console")
    assert console.entry.check_params(console.params)["names"] == b"\0agent"


def test_com_ports_and_their_lines_are_the_pcs():
    serial = [(i.ports[0].base, i.gsi) for i in instances("kernel") if i.entry.name == "serial"]
    assert serial == [(0x3F8, 4), (0x2F8, 3), (0x3E8, 4), (0x2E8, 3)]


def test_port_0x61_has_one_owner_in_each_configuration():
    def owners(irqchip):
        return [name for start, end, name in ports(irqchip) if start <= 0x61 < end]

    assert owners("split") == ["pit"]
    assert len(owners("kernel")) <= 1


def test_the_reset_port_reaches_the_keyboard_controller_either_way():
    for irqchip in ("kernel", "split"):
        assert [n for start, end, n in ports(irqchip) if start <= 0x64 < end] == ["i8042"]


def test_the_rtc_is_told_the_memory_size():
    rtc = next(i for i in machine.instances(RunConfig("k"), 3 * GIB, 2 * GIB) if i.name == "rtc")
    assert rtc.params == (3 * GIB, 2 * GIB)


def test_pci_lines_keep_clear_of_the_legacy_devices():
    legacy = {i.gsi for i in instances("split") if i.gsi is not None and i.entry.virtio is None}
    lines = {p.gsi for p in machine.pci_interrupts()}
    assert not lines & legacy
    assert max(lines) < layout.GSI_COUNT
