"""The network card: real rings in real memory, and a cable whose far end the test holds."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devproc.devices import virtio_net as net
from devproc.devices.virtio_net import (
    CTRL_ERR,
    CTRL_MAX,
    CTRL_OK,
    FRAME_MAX,
    GUEST_OFFLOADS,
    HEADER,
    Command,
    VirtioNet,
)
from devproc.driver import NotReady, Used
from devproc.virtio import spec
from devproc.virtio.chain import Span
from devproc.virtio.device import BATCH

V1 = spec.F_VERSION_1
EVERY_RING = spec.F_INDIRECT_DESC | spec.F_EVENT_IDX | spec.F_RING_PACKED
PLAIN = V1 | net.F_MAC | net.F_STATUS | net.F_CTRL_VQ | net.F_CTRL_RX | net.F_CTRL_MAC_ADDR
OFFLOADS = (
    GUEST_OFFLOADS
    | net.F_CTRL_GUEST_OFFLOADS
    | net.F_CSUM
    | net.F_HOST_TSO4
    | net.F_HOST_TSO6
    | net.F_HOST_ECN
)
FULL = PLAIN | OFFLOADS | net.F_MRG_RXBUF
MAC = b"\x02net\0\1"
OTHER = b"\x02net\0\2"
PEER = b"\x02host\0"
RX, TX, CTRL = 0, 1, 2
CONFIG_STATUS = 6


def frame(payload: bytes = b"hello", to: bytes = MAC) -> bytes:
    return to + PEER + b"\x08\x00" + payload


def header(
    flags: int = 0,
    gso: int = 0,
    hdr_len: int = 0,
    gso_size: int = 0,
    start: int = 0,
    offset: int = 0,
    buffers: int = 0,
) -> bytes:
    return HEADER.pack(flags, gso, hdr_len, gso_size, start, offset, buffers)


NOTHING = header()
ONE_BUFFER = header(buffers=1)


class Guest:
    """A driver with its queues up, on a bench; `plain`: frames that are, are moved in C."""

    def __init__(self, bench: Any, features: int = FULL, size: int = 0, plain: bool = True) -> None:
        self.bench = bench
        self.model: VirtioNet = bench.model
        self.cables = bench.ports["link"]
        self.cable = self.cables[0]
        for cable in self.cables:
            cable.plain = plain
        self.driver = bench.driver()
        self.driver.start(features, size=size)
        self.queues = self.driver.queues
        bench.pump()

    def provide(self, *sizes: int) -> None:
        """Receive buffers."""
        for size in sizes:
            self.queues[RX].request(size)
        self.driver.kick(RX)

    def arrive(self, *frames: bytes, cable: int = 0) -> None:
        """Frames, with headers, from the host; the card takes what it wants."""
        port = self.cables[cable]
        port.incoming += frames
        while port.incoming and port.wanted():
            before = len(port.incoming)
            port.on_frame()
            if len(port.incoming) == before:
                assert not port.wanted(), "watched, readable and not read: a busy loop"

    def received(self, queue: int = RX) -> list[Used]:
        return self.queues[queue].used()

    def frames(self, queue: int = RX) -> list[bytes]:
        """What was received, merged; without the headers."""
        found, used = [], self.received(queue)
        while used:
            count = HEADER.unpack_from(used[0].data)[-1]
            assert 1 <= count <= len(used)
            found.append(b"".join(u.data for u in used[:count])[HEADER.size :])
            del used[:count]
        return found

    def send(self, *parts: bytes, queue: int = TX, indirect: bool = False) -> None:
        self.queues[queue].request(*parts, indirect=indirect)
        self.driver.kick(queue)

    def command(self, command: int, data: bytes = b"", queue: int = CTRL) -> int:
        self.queues[queue].request(command.to_bytes(2, "big"), *([data] if data else []), 1)
        self.driver.notify(queue)
        (used,) = self.queues[queue].used()
        return used.data[0]

    def count(self, name: str) -> int:
        return self.model.counters()[name]

    @property
    def failed(self) -> bool:
        return bool(self.driver.status & spec.DEVICE_NEEDS_RESET)


@pytest.fixture(params=["split", "packed", "plain"])
def guest(request: pytest.FixtureRequest, bench: Any) -> Guest:
    rings = EVERY_RING if request.param == "packed" else 0
    return Guest(bench("virtio-net"), FULL | rings, plain=request.param == "plain")


@pytest.fixture
def plain(bench: Any) -> Guest:
    """Without offloads, without merged buffers."""
    return Guest(bench("virtio-net"), PLAIN)


# -- what is offered


def test_a_tap_offers_offloads_and_one_pair_of_queues(bench: Any) -> None:
    offered = bench("virtio-net").driver().offered()
    assert offered & OFFLOADS == OFFLOADS
    assert not offered & (net.F_MQ | net.F_MTU)


@pytest.mark.parametrize("packed", [0, 1])
def test_packed_rings_are_offered_where_they_are_asked_for(bench: Any, packed: int) -> None:
    offered = bench("virtio-net", packed=packed).driver().offered()
    assert bool(offered & spec.F_RING_PACKED) == packed


def test_an_mtu_and_more_queues_are_offered_where_there_are_some(bench: Any) -> None:
    driver = bench("virtio-net", mtu=9000, pairs=3).driver()
    assert driver.offered() & (net.F_MQ | net.F_MTU) == net.F_MQ | net.F_MTU
    assert (driver.config(8, 2), driver.config(10, 2)) == (3, 9000)


@pytest.mark.parametrize(
    "features",
    [
        net.F_GUEST_TSO4,
        net.F_GUEST_TSO6,
        net.F_GUEST_CSUM | net.F_GUEST_ECN,
        net.F_HOST_TSO4,
        net.F_HOST_TSO6,
        net.F_CSUM | net.F_HOST_ECN,
        net.F_CTRL_RX,
        net.F_CTRL_MAC_ADDR,
        net.F_MQ,
    ],
    ids=hex,
)
def test_a_feature_without_the_one_it_needs_is_not_accepted(bench: Any, features: int) -> None:
    """Threat 12; 5.1.3.1."""
    driver = bench("virtio-net", pairs=2).driver()
    with pytest.raises(NotReady):
        driver.negotiate(V1 | features)


def test_the_address_is_in_the_configuration(guest: Guest) -> None:
    assert bytes(guest.driver.config(i, 1) for i in range(6)) == MAC
    assert guest.driver.config(CONFIG_STATUS, 2) == net.S_LINK_UP


# -- receiving


def test_a_frame_arrives_behind_a_header_of_one_buffer(guest: Guest) -> None:
    guest.provide(1526)
    guest.arrive(NOTHING + frame())
    (used,) = guest.received()
    assert used.data == ONE_BUFFER + frame()
    assert guest.bench.edges["irq1"] == 1


def test_a_driver_without_merged_buffers_gets_a_header_of_one_buffer_too(plain: Guest) -> None:
    """5.1.6.4.1."""
    plain.provide(1526)
    plain.arrive(NOTHING + frame())
    assert plain.received()[0].data == ONE_BUFFER + frame()


def test_a_long_frame_is_spread_over_buffers(guest: Guest) -> None:
    long = frame(bytes(range(256)) * 20)
    guest.provide(*[1000] * 8)
    guest.arrive(NOTHING + long)
    used = guest.received()
    assert HEADER.unpack_from(used[0].data)[-1] == len(used) == 6
    assert [u.written for u in used[:-1]] == [1000] * 5
    assert b"".join(u.data for u in used)[HEADER.size :] == long
    guest.arrive(NOTHING + frame(b"next"))
    assert guest.frames() == [frame(b"next")]


@pytest.mark.parametrize("sizes", [(12, 6, 1, 2000), (13, 13, 13, 13), (12,) * 4], ids=str)
def test_buffers_may_be_as_small_as_a_header(guest: Guest, sizes: tuple[int, ...]) -> None:
    """5.1.6.3.1."""
    guest.provide(*sizes)
    guest.arrive(NOTHING + frame())
    if min(sizes) < HEADER.size:
        assert guest.failed
    else:
        assert guest.frames() == [frame()]


def test_a_buffer_may_be_in_pieces(guest: Guest) -> None:
    guest.queues[RX].request(1, 11, 3, 4, 500)
    guest.driver.kick(RX)
    guest.arrive(NOTHING + frame())
    assert guest.frames() == [frame()]


def test_a_merged_frame_waits_for_buffers(guest: Guest) -> None:
    long = frame(b"x" * 3000)
    guest.provide(1000, 1000)
    guest.arrive(NOTHING + long, NOTHING + frame(b"next"))
    assert guest.received() == []
    assert not guest.cable.wanted()
    guest.provide(1000)
    assert guest.received() == []
    guest.provide(1000, 1000)
    guest.arrive()
    assert guest.frames() == [long, frame(b"next")]


def test_a_frame_for_which_the_whole_ring_is_too_small_is_dropped(bench: Any) -> None:
    """Threat 4."""
    guest = Guest(bench("virtio-net"), size=4)
    guest.provide(*[100] * 4)
    guest.arrive(NOTHING + frame(b"x" * 500), NOTHING + frame())
    assert guest.frames() == [frame()]
    assert guest.count("rx_dropped") == 1


@pytest.mark.parametrize("plain", [True, False])
def test_a_card_goes_on_after_the_frame_for_which_its_ring_is_too_small(bench: Any, plain: bool) -> None:
    """The driver, which has no buffer left to give, would never notify it."""
    guest = Guest(bench("virtio-net"), size=4, plain=plain)
    guest.provide(*[100] * 4)
    guest.arrive(NOTHING + frame(b"x" * 500))
    guest.arrive(NOTHING + frame())
    assert guest.frames() == [frame()]


def test_a_frame_is_never_cut_off(plain: Guest) -> None:
    """Threat 4."""
    plain.provide(100, 200)
    plain.arrive(NOTHING + frame(b"x" * 150), NOTHING + frame())
    assert [u.data for u in plain.received()] == [ONE_BUFFER + frame()]
    assert plain.count("rx_dropped") == 1


@pytest.mark.parametrize("size", [13, FRAME_MAX + 1, 2 * FRAME_MAX])
def test_what_is_no_frame_is_not_delivered(guest: Guest, size: int) -> None:
    guest.provide(*[65562] * 4)
    guest.arrive(NOTHING + MAC + bytes(size - 6), NOTHING + frame())
    assert guest.frames() == [frame()]
    assert guest.count("rx_dropped") == 1


def test_the_longest_frame_is_delivered(guest: Guest) -> None:
    longest = frame(bytes(FRAME_MAX - 14))
    guest.provide(FRAME_MAX, 100)
    guest.arrive(NOTHING + longest)
    assert guest.frames() == [longest]


def test_a_packet_that_exceeds_the_mtu_is_not_delivered_unless_in_segments(bench: Any) -> None:
    """5.1.4.1."""
    guest = Guest(bench("virtio-net", mtu=1500), FULL | net.F_MTU)
    guest.provide(*[9000] * 4)
    segments = header(net.HDR_NEEDS_CSUM, net.GSO_TCPV4, 54, 1448, 34, 16)
    guest.arrive(NOTHING + frame(bytes(1505)), NOTHING + frame(bytes(1500)), segments + frame(bytes(8000)))
    assert [len(f) - 14 for f in guest.frames()] == [1500, 8000]
    assert guest.count("rx_dropped") == 1


@pytest.mark.parametrize("parts", [(b"readable", 1526), (11,), (b"readable",)], ids=str)
def test_a_buffer_that_cannot_take_a_frame_stops_the_card(guest: Guest, parts: tuple[Any, ...]) -> None:
    """Threat 5."""
    guest.queues[RX].request(*parts)
    guest.driver.kick(RX)
    guest.arrive(NOTHING + frame())
    assert guest.failed
    assert not guest.cable.wanted()
    assert "receive buffer" in guest.bench.said[0]


def test_without_merged_buffers_one_must_take_header_and_address(plain: Guest) -> None:
    """Threat 5."""
    plain.provide(17)
    plain.arrive(NOTHING + frame())
    assert plain.failed


def test_without_buffers_the_host_is_not_read(guest: Guest) -> None:
    """Threat 6."""
    guest.arrive(NOTHING + frame())
    assert not guest.cable.wanted()
    assert len(guest.cable.incoming) == 1
    guest.provide(1526, 1526)
    assert guest.cable.wanted()
    assert guest.frames() == [frame()]


def test_a_flood_is_taken_in_turns(guest: Guest) -> None:
    """Threat 7."""
    guest.provide(*[100] * 200)
    guest.cable.incoming += [NOTHING + frame()] * 150
    guest.cable.on_frame()
    assert len(guest.received()) == BATCH
    assert guest.model.deadline_ns == 0
    guest.bench.pump()
    assert len(guest.received()) == 150 - BATCH


@pytest.mark.parametrize(
    ("given", "offloads"),
    [
        (header(flags=net.HDR_NEEDS_CSUM, start=34, offset=16), 0),
        (header(flags=net.HDR_NEEDS_CSUM, gso=net.GSO_TCPV4, gso_size=1448), net.F_GUEST_CSUM),
        (
            header(flags=net.HDR_NEEDS_CSUM, gso=net.GSO_TCPV6, gso_size=1448),
            net.F_GUEST_CSUM | net.F_GUEST_TSO4,
        ),
        (header(flags=1, gso=net.GSO_TCPV4 | net.GSO_ECN, gso_size=9), net.F_GUEST_CSUM | net.F_GUEST_TSO4),
        (header(flags=1, gso=net.GSO_ECN, gso_size=9), GUEST_OFFLOADS),
        (header(flags=1, gso=3, gso_size=9), GUEST_OFFLOADS),
    ],
)
def test_a_frame_that_needs_offloads_no_longer_wanted_is_dropped(
    guest: Guest, given: bytes, offloads: int
) -> None:
    """Threat 11."""
    assert guest.command(Command.GUEST_OFFLOADS_SET, offloads.to_bytes(8, "little")) == CTRL_OK
    guest.provide(1526)
    guest.arrive(given + frame())
    assert guest.received() == []
    assert guest.count("rx_dropped") == 1


def test_a_frame_with_offloads_that_are_wanted_keeps_its_header(guest: Guest) -> None:
    guest.provide(1526)
    guest.arrive(header(1, net.GSO_TCPV4 | net.GSO_ECN, 54, 1448, 34, 16) + frame())
    assert guest.received()[0].data == header(1, net.GSO_TCPV4 | net.GSO_ECN, 54, 1448, 34, 16, 1) + frame()


def test_a_driver_that_does_not_know_checksums_hears_nothing_of_them(plain: Guest) -> None:
    """5.1.6.4.1."""
    plain.provide(1526)
    plain.arrive(header(flags=net.HDR_DATA_VALID) + frame())
    assert plain.received()[0].data == ONE_BUFFER + frame()


# -- transmitting


def test_a_frame_is_sent_as_the_driver_made_it(guest: Guest) -> None:
    guest.send(NOTHING + frame())
    guest.send(NOTHING, frame(b"split"))
    guest.send(NOTHING[:5], NOTHING[5:] + frame()[:3], frame()[3:])
    assert guest.cable.sent == [NOTHING + frame(), NOTHING + frame(b"split"), NOTHING + frame()]
    assert [u.written for u in guest.queues[TX].used()] == [0, 0, 0]
    assert guest.bench.edges["irq2"] >= 1


CSUM = header(flags=net.HDR_NEEDS_CSUM, start=34, offset=16)
TSO = header(net.HDR_NEEDS_CSUM, net.GSO_TCPV4, 54, 1448, 34, 16)


@pytest.mark.parametrize("given", [CSUM, TSO, header(1, net.GSO_TCPV6 | net.GSO_ECN, 74, 1428, 54, 16)])
def test_offloads_that_were_negotiated_reach_the_host(guest: Guest, given: bytes) -> None:
    guest.send(given + frame(bytes(4000)))
    assert guest.cable.sent == [given + frame(bytes(4000))]


@pytest.mark.parametrize(
    ("given", "without"),
    [
        (CSUM, net.F_CSUM | net.F_HOST_TSO4 | net.F_HOST_TSO6 | net.F_HOST_ECN),
        (TSO, net.F_HOST_TSO4),
        (header(1, net.GSO_TCPV6, 54, 1448, 34, 16), net.F_HOST_TSO6),
        (header(1, net.GSO_TCPV4 | net.GSO_ECN, 54, 1448, 34, 16), net.F_HOST_ECN),
        (header(1, 3, 54, 1448, 34, 16), 0),  # UDP
        (header(1, 5, 54, 1448, 34, 16), 0),
        (header(1, net.GSO_ECN, 54, 1448, 34, 16), 0),
        (header(0, net.GSO_TCPV4, 54, 1448, 34, 16), 0),  # 5.1.6.2.1: NEEDS_CSUM goes with it
        (header(1, net.GSO_TCPV4, 54, 0, 34, 16), 0),
        (header(1, net.GSO_TCPV4, 54, 65535, 34, 16), 0),
        (header(1, start=13, offset=16), 0),
        (header(1, start=4012, offset=1), 0),
        (header(1, start=0xFFFF, offset=0xFFFF), 0),
        (header(1, start=34, offset=0xFFFF), 0),
        (b"\xff" * 12, 0),
    ],
)
def test_a_header_that_asks_for_too_much_is_never_sent(bench: Any, given: bytes, without: int) -> None:
    """Threat 1."""
    guest = Guest(bench("virtio-net"), FULL & ~without)
    guest.send(given + frame(bytes(4000)))
    guest.send(NOTHING + frame())
    assert guest.cable.sent == [NOTHING + frame()]
    assert guest.count("tx_dropped") == 1
    assert len(guest.queues[TX].used()) == 2


def test_a_hint_about_the_length_of_headers_is_made_to_fit(guest: Guest) -> None:
    """5.1.6.2.2: the device must not rely on it."""
    long = frame(bytes(3000))
    guest.send(header(1, net.GSO_TCPV4, 0xFFFF, 1448, 34, 16) + long)
    assert guest.cable.sent == [header(1, net.GSO_TCPV4, len(long), 1448, 34, 16) + long]


def test_what_a_header_says_of_nothing_does_not_reach_the_host(guest: Guest) -> None:
    guest.send(header(flags=0xFE, hdr_len=9, gso_size=9, start=9, offset=9, buffers=9) + frame())
    assert guest.cable.sent == [NOTHING + frame()]


def test_a_header_that_changes_is_seen_once(guest: Guest) -> None:
    """Threat 2."""
    where = guest.queues[TX].place(NOTHING + frame())
    guest.cable.peek = lambda: guest.bench.memory.write(where.gpa, b"\xff" * HEADER.size)
    guest.queues[TX].add([where], [])
    guest.driver.kick(TX)
    assert guest.cable.sent == [NOTHING + frame()]


def test_what_is_no_frame_is_not_sent(guest: Guest) -> None:
    """Threat 3."""
    guest.send(NOTHING + bytes(13))
    guest.send(NOTHING[:11])
    guest.send(NOTHING + bytes(FRAME_MAX + 1))
    guest.queues[TX].request(NOTHING + frame(), 10)
    guest.driver.notify(TX)
    assert guest.cable.sent == []
    assert guest.count("tx_dropped") == len(guest.queues[TX].used()) == 4
    assert not guest.failed


def test_a_frame_in_a_thousand_pieces_is_not_sent(bench: Any) -> None:
    """Threat 3."""
    guest = Guest(bench("virtio-net"), FULL | spec.F_INDIRECT_DESC)
    for count in (1000, 1001):
        start = guest.queues[TX].place(NOTHING + frame(bytes(count)))
        pieces = [Span(start.gpa, start.size - count + 1)]
        pieces += [Span(pieces[0].gpa + pieces[0].size + i, 1) for i in range(count - 1)]
        guest.queues[TX].add(pieces, [], indirect=True)
        guest.driver.kick(TX)
    assert guest.cable.sent == [NOTHING + frame(bytes(1000))]
    assert guest.count("tx_dropped") == 1


def test_frames_without_end_are_sent_in_turns(guest: Guest) -> None:
    """Threat 7."""
    for _ in range(BATCH + 10):
        guest.queues[TX].request(NOTHING + frame())
    guest.driver.notify(TX)
    assert len(guest.cable.sent) == BATCH
    assert guest.model.deadline_ns == 0
    guest.bench.pump()
    assert len(guest.cable.sent) == BATCH + 10


def test_frames_wait_in_the_ring_while_the_host_has_no_room(guest: Guest) -> None:
    """Threat 8."""
    guest.cable.room = 1
    frames = [frame(bytes([i])) for i in range(5)]
    for f in frames:
        guest.send(NOTHING + f)
    guest.driver.notify(TX)
    assert len(guest.queues[TX].used()) == 1
    assert guest.model.deadline_ns is None
    guest.cable.room = 10
    guest.cable.on_room()
    assert guest.cable.sent == [NOTHING + f for f in frames]
    assert len(guest.queues[TX].used()) == 4


def test_a_frame_that_the_host_refuses_is_gone(guest: Guest) -> None:
    guest.cable.refuses = True
    guest.send(NOTHING + frame())
    assert len(guest.queues[TX].used()) == 1
    assert guest.count("tx_refused") == 1


# -- limits


def test_what_is_sent_keeps_to_its_limit(bench: Any) -> None:
    guest = Guest(bench("virtio-net", pps=100))
    for _ in range(40):
        guest.queues[TX].request(NOTHING + frame())
    guest.driver.notify(TX)
    at_once = len(guest.cable.sent)
    assert 0 < at_once < 20
    guest.driver.notify(TX)
    assert len(guest.cable.sent) == at_once
    guest.bench.advance(100_000_000)
    assert len(guest.cable.sent) == at_once + 10
    guest.bench.advance(1_000_000_000)
    assert len(guest.cable.sent) == 40


def test_what_is_received_keeps_to_its_limit(bench: Any) -> None:
    guest = Guest(bench("virtio-net", bps=100 * (HEADER.size + len(frame()))))
    guest.provide(*[100] * 40)
    guest.arrive(*[NOTHING + frame()] * 40)
    at_once = len(guest.received())
    assert 0 < at_once < 20
    assert not guest.cable.wanted()
    guest.bench.advance(100_000_000)
    assert len(guest.received()) == 10
    assert guest.queues[TX].outstanding == 0


# -- commands


def tables(unicast: Iterable[bytes] = (), multicast: Iterable[bytes] = ()) -> bytes:
    return b"".join(struct.pack("<I", len(list(t))) + b"".join(t) for t in (list(unicast), list(multicast)))


def test_addresses_are_filtered_once_the_driver_says_so(guest: Guest) -> None:
    group, broadcast = b"\x01\0\x5e\0\0\x01", b"\xff" * 6
    every = [MAC, OTHER, group, broadcast]
    guest.provide(*[100] * 60)

    def heard() -> list[bytes]:
        guest.arrive(*[NOTHING + frame(to=to) for to in every])
        return [f[:6] for f in guest.frames()]

    assert heard() == every
    assert guest.command(Command.RX_PROMISC, b"\0") == CTRL_OK
    assert heard() == [MAC, broadcast]
    assert guest.count("rx_filtered") == 2
    assert guest.command(Command.RX_ALLMULTI, b"\1") == CTRL_OK
    assert heard() == [MAC, group, broadcast]
    assert guest.command(Command.RX_ALLMULTI, b"\0") == CTRL_OK
    assert guest.command(Command.MAC_TABLE_SET, tables([OTHER], [group])) == CTRL_OK
    assert heard() == every
    assert guest.command(Command.MAC_TABLE_SET, tables()) == CTRL_OK
    assert guest.command(Command.MAC_ADDR_SET, OTHER) == CTRL_OK
    assert heard() == [OTHER, broadcast]
    assert guest.command(Command.RX_PROMISC, b"\1") == CTRL_OK
    assert heard() == every


def test_a_reset_empties_the_filter(guest: Guest) -> None:
    """5.1.6.5.2.1."""
    assert guest.command(Command.MAC_TABLE_SET, tables([OTHER])) == CTRL_OK
    again = Guest(guest.bench)
    again.provide(100, 100)
    assert again.command(Command.RX_PROMISC, b"\0") == CTRL_OK
    again.arrive(NOTHING + frame(to=OTHER), NOTHING + frame())
    assert again.frames() == [frame()]


def test_the_driver_may_set_the_address_until_a_reset(guest: Guest) -> None:
    assert guest.command(Command.MAC_ADDR_SET, OTHER) == CTRL_OK
    assert bytes(guest.driver.config(i, 1) for i in range(6)) == OTHER
    guest.driver.reset()
    assert bytes(guest.driver.config(i, 1) for i in range(6)) == MAC


def test_the_host_is_told_what_the_driver_does_itself(guest: Guest) -> None:
    assert guest.cable.asked == {"checksum": True, "tso4": True, "tso6": True, "ecn": True}
    fewer = net.F_GUEST_CSUM | net.F_GUEST_TSO6
    assert guest.command(Command.GUEST_OFFLOADS_SET, fewer.to_bytes(8, "little")) == CTRL_OK
    assert guest.cable.asked == {"checksum": True, "tso4": False, "tso6": True, "ecn": False}
    guest.driver.reset()
    assert guest.cable.asked == {"checksum": False, "tso4": False, "tso6": False, "ecn": False}


@pytest.mark.parametrize(
    ("command", "data"),
    [
        (0xFFFF, b""),
        (0x0002, b"\1"),  # RX_EXTRA is not offered
        (Command.RX_PROMISC, b""),
        (Command.RX_PROMISC, b"\1\1"),
        (Command.RX_ALLMULTI, b"\0\0\0\0"),
        (Command.MAC_ADDR_SET, MAC[:5]),
        (Command.MAC_ADDR_SET, MAC + b"\0"),
        (Command.MAC_TABLE_SET, b""),
        (Command.MAC_TABLE_SET, tables()[:7]),
        (Command.MAC_TABLE_SET, tables() + b"\0"),
        (Command.MAC_TABLE_SET, struct.pack("<I", 0xFFFF_FFFF) + bytes(100)),
        (Command.MQ_VQ_PAIRS_SET, b"\1\0"),  # not negotiated
        (Command.GUEST_OFFLOADS_SET, bytes(7)),
        (Command.GUEST_OFFLOADS_SET, (1 << 10).to_bytes(8, "little")),  # UFO
        (Command.GUEST_OFFLOADS_SET, b"\xff" * 8),
    ],
)
def test_commands_that_make_no_sense_are_refused(guest: Guest, command: int, data: bytes) -> None:
    """Threat 9."""
    before = guest.model.save()
    assert guest.command(command, data) == CTRL_ERR
    assert guest.model.save().split(b'"mac"')[1] == before.split(b'"mac"')[1]
    assert not guest.failed


@pytest.mark.parametrize(
    ("command", "data"),
    [
        (Command.RX_PROMISC, b"\0"),
        (Command.RX_ALLMULTI, b"\1"),
        (Command.MAC_TABLE_SET, tables()),
        (Command.MAC_ADDR_SET, OTHER),
        (Command.GUEST_OFFLOADS_SET, bytes(8)),
    ],
)
def test_commands_that_were_not_negotiated_are_refused(bench: Any, command: int, data: bytes) -> None:
    """Threat 9."""
    guest = Guest(bench("virtio-net"), V1 | net.F_CTRL_VQ)
    assert guest.command(command, data) == CTRL_ERR


def test_addresses_without_end_are_refused(guest: Guest) -> None:
    """Threat 10."""
    many = [struct.pack(">HI", 0x0200, i) for i in range((CTRL_MAX - 10) // 6)]
    assert guest.command(Command.MAC_TABLE_SET, tables(many)) == CTRL_OK
    assert guest.command(Command.MAC_TABLE_SET, tables([*many, OTHER])) == CTRL_ERR
    assert len(guest.model.save()) < 60000


@pytest.mark.parametrize("parts", [(b"\0\0\1",), (b"\0", 1), (1,)], ids=str)
def test_a_command_without_an_answer_stops_the_card(guest: Guest, parts: tuple[Any, ...]) -> None:
    guest.queues[CTRL].request(*parts)
    guest.driver.notify(CTRL)
    assert guest.failed


# -- several queues

MQ = FULL | net.F_MQ


def test_the_host_s_queues_are_shared_out_among_those_in_use(bench: Any) -> None:
    guest = Guest(bench("virtio-net", pairs=3), MQ)
    for queue in (0, 2, 4):
        for _ in range(6):
            guest.queues[queue].request(100)
        guest.driver.notify(queue)

    def heard() -> list[list[bytes]]:
        for n in range(3):
            guest.arrive(NOTHING + frame(bytes([n])), cable=n)
        return [[f[-1:] for f in guest.frames(queue)] for queue in (0, 2, 4)]

    assert heard() == [[b"\0", b"\1", b"\2"], [], []]
    assert guest.command(Command.MQ_VQ_PAIRS_SET, b"\2\0", queue=6) == CTRL_OK
    assert heard() == [[b"\0", b"\2"], [b"\1"], []]
    assert guest.command(Command.MQ_VQ_PAIRS_SET, b"\3\0", queue=6) == CTRL_OK
    assert heard() == [[b"\0"], [b"\1"], [b"\2"]]
    for pairs in (b"\0\0", b"\4\0", b"\1"):
        assert guest.command(Command.MQ_VQ_PAIRS_SET, pairs, queue=6) == CTRL_ERR


def test_a_queue_that_was_out_of_use_goes_on_with_the_buffers_it_got_meanwhile(bench: Any) -> None:
    guest = Guest(bench("virtio-net", pairs=2), MQ)
    assert guest.command(Command.MQ_VQ_PAIRS_SET, b"\2\0", queue=4) == CTRL_OK
    guest.arrive(NOTHING + frame(), cable=1)
    assert guest.command(Command.MQ_VQ_PAIRS_SET, b"\1\0", queue=4) == CTRL_OK
    guest.queues[2].request(100)
    guest.driver.notify(2)
    assert guest.command(Command.MQ_VQ_PAIRS_SET, b"\2\0", queue=4) == CTRL_OK
    guest.arrive(cable=1)
    assert guest.frames(2) == [frame()]


def test_each_transmit_queue_has_its_own_of_the_host(bench: Any) -> None:
    guest = Guest(bench("virtio-net", pairs=2), MQ)
    guest.send(NOTHING + frame(b"1"), queue=1)
    guest.send(NOTHING + frame(b"3"), queue=3)
    assert [c.sent for c in guest.cables[:2]] == [[NOTHING + frame(b"1")], [NOTHING + frame(b"3")]]


def test_queues_beyond_those_there_are_do_nothing(bench: Any) -> None:
    guest = Guest(bench("virtio-net", pairs=2), MQ)
    for queue in (5, 6, 7, 8):
        guest.queues[queue].request(NOTHING + frame(), 100)
        guest.driver.notify(queue)
    assert all(not c.sent for c in guest.cables)
    assert not guest.failed


# -- the cable


def test_a_card_whose_other_end_is_gone_has_no_link(guest: Guest) -> None:
    generation = guest.driver.get(spec.CONFIG_GENERATION, 1)
    guest.cable.up = False
    guest.cable.on_down()
    assert guest.driver.config(CONFIG_STATUS, 2) == 0
    assert guest.driver.get(spec.CONFIG_GENERATION, 1) != generation
    assert guest.bench.edges["irq0"] == 1


def test_nothing_passes_while_the_cable_is_out(guest: Guest) -> None:
    guest.model.set("link", 0)
    assert guest.driver.config(CONFIG_STATUS, 2) == 0
    guest.provide(100, 100)
    guest.arrive(NOTHING + frame())
    guest.send(NOTHING + frame())
    assert guest.received() == guest.cable.sent == []
    guest.model.set("link", 1)
    assert guest.driver.config(CONFIG_STATUS, 2) == net.S_LINK_UP
    guest.arrive(NOTHING + frame(b"again"))
    assert guest.frames() == [frame(b"again")]
    assert guest.bench.edges["irq0"] == 2


# -- reset and state


def test_a_reset_drops_what_waits(guest: Guest) -> None:
    guest.provide(100)
    guest.arrive(NOTHING + frame(bytes(3000)))
    guest.driver.reset()
    assert not guest.cable.wanted()
    again = Guest(guest.bench)
    again.provide(100)
    again.arrive(NOTHING + frame())
    assert again.frames() == [frame()]


def test_a_restored_card_goes_on_with_the_same_buffers_and_filters(guest: Guest) -> None:
    guest.command(Command.RX_PROMISC, b"\0")
    guest.command(Command.MAC_ADDR_SET, OTHER)
    guest.command(Command.GUEST_OFFLOADS_SET, bytes(8))
    guest.provide(100, 100)
    guest.arrive(NOTHING + frame(bytes(3000), to=OTHER))  # waits with both buffers, and will be lost
    other = guest.bench.fork()
    assert other.model.save() == guest.model.save()
    cable = other.ports["link"][0]
    assert not cable.asked["checksum"]
    other.pump()
    cable.incoming += [NOTHING + frame(), NOTHING + frame(to=OTHER)]
    cable.on_frame()
    assert guest.frames() == [frame(to=OTHER)]


def test_saving_leaves_the_card_as_it_was(guest: Guest) -> None:
    guest.provide(100, 100)
    guest.arrive(NOTHING + frame(bytes(3000)))
    guest.model.save()
    guest.bench.pump()
    guest.arrive(NOTHING + frame(b"1"), NOTHING + frame(b"2"))
    assert guest.frames() == [frame(b"1"), frame(b"2")]


@pytest.mark.parametrize("change", [(b'"active":1', b'"active":2'), (b'"offloads":898', b'"offloads":1')])
def test_a_state_that_the_card_cannot_be_in_is_refused(guest: Guest, change: tuple[bytes, bytes]) -> None:
    saved = guest.model.save()
    assert change[0] in saved
    with pytest.raises(ValueError, match="cannot be in that state"):
        guest.bench.fork().model.restore(saved.replace(*change))


# -- a driver and a host that keep to nothing

headers = st.one_of(
    st.just(NOTHING),
    st.builds(
        header,
        st.sampled_from((0, 1, 2, 0xFF)),
        st.sampled_from((0, 1, 4, 0x81, 0x84, 3)),
        st.sampled_from((0, 54, 0xFFFF)),
        st.sampled_from((0, 1448, 0xFFFF)),
        st.sampled_from((0, 14, 34, 0xFFFF)),
        st.sampled_from((0, 16, 0xFFFF)),
    ),
    st.binary(min_size=12, max_size=12),
)
frames = st.sampled_from((0, 13, 14, 60, 1514, 9000, FRAME_MAX, FRAME_MAX + 1)).map(
    lambda n: (MAC + bytes(n))[:n]
)
commands = st.one_of(
    st.tuples(st.sampled_from(sorted(Command)), st.binary(max_size=20)).map(
        lambda c: c[0].to_bytes(2, "big") + c[1]
    ),
    st.binary(max_size=30),
)
parts = st.lists(st.sampled_from((1, 11, 12, 17, 18, 64, 1526, 9000)), min_size=1, max_size=4)
actions = st.one_of(
    st.tuples(st.just("provide"), parts),
    st.tuples(st.just("send"), headers, frames, st.integers(0, 3)),
    st.tuples(st.just("command"), commands, st.integers(0, 2)),
    st.tuples(st.just("arrive"), headers, frames),
    st.tuples(st.just("room"), st.integers(0, 5)),
    st.tuples(
        st.just("corrupt"), st.integers(0, 2), st.integers(0, 20000), st.binary(min_size=1, max_size=16)
    ),
    st.tuples(st.just("plug"), st.booleans()),
    st.tuples(st.just("reset")),
    st.tuples(st.just("fork")),
)


class Chaos(Guest):
    """`Guest` whose rings may be full or nonsense."""

    def act(self, what: str, *args: Any) -> None:
        match what, args:
            case "provide", (sizes,):
                self._request(RX, *sizes)
            case "send", (head, data, cut):
                whole = head + data
                self._request(TX, *[p for p in (whole[:cut], whole[cut:]) if p])
            case "command", (data, room):
                self._request(CTRL, *([data] if data else []), *([room] if room else []))
            case "arrive", (head, data):
                self.arrive(head + data)
            case "room", (frames,):
                self.cable.room = frames
                self.cable.on_room()
            case "corrupt", (queue, at, data):
                self.bench.memory.write(self.queues[queue].desc + at, data)
            case "plug", (plugged,):
                self.model.set("link", plugged)
            case "reset", _:
                self.cable.incoming.clear()
                self.driver.start(FULL)
                self.queues = self.driver.queues
            case "fork", _:
                saved = self.model.save()
                self.model.restore(saved)
                assert self.model.save() == saved
        self.bench.pump()

    def seen(self) -> tuple[Any, ...]:
        """What of the card shows outside."""
        used = [queue.used() for queue in self.queues]
        return self.model.counters(), self.bench.said, self.cable.sent, len(self.cable.incoming), used

    def _request(self, queue: int, *parts: bytes | int) -> None:
        if self.queues[queue].free >= len(parts) and parts:
            self.queues[queue].request(*parts)
            self.driver.notify(queue)


@given(script=st.lists(actions, max_size=40), ring=st.sampled_from((0, EVERY_RING)))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_driver_and_host_do_only_frames_with_sound_headers_are_sent(
    bench: Any, script: list[tuple[Any, ...]], ring: int
) -> None:
    chaos = Chaos(bench("virtio-net"), FULL | ring)
    for what, *args in script:
        chaos.act(what, *args)
    for sent in chaos.cable.sent:
        size = len(sent) - HEADER.size
        assert 14 <= size <= FRAME_MAX
        assert net.checked_header(sent[: HEADER.size], size, FULL) == sent[: HEADER.size]


def test_plain_frames_are_moved_without_python(bench: Any) -> None:
    guest = Guest(bench("virtio-net"))
    guest.cable.receive = guest.cable.send = None
    guest.provide(*[1526] * 4)
    guest.arrive(NOTHING + frame(b"1"), NOTHING + frame(bytes(3000)))
    guest.send(NOTHING, frame(b"2"))
    assert guest.frames() == [frame(b"1"), frame(bytes(3000))]
    assert guest.cable.sent == [NOTHING + frame(b"2")]


@given(script=st.lists(actions, max_size=40))
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_frames_that_are_moved_in_c_are_those_that_python_moves(
    bench: Any, script: list[tuple[Any, ...]]
) -> None:
    """Whatever driver and host do."""
    ours, reference = Chaos(bench("virtio-net")), Chaos(bench("virtio-net"), plain=False)
    for what, *args in script:
        for chaos in ours, reference:
            chaos.act(what, *args)
        assert ours.seen() == reference.seen()
