"""The keyboard over a real pty, and its escape."""

import os
import pty
import select

import pytest

from supervisor import terminal
from supervisor.janitor import Janitor
from supervisor.terminal import Keyboard, Typed


@pytest.fixture
def raw_tty():
    """(the user's end, our end in raw mode)"""
    master, slave = pty.openpty()
    janitor = Janitor.start()
    terminal.set_raw(slave, janitor)
    yield master, slave
    janitor.finish()
    os.close(master)
    os.close(slave)


@pytest.fixture
def keyboard(raw_tty):
    """(the user's end, the keyboard, the serial port's end)"""
    read, write = os.pipe()
    os.set_blocking(read, False)
    yield raw_tty[0], Keyboard(raw_tty[1], write), read
    for fd in (read, write):
        os.close(fd)


def typed(keyboard, data):
    """What comes of `data` typed in one go: (the pumps' results, the bytes at the port)."""
    user, keys, port = keyboard
    os.write(user, data)
    results = []
    while select.select([keys.fd], [], [], 0)[0] and Typed.END not in results:
        results.append(keys.pump())
    try:
        return results, os.read(port, 1 << 16)
    except BlockingIOError:
        return results, b""


def test_raw_mode_passes_every_byte_as_it_is(keyboard):
    data = bytes(b for b in range(256) if b != terminal.ESCAPE)
    assert typed(keyboard, data) == ([Typed.MORE], data)


def test_raw_mode_keeps_output_processing(raw_tty):
    user, ours = raw_tty
    os.write(ours, b"line\n")
    assert os.read(user, 100) == b"line\r\n"


def test_raw_mode_does_not_echo(raw_tty):
    user, ours = raw_tty
    os.write(user, b"secret")
    assert os.read(ours, 100) == b"secret"
    assert select.select([user], [], [], 0)[0] == []


def test_ctrl_c_goes_to_the_guest(keyboard):
    assert typed(keyboard, b"\x03") == ([Typed.MORE], b"\x03")


@pytest.mark.parametrize("key", [b"x", b"X"])
def test_ctrl_a_x_ends_the_machine(keyboard, key):
    assert typed(keyboard, b"\x01" + key)[0] == [Typed.END]


def test_ctrl_a_x_counts_when_it_comes_in_two_pieces(keyboard):
    assert typed(keyboard, b"\x01") == ([Typed.MORE], b"")
    assert typed(keyboard, b"x")[0] == [Typed.END]


@pytest.mark.parametrize("second", [b"\x01", b"a"])
def test_ctrl_a_twice_sends_one(keyboard, second):
    assert typed(keyboard, b"\x01" + second) == ([Typed.MORE], b"\x01")


def test_ctrl_a_before_another_key_sends_both(keyboard):
    assert typed(keyboard, b"\x01q") == ([Typed.MORE], b"\x01q")


def test_an_x_after_a_sent_ctrl_a_is_an_x(keyboard):
    assert typed(keyboard, b"\x01\x01x") == ([Typed.MORE], b"\x01x")


def test_bytes_typed_faster_than_the_guest_takes_them_arrive_complete_and_in_order(keyboard):
    user, keys, port = keyboard
    os.set_blocking(user, False)
    data = b"".join(b"%06d," % n for n in range(40000))  # more than pipe and terminal together hold
    sent, arrived, was_blocked = 0, bytearray(), False
    while len(arrived) < len(data):
        if sent < len(data):
            try:
                sent += os.write(user, data[sent : sent + 3000])
                continue
            except BlockingIOError:
                pass
        if keys.blocked:
            was_blocked = True
            arrived += os.read(port, 5000)  # only now does the guest take some
        if keys.blocked or select.select([keys.fd], [], [], 0)[0]:
            assert keys.pump() is Typed.MORE
        elif sent == len(data):
            arrived += os.read(port, 1 << 16)
    assert was_blocked
    assert arrived == data


def test_nothing_is_read_while_the_port_is_full(keyboard):
    user, keys, _ = keyboard
    os.write(keys.sink, bytes(1 << 16))
    os.write(user, b"abc")
    assert keys.pump() is Typed.MORE
    assert keys.blocked
    os.write(user, b"def")
    keys.pump()
    assert os.read(keys.fd, 100) == b"def"
    assert keys.blocked


def test_a_terminal_that_is_gone_is_closed():
    master, slave = pty.openpty()
    read, write = os.pipe()
    os.close(master)
    assert Keyboard(slave, write).pump() is Typed.CLOSED
    for fd in (slave, read, write):
        os.close(fd)


def test_a_serial_port_that_is_gone_is_closed(raw_tty):
    read, write = os.pipe()
    os.close(read)
    os.write(raw_tty[0], b"a")
    assert Keyboard(raw_tty[1], write).pump() is Typed.CLOSED
    os.close(write)


def in_session(act):
    """Whether `act(tty)` is true in a process of its own session whose controlling terminal is `tty`."""
    pid, master = pty.fork()
    if pid == 0:
        os._exit(0 if act(0) else 1)
    _, status = os.waitpid(pid, 0)
    os.close(master)
    return os.waitstatus_to_exitcode(status) == 0


def test_the_terminal_is_ours_in_the_foreground_only():
    def in_background(tty):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            os._exit(int(terminal.is_ours(tty)))
        return os.waitpid(pid, 0)[1] == 0

    assert in_session(terminal.is_ours)
    assert in_session(in_background)


def test_what_is_no_terminal_is_not_ours():
    read, write = os.pipe()
    assert not terminal.is_ours(read)
    os.close(read)
    os.close(write)
    assert not terminal.is_ours(write)
