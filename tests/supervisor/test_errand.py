"""What a process that hears front ends may ask, once it has been taken over."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devproc import state
from supervisor import errand
from supervisor.errand import Asker, Halt, Left, ReadConfig, Region, Ring, Serve, WriteConfig
from supervisor.worker import Worker

NOBODY = cast(Worker, SimpleNamespace(queues=2))  # does nothing: what is refused must not come that far
REGION = Region(0, 4096, 0, 0)
RING = Ring(1, 16, 0, 0, 0, 0, True)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def refused(ends: tuple[socket.socket, socket.socket], frame: bytes, fds: int) -> str:
    ours, theirs = ends
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(theirs, [frame], [1] * fds) if fds else theirs.send(frame)
    with pytest.raises(ValueError) as e:
        errand.answer(ours, NOBODY, print)
    assert len(os.listdir("/proc/self/fd")) == before
    return str(e.value)


@pytest.mark.parametrize(
    ("question", "fds", "why"),
    [
        (Serve(0, (REGION,), (RING,)), 2, "Serve with 2 descriptors"),
        (Serve(0, (REGION,), (RING,)), 4, "Serve with 4 descriptors"),
        (Serve(0, (REGION,), (Ring(2, 16, 0, 0, 0, 0, False),)), 2, "queue 2"),
        (Halt(), 1, "Halt with 1 descriptors"),
        (ReadConfig(250, 7), 0, "ReadConfig"),
        (WriteConfig(256, b"x"), 0, "WriteConfig"),
        (errand.Done(), 0, "unexpected"),
    ],
)
def test_what_may_not_be_asked_is_refused(
    ends: tuple[socket.socket, socket.socket], question: Any, fds: int, why: str
) -> None:
    assert why in refused(ends, state.pack(question), fds)


def test_too_many_descriptors_or_bytes_are_refused(ends: tuple[socket.socket, socket.socket]) -> None:
    assert refused(ends, state.pack(Halt()), errand.FDS_MAX + 1) == "a frame that is too long"
    assert refused(ends, b"x" * 20000, 1) == "a frame that is too long"


@given(
    st.binary(min_size=1, max_size=60)
    | st.tuples(
        st.sampled_from(["Serve", "Halt", "Left", "ReadConfig", "WriteConfig"]), st.text(max_size=40)
    ).map(lambda t: f'{{"{t[0]}":{t[1]}}}'.encode())
)
def test_any_bytes_are_refused(frame: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        if frame != b'{"Halt":{}}':
            refused((ours, theirs), frame, 0)


def test_an_end_is_heard_of(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    asker = Asker(theirs)
    ours.shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError):
        asker.read_config(0, 4)
    ours.close()
    with pytest.raises(EOFError):
        asker.left("")
    with pytest.raises(EOFError):
        errand.answer(theirs, NOBODY, print)


def test_why_a_front_end_was_sent_away_is_said(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    stopped: list[str] = []
    worker = cast(Worker, SimpleNamespace(stop=lambda: stopped.append("stopped")))
    theirs.send(state.pack(Left(b"that is why")))
    errand.answer(ours, worker, stopped.append)
    assert stopped == ["stopped", "that is why"]
    assert state.unpack(errand.Done, theirs.recv(100)) == errand.Done()
