"""Virtual sockets by a driver that does what Linux's does, over real rings in a real memfd."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devproc.catalog import VSOCK_LINES
from devproc.devices.virtio_vsock import (
    BUF_ALLOC,
    EVENT,
    F_STREAM,
    HEADER,
    HOST_CID,
    HOST_PORT,
    OWED_MAX,
    RX,
    SHUTDOWN_RCV,
    SHUTDOWN_SEND,
    TX,
    TYPE_STREAM,
    Op,
    VirtioVsock,
)
from devproc.virtio import spec
from devproc.virtio.device import BATCH

CID = 3
PLAIN = spec.F_VERSION_1 | F_STREAM
EVERY_RING = spec.F_INDIRECT_DESC | spec.F_EVENT_IDX | spec.F_RING_PACKED
HTTP, EPHEMERAL = 80, 1024
BOTH = SHUTDOWN_RCV | SHUTDOWN_SEND
PEER_BUF = 1 << 16
FAR = 2**32 - 1


class Packet(NamedTuple):
    """A packet of the device; ports as the host has them."""

    op: int
    host_port: int
    guest_port: int
    data: bytes = b""
    type: int = TYPE_STREAM
    flags: int = 0
    buf_alloc: int = BUF_ALLOC
    fwd_cnt: int = 0


class Guest:
    """A driver, and whatever is at the host."""

    def __init__(self, bench: Any, features: int = PLAIN) -> None:
        self.bench = bench("virtio-vsock", cid=CID)
        self.model: VirtioVsock = self.bench.model
        self.operator = self.bench.operator
        self.driver = self.bench.driver()
        self.features = features
        self.driver.start(features)
        self.settle()

    def settle(self) -> None:
        """The device process's loop until nothing moves."""
        moved = True
        while moved:
            moved = False
            self.bench.pump()
            for place in self.operator.lines:
                if place.is_open and (place.incoming or place.hung_up or place.gone) and place.wants_read():
                    place.on_readable()
                    moved = True
                if place.is_open and (place.room or place.gone) and place.wants_write():
                    place.on_writable()
                    moved = True

    def provide(self, count: int = 16, size: int = 4096) -> None:
        for _ in range(count):
            self.driver.queues[RX].request(size)
        self.driver.kick(RX)
        self.settle()

    def send(
        self,
        op: int,
        data: bytes = b"",
        *,
        host_port: int = HTTP,
        guest_port: int = EPHEMERAL,
        type: int = TYPE_STREAM,
        flags: int = 0,
        buf_alloc: int = PEER_BUF,
        fwd_cnt: int = 0,
        src_cid: int = CID,
        dst_cid: int = HOST_CID,
        size: int | None = None,
    ) -> None:
        size = len(data) if size is None else size
        header = HEADER.pack(
            src_cid, dst_cid, guest_port, host_port, size, type, op, flags, buf_alloc, fwd_cnt
        )
        self.raw(*([header, data] if data else [header]))

    def raw(self, *parts: bytes | int) -> None:
        self.driver.queues[TX].request(*parts)
        self.driver.kick(TX)
        self.settle()
        self.driver.queues[TX].used()

    def heard(self) -> list[Packet]:
        packets = []
        for used in self.driver.queues[RX].used():
            src, dst, src_port, dst_port, size, *rest = HEADER.unpack(used.data[: HEADER.size])
            assert (src, dst) == (HOST_CID, CID)
            assert size == len(used.data) - HEADER.size
            type, op, flags, buf_alloc, fwd_cnt = rest
            data = used.data[HEADER.size :]
            packets.append(Packet(op, src_port, dst_port, data, type, flags, buf_alloc, fwd_cnt))
        return packets

    def connect(self, **what: int) -> Any:
        """A connection from the guest to a host program, which is returned."""
        self.send(Op.REQUEST, **what)  # type: ignore[arg-type]
        place = self.operator.connect(dialled=True)
        self.settle()
        (packet,) = self.heard()
        assert packet.op == Op.RESPONSE
        return place

    def call(self, said: bytes = b"CONNECT 1024\n") -> Any:
        """A host program calls, and says something."""
        place = self.operator.connect(dialled=False)
        place.incoming += said
        self.settle()
        return place

    def count(self, name: str) -> int:
        return self.model.counters()[name]


def rst(host_port: int = HTTP, guest_port: int = EPHEMERAL, type: int = TYPE_STREAM) -> Packet:
    return Packet(Op.RST, host_port, guest_port, type=type, buf_alloc=0)


@pytest.fixture
def guest(bench: Any) -> Guest:
    guest = Guest(bench)
    guest.provide()
    return guest


# -- connections from the guest


def test_the_guests_context_id_is_configuration(guest: Guest) -> None:
    assert guest.driver.config(0, 8) == CID


@pytest.mark.parametrize("features", [PLAIN, PLAIN | EVERY_RING], ids=["split", "packed"])
def test_a_program_in_the_guest_talks_with_one_on_the_host(bench: Any, features: int) -> None:
    guest = Guest(bench, features)
    guest.provide()
    guest.send(Op.REQUEST)
    assert guest.operator.numbers == [HTTP] and guest.heard() == []
    host = guest.operator.connect(dialled=True)
    assert guest.heard() == [Packet(Op.RESPONSE, HTTP, EPHEMERAL)]
    guest.send(Op.RW, b"GET /")
    assert host.got == b"GET /"
    host.incoming += b"200"
    guest.settle()
    assert guest.heard() == [Packet(Op.RW, HTTP, EPHEMERAL, b"200", fwd_cnt=5)]


def test_a_port_where_nobody_listens_resets(guest: Guest) -> None:
    guest.send(Op.REQUEST)
    guest.operator.connect(dialled=True, there=False)
    assert guest.heard() == [rst()]


def test_connections_are_told_apart_by_both_ports(guest: Guest) -> None:
    ports = [(80, 1024), (80, 1025), (81, 1024)]
    hosts = [guest.connect(host_port=h, guest_port=g) for h, g in ports]
    for n, (h, g) in enumerate(ports):
        guest.send(Op.RW, b"%d" % n, host_port=h, guest_port=g)
    assert [h.got for h in hosts] == [b"0", b"1", b"2"]
    for n, host in enumerate(hosts):
        host.incoming += b"%d" % n
    guest.settle()
    assert [(p.host_port, p.guest_port, p.data) for p in guest.heard()] == [
        (80, 1024, b"0"), (80, 1025, b"1"), (81, 1024, b"2")
    ]  # fmt: skip


def test_one_that_is_answered_after_the_guest_gave_up_is_hung_up_on(guest: Guest) -> None:
    guest.send(Op.REQUEST)
    guest.send(Op.RST)
    guest.send(Op.REQUEST, host_port=81)
    assert not guest.operator.connect(dialled=True).is_open
    assert guest.operator.connect(dialled=True).is_open
    assert guest.heard() == [Packet(Op.RESPONSE, 81, EPHEMERAL)]


# -- and from the host


def test_a_program_on_the_host_talks_with_one_in_the_guest(guest: Guest) -> None:
    host = guest.call(b"CONNECT 1024\nearly")
    assert guest.heard() == [Packet(Op.REQUEST, HOST_PORT, 1024)]
    assert host.got == b""
    guest.send(Op.RESPONSE, host_port=HOST_PORT)
    assert host.got == b"OK 1073741824\n"
    assert guest.heard() == [Packet(Op.RW, HOST_PORT, 1024, b"early")]
    guest.send(Op.RW, b"welcome", host_port=HOST_PORT)
    assert host.got == b"OK 1073741824\nwelcome"


def test_a_greeting_in_pieces_is_one(guest: Guest) -> None:
    host = guest.call(b"CONN")
    host.incoming += b"ECT 7"
    guest.settle()
    assert guest.heard() == []
    host.incoming += b"\n"
    guest.settle()
    assert guest.heard() == [Packet(Op.REQUEST, HOST_PORT, 7)]


def test_every_caller_has_its_own_port(guest: Guest) -> None:
    guest.connect(host_port=HOST_PORT + 1)
    for _ in range(3):
        guest.call()
    guest.model._next_port = 2 * HOST_PORT - 1
    guest.call()
    guest.call()
    assert [p.host_port - HOST_PORT for p in guest.heard()] == [0, 2, 3, HOST_PORT - 1, 4]


def test_a_guest_that_does_not_listen_closes_the_callers_connection(guest: Guest) -> None:
    host = guest.call()
    guest.send(Op.RST, host_port=HOST_PORT)
    assert not host.is_open and host.got == b""


def test_nobody_reaches_a_guest_without_a_driver(bench: Any) -> None:
    machine = bench("virtio-vsock", cid=CID)
    assert not machine.operator.connect(dialled=False).is_open


# -- credit (5.10.6.3)


def test_the_driver_gets_no_more_than_it_has_room_for(guest: Guest) -> None:
    host = guest.connect(buf_alloc=1000)
    host.incoming += bytes(5000)
    guest.settle()
    *data, request = guest.heard()
    assert sum(len(p.data) for p in data) == 1000
    assert request.op == Op.CREDIT_REQUEST
    guest.send(Op.CREDIT_UPDATE, buf_alloc=1000, fwd_cnt=0)
    assert guest.heard() == []
    guest.send(Op.CREDIT_UPDATE, buf_alloc=1000, fwd_cnt=1000)
    *data, request = guest.heard()
    assert sum(len(p.data) for p in data) == 1000
    assert request.op == Op.CREDIT_REQUEST, "again"
    assert len(host.incoming) == 3000


def test_what_the_driver_has_no_buffers_for_stays_on_the_host(guest: Guest) -> None:
    host = guest.connect()
    guest.provide(1, size=HEADER.size + 3)
    for _ in range(15):
        guest.driver.queues[RX].used()
        host.incoming += b"x"
        guest.settle()
    guest.heard()
    host.incoming += b"abcde"
    guest.settle()
    assert host.incoming == b"de" and not host.wants_read()
    guest.provide(1)
    assert [p.data for p in guest.heard()] == [b"abc", b"de"]


def test_a_turn_without_bytes_costs_no_buffer(bench: Any) -> None:
    guest = Guest(bench)
    guest.provide(2)
    host = guest.connect()
    for _ in range(5):
        host.on_readable()
    host.incoming += b"x"
    guest.settle()
    assert [p.data for p in guest.heard()] == [b"x"]


def test_counters_of_bytes_wrap(guest: Guest) -> None:
    host = guest.connect(fwd_cnt=0)
    (connection,) = guest.model._connections.values()
    connection.tx_cnt = connection.peer_fwd_cnt = FAR - 5
    connection.fwd_cnt = connection.told_fwd_cnt = FAR - 5
    host.incoming += bytes(100)
    guest.settle()
    (packet,) = guest.heard()
    assert len(packet.data) == 100 and connection.peer_free == PEER_BUF - 100
    guest.send(Op.RW, bytes(BUF_ALLOC // 4), fwd_cnt=94)
    assert connection.peer_free == PEER_BUF
    assert guest.heard() == [Packet(Op.CREDIT_UPDATE, HTTP, EPHEMERAL, fwd_cnt=BUF_ALLOC // 4 - 6)]


def test_a_driver_that_asks_for_credit_is_told(guest: Guest) -> None:
    guest.connect()
    guest.send(Op.RW, b"abc")
    guest.send(Op.CREDIT_REQUEST)
    assert guest.heard() == [Packet(Op.CREDIT_UPDATE, HTTP, EPHEMERAL, fwd_cnt=3)]


def test_what_the_host_has_taken_is_credit_again(guest: Guest) -> None:
    host = guest.connect()
    host.room = 10
    guest.send(Op.RW, bytes(BUF_ALLOC))
    assert len(host.got) == 10 and guest.heard() == []
    host.room = BUF_ALLOC // 4 - 10
    guest.settle()
    assert [(p.op, p.fwd_cnt) for p in guest.heard()] == [(Op.CREDIT_UPDATE, BUF_ALLOC // 4)]
    host.room = 1
    guest.settle()
    assert guest.heard() == [], "for one more byte"
    host.room = BUF_ALLOC
    guest.settle()
    assert len(host.got) == BUF_ALLOC


def test_a_packet_of_several_elements_and_half_of_it_taken_keeps_its_order(guest: Guest) -> None:
    host = guest.connect()
    host.room = 7
    header = HEADER.pack(CID, HOST_CID, EPHEMERAL, HTTP, 12, TYPE_STREAM, Op.RW, 0, PEER_BUF, 0)
    guest.raw(header[:20], header[20:] + b"abcd", b"efgh", b"ijkl")
    assert host.got == b"abcdefg"
    host.room = 100
    guest.send(Op.RW, b"mnop")
    assert host.got == b"abcdefghijklmnop"


# -- the end (5.10.6.5)


def test_a_host_that_says_no_more_ends_one_direction(guest: Guest) -> None:
    host = guest.connect()
    host.incoming += b"last"
    host.hung_up = True
    guest.settle()
    data, shutdown = guest.heard()
    assert data.data == b"last"
    assert shutdown == Packet(Op.SHUTDOWN, HTTP, EPHEMERAL, flags=SHUTDOWN_SEND)
    guest.send(Op.RW, b"still")
    assert host.got == b"still"
    guest.send(Op.SHUTDOWN, flags=FAR)
    assert not host.is_open and guest.heard() == [rst()]


def test_a_guest_that_says_no_more_ends_one_direction_once_all_is_written(guest: Guest) -> None:
    host = guest.connect()
    host.room = 0
    guest.send(Op.RW, b"last")
    guest.send(Op.SHUTDOWN, flags=SHUTDOWN_SEND)
    assert host.shut_down == set()
    host.room = 10
    guest.settle()
    assert host.got == b"last" and host.shut_down == {"send"}
    host.incoming += b"answer"
    guest.settle()
    assert [p.data for p in guest.heard()] == [b"answer"]


def test_a_guest_that_listens_no_more_is_told_nothing(guest: Guest) -> None:
    host = guest.connect()
    guest.send(Op.SHUTDOWN, flags=SHUTDOWN_RCV)
    assert host.shut_down == {"receive"}
    host.incoming += b"unheard"
    guest.settle()
    assert guest.heard() == []
    guest.send(Op.RW, b"said")
    assert host.got == b"said"
    guest.send(Op.SHUTDOWN, flags=SHUTDOWN_SEND)
    assert not host.is_open and guest.heard() == [rst()]


def test_a_close_waits_for_what_the_host_has_yet_to_take(guest: Guest) -> None:
    host = guest.connect()
    host.room = 2
    guest.send(Op.RW, b"abcd")
    guest.send(Op.SHUTDOWN, flags=BOTH)
    assert host.is_open and guest.heard() == []
    host.room = 2
    guest.settle()
    assert host.got == b"abcd" and not host.is_open
    assert guest.heard() == [rst()]


@pytest.mark.parametrize("guest_writes", [False, True])
def test_a_host_program_that_dies_resets(bench: Any, guest_writes: bool) -> None:
    guest = Guest(bench)
    guest.provide(2)
    host = guest.connect()
    host.gone = True
    if guest_writes:
        guest.send(Op.RW, b"to nobody")
    guest.settle()
    assert not host.is_open and guest.heard() == [rst()]


# -- save and restore


@pytest.mark.parametrize("features", [PLAIN, PLAIN | EVERY_RING], ids=["split", "packed"])
def test_a_restored_device_tells_its_driver_that_connections_are_gone(bench: Any, features: int) -> None:
    guest = Guest(bench, features)
    guest.driver.queues[EVENT].request(8)
    guest.provide()
    host = guest.connect()
    saved = guest.model.save()
    guest.send(Op.RW, b"saving changes nothing")
    assert host.is_open and host.got

    twin = Guest.__new__(Guest)
    twin.__dict__ |= guest.__dict__
    twin.bench = type(guest.bench)("virtio-vsock", guest.bench.memory, cid=CID)
    twin.model, twin.operator = twin.bench.model, twin.bench.operator
    saved = guest.model.save()
    twin.model.restore(saved)
    assert twin.model.save() == saved, "it is still to be told"
    twin.driver.function = twin.model
    twin.settle()
    assert [used.data for used in twin.driver.queues[EVENT].used()] == [bytes(4)]
    twin.send(Op.RW, b"old")
    assert twin.heard() == [rst()]
    assert twin.connect(guest_port=5).is_open
    assert b'"interrupted":true' in saved


def test_without_connections_there_is_nothing_to_tell(guest: Guest) -> None:
    guest.driver.queues[EVENT].request(4)
    guest.model.restore(guest.model.save())
    guest.settle()
    assert guest.driver.queues[EVENT].used() == []


def test_an_event_waits_for_a_buffer(guest: Guest) -> None:
    guest.connect()
    guest.model.restore(guest.model.save())
    guest.settle()
    for _ in range(2):
        guest.driver.queues[EVENT].request(4)
        guest.driver.notify(EVENT)
    assert [used.data for used in guest.driver.queues[EVENT].used()] == [bytes(4)], "once"


def test_a_driver_that_starts_anew_needs_no_event(guest: Guest) -> None:
    guest.connect()
    guest.model.restore(guest.model.save())
    guest.driver.start(PLAIN)
    guest.driver.queues[EVENT].request(4)
    guest.settle()
    assert guest.driver.queues[EVENT].used() == []


# -- threats


@pytest.mark.parametrize(
    "packet",
    [
        {"src_cid": 4},
        {"src_cid": HOST_CID},
        {"src_cid": CID | 1 << 32},
        {"dst_cid": 1},
        {"dst_cid": HOST_CID | 1 << 32},
        {"size": 1},
        {"size": FAR},
    ],
)
def test_a_packet_of_others_or_longer_than_its_chain_is_dropped(guest: Guest, packet: Any) -> None:
    """Threat 1."""
    guest.send(Op.REQUEST, **packet)
    assert guest.operator.numbers == [] and guest.heard() == []
    assert guest.count("bad_packets") == 1


@pytest.mark.parametrize("parts", [(bytes(HEADER.size - 1),), (4096,), (bytes(HEADER.size), 1)])
def test_what_is_no_packet_is_dropped(guest: Guest, parts: tuple[bytes | int, ...]) -> None:
    """Threat 1."""
    guest.raw(*parts)
    assert guest.count("bad_packets") == 1 and guest.heard() == []
    assert not guest.driver.status & spec.DEVICE_NEEDS_RESET


def test_a_header_is_read_once(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threat 2."""
    host = guest.connect()
    reads = []
    copy_out = type(guest.bench.memory).copy_out

    def counted(memory: Any, spans: Any, limit: int) -> bytes:
        reads.extend(spans)
        return copy_out(memory, spans, limit)

    monkeypatch.setattr(type(guest.bench.memory), "copy_out", counted)
    host.room = 0
    guest.driver.queues[TX].add(
        [guest.driver.queues[TX].place(HEADER.pack(3, 2, EPHEMERAL, HTTP, 1, 1, Op.RW, 0, 9, 0) + b"x")], []
    )
    guest.driver.kick(TX)
    first = reads[0].gpa
    assert [span.gpa for span in reads] == [first, first + HEADER.size]


@pytest.mark.parametrize("op", [Op.RESPONSE, Op.SHUTDOWN, Op.RW, Op.CREDIT_UPDATE, Op.CREDIT_REQUEST, 0, 99])
def test_a_packet_to_no_connection_resets(guest: Guest, op: int) -> None:
    """Threat 3."""
    guest.send(op)
    assert guest.heard() == [rst()]


def test_a_reset_of_no_connection_is_not_answered(guest: Guest) -> None:
    """Threat 3."""
    guest.send(Op.RST)
    guest.send(Op.RST, type=2)
    assert guest.heard() == []


@pytest.mark.parametrize("type", [0, 2, 0xFFFF])
def test_an_unknown_type_resets_itself_and_no_stream(guest: Guest, type: int) -> None:
    """Threat 3."""
    host = guest.connect()
    for op in (Op.REQUEST, Op.RW):
        guest.send(op, type=type)
        assert [p._replace(buf_alloc=0) for p in guest.heard()] == [rst(type=type)]
    guest.send(Op.RST, type=type)
    guest.send(Op.RW, b"alive")
    assert host.got == b"alive"


@pytest.mark.parametrize("op", [Op.REQUEST, Op.RESPONSE, 0, 8])
def test_a_packet_out_of_turn_ends_the_connection(guest: Guest, op: int) -> None:
    """Threat 3."""
    host = guest.connect()
    guest.send(op)
    assert guest.heard() == [rst()] and not host.is_open


@pytest.mark.parametrize("op", [Op.REQUEST, Op.RESPONSE, Op.RW, Op.SHUTDOWN])
def test_a_packet_before_the_host_has_answered_ends_the_connection(guest: Guest, op: int) -> None:
    """Threat 3."""
    guest.send(Op.REQUEST)
    guest.send(op)
    assert guest.heard() == [rst()]
    assert not guest.operator.connect(dialled=True).is_open


@pytest.mark.parametrize("op", [Op.REQUEST, Op.RW, Op.SHUTDOWN, Op.CREDIT_UPDATE])
def test_a_packet_before_the_guests_own_answer_ends_the_connection(guest: Guest, op: int) -> None:
    """Threat 3."""
    host = guest.call()
    guest.heard()
    guest.send(op, host_port=HOST_PORT)
    assert guest.heard() == [rst(HOST_PORT)] and not host.is_open


def test_bytes_after_a_shutdown_end_the_connection(guest: Guest) -> None:
    """Threat 3."""
    guest.connect()
    guest.send(Op.SHUTDOWN, flags=SHUTDOWN_SEND)
    guest.send(Op.RW, b"more")
    assert guest.heard() == [rst()]


def test_more_bytes_than_there_is_credit_for_end_the_connection(guest: Guest) -> None:
    """Threat 4."""
    host = guest.connect()
    host.room = 0
    guest.send(Op.RW, bytes(BUF_ALLOC - 1))
    guest.send(Op.RW, b"1")
    (connection,) = guest.model._connections.values()
    assert len(connection.unsent) == BUF_ALLOC and host.is_open
    guest.send(Op.RW, b"2")
    assert guest.heard() == [rst()] and not host.is_open


@pytest.mark.parametrize(("buf_alloc", "fwd_cnt"), [(0, 0), (PEER_BUF, 1), (FAR, FAR), (0, FAR), (1, 2)])
def test_credit_that_cannot_be_does_no_harm(guest: Guest, buf_alloc: int, fwd_cnt: int) -> None:
    """Threat 5."""
    host = guest.connect(buf_alloc=buf_alloc, fwd_cnt=fwd_cnt)
    (connection,) = guest.model._connections.values()
    assert 0 <= connection.peer_free <= buf_alloc
    guest.provide(64)
    host.incoming += bytes(1 << 17)
    guest.settle()
    assert sum(len(p.data) for p in guest.heard()) <= buf_alloc
    other = guest.connect(guest_port=5)
    other.incoming += b"x"
    guest.provide(2)
    assert guest.heard()[-1].op == Op.RW
    guest.send(Op.RW, b"fine", guest_port=5)
    assert other.got == b"fine"


def test_there_are_no_more_connections_than_places(guest: Guest) -> None:
    """Threat 6."""
    for port in range(VSOCK_LINES - 2):
        guest.connect(guest_port=port)
        guest.provide(1)
    caller = guest.call(b"")
    guest.send(Op.REQUEST, guest_port=1000)
    guest.send(Op.REQUEST, guest_port=1001)
    assert guest.heard() == [rst(HTTP, 1001)]
    guest.send(Op.RST, guest_port=1000)
    guest.send(Op.REQUEST, guest_port=1002)
    assert guest.heard() == [rst(HTTP, 1002)], "one is still on its way"
    guest.operator.connect(dialled=True)
    guest.connect(guest_port=1003)
    assert guest.operator.connect(dialled=False) is None, "nor can a host program have more"
    caller.incoming += b"nonsense\n"
    guest.settle()
    guest.send(Op.REQUEST, guest_port=1004)
    assert guest.operator.connect(dialled=True).is_open


def test_an_exchange_that_is_busy_resets(guest: Guest) -> None:
    """Threat 6."""
    guest.operator.busy = True
    guest.send(Op.REQUEST)
    assert guest.heard() == [rst()]


def test_a_flood_without_buffers_for_the_answers_stops_being_read(bench: Any) -> None:
    """Threat 7."""
    guest = Guest(bench)
    for port in range(OWED_MAX + 100):
        guest.send(Op.RW, host_port=port)
    ring = guest.driver.queues[TX]
    assert len(guest.model._owed) == OWED_MAX
    assert ring.outstanding == 100
    assert guest.model.deadline_ns is None, "it waits, and does not ask again and again"
    answers = []
    while len(answers) < OWED_MAX + 100:
        guest.provide(200, size=64)
        heard = guest.heard()
        assert heard
        answers += heard
    assert [p.host_port for p in answers] == list(range(OWED_MAX + 100))
    ring.used()
    assert ring.outstanding == 0


def test_a_flood_is_over_with_a_reset(bench: Any) -> None:
    """Threat 7."""
    guest = Guest(bench)
    for port in range(OWED_MAX + 1):
        guest.send(Op.RW, host_port=port)
    guest.driver.start(PLAIN)
    guest.settle()
    guest.provide()
    assert guest.heard() == []
    guest.send(Op.RW)
    assert guest.heard() == [rst()]


def test_an_answer_to_a_connection_that_is_over_is_not_owed(bench: Any) -> None:
    """Threat 7."""
    guest = Guest(bench)
    guest.send(Op.REQUEST)
    guest.operator.connect(dialled=True)
    guest.send(Op.RST)
    guest.provide()
    assert guest.heard() == []


def test_the_same_answer_is_owed_once(bench: Any) -> None:
    """Threat 7."""
    guest = Guest(bench)
    for _ in range(1000):
        guest.send(Op.RW)
    guest.provide()
    assert guest.heard() == [rst()]


def test_bytes_without_end_leave_turns_to_others(guest: Guest) -> None:
    """Threat 8."""
    guest.provide(200, size=HEADER.size + 1)
    first, second = guest.connect(), guest.connect(guest_port=5)
    guest.driver.queues[RX].used()
    first.incoming += bytes(1000)
    second.incoming += b"x"
    first.on_readable()
    assert len(guest.heard()) <= BATCH
    second.on_readable()
    assert [p.guest_port for p in guest.heard()] == [5]


def test_packets_without_end_leave_turns_to_others(guest: Guest) -> None:
    """Threat 8."""
    guest.connect()
    ring = guest.driver.queues[TX]
    for _ in range(BATCH + 1):
        ring.request(HEADER.pack(CID, HOST_CID, EPHEMERAL, HTTP, 0, 1, Op.RW, 0, 9, 0))
    guest.driver.kick(TX)
    assert len(ring.used()) == BATCH and guest.model.deadline_ns == 0
    guest.settle()
    assert len(ring.used()) == 1


@pytest.mark.parametrize("parts", [(HEADER.size,), (1,), (b"readable", 4096)])
def test_a_receive_buffer_that_takes_no_packet_needs_a_reset(
    bench: Any, parts: tuple[bytes | int, ...]
) -> None:
    """Threat 9."""
    guest = Guest(bench)
    guest.driver.queues[RX].request(*parts)
    guest.driver.kick(RX)
    guest.send(Op.RW)
    assert guest.driver.status & spec.DEVICE_NEEDS_RESET


def test_an_event_buffer_that_takes_no_event_needs_a_reset(guest: Guest) -> None:
    """Threat 9."""
    guest.driver.queues[EVENT].request(3)
    guest.connect()
    guest.model.restore(guest.model.save())
    guest.settle()
    assert guest.driver.status & spec.DEVICE_NEEDS_RESET


def test_a_reset_closes_connections_of_every_stage(guest: Guest) -> None:
    """Threat 10."""
    open_ = guest.connect()
    guest.send(Op.REQUEST, guest_port=5)
    requested, greeted = guest.call(), guest.call(b"CONN")
    guest.driver.reset()
    assert not any(place.is_open for place in (open_, requested, greeted))
    guest.driver.start(PLAIN)
    guest.settle()
    guest.provide()
    guest.send(Op.REQUEST, guest_port=5)
    assert not guest.operator.connect(dialled=True).is_open, "the one of before"
    assert guest.heard() == []
    assert guest.operator.connect(dialled=True).is_open
    assert guest.heard() == [Packet(Op.RESPONSE, HTTP, 5)]
    guest.call()
    assert guest.heard() == [Packet(Op.REQUEST, HOST_PORT, 1024)]


def test_a_host_program_that_takes_nothing_holds_up_nobody_else(guest: Guest) -> None:
    """Threat 11."""
    slow, other = guest.connect(), guest.connect(guest_port=5)
    slow.room = 0
    guest.send(Op.RW, bytes(BUF_ALLOC))
    guest.send(Op.RW, b"quick", guest_port=5)
    assert other.got == b"quick" and slow.got == b""


@pytest.mark.parametrize(
    "said",
    [
        b"\n",
        b"CONNECT\n",
        b"CONNECT -1\n",
        b"CONNECT 4294967296\n",
        b"connect 5\n",
        b"CONNECT 5 \n",
        b"CONNECT 5\r\n",
        b"CONNECT \xd9\xa1\n",
        b"CONNECT 00000000005\n",
        b"x" * 100,
    ],
)
def test_a_host_program_that_says_anything_else_is_hung_up_on(guest: Guest, said: bytes) -> None:
    """Threat 12."""
    assert not guest.call(said).is_open
    assert guest.heard() == []


@pytest.mark.parametrize("how", ["hung_up", "gone"])
def test_a_host_program_that_goes_before_it_has_said_whom_it_wants_leaves_its_place(
    guest: Guest, how: str
) -> None:
    """Threat 12."""
    host = guest.call(b"CONNECT 1")
    setattr(host, how, True)
    guest.settle()
    assert not host.is_open and guest.heard() == []


@pytest.mark.parametrize("how", [("gone", True), ("room", 3)])
def test_a_host_program_that_goes_before_the_guest_has_answered_resets(
    guest: Guest, how: tuple[str, Any]
) -> None:
    """Threat 12."""
    host = guest.call()
    guest.heard()
    setattr(host, *how)
    guest.send(Op.RESPONSE, host_port=HOST_PORT)
    assert guest.heard() == [rst(HOST_PORT)] and not host.is_open


chunks = st.lists(st.binary(min_size=1, max_size=300), max_size=8)


@given(
    sent=chunks,
    received=chunks,
    rooms=st.lists(st.integers(1, 500), max_size=8),
    buf_alloc=st.integers(20, 500),
    buffer=st.integers(HEADER.size + 20, 500),
    packed=st.booleans(),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_byte_arrives_in_order_whatever_the_room(
    bench: Any,
    sent: list[bytes],
    received: list[bytes],
    rooms: list[int],
    buf_alloc: int,
    buffer: int,
    packed: bool,
) -> None:
    guest = Guest(bench, PLAIN | (EVERY_RING if packed else 0))
    guest.provide(4)
    host = guest.connect(buf_alloc=buf_alloc)
    host.room = 0
    host.incoming += b"".join(received)
    got = b""
    credit = {"buf_alloc": buf_alloc}
    for data in sent:
        guest.send(Op.RW, data, **credit, fwd_cnt=len(got))  # type: ignore[arg-type]
    for room in (*rooms, 1 << 20):
        host.room = room
        guest.settle()
    assert host.got == b"".join(sent)
    while len(got) < sum(map(len, received)):
        guest.provide(min(8, guest.driver.queues[RX].free), buffer)
        data = b"".join(p.data for p in guest.heard() if p.op == Op.RW)
        assert len(data) <= buf_alloc
        got += data
        guest.send(Op.CREDIT_UPDATE, **credit, fwd_cnt=len(got))  # type: ignore[arg-type]
    assert got == b"".join(received)
