"""vhost-user over a socket: whole messages, and descriptors that are nobody's are closed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from devproc.vhost import connection, message
from devproc.vhost.connection import Closed, Connection
from devproc.vhost.message import MessageError, Request, VringFile

FRAME = message.pack(Request.SET_VRING_KICK, VringFile(1, True))


@pytest.fixture
def ends() -> Iterator[tuple[Connection, socket.socket]]:
    ours, theirs = socket.socketpair()
    end = Connection(ours)
    yield end, theirs
    end.close()
    theirs.close()


def held() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_message_comes_whole_with_its_descriptors(ends: tuple[Connection, socket.socket]) -> None:
    end, other = ends
    Connection(other).send(FRAME, [1, 2])
    received = end.receive()
    assert (received.header.request, received.body) == (Request.SET_VRING_KICK, FRAME[12:])
    assert [os.fstat(fd).st_ino for fd in received.fds] == [os.fstat(fd).st_ino for fd in (1, 2)]
    assert not any(os.get_inheritable(fd) for fd in received.fds)
    received.close()


def test_a_message_may_come_in_pieces(ends: tuple[Connection, socket.socket]) -> None:
    end, other = ends
    socket.send_fds(other, [FRAME[:5]], [1])
    for piece in (FRAME[5:14], FRAME[14:]):
        other.send(piece)
    received = end.receive()
    assert (received.body, len(received.fds)) == (FRAME[12:], 1)
    received.close()


def test_descriptors_that_come_late_are_closed(ends: tuple[Connection, socket.socket]) -> None:
    end, other = ends
    before = held()
    other.send(FRAME[:12])
    socket.send_fds(other, [FRAME[12:]], [1, 2])
    received = end.receive()
    assert (received.fds, held()) == ([], before)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", Closed),
        (FRAME[:5], Closed),
        (FRAME[:15], Closed),
        (b"GET / HTTP/1.1\r\n", MessageError),
        (FRAME[:8] + b"\xff\xff\xff\xff", MessageError),
    ],
)
def test_a_bad_end_leaves_no_descriptor(
    ends: tuple[Connection, socket.socket], data: bytes, error: type[Exception]
) -> None:
    end, other = ends
    before = held()
    if data:
        socket.send_fds(other, [data], [0, 1, 2])
    other.shutdown(socket.SHUT_WR)
    with pytest.raises(error):
        end.receive()
    assert held() == before


def test_more_descriptors_than_any_message_has_are_refused(ends: tuple[Connection, socket.socket]) -> None:
    end, other = ends
    before = held()
    socket.send_fds(other, [FRAME], [1] * (message.REGIONS_MAX + 1))
    with pytest.raises(MessageError, match="more than 8 descriptors"):
        end.receive()
    assert held() == before


def test_silence_in_a_message_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PATIENCE_S", 0.01)
    ours, theirs = socket.socketpair()
    with theirs:
        end = Connection(ours)
        theirs.send(FRAME[:15])
        with pytest.raises(MessageError, match="cut off"):
            end.receive()
        with pytest.raises(MessageError, match="takes nothing"):
            while True:
                end.send(FRAME)
        end.close()


def test_nobody_is_not_spoken_to(ends: tuple[Connection, socket.socket]) -> None:
    end, other = ends
    other.close()
    with pytest.raises(Closed):
        end.send(FRAME)
    with pytest.raises(Closed):
        end.send(FRAME, [1])
