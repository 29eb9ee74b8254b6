"""The device's end of a mailbox, in `child.Server` around a real model, against the exit loop's end."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from devproc import child, wire
from devproc.catalog import CATALOG
from devproc.channel import Channel, ChannelClosed
from devproc.devices.serial import Serial
from devproc.mailbox import Mailbox as Waiter
from devproc.regs import Model
from devproc.wire import PeerError, Sender, Space
from kvmcore.exitloop import Core, DeviceGone
from kvmcore.mailbox import Mailbox

FIRST = 950
WANTED = 4  # _mailbox.h
LSR_AND_MSR = (88 + 2 * 5, 88 + 2 * 6)


class Process:
    """A serial device in a thread, as in its process, and the exit loop's number for it."""

    def __init__(self, through_mailbox: bool) -> None:
        self.core = Core(30_000)
        access, its_access = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control, its_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.mailbox = mailbox = Mailbox.create()
        typed, self.type = os.pipe()
        self.shown, shows = os.pipe()
        irq = os.eventfd(0, os.EFD_NONBLOCK)
        for slot, fd in enumerate((irq, typed, shows), FIRST):
            os.dup2(fd, slot)
            os.close(fd)
        channel = Channel(its_control, wire.CONTROL_TABLE, "serving", Sender.DEVICE, Sender.SUPERVISOR)
        entry = CATALOG["serial"]
        self.server = child.Server(entry, Serial, {}, its_access, channel, first=FIRST, mailbox=mailbox.fds)
        self.index = self.core.add_device(access.fileno(), mailbox=mailbox if through_mailbox else None)
        access.close()
        self.ended: BaseException | None = None
        self._theirs = (its_access, its_control)
        self._thread = threading.Thread(target=self._main)

    def start(self) -> None:
        self._thread.start()

    def _main(self) -> None:
        try:
            self.server.serve()
        except BaseException as e:
            self.ended = e
        for sock in self._theirs:
            sock.close()

    def join(self) -> BaseException | None:
        self.core.mark_dead(self.index)
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.ended

    def close(self) -> None:
        if self._thread.ident is not None:
            self.join()
        self.control.close()
        self.mailbox.close()
        for fd in (self.type, self.shown, *range(FIRST, FIRST + 3)):
            with contextlib.suppress(OSError):
                os.close(fd)

    def read(self, offset: int, size: int = 1) -> int:
        return self.core.read(self.index, Space.PORT, offset, size)

    def write(self, offset: int, data: int, *, posted: bool = True) -> None:
        self.core.write(self.index, Space.PORT, offset, 1, data, posted)


@pytest.fixture
def process() -> Iterator[Process]:
    process = Process(True)
    process.start()
    yield process
    process.close()


def conversation(process: Process) -> list[object]:
    """Everything a guest may do to a serial port, and what it gets for it."""
    rng = random.Random(5)
    answers: list[object] = []
    for _ in range(3000):
        size = rng.choice((1, 1, 1, 2, 4, 8))
        offset = rng.randrange(0, 9 - size)
        match rng.randrange(3):
            case 0:
                answers.append(process.read(offset, size))
            case kind:
                data = rng.randrange(1 << 8 * size)
                process.core.write(process.index, Space.PORT, offset, size, data, kind == 1)
    reads, writes, shadowed, _ = process.core.device_counters(process.index)
    answers.append((reads + shadowed, writes))
    process.join()
    return [*answers, process.server.device.save()]


def test_a_conversation_is_the_same_by_socket_and_by_mailbox() -> None:
    took = []
    for through_mailbox in (False, True):
        process = Process(through_mailbox)
        process.start()
        took.append(conversation(process))
        process.close()
    assert took[0] == took[1]
    assert len(set(map(str, took[0]))) > 50


def counters(process: Process) -> tuple[int, int]:
    """Reads that the device has answered, and those that its shadows have."""
    reads, _, shadowed, _ = process.core.device_counters(process.index)
    return reads, shadowed


def test_a_shadow_answers_in_place_of_the_device(process: Process) -> None:
    process.write(4, 0x03)
    process.read(7)
    answers = []
    for _ in range(3):  # there is a shadow of what was ever read
        answers += [process.read(5), process.read(6)]
    assert answers == [0x60, 0xB0] * 3
    assert counters(process) == (3, 4)


def test_only_a_byte_that_the_device_has_shown_is_taken_from_a_shadow(process: Process) -> None:
    process.write(4, 0x03)
    process.read(7)
    process.read(5)
    _, shadowed = counters(process)
    process.read(5, 2)
    process.read(7)
    with pytest.raises(DeviceGone):
        process.core.read(process.index, Space.PORT2, 5, 1)
    assert counters(process)[1] == shadowed


def test_a_shadow_never_passes_a_posted_write(process: Process) -> None:
    process.write(4, 0x10)  # what is sent is received
    process.read(6)  # its delta bits
    for byte in range(256):
        process.write(0, byte)
        assert process.read(5) & 1
        assert process.read(0) == byte
        assert not process.read(5) & 1
    assert counters(process)[1] > 0


def test_an_interrupt_finds_no_shadow_from_before_it() -> None:
    process = Process(True)
    shown: list[int] = []
    page = mmap.mmap(process.mailbox.page, mmap.PAGESIZE)
    serial = process.server.device

    def interrupt() -> None:
        shown.extend(page[at + 1] for at in LSR_AND_MSR)
        os.eventfd_write(FIRST, 1)

    serial._irq = interrupt  # type: ignore[attr-defined]
    process.start()
    process.write(4, 0x0B)  # RTS, OUT2
    process.write(1, 0x01)
    process.read(5)
    process.read(6)
    while not all(page[at + 1] for at in LSR_AND_MSR):  # it waits, and has shown both
        pass
    os.write(process.type, b"k")
    while not process.read(5) & 1:
        pass
    assert shown[:2] == [0, 0]
    page.close()
    process.close()


def test_posted_writes_come_in_order_and_before_a_read(process: Process) -> None:
    for n in range(10_000):
        process.write(7, n & 0xFF)
        if n % 7 == 0:
            assert process.read(7) == n & 0xFF


def test_who_waits_for_one_inside_a_run_is_woken() -> None:
    """Or it would sleep for an eighth of the deadline."""
    process = Process(True)
    for n in range(64):
        process.write(0, n)
    waits = threading.Thread(target=process.write, args=(0, 64))  # for half of the ring, not for all of it
    waits.start()
    page = mmap.mmap(process.mailbox.page, mmap.PAGESIZE)
    while not page[WANTED]:
        pass
    page.close()
    process.start()
    waits.join(3)
    assert not waits.is_alive()
    process.close()


def test_a_marked_write_has_taken_effect(process: Process) -> None:
    process.write(7, 0x5A, posted=False)
    assert process.server.device.read(Space.PORT, 7, 1) == 0x5A


def test_what_was_posted_before_it_looked_is_served(process: Process) -> None:
    other = Process(True)
    for n in range(64):
        other.write(7, n)
    other.start()
    assert other.read(7) == 63
    other.close()


def test_control_messages_are_answered_beside_the_mailbox(process: Process) -> None:
    process.write(7, 0x77)
    process.control.send(wire.encode(wire.Stats()))
    assert isinstance(wire.decode(process.control.recv(4096)), wire.Counters)
    assert process.read(7) == 0x77


def test_output_and_input_go_on_while_the_guest_never_stops(process: Process) -> None:
    process.write(4, 0x03)  # RTS
    os.write(process.type, b"k")
    for byte in b"hello":
        process.write(0, byte)
    while not process.read(5) & 1:
        pass
    assert process.read(0) == ord("k")
    assert os.read(process.shown, 1) == b"h"


def test_the_end_of_the_access_channel_ends_it(process: Process) -> None:
    process.read(7)
    assert isinstance(process.join(), ChannelClosed)


@pytest.mark.parametrize(
    ("space", "offset", "size"), [(0, 8, 1), (0, 7, 2), (1, 0, 1), (99, 0, 1), (0, 2**64 - 1, 8)]
)
def test_an_access_outside_the_devices_registers_never_reaches_the_model(
    process: Process, space: int, offset: int, size: int
) -> None:
    process.core.write(process.index, space, offset, size, 0, True)
    with pytest.raises(DeviceGone):
        process.read(7)
    assert isinstance(process.ended, PeerError)


@pytest.mark.parametrize("value", [256, -1, 2**64, None])
def test_a_value_that_does_not_fit_is_a_bug_of_ours(value: int | None) -> None:
    mailbox = Mailbox.create()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    core = Core(200)
    index = core.add_device(ours.fileno(), mailbox=mailbox)

    class Wrong(Model):
        def read(self, space: int, offset: int, size: int) -> int:
            return value  # type: ignore[return-value]

    waiter = Waiter(*mailbox.fds, {0: 1}, (theirs.fileno(),), (), Wrong(), time.monotonic_ns)

    def ask() -> None:
        with pytest.raises(DeviceGone):
            core.read(index, 0, 0, 1)

    asks = threading.Thread(target=ask)
    asks.start()
    with pytest.raises((OverflowError, TypeError)):
        waiter.serve()
    asks.join()
    mailbox.close()
    ours.close()
    theirs.close()


def test_a_descriptor_is_waited_for_only_while_it_is_wanted() -> None:
    mailbox = Mailbox.create()
    read, write = os.pipe()

    class Reader:
        fd, wants_read, wants_write = read, False, False

    reader = Reader()
    waiter = Waiter(*mailbox.fds, {}, (), (reader,), Model(), time.monotonic_ns)  # type: ignore[arg-type]
    os.write(write, b"x")
    assert not waiter.wait(0)
    assert list(waiter.ready()) == []
    reader.wants_read = True
    assert waiter.wait(None)
    assert list(waiter.ready()) == [(reader, True, False)]
    reader.wants_read = False
    os.close(write)  # a hang-up is reported whether wanted or not
    assert not waiter.wait(0)
    os.close(read)
    mailbox.close()


def test_a_page_that_cannot_be_mapped_is_an_error() -> None:
    with pytest.raises(OSError, match="Bad file"):
        Waiter(-1, -1, {}, (), (), Model(), time.monotonic_ns)
