"""Frames over a stream socket, whose other end is held here as passt holds it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from devproc.backends.stream import FRAME_MAX, Stream

HEADER = bytes(12)


class Peer:
    """A stream with both its ends."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        theirs.setblocking(False)
        self.fd = theirs.detach()
        self.stream = Stream(self.fd)
        self.wanted = True
        self.calls: list[str] = []
        self.stream.listen(
            lambda: self.wanted,
            lambda: self.calls.append("frame"),
            lambda: self.calls.append("room"),
            lambda: self.calls.append("down"),
        )

    def says(self, *frames: bytes) -> None:
        self.socket.sendall(b"".join(len(f).to_bytes(4, "big") + f for f in frames))

    def heard(self) -> bytes:
        """Everything that has arrived."""
        self.socket.setblocking(False)
        parts = []
        while True:
            try:
                parts.append(self.socket.recv(1 << 20))
            except BlockingIOError:
                return b"".join(parts)

    def take(self, *sizes: int) -> bytes:
        """The next frame, by way of buffers of these sizes."""
        buffers = [bytearray(size) for size in sizes or (12, FRAME_MAX + 1)]
        size = self.stream.receive(buffers)
        return b"".join(buffers)[:size]


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.socket.close()
    os.close(peer.fd)


def test_frames_come_one_at_a_time_behind_an_empty_header(peer: Peer) -> None:
    peer.says(b"first frame", b"second")
    assert peer.take() == HEADER + b"first frame"
    assert peer.take(5, 7, 2, 100) == HEADER + b"second"
    assert peer.take() == b""
    assert peer.calls == []


def test_a_frame_that_is_there_in_part_is_waited_for(peer: Peer) -> None:
    peer.socket.sendall(b"\0\0")
    assert peer.take() == b""
    peer.socket.sendall(b"\0\5fra")
    assert peer.take() == b""
    peer.socket.sendall(b"me\0\0\0\4next")
    assert peer.take() == HEADER + b"frame"
    assert peer.take() == HEADER + b"next"


def test_many_long_frames_come_whole_and_in_order(peer: Peer) -> None:
    frames = [os.urandom(FRAME_MAX - i) for i in range(6)]
    for frame in tuple(frames):
        data = len(frame).to_bytes(4, "big") + frame
        for at in range(0, len(data), 40000):
            peer.socket.sendall(data[at : at + 40000])
            if (got := peer.take()) != b"":
                assert got == HEADER + frames.pop(0)
    while (got := peer.take()) != b"":
        assert got == HEADER + frames.pop(0)
    assert frames == []


def test_a_frame_that_is_too_long_for_the_buffers_is_cut_off(peer: Peer) -> None:
    peer.says(b"0123456789", b"next")
    assert peer.take(12, 4) == HEADER + b"0123"
    assert peer.take() == HEADER + b"next"


@pytest.mark.parametrize("length", [0, FRAME_MAX + 1, 0xFFFF_FFFF])
def test_a_length_that_no_frame_has_is_the_end_of_the_link(peer: Peer, length: int) -> None:
    peer.socket.sendall(length.to_bytes(4, "big") + b"frame" * 100)
    assert peer.take() == b""
    assert not peer.stream.up
    assert peer.calls == ["down"]
    assert not peer.stream.wants_read
    assert peer.stream.send([HEADER, b"frame"]) is None


def test_a_frame_is_sent_behind_its_length(peer: Peer) -> None:
    assert peer.stream.send([HEADER, b"fra", b"me"]) is True
    assert peer.heard() == b"\0\0\0\5frame"
    assert not peer.stream.wants_write


def test_what_the_socket_has_no_room_for_is_sent_when_it_has(peer: Peer) -> None:
    frame = bytes(range(256)) * 255
    sent = 0
    while peer.stream.send([HEADER, frame]):
        sent += 1
    assert peer.stream.wants_write
    heard = b""
    while peer.stream.wants_write:
        heard += peer.heard()
        peer.stream.on_writable(True)
    assert peer.calls == ["room"]
    assert heard + peer.heard() == (len(frame).to_bytes(4, "big") + frame) * sent
    assert peer.stream.send([HEADER, b"again"]) is True
    assert peer.heard() == b"\0\0\0\5again"


def test_a_peer_that_leaves_takes_the_link_down_once(peer: Peer) -> None:
    peer.says(b"last words")
    peer.socket.close()
    assert peer.take() == HEADER + b"last words"
    assert peer.take() == b""
    assert peer.stream.send([HEADER, b"frame"]) is None
    assert peer.calls == ["down"]
    assert not peer.stream.wants_read
    assert not peer.stream.wants_write


def test_the_socket_is_watched_only_while_frames_are_wanted(peer: Peer) -> None:
    assert peer.stream.wants_read
    peer.wanted = False
    assert not peer.stream.wants_read
    peer.stream.on_readable()
    assert peer.calls == ["frame"]
