"""The janitor with real terminals, files and supervisors that are killed."""

import contextlib
import os
import pty
import select
import signal
import termios

import pytest

from supervisor import terminal
from supervisor.janitor import Janitor


@pytest.fixture
def tty():
    master, slave = pty.openpty()
    yield slave
    os.close(master)
    os.close(slave)


@contextlib.contextmanager
def supervisor(act):
    """A process that starts a janitor and acts; at the end of the block it is killed."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            janitor = Janitor.start()
            act(janitor)
            os.write(tell, b".")
            signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    try:
        assert os.read(ready, 1) == b".", "the supervisor failed"
        yield
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def wait_until(true):
    for _ in range(500):
        if true():
            return
        select.select([], [], [], 0.01)
    raise AssertionError("never came true")


def test_raw_mode_is_undone_after_the_supervisor_was_killed(tty):
    before = termios.tcgetattr(tty)
    with supervisor(lambda janitor: terminal.set_raw(tty, janitor)):
        assert termios.tcgetattr(tty) != before
    wait_until(lambda: termios.tcgetattr(tty) == before)


def test_paths_are_removed_after_the_supervisor_was_killed(tmp_path):
    path = tmp_path / "socket"
    path.touch()
    with supervisor(lambda janitor: janitor.unlink(str(path))):
        assert path.exists()
    wait_until(lambda: not path.exists())


def test_a_relative_path_is_the_one_it_was_when_it_was_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("/dev/null")
    janitor = Janitor.start()
    janitor.unlink("link")
    monkeypatch.chdir("/")
    janitor.finish()
    assert not os.path.lexists(tmp_path / "link")


def test_a_clean_end_waits_until_everything_is_back(tty, tmp_path):
    before = termios.tcgetattr(tty)
    path = tmp_path / "link"
    path.symlink_to("/dev/null")
    janitor = Janitor.start()
    terminal.set_raw(tty, janitor)
    janitor.unlink(str(path))
    janitor.finish()
    assert termios.tcgetattr(tty) == before
    assert not os.path.lexists(path)
    assert os.path.exists("/dev/null")


def test_a_file_that_was_replaced_is_not_removed(tmp_path):
    path, other = tmp_path / "socket", tmp_path / "other"
    path.touch()
    janitor = Janitor.start()
    janitor.unlink(str(path))
    other.write_text("somebody else's")
    other.rename(path)
    janitor.finish()
    assert path.read_text() == "somebody else's"


def test_a_path_that_is_gone_already_is_no_trouble(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    janitor = Janitor.start()
    for path in (first, second):
        path.touch()
        janitor.unlink(str(path))
    first.unlink()
    janitor.finish()
    assert not second.exists()


def test_what_was_asked_last_is_done_though_the_answer_was_never_read(tmp_path):
    path = tmp_path / "socket"
    path.touch()
    st = path.stat()
    janitor = Janitor.start()
    janitor._sock.send(b"U%d %d %s" % (st.st_dev, st.st_ino, os.fsencode(path)))
    select.select([janitor._sock], [], [])  # killed before it reads the answer: the kernel resets the socket
    janitor.finish()
    assert not path.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_everybody_does_not_keep_it_from_its_work(tmp_path, number):
    path = tmp_path / "socket"
    path.touch()
    janitor = Janitor.start()
    janitor.unlink(str(path))
    os.kill(janitor.pid, number)
    janitor.finish()
    assert not path.exists()


def test_it_holds_no_descriptor_of_the_supervisor(tmp_path):
    read, write = os.pipe()
    janitor = Janitor.start()
    (tmp_path / "f").touch()
    janitor.unlink(str(tmp_path / "f"))  # it has answered, so it has set itself up
    os.close(write)
    assert os.read(read, 1) == b""
    os.close(read)
    janitor.finish()
