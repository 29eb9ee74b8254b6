"""Each test is one tiny guest and what it must have seen."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest

from devproc import wire
from integration.guests.harness import DEVICE, DONE, LOAD, REPORT, Device, Guest
from kvmcore import layout
from kvmcore.abi import Regs
from kvmcore.exitloop import Exit, ExitKind, Route
from kvmcore.ioapic import IoApic
from kvmcore.irq import GsiRouter
from kvmcore.pic import DualPic
from supervisor.coalescing import Coalescing

pytestmark = pytest.mark.kvm

Make = Callable[..., Guest]


def finished(exit_: Exit) -> bool:
    """Whether the guest came to its end; else shows what it came to."""
    if exit_.kind is ExitKind.IO and exit_.addr == DONE:
        return True
    pytest.fail(exit_.describe())


def test_a_device_is_reached_in_every_size(guest: Make) -> None:
    device = Device(first=0x10)
    vm = guest("ports", devices=[device]).real_mode()
    assert finished(vm.run())
    assert vm.reports == [0x10, 0x1211, 0x16151413]
    vm.core.mark_dead(0)
    device.finish()
    assert device.writes == [(0, 1, 0x41), (2, 2, 0x4342), (4, 4, 0x47464544)]
    assert device.reads == [(0, 1), (2, 2), (4, 4)]


def test_string_instructions_move_every_element(guest: Make) -> None:
    device = Device(first=ord("a"))
    vm = guest("strings", devices=[device]).real_mode()
    assert finished(vm.run())
    assert bytes(vm.reports) == b"abcdefgh!i!j!"
    vm.core.mark_dead(0)
    device.finish()
    assert bytes(data for _, _, data in device.writes) == b"Hello, world!"


def test_an_access_across_a_boundary_reaches_both_owners(guest: Make) -> None:
    left, right = Device(first=0x10), Device(first=0x80)
    vm = guest("boundaries", devices=[left, right]).real_mode()
    assert finished(vm.run())
    assert vm.reports == [0x81801110, 0xFF82, 0xFFFFFFFF]
    vm.core.mark_dead(0)
    vm.core.mark_dead(1)
    left.finish()
    right.finish()
    assert left.writes == [(6, 1, 1), (7, 1, 2)]
    assert right.writes == [(0, 1, 3), (1, 1, 4)]


def test_holes_read_all_ones_and_are_counted(guest: Make) -> None:
    vm = guest("holes").real_mode()
    assert finished(vm.run())
    assert vm.reports == [0xFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF]
    assert vm.core.float_counters() == (4, 2)


def test_device_memory_is_reached_in_every_size_and_across_pages(guest: Make) -> None:
    device = Device(first=0x10)
    vm = guest("mmio", devices=[device]).real_mode()
    assert finished(vm.run())
    assert vm.reports == [0x10, 0x1211, 0x16151413, 0x1A191817, 0x1E1D1C1B]
    vm.core.mark_dead(0)
    device.finish()
    assert device.writes == [(0x10, 1, 0x11), (0x12, 2, 0x3322), (0x14, 4, 0x77665544)]
    assert device.reads[:3] == [(0x20, 1), (0x22, 2), (0x24, 4)]
    covered = [offset + n for offset, size in device.reads[3:] for n in range(size)]
    assert covered == [*range(0xFFE, 0x1002), *range(0xFFF, 0x1003)]


def test_coalesced_writes_come_in_order_and_before_a_read(guest: Make) -> None:
    device = Device()
    vm = guest("coalesced", devices=[device]).real_mode()
    page = vm.vm.coalesce_ports(DEVICE, 1)
    if page is None:
        pytest.skip("this KVM coalesces no port writes")
    vm.core.coalesce(vm.vcpus[0].fd, page, 0)
    assert finished(vm.run())
    assert [data for _, _, data in device.writes] == [n & 0xFF for n in range(400)]
    vm.core.drain()
    vm.core.mark_dead(0)
    device.finish()
    assert [data for _, _, data in device.writes[400:]] == [0x61] * 3


def test_writes_that_the_guest_waits_for_are_soon_coalesced_no_more(guest: Make) -> None:
    device = Device()
    vm = guest("late", devices=[device]).real_mode()
    coalescing = Coalescing(vm.core, vm.vm, vm.vcpus[0])
    coalescing.add(DEVICE, 0)
    if coalescing.look() is None:
        pytest.skip("this KVM coalesces no port writes")
    aside: list[bool] = []

    def waits(_: Exit) -> None:
        aside.append(vm.core.oldest_coalesced() is not None)
        for _look in range(2):
            coalescing.look()
            time.sleep(0.005)

    assert finished(vm.run(waits))
    assert aside == [True] * 3 + [False] * 4
    assert coalescing.look() is None
    vm.core.mark_dead(0)
    device.finish()
    assert [data for _, _, data in device.writes] == [7, 6, 5, 4, 3, 2, 1]


def test_coalescing_goes_on_while_an_exit_takes_the_writes_along(guest: Make) -> None:
    vm = guest("coalesced", devices=[Device()]).real_mode()
    coalescing = Coalescing(vm.core, vm.vm, vm.vcpus[0])
    coalescing.add(DEVICE, 0)
    if coalescing.look() is None:
        pytest.skip("this KVM coalesces no port writes")
    assert finished(vm.run())
    for _ in range(3):
        assert vm.core.oldest_coalesced() is not None
        assert coalescing.look() is not None  # seen for the first time
        vm.core.read(0, wire.Space.PORT, 0, 1)
        vm.vcpus[0].set_regs(Regs(rip=LOAD))
        assert finished(vm.run())
    assert coalescing.look() is not None


def test_a_table_that_changes_while_the_guest_runs_is_used_at_once(guest: Make) -> None:
    vm = guest("ports", devices=[Device()]).real_mode()

    def unplug(exit_: Exit) -> None:
        vm.core.set_routes([Route.python(REPORT, 8)], [])

    assert finished(vm.run(unplug))
    assert vm.reports == [0, 0xFFFF, 0xFFFFFFFF]  # the first report unplugs


@pytest.mark.parametrize(("gsi", "vector"), [(4, 0x24), (10, 0x2A)])
def test_an_irqfd_wakes_a_halted_processor(guest: Make, gsi: int, vector: int) -> None:
    vm = guest("interrupt", irqchip="kernel").real_mode()
    GsiRouter(vm.vm.set_gsi_routing, split=False)
    irq = os.eventfd(0, os.EFD_CLOEXEC)
    vm.vm.irqfd(irq, gsi)

    def answer(exit_: Exit) -> None:
        if len(vm.reports) <= 3:  # each report is an interrupt taken, the first: ready for one
            os.eventfd_write(irq, 1)

    assert finished(vm.run(answer))
    assert vm.reports == [1, vector, vector, vector]
    os.close(irq)


def test_the_kernel_s_timer_ticks(guest: Make) -> None:
    vm = guest("timer", irqchip="kernel").real_mode()
    GsiRouter(vm.vm.set_gsi_routing, split=False)
    assert finished(vm.run())
    assert vm.reports == [1, 2, 3]


@pytest.mark.parametrize(("irq", "vector"), [(4, 0x24), (10, 0x2A)])
def test_the_supervisor_s_pics_interrupt_through_lint0(guest: Make, irq: int, vector: int) -> None:
    vm = guest("interrupt", irqchip="split").real_mode()
    loop, vcpu = vm.loops[0], vm.vcpus[0]
    vm.core.set_routes([*vm.pio, *(Route.python(port, 2) for port in (0x20, 0xA0))], [])
    pic = DualPic()

    def answer(exit_: Exit) -> None:
        if exit_.kind is ExitKind.IO and exit_.addr == REPORT:
            pic.set_line(irq, False)
            pic.set_line(irq, len(vm.reports) <= 3)
        elif exit_.kind is ExitKind.IO and exit_.is_write:
            pic.write(exit_.addr, exit_.data)
        elif exit_.kind is ExitKind.IO:
            loop.complete(pic.read(exit_.addr))
        if pic.intr and vcpu.ready_for_interrupt_injection:
            vcpu.interrupt(pic.acknowledge())
        vcpu.request_interrupt_window(pic.intr)

    assert finished(vm.run(answer))
    assert vm.reports == [1, vector, vector, vector]


def test_the_supervisor_s_ioapic_routes_edges_and_hears_of_levels(guest: Make) -> None:
    """Pin 4, an edge, goes from its irqfd to the local APIC; pin 10, a level, is raised twice."""
    vm = guest("ioapic", irqchip="split").long_mode()
    router = GsiRouter(vm.vm.set_gsi_routing, split=True)
    ioapic = IoApic(vm.vm.signal_msi)
    vm.core.set_routes(vm.pio, [Route.python(layout.IOAPIC, layout.IOAPIC_SIZE)])
    irq = os.eventfd(0, os.EFD_CLOEXEC)
    vm.vm.irqfd(irq, 4)
    ended = []

    def answer(exit_: Exit) -> None:
        if exit_.kind is ExitKind.IOAPIC_EOI:
            ended.append((exit_.vector, ioapic.end_of_interrupt(exit_.vector)))
            if len(ended) == 1:  # the source, asked again, is not done yet
                ioapic.set_level(10, True)
        elif exit_.is_mmio and exit_.is_write:
            router.update(ioapic.write(exit_.addr - layout.IOAPIC, exit_.size, exit_.data))
        elif exit_.is_mmio:
            vm.loops[0].complete(ioapic.read(exit_.addr - layout.IOAPIC, exit_.size))
        elif exit_.data == 1:
            os.eventfd_write(irq, 1)
        elif exit_.data == 0x44:
            ioapic.set_level(10, True)

    assert finished(vm.run(answer))
    assert vm.reports == [0x170011, 1, 0x44, 0x4A, 0x4A]
    assert ended == [(0x4A, [10]), (0x4A, [10])]
    os.close(irq)


def test_a_halt_without_interrupt_chip_comes_back(guest: Make) -> None:
    vm = guest("halt").real_mode()
    assert vm.run().kind is ExitKind.HLT
    assert finished(vm.run())


def test_a_triple_fault_is_a_shutdown(guest: Make) -> None:
    assert guest("triple").real_mode().run().kind is ExitKind.SHUTDOWN


def test_a_guest_that_never_exits_can_be_stopped(guest: Make) -> None:
    vm = guest("spin").real_mode()
    reported, kinds = threading.Event(), []

    def run() -> None:
        kinds.append(vm.run(lambda exit_: reported.set()).kind)

    thread = threading.Thread(target=run)
    thread.start()
    assert reported.wait(10)
    vm.loops[0].stop()
    thread.join(10)
    assert kinds == [ExitKind.STOPPED]


def test_a_halted_processor_can_be_stopped(guest: Make) -> None:
    vm = guest("interrupt", irqchip="kernel").real_mode()
    reported, kinds = threading.Event(), []

    def run() -> None:
        kinds.append(vm.run(lambda exit_: reported.set()).kind)

    thread = threading.Thread(target=run)
    thread.start()
    assert reported.wait(10)
    vm.loops[0].stop()
    thread.join(10)
    assert kinds == [ExitKind.STOPPED]


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_the_64_bit_boot_protocol_is_kept(guest: Make, irqchip: str) -> None:
    vm = guest("boot64", irqchip=irqchip, cpus=2).long_mode()
    assert finished(vm.run())
    zero_page, stack, cs, ds, ss, rflags, cr0, cr4, efer, *rest = vm.reports
    assert (zero_page, stack) == (layout.ZERO_PAGE, layout.BOOT_STACK)
    assert (cs, ds, ss) == (0x10, 0x18, 0x18)
    assert not rflags & 1 << 9
    assert cr0 & 0x80000001 == 0x80000001
    assert cr4 & 1 << 5
    assert efer & 0x500 == 0x500
    memory, apic_id, hypervisor, processors, fcw = rest
    assert memory == 0x5AA5
    assert (apic_id, hypervisor, processors) == (0, 1, 2)
    assert fcw == 0x37F


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_the_first_processor_starts_the_second(guest: Make, irqchip: str) -> None:
    vm = guest("processors", irqchip=irqchip, cpus=2).long_mode()
    kinds = []
    second = threading.Thread(target=lambda: kinds.append(vm.run(number=1).kind))
    second.start()
    assert finished(vm.run())
    vm.loops[1].stop()
    second.join(10)
    assert vm.reports == [1]
    assert kinds == [ExitKind.STOPPED]


def test_a_device_that_dies_in_an_access_ends_the_run_by_its_index(guest: Make) -> None:
    device = Device()
    vm = guest("ports", devices=[device]).real_mode()
    vm.core.mark_dead(0)
    exit_ = vm.run()
    assert (exit_.kind, exit_.index, exit_.cause) == (ExitKind.DEVICE_DEAD, 0, "it was given up")
    assert vm.reports == []
