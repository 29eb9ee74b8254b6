"""PCI configuration in the exit loop: the address latch, which function an access selects, what floats."""

from collections.abc import Iterator

import pytest

from devproc.wire import Read, Space
from kvmcore.exitloop import ExitKind, Route
from tests.kvmcore.test_exitloop import Device, Machine

CF8, ECAM = 0xCF8, 0xD0000000
ENABLE = 1 << 31
SLOT = 3  # the function that exists is 0:3.0


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    index = machine.add(Device())
    machine.core.set_pci_function(SLOT << 3, index)
    config = [Route.pci_config(CF8, 8, Space.CONFIG)], [Route.pci_config(ECAM, 1 << 20, Space.CONFIG)]
    machine.core.set_routes(*config)
    yield machine
    machine.close()


def select(machine: Machine, bus: int, slot: int, function: int, register: int, enable: int = ENABLE) -> None:
    address = enable | bus << 16 | slot << 11 | function << 8 | register
    assert machine.outs(CF8, 4, address.to_bytes(4, "little")) is None


def ones(data: bytes) -> bool:
    return set(data) == {0xFF}


def test_the_address_is_latched_without_its_reserved_bits(machine: Machine) -> None:
    assert machine.outs(CF8, 4, b"\xff\xff\xff\xff") is None
    assert machine.ins(CF8, 4) == (0x80FFFFFC).to_bytes(4, "little")
    assert machine.core.pci_address == 0x80FFFFFC


@pytest.mark.parametrize("size", [1, 2])
def test_a_narrow_access_is_not_the_address_register(machine: Machine, size: int) -> None:
    select(machine, 0, SLOT, 0, 0x40)
    machine.outs(CF8, size, b"\x12" * size)
    assert machine.core.pci_address == ENABLE | SLOT << 11 | 0x40
    assert ones(machine.ins(CF8, size))


def test_a_read_goes_to_the_function_at_its_register(machine: Machine) -> None:
    select(machine, 0, SLOT, 0, 0x10)
    machine.ins(CF8 + 4, 4)
    machine.ins(CF8 + 6, 2)
    machine.ins(CF8 + 7, 1)
    machine.mmio(ECAM + (SLOT << 15) + 0x104, 4)
    reads = [Read(Space.CONFIG, 0x10, 4), Read(Space.CONFIG, 0x12, 2), Read(Space.CONFIG, 0x13, 1)]
    assert machine.devices[0].got == [*reads, Read(Space.CONFIG, 0x104, 4)]


@pytest.mark.parametrize(
    ("bus", "slot", "function", "enable"),
    [(1, SLOT, 0, ENABLE), (0, SLOT + 1, 0, ENABLE), (0, SLOT, 1, ENABLE), (0, SLOT, 0, 0)],
)
def test_what_is_not_there_floats(machine: Machine, bus: int, slot: int, function: int, enable: int) -> None:
    select(machine, bus, slot, function, 0, enable)
    assert ones(machine.ins(CF8 + 4, 4))
    assert machine.outs(CF8 + 4, 4, bytes(4)) is None
    assert machine.core.float_counters() == (1, 1)
    assert machine.devices[0].got == []


def test_an_access_across_two_registers_floats(machine: Machine) -> None:
    select(machine, 0, SLOT, 0, 0)
    assert ones(machine.ins(CF8 + 5, 2))
    machine.mmio(ECAM + (SLOT << 15), 8)
    assert ones(machine.mmio_data(8))
    assert machine.devices[0].got == []


def test_a_write_is_for_python(machine: Machine) -> None:
    select(machine, 0, SLOT, 0, 4)
    exit_ = machine.outs(CF8 + 4, 2, b"\x07\x00")
    assert exit_ is not None
    assert (exit_.kind, exit_.addr, exit_.data) == (ExitKind.IO, CF8 + 4, 7)
    assert machine.vcpu.dispatch() is None  # Python has done it
    exit_ = machine.mmio(ECAM + (SLOT << 15) + 4, 2, b"\x06" + bytes(7))
    assert exit_ is not None
    assert (exit_.kind, exit_.addr, exit_.data) == (ExitKind.IO, ECAM + (SLOT << 15) + 4, 6)


def test_a_function_needs_a_device(machine: Machine) -> None:
    for devfn, index in ((256, 0), (8, 1)):
        with pytest.raises(IndexError):
            machine.core.set_pci_function(devfn, index)
