"""The janitor with real terminals, files and supervisors that are killed."""

import contextlib
import os
import pty
import re
import select
import signal
import termios

import pytest

from devproc import syscalls
from devproc.jail import Mode
from kvmcore.errors import VmsupError
from supervisor import terminal
from supervisor.janitor import CAPABILITIES, Janitor


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


def nothing(janitor):
    pass


def seal(janitor):
    janitor.seal(print)


@pytest.mark.parametrize("then", [nothing, seal])
def test_raw_mode_is_undone_after_the_supervisor_was_killed(tty, then):
    def act(janitor):
        terminal.set_raw(tty, janitor)
        then(janitor)

    before = termios.tcgetattr(tty)
    with supervisor(act):
        assert termios.tcgetattr(tty) != before
    wait_until(lambda: termios.tcgetattr(tty) == before)


@pytest.mark.parametrize("then", [nothing, seal])
def test_paths_are_removed_after_the_supervisor_was_killed(tmp_path, then):
    def act(janitor):
        janitor.unlink(str(path))
        then(janitor)

    path = tmp_path / "socket"
    path.touch()
    with supervisor(act):
        assert path.exists()
    wait_until(lambda: not path.exists())


def status(pid):
    with open(f"/proc/{pid}/status", encoding="ascii") as f:
        return dict(line.rstrip("\n").split(":\t") for line in f)


def test_sealed_it_has_no_rights_but_to_remove_what_root_made(tmp_path):
    janitor = Janitor.start()
    janitor.seal(print)
    found = status(janitor.pid)
    keep = CAPABILITIES if os.geteuid() == 0 else 0
    assert (int(found["CapPrm"], 16), int(found["CapEff"], 16)) == (keep, keep)
    assert (found["Seccomp"], found["NoNewPrivs"]) == ("2", "1")
    assert int(found["CapBnd"], 16) == keep or os.geteuid() != 0
    janitor.finish()


def test_sealed_it_hears_nothing_but_the_end(tmp_path):
    path = tmp_path / "precious"
    path.touch()
    st = path.stat()
    janitor = Janitor.start()
    janitor.seal(print)
    janitor._sock.send(b"U%d %d %s" % (st.st_dev, st.st_ino, os.fsencode(path)))
    janitor._sock.send(b"S")
    janitor.finish()
    assert path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a path in a directory that is not its own")
def test_what_root_made_in_somebody_elses_directory_is_removed(tmp_path):
    path = tmp_path / "theirs" / "socket"
    path.parent.mkdir(mode=0o755)
    path.touch()
    os.chown(path.parent, 1000, 1000)
    janitor = Janitor.start()
    janitor.unlink(str(path))
    janitor.seal(print)
    janitor.finish()
    assert not path.exists()


def test_without_a_jail_it_keeps_its_rights_and_still_hears_nothing_more(tmp_path):
    janitor = Janitor.start(Mode.NONE)
    janitor.seal(print)
    assert status(janitor.pid)["Seccomp"] == "0"
    janitor.finish()


@pytest.mark.parametrize("mode", [Mode.FULL, Mode.BEST_EFFORT])
def test_a_janitor_that_cannot_be_sealed_is_an_error_or_a_warning(monkeypatch, mode):
    def refuses(program):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(syscalls, "seccomp_load", refuses)
    janitor = Janitor.start(mode)
    said = []
    why = "the janitor: .*cannot load policies/janitor.policy: Invalid argument"
    if mode is Mode.FULL:
        with pytest.raises(VmsupError, match=why):
            janitor.seal(said.append)
    else:
        janitor.seal(said.append)
        assert re.match(why, said.pop())
    assert said == []
    janitor.finish()


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
