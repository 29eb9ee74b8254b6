"""What each serial port is connected to, with real files, sockets and ptys."""

import contextlib
import os
import pty
import socket
import stat
import subprocess
import sys
import termios

import pytest

from kvmcore.errors import ConfigError
from supervisor.config import SerialConfig
from supervisor.console import open_console, open_virtio_consoles
from supervisor.host import Host
from supervisor.janitor import Janitor
from supervisor.relay import PtyRelay, SocketRelay


@pytest.fixture
def janitor():
    janitor = Janitor.start()
    yield janitor
    janitor.finish()


@pytest.fixture
def opened(janitor):
    consoles = []

    def open_(**port):
        consoles.append(open_console(SerialConfig(1, **port), janitor))
        return consoles[-1]

    yield open_
    for c in consoles:
        c.close()


def test_a_sink_has_no_input_and_swallows_output(opened):
    c = opened(type="sink")
    assert os.read(c.input, 10) == b""
    assert os.write(c.output, b"gone") == 4


def test_a_file_is_appended_to_and_private(opened, tmp_path):
    path = tmp_path / "log"
    for text in (b"one", b"two"):
        os.write(opened(type="file", path=str(path)).output, text)
    assert path.read_bytes() == b"onetwo"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_may_have_an_input(opened, tmp_path):
    (tmp_path / "in").write_bytes(b"typed")
    c = opened(type="file", path=str(tmp_path / "out"), input=str(tmp_path / "in"))
    assert os.read(c.input, 10) == b"typed"


def test_a_socket_is_made_and_removed_afterwards(tmp_path):
    janitor = Janitor.start()
    path = tmp_path / "com1"
    c = open_console(SerialConfig(1, "socket", str(path)), janitor)
    assert isinstance(c.relay, SocketRelay)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    c.close()
    janitor.finish()
    assert not path.exists()


def test_a_socket_that_somebody_listens_on_is_connected_to_and_kept(tmp_path):
    janitor = Janitor.start()
    path = tmp_path / "com1"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        c = open_console(SerialConfig(1, "socket", str(path)), janitor)
        listener.accept()[0].close()
        c.close()
        janitor.finish()
        assert path.exists()


def test_a_pty_is_raw_linked_and_named_to_the_user(tmp_path):
    janitor = Janitor.start()
    link = tmp_path / "com1"
    c = open_console(SerialConfig(1, "pty", str(link)), janitor)
    assert isinstance(c.relay, PtyRelay)
    assert c.note == f"--serial num=1 is {os.readlink(link)}"
    user = os.open(link, os.O_RDWR | os.O_NOCTTY)
    assert not termios.tcgetattr(user)[3] & (termios.ECHO | termios.ICANON)
    os.close(user)
    c.close()
    janitor.finish()
    assert not os.path.lexists(link)


def test_a_socket_is_for_its_user_alone_whatever_the_umask(janitor, tmp_path):
    path = tmp_path / "com1"
    before = os.umask(0)
    try:
        open_console(SerialConfig(1, "socket", str(path)), janitor).close()
        assert path.stat().st_mode & 0o777 == 0o600
        assert os.umask(0) == 0
    finally:
        os.umask(before)


def test_a_fifo_that_nobody_reads_is_refused_instead_of_waited_for(janitor, tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    port = SerialConfig(1, "file", str(path))
    with pytest.raises(ConfigError, match=f"^--serial num=1: {path}: No such device or address$"):
        open_console(port, janitor)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    console = open_console(port, janitor)
    os.write(console.output, b"printed")
    assert os.read(reader, 99) == b"printed"
    console.close()
    os.close(reader)


@pytest.mark.parametrize(
    ("port", "why"),
    [
        ({"type": "file", "path": "/nonexistent/log"}, "/nonexistent/log: No such file"),
        ({"type": "file", "path": "/"}, "/: Is a directory"),
        ({"type": "sink", "input": "/nonexistent/in"}, "/nonexistent/in: No such file"),
        ({"type": "socket", "path": "/nonexistent/com1"}, "/nonexistent/com1: No such file"),
        ({"type": "socket", "path": "/tmp/" + "x" * 200}, "too long"),
        ({"type": "socket", "path": "/dev/null"}, "/dev/null: Connection refused"),
        ({"type": "pty", "path": "/dev/null"}, "/dev/null: File exists"),
    ],
)
def test_what_cannot_be_opened_is_one_line_that_names_port_and_path(janitor, port, why):
    with pytest.raises(ConfigError, match=f"^--serial num=1: .*{why}"):
        open_console(SerialConfig(1, **port), janitor)


def test_a_virtio_console_has_four_ports_whatever_is_used_of_them(janitor, tmp_path):
    told = []
    port = {"hardware": "virtio-console"}
    ports = [
        SerialConfig(1, "file", str(tmp_path / "log"), **port),
        SerialConfig(2, "pty", **port),
    ]
    with contextlib.ExitStack() as undo:
        host = Host(undo, janitor, told.append)
        fds = open_virtio_consoles(ports, host).fds
        assert len({*fds["input"], *fds["output"]}) == 8
        os.write(fds["output"][0], b"printed")
        os.write(fds["output"][3], b"gone")
        assert os.read(fds["input"][3], 1) == b""
        assert [type(w) for w in host.watched] == [PtyRelay]
        assert host.window is None
    assert (tmp_path / "log").read_bytes() == b"printed"
    assert told[0].startswith("--serial hardware=virtio-console,num=2 is /dev/pts/")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fds["input"][3])


_STDIO = """
import os, sys
from supervisor.config import SerialConfig
from supervisor.console import open_console
from supervisor.janitor import Janitor
janitor = Janitor.start()
c = open_console(SerialConfig(1, "stdio"), janitor)
"""


def run(code, **how):
    return subprocess.run([sys.executable, "-c", _STDIO + code], timeout=20, check=True, **how)


def test_a_terminal_on_a_virtio_console_gives_it_its_window():
    code = """
from contextlib import ExitStack
from supervisor.console import open_virtio_consoles
from supervisor.host import Host
c.close()
with ExitStack() as undo:
    host = Host(undo, janitor, print)
    open_virtio_consoles([SerialConfig(1), SerialConfig(2, "stdio")], host)
    assert host.window == 1 and host.keyboard
"""
    assert on_a_terminal(code)[2] == 0


def test_stdio_that_is_piped_is_used_as_it_is():
    code = "os.write(c.output, os.read(c.input, 100).upper())\nassert c.keyboard is None"
    assert run(code, input=b"abc", stdout=subprocess.PIPE).stdout == b"ABC"


def test_standard_output_never_blocks_us_and_its_other_users_do_not_notice():
    code = "assert not os.get_blocking(c.output)\nassert os.get_blocking(1)"
    run(code, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)


def test_a_log_file_as_standard_output_keeps_its_end(tmp_path):
    log = tmp_path / "log"
    with open(log, "wb") as f:
        f.write(b"before ")
        f.flush()
        run("os.write(c.output, b'guest'); os.write(1, b' after')", stdin=subprocess.DEVNULL, stdout=f)
    assert log.read_bytes() == b"before guest after"


def on_a_terminal(code):
    """Run `code` on a terminal of its own; the terminal's mode before and after, and the exit status."""
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    pid = os.fork()
    if pid == 0:
        os.login_tty(slave)
        os.execv(sys.executable, [sys.executable, "-c", _STDIO + code])
    _, status = os.waitpid(pid, 0)
    after = termios.tcgetattr(slave)
    os.close(master)
    os.close(slave)
    return before, after, os.waitstatus_to_exitcode(status)


def test_a_terminal_is_raw_while_we_run_and_has_its_mode_back_afterwards():
    code = """
import termios
assert not termios.tcgetattr(0)[3] & termios.ICANON
assert c.keyboard
janitor.finish()
"""
    before, after, status = on_a_terminal(code)
    assert status == 0
    assert before == after
