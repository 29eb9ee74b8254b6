"""The exit loop's end of a mailbox, against a page that the other end fills with whatever it likes."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvmcore.exitloop import Core, DeviceGone, Route
from kvmcore.mailbox import Mailbox

PATIENT_MS, IMPATIENT_MS = 30_000, 300
POSTED, WANTED, DONE, ASLEEP, DEVICE_CPU, VALUE, RING = 0, 4, 64, 68, 72, 80, 256  # _mailbox.h
SLOTS, SLOT = 64, 32
SYS_FUTEX, FUTEX_WAKE = 202, 1

libc = ctypes.CDLL(None)


class Peer:
    """A device process that has nothing but the page."""

    def __init__(self, deadline_ms: int) -> None:
        self.core = Core(deadline_ms)
        ours, self.access = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.mailbox = Mailbox.create()
        self.page = mmap.mmap(self.mailbox.page, mmap.PAGESIZE)
        self._words = (ctypes.c_uint32 * (mmap.PAGESIZE // 4)).from_buffer(self.page)
        self.index = self.core.add_device(ours.fileno(), mailbox=self.mailbox)
        ours.close()
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def get(self, at: int) -> int:
        return self._words[at // 4]

    def set(self, at: int, value: int) -> None:
        self._words[at // 4] = value  # at once, which struct.pack_into is not
        if at == DONE:
            libc.syscall(SYS_FUTEX, ctypes.byref(self._words, DONE), FUTEX_WAKE, 1, None, None, 0)

    def set_value(self, value: int) -> None:
        struct.pack_into("=Q", self.page, VALUE, value)

    def request(self, number: int) -> tuple[int, ...]:
        """(offset, data, space, tag, size, posted)."""
        offset, data, _, *rest = struct.unpack_from("=QQQIBBB", self.page, RING + (number - 1) % SLOTS * SLOT)
        return offset, data, *rest

    def meanwhile(self, act: Callable[[], object]) -> None:
        """Do it again and again until the test is over."""

        def loop() -> None:
            while not self._over.is_set():
                act()
                time.sleep(0)  # the GIL, which whoever waits in C does not have

        self._threads.append(threading.Thread(target=loop))
        self._threads[-1].start()

    def read(self, size: int = 1) -> int:
        return self.core.read(self.index, 0, 0, size)

    def write(self, data: int = 0, *, posted: bool = True) -> None:
        self.core.write(self.index, 0, 0, 1, data, posted)

    def close(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        self.core.mark_dead(self.index)
        self.access.close()
        del self._words
        self.page.close()
        self.mailbox.close()


@pytest.fixture(params=[PATIENT_MS])
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    peer = Peer(request.param)
    yield peer
    peer.close()


impatient = pytest.mark.parametrize("peer", [IMPATIENT_MS], indirect=True)
half_patient = pytest.mark.parametrize("peer", [4000], indirect=True)  # looks at the channel eight times


def test_the_page_cannot_change_its_size(peer: Peer) -> None:
    for size in (0, 2 * mmap.PAGESIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(peer.mailbox.page, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(peer.mailbox.page, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_a_request_says_what_the_frame_would(peer: Peer) -> None:
    peer.core.write(peer.index, 8, 0x1122334455667788, 4, 0x99AABBCC, True)
    assert peer.get(POSTED) == 1
    assert peer.request(1) == (0x1122334455667788, 0x99AABBCC, 8, 2, 4, 1)
    peer.meanwhile(lambda: peer.set(DONE, peer.get(POSTED)))
    peer.core.write(peer.index, 0, 1, 2, 3, False)
    peer.core.read(peer.index, 3, 4, 8)
    assert (peer.request(2), peer.request(3)) == ((1, 3, 0, 2, 2, 0), (4, 0, 3, 1, 8, 0))


def test_a_sleeper_is_woken_once(peer: Peer) -> None:
    peer.write()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(peer.mailbox.bell)
    peer.set(ASLEEP, 1)
    peer.write()
    peer.write()
    assert os.eventfd_read(peer.mailbox.bell) == 1
    assert peer.get(ASLEEP) == 0


def test_a_bell_that_rings_already_does_not_hold_the_vcpu_up(peer: Peer) -> None:
    os.eventfd_write(peer.mailbox.bell, 2**64 - 2)
    peer.set(ASLEEP, 1)
    peer.write()


def test_the_value_of_the_request_is_taken(peer: Peer) -> None:
    def answer() -> None:
        posted = peer.get(POSTED)
        peer.set_value(0x80 + posted)
        peer.set(DONE, posted)

    peer.meanwhile(answer)
    assert [peer.read() for _ in range(100)] == [0x80 + n for n in range(1, 101)]


def gone(peer: Peer, access: Callable[[], object]) -> str:
    """What the device dies of, within its deadline by a wide margin for a busy machine, and stays dead of."""
    with pytest.raises(DeviceGone) as e:
        access()
    with pytest.raises(DeviceGone) as again:
        peer.write()
    assert again.value.cause == e.value.cause
    return e.value.cause


@impatient
def test_silence_is_death(peer: Peer) -> None:
    assert gone(peer, peer.read) == "it did not answer in time"


@impatient
def test_a_full_mailbox_that_is_not_emptied_is_death(peer: Peer) -> None:
    for _ in range(SLOTS):
        peer.write()
    assert gone(peer, peer.write) == "it did not answer in time"
    assert peer.get(POSTED) == SLOTS


@pytest.mark.parametrize("peer", [500], indirect=True)
def test_coalesced_writes_wait_together_for_one_deadline(peer: Peer) -> None:
    """A device that makes room just in time, again and again, holds nobody up for longer."""
    count = (mmap.PAGESIZE - 8) // 24 - 1  # KVM_COALESCED_MMIO_MAX, less the one that stays free
    fd = os.memfd_create("ring")
    os.write(fd, struct.pack("=II", 0, count) + count * struct.pack("=QII8s", 0x600, 1, 1, b"x"))
    os.ftruncate(fd, mmap.PAGESIZE)
    peer.core.set_routes([Route.device(0x600, 8, peer.index, 0)], [])
    peer.core.coalesce(fd, 0, peer.index)
    os.close(fd)

    def make_room() -> None:
        time.sleep(0.3)
        peer.set(DONE, peer.get(POSTED) - SLOTS // 2)

    peer.meanwhile(make_room)
    assert gone(peer, peer.core.drain) == "it did not answer in time"


@pytest.mark.parametrize("done", [2, 65, 0x80000000, 0x80000001, 0xFFFFFFFF - SLOTS])
def test_what_was_never_asked_cannot_be_answered(peer: Peer, done: int) -> None:
    peer.meanwhile(lambda: peer.set(DONE, done))
    assert gone(peer, peer.read) == "its reply is not one"


@pytest.mark.parametrize(("size", "value"), [(1, 256), (2, 1 << 16), (4, 1 << 32), (1, 2**64 - 1)])
def test_a_value_that_does_not_fit_is_death(peer: Peer, size: int, value: int) -> None:
    peer.set_value(value)
    peer.meanwhile(lambda: peer.set(DONE, peer.get(POSTED)))
    assert gone(peer, lambda: peer.read(size)) == "its reply is not one"


@impatient
def test_going_backwards_gets_nobody_an_answer(peer: Peer) -> None:
    peer.set(DONE, 0)
    for _ in range(3):
        peer.write()
    peer.set(DONE, 3)
    peer.meanwhile(lambda: peer.set(DONE, 1))
    assert gone(peer, peer.read) == "it did not answer in time"


@impatient
def test_scribbling_all_over_the_page_holds_nobody_beyond_the_deadline(peer: Peer) -> None:
    def scribble() -> None:
        number = peer.get(DONE)
        for at in range(0, mmap.PAGESIZE, 4):
            if at != DONE:
                peer.set(at, ~number if at != VALUE + 4 else 0)
        peer.set(DONE, peer.get(POSTED) ^ 1 if number & 1 else number - 1)

    peer.meanwhile(scribble)
    with pytest.raises(DeviceGone):
        for _ in range(1000):
            peer.read(8)


@impatient
def test_a_device_that_says_it_is_elsewhere_is_spun_for_only_a_moment(peer: Peer) -> None:
    peer.set(DEVICE_CPU, 4095)
    assert gone(peer, peer.read) == "it did not answer in time"


@half_patient
def test_a_closed_access_channel_is_noticed_while_waiting(peer: Peer) -> None:
    peer.access.close()
    assert gone(peer, peer.read) == "it closed its access channel"


@half_patient
def test_nothing_is_said_over_the_channel_beside_a_mailbox(peer: Peer) -> None:
    peer.access.send(b"\x92\x03\x07")
    assert gone(peer, peer.read) == "its reply is not one"


def test_a_device_given_up_wakes_who_waits_for_it() -> None:
    peer = Peer(PATIENT_MS)
    peer.core = core = Core(60_000)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    index = core.add_device(ours.fileno(), mailbox=peer.mailbox)
    causes: list[str] = []

    def access() -> None:
        try:
            core.read(index, 0, 0, 1)
        except DeviceGone as e:
            causes.append(e.cause)

    accessor = threading.Thread(target=access)
    accessor.start()
    while not peer.get(WANTED):  # it is about to sleep, or sleeps
        time.sleep(0.001)
    core.mark_dead(index)
    accessor.join(5)
    assert causes == ["it was given up"]
    ours.close()
    theirs.close()
    peer.index = 0
    peer.close()


def test_a_posted_write_does_not_wait_for_who_waits_for_an_answer(peer: Peer) -> None:
    values: list[int] = []
    reader = threading.Thread(target=lambda: values.append(peer.read()))
    reader.start()
    while not peer.get(WANTED):  # it is about to sleep, or sleeps
        time.sleep(0.001)
    for data in range(SLOTS - 1):
        peer.write(data)
    assert peer.get(POSTED) == SLOTS
    peer.set_value(7)
    peer.set(DONE, 1)
    reader.join()
    assert values == [7]


def test_a_reader_is_answered_whatever_others_post_meanwhile(peer: Peer) -> None:
    def answer() -> None:
        number = peer.get(DONE) + 1
        if number <= peer.get(POSTED):
            offset, _, _, tag, *_ = peer.request(number)
            if tag == 1:
                peer.set_value(offset)
            peer.set(DONE, number)

    def post() -> None:
        while not over.is_set():
            peer.write()

    over = threading.Event()
    writer = threading.Thread(target=post)
    peer.meanwhile(answer)
    writer.start()
    numbers = range(3 * SLOTS)
    try:
        assert [peer.core.read(peer.index, 0, n, 1) for n in numbers] == list(numbers)
    finally:
        over.set()
        writer.join()


def test_the_ring_is_used_again_and_again(peer: Peer) -> None:
    def answer() -> None:
        number = peer.get(POSTED)
        if number != peer.get(DONE):
            offset, *_ = peer.request(number)
            peer.set_value(offset)
            peer.set(DONE, number)

    peer.meanwhile(answer)
    numbers = range(3 * SLOTS)
    assert [peer.core.read(peer.index, 0, n, 1) for n in numbers] == list(numbers)


@pytest.mark.parametrize("fds", [(-2, 0), (0, -2)])
def test_what_is_no_mailbox_is_refused(fds: tuple[int, int]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mailbox = Mailbox.create()
    wrong = Mailbox(*(1000 + fd if fd < 0 else mailbox.fds[n] for n, fd in enumerate(fds)))
    with pytest.raises(OSError, match="access channel"):
        Core().add_device(ours.fileno(), mailbox=wrong)
    mailbox.close()
    ours.close()
    theirs.close()
