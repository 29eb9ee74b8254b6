"""devproc/virtio/device.py: a function driven through its registers, with real rings in real memory."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devproc import state
from devproc.catalog import Virtio, virtio_entry
from devproc.driver import NotReady, PackedDriver, PciDriver, SplitDriver
from devproc.record import record, replace
from devproc.regs import Register
from devproc.virtio import spec
from devproc.virtio.device import BATCH, TransportState, VirtioDevice, virtio_tables
from devproc.wire import Space

VIRTIO = Virtio(63, 0x01_80_00, (16, 8))
F_SHOUT = 1 << 3
F_OTHERS = 1 << 5
V1 = spec.F_VERSION_1
EVERY_RING = spec.F_INDIRECT_DESC | spec.F_EVENT_IDX | spec.F_RING_PACKED


@record
class EchoState:
    transport: TransportState


class Echo(VirtioDevice):
    """Gives back what it reads, in capitals if that was negotiated."""

    VIRTIO = VIRTIO
    TABLES = virtio_tables(
        VIRTIO,
        (
            Register("capacity", 0, "RO", "", "", size=8, stored=True),
            Register("level", 8, "RW", "", "", size=4, mask=0xFFFF_FFFF, stored=True),
        ),
    )

    def __init__(self, **transport: Any) -> None:
        super().__init__(**transport, features=F_SHOUT)
        self.events: list[str] = []

    def on_activate(self) -> None:
        self.events.append(f"activate {self.features & F_SHOUT}")

    def on_reset(self) -> None:
        self.events.append("reset")

    def on_queue(self, index: int) -> None:
        self.events.append(f"queue {index}")
        for chain in self.chains(index):
            data = self.memory.copy_out(chain.readable, chain.write_size)
            if data == b"fail":
                self.fail("asked to")
            if self.features & F_SHOUT:
                data = data.upper()
            self.memory.copy_in(chain.writable, data)
            self.push(index, chain, len(data))
        self.notify(index)

    def save(self) -> bytes:
        return state.pack(EchoState(self.save_transport()))

    def restore(self, data: bytes) -> None:
        self.restore_transport(state.unpack(EchoState, data).transport)


ENTRY = replace(virtio_entry("echo", "gives back", "Echo", VIRTIO), module=__name__)


class Machine:
    """An Echo on its bench, and its driver."""

    def __init__(self, bench: Any) -> None:
        self.bench = bench
        self.model: Echo = bench.model
        self.driver = PciDriver(bench.model, bench.memory)

    def start(self, features: int = V1, **how: Any) -> None:
        self.driver.start(features, **how)
        self.bench.pump()

    def say(self, data: bytes, index: int = 0) -> bytes:
        """What comes back for `data`."""
        queue = self.driver.queues[index]
        queue.request(data, len(data))
        queue.interrupts(1)
        self.bench.kick("kick", index)
        (used,) = queue.used()
        return used.data

    @property
    def refused(self) -> int:
        return self.model.counters()["refused_writes"]


@pytest.fixture
def echo(bench: Any) -> Machine:
    return Machine(bench(ENTRY))


@pytest.mark.parametrize("size", [0, 4])
@pytest.mark.parametrize("features", [V1, V1 | spec.F_EVENT_IDX, V1 | spec.F_RING_PACKED, V1 | EVERY_RING])
def test_a_driver_brings_it_up_and_is_served(echo: Machine, features: int, size: int) -> None:
    echo.start(features, size=size)
    for n in range(20):
        assert echo.say(b"word %d" % n) == b"word %d" % n
        assert echo.say(b"other", 1) == b"other"
    assert echo.bench.edges == {"irq1": 20, "irq2": 20}
    assert echo.driver.status == 0x0F


def test_features_are_offered_and_what_was_accepted_counts(echo: Machine) -> None:
    assert echo.driver.offered() == V1 | EVERY_RING | F_SHOUT
    echo.start(V1 | F_SHOUT)
    assert echo.say(b"loud") == b"LOUD"
    echo.start(V1)
    assert echo.say(b"quiet") == b"quiet"
    assert [e for e in echo.model.events if e.startswith("activate")] == ["activate 8", "activate 0"]


def test_what_was_made_available_before_driver_ok_is_taken_after_it(echo: Machine) -> None:
    def early(bits: int, add: Any = echo.driver.add_status) -> None:
        if bits == spec.DRIVER_OK:
            echo.driver.queues[0].request(b"early", 5)
            echo.driver.kick(0)
            assert echo.driver.queues[0].used() == []
        add(bits)

    echo.driver.add_status = early  # type: ignore[method-assign]
    echo.start()
    assert [u.data for u in echo.driver.queues[0].used()] == [b"early"]


def test_a_notification_by_register_serves_like_a_kick(echo: Machine) -> None:
    echo.start()
    echo.driver.queues[1].request(b"x", 1)
    echo.driver.kick(1)
    assert [u.data for u in echo.driver.queues[1].used()] == [b"x"]


def test_a_queue_that_does_not_exist_has_no_registers(echo: Machine) -> None:
    """Threat 1."""
    echo.driver.negotiate(V1)
    for select in (2, 0xFFFF):
        echo.driver.put(spec.QUEUE_SELECT, 2, select)
        before = echo.refused
        for at, size in ((spec.QUEUE_SIZE, 2), (spec.QUEUE_ENABLE, 2), (spec.QUEUE_DESC, 4)):
            echo.driver.put(at, size, 1)
            assert echo.driver.get(at, size) == 0
        echo.driver.put(spec.QUEUE_MSIX_VECTOR, 2, 0)
        assert echo.driver.get(spec.QUEUE_MSIX_VECTOR, 2) == spec.MSI_NO_VECTOR
        assert echo.driver.get(spec.QUEUE_NOTIFY_OFF, 2) == 0
        assert echo.refused == before + 4


def test_a_changed_configuration_has_another_generation_and_interrupts(echo: Machine) -> None:
    """Threat 2."""
    echo.start()
    before = echo.driver.get(spec.CONFIG_GENERATION, 1)
    echo.model.stored["capacity"] = 5 << 32 | 6
    echo.model.config_changed()
    assert echo.driver.get(spec.CONFIG_GENERATION, 1) != before
    assert echo.bench.edges == {"irq0": 1}
    assert (echo.driver.config(0, 8), echo.driver.config(0, 4), echo.driver.config(4, 4)) == (
        5 << 32 | 6,
        6,
        5,
    )


def test_no_number_of_changes_between_two_reads_looks_like_none(echo: Machine) -> None:
    """Threat 2: the generation has 8 bits."""
    echo.start()
    for _ in range(3):
        before = echo.driver.get(spec.CONFIG_GENERATION, 1)
        echo.driver.config(0, 4)
        for _ in range(256):
            echo.model.config_changed()
        echo.driver.config(4, 4)
        assert echo.driver.get(spec.CONFIG_GENERATION, 1) != before


def test_a_changed_configuration_is_in_isr_status_and_raises_inta_only_without_msix(echo: Machine) -> None:
    """4.1.4.5.1."""
    echo.start()
    echo.model.config_changed()
    assert not echo.model.read(Space.CONFIG, 6, 2) & 0x08
    echo.bench.kick("resample")
    assert echo.bench.edges == {"irq0": 1}
    assert echo.say(b"x") == b"x"
    assert echo.driver.isr() == spec.ISR_CONFIG
    assert echo.driver.isr() == 0


def test_nobody_is_told_of_a_changed_configuration_before_driver_ok(echo: Machine) -> None:
    echo.driver.negotiate(V1)
    echo.model.config_changed()
    assert not echo.bench.edges


@pytest.mark.parametrize("features", [V1, V1 | EVERY_RING])
def test_a_reset_at_any_time_drops_everything_and_is_done_at_once(echo: Machine, features: int) -> None:
    """Threat 3."""
    echo.start(features)
    for _ in range(3):
        echo.driver.queues[0].request(b"lost", 4)
    echo.driver.notify(0)
    echo.driver.queues[1].request(b"lost", 4)
    echo.driver.reset()
    assert echo.model.events[-1] == "reset"
    assert echo.model.deadline_ns is None
    assert (echo.model.queues, echo.model.features) == ([None, None], 0)
    echo.bench.kick("kick", 1)
    for at in (spec.CONFIG_MSIX_VECTOR, spec.QUEUE_MSIX_VECTOR):
        assert echo.driver.get(at, 2) == spec.MSI_NO_VECTOR
    assert (echo.driver.get(spec.QUEUE_SIZE, 2), echo.driver.get(spec.QUEUE_ENABLE, 2)) == (16, 0)
    assert echo.driver.get(spec.QUEUE_DESC, 4) == 0
    echo.start(features)
    assert echo.say(b"again") == b"again"


def test_the_status_is_never_taken_back_bit_by_bit(echo: Machine) -> None:
    """Threat 4."""
    echo.start()
    before = echo.refused
    for less in (0x0B, 0x07, 0x80, 0x01):
        echo.driver.put(spec.DEVICE_STATUS, 1, less)
        assert echo.driver.status == 0x0F
    assert echo.refused == before + 4
    assert echo.say(b"still") == b"still"


def test_driver_ok_needs_features_ok(echo: Machine) -> None:
    """Threat 4."""
    echo.driver.put(spec.DEVICE_STATUS, 1, spec.ACKNOWLEDGE | spec.DRIVER | spec.DRIVER_OK)
    assert echo.driver.status == spec.ACKNOWLEDGE | spec.DRIVER
    assert (echo.model.events, echo.refused) == ([], 1)


@pytest.mark.parametrize("features", [0, F_SHOUT, V1 | F_OTHERS, V1 | 1 << 63, V1 | spec.F_ACCESS_PLATFORM])
def test_features_that_are_not_ours_or_lack_version_1_are_not_agreed_to(echo: Machine, features: int) -> None:
    """Threat 5."""
    with pytest.raises(NotReady, match="not accepted"):
        echo.driver.negotiate(features)
    echo.driver.add_status(spec.DRIVER_OK)
    assert echo.driver.status == spec.ACKNOWLEDGE | spec.DRIVER


def test_features_are_settled_once_they_are_agreed(echo: Machine) -> None:
    """Threat 5."""
    echo.driver.negotiate(V1)
    echo.driver.put(spec.DRIVER_FEATURE_SELECT, 4, 0)
    echo.driver.put(spec.DRIVER_FEATURE, 4, F_OTHERS)
    assert echo.driver.get(spec.DRIVER_FEATURE, 4) == 0
    assert echo.refused == 1


def test_other_feature_words_are_empty(echo: Machine) -> None:
    echo.driver.reset()
    for select in (2, 0xFFFF_FFFF):
        echo.driver.put(spec.DEVICE_FEATURE_SELECT, 4, select)
        assert echo.driver.get(spec.DEVICE_FEATURE, 4) == 0
        echo.driver.put(spec.DRIVER_FEATURE_SELECT, 4, select)
        echo.driver.put(spec.DRIVER_FEATURE, 4, 1)
        assert echo.driver.get(spec.DRIVER_FEATURE, 4) == 0


def test_kicks_of_queues_that_are_not_in_use_do_nothing(echo: Machine) -> None:
    """Threat 6."""
    echo.bench.kick("kick", 0)
    echo.driver.negotiate(V1)
    echo.driver.notify(1)
    echo.start()
    echo.driver.queues[0].request(b"fail", 4)
    echo.driver.notify(0)
    echo.driver.notify(0)
    assert echo.model.counters()["idle_kicks"] == 3


def test_without_bus_mastering_no_memory_is_touched(echo: Machine) -> None:
    """Threat 6."""
    echo.start()
    echo.model.write(Space.CONFIG, 4, 2, 0x0402)
    echo.driver.queues[0].request(b"later", 5)
    echo.bench.kick("kick", 0)
    assert echo.driver.queues[0].used() == []
    echo.model.write(Space.CONFIG, 4, 2, 0x0406)
    echo.bench.pump()
    assert [u.data for u in echo.driver.queues[0].used()] == [b"later"]


@pytest.mark.parametrize("size", [0, 3, 17, 32, 0x8000, 0xFFFF])
def test_sizes_that_are_not_allowed_are_refused(echo: Machine, size: int) -> None:
    """Threat 7."""
    echo.driver.negotiate(V1)
    echo.driver.put(spec.QUEUE_SIZE, 2, size)
    assert echo.driver.get(spec.QUEUE_SIZE, 2) == 16
    assert echo.refused == 1


def test_a_size_is_a_power_of_2_until_packed_rings_are_negotiated(echo: Machine) -> None:
    """4.1.4.3.1."""
    echo.driver.put(spec.DRIVER_FEATURE_SELECT, 4, 1)
    echo.driver.put(spec.DRIVER_FEATURE, 4, (V1 | spec.F_RING_PACKED) >> 32)
    for status, size in ((spec.DRIVER, 16), (spec.DRIVER | spec.FEATURES_OK, 7)):
        echo.driver.add_status(status)
        echo.driver.put(spec.QUEUE_SIZE, 2, 7)
        assert echo.driver.get(spec.QUEUE_SIZE, 2) == size


def test_a_packed_queue_may_have_any_size(echo: Machine) -> None:
    echo.start(V1 | spec.F_RING_PACKED, size=7)
    assert echo.driver.queues[0].size == 7
    for _ in range(9):
        assert echo.say(b"seven") == b"seven"


def test_a_queue_that_is_enabled_stays_as_it_is(echo: Machine) -> None:
    """Threat 7."""
    echo.start()
    echo.driver.put(spec.QUEUE_SELECT, 2, 0)
    registers = (
        (spec.QUEUE_SIZE, 2),
        (spec.QUEUE_DESC, 4),
        (spec.QUEUE_DRIVER, 4),
        (spec.QUEUE_DEVICE + 4, 4),
    )
    before = [echo.driver.get(at, size) for at, size in registers]
    refused = echo.refused
    for at, size in registers:
        echo.driver.put(at, size, 8)
    echo.driver.put(spec.QUEUE_ENABLE, 2, 0)
    assert [echo.driver.get(at, size) for at, size in registers] == before
    assert (echo.driver.get(spec.QUEUE_ENABLE, 2), echo.refused) == (1, refused + 5)
    assert echo.say(b"as before") == b"as before"


def test_a_queue_is_enabled_by_1_alone_and_before_driver_ok(echo: Machine) -> None:
    """Threat 7."""
    echo.driver.negotiate(V1)
    echo.driver.put(spec.QUEUE_ENABLE, 2, 2)
    assert echo.driver.get(spec.QUEUE_ENABLE, 2) == 0
    echo.driver.put(spec.QUEUE_ENABLE, 2, 1)
    echo.driver.put(spec.QUEUE_SIZE, 2, 8)
    assert (echo.driver.get(spec.QUEUE_SIZE, 2), echo.driver.get(spec.QUEUE_ENABLE, 2)) == (16, 1)
    echo.driver.put(spec.QUEUE_SELECT, 2, 1)
    echo.driver.add_status(spec.DRIVER_OK)
    echo.driver.put(spec.QUEUE_ENABLE, 2, 1)
    assert echo.driver.get(spec.QUEUE_ENABLE, 2) == 0


def test_a_vector_that_is_not_there_reads_back_as_none(echo: Machine) -> None:
    """Threat 8."""
    for at in (spec.CONFIG_MSIX_VECTOR, spec.QUEUE_MSIX_VECTOR):
        for vector, taken in ((2, 2), (3, spec.MSI_NO_VECTOR), (0xFFFE, spec.MSI_NO_VECTOR), (0, 0)):
            echo.driver.put(at, 2, vector)
            assert echo.driver.get(at, 2) == taken


def test_without_a_vector_nobody_is_interrupted(echo: Machine) -> None:
    echo.start()
    echo.driver.put(spec.QUEUE_SELECT, 2, 0)
    echo.driver.put(spec.QUEUE_MSIX_VECTOR, 2, spec.MSI_NO_VECTOR)
    assert echo.say(b"quietly") == b"quietly"
    assert echo.driver.isr() == 0
    echo.driver.put(spec.CONFIG_MSIX_VECTOR, 2, spec.MSI_NO_VECTOR)
    echo.model.config_changed()
    assert not echo.bench.edges


def test_the_wrong_width_reads_the_bytes_there_are_and_writes_nothing(echo: Machine) -> None:
    """Threat 9."""
    echo.driver.negotiate(V1)
    echo.driver.put(spec.QUEUE_DESC, 4, 0x1234_5670)
    before = echo.model.counters()["unclaimed_writes"]
    echo.driver.put(spec.QUEUE_DESC, 8, 0xFFFF_FFFF_FFFF_FFF0)
    echo.driver.put(spec.QUEUE_DESC, 2, 0xFFF0)
    echo.driver.put(spec.QUEUE_SIZE, 1, 8)
    echo.driver.put(spec.QUEUE_SIZE, 4, 8)
    assert echo.model.counters()["unclaimed_writes"] == before + 8 + 2 + 1 + 4
    assert echo.driver.get(spec.QUEUE_DESC, 8) == 0x1234_5670
    assert [echo.driver.get(spec.QUEUE_DESC + i, 1) for i in range(4)] == [0x70, 0x56, 0x34, 0x12]
    assert echo.driver.get(spec.QUEUE_SIZE, 4) == spec.MSI_NO_VECTOR << 16 | 16


@pytest.mark.parametrize("features", [V1, V1 | spec.F_RING_PACKED])
@pytest.mark.parametrize("desc", [0x10_0008, 0xFFFF_FFF0, 1 << 63])
def test_a_queue_that_is_not_in_memory_stops_the_device_alone(
    echo: Machine, features: int, desc: int
) -> None:
    """Threat 10."""
    echo.driver.negotiate(features)
    echo.driver.put(spec.CONFIG_MSIX_VECTOR, 2, 0)
    echo.model.write(Space.CONFIG, spec.CONFIG_MSIX + 2, 2, 0x8000)
    echo.driver.put(spec.QUEUE_DESC, 4, desc & 0xFFFF_FFFF)
    echo.driver.put(spec.QUEUE_DESC + 4, 4, desc >> 32)
    echo.driver.put(spec.QUEUE_ENABLE, 2, 1)
    echo.driver.add_status(spec.DRIVER_OK)
    assert echo.driver.status & spec.DEVICE_NEEDS_RESET
    assert echo.bench.edges == {"irq0": 1}
    echo.start(features)
    assert echo.say(b"well again") == b"well again"
    (said,) = echo.bench.said
    assert said.startswith(f"needs a reset: queue 0: descriptor area at {desc:#x}")


def test_a_ring_that_is_nonsense_stops_the_device_and_is_logged_once(echo: Machine) -> None:
    """Threat 10."""
    for _ in range(3):
        echo.start()
        queue = echo.driver.queues[0]
        assert not isinstance(queue, PackedDriver)
        queue.idx = 100  # type: ignore[attr-defined]
        echo.bench.kick("kick", 0)
        assert echo.driver.status == 0x0F | spec.DEVICE_NEEDS_RESET
        echo.driver.put(spec.DEVICE_STATUS, 1, 0x0F)
        assert echo.driver.status == 0x0F | spec.DEVICE_NEEDS_RESET
    assert len(echo.bench.said) == 1
    assert echo.model.counters()["failures"] == 3


def test_after_a_failure_in_the_middle_nothing_more_is_used(echo: Machine) -> None:
    """Threat 10."""
    echo.start()
    for data in (b"one", b"fail", b"three"):
        echo.driver.queues[0].request(data, 5)
    echo.driver.notify(0)
    assert [u.data for u in echo.driver.queues[0].used()] == [b"one"]
    echo.model.save()


@pytest.mark.parametrize("features", [V1, V1 | spec.F_EVENT_IDX, V1 | EVERY_RING])
def test_a_kick_without_a_chain_is_nothing(echo: Machine, features: int) -> None:
    """2.7.10.2."""
    echo.start(features)
    for _ in range(3):
        echo.bench.kick("kick", 0)
    assert not echo.bench.edges
    assert echo.say(b"as ever") == b"as ever"


@pytest.mark.parametrize("indirect", [False, True])
def test_what_is_the_driver_s_to_write_stays_as_it_is(echo: Machine, indirect: bool) -> None:
    """2.7.5.1, 2.8.15: readable buffers, and of a split queue the descriptor table; nor is room read."""
    echo.start(V1 | spec.F_INDIRECT_DESC)
    queue, memory = echo.driver.queues[0], echo.bench.memory
    assert isinstance(queue, SplitDriver)
    readable, room = queue.place(b"from the driver"), queue.place(b"left from before")
    queue.add([readable], [room], indirect=indirect)
    table = memory.read(queue.desc, 16 * queue.size)
    echo.bench.kick("kick", 0)
    (used,) = queue.used()
    assert used.data == b"from the driver"
    assert memory.read(readable.gpa, readable.size) == b"from the driver"
    assert memory.read(queue.desc, 16 * queue.size) == table


def test_a_flood_is_served_in_batches_with_room_between(bench: Any) -> None:
    """Threat 11."""
    virtio = Virtio(63, 0, (256,))
    kind = type("Flood", (Echo,), {"VIRTIO": virtio, "TABLES": virtio_tables(virtio)})
    globals()["Flood"] = kind
    echo = Machine(bench(replace(virtio_entry("flood", "", "Flood", virtio), module=__name__)))
    echo.start(V1 | spec.F_INDIRECT_DESC)
    for _ in range(2 * BATCH + 1):
        echo.driver.queues[0].request(b"x", 1, indirect=True)
    echo.driver.notify(0)
    assert len(echo.driver.queues[0].used()) == BATCH
    assert echo.model.deadline_ns == 0
    echo.model.on_deadline(echo.bench.now_ns)
    assert len(echo.driver.queues[0].used()) == BATCH
    echo.bench.pump()
    assert len(echo.driver.queues[0].used()) == 1
    assert echo.model.deadline_ns is None


def window(echo: Machine, bar: int, offset: int, size: int) -> int:
    at = spec.CONFIG_PCI
    echo.model.write(Space.CONFIG, at + spec.CAP_BAR, 1, bar)
    echo.model.write(Space.CONFIG, at + spec.CAP_OFFSET, 4, offset)
    echo.model.write(Space.CONFIG, at + spec.CAP_LENGTH, 4, size)
    return echo.model.read(Space.CONFIG, at + spec.CAP_PCI_CFG_DATA, size if size in (1, 2, 4) else 4)


def test_the_window_shows_the_registers_of_bar_0(echo: Machine) -> None:
    echo.start()
    assert window(echo, 0, spec.DEVICE_STATUS, 1) == 0x0F
    assert window(echo, 0, spec.NUM_QUEUES, 2) == 2
    echo.driver.set_config(8, 4, 0xCAFE)
    assert window(echo, 0, spec.BAR_DEVICE + 8, 4) == 0xCAFE


@pytest.mark.parametrize(
    ("bar", "offset", "size"),
    [
        (1, 0, 4), (0, spec.BAR_MSIX_TABLE, 4), (0, spec.BAR_MSIX_PBA, 4), (0, 0xFFFF_FFFC, 4),
        (0, 2, 4), (0, 0, 3), (0, 0, 8), (0, 0, 0), (0, 0, 0xFFFF_FFFF),
    ],
)  # fmt: skip
def test_the_window_shows_nothing_else(echo: Machine, bar: int, offset: int, size: int) -> None:
    """Threat 12."""
    width = size if size in (1, 2, 4) else 4
    assert window(echo, bar, offset, size) == (1 << 8 * width) - 1


def test_inta_stays_up_until_its_cause_is_read(echo: Machine) -> None:
    """Threat 13."""
    echo.start(msix=False)
    assert echo.say(b"x") == b"x"
    assert echo.bench.edges == {"intx": 1}
    assert echo.model.read(Space.CONFIG, 6, 2) & 0x08
    echo.bench.kick("resample")
    assert echo.bench.edges == {"intx": 2}
    assert echo.driver.isr() == spec.ISR_QUEUE
    assert echo.driver.isr() == 0
    assert not echo.model.read(Space.CONFIG, 6, 2) & 0x08
    echo.bench.kick("resample")
    assert echo.bench.edges == {"intx": 2}
    echo.model.config_changed()
    assert echo.say(b"x") == b"x"
    assert echo.driver.isr() == spec.ISR_QUEUE | spec.ISR_CONFIG


def test_inta_can_be_switched_off_and_comes_when_it_is_on_again(echo: Machine) -> None:
    echo.start(msix=False)
    echo.model.write(Space.CONFIG, 4, 2, 0x0406)
    assert echo.say(b"x") == b"x"
    assert not echo.bench.edges
    echo.model.write(Space.CONFIG, 4, 2, 0x0006)
    assert echo.bench.edges == {"intx": 1}


def test_a_driver_that_wants_no_interrupt_gets_none(echo: Machine) -> None:
    echo.start()
    echo.driver.queues[0].interrupts(0)
    echo.driver.queues[0].request(b"x", 1)
    echo.bench.kick("kick", 0)
    assert len(echo.driver.queues[0].used()) == 1
    assert not echo.bench.edges


@pytest.mark.parametrize("features", [V1, V1 | EVERY_RING])
@pytest.mark.parametrize("msix", [True, False])
def test_a_restored_device_goes_on_in_the_same_rings(
    echo: Machine, bench: Any, features: int, msix: bool
) -> None:
    echo.start(features | F_SHOUT, msix=msix)
    for n in range(21):
        echo.say(b"%d" % n)
    echo.driver.queues[0].request(b"in between", 10)
    other = Machine(echo.bench.fork())
    assert other.model.save() == echo.model.save()
    other.driver.queues = echo.driver.queues
    other.bench.pump()
    assert [u.data for u in other.driver.queues[0].used()] == [b"IN BETWEEN"]
    for n in range(21):
        assert other.say(b"go %d" % n, n % 2) == b"GO %d" % n
    assert other.driver.isr() == (0 if msix else spec.ISR_QUEUE)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("features",), 0),
        (("features",), V1 | F_OTHERS),
        (("status",), spec.DRIVER_OK),
        (("vector",), 3),
        (("isr",), 4),
        (("queues", 0, "vector"), 3),
        (("queues", 0, "size"), 0),
        (("queues", 0, "size"), 32),
        (("queues", 0, "size"), 3),
        (("queues", 0, "desc"), 0xFFFF_FFFF_0000_0000),
        (("queues", 0, "enabled"), False),
        (("queues",), []),
        (("registers", 0), 1),
    ],
    ids=repr,
)
def test_a_state_that_no_guest_can_have_made_is_refused_and_changes_nothing(
    echo: Machine, path: tuple[Any, ...], value: Any
) -> None:
    echo.start(V1)
    before = echo.model.save()
    top = json.loads(before)
    *outer, last = path
    at = top["EchoState"]["transport"]
    for key in outer:
        at = at[key]
    at[last] = value
    with pytest.raises(ValueError):
        echo.model.restore(json.dumps(top).encode())
    assert echo.model.save() == before
    assert echo.say(b"as before") == b"as before"


def test_a_position_outside_a_packed_ring_is_refused(echo: Machine) -> None:
    echo.start(V1 | spec.F_RING_PACKED)
    top = json.loads(echo.model.save())
    top["EchoState"]["transport"]["queues"][0]["position"] = 1 << 15 | 16
    with pytest.raises(ValueError, match="position"):
        echo.model.restore(json.dumps(top).encode())


def test_the_capabilities_lead_to_every_structure(echo: Machine) -> None:
    driver = echo.driver
    assert driver.where.keys() == {
        spec.CAP_COMMON_CFG, spec.CAP_NOTIFY_CFG, spec.CAP_ISR_CFG, spec.CAP_DEVICE_CFG, spec.CAP_PCI_CFG
    }  # fmt: skip
    assert driver.msix == spec.CONFIG_MSIX
    read = echo.model.read
    assert read(Space.CONFIG, 0, 4) == (0x1040 + 63) << 16 | 0x1AF4
    assert read(Space.CONFIG, 8, 4) == 0x018000_01
    assert read(Space.CONFIG, 0x2C, 4) == 0x1100_1AF4
    assert read(Space.CONFIG, 0x3D, 1) == 1
    assert read(Space.CONFIG, spec.CONFIG_MSIX + 2, 2) == 2  # three vectors


def test_the_bar_says_its_size(echo: Machine) -> None:
    echo.model.write(Space.CONFIG, 0x10, 4, 0xFFFF_FFFF)
    assert echo.model.read(Space.CONFIG, 0x10, 4) == -spec.BAR_SIZE & 0xFFFF_FFFF


features = st.sampled_from((V1, V1 | spec.F_EVENT_IDX, V1 | spec.F_RING_PACKED, V1 | EVERY_RING, 0, F_OTHERS))
values = st.sampled_from((0, 1, 2, 3, 4, 7, 8, 0x0F, 0x40, 0x80, 0x10_0000, 0xFFFF)) | st.integers(
    0, (1 << 32) - 1
)
steps = st.one_of(
    st.tuples(st.just("start"), features, st.booleans()),
    st.tuples(st.just("reset")),
    st.tuples(st.just("put"), st.integers(0, spec.COMMON_CFG_SIZE), st.sampled_from((1, 2, 4, 8)), values),
    st.tuples(st.just("pci"), st.integers(0, 0xA8), st.sampled_from((1, 2, 4)), values),
    st.tuples(st.just("request"), st.integers(0, 1), st.integers(1, 5000), st.booleans()),
    # the first ring: its descriptors, and what is after them
    st.tuples(st.just("poke"), st.integers(0, 0x2FF), st.binary(min_size=1, max_size=16)),
    st.tuples(st.just("kick"), st.integers(0, 1)),
    st.tuples(st.just("resample")),
    st.tuples(st.just("fork")),
)


@given(script=st.lists(steps, max_size=30))
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_whatever_a_driver_does_a_reset_brings_the_device_back(
    bench: Any, script: list[tuple[Any, ...]]
) -> None:
    echo = Machine(bench(ENTRY))
    for what, *args in script:
        match what:
            case "start":
                with contextlib.suppress(NotReady):
                    echo.start(args[0], msix=args[1])
            case "reset":
                echo.driver.reset()
            case "put":
                echo.driver.put(*args)
                assert 0 <= echo.driver.get(args[0], args[1]) < 1 << 8 * args[1]
            case "pci":
                echo.model.write(Space.CONFIG, *args)
                assert 0 <= echo.model.read(Space.CONFIG, args[0], args[1]) < 1 << 8 * args[1]
            case "request" if len(echo.driver.queues) == 2 and echo.driver.queues[args[0]].free > 2:
                index, size, indirect = args
                echo.driver.queues[index].request(bytes(size), size, indirect=indirect)
            case "poke":
                echo.bench.memory.write(echo.driver.gpa + args[0], args[1])
            case "kick":
                echo.bench.kick("kick", args[0])
            case "resample":
                echo.bench.kick("resample")
            case "fork":
                other = Machine(echo.bench.fork())
                assert other.model.save() == echo.model.save()
                other.driver.queues, echo = echo.driver.queues, other
        echo.bench.pump()
    echo.start(V1)
    assert echo.say(b"back") == b"back"
