"""Two ends over a real socket pair."""

from __future__ import annotations

import os
import socket

import pytest

from devproc import wire
from devproc.channel import Channel, ChannelClosed
from devproc.wire import CONTROL_TABLE, PeerError, Sender, WireError

Pair = tuple[Channel, Channel]


@pytest.fixture
def pair() -> Pair:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in (a, b):
        sock.settimeout(5)
    return (
        Channel(a, CONTROL_TABLE, "start", Sender.SUPERVISOR, Sender.DEVICE, 1000),
        Channel(b, CONTROL_TABLE, "start", Sender.DEVICE, Sender.SUPERVISOR, 1000),
    )


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_a_message_arrives_and_both_ends_agree_on_the_state(pair: Pair) -> None:
    supervisor, device = pair
    device.send(wire.Hello(1, "rtc"))
    assert supervisor.recv() == wire.Hello(1, "rtc")
    assert supervisor.state == device.state == "greeted"


def test_a_message_out_of_turn_is_never_sent(pair: Pair) -> None:
    supervisor, device = pair
    with pytest.raises(WireError):
        device.send(wire.Pong(1))
    device.close()
    with pytest.raises(ChannelClosed):
        supervisor.recv()


def test_a_peer_out_of_turn_is_a_peer_error(pair: Pair) -> None:
    supervisor, device = pair
    device.sock.send(wire.encode(wire.Pong(1)))
    with pytest.raises(PeerError, match="unexpected Pong in state start"):
        supervisor.recv()


@pytest.mark.parametrize("length", [1001, 5000])
def test_a_frame_over_the_limit_is_refused_and_not_cut_to_fit(pair: Pair, length: int) -> None:
    supervisor, device = pair
    # its first 1000 bytes are not the point: a valid message that is cut must not be taken either
    device.sock.send(wire.encode(wire.Hello(1, "rtc")).ljust(length, b"\0"))
    with pytest.raises(PeerError, match="frame of 1001 bytes"):
        supervisor.recv()


def test_a_closed_peer_is_closed_for_both_directions(pair: Pair) -> None:
    supervisor, device = pair
    supervisor.close()
    supervisor.close()
    with pytest.raises(ChannelClosed):
        device.recv()
    with pytest.raises(ChannelClosed):
        device.send(wire.Hello(1, "rtc"))


def test_an_empty_frame_looks_like_the_end(pair: Pair) -> None:
    supervisor, device = pair
    device.sock.send(b"")
    with pytest.raises(ChannelClosed):
        supervisor.recv()


def test_descriptors_arrive_close_on_exec_and_owned(pair: Pair) -> None:
    supervisor, device = pair
    read, write = os.pipe()
    device.send(wire.Hello(1, "rtc"), [write])
    message, (fd,) = supervisor.recv_fds(1)
    assert message == wire.Hello(1, "rtc")
    assert not os.get_inheritable(fd)
    os.write(fd, b"x")
    assert os.read(read, 1) == b"x"
    for each in (fd, read, write):
        os.close(each)


def test_recv_takes_no_descriptor(pair: Pair) -> None:
    supervisor, device = pair
    before = open_fds()
    device.send(wire.Hello(1, "rtc"), [0, 1, 2])
    supervisor.recv()
    assert open_fds() == before


@pytest.mark.parametrize("sent", [2, 3, 50])
def test_more_descriptors_than_expected_are_refused_and_none_is_left(pair: Pair, sent: int) -> None:
    supervisor, device = pair
    before = open_fds()
    device.send(wire.Hello(1, "rtc"), [0] * sent)
    with pytest.raises(PeerError, match="more than 1 descriptors"):
        supervisor.recv_fds(1)
    assert open_fds() == before


def test_descriptors_of_a_bad_frame_are_closed(pair: Pair) -> None:
    supervisor, device = pair
    before = open_fds()
    socket.send_fds(device.sock, [b"\xc1"], [0])
    with pytest.raises(PeerError):
        supervisor.recv_fds(1)
    assert open_fds() == before
