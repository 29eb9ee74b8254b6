"""Places for connections and the way to the exchange, on real sockets."""

import fcntl
import os
import socket

import pytest

from devproc.backends.line import Exchange, Line
from devproc.ports import HostError


@pytest.fixture
def place():
    with open(os.devnull) as null:
        line = Line(fcntl.fcntl(null, fcntl.F_DUPFD, 900))  # a number that nothing else here gets
    yield line
    if line._socket is not None:
        line.close()


@pytest.fixture
def host(place):
    """The other end of a connection that is in the place."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with ours, theirs:
        os.dup2(ours.fileno(), place.fd, inheritable=False)
        ours.close()
        place.open()
        yield theirs


def is_open(fd):
    return os.path.exists(f"/proc/self/fd/{fd}")


def test_a_place_is_empty_at_first_and_not_watched(place):
    assert not is_open(place.fd)
    place.listen(lambda: True, lambda: True, lambda: None, lambda: None)
    assert not place.wants_read and not place.wants_write


def test_bytes_go_both_ways_in_pieces(place, host):
    host.send(b"hello, world")
    first, second = bytearray(5), bytearray(20)
    assert place.receive([first, second]) == 12
    assert (first, second[:7]) == (b"hello", b", world")
    assert place.send([b"good", b"bye"]) == 7
    assert host.recv(99) == b"goodbye"


def test_nothing_now_is_told_from_nothing_any_more(place, host):
    assert place.receive([bytearray(1)]) is None
    host.shutdown(socket.SHUT_WR)
    assert place.receive([bytearray(1)]) == 0


def test_a_host_that_does_not_drain_takes_nothing(place, host):
    while place.send([bytes(1 << 16)]):
        pass
    host.recv(1 << 20)
    assert place.send([b"more"]) > 0


def test_either_direction_ends_alone(place, host):
    place.shut(send=True)
    assert host.recv(1) == b""
    host.send(b"still")
    assert place.receive([bytearray(9)]) == 5
    place.shut(receive=True)
    with pytest.raises(BrokenPipeError):
        host.send(b"unheard")


def test_a_program_that_is_gone_is_an_error(place, host):
    host.close()
    with pytest.raises(BrokenPipeError):
        place.send([b"anybody?"])


def test_what_was_sent_arrives_after_the_end(place, host):
    place.send([b"last"])
    place.close()
    assert (host.recv(9), host.recv(9)) == (b"last", b"")
    assert not is_open(place.fd)


def test_the_model_is_asked_and_called_only_while_there_is_a_connection(place, host):
    heard = []
    place.listen(lambda: True, lambda: True, lambda: heard.append("in"), lambda: heard.append("out"))
    assert place.wants_read and place.wants_write
    place.on_readable()
    place.on_writable(False)
    place.close()
    place.on_readable()
    place.on_writable(False)
    assert heard == ["in", "out"] and not place.wants_read


@pytest.fixture
def pair():
    """The device's end of the exchange, and the exchange's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    with theirs:
        exchange = Exchange(ours.detach())
        yield exchange, theirs
        exchange._socket.close()


@pytest.fixture
def calls(pair):
    found = []
    pair[0].listen(lambda dialled, number: found.append((dialled, number)))
    return found


def test_a_port_is_four_bytes(pair):
    exchange, theirs = pair
    assert exchange.dial(80) and exchange.dial(2**32 - 1)
    assert (theirs.recv(9), theirs.recv(9)) == (b"\x50\0\0\0", b"\xff\xff\xff\xff")


def test_an_exchange_that_is_behind_is_not_waited_for(pair):
    exchange, _ = pair
    while exchange.dial(1):
        pass


@pytest.mark.parametrize(("word", "dialled"), [(b"D", True), (b"A", False)])
def test_a_connection_comes_with_its_number_and_does_not_outlive_an_exec(pair, calls, word, dialled):
    exchange, theirs = pair
    with socket.socket(socket.AF_UNIX) as connection:
        socket.send_fds(theirs, [word], [connection.fileno()])
        exchange.on_readable()
    ((was_dialled, number),) = calls
    assert was_dialled is dialled and not os.get_inheritable(number)
    os.close(number)


def test_there_may_be_nobody(pair, calls):
    exchange, theirs = pair
    theirs.send(b"D")
    exchange.on_readable()
    exchange.on_readable()  # nothing is there now
    assert calls == [(True, None)]


def test_an_exchange_that_is_gone_is_missed(pair):
    exchange, theirs = pair
    theirs.close()
    with pytest.raises(HostError, match="the exchange is gone"):
        exchange.on_readable()
    with pytest.raises(HostError, match="the exchange is gone"):
        exchange.dial(1)
