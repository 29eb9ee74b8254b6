"""The transport that every virtio device model shares: a PCI function with one BAR (virtio 1.2, 2 and 4.1).

The supervisor holds what decides where things go (MSI-X table, decoding of the BAR) and lets through only the
writes of queue registers that the specification allows; what is checked there is checked here again.  Left
out: legacy and transitional devices, VIRTIO_F_RING_RESET, VIRTIO_F_NOTIFICATION_DATA,
VIRTIO_F_ACCESS_PLATFORM; the MSI-X table and pending bits and writes through VIRTIO_PCI_CAP_PCI_CFG, which
are the supervisor's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, ClassVar, Final

from devproc.catalog import Virtio
from devproc.ports import Kick, Say, Signal
from devproc.record import record, replace
from devproc.regs import Model, Register, Table
from devproc.state import U8, U16, U64, Length, Range
from devproc.virtio import spec
from devproc.virtio.chain import Chain, ChainError, Queue
from devproc.virtio.packed import PackedQueue
from devproc.virtio.split import split_queue
from devproc.wire import Space
from kvmcore.memory import GuestMemory

BATCH: Final = 64
"""Chains of one queue that are taken in a row before accesses and other queues get their turn."""

_PCICMD_MASTER, _PCICMD_INTX_OFF = 0x0004, 0x0400
_PCISTS_INTX, _PCISTS_CAPABILITIES = 0x0008, 0x0010
MSIX_ENABLE: Final = 0x8000
_DRIVER_BITS: Final = spec.ACKNOWLEDGE | spec.DRIVER | spec.DRIVER_OK | spec.FEATURES_OK | spec.FAILED
_QUEUES_MAX: Final = 64
_LOW: Final = 0xFFFF_FFFF


class _Setup:
    """What the driver has written of one queue; `areas`: descriptor, driver, device."""

    def __init__(
        self,
        size: int,
        vector: int = spec.MSI_NO_VECTOR,
        enabled: bool = False,
        areas: Sequence[int] = (0, 0, 0),
    ) -> None:
        self.size = size
        self.vector = vector
        self.enabled = enabled
        self.areas = [*areas]


@record
class QueueState:
    """`position` is None while there is no queue: before DRIVER_OK, or not enabled."""

    size: U16
    vector: U16
    enabled: bool
    desc: U64
    driver: U64
    device: U64
    position: U16 | None


@record
class TransportState:
    """The part of a device's state that all have; a model's own state dataclass has it as a field."""

    registers: Annotated[tuple[U64, ...], Length(0, 512)]
    status: U8
    features: U64
    vector: U16
    generation: U8
    isr: Annotated[int, Range(0, spec.ISR_QUEUE | spec.ISR_CONFIG)]
    queues: Annotated[tuple[QueueState, ...], Length(0, _QUEUES_MAX)]


def virtio_tables(virtio: Virtio, config: Sequence[Register] = ()) -> tuple[Table, ...]:
    """The registers of a function: its configuration space and BAR 0.

    Args:
        config: the device configuration, offsets from its start; what the device changes itself is stored.
    """
    return (
        Table(Space.CONFIG, 4096, tuple(_config_space(virtio)), hole=0),
        Table(
            Space.BAR0,
            spec.BAR_MSIX_TABLE,
            (
                *_COMMON,
                Register("isr_status", spec.BAR_ISR, "RO", "interrupt causes; reading clears", "4.1.4.5"),
                *(replace(r, offset=spec.BAR_DEVICE + r.offset) for r in config),
                *(
                    Register(
                        f"queue{n}_notify",
                        spec.BAR_NOTIFY + spec.NOTIFY_OFF_MULTIPLIER * n,
                        "WO",
                        "where no ioeventfd takes it",
                        "4.1.4.4",
                        size=2,
                        mask=0xFFFF,
                        via="notify",
                    )
                    for n in range(len(virtio.queue_sizes))
                ),
            ),
        ),
    )


def _register(name: str, at: int, meaning: str, size: int, section: str = "4.1.4.3") -> Register:
    """A register of the common configuration that is not merely stored."""
    return Register(name, spec.BAR_COMMON + at, "RW", meaning, section, size=size, mask=(1 << 8 * size) - 1)


def _constant(
    name: str, at: int, value: int, meaning: str, size: int = 1, section: str = "6.2.1"
) -> Register:
    return Register(name, at, "RO", meaning, section, size=size, reset=value, stored=True)


_COMMON: Final = (
    replace(_register("device_feature_select", spec.DEVICE_FEATURE_SELECT, "which 32 bits", 4), stored=True),
    replace(_register("device_feature", spec.DEVICE_FEATURE, "features offered", 4), access="RO"),
    replace(_register("driver_feature_select", spec.DRIVER_FEATURE_SELECT, "which 32 bits", 4), stored=True),
    _register("driver_feature", spec.DRIVER_FEATURE, "features accepted", 4),
    _register("config_msix_vector", spec.CONFIG_MSIX_VECTOR, "vector for configuration changes", 2),
    replace(_register("num_queues", spec.NUM_QUEUES, "queues there are", 2), access="RO"),
    _register("device_status", spec.DEVICE_STATUS, "device status; 0 resets", 1, "2.1"),
    replace(_register("config_generation", spec.CONFIG_GENERATION, "changes with it", 1), access="RO"),
    replace(_register("queue_select", spec.QUEUE_SELECT, "which queue the following mean", 2), stored=True),
    _register("queue_size", spec.QUEUE_SIZE, "entries; 0: there is no such queue", 2),
    _register("queue_msix_vector", spec.QUEUE_MSIX_VECTOR, "vector for used buffers", 2),
    _register("queue_enable", spec.QUEUE_ENABLE, "1 once the queue is set up", 2),
    replace(_register("queue_notify_off", spec.QUEUE_NOTIFY_OFF, "where to notify", 2), access="RO"),
    *(
        replace(_register(f"{name}_{half}", at + 4 * high, f"{meaning}, {half} half", 4), via="queue_area")
        for name, at, meaning in (
            ("queue_desc", spec.QUEUE_DESC, "descriptor area"),
            ("queue_driver", spec.QUEUE_DRIVER, "driver area"),
            ("queue_device", spec.QUEUE_DEVICE, "device area"),
        )
        for high, half in enumerate(("low", "high"))
    ),
    _constant("queue_notify_data", spec.QUEUE_NOTIFY_DATA, 0, "not offered", 2, "4.1.4.3"),
    _constant("queue_reset", spec.QUEUE_RESET, 0, "not offered", 2, "4.1.4.3"),
)


def _config_space(virtio: Virtio) -> Iterator[Register]:
    """Configuration space; sections 6 are of the PCI Local Bus Specification 3.0."""
    yield _constant("VID", 0x00, spec.PCI_VENDOR, "vendor", 2)
    yield _constant("DID", 0x02, spec.PCI_DEVICE + virtio.device_id, "device: virtio, modern", 2)
    command = 0x0002 | _PCICMD_MASTER | _PCICMD_INTX_OFF
    yield Register(
        "PCICMD", 0x04, "RW", "command: memory, master, INTx", "6.2.2", size=2, mask=command, stored=True
    )
    yield Register("PCISTS", 0x06, "RO", "status", "6.2.3", size=2, reset=_PCISTS_CAPABILITIES)
    yield _constant("RID", 0x08, spec.PCI_REVISION, "revision")
    for n, name in enumerate(("CLASSC_IF", "CLASSC_SUB", "CLASSC_BASE")):
        yield _constant(name, 0x09 + n, virtio.class_code >> 8 * n & 0xFF, "class code")
    yield Register("CLS", 0x0C, "RW", "cache line size", "6.2.4", stored=True)
    yield _constant("HEADT", 0x0E, 0, "header type 0, one function")
    yield Register(
        "BAR0", 0x10, "RW", "32-bit memory", "6.2.5.1", size=4, mask=-spec.BAR_SIZE & _LOW, stored=True
    )
    yield _constant("SVID", 0x2C, spec.PCI_VENDOR, "subsystem vendor", 2, "6.2.4")
    yield _constant("SID", 0x2E, spec.PCI_SUBSYSTEM, "subsystem", 2, "6.2.4")
    yield _constant("CAP", 0x34, spec.CONFIG_MSIX, "first capability", section="6.7")
    yield Register("INTL", 0x3C, "RW", "interrupt line", "6.2.4", stored=True)
    yield _constant("INTP", 0x3D, 1, "interrupt pin: INTA", section="6.2.4")

    at = spec.CONFIG_MSIX
    yield _constant("MSIX_ID", at, 0x11, "capability: MSI-X", section="6.8.2.1")
    yield _constant("MSIX_NEXT", at + 1, spec.CONFIG_COMMON, "next capability", section="6.8.2.2")
    yield Register(
        "MSIX_CONTROL", at + 2, "RW", "enable, function mask, table size less 1", "6.8.2.3",
        size=2, reset=virtio.vectors - 1, mask=0xC000, stored=True,
    )  # fmt: skip
    yield _constant("MSIX_TABLE", at + 4, spec.BAR_MSIX_TABLE, "table: offset in BAR 0", 4, "6.8.2.4")
    yield _constant("MSIX_PBA", at + 8, spec.BAR_MSIX_PBA, "pending bits: offset in BAR 0", 4, "6.8.2.5")

    for name, at, after, size, cfg_type, offset, length in (
        ("COMMON", spec.CONFIG_COMMON, spec.CONFIG_NOTIFY, spec.CAP_SIZE, spec.CAP_COMMON_CFG,
         spec.BAR_COMMON, spec.COMMON_CFG_SIZE),
        ("NOTIFY", spec.CONFIG_NOTIFY, spec.CONFIG_ISR, spec.CAP_NOTIFY_SIZE, spec.CAP_NOTIFY_CFG,
         spec.BAR_NOTIFY, spec.BAR_NOTIFY_SIZE),
        ("ISR", spec.CONFIG_ISR, spec.CONFIG_DEVICE, spec.CAP_SIZE, spec.CAP_ISR_CFG, spec.BAR_ISR, 1),
        ("DEVICE", spec.CONFIG_DEVICE, spec.CONFIG_PCI, spec.CAP_SIZE, spec.CAP_DEVICE_CFG,
         spec.BAR_DEVICE, spec.BAR_DEVICE_SIZE),
    ):  # fmt: skip
        yield from _capability(name, at, after, size, cfg_type)
        yield _constant(f"{name}_BAR", at + spec.CAP_BAR, 0, "bar", section="4.1.4")
        yield _constant(f"{name}_OFFSET", at + spec.CAP_OFFSET, offset, "offset in BAR 0", 4, "4.1.4")
        yield _constant(f"{name}_LENGTH", at + spec.CAP_LENGTH, length, "length in bytes", 4, "4.1.4")
    at = spec.CONFIG_NOTIFY + spec.CAP_NOTIFY_OFF_MULTIPLIER
    yield _constant(
        "NOTIFY_MULTIPLIER", at, spec.NOTIFY_OFF_MULTIPLIER, "notify_off_multiplier", 4, "4.1.4.4"
    )

    at = spec.CONFIG_PCI
    yield from _capability("PCI", at, 0, spec.CAP_PCI_SIZE, spec.CAP_PCI_CFG)
    yield Register("PCI_BAR", at + spec.CAP_BAR, "RW", "window: bar", "4.1.4.9", stored=True)
    for name, where, meaning in (
        ("OFFSET", spec.CAP_OFFSET, "offset"),
        ("LENGTH", spec.CAP_LENGTH, "length"),
    ):
        yield Register(
            f"PCI_{name}", at + where, "RW", f"window: {meaning}", "4.1.4.9", size=4, mask=_LOW, stored=True
        )
    yield Register(
        "pci_cfg_data",
        at + spec.CAP_PCI_CFG_DATA,
        "RO",
        "window: what is there",
        "4.1.4.9",
        size=4,
        mask=_LOW,
    )


def _capability(name: str, at: int, after: int, size: int, cfg_type: int) -> Iterator[Register]:
    yield _constant(f"{name}_VNDR", at, 0x09, "capability: vendor specific", section="4.1.4")
    yield _constant(f"{name}_NEXT", at + 1, after, "next capability", section="4.1.4")
    yield _constant(f"{name}_LEN", at + spec.CAP_LEN, size, "length of this capability", section="4.1.4")
    yield _constant(f"{name}_TYPE", at + spec.CAP_CFG_TYPE, cfg_type, "cfg_type", section="4.1.4")


class VirtioDevice(Model):
    """One function; a model adds its registers, its features and what it does with its queues.

    A model sets `VIRTIO` and `TABLES` (by `virtio_tables`), and overrides `on_queue` and, where it has state
    of its own, `on_activate` and `on_reset`.

    Args:
        features: what the model offers beyond the transport's own.
        withheld: what of the transport's own it does not offer.

    Ports:
        memory: guest memory.
        irq: MSI-X vectors.
        intx: raises INTA, which stays up until the guest acknowledges it.
        resample: the guest has acknowledged INTA.
        kick: the driver's notifications by queue.
        log: a line for the user.

    Threats:
        1. queue_select names no queue → its registers read as 0, and as no vector; writes vanish, counted.
        2. The device configuration changes under a driver that reads it → config_generation changes with it.
        3. A reset at any time → everything in flight is dropped, and device_status reads 0 at once.
        4. device_status is written with bits taken back, or DRIVER_OK before FEATURES_OK → refused, counted.
        5. A feature is accepted that was not offered, or VERSION_1 is not → FEATURES_OK is not taken.
        6. A queue is notified that is not enabled, before DRIVER_OK, after a failure, or with bus mastering
            off → nothing happens, counted.
        7. A queue's size or address is changed once it is enabled, or a size is not allowed → refused,
            counted.
        8. A vector that is not there is chosen → it reads back as VIRTIO_MSI_NO_VECTOR.
        9. The common configuration is accessed with a wrong width → a read gives the bytes there are, a write
           to what is not merely stored vanishes, counted.
        10. A queue whose areas are not RAM, or whose ring is nonsense → DEVICE_NEEDS_RESET; only that device
            stops, until it is reset.
        11. More is made available than can be served in a while → BATCH chains at a time; accesses and other
            queues get their turn between.
        12. The window of VIRTIO_PCI_CAP_PCI_CFG looks outside the device's registers → all ones.
        13. INTA is acknowledged with its cause still there → it is raised again.
    """

    VIRTIO: ClassVar[Virtio]
    TRANSPORT: ClassVar[int] = spec.F_VERSION_1 | spec.F_INDIRECT_DESC | spec.F_EVENT_IDX | spec.F_RING_PACKED
    """The features that this class sees to."""

    def __init__(
        self,
        *,
        memory: GuestMemory,
        irq: Sequence[Signal],
        intx: Signal,
        resample: Kick,
        kick: Sequence[Kick],
        log: Say,
        features: int = 0,
        withheld: int = 0,
    ) -> None:
        super().__init__()
        self.memory: Final = memory
        self.features = 0  # what the driver accepts; negotiated once FEATURES_OK is set
        self.queues: list[Queue | None] = [None] * len(kick)
        self.make_split: Callable[..., Queue] = split_queue  # the fuzzer has the one in Python instead
        self._irq: Final = irq
        self._intx: Final = intx
        self._log: Final = log
        self._offered: Final = features | self.TRANSPORT & ~withheld
        self._status = 0
        self._vector = spec.MSI_NO_VECTOR
        self._generation = 0
        self._config_read = True  # since the generation changed last
        self._isr = 0
        self._setups = self._fresh()
        self._due: dict[int, int] = {}  # queue: when to go on with it without a kick
        self._counts = {"interrupts": 0, "refused_writes": 0, "idle_kicks": 0, "failures": 0}
        resample.listen(self._resample)
        for index, port in enumerate(kick):
            port.listen(partial(self.on_kick, index))

    # -- for the model

    @property
    def active(self) -> bool:
        """Whether the device may look at its queues; a function that is no bus master reaches no memory."""
        ok = self._status & (spec.DRIVER_OK | spec.DEVICE_NEEDS_RESET) == spec.DRIVER_OK
        return ok and bool(self.stored["PCICMD"] & _PCICMD_MASTER)

    def on_activate(self) -> None:
        """DRIVER_OK: `features` is what was negotiated, `queues` those that are enabled.

        `on_queue` follows for each of them.
        """

    def on_reset(self) -> None:
        """Drop everything in flight; the queues are gone already."""

    def on_queue(self, index: int) -> None:
        """The driver has notified this queue, or it is time to go on with it."""

    def chains(self, index: int, limit: int = BATCH) -> Iterator[Chain]:
        """The chains of a queue, for `on_queue`: after `limit` of them it will be called again."""
        for _ in range(limit):
            chain = self.pop(index)
            if chain is None:
                return
            yield chain
        self.go_on(index)

    def pop(self, index: int) -> Chain | None:
        """The queue's next chain; None while there is none, and then the driver will notify."""
        queue = self.queues[index]
        if queue is None or not self.active:
            return None
        try:
            return queue.pop()
        except ChainError as e:
            self.fail(f"queue {index}: {e}")
            return None

    def go_on(self, index: int, at_ns: int = 0) -> None:
        """Have `on_queue` called without a kick, when the clock says `at_ns`, after accesses that wait."""
        self._due[index] = at_ns

    def push(self, index: int, chain: Chain, written: int) -> None:
        """Give `chain` back with its first `written` bytes filled in; `notify` must follow in the end."""
        queue = self.queues[index]
        if queue is not None:  # the device may have failed since
            queue.push(chain, written)

    def notify(self, index: int) -> None:
        """Interrupt the driver if it wants to know of what was pushed since this was last called."""
        queue = self.queues[index]
        if queue is not None and queue.wants_interrupt():
            self._interrupt(self._setups[index].vector, spec.ISR_QUEUE)

    def config_changed(self) -> None:
        """The device configuration is another one: tell the driver."""
        if self._config_read:  # so that 256 changes between two reads do not look like none (4.1.4.3.1)
            self._generation = (self._generation + 1) & 0xFF
            self._config_read = False
        if self._status & spec.DRIVER_OK:
            self._interrupt(self._vector, spec.ISR_CONFIG)

    def fail(self, why: str) -> None:
        """Stop until the driver resets the device; the first reason is logged."""
        if not self._counts["failures"]:
            self._log(f"needs a reset: {why}")
        self._counts["failures"] += 1
        self._status |= spec.DEVICE_NEEDS_RESET
        self._drop_queues()
        if self._status & spec.DRIVER_OK:
            self._interrupt(self._vector, spec.ISR_CONFIG)

    # -- the loop's side

    def on_kick(self, index: int) -> None:
        """The driver has notified the queue."""
        if self.active and self.queues[index] is not None:
            self.on_queue(index)
        else:
            self._counts["idle_kicks"] += 1

    @property
    def deadline_ns(self) -> int | None:
        return min(self._due.values()) if self._due else None

    def on_deadline(self, now_ns: int) -> None:
        for index in [index for index, at_ns in self._due.items() if at_ns <= now_ns]:
            if self._due.pop(index, None) is not None and self.active:
                self.on_queue(index)

    def read(self, space: int, offset: int, size: int) -> int:
        if space == Space.BAR0 and spec.BAR_DEVICE <= offset < spec.BAR_NOTIFY:
            self._config_read = True
        return super().read(space, offset, size)

    # -- PCI configuration space

    def read_PCISTS(self) -> int:
        return _PCISTS_CAPABILITIES | (_PCISTS_INTX if self._isr and not self._msix else 0)

    def write_PCICMD(self, _data: int) -> None:
        self._resample()
        if self.active:
            self._go_on_with_all()

    def read_pci_cfg_data(self) -> int:
        bar, offset, size = (self.stored[f"PCI_{name}"] for name in ("BAR", "OFFSET", "LENGTH"))
        if bar == 0 and size in (1, 2, 4) and not offset % size:
            return self.read(Space.BAR0, offset, size)
        return _LOW

    # -- common configuration

    def read_device_feature(self) -> int:
        select = self.stored["device_feature_select"]
        return self._offered >> 32 * select & _LOW if select < 2 else 0

    def read_driver_feature(self) -> int:
        select = self.stored["driver_feature_select"]
        return self.features >> 32 * select & _LOW if select < 2 else 0

    def write_driver_feature(self, data: int) -> None:
        select = self.stored["driver_feature_select"]
        if select > 1 or self._status & spec.FEATURES_OK:
            self._refuse()
            return
        self.features = self.features & ~(_LOW << 32 * select) | data << 32 * select

    def read_config_msix_vector(self) -> int:
        return self._vector

    def write_config_msix_vector(self, data: int) -> None:
        self._vector = self._checked_vector(data)

    def read_num_queues(self) -> int:
        return len(self.queues)

    def read_device_status(self) -> int:
        return self._status

    def write_device_status(self, data: int) -> None:
        if data == 0:
            self._reset()
            return
        before = self._status & _DRIVER_BITS
        data &= _DRIVER_BITS
        if before & ~data:  # 2.1.1: the driver must not clear a bit
            self._refuse()
            return
        if data & ~before & spec.FEATURES_OK and not self._acceptable(self.features):
            data &= ~spec.FEATURES_OK  # 3.1.1: the driver reads it back
        if data & ~before & spec.DRIVER_OK and not data & spec.FEATURES_OK:
            data &= ~spec.DRIVER_OK
            self._refuse()
        self._status |= data
        if data & ~before & spec.DRIVER_OK:
            self._activate()

    def read_config_generation(self) -> int:
        return self._generation

    def read_queue_size(self) -> int:
        return 0 if (setup := self._selected) is None else setup.size

    def write_queue_size(self, data: int) -> None:
        setup = self._settable()
        if setup is not None and self._allows_size(self.stored["queue_select"], data):
            setup.size = data
        else:
            self._refuse()

    def read_queue_msix_vector(self) -> int:
        return spec.MSI_NO_VECTOR if (setup := self._selected) is None else setup.vector

    def write_queue_msix_vector(self, data: int) -> None:
        if (setup := self._selected) is None:
            self._refuse()
        else:
            setup.vector = self._checked_vector(data)

    def read_queue_enable(self) -> int:
        return 0 if (setup := self._selected) is None else int(setup.enabled)

    def write_queue_enable(self, data: int) -> None:
        setup = self._settable()
        if setup is None or data != 1:
            self._refuse()
        else:
            setup.enabled = True

    def read_queue_notify_off(self) -> int:
        return 0 if self._selected is None else self.stored["queue_select"]

    def read_queue_area(self, offset: int) -> int:
        area, high = divmod(offset - spec.QUEUE_DESC, 8)
        return 0 if (setup := self._selected) is None else setup.areas[area] >> 8 * high & _LOW

    def write_queue_area(self, offset: int, data: int) -> None:
        area, high = divmod(offset - spec.QUEUE_DESC, 8)
        if (setup := self._settable()) is None:
            self._refuse()
        else:
            setup.areas[area] = setup.areas[area] & ~(_LOW << 8 * high) | data << 8 * high

    # -- the rest of BAR 0

    def read_isr_status(self) -> int:
        isr, self._isr = self._isr, 0
        return isr

    def write_notify(self, offset: int, _data: int) -> None:
        self.on_kick((offset - spec.BAR_NOTIFY) // spec.NOTIFY_OFF_MULTIPLIER)

    # -- inside

    @property
    def _selected(self) -> _Setup | None:
        select = self.stored["queue_select"]
        return self._setups[select] if select < len(self._setups) else None

    def _settable(self) -> _Setup | None:
        """The selected queue, while its driver may still set it up."""
        setup = self._selected
        if setup is None or setup.enabled or self._status & spec.DRIVER_OK:
            return None
        return setup

    def _fresh(self) -> list[_Setup]:
        return [_Setup(size) for size in self.VIRTIO.queue_sizes]

    def _allows_size(self, index: int, size: int) -> bool:
        power_of_2 = not size & (size - 1)
        packed = self._status & spec.FEATURES_OK and self.features & spec.F_RING_PACKED
        return 0 < size <= self.VIRTIO.queue_sizes[index] and bool(power_of_2 or packed)

    def _refuse(self) -> None:
        self._counts["refused_writes"] += 1

    def _checked_vector(self, vector: int) -> int:
        return vector if vector < len(self._irq) else spec.MSI_NO_VECTOR

    def _acceptable(self, features: int) -> bool:
        return not features & ~self._offered and bool(features & spec.F_VERSION_1)

    def _activate(self) -> None:
        try:
            for index, setup in enumerate(self._setups):
                if setup.enabled:
                    self.queues[index] = self._make_queue(self.features, setup)
        except ChainError as e:
            self.fail(f"queue {index}: {e}")
            return
        self.on_activate()
        self._go_on_with_all()

    def _make_queue(self, features: int, setup: _Setup, position: int | None = None) -> Queue:
        """Raises ChainError."""
        kind: Callable[..., Queue] = PackedQueue if features & spec.F_RING_PACKED else self.make_split
        start = () if position is None else (position,)
        desc, driver, device = setup.areas
        return kind(self.memory, features, setup.size, desc, driver, device, *start)

    def _go_on_with_all(self) -> None:
        """The driver may have made chains available before anyone listened."""
        self._due |= {index: 0 for index, queue in enumerate(self.queues) if queue is not None}

    def _drop_queues(self) -> None:
        self.queues = [None] * len(self.queues)
        self._due.clear()

    def _reset(self) -> None:
        self._status = self.features = self._isr = 0
        self._vector = spec.MSI_NO_VECTOR
        self._setups = self._fresh()
        self._drop_queues()
        self.on_reset()

    @property
    def _msix(self) -> bool:
        return bool(self.stored["MSIX_CONTROL"] & MSIX_ENABLE)

    def _interrupt(self, vector: int, cause: int) -> None:
        if cause == spec.ISR_CONFIG or not self._msix:  # 4.1.4.5.1
            self._isr |= cause
        if not self._msix:
            self._resample()
        elif vector != spec.MSI_NO_VECTOR:
            self._irq[vector]()
        else:
            return
        self._counts["interrupts"] += 1

    def _resample(self) -> None:
        """Raise INTA if there is a cause for it."""
        if self._isr and not self._msix and not self.stored["PCICMD"] & _PCICMD_INTX_OFF:
            self._intx()

    # -- state

    def save_transport(self) -> TransportState:
        """For the model's `save`; no chain may be out."""
        return TransportState(
            registers=self.stored_values(),
            status=self._status,
            features=self.features,
            vector=self._vector,
            generation=self._generation,
            isr=self._isr,
            queues=tuple(
                QueueState(
                    s.size,
                    s.vector,
                    s.enabled,
                    desc=s.areas[0],
                    driver=s.areas[1],
                    device=s.areas[2],
                    position=None if queue is None else queue.position,
                )
                for s, queue in zip(self._setups, self.queues, strict=True)
            ),
        )

    def restore_transport(self, s: TransportState) -> None:
        """For the model's `restore`, before it takes anything else.

        Raises:
            ValueError: not a state that a guest can have brought about; nothing is changed.
        """
        self.check_stored(s.registers)
        if s.status & spec.FEATURES_OK and not self._acceptable(s.features):
            raise ValueError(f"features {s.features:#x}, offered are {self._offered:#x}")
        if s.status & spec.DRIVER_OK and not s.status & spec.FEATURES_OK:
            raise ValueError(f"status {s.status:#x}")
        for vector in (s.vector, *(q.vector for q in s.queues)):
            if self._checked_vector(vector) != vector:
                raise ValueError(f"vector {vector} of {len(self._irq)}")
        for q, most in zip(s.queues, self.VIRTIO.queue_sizes, strict=True):
            if not 0 < q.size <= most:
                raise ValueError(f"queue of {q.size}, at most {most}")
            if q.position is not None and not (q.enabled and s.status & spec.DRIVER_OK):
                raise ValueError(f"position {q.position} in a queue that is not in use")
            if q.position is not None and s.features & spec.F_RING_PACKED and q.position & 0x7FFF >= q.size:
                raise ValueError(f"position {q.position} in a ring of {q.size}")
        try:
            setups = [_Setup(q.size, q.vector, q.enabled, [q.desc, q.driver, q.device]) for q in s.queues]
            queues = [
                None if q.position is None else self._make_queue(s.features, setup, q.position)
                for q, setup in zip(s.queues, setups, strict=True)
            ]
        except ChainError as e:
            raise ValueError(str(e)) from None
        self.features, self._setups, self.queues = s.features, setups, queues
        self.restore_stored(s.registers)
        self._status = s.status
        self._vector = s.vector
        self._generation = s.generation
        self._config_read = True
        self._isr = s.isr
        self._due.clear()
        if self.active:
            self._go_on_with_all()

    def counters(self) -> dict[str, int]:
        return {**super().counters(), **self._counts}
