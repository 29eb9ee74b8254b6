"""A disk as its driver sees it: real rings, and a real file that takes and gives the bytes."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from struct import pack
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devproc.backends.disk import Disk
from devproc.devices import virtio_blk as blk
from devproc.driver import PciDriver, Used
from devproc.virtio import spec
from devproc.virtio.chain import Span
from devproc.virtio.device import BATCH
from devproc.virtio.split import SplitQueue

V1 = spec.F_VERSION_1
EVERY_RING = V1 | spec.F_INDIRECT_DESC | spec.F_EVENT_IDX | spec.F_RING_PACKED
OURS = blk.F_FLUSH | blk.F_DISCARD | blk.F_WRITE_ZEROES | blk.F_SEG_MAX | blk.F_SIZE_MAX
SIZE = 8 << 20
SECTORS = SIZE // 512
S = 10**9
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
NEEDS_RESET = spec.DEVICE_NEEDS_RESET


class Recorder:
    """The disk port in front of a real one: what was asked of it, and it fails on demand."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.asked: list[str] = []
        self.fails = 0

    @property
    def size(self) -> int:
        return self.disk.size

    def serve(self, ring: Any, left: int, least: int, *, writable: bool) -> tuple[int, int, int]:
        if self.fails:
            return left, 0, 0
        left, reads, writes = self.disk.serve(ring, left, least, writable=writable)
        self.asked += ["read"] * reads + ["write"] * writes
        return left, reads, writes

    def __getattr__(self, name: str) -> Any:
        def ask(*args: Any, **kwargs: Any) -> Any:
            self.asked.append(name)
            if self.fails:
                raise OSError(self.fails, os.strerror(self.fails))
            return getattr(self.disk, name)(*args, **kwargs)

        return ask


class Guest:
    """A driver that has brought the disk up; `plain`: what is, is served in C."""

    def __init__(
        self, bench: Any, features: int = V1 | OURS, start: bool = True, plain: bool = True, **params: Any
    ) -> None:
        self.bench = bench("virtio-blk", **params)
        self.model = self.bench.model
        self.image = self.bench.image
        self.disk = self.model._disk = Recorder(self.model._disk)
        if plain and self.model._plain is not None:
            self.model._plain = self.disk
        elif not plain:
            self.model._plain, self.model.make_split = None, SplitQueue
        self.driver: PciDriver = self.bench.driver()
        if start:
            self.driver.start(features)
            self.bench.pump()

    @property
    def queue(self) -> Any:
        return self.driver.queues[0]

    def ask(self, kind: int, sector: int, *parts: bytes | int) -> None:
        """Make a request available and notify."""
        self.queue.request(pack("<IIQ", kind, 0, sector), *parts, 1)
        self.bench.kick("kick", 0)

    def done(self) -> Used:
        (used,) = self.queue.used()
        self.queue.interrupts(1)
        return used

    def status(self, kind: int, sector: int, *parts: bytes | int) -> int:
        """What becomes of a request; its data are not looked at."""
        used_room = sum(p for p in parts if isinstance(p, int))
        at = self.queue.room(0).gpa
        self.ask(kind, sector, *parts)
        self.done()
        end = at + 16 + sum(len(p) for p in parts if isinstance(p, bytes)) + used_room
        return int(self.bench.memory.read(end, 1)[0])

    def content(self) -> bytes:
        return os.pread(self.image, SIZE + 4096, 0)

    def fill(self, seed: int = 1) -> bytes:
        data = random.Random(seed).randbytes(SIZE)
        os.pwrite(self.image, data, 0)
        return data


@pytest.fixture(params=[True, False], ids=["C", "python"])
def guest(bench: Any, request: pytest.FixtureRequest) -> Guest:
    return Guest(bench, plain=request.param)


def ranges(*segments: tuple[int, int, int]) -> bytes:
    return b"".join(pack("<QII", *s) for s in segments)


# -- what it is


def test_it_is_a_modern_block_device_with_its_configuration(bench: Any) -> None:
    driver = Guest(bench, block_size=4096, queues=3, start=False).driver
    assert driver.function.read(2, 2, 2) == 0x1042
    assert driver.config(0, 4) == SECTORS
    assert driver.config(4, 4) == 0
    assert (driver.config(8, 4), driver.config(12, 4)) == (blk.SIZE_MAX, blk.SEG_MAX)
    assert driver.config(20, 4) == 4096
    assert driver.config(34, 2) == 3
    assert [driver.config(at, 4) for at in range(36, 56, 4)] == [1 << 21, 1, 8, 1 << 16, 1]
    assert driver.config(56, 1) == 1
    assert driver.offered() & blk.F_MQ


def test_padding_is_zero(guest: Guest) -> None:
    """5.2.5.2: unused0 and unused1."""
    assert [guest.driver.config(at, 1) for at in (33, 57, 58, 59)] == [0] * 4


@pytest.mark.parametrize(
    ("params", "offered", "not_offered"),
    [
        ({}, blk.F_FLUSH | blk.F_DISCARD | blk.F_WRITE_ZEROES, blk.F_RO | blk.F_MQ),
        ({"sparse": 0}, blk.F_FLUSH | blk.F_WRITE_ZEROES, blk.F_DISCARD),
        ({"read_only": 1}, blk.F_FLUSH | blk.F_RO, blk.F_DISCARD | blk.F_WRITE_ZEROES),
    ],
)
def test_features_are_what_the_image_allows(bench: Any, params: Any, offered: int, not_offered: int) -> None:
    """5.2.5.2: F_FLUSH is always there."""
    features = Guest(bench, start=False, **params).driver.offered()
    assert features & offered == offered
    assert not features & not_offered


@pytest.mark.parametrize("packed", [0, 1])
def test_packed_rings_are_offered_where_they_are_asked_for(bench: Any, packed: int) -> None:
    guest = Guest(bench, start=False, packed=packed)
    assert bool(guest.driver.offered() & spec.F_RING_PACKED) == packed


# -- requests


@pytest.mark.parametrize("features", [V1 | OURS, EVERY_RING | OURS], ids=["split", "packed"])
def test_what_is_written_is_in_the_image_and_read_back(bench: Any, features: int) -> None:
    guest = Guest(bench, features)
    expected = bytearray(guest.fill())
    data = os.urandom(3 * 512)
    guest.ask(OUT, 100, data)
    assert guest.done().data == b"\0"
    expected[100 * 512 : 103 * 512] = data
    assert guest.content() == expected
    guest.ask(IN, 99, 5 * 512)
    used = guest.done()
    assert used.data == expected[99 * 512 : 104 * 512] + b"\0"
    assert guest.bench.edges == {"irq1": 2}


def test_the_framing_is_the_driver_s(guest: Guest) -> None:
    """Threat 4 (2.7.4): the header in three pieces, data in pieces, the status with the last of them."""
    expected = guest.fill()
    header = pack("<IIQ", IN, 0, 7)
    guest.queue.request(header[:1], header[1:9], header[9:], 5, 512, 1024 - 5 + 1)
    guest.queue.request(pack("<IIQ", OUT, 0, 0) + expected[512:700], expected[700:1024], 1)
    guest.bench.kick("kick", 0)
    read, _ = guest.queue.used()
    assert read.data == expected[7 * 512 : 10 * 512] + b"\0"
    assert guest.content()[:512] == expected[512:1024]


def test_an_empty_transfer_succeeds(guest: Guest) -> None:
    assert guest.status(IN, 5) == OK
    assert guest.status(OUT, SECTORS) == OK


def test_a_flush_is_the_host_s(guest: Guest) -> None:
    assert guest.status(OUT, 0, bytes(512)) == OK
    assert guest.disk.asked == ["write"]
    assert guest.status(FLUSH, 0) == OK
    assert guest.disk.asked == ["write", "flush"]


@pytest.mark.parametrize("kind", [OUT, WRITE_ZEROES])
def test_without_flush_a_write_is_stable_when_it_is_done(bench: Any, kind: int) -> None:
    """Threat 10 (5.2.6.2)."""
    guest = Guest(bench, V1 | blk.F_WRITE_ZEROES)
    guest.ask(kind, 0, bytes(512) if kind == OUT else ranges((0, 1, 0)))
    assert guest.disk.asked[-1] == "flush"


def test_the_id_is_padded(bench: Any) -> None:
    guest = Guest(bench, id=b"disk of the test")
    guest.ask(GET_ID, 0, 20)
    assert guest.done().data == b"disk of the test\0\0\0\0\0"
    guest = Guest(bench, id=b"a" * 20)
    guest.ask(GET_ID, 0, 8)
    assert guest.done().data == b"a" * 8 + b"\0"


def test_discarded_room_is_the_host_s_again(guest: Guest) -> None:
    expected = bytearray(guest.fill())
    before = os.fstat(guest.image).st_blocks
    assert guest.status(DISCARD, 0, ranges((8, 80, 0))) == OK
    assert before - os.fstat(guest.image).st_blocks == 80
    expected[8 * 512 : 88 * 512] = bytes(80 * 512)
    assert guest.content() == expected


@pytest.mark.parametrize("unmap", [0, 1])
def test_zeroes_are_zeroes_mapped_or_not(guest: Guest, unmap: int) -> None:
    """5.2.6.2: whether unmap is set or not."""
    expected = bytearray(guest.fill())
    before = os.fstat(guest.image).st_blocks
    assert guest.status(WRITE_ZEROES, 0, ranges((8, 80, unmap))) == OK
    expected[8 * 512 : 88 * 512] = bytes(80 * 512)
    assert guest.content() == expected
    assert before - os.fstat(guest.image).st_blocks == 80 * unmap


def test_an_image_that_is_not_sparse_keeps_its_room(bench: Any) -> None:
    guest = Guest(bench, V1 | blk.F_WRITE_ZEROES, sparse=0)
    guest.fill()
    before = os.fstat(guest.image).st_blocks
    assert guest.driver.config(56, 1) == 0
    assert guest.status(WRITE_ZEROES, 0, ranges((8, 80, 1))) == OK
    assert os.fstat(guest.image).st_blocks == before


# -- threats


@pytest.mark.parametrize(
    ("sector", "size"),
    [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        ((1 << 64) - 1, 512),
        (1 << 55, 512),  # 2^64 bytes
        ((1 << 55) - 1, 1024),
        (1 << 63, 512),
    ],
)
def test_what_lies_outside_the_disk_is_not_touched(guest: Guest, sector: int, size: int) -> None:
    """Threat 1."""
    before = guest.fill()
    assert guest.status(IN, sector, size) == IOERR
    assert guest.status(OUT, sector, bytes(size)) == IOERR
    assert guest.status(DISCARD, 0, ranges((sector, size // 512, 0))) == IOERR
    assert guest.status(WRITE_ZEROES, 0, ranges((sector, size // 512, 1))) == IOERR
    assert guest.disk.asked == []
    assert guest.content() == before


def test_a_failed_read_claims_no_data(guest: Guest) -> None:
    """2.7.8.2: what is counted as written is there."""
    guest.ask(IN, SECTORS, 512)
    assert guest.done().written == 0


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (DISCARD, ()),
        (WRITE_ZEROES, ()),
        (IN, (511,)),
        (IN, (513,)),
        (OUT, (bytes(100),)),
        (IN, (bytes(512), 512)),
        (IN, (bytes(512),)),
        (OUT, (bytes(512), 512)),
        (OUT, (512,)),
        (FLUSH, (bytes(512),)),
        (FLUSH, (512,)),
        (GET_ID, (21,)),
        (GET_ID, (b"x", 20)),
    ],
)
def test_data_of_the_wrong_size_or_direction_are_an_error(guest: Guest, kind: int, parts: Any) -> None:
    """Threat 2."""
    assert guest.status(kind, 0, *parts) == IOERR
    assert guest.disk.asked == []


def test_more_than_the_segments_that_are_offered_is_an_error(guest: Guest) -> None:
    """Threat 2."""
    header, room = guest.queue.place(pack("<IIQ", IN, 0, 0)), guest.queue.room(1)
    spans = [Span(8 << 20, 1 << 20)] * 16
    guest.queue.add([header], [*spans, Span(8 << 20, blk.DATA_MAX + 512 - (16 << 20) + (1 << 20)), room])
    guest.bench.kick("kick", 0)
    assert guest.disk.asked == []
    assert guest.bench.memory.read(room.gpa, 1) == b"\1"


@pytest.mark.parametrize("parts", [(bytes(16),), (bytes(15), 1), (1,), (bytes(15), 4096)])
def test_a_request_without_header_or_status_stops_the_device(guest: Guest, parts: Any) -> None:
    """Threat 3."""
    guest.queue.request(*parts)
    guest.queue.request(pack("<IIQ", FLUSH, 0, 0), 1)
    guest.bench.kick("kick", 0)
    assert guest.driver.status & NEEDS_RESET
    assert guest.disk.asked == []
    guest.driver.start(V1 | OURS)
    assert guest.status(FLUSH, 0) == OK


def test_the_header_is_read_once(bench: Any) -> None:
    """Threat 5; in C see integration/fuzz/ring.c."""
    guest = Guest(bench, plain=False)
    copies: list[Any] = []
    memory = guest.model.memory

    class Watched:
        def __getattr__(self, name: str) -> Any:
            if name in ("copy_out", "read"):
                copies.append(name)
            return getattr(memory, name)

    guest.model.memory = Watched()
    guest.ask(OUT, 0, bytes(512))
    assert copies == ["copy_out"]
    copies.clear()
    guest.ask(WRITE_ZEROES, 0, ranges((0, 1, 0)))
    assert copies == ["copy_out", "copy_out"]


def test_a_read_only_disk_refuses_every_write(bench: Any) -> None:
    """Threat 6 (5.2.6.2)."""
    guest = Guest(bench, V1 | blk.F_RO | blk.F_FLUSH, read_only=1)
    assert guest.status(OUT, 0, bytes(512)) == IOERR
    assert guest.status(DISCARD, 0, ranges((0, 1, 0))) == UNSUPP
    assert guest.status(WRITE_ZEROES, 0, ranges((0, 1, 0))) == UNSUPP
    assert guest.disk.asked == []
    assert guest.status(IN, 0, 512) == OK
    assert guest.status(FLUSH, 0) == OK


@pytest.mark.parametrize(
    ("kind", "data", "status"),
    [
        (DISCARD, ranges((0, 8, 1)), UNSUPP),  # 5.2.6.2: unmap, in a discard
        (DISCARD, ranges((0, 8, 2)), UNSUPP),
        (WRITE_ZEROES, ranges((0, 8, 2)), UNSUPP),
        (WRITE_ZEROES, ranges((0, 8, 1 << 31)), UNSUPP),
        (DISCARD, ranges((0, 8, 0), (8, 8, 0)), IOERR),  # max_discard_seg is 1
        (WRITE_ZEROES, bytes(15), IOERR),
        (DISCARD, ranges((0, 0xFFFF_FFFF, 0)), IOERR),
        (WRITE_ZEROES, ranges((0, blk.ZEROES_MAX // 512 + 1, 0)), IOERR),
    ],
)
def test_ranges_that_are_not_allowed_are_refused(guest: Guest, kind: int, data: bytes, status: int) -> None:
    """Threat 7."""
    assert guest.status(kind, 0, data) == status
    assert guest.disk.asked == []


@pytest.mark.parametrize("kind", [2, 3, 5, 7, 10, 14, 15, 16, 24, 0x80000000, 0xFFFFFFFF])
def test_an_unknown_request_is_unsupported(guest: Guest, kind: int) -> None:
    """5.2.6.2: SECURE_ERASE, GET_LIFETIME and everything for zones too."""
    assert guest.status(kind, 0) == UNSUPP
    assert guest.status(kind, 0, 512) == UNSUPP
    assert guest.status(kind, 0, bytes(512)) == UNSUPP


def test_what_was_not_negotiated_is_unsupported(bench: Any) -> None:
    guest = Guest(bench, V1)
    assert guest.status(DISCARD, 0, ranges((0, 8, 0))) == UNSUPP
    assert guest.status(WRITE_ZEROES, 0, ranges((0, 8, 0))) == UNSUPP


@pytest.mark.parametrize("why", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_the_host_s_errors_are_the_request_s(guest: Guest, why: int) -> None:
    """Threat 8."""
    guest.disk.fails = why
    for _ in range(2 * blk._LOGGED_MAX):
        assert guest.status(OUT, 0, bytes(512)) == IOERR
    assert guest.status(IN, 0, 512) == IOERR
    assert guest.status(FLUSH, 0) == IOERR
    guest.disk.fails = 0
    assert guest.status(OUT, 0, bytes(512)) == OK
    assert guest.bench.said == [f"a request failed: {os.strerror(why)}"] * blk._LOGGED_MAX


def test_an_image_that_became_shorter_fails_and_stays_so(guest: Guest) -> None:
    """Threat 8."""
    os.truncate(guest.image, SIZE // 2)
    assert guest.status(OUT, SECTORS // 2, bytes(512)) == IOERR
    assert guest.status(IN, SECTORS // 2 - 1, 1024) == IOERR
    assert guest.status(WRITE_ZEROES, 0, ranges((SECTORS // 2, 8, 1))) == IOERR
    assert guest.status(OUT, 0, bytes(512)) == OK
    assert os.fstat(guest.image).st_size == SIZE // 2


def test_requests_are_served_in_turns(guest: Guest) -> None:
    """Threat 9."""
    for _ in range(BATCH + 10):
        guest.queue.request(pack("<IIQ", FLUSH, 0, 0), 1)
    guest.driver.notify(0)
    assert len(guest.queue.used()) == BATCH
    guest.bench.pump()
    assert len(guest.queue.used()) == 10


def test_large_requests_are_fewer_in_a_turn(guest: Guest) -> None:
    """Threat 9."""
    header, status = guest.queue.place(pack("<IIQ", IN, 0, 0)), guest.queue.room(1)
    for _ in range(8):
        guest.queue.add([header], [Span(8 << 20, 1 << 20), status])
    guest.driver.notify(0)
    assert len(guest.queue.used()) == 4


def test_the_limit_of_requests_holds(bench: Any) -> None:
    """Threat 9."""
    guest = Guest(bench, iops=100)
    for _ in range(50):
        guest.queue.request(pack("<IIQ", FLUSH, 0, 0), 1)
    guest.driver.notify(0)
    assert len(guest.queue.used()) == 11  # a tenth of a second's
    guest.bench.advance(S // 10)
    assert len(guest.queue.used()) == 10
    guest.bench.advance(S)
    assert len(guest.queue.used()) == 29


def test_the_limit_of_bytes_holds_for_data_alone(bench: Any) -> None:
    """Threat 9."""
    guest = Guest(bench, bps=1 << 20)
    header, status = guest.queue.place(pack("<IIQ", IN, 0, 0)), guest.queue.room(1)
    for _ in range(4):
        guest.queue.add([header], [Span(8 << 20, 1 << 20), status])
    guest.driver.notify(0)
    assert len(guest.queue.used()) == 1  # and now it is in debt
    guest.bench.advance(S - S // 10)
    assert len(guest.queue.used()) == 1
    guest.bench.advance(10 * S)
    assert len(guest.queue.used()) == 2


def test_a_reset_forgets_requests_that_wait(bench: Any) -> None:
    guest = Guest(bench, iops=10)
    for _ in range(5):
        guest.queue.request(pack("<IIQ", OUT, 0, 0), bytes(512), 1)
    guest.driver.notify(0)
    before = len(guest.disk.asked)
    guest.driver.reset()
    guest.bench.advance(10 * S)
    assert len(guest.disk.asked) == before < 5


class Twin:
    """The same driver twice, of the disk in C and of the one in Python."""

    def __init__(self, bench: Any, features: int, **params: Any) -> None:
        self.guests = [Guest(bench, features, plain=plain, **params) for plain in (True, False)]
        for guest in self.guests:
            os.pwrite(guest.image, bytes(range(251)) * 4001, 0)

    def of_each(self, what: Callable[[Guest], Any]) -> Any:
        ours, reference = map(what, self.guests)
        assert ours == reference
        return ours

    def batch(self, requests: list[tuple[int, int, list[int], list[int], int]]) -> None:
        """Requests: type, sector, sizes of readable and of writable elements, and where the header is cut."""

        def ask(guest: Guest) -> Any:
            guest.queue.interrupts(1)
            for kind, sector, out, into, cut in requests:
                header = pack("<IIQ", kind, 0, sector & (1 << 64) - 1)
                parts = [bytes([kind + 1]) * n for n in out]
                headers = [header[:cut], header[cut:]] if cut else [header]
                if guest.queue.free >= len(headers + parts + into):
                    guest.queue.request(*headers, *parts, *into)
            guest.bench.kick("kick", 0)
            memory = guest.bench.memory
            rings = memory.read(guest.driver.gpa, 64 << 10)
            edges, said = dict(guest.bench.edges), list(guest.bench.said)
            return guest.queue.used(), rings, edges, said, guest.model.counters(), guest.driver.status

        self.of_each(ask)


sizes = st.sampled_from([512, 512, 512, 1024, 4096, 100, 412, 1])
requests = st.tuples(
    st.sampled_from([IN, IN, IN, OUT, OUT, OUT, FLUSH, GET_ID, DISCARD, 2]),
    st.sampled_from([0, 1, 7, 100, 1000, SECTORS - 8, SECTORS - 1, SECTORS, -1, 1 << 55, 1 << 63]),
    st.lists(sizes, max_size=3),
    st.lists(sizes, max_size=3),
    st.sampled_from([0, 0, 0, 0, 5]),
    st.sampled_from([[1], [1], [1], [1], [], [17]]),
    st.booleans(),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([V1 | OURS, V1 | OURS | spec.F_EVENT_IDX, V1]),
    st.booleans(),
    st.lists(st.lists(requests, max_size=8), max_size=4),
    st.integers(1, SIZE),
)
def test_what_is_plain_or_not_ends_the_same_in_c_and_in_python(
    bench: Any, features: int, read_only: bool, batches: list[list[Any]], end: int
) -> None:
    """Answers, image, rings, interrupts, counters; also of an image that has become shorter."""
    if read_only:
        features &= ~(blk.F_DISCARD | blk.F_WRITE_ZEROES)
    twin = Twin(bench, features, read_only=int(read_only))
    for number, batch in enumerate(batches):
        if number == 2:
            twin.of_each(lambda guest: os.truncate(guest.image, end))
        asked = []
        for kind, sector, out, into, cut, status, usual in batch:
            inward = [*(into if kind == IN or not usual else []), *status]
            asked.append((kind, sector, out if kind == OUT or not usual else [], inward, cut))
        twin.batch(asked)
    twin.of_each(Guest.content)


def test_plain_requests_are_served_without_python(guest: Guest) -> None:
    walked = []
    pop = guest.model.pop
    guest.model.pop = lambda index: walked.append(chain := pop(index)) or chain
    expected = bytearray(guest.fill())
    for sector in range(20):
        guest.queue.request(pack("<IIQ", OUT, 0, 2 * sector), bytes([sector]) * 512, 1)
        guest.queue.request(pack("<IIQ", IN, 0, 2 * sector), 1024, 1, indirect=False)
        expected[1024 * sector : 1024 * sector + 512] = bytes([sector]) * 512
    guest.bench.kick("kick", 0)
    used = guest.queue.used()
    assert [u.data[:-1] for u in used[1::2]] == [expected[1024 * n : 1024 * (n + 1)] for n in range(20)]
    assert {u.data[-1] for u in used} == {OK}
    assert guest.content()[:SIZE] == expected
    assert len(walked) == (1 if guest.model._plain else 41)


def test_plain_requests_get_their_turn_and_no_more(guest: Guest) -> None:
    """Threat 9: in number, and in bytes."""
    for size, served in ((512, BATCH), (1 << 20, 4)):
        header, status = guest.queue.place(pack("<IIQ", IN, 0, 0)), guest.queue.room(1)
        for _ in range(min(served + 5, guest.queue.free // 3)):
            guest.queue.add([header], [Span(8 << 20, size), status])
        guest.driver.notify(0)
        assert len(guest.queue.used()) == served
        guest.bench.pump()
        assert len(guest.queue.used()) == 5


def test_every_queue_is_served(bench: Any) -> None:
    guest = Guest(bench, V1 | OURS | blk.F_MQ, queues=4)
    for index, queue in enumerate(guest.driver.queues):
        queue.request(pack("<IIQ", FLUSH, 0, 0), 1)
        guest.bench.kick("kick", index)
        assert [u.data for u in queue.used()] == [b"\0"]
    assert guest.bench.edges == {f"irq{n}": 1 for n in range(1, 5)}


def test_a_limited_disk_goes_on_after_it_is_restored(bench: Any) -> None:
    guest = Guest(bench, iops=10)
    for _ in range(5):
        guest.queue.request(pack("<IIQ", FLUSH, 0, 0), 1)
    guest.driver.notify(0)
    served = len(guest.queue.used())
    other = guest.bench.fork()
    other.pump()
    assert served + len(guest.queue.used()) == 5


def test_a_larger_disk_is_told_to_its_driver(guest: Guest) -> None:
    generation = guest.driver.get(spec.CONFIG_GENERATION, 1)
    guest.fill()
    before = guest.content()
    assert guest.status(IN, SECTORS, 512) == IOERR
    guest.model.set("capacity", SECTORS + 8)
    assert guest.bench.edges["irq0"] == 1
    assert guest.driver.get(spec.CONFIG_GENERATION, 1) != generation
    assert guest.driver.config(0, 4) == guest.model.counters()["capacity"] == SECTORS + 8
    assert guest.content() == before + bytes(4096)
    assert guest.status(OUT, SECTORS + 7, b"new!" * 128) == OK
    assert guest.content()[-512:] == b"new!" * 128
    assert guest.status(OUT, SECTORS + 8, bytes(512)) == IOERR


def test_a_disk_does_not_become_smaller(guest: Guest) -> None:
    guest.model.set("capacity", SECTORS - 1)
    assert guest.driver.config(0, 4) == SECTORS
    assert os.fstat(guest.image).st_size == SIZE
    assert guest.bench.said == [
        f"it keeps its {SIZE} bytes, not {SIZE - 512}: a disk does not become smaller"
    ]
    assert "irq0" not in guest.bench.edges


def test_a_disk_that_is_as_large_already_tells_nobody(guest: Guest) -> None:
    guest.disk.disk.length += 100  # no whole sector
    guest.model.set("capacity", SECTORS)
    assert "irq0" not in guest.bench.edges
    assert guest.bench.said == []


def test_a_host_without_room_leaves_the_disk_as_it_is(guest: Guest) -> None:
    guest.disk.fails = errno.EFBIG
    guest.model.set("capacity", SECTORS + 8)
    assert guest.driver.config(0, 4) == SECTORS
    assert guest.bench.said == [f"it keeps its {SIZE} bytes, not {SIZE + 4096}: File too large"]
    assert "irq0" not in guest.bench.edges


def test_what_was_done_is_counted(guest: Guest) -> None:
    guest.status(IN, 0, 512)
    guest.status(OUT, 0, bytes(512))
    guest.status(OUT, SECTORS, bytes(512))
    counts = guest.model.counters()
    assert [counts[name] for name in ("in", "out", "flush", "refused_requests", "host_errors")] == [
        1, 1, 0, 1, 0,
    ]  # fmt: skip
