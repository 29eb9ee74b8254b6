"""devproc/backends/back_end.py on a real socket, with whatever a program may do at its other end."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devproc.backends.back_end import BackEnd
from devproc.backends.kick import Kick
from devproc.backends.signal import Signal
from devproc.vhost.message import (
    HEADER_SIZE,
    Header,
    MessageError,
    Request,
    VringFile,
    VringState,
    pack,
    pack_reply,
    parse,
    parse_header,
)

ANSWER = pack_reply(Request.GET_VRING_BASE, VringState(1, 5))


class Ends:
    """A `BackEnd`, the program's socket, and what was heard."""

    def __init__(self) -> None:
        ours, self.program = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.port = BackEnd(ours.detach())
        self.answers: list[tuple[Header, bytes]] = []
        self.gone: list[str] = []
        self.port.listen(lambda header, body: self.answers.append((header, body)), self.gone.append)

    def close(self) -> None:
        self.program.close()
        self.port._socket.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


def test_a_message_carries_the_descriptors_of_ports(ends: Ends) -> None:
    signal, kick = (kind(os.eventfd(0, os.EFD_NONBLOCK)) for kind in (Signal, Kick))
    for port in (signal, kick):
        ends.port.send(pack(Request.SET_VRING_CALL, VringFile(1, True)), [port])
        data, fds, _, _ = socket.recv_fds(ends.program, 100, 4)
        header = parse_header(data[:HEADER_SIZE])
        assert parse(header, data[HEADER_SIZE:], len(fds)) == (Request.SET_VRING_CALL, VringFile(1, True))
        assert os.path.samestat(os.fstat(fds[0]), os.fstat(port.fd))
        os.eventfd_write(fds[0], 3)
        assert os.eventfd_read(port.fd) == 3
        os.close(fds[0])
        os.close(port.fd)


def test_answers_come_whole_however_they_are_cut(ends: Ends) -> None:
    for at in range(len(ANSWER)):
        ends.program.sendall(ANSWER[:at])
        if at:
            ends.port.on_readable()
        assert ends.answers == []
        ends.program.sendall(ANSWER[at:] + ANSWER)
        ends.port.on_readable()
        assert ends.answers == [(parse_header(ANSWER[:HEADER_SIZE]), ANSWER[HEADER_SIZE:])] * 2
        ends.answers.clear()


def test_descriptors_that_come_along_are_dropped(ends: Ends) -> None:
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(ends.program, [ANSWER], [ends.program.fileno()] * 50)
    ends.port.on_readable()
    assert len(ends.answers) == 1
    assert len(os.listdir("/proc/self/fd")) <= before  # others may have been collected meanwhile


def test_the_end_is_told_once(ends: Ends) -> None:
    assert ends.port.wants_read
    ends.program.close()
    ends.port.on_readable()
    ends.port.on_readable()
    ends.port.send(pack(Request.SET_OWNER))
    ends.port.hang_up("whatever")
    assert ends.gone == ["has closed its socket"]
    assert not ends.port.up
    assert not ends.port.wants_read


def test_one_that_has_gone_is_found_out_when_it_is_told_something(ends: Ends) -> None:
    ends.program.close()
    ends.port.send(pack(Request.SET_OWNER))
    assert ends.gone == ["has gone: Broken pipe"]


def test_one_that_takes_nothing_is_not_waited_for(ends: Ends) -> None:
    """An activation, of four queues, is 26 messages."""
    sent = 0
    while ends.port.up:
        ends.port.send(pack(Request.SET_VRING_ENABLE, VringState(0, 1)))
        sent += 1
        assert sent < 100_000
    assert sent > 4 * 26
    assert ends.gone == ["does not take what it is sent"]


def test_hanging_up_ends_it_for_the_program_too(ends: Ends) -> None:
    ends.port.hang_up("does not stop its rings")
    assert ends.gone == ["does not stop its rings"]
    assert ends.program.recv(1) == b""


def test_what_the_model_refuses_ends_it(ends: Ends) -> None:
    def refuse(header: Header, body: bytes) -> None:
        raise MessageError("not that")

    ends.port.listen(refuse, ends.gone.append)
    ends.program.sendall(ANSWER * 2)
    ends.port.on_readable()
    assert ends.gone == ["has broken the protocol: not that"]


@given(data=st.binary(min_size=1, max_size=600), cut=st.integers(1, 599))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_answers_or_the_end(data: bytes, cut: int) -> None:
    ends = Ends()
    for part in (data[:cut], data[cut:]):
        if part and ends.port.up:
            ends.program.sendall(part)
            ends.port.on_readable()
            ends.port.on_readable()
    assert len(ends.gone) == (0 if ends.port.up else 1)
    assert all(len(body) == header.size for header, body in ends.answers)
    ends.close()
