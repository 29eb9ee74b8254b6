"""The driver's writes that a virtio device is spared, each by the threat it answers."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devproc.virtio import spec
from supervisor.virtioshadow import VirtioShadow

RAM = 0x100000
SIZES = (256, 64)
NEGOTIATED = spec.ACKNOWLEDGE | spec.DRIVER | spec.FEATURES_OK
RINGS = {spec.QUEUE_DESC: 0x1000, spec.QUEUE_DRIVER: 0x2000, spec.QUEUE_DEVICE: 0x3000}


class Guest:
    """A shadow, and what has reached the device behind it."""

    def __init__(self):
        self.got = []
        self.shadow = VirtioShadow(SIZES, lambda gpa, size: gpa + size <= RAM, self._take)

    def _take(self, *write):
        self.got.append(write)

    def write(self, offset, size, data):
        """Whether the device got it, and the count if it did not."""
        got, refused = len(self.got), self.shadow.refused
        self.shadow.write(offset, size, data)
        reached = len(self.got) > got
        assert self.shadow.refused == refused + (not reached)
        return reached

    def negotiate(self, features=spec.F_VERSION_1):
        assert self.write(spec.DEVICE_STATUS, 1, 0)
        for select in (0, 1):
            assert self.write(spec.DRIVER_FEATURE_SELECT, 4, select)
            assert self.write(spec.DRIVER_FEATURE, 4, features >> 32 * select & 0xFFFFFFFF)
        assert self.write(spec.DEVICE_STATUS, 1, NEGOTIATED)

    def set_up(self, queue=0, size=None, rings=RINGS):
        assert self.write(spec.QUEUE_SELECT, 2, queue)
        if size is not None:
            assert self.write(spec.QUEUE_SIZE, 2, size)
        for register, gpa in rings.items():
            assert self.write(register, 4, gpa & 0xFFFFFFFF)
            assert self.write(register + 4, 4, gpa >> 32)

    def enable(self):
        return self.write(spec.QUEUE_ENABLE, 2, 1)


@pytest.fixture
def guest():
    guest = Guest()
    guest.negotiate()
    return guest


QUEUE_WRITES = [
    (spec.QUEUE_SIZE, 2, 8),
    (spec.QUEUE_ENABLE, 2, 1),
    *((register + half, 4, 0x8000) for register in RINGS for half in (0, 4)),
]


def test_a_driver_that_keeps_to_the_specification_is_never_refused(guest):
    for queue in (0, 1):
        guest.set_up(queue, 64)
        assert guest.write(spec.QUEUE_MSIX_VECTOR, 2, queue + 1)
        assert guest.enable()
    assert guest.write(spec.CONFIG_MSIX_VECTOR, 2, 0)
    assert guest.write(spec.DEVICE_STATUS, 1, NEGOTIATED | spec.DRIVER_OK)
    assert guest.shadow.refused == 0


@pytest.mark.parametrize("write", QUEUE_WRITES)
def test_nothing_of_a_queue_changes_after_driver_ok(guest, write):
    """Threat 1: whether the queue was enabled or not."""
    guest.set_up(0)
    assert guest.enable()
    assert guest.write(spec.DEVICE_STATUS, 1, NEGOTIATED | spec.DRIVER_OK)
    for queue in (0, 1):
        assert guest.write(spec.QUEUE_SELECT, 2, queue)
        assert not guest.write(*write)


@pytest.mark.parametrize("write", QUEUE_WRITES)
def test_nothing_of_an_enabled_queue_changes(guest, write):
    """Threat 1."""
    guest.set_up(0)
    assert guest.enable()
    assert not guest.write(*write)
    assert guest.write(spec.QUEUE_SELECT, 2, 1)
    assert guest.write(spec.QUEUE_SIZE, 2, 8)


@pytest.mark.parametrize(("size", "allowed"), [(0, False), (1, True), (3, False), (256, True), (512, False)])
def test_a_split_ring_has_a_power_of_2_up_to_its_maximum(guest, size, allowed):
    """Threat 2."""
    assert guest.write(spec.QUEUE_SIZE, 2, size) is allowed


@pytest.mark.parametrize(("size", "allowed"), [(0, False), (3, True), (256, True), (257, False)])
def test_a_packed_ring_has_any_size_up_to_its_maximum(guest, size, allowed):
    """Threat 2."""
    guest.negotiate(spec.F_VERSION_1 | spec.F_RING_PACKED)
    assert guest.write(spec.QUEUE_SIZE, 2, size) is allowed


def test_a_size_that_only_packed_rings_have_waits_until_they_are_negotiated():
    """Threat 2."""
    guest = Guest()
    guest.write(spec.DRIVER_FEATURE_SELECT, 4, 1)
    guest.write(spec.DRIVER_FEATURE, 4, spec.F_RING_PACKED >> 32)
    assert not guest.write(spec.QUEUE_SIZE, 2, 3)
    guest.write(spec.DEVICE_STATUS, 1, NEGOTIATED)
    assert guest.write(spec.QUEUE_SIZE, 2, 3)


@pytest.mark.parametrize(
    ("register", "gpa", "allowed"),
    [
        (spec.QUEUE_DESC, 0x1008, False),
        (spec.QUEUE_DESC, RAM - 16 * 256, True),
        (spec.QUEUE_DESC, RAM - 16 * 255, False),
        (spec.QUEUE_DESC, (1 << 64) - 16, False),
        (spec.QUEUE_DRIVER, 0x2001, False),
        (spec.QUEUE_DRIVER, RAM - 518, True),
        (spec.QUEUE_DRIVER, RAM - 516, False),
        (spec.QUEUE_DEVICE, 0x3002, False),
        (spec.QUEUE_DEVICE, RAM - 2056, True),
        (spec.QUEUE_DEVICE, RAM - 2052, False),
        (spec.QUEUE_DEVICE, 1 << 32, False),
    ],
)
def test_a_split_queue_is_enabled_with_aligned_rings_in_ram_only(guest, register, gpa, allowed):
    """Threat 3."""
    guest.set_up(rings=RINGS | {register: gpa})
    assert guest.enable() is allowed


@pytest.mark.parametrize(
    ("register", "gpa", "allowed"),
    [
        (spec.QUEUE_DESC, 0x1008, False),
        (spec.QUEUE_DRIVER, 0x2002, False),
        (spec.QUEUE_DRIVER, RAM - 4, True),
        (spec.QUEUE_DEVICE, RAM - 4, True),
        (spec.QUEUE_DEVICE, RAM, False),
    ],
)
def test_a_packed_queue_has_event_structures_of_four_bytes(guest, register, gpa, allowed):
    """Threat 3."""
    guest.negotiate(spec.F_VERSION_1 | spec.F_RING_PACKED)
    guest.set_up(rings=RINGS | {register: gpa})
    assert guest.enable() is allowed


@pytest.mark.parametrize("value", [0, 2, 0xFFFF])
def test_a_queue_is_enabled_by_1_only(guest, value):
    """Threat 3."""
    guest.set_up()
    assert not guest.write(spec.QUEUE_ENABLE, 2, value)


def test_no_queue_is_enabled_before_the_features_are_settled():
    """Threat 3."""
    guest = Guest()
    guest.set_up()
    assert not guest.enable()


def test_features_are_settled_by_features_ok(guest):
    """Threat 4."""
    assert guest.write(spec.DRIVER_FEATURE_SELECT, 4, 1)
    assert not guest.write(spec.DRIVER_FEATURE, 4, 0)


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (spec.QUEUE_SIZE, 4),
        (spec.QUEUE_SIZE, 1),
        (spec.QUEUE_SIZE + 1, 1),
        (spec.QUEUE_SELECT, 1),
        (spec.DEVICE_STATUS, 2),
        (spec.DEVICE_STATUS, 4),
        (spec.QUEUE_DESC, 2),
        (spec.QUEUE_DESC + 2, 4),
        (spec.NUM_QUEUES, 2),
        (spec.CONFIG_GENERATION, 1),
        (spec.QUEUE_NOTIFY_OFF, 2),
        (spec.QUEUE_RESET, 2),
        (spec.COMMON_CFG_SIZE, 4),
        (0xFFC, 4),
    ],
)
def test_only_whole_writable_registers_are_written(guest, offset, size):
    """Threat 5."""
    assert not guest.write(offset, size, 1)


def test_a_64_bit_write_is_two_of_32(guest):
    guest.got.clear()
    guest.shadow.write(spec.QUEUE_DESC, 8, 0x1_2345_6000)
    assert guest.got == [(spec.QUEUE_DESC, 4, 0x23456000), (spec.QUEUE_DESC + 4, 4, 1)]


@pytest.mark.parametrize("write", QUEUE_WRITES)
def test_a_queue_that_does_not_exist_has_no_registers(guest, write):
    """Threat 6."""
    assert guest.write(spec.QUEUE_SELECT, 2, len(SIZES))
    assert not guest.write(*write)


def test_status_bits_that_are_taken_back_open_nothing(guest):
    """Threat 7."""
    guest.set_up()
    guest.write(spec.DEVICE_STATUS, 1, NEGOTIATED | spec.DRIVER_OK)
    guest.write(spec.DEVICE_STATUS, 1, spec.ACKNOWLEDGE)
    assert not guest.write(spec.QUEUE_SIZE, 2, 8)
    assert not guest.write(spec.DRIVER_FEATURE, 4, 0)


def test_a_reset_opens_everything_again_with_the_first_queue_selected(guest):
    """Threat 7."""
    guest.set_up(1)
    assert guest.enable()
    guest.write(spec.DEVICE_STATUS, 1, NEGOTIATED | spec.DRIVER_OK)
    guest.got.clear()
    assert guest.write(spec.DEVICE_STATUS, 1, 0)
    # Whatever a reset does to these in the device, both ends mean the same queue afterwards.
    assert guest.got == [
        (spec.DEVICE_STATUS, 1, 0),
        (spec.QUEUE_SELECT, 2, 0),
        (spec.DRIVER_FEATURE_SELECT, 4, 0),
    ]
    assert guest.write(spec.DRIVER_FEATURE, 4, 0)
    assert guest.write(spec.QUEUE_SIZE, 2, SIZES[0])


def test_two_processors_write_one_after_the_other():
    """Threat 8: what reaches the device while another write is on its way there."""
    inside, most = 0, 0

    def forward(offset, size, data):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        threading.Event().wait(0.0001)
        inside -= 1

    shadow = VirtioShadow(SIZES, lambda gpa, size: True, forward)
    threads = [
        threading.Thread(target=lambda: [shadow.write(spec.QUEUE_SELECT, 2, n) for n in range(50)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


WRITES = st.tuples(
    st.sampled_from([*range(0, spec.COMMON_CFG_SIZE + 4, 2), spec.DEVICE_STATUS, spec.QUEUE_ENABLE]),
    st.sampled_from((1, 2, 4, 8)),
    st.sampled_from([0, 1, 2, 3, 4, 8, 11, 15, 64, 256, 0x1000, 0x2000]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(WRITES, max_size=60))
def test_whatever_the_guest_writes_an_enabled_queue_is_sound_and_stays(writes):
    """Against a device that believes everything: what it has once enabled never changes until a reset."""
    device = {"select": 0, "enabled": set(), "status": 0}

    def take(offset, size, data):
        match offset:
            case spec.DEVICE_STATUS:
                device["status"] |= data
                if data == 0:
                    device.update(status=0, enabled=set())
            case spec.QUEUE_SELECT:
                device["select"] = data
            case spec.QUEUE_ENABLE:
                assert data == 1
                assert device["status"] & spec.FEATURES_OK
                device["enabled"].add(device["select"])
            case spec.QUEUE_SIZE:
                assert device["select"] not in device["enabled"]
                assert not device["status"] & spec.DRIVER_OK
                assert 0 < data <= SIZES[device["select"]]
            case _ if spec.QUEUE_DESC <= offset < spec.QUEUE_DEVICE + 8:
                assert device["select"] not in device["enabled"]
                assert not device["status"] & spec.DRIVER_OK

    shadow = VirtioShadow(SIZES, lambda gpa, size: gpa + size <= RAM, take)
    for offset, size, data in writes:
        shadow.write(offset, size, data & (1 << 8 * size) - 1)
