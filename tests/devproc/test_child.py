"""The device's loop over real socket pairs and pipes, without a jail; the model is a stub that records."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import pytest

from devproc import child, wire
from devproc.backends.output import BUFFER_MAX, WRITE_MAX
from devproc.catalog import Descriptor, Entry, Param, Region
from devproc.channel import Channel, ChannelClosed
from devproc.ports import HostError
from devproc.wire import PeerError, Sender, Space
from kvmcore.mailbox import Mailbox

ENTRY = Entry(
    "scribe",
    "a model that records what happens to it",
    "unused",
    "Scribe",
    regions=(Region(Space.PORT, 8, "any"), Region(Space.CONFIG, 256, "any")),
    descriptors=(
        Descriptor("irq", "signal", "an edge"),
        Descriptor("input", "input", "bytes in"),
        Descriptor("output", "output", "bytes out"),
        Descriptor("bell", "kick", "edges in", 2),
    ),
    params=(Param("gain", 0, 9, "read back"),),
    settings=(Param("gain", 0, 9, "read back"),),
    sources=("clock", "wall", "log"),
)
DEADLINE = 7  # writing here sets a deadline that far ahead, in ms
OUT = 6  # writing here outputs a byte that many times 256
FEED = 5  # writing 1 here lets input in
SAY = 4  # writing here says a line that long


class Scribe:
    TABLES: ClassVar[tuple[object, ...]] = ()

    def __init__(
        self,
        *,
        irq: Callable[[], None],
        input: Any,
        output: Any,
        bell: tuple[Any, ...],
        gain: int,
        clock: Any,
        wall: Any,
        log: Callable[[str], None],
    ) -> None:
        self.say = log
        self.irq, self.input, self.output, self.gain = irq, input, output, gain
        self.clock, self.wall = clock, wall
        self.shadows: dict[int, Callable[[], int | None]] = {}
        self.deadline_ns: int | None = None
        self.wants_input = False
        input.listen(lambda: self.wants_input, self.on_input)
        output.listen(self.on_output)
        for n, k in enumerate(bell):
            k.listen(partial(self.on_bell, n))
        self.log: list[tuple[Any, ...]] = []
        self.state = b"fresh"

    def read(self, space: int, offset: int, size: int) -> int:
        self.log.append(("read", space, offset, size))
        return self.gain if offset == 0 else -1

    def write(self, space: int, offset: int, size: int, data: int) -> None:
        self.log.append(("write", space, offset, size, data))
        if offset == DEADLINE:
            self.deadline_ns = self.clock() + data * 1_000_000
        if offset == OUT:
            self.output.write(b"x" * (data * 256))
        if offset == SAY:
            self.say("y" * data * 100)
        if offset == FEED:
            self.wants_input = bool(data)

    def on_deadline(self, now_ns: int) -> None:
        assert self.deadline_ns is not None and now_ns >= self.deadline_ns
        self.deadline_ns = None
        self.irq()

    def on_input(self) -> None:
        self.log.append(("input", self.input.read(2), self.input.read(2)))
        self.irq()

    def on_bell(self, number: int) -> None:
        self.log.append(("bell", number))
        self.irq()

    def on_output(self) -> None:
        self.log.append(("room", self.output.room))

    def set(self, name: str, value: int) -> None:
        assert name == "gain"
        self.gain = value

    def stop(self) -> None:
        self.log.append(("stop",))

    def save(self) -> bytes:
        return self.state

    def restore(self, state: bytes) -> None:
        if state == b"bad":
            raise ValueError("not a state")
        self.state = state

    def counters(self) -> dict[str, int]:
        return {"reads": 3, "writes": 4}


class Host:
    """The supervisor's ends, and the loop in a thread."""

    def __init__(self) -> None:
        self.access, access = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.access.settimeout(5)
        ours.settimeout(5)
        self.control = Channel(ours, wire.CONTROL_TABLE, "serving", Sender.SUPERVISOR, Sender.DEVICE)
        control = Channel(theirs, wire.CONTROL_TABLE, "serving", Sender.DEVICE, Sender.SUPERVISOR)
        self.input_read, self.input = os.pipe()
        self.output, self.output_write = os.pipe()
        self.irq = os.eventfd(0, os.EFD_NONBLOCK)
        self.bells = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        # the entry's descriptors have successive numbers
        first = 900
        own = (self.irq, self.input_read, self.output_write, *self.bells)
        for slot, fd in enumerate(own, first):
            os.dup2(fd, slot)
        self.mailbox = Mailbox.create()
        self.server = child.Server(
            ENTRY, Scribe, {"gain": 5}, access, control, first=first, mailbox=self.mailbox.fds
        )
        self.model: Scribe = self.server.device  # type: ignore[assignment]
        self.slots = range(first, first + len(own))
        self.ended: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(access, control), daemon=True)

    def _run(self, access: socket.socket, control: Channel) -> None:
        try:
            self.server.serve()
        except BaseException as e:
            self.ended = e
        access.close()
        control.close()

    def join(self) -> BaseException | None:
        self.thread.join(5)
        assert not self.thread.is_alive()
        return self.ended

    def send(self, message: wire.Message) -> None:
        self.access.send(wire.encode(message))

    def ask(self, message: wire.Message) -> wire.Message:
        self.send(message)
        return wire.decode(self.access.recv(100))

    def write(self, offset: int, data: int) -> wire.Message:
        return self.ask(wire.Write(Space.PORT, offset, 1, data, False))

    def edge(self) -> int:
        assert select.select([self.irq], [], [], 5)[0]
        return os.eventfd_read(self.irq)

    def drain(self, count: int) -> bytes:
        data = b""
        while len(data) < count and select.select([self.output], [], [], 5)[0]:
            data += os.read(self.output, count - len(data))
        return data

    def close(self) -> None:
        self.access.close()
        self.control.close()
        self.thread.join(5)
        mine = (self.irq, self.input_read, self.input, self.output, self.output_write, *self.bells)
        for fd in (*mine, *self.slots, *self.mailbox.fds):
            with contextlib.suppress(OSError):  # the test may have closed it
                os.close(fd)


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    host.thread.start()
    yield host
    host.close()


def test_a_read_is_answered_with_the_models_value(host: Host) -> None:
    assert host.ask(wire.Read(Space.PORT, 0, 4)) == wire.Value(5)
    assert host.model.log == [("read", Space.PORT, 0, 4)]


def test_a_marked_write_is_done_and_a_posted_one_silent(host: Host) -> None:
    assert host.write(1, 9) == wire.Done()
    host.send(wire.Write(Space.CONFIG, 255, 1, 8, True))
    assert host.ask(wire.Read(Space.PORT, 0, 1)) == wire.Value(5)
    assert host.model.log[:2] == [("write", Space.PORT, 1, 1, 9), ("write", Space.CONFIG, 255, 1, 8)]


def test_posted_writes_arrive_in_order_however_many_wait() -> None:
    host = Host()
    for n in range(68):  # more than one turn of the loop takes, and no more than the socket holds
        host.send(wire.Write(Space.PORT, 1, 1, n, True))
    host.thread.start()
    host.ask(wire.Read(Space.PORT, 0, 1))
    host.close()
    assert [entry[-1] for entry in host.model.log[:-1]] == list(range(68))


@pytest.mark.parametrize(
    "message",
    [
        wire.Read(Space.PORT, 8, 1),
        wire.Read(Space.PORT, 7, 2),
        wire.Read(Space.BAR0, 0, 1),
        wire.Read(Space.PORT, wire.U64_MAX, 8),
        wire.Ping(1),
    ],
    ids=repr,
)
def test_an_access_outside_the_devices_registers_never_reaches_the_model(
    host: Host, message: wire.Message
) -> None:
    host.send(message)
    assert isinstance(host.join(), PeerError)
    assert host.model.log == []


def test_a_value_that_does_not_fit_is_a_bug_of_ours(host: Host) -> None:
    host.send(wire.Read(Space.PORT, 1, 1))
    assert isinstance(host.join(), wire.WireError)


def test_a_deadline_is_kept_while_nothing_else_happens(host: Host) -> None:
    host.write(DEADLINE, 20)
    assert host.edge() == 1
    assert host.model.deadline_ns is None


def test_a_deadline_that_is_past_already_is_kept_too(host: Host) -> None:
    host.write(DEADLINE, 0)
    assert host.edge() == 1


def test_input_is_read_only_when_the_model_wants_it_and_once_per_readiness(host: Host) -> None:
    os.write(host.input, b"abc")
    host.ask(wire.Read(Space.PORT, 0, 1))
    assert not [e for e in host.model.log if e[0] == "input"]
    host.write(FEED, 1)
    host.edge()
    assert host.model.log[2] == ("input", b"ab", b"")


def test_input_at_its_end_is_never_watched_again(host: Host) -> None:
    os.close(host.input)
    host.write(FEED, 1)
    host.edge()
    host.ask(wire.Read(Space.PORT, 0, 1))
    host.ask(wire.Read(Space.PORT, 0, 1))
    assert [e for e in host.model.log if e[0] == "input"] == [("input", b"", b"")]


def test_each_of_an_array_of_kicks_is_taken_and_told_by_its_number(host: Host) -> None:
    os.eventfd_write(host.bells[1], 3)
    host.edge()
    os.eventfd_write(host.bells[0], 1)
    host.edge()
    assert host.model.log == [("bell", 1), ("bell", 0)]
    with pytest.raises(BlockingIOError):
        os.eventfd_read(host.bells[1])


def test_what_the_model_says_reaches_the_user_cut_to_a_lines_length(host: Host) -> None:
    host.write(SAY, 1)
    assert host.control.recv() == wire.Log(30, "y" * 100)
    host.write(SAY, 99)
    assert host.control.recv() == wire.Log(30, "y" * wire.TEXT_MAX)


def test_output_reaches_the_host(host: Host) -> None:
    host.write(OUT, 1)
    assert host.drain(256) == b"x" * 256


def test_a_host_that_does_not_drain_delays_nothing_and_the_model_hears_of_room(host: Host) -> None:
    for _ in range(3):
        host.write(OUT, 255)
    accepted = host.model.output.pending
    assert accepted > 0 and host.ask(wire.Read(Space.PORT, 0, 1)) == wire.Value(5)
    while host.model.output.room:
        host.write(OUT, 255)
    assert host.drain(2 * WRITE_MAX) == b"x" * (2 * WRITE_MAX)
    deadline = time.monotonic() + 5
    while ("room", WRITE_MAX) not in host.model.log and time.monotonic() < deadline:
        time.sleep(0.001)
    assert ("room", WRITE_MAX) in host.model.log
    assert host.model.output.room <= BUFFER_MAX


def test_output_that_fails_ends_the_device(host: Host) -> None:
    os.close(host.output)
    host.send(wire.Write(Space.PORT, OUT, 1, 1, True))
    error = host.join()
    assert isinstance(error, HostError) and str(error) == "cannot write output: Broken pipe"


def test_the_lifecycle_questions_are_answered(host: Host) -> None:
    for question, answer in (
        (wire.Ping(77), wire.Pong(77)),
        (wire.Save(), wire.State(b"fresh")),
        (wire.Restore(b"other"), wire.Done()),
        (wire.Save(), wire.State(b"other")),
        (wire.Stats(), wire.Counters(("reads", 3, "writes", 4))),
    ):
        host.control.send(question)
        assert host.control.recv() == answer


def test_a_setting_is_taken_without_an_answer(host: Host) -> None:
    host.control.send(wire.Set("gain", 7))
    host.control.send(wire.Ping(1))
    assert host.control.recv() == wire.Pong(1)
    assert host.ask(wire.Read(Space.PORT, 0, 1)) == wire.Value(7)


@pytest.mark.parametrize("wrong", [wire.Set("gain", 10), wire.Set("volume", 1)], ids=str)
def test_a_setting_that_the_catalogue_does_not_have_ends_the_device(host: Host, wrong: wire.Set) -> None:
    host.control.send(wrong)
    error = host.join()
    assert isinstance(error, PeerError) and f"cannot set {wrong.name} to {wrong.value}" in str(error)


def test_a_state_that_is_none_is_refused_by_name(host: Host) -> None:
    host.control.send(wire.Restore(b"bad"))
    assert host.control.recv() == wire.Failed("restore: not a state")


def test_stop_writes_out_what_the_guest_sent(host: Host) -> None:
    for _ in range(4):
        host.write(OUT, 64)
    host.control.send(wire.Stop())
    # More than a pipe holds would wait for the host for a second; this is less and does not.
    assert host.drain(4 * 64 * 256) == b"x" * (4 * 64 * 256)
    assert host.join() is None
    assert host.model.log[-1] == ("stop",)


@pytest.mark.parametrize("which", ["access", "control"])
def test_either_channels_end_is_the_devices_end(host: Host, which: str) -> None:
    getattr(host, which).close()
    assert isinstance(host.join(), ChannelClosed)


def test_what_a_table_does_not_allow_on_control_is_a_peer_error(host: Host) -> None:
    host.control.sock.send(wire.encode(wire.Ready(b"")))
    assert isinstance(host.join(), PeerError)
