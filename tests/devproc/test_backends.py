"""The ports that touch the host, on real descriptors."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import socket
from collections.abc import Iterator

import pytest

from devproc.backends import memory
from devproc.backends.entropy import entropy
from devproc.backends.input import Input
from devproc.backends.kick import Kick
from devproc.backends.output import BUFFER_MAX, WRITE_MAX, Output
from devproc.backends.signal import Signal
from devproc.ports import HostError
from devproc.vhost import message
from devproc.vhost.message import MemoryRegion, Request
from kvmcore.memory import GuestMemory

Pipe = tuple[int, int]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    read, write = os.pipe()
    yield read, write
    for fd in (read, write):
        with contextlib.suppress(OSError):  # the test may have closed this end
            os.close(fd)


def test_each_signal_adds_one_to_the_eventfd() -> None:
    fd = os.eventfd(0)
    signal = Signal(fd)
    signal()
    signal()
    assert os.eventfd_read(fd) == 2
    os.close(fd)


def test_output_reaches_the_host_in_order_and_only_by_flush(pipe: Pipe) -> None:
    read, write = pipe
    out = Output(write)
    assert out.write(b"ab") == 2 and out.write(b"c") == 1
    assert out.pending == 3
    assert select.select([read], [], [], 0)[0] == []
    out.flush()
    assert (os.read(read, 9), out.pending, out.room) == (b"abc", 0, BUFFER_MAX)


def test_output_takes_no_more_than_its_room() -> None:
    out = Output(-1)
    assert out.write(bytes(BUFFER_MAX - 1)) == BUFFER_MAX - 1
    assert out.room == 1
    assert out.write(b"xyz") == 1
    assert out.write(b"z") == 0
    assert (out.room, out.pending) == (0, BUFFER_MAX)


def test_a_pipe_that_select_calls_writable_never_blocks_flush(pipe: Pipe) -> None:
    read, write = pipe
    out = Output(write)
    out.write(bytes(BUFFER_MAX))
    out.flush()
    assert BUFFER_MAX - out.pending == WRITE_MAX
    while select.select([], [write], [], 0)[1]:
        if not out.pending:
            out.write(bytes(BUFFER_MAX))
        out.flush()
    assert os.get_blocking(write)
    assert len(os.read(read, 1 << 20)) % WRITE_MAX == 0


def test_a_full_non_blocking_descriptor_loses_nothing(pipe: Pipe) -> None:
    _, write = pipe
    os.set_blocking(write, False)
    out = Output(write)
    try:
        while True:
            os.write(write, bytes(4096))
    except BlockingIOError:
        out.write(b"kept")
    out.flush()
    assert out.pending == 4


def test_output_to_a_closed_pipe_is_an_error(pipe: Pipe) -> None:
    read, write = pipe
    os.close(read)
    out = Output(write)
    out.write(b"x")
    with pytest.raises(HostError, match="cannot write output: Broken pipe"):
        out.flush()


def test_input_is_read_once_per_readiness_and_never_blocks(pipe: Pipe) -> None:
    read, write = pipe
    source = Input(read)
    source.listen(lambda: True, lambda: None)
    assert source.read(4) == b""  # nothing there: a read would block for ever
    os.write(write, b"abcdef")
    source.on_readable()
    assert source.read(0) == b""
    assert source.read(4) == b"abcd"
    assert source.read(4) == b""
    source.on_readable()
    assert source.read(4) == b"ef"


def test_end_of_input_is_final(pipe: Pipe) -> None:
    read, write = pipe
    os.close(write)
    source = Input(read)
    source.listen(lambda: True, lambda: None)
    source.on_readable()
    assert source.read(1) == b""
    assert not source.wants_read


def test_a_hung_up_terminal_is_end_of_input() -> None:
    master, slave = pty.openpty()
    os.close(slave)
    source = Input(master)
    source.listen(lambda: True, lambda: None)
    source.on_readable()
    assert source.read(1) == b""
    assert not source.wants_read
    os.close(master)


def test_not_ready_after_all_is_not_the_end(pipe: Pipe) -> None:
    read, _ = pipe
    os.set_blocking(read, False)
    source = Input(read)
    source.listen(lambda: True, lambda: None)
    source.on_readable()
    assert source.read(1) == b""
    assert source.wants_read


def test_a_broken_source_is_an_error() -> None:
    fd = os.open("/", os.O_RDONLY)
    source = Input(fd)
    source.listen(lambda: True, lambda: None)
    source.on_readable()
    with pytest.raises(HostError, match="cannot read input: Is a directory"):
        source.read(1)
    os.close(fd)


def test_input_is_watched_only_while_it_is_wanted(pipe: Pipe) -> None:
    source = Input(pipe[0])
    wanted, told = [False], []
    source.listen(lambda: wanted[0], lambda: told.append(source.read(9)))
    assert not source.wants_read
    wanted[0] = True
    assert source.wants_read
    os.write(pipe[1], b"ab")
    source.on_readable()
    assert told == [b"ab"]


def test_a_kick_is_taken_and_told_once_however_many_edges_there_were() -> None:
    fd = os.eventfd(3, os.EFD_NONBLOCK)
    kick, told = Kick(fd), []
    kick.listen(lambda: told.append("kicked"))
    kick.on_readable()
    assert told == ["kicked"]
    assert select.select([fd], [], [], 0)[0] == []
    kick.on_readable()  # taken by someone else meanwhile: never blocks
    os.close(fd)


def test_guest_memory_is_mapped_around_the_gap_in_the_order_of_the_file() -> None:
    ram = GuestMemory.create([(0, 4096), (1 << 32, 8192)])
    mapped = memory.attach(os.dup(ram.fd), 4096, 8192)
    ram.write(0x1000 - 4, b"last")
    ram.write(1 << 32, b"high")
    assert (mapped.read(0x1000 - 4, 4), mapped.read(1 << 32, 4)) == (b"last", b"high")
    del mapped
    ram.close()


def test_guest_memory_of_another_size_is_refused() -> None:
    ram = GuestMemory.create([(0, 4096)])
    with pytest.raises(ValueError, match="file of 0x1000 bytes, expected 0x2000"):
        memory.attach(os.dup(ram.fd), 4096, 4096)
    ram.close()


def test_entropy_gives_as_much_as_is_asked_for() -> None:
    assert len(entropy(16)) == 16
    assert entropy(16) != entropy(16)


def test_guest_memory_of_another_vmm_is_in_pieces_of_files() -> None:
    files = [os.memfd_create(name) for name in ("low", "high")]
    for fd in files:
        os.truncate(fd, 4 * 4096)
    regions = (
        MemoryRegion(1 << 32, 8192, 1, 4096),
        MemoryRegion(0, 4096, 2, 0),
        MemoryRegion(8192, 4096, 3, 0),
    )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fds = files[0], files[0], files[1]
        socket.send_fds(ours, [message.pack(Request.SET_MEM_TABLE, regions)], fds)
        mapped = memory.attach(theirs.fileno(), 0, 0)
    mapped.write(0, b"first")
    mapped.write((1 << 32) + 8190, b"hi")
    mapped.write(8192, b"gap")
    assert (os.pread(files[0], 5, 0), os.pread(files[0], 2, 3 * 4096 - 2)) == (b"first", b"hi")
    assert os.pread(files[1], 3, 0) == b"gap"
    os.pwrite(files[1], b"seen", 100)
    assert mapped.read(8192 + 100, 4) == b"seen"
    for gpa, size in ((4096, 1), (4095, 2), (3 * 4096, 1), ((1 << 32) + 8192, 1)):
        assert not mapped.holds(gpa, size)
    for fd in files:
        os.close(fd)


def test_guest_memory_that_cannot_be_mapped_is_an_error() -> None:
    read_only = os.open("/proc/self/exe", os.O_RDONLY)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        frame = message.pack(Request.SET_MEM_TABLE, (MemoryRegion(0, 4096, 0, 0),))
        socket.send_fds(ours, [frame], [read_only])
        with pytest.raises(HostError, match=r"^guest memory: mmap: Permission denied$"):
            memory.attach(theirs.fileno(), 0, 0)
    os.close(read_only)
