"""A function between the guest's writes, the bus and KVM: the exit loop's tables are real, KVM is a log."""

import os
import socket

import pytest

from devproc.catalog import RNG
from devproc.virtio import spec
from devproc.wire import Space
from kvmcore.exitloop import Core, RouteKind
from kvmcore.irq import GsiRouter
from supervisor.bus import Buses, Callbacks, Claim
from supervisor.msix import CONTROL, ENABLE, Msix
from supervisor.pcishadow import BAR0, COMMAND, COMMAND_MEMORY, PciBus
from supervisor.virtiofunction import VirtioFunction

HERE, THERE = 0xE0000000, 0xE0010000
WINDOW = spec.CONFIG_PCI
DATA = WINDOW + spec.CAP_PCI_CFG_DATA


class Kvm:
    def __init__(self):
        self.kicks = set()
        self.interrupts = set()

    def irqfd(self, eventfd, gsi, resample=None, deassign=False):
        (self.interrupts.remove if deassign else self.interrupts.add)(gsi)

    def ioeventfd(self, eventfd, addr, size, *, pio, deassign=False):
        assert (size, pio) == (0, False)
        (self.kicks.remove if deassign else self.kicks.add)((eventfd, addr))


class Owner:
    def __init__(self, name, index):
        self.name = name
        self.index = index
        self.got = []

    def write(self, space, offset, size, data):
        self.got.append((space, offset, size, data))


class Machine:
    """Two random number generators, in slots 1 and 2, without their processes."""

    def __init__(self):
        self.kvm = Kvm()
        core = Core(100)
        self.channels = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        self.fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(RNG.vectors)]
        self.buses = Buses(core, 1 << 16, 1 << 52)
        self.bus = PciBus(lambda: 0, self._settle)
        router = GsiRouter(lambda routes: None, split=True)
        self.owners, self.functions = [], []
        for n, (ours, _) in enumerate(self.channels):
            owner = Owner(f"rng{n}", core.add_device(ours.fileno()))
            msix = Msix(self.kvm, router, self.fds, 24 + 10 * n)
            function = VirtioFunction(
                owner, RNG, msix, (100 + n,), self.kvm, self.buses, lambda gpa, size: True
            )
            self.owners.append(owner)
            self.functions.append(function)
            self.bus.add(n + 1, function)

    def _settle(self):
        for function in self.functions:
            function.place()

    def config(self, offset, size, data, slot=1):
        self.bus.ecam_write(slot << 15 | offset, size, data)

    def bar(self, offset, size, data, base=HERE):
        handler, at = self.buses.mmio.handler(base + offset)
        handler.write(at, size, data)

    def close(self):
        for pair in self.channels:
            for end in pair:
                end.close()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def machine():
    machine = Machine()
    machine.functions[0].assign(HERE)
    machine.owners[0].got.clear()
    yield machine
    machine.close()


def placed(machine):
    return {c.owner: min(c.start for c in machine.buses.mmio.claims()) for c in machine.buses.mmio.claims()}


def test_firmware_gives_the_bar_an_address_that_device_and_shadow_know():
    machine = Machine()
    machine.functions[0].assign(HERE)
    assert machine.owners[0].got == [
        (Space.CONFIG, BAR0, 4, HERE),
        (Space.CONFIG, COMMAND, 2, COMMAND_MEMORY),
    ]
    assert placed(machine) == {"rng0": HERE}
    machine.close()


def test_the_bar_is_checked_then_the_device_s_then_ours(machine):
    assert [(r.start, r.size, r.kind, r.base_offset) for r in machine.buses.mmio.routes()] == [
        (HERE, 0x1000, RouteKind.CHECKED, 0),
        (HERE + 0x1000, 0x5000, RouteKind.DEVICE, 0x1000),
        (HERE + 0x6000, 0x2000, RouteKind.PYTHON, 0),
    ]
    assert machine.kvm.kicks == {(100, HERE + spec.BAR_NOTIFY)}


def test_kicks_move_with_the_bar_and_go_with_it(machine):
    machine.config(BAR0, 4, THERE)
    assert machine.kvm.kicks == {(100, THERE + spec.BAR_NOTIFY)}
    assert placed(machine) == {"rng0": THERE}
    machine.config(COMMAND, 2, 0)
    assert machine.kvm.kicks == set()
    assert placed(machine) == {}


def test_a_bar_on_top_of_another_waits_until_there_is_room(machine):
    """Threat 1."""
    machine.functions[1].assign(HERE)
    assert placed(machine) == {"rng0": HERE}
    assert machine.kvm.kicks == {(100, HERE + spec.BAR_NOTIFY)}
    machine.config(BAR0, 4, THERE, slot=1)
    assert {c.owner: c.start for c in reversed(machine.buses.mmio.claims())} == {"rng0": THERE, "rng1": HERE}
    assert machine.kvm.kicks == {(100, THERE + spec.BAR_NOTIFY), (101, HERE + spec.BAR_NOTIFY)}


def test_a_bar_on_top_of_a_chip_is_not_decoded(machine):
    """Threat 1."""
    nobody = Callbacks(lambda offset, size: 0, lambda offset, size, data: None)
    machine.buses.mmio.insert(Claim(THERE + 0x4000, 8, "ioapic", nobody))
    machine.config(BAR0, 4, THERE)
    assert [c.owner for c in machine.buses.mmio.claims()] == ["ioapic"]
    assert machine.kvm.kicks == set()


def test_common_configuration_is_written_by_way_of_the_shadow(machine):
    machine.bar(spec.QUEUE_SELECT, 2, 0)
    machine.bar(spec.QUEUE_SIZE, 2, 3)
    assert machine.owners[0].got == [(Space.BAR0, spec.QUEUE_SELECT, 2, 0)]
    assert machine.functions[0].refused == 1


def test_message_control_reaches_device_and_table(machine):
    machine.bar(spec.BAR_MSIX_TABLE + 12, 4, 0)
    machine.config(spec.CONFIG_MSIX + CONTROL, 2, ENABLE)
    assert machine.kvm.interrupts == {24}
    assert machine.owners[0].got == [(Space.CONFIG, spec.CONFIG_MSIX + CONTROL, 2, ENABLE)]
    machine.config(spec.CONFIG_MSIX, 4, 0)  # as part of a wider write
    assert machine.kvm.interrupts == set()


def through_window(machine, offset, size, data, bar=0, width=None):
    machine.config(WINDOW + spec.CAP_BAR, 1, bar)
    machine.config(WINDOW + spec.CAP_OFFSET, 4, offset)
    machine.config(WINDOW + spec.CAP_LENGTH, 4, size)
    machine.owners[0].got.clear()
    machine.config(DATA, width or size, data)
    return machine.owners[0].got


def test_the_window_writes_as_the_bar_does(machine):
    """Threat 2."""
    assert through_window(machine, spec.QUEUE_SELECT, 2, 1) == [(Space.BAR0, spec.QUEUE_SELECT, 2, 1)]
    assert through_window(machine, spec.BAR_NOTIFY, 2, 0) == [(Space.BAR0, spec.BAR_NOTIFY, 2, 0)]
    assert through_window(machine, spec.DEVICE_STATUS, 1, 0xFF01, width=4) == [
        (Space.BAR0, spec.DEVICE_STATUS, 1, 1)
    ]
    assert machine.functions[0].refused == 0
    assert through_window(machine, spec.QUEUE_SIZE, 2, 3) == []
    assert machine.functions[0].refused == 1


@pytest.mark.parametrize(
    "what",
    [
        {"offset": spec.BAR_MSIX_TABLE, "size": 4},
        {"offset": spec.BAR_MSIX_TABLE - 2, "size": 4},
        {"offset": 0xFFFFFFFC, "size": 4},
        {"offset": 0x15, "size": 2, "width": 2},
        {"offset": spec.QUEUE_SELECT, "size": 3, "width": 4},
        {"offset": spec.QUEUE_SELECT, "size": 0, "width": 4},
        {"offset": spec.QUEUE_SELECT, "size": 2, "width": 1},
        {"offset": spec.QUEUE_SELECT, "size": 2, "bar": 1},
    ],
)
def test_a_window_that_is_not_one_writes_nothing(machine, what):
    """Threat 2."""
    assert through_window(machine, data=0, **what) == []
    assert machine.functions[0].refused == 1


def test_a_write_into_the_middle_of_the_window_writes_nothing(machine):
    """Threat 2."""
    through_window(machine, spec.DEVICE_STATUS, 1, 1)
    machine.config(DATA + 1, 1, 0)
    assert machine.functions[0].refused == 1
