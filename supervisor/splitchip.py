"""The interrupt chips of `--irqchip split`: IOAPIC and PICs here, local APICs in the kernel.

They are in the supervisor because they are interrupt routing: what the guest writes to the IOAPIC becomes
KVM's routing table, and an edge then goes from a device's eventfd to a local APIC without coming here.
The run loop watches two kinds of lines instead: one that the guest takes through the PIC (its IOAPIC pin
masked, its PIC input not), which is injected as an ExtINT on vCPU 0, and the levels of PCI, which fall when
the guest ends the interrupt, and whose devices are then asked to look again, as KVM does with a resampling
irqfd (Linux, Documentation/virt/kvm/api.rst, 4.16 KVM_INTERRUPT, 4.75 KVM_IRQFD, 7.5 KVM_CAP_SPLIT_IRQCHIP).
Left out: levels through a PIC in automatic EOI mode, which never fall.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable, Sequence

from kvmcore import layout
from kvmcore.ioapic import IoApic
from kvmcore.irq import GsiRouter
from kvmcore.kvm import Vcpu, Vm
from kvmcore.pic import DualPic
from supervisor import machine
from supervisor.bus import Buses, Callbacks, Claim

_PIC_IRQS = 16


class SplitChip:
    """IOAPIC, PICs, and the wires of the devices' interrupts to them.

    Args:
        bsp: vCPU 0, whose LINT0 is the PICs' INTR.

    Attributes:
        wake: makes the run loop look at `wants` again.
        interrupt_bsp: makes vCPU 0 leave the guest and call `inject`.
    """

    def __init__(self, vm: Vm, router: GsiRouter, bsp: Vcpu, buses: Buses) -> None:
        self.wake: Callable[[], None] = lambda: None
        self.interrupt_bsp: Callable[[], None] = lambda: None
        self._vm = vm
        self._router = router
        self._bsp = bsp
        self._ioapic = IoApic(vm.signal_msi)
        self._pic = DualPic()
        self._lock = threading.Lock()
        self._wires: dict[int, int] = {}  # eventfd -> GSI, of edges
        self._levels: dict[int, tuple[int, int]] = {}  # eventfd -> GSI, eventfd to resample
        self._high: set[int] = set()  # GSIs of levels that have not been ended
        self._rising: set[int] = set()  # those of them that no chip has seen yet
        self._by_pic: set[int] = set()  # eventfds that go to the PIC now
        buses.mmio.insert(
            Claim(
                layout.IOAPIC, layout.IOAPIC_SIZE, "ioapic", Callbacks(self._ioapic_read, self._ioapic_write)
            )
        )
        for base in (*machine.PIC_BASES, machine.ELCR_BASE):
            at = self._pic_ports(base)
            buses.io.insert(Claim(base, 2, "pic", at))

    def connect(self, eventfd: int, gsi: int, resample: int | None = None) -> None:
        """An edge on `eventfd` is an edge on `gsi`, or with `resample` raises it until the guest's EOI."""
        with self._lock:
            if resample is not None:
                self._levels[eventfd] = gsi, resample
                return
            self._wires[eventfd] = gsi
            self._vm.irqfd(eventfd, gsi)

    # -- the guest's accesses, on vCPU threads

    def _ioapic_read(self, offset: int, size: int) -> int:
        with self._lock:
            return self._ioapic.read(offset, size)

    def _ioapic_write(self, offset: int, size: int, data: int) -> None:
        with self._lock:
            changes = self._ioapic.write(offset, size, data)
            if changes:
                self._router.update(changes)
                self._rewire()

    def _pic_ports(self, base: int) -> Callbacks:
        """Two byte-wide ports; a wider access is several bytes, as on the ISA bus."""

        def read(offset: int, size: int) -> int:
            with self._lock:
                return sum(self._pic.read(base + offset + i) << 8 * i for i in range(size))

        def write(offset: int, size: int, data: int) -> None:
            with self._lock:
                serving = self._pic.in_service
                for i in range(size):
                    self._pic.write(base + offset + i, data >> 8 * i & 0xFF)
                ended = serving & ~self._pic.in_service
                self._lower([gsi for gsi in self._high if ended >> gsi & 1])
                self._rewire()
                pending = self._pic.intr
            if pending:
                self.interrupt_bsp()

        return Callbacks(read, write)

    def end_of_interrupt(self, vector: int) -> None:
        """KVM_EXIT_IOAPIC_EOI."""
        with self._lock:
            self._lower(self._ioapic.end_of_interrupt(vector))

    def inject(self) -> None:
        """On vCPU 0's thread, outside the guest: give it what the PICs ask for, or ask KVM when it can be.

        Levels rise here too, because the main thread may not tell KVM to deliver anything.
        """
        with self._lock:
            for gsi in self._rising:
                self._drive(gsi, True)
            self._rising.clear()
            if self._pic.intr and self._bsp.ready_for_interrupt_injection:
                self._bsp.interrupt(self._pic.acknowledge())
            self._bsp.request_interrupt_window(self._pic.intr)

    # -- the lines that the run loop watches

    def _lower(self, gsis: Sequence[int]) -> None:
        """The guest has ended these: have their devices look whether they still want attention."""
        for gsi in gsis:
            self._high.discard(gsi)
            self._drive(gsi, False)
        for gsi, resample in self._levels.values():
            if gsi in gsis:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_write(resample, 1)
        if gsis:
            self.wake()

    def _drive(self, gsi: int, level: bool) -> None:
        self._ioapic.set_level(gsi, level)
        if gsi < _PIC_IRQS:
            self._pic.set_line(gsi, level)

    def _rewire(self) -> None:
        """Give each line to KVM or to the PIC, as the guest's masks now say."""
        changed = False
        for eventfd, gsi in self._wires.items():
            by_pic = gsi < _PIC_IRQS and self._ioapic.route(gsi) is None and not self._pic.masked(gsi)
            if by_pic != (eventfd in self._by_pic):
                self._vm.irqfd(eventfd, gsi, deassign=by_pic)
                self._by_pic ^= {eventfd}
                changed = True
        if changed:
            self.wake()

    def wants(self) -> dict[int, int]:
        """Descriptor -> poll events, for the run loop; a level that is high already has nothing to say."""
        with self._lock:
            low = (fd for fd, (gsi, _) in self._levels.items() if gsi not in self._high)
            return dict.fromkeys((*self._by_pic, *low), select.POLLIN)

    def ready(self, fd: int, got: int) -> None:
        """An edge for the PIC, or a device that raises its level."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(fd)
        with self._lock:
            if fd in self._levels:
                gsi, _ = self._levels[fd]
                self._high.add(gsi)
                self._rising.add(gsi)
                pending = True
            elif fd in self._by_pic:
                gsi = self._wires[fd]
                self._pic.set_line(gsi, False)
                self._pic.set_line(gsi, True)
                pending = self._pic.intr
            else:
                return
        if pending:
            self.interrupt_bsp()
