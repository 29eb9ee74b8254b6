"""devproc.driver: that it makes what the specification says, and notices a device that does not.

Its agreement with the devices' half is `test_chain`.
"""

from __future__ import annotations

from struct import pack, unpack

import pytest

from devproc.driver import Driver, PackedDriver, SplitDriver
from devproc.virtio.chain import Span
from devproc.virtio.spec import F_EVENT_IDX
from kvmcore.memory import GuestMemory

WRAP = 1 << 15
kinds = pytest.mark.parametrize("kind", [SplitDriver, PackedDriver])


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory.create([(0, 1 << 20)])


def finish(driver: Driver, id: int, written: int) -> None:
    """What a device does first: use the ring's first place."""
    if isinstance(driver, SplitDriver):
        driver.memory.write(driver.device, pack("<HHII", 0, 1, id, written))
    else:
        driver.memory.write(driver.desc + 8, pack("<IHH", written, id, 0x8080 | 2 * (written > 0)))


def test_a_split_chain_is_in_memory_as_the_specification_has_it(memory: GuestMemory) -> None:
    driver = SplitDriver(memory, 0x1000, 4)
    id = driver.add([Span(0x8000, 3)], [Span(0x9000, 5)])
    addr, size, flags, next = unpack("<QIHH", memory.read(driver.desc + 16 * id, 16))
    assert (addr, size, flags) == (0x8000, 3, 1)
    assert unpack("<QIHH", memory.read(driver.desc + 16 * next, 16)) == (0x9000, 5, 2, 0)
    assert memory.read(driver.driver, 6) == pack("<HHH", 0, 1, id)
    head = driver.add([Span(0x8000, 3)], [Span(0x9000, 5)], indirect=True)
    table, size, flags, _ = unpack("<QIHH", memory.read(driver.desc + 16 * head, 16))
    assert (size, flags) == (32, 4)
    assert memory.read(table, 32) == pack("<QIHHQIHH", 0x8000, 3, 1, 1, 0x9000, 5, 2, 2)
    assert memory.read(driver.driver, 8) == pack("<HHHH", 0, 2, id, head)


def test_a_packed_list_is_in_memory_as_the_specification_has_it(memory: GuestMemory) -> None:
    driver = PackedDriver(memory, 0x1000, 3, position=WRAP | 2)
    id = driver.add([Span(0x8000, 3)], [Span(0x9000, 5)])
    assert memory.read(driver.desc + 32, 16) == pack("<QIHH", 0x8000, 3, id, 0x0081)
    assert memory.read(driver.desc, 16) == pack("<QIHH", 0x9000, 5, id, 0x8002)
    id = driver.add([Span(0x8000, 3)], [Span(0x9000, 5)], indirect=True)
    table, size, its_id, flags = unpack("<QIHH", memory.read(driver.desc + 16, 16))
    assert (size, its_id, flags) == (32, id, 0x8004)
    assert memory.read(table, 32) == pack("<QIHHQIHH", 0x8000, 3, 0, 0, 0x9000, 5, 0, 2)


@kinds
def test_data_comes_back_as_far_as_it_was_written(kind: type[SplitDriver], memory: GuestMemory) -> None:
    driver = kind(memory, 0x1000, 4)
    spans = [driver.room(2), driver.room(2)]
    id = driver.add((), spans)
    assert driver.used() == []
    memory.copy_in(spans, b"abcd")
    finish(driver, id, 3)
    assert [tuple(u) for u in driver.used()] == [(id, 3, b"abc")]
    assert driver.used() == []
    assert driver.outstanding == 0


@kinds
def test_a_device_that_uses_what_it_has_not_is_noticed(kind: type[SplitDriver], memory: GuestMemory) -> None:
    driver = kind(memory, 0x1000, 4)
    finish(driver, driver.request(1) ^ 1, 0)
    with pytest.raises(AssertionError, match="is not the device's"):
        driver.used()


@kinds
def test_a_device_that_says_it_wrote_too_much_is_noticed(
    kind: type[SplitDriver], memory: GuestMemory
) -> None:
    driver = kind(memory, 0x1000, 4)
    finish(driver, driver.request(b"in", 4), 5)
    with pytest.raises(AssertionError, match="5 bytes written into 4"):
        driver.used()


def test_a_used_descriptor_with_the_wrong_write_flag_is_noticed(memory: GuestMemory) -> None:
    driver = PackedDriver(memory, 0x1000, 4)
    id = driver.request(4)
    memory.write(driver.desc + 8, pack("<IHH", 4, id, 0x8080))
    with pytest.raises(AssertionError, match="WRITE, and 4 bytes"):
        driver.used()


@kinds
def test_no_more_is_added_than_the_ring_and_the_room_hold(
    kind: type[SplitDriver], memory: GuestMemory
) -> None:
    driver = kind(memory, 0x1000, 4, extent=0x400)
    with pytest.raises(AssertionError, match="no room"):
        driver.request(0x400)
    driver.request(b"1", 1, 1)
    with pytest.raises(AssertionError, match="2 descriptors, 1 are free"):
        driver.request(b"1", 1)


@kinds
def test_room_is_taken_again_when_the_device_has_nothing(
    kind: type[SplitDriver], memory: GuestMemory
) -> None:
    driver = kind(memory, 0x1000, 4, extent=0x400)
    id = driver.request(0x200)
    finish(driver, id, 0)
    driver.used()
    driver.request(0x200)


@pytest.mark.parametrize(
    ("features", "flags", "event", "wanted"),
    [
        (0, 0, 0, True),
        (0, 1, 0, False),
        (F_EVENT_IDX, 1, 6, False),  # flags mean nothing
        (F_EVENT_IDX, 1, 7, True),
        (F_EVENT_IDX, 0, 9, True),
        (F_EVENT_IDX, 0, 10, False),
        (F_EVENT_IDX, 0, 0xFFFF, False),
    ],
)
def test_a_split_device_is_kicked_as_it_asked(
    features: int, flags: int, event: int, wanted: bool, memory: GuestMemory
) -> None:
    """Entries 7 to 9 are new."""
    driver = SplitDriver(memory, 0x1000, 16, features, position=7)
    for _ in range(3):
        driver.request(1)
    memory.write(driver.device, pack("<H", flags))
    memory.write(driver.device + 4 + 8 * 16, pack("<H", event))
    assert driver.kick_wanted() is wanted
    assert not driver.kick_wanted()


@pytest.mark.parametrize(
    ("flags", "event", "wanted"),
    [
        (0, 0, True),
        (1, 0, False),
        (1, WRAP | 7, False),
        (2, WRAP | 5, False),
        (2, WRAP | 6, True),
        (2, WRAP | 7, True),
        (2, 0, True),
        (2, 1, False),
        (2, 6, False),
        (2, WRAP, False),
    ],
)
def test_a_packed_device_is_kicked_as_it_asked(
    flags: int, event: int, wanted: bool, memory: GuestMemory
) -> None:
    """Descriptors 6 and 7 of the first lap and 0 of the second are new."""
    driver = PackedDriver(memory, 0x1000, 8, F_EVENT_IDX, position=WRAP | 6)
    driver.request(b"1", 1)
    driver.request(1)
    memory.write(driver.device, pack("<HH", event, flags))
    assert driver.kick_wanted() is wanted
    assert not driver.kick_wanted()


def test_interrupts_are_asked_for_by_flags_or_by_place(memory: GuestMemory) -> None:
    split = SplitDriver(memory, 0x1000, 8)
    for after, flags in ((1, 0), (0, 1), (1, 0)):
        split.interrupts(after)
        assert memory.read(split.driver, 2) == pack("<H", flags)
    split = SplitDriver(memory, 0x1000, 8, F_EVENT_IDX, position=0xFFFF)
    for after, event in ((0, 0xFFFE), (1, 0xFFFF), (3, 1)):
        split.interrupts(after)
        assert memory.read(split.driver + 20, 2) == pack("<H", event)
    packed = PackedDriver(memory, 0x1000, 8, F_EVENT_IDX, position=WRAP | 7)
    for after, place, flags in ((1, WRAP | 7, 2), (2, 0, 2), (0, 0, 1)):
        packed.interrupts(after)
        assert memory.read(packed.driver, 4) == pack("<HH", place, flags)
    packed = PackedDriver(memory, 0x1000, 8)
    packed.interrupts(1)
    assert memory.read(packed.driver, 4) == bytes(4)
