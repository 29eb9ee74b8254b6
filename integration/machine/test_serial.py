"""What a serial port can be connected to, with a guest on the other end."""

from __future__ import annotations

import os
import socket
import subprocess
import termios
import time
import tty
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.boot import vm
from integration.machine.conftest import PATIENCE_S, Machine

pytestmark = pytest.mark.kvm

Start = Callable[..., Machine]


def wait_until(there: Callable[[], bool]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not there():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def test_a_file_is_appended_to_and_another_is_typed(machine: Start, tmp_path: Path) -> None:
    log, keys = tmp_path / "log", tmp_path / "keys"
    log.write_text("before\n")
    keys.write_text("abcq")
    one = machine("echo", "--serial", f"type=file,path={log},input={keys}", ready=False)
    assert one.end() == 0
    assert log.read_text() == "before\nready\nabc"


def test_standard_input_may_be_a_pipe(elf: Callable[[str], str]) -> None:
    words = vm.command("run", elf("echo"))
    done = subprocess.run(words, input=b"typed" * 1000 + b"q", capture_output=True, cwd=vm.ROOT, check=False)
    assert (done.returncode, done.stdout) == (0, b"ready\n" + b"typed" * 1000)


def test_a_sink_discards(machine: Start) -> None:
    one = machine("hello", "--serial", "sink", ready=False)
    assert one.process.stdout is not None
    assert one.end() == 0
    assert one.process.stdout.read() == b""


def test_a_socket_is_listened_on_and_taken_away(machine: Start, tmp_path: Path) -> None:
    path = tmp_path / "com1"
    one = machine("echo", "--serial", f"socket,path={path}", ready=False)
    wait_until(path.exists)
    for text in (b"first", b"second"):  # one client after another
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE_S)
            client.connect(str(path))
            client.sendall(text)
            seen = b""
            while not seen.endswith(text):
                seen += client.recv(100)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b"q")
        assert one.end() == 0
    assert not path.exists()


def test_a_socket_that_listens_is_connected_to(machine: Start, tmp_path: Path) -> None:
    path = tmp_path / "com1"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(PATIENCE_S)
        one = machine("echo", "--serial", f"socket,path={path}", ready=False)
        peer, _ = listener.accept()
        with peer:
            peer.settimeout(PATIENCE_S)
            seen = b""
            while seen != b"ready\n":
                seen += peer.recv(100)
            peer.sendall(b"q")
            assert one.end() == 0
    assert path.exists()  # it is not ours


def test_a_pty_has_its_link_and_discards_while_nobody_listens(machine: Start, tmp_path: Path) -> None:
    link = tmp_path / "com1"
    one = machine("chatter", "--serial", f"pty,path={link}", ready=False)
    wait_until(link.is_symlink)
    time.sleep(1)  # the guest prints all the while
    fd = os.open(link, os.O_RDWR | os.O_NOCTTY)
    assert termios.tcgetattr(fd)[3] & termios.ECHO == 0
    assert b"ready" in b"".join(os.read(fd, 100) for _ in range(10))
    os.close(fd)
    one.process.terminate()
    assert one.end() == 143
    assert not link.is_symlink()


def test_input_from_a_pty_reaches_the_guest(machine: Start, tmp_path: Path) -> None:
    link = tmp_path / "com1"
    one = machine("echo", "--serial", f"pty,path={link}", ready=False)
    wait_until(link.is_symlink)
    fd = os.open(link, os.O_RDWR | os.O_NOCTTY)
    tty.setraw(fd)
    os.write(fd, b"typed.")
    seen = b""
    while not seen.endswith(b"typed."):
        seen += os.read(fd, 100)
    os.write(fd, b"q")
    assert one.end() == 0
    os.close(fd)


@pytest.mark.parametrize(
    ("serial", "complaint"),
    [
        ("file", "needs path="),
        ("file,path=/nonexistent/x", "No such file or directory"),
        ("socket,path=/nonexistent/x", "No such file or directory"),
        ("pty,path=/proc/x", "No such file or directory"),
        ("sink,input=/nonexistent", "No such file or directory"),
        ("stdio,num=5", "from 1 to 4"),
        ("tape", "expected one of stdio, file, socket, pty, sink"),
    ],
)
def test_a_port_that_cannot_be_had_is_one_line(
    elf: Callable[[str], str], serial: str, complaint: str
) -> None:
    done = vm.run("--serial", serial, elf("hello"))
    assert done.code == 35
    assert complaint in done.errors
    assert done.errors.count("\n") == 1
