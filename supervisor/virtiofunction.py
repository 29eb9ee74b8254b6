"""A virtio function as the supervisor has it: what its guest may write, where its BAR and kicks are mapped.

Virtio 1.2, 4.1; the layout is devproc/virtio/spec.py.  The BAR is three ranges: common configuration, read
from the device and written by way of the shadow; the device's other registers; the MSI-X structures, which
are ours.  A queue's notification register has an ioeventfd wherever the BAR is, so that a kick reaches the
device's process without an exit (Linux, Documentation/virt/kvm/api.rst, 4.59).  Left out: bus mastering and
disabling INTx, which the device itself looks at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from devproc.catalog import Virtio
from devproc.virtio import spec
from devproc.wire import Space
from supervisor.bus import Buses, Callbacks, Checked, Claim, DeviceTarget
from supervisor.msix import CONTROL, Irqfds, Msix
from supervisor.pcishadow import BAR0, COMMAND, COMMAND_MEMORY, FunctionShadow
from supervisor.virtioshadow import VirtioShadow

_WINDOW: Final = spec.CONFIG_PCI
_WINDOW_DATA: Final = range(_WINDOW + spec.CAP_PCI_CFG_DATA, _WINDOW + spec.CAP_PCI_CFG_DATA + 4)
_MSIX_CONTROL: Final = spec.CONFIG_MSIX + CONTROL


class Owner(Protocol):
    """The device process, behind its proxy."""

    @property
    def name(self) -> str: ...
    @property
    def index(self) -> int: ...
    def write(self, space: Space, offset: int, size: int, data: int) -> None: ...


class EventFds(Irqfds, Protocol):
    """The part of `kvmcore.kvm.Vm` that is needed."""

    def ioeventfd(self, eventfd: int, addr: int, size: int, *, pio: bool, deassign: bool = False) -> None: ...


class VirtioFunction:
    """One function; configuration writes and `place` come one at a time, from `PciBus`.

    Args:
        kicks: an eventfd of the device for each queue.
        is_ram: whether (gpa, size) is wholly the guest's memory.

    Threats:
        1. guest puts its BAR over something else -> it is not decoded, until one of them has moved.
        2. guest writes through the window of the PCI_CFG capability -> as if to the BAR; never to MSI-X.
        3. device says that it has moved, or writes its own registers -> nothing here listens.
    """

    def __init__(
        self,
        owner: Owner,
        virtio: Virtio,
        msix: Msix,
        kicks: tuple[int, ...],
        vm: EventFds,
        buses: Buses,
        is_ram: Callable[[int, int], bool],
    ) -> None:
        self._owner = owner
        self._msix = msix
        self._kicks = kicks
        self._vm = vm
        self._buses = buses
        self._config = FunctionShadow(spec.BAR_SIZE)
        self._placed: int | None = None
        self._common = VirtioShadow(virtio.queue_sizes, is_ram, self._forward)
        self._refused = 0

    @property
    def name(self) -> str:
        return self._owner.name

    @property
    def refused(self) -> int:
        """How many of the guest's writes the device was spared."""
        return self._refused + self._common.refused

    def assign(self, base: int) -> None:
        """What firmware does before it starts a kernel: give the BAR an address and decode it."""
        self.config_write(BAR0, 4, base)
        self.config_write(COMMAND, 2, COMMAND_MEMORY)
        self.place()

    def config_write(self, offset: int, size: int, data: int) -> None:
        """A guest write to configuration space.  Raises DeviceDied, KvmError."""
        if offset in _WINDOW_DATA:
            self._window_write(offset, size, data)
            return
        self._owner.write(Space.CONFIG, offset, size, data)
        self._config.write(offset, size, data)
        self._msix.set_control(self._config.read(_MSIX_CONTROL, 2))

    def _window_write(self, offset: int, size: int, data: int) -> None:
        """4.1.4.9: write the low bytes of `data` where the capability's bar, offset and length say."""
        bar = self._config.read(_WINDOW + spec.CAP_BAR, 1)
        at = self._config.read(_WINDOW + spec.CAP_OFFSET, 4)
        length = self._config.read(_WINDOW + spec.CAP_LENGTH, 4)
        fits = length in (1, 2, 4) and at % length == 0 and at + length <= spec.BAR_MSIX_TABLE
        if bar != 0 or not fits or offset != _WINDOW_DATA.start or size < length:
            self._refused += 1
        elif at < spec.BAR_COMMON_SIZE:
            self._common.write(at, length, data & (1 << 8 * length) - 1)
        else:
            self._forward(at, length, data & (1 << 8 * length) - 1)

    def _forward(self, offset: int, size: int, data: int) -> None:
        self._owner.write(Space.BAR0, offset, size, data)

    def place(self) -> None:
        """Have the BAR decoded where the guest has put it, if nothing else is there.  Raises KvmError."""
        base = self._config.base
        if base == self._placed:
            return
        if self._placed is not None:
            self._set_kicks(self._placed, deassign=True)
        placed = self._buses.place(self._owner.name, [] if base is None else self._claims(base))
        self._placed = base if placed else None
        if self._placed is not None:
            self._set_kicks(self._placed)

    def _claims(self, base: int) -> list[Claim]:
        index = self._owner.index
        common = Checked(index, Space.BAR0, spec.BAR_COMMON, self._common.write)
        registers = DeviceTarget(index, Space.BAR0, spec.BAR_ISR)
        ranges = (
            (spec.BAR_COMMON, spec.BAR_ISR, common),
            (spec.BAR_ISR, spec.BAR_MSIX_TABLE, registers),
            (spec.BAR_MSIX_TABLE, spec.BAR_SIZE, Callbacks(self._msix.read, self._msix.write)),
        )
        return [Claim(base + start, end - start, self._owner.name, target) for start, end, target in ranges]

    def _set_kicks(self, base: int, *, deassign: bool = False) -> None:
        for queue, eventfd in enumerate(self._kicks):
            at = base + spec.BAR_NOTIFY + spec.NOTIFY_OFF_MULTIPLIER * queue
            self._vm.ioeventfd(eventfd, at, 0, pio=False, deassign=deassign)
