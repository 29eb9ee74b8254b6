"""Level-triggered lines of the split interrupt chip; integration/machine has them with a guest."""

import os
import select

import pytest

from kvmcore import layout
from kvmcore.exitloop import Core
from kvmcore.irq import GsiRouter, MsiMessage
from supervisor.bus import Buses
from supervisor.splitchip import SplitChip

GSI = 5
LEVEL, MASKED = 1 << 15, 1 << 16
VECTOR = 0x41
MESSAGE = MsiMessage(0xFEE00000, LEVEL | 1 << 14 | VECTOR)


class Kvm:
    """The VM and its vCPU 0: what was delivered."""

    def __init__(self):
        self.messages = []
        self.extints = []
        self.ready_for_interrupt_injection = True

    def signal_msi(self, message):
        self.messages.append(message)

    def interrupt(self, vector):
        self.extints.append(vector)

    def request_interrupt_window(self, wanted):
        pass


class Machine:
    """The chip, with two devices on one line; vCPU 0 calls `inject` as soon as it is interrupted."""

    def __init__(self):
        self.kvm = Kvm()
        self.buses = Buses(Core(100), 1 << 16, 1 << 52)
        router = GsiRouter(lambda routes: None, split=True)
        self.chip = SplitChip(self.kvm, router, self.kvm, self.buses)
        self.chip.interrupt_bsp = self.chip.inject
        self.woken = 0
        self.chip.wake = self._wake
        self.intx, self.resample = ([os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)] for _ in range(2))
        for eventfd, resample in zip(self.intx, self.resample, strict=True):
            self.chip.connect(eventfd, GSI, resample)

    def _wake(self):
        self.woken += 1

    def redirect(self, entry):
        for offset, data in ((0, 0x10 + 2 * GSI), (0x10, entry)):
            handler, at = self.buses.mmio.handler(layout.IOAPIC + offset)
            handler.write(at, 4, data)

    def out(self, port, *data):
        handler, at = self.buses.io.handler(port)
        for byte in data:
            handler.write(at, 1, byte)

    def raise_line(self, n=0):
        """The device does, and the run loop looks, if it watches."""
        os.eventfd_write(self.intx[n], 1)
        self.look()

    def look(self):
        for fd in self.chip.wants():
            if select.select([fd], [], [], 0)[0]:
                self.chip.ready(fd, select.POLLIN)

    def resampled(self):
        return [bool(select.select([fd], [], [], 0)[0]) for fd in self.resample]

    def close(self):
        for fd in (*self.intx, *self.resample):
            os.close(fd)


@pytest.fixture
def machine():
    machine = Machine()
    yield machine
    machine.close()


def test_a_level_is_delivered_once_until_its_eoi(machine):
    machine.redirect(LEVEL | VECTOR)
    for _ in range(3):
        machine.raise_line()
    assert machine.kvm.messages == [MESSAGE]
    assert machine.resampled() == [False, False]
    machine.chip.end_of_interrupt(VECTOR)
    assert machine.resampled() == [True, True]
    assert machine.kvm.messages == [MESSAGE]


def test_a_line_that_is_high_is_not_watched_so_that_no_device_keeps_the_main_thread_busy(machine):
    machine.redirect(LEVEL | VECTOR)
    assert set(machine.chip.wants()) == set(machine.intx)
    machine.raise_line()
    assert machine.chip.wants() == {}
    woken = machine.woken
    machine.chip.end_of_interrupt(VECTOR)
    assert machine.woken > woken
    assert set(machine.chip.wants()) == set(machine.intx)


def test_what_the_other_device_of_the_line_wants_meanwhile_is_not_lost(machine):
    machine.redirect(LEVEL | VECTOR)
    machine.raise_line(0)
    machine.raise_line(1)
    machine.chip.end_of_interrupt(VECTOR)
    machine.look()
    assert machine.kvm.messages == [MESSAGE] * 2


def test_a_level_that_comes_while_masked_is_delivered_when_unmasked(machine):
    machine.redirect(LEVEL | MASKED | VECTOR)
    machine.raise_line()
    assert machine.kvm.messages == []
    machine.redirect(LEVEL | VECTOR)
    assert machine.kvm.messages == [MESSAGE]


def test_a_level_by_the_pic_falls_when_the_guest_ends_it(machine):
    for base, cascade in ((0x20, 4), (0xA0, 2)):
        machine.out(base, 0x11)
        machine.out(base + 1, 0x20, cascade, 1)
    machine.out(0x4D0, 1 << GSI)
    machine.out(0x21, 0xFF & ~(1 << GSI))
    machine.raise_line()
    machine.raise_line()
    assert machine.kvm.extints == [0x20 + GSI]
    machine.out(0x20, 0x0B)  # not an end of interrupt
    assert machine.resampled() == [False, False]
    machine.out(0x20, 0x20)
    assert machine.resampled() == [True, True]
    machine.look()  # the second one, which had not been looked at
    assert machine.kvm.extints == [0x20 + GSI] * 2
