"""Relays over real sockets and ptys, driven as the run loop drives them."""

import os
import pty
import select
import socket
import tty

import pytest

from supervisor.relay import PtyRelay, SocketRelay


def turn(relay):
    """One turn of the run loop, without waiting; whether anything was ready."""
    poll = select.poll()
    for fd, events in relay.wants().items():
        poll.register(fd, events)
    ready = poll.poll(0)
    for fd, got in ready:
        relay.ready(fd, got)
    return bool(ready)


def settle(relay):
    for _ in range(1000):
        if not turn(relay):
            return
    raise AssertionError("the run loop spins")


@pytest.fixture
def port():
    """(the device's end, ours)"""
    theirs, ours = socket.socketpair()
    theirs.setblocking(False)
    with theirs:
        yield theirs, ours


@pytest.fixture
def listening(port, tmp_path):
    """(the device's end, the relay, the path to connect to)"""
    path = str(tmp_path / "com1")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1)
    relay = SocketRelay(port[1], listener)
    yield port[0], relay, path
    relay.close()


def connect(path):
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    client.setblocking(False)
    return client


def test_bytes_go_both_ways(listening):
    port, relay, path = listening
    with connect(path) as client:
        settle(relay)
        port.send(b"login: ")
        client.send(b"root\n")
        settle(relay)
        assert client.recv(100) == b"login: "
        assert port.recv(100) == b"root\n"


def test_without_a_client_output_is_discarded_and_the_guest_is_not_held(listening):
    port, relay, path = listening
    for _ in range(50):
        port.send(bytes(8192))
        settle(relay)
    with connect(path) as client:
        settle(relay)
        port.send(b"now")
        settle(relay)
        assert client.recv(100) == b"now"


def test_a_slow_client_loses_nothing(listening):
    port, relay, path = listening
    data = b"".join(b"%07d\n" % n for n in range(100_000))
    with connect(path) as client:
        settle(relay)
        sent, got, was_full = 0, bytearray(), False
        while len(got) < len(data):
            try:
                sent += port.send(data[sent : sent + 4096])
                progress = True
            except BlockingIOError:
                progress = False
                was_full = True
            settle(relay)
            if not progress or sent == len(data):
                got += client.recv(4096)
        assert was_full  # what the guest sees as a full transmitter
        assert got == data


def test_a_guest_that_does_not_read_holds_the_client_and_loses_nothing(listening):
    port, relay, path = listening
    data = b"".join(b"%07d\n" % n for n in range(100_000))
    with connect(path) as client:
        settle(relay)
        sent, got, was_full = 0, bytearray(), False
        while len(got) < len(data):
            try:
                sent += client.send(data[sent : sent + 4096])
                progress = True
            except BlockingIOError:
                progress = False
                was_full = True
            settle(relay)
            if not progress or sent == len(data):
                got += port.recv(4096)
        assert was_full
        assert got == data


@pytest.mark.parametrize("talks", [False, True])
def test_what_a_client_has_said_before_it_goes_reaches_the_guest(listening, talks):
    """`talks`: the guest answers, to nobody, while it reads."""
    port, relay, path = listening
    data = b"".join(b"%07d\n" % n for n in range(10_000))
    port.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    relay._inner.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    with connect(path) as client:
        settle(relay)
        assert client.send(data) == len(data)
    got = bytearray()
    while len(got) < len(data):
        if talks:
            port.send(b"$ ")
        settle(relay)
        got += port.recv(4096)
    assert got == data
    settle(relay)
    with connect(path) as client:
        settle(relay)
        port.send(b"next")
        settle(relay)
        assert client.recv(100) == b"next"


def test_a_client_may_go_and_another_come(listening):
    port, relay, path = listening
    for name in (b"first", b"second"):
        with connect(path) as client:
            settle(relay)
            client.send(name)
            settle(relay)
            assert port.recv(100) == name
        settle(relay)


def test_the_next_client_does_not_get_the_last_ones_bytes(listening):
    port, relay, path = listening
    with connect(path) as client:
        settle(relay)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        while True:  # until the relay holds bytes that the client has not taken
            try:
                port.send(b"old" * 1000)
            except BlockingIOError:
                break
            settle(relay)
    settle(relay)
    with connect(path) as client:
        while turn(relay):
            pass
        port.send(b"new")
        settle(relay)
        assert client.recv(100) == b"new"


def test_a_second_client_waits_until_the_first_has_gone(listening):
    port, relay, path = listening
    first = connect(path)
    settle(relay)
    second = connect(path)
    second.send(b"me")
    settle(relay)
    with pytest.raises(BlockingIOError):
        port.recv(100)
    first.close()
    settle(relay)
    assert port.recv(100) == b"me"
    second.close()


def test_a_peer_that_was_connected_to_at_the_start_is_relayed(port):
    here, there = socket.socketpair()
    relay = SocketRelay(port[1], None, here)
    there.send(b"hello")
    settle(relay)
    assert port[0].recv(100) == b"hello"
    there.close()
    settle(relay)
    port[0].send(b"to nobody")
    settle(relay)
    relay.close()


@pytest.fixture
def terminal(port):
    """(the device's end, the relay, the path to open)"""
    master, slave = pty.openpty()
    tty.setraw(slave)
    path = os.ttyname(slave)
    os.close(slave)
    relay = PtyRelay(port[1], master)
    yield port[0], relay, path
    relay.close()


def test_a_pty_carries_bytes_both_ways(terminal):
    port, relay, path = terminal
    user = os.open(path, os.O_RDWR | os.O_NOCTTY)
    port.send(b"login: ")
    os.write(user, b"root\n")
    settle(relay)
    assert os.read(user, 100) == b"login: "
    assert port.recv(100) == b"root\n"
    os.close(user)


def test_a_pty_that_nobody_has_open_neither_spins_nor_holds_the_guest(terminal):
    port, relay, path = terminal
    os.close(os.open(path, os.O_RDWR | os.O_NOCTTY))
    for _ in range(50):
        port.send(bytes(8192))
        settle(relay)


def test_a_pty_may_be_opened_again(terminal, monkeypatch):
    port, relay, path = terminal
    now_s = 100.0
    monkeypatch.setattr("supervisor.relay.time.monotonic", lambda: now_s)
    os.close(os.open(path, os.O_RDWR | os.O_NOCTTY))
    settle(relay)
    user = os.open(path, os.O_RDWR | os.O_NOCTTY)
    os.write(user, b"again")
    now_s += 1
    settle(relay)
    assert port.recv(100) == b"again"
    os.close(user)
