"""The exchange as a process: whom it connects, what it hands over, and how it ends."""

import os
import select
import signal
import socket
import stat
from pathlib import Path

import pytest

from kvmcore.errors import ConfigError
from supervisor.exchange import PATH_MAX, Exchange
from supervisor.janitor import Janitor

PATIENCE_S = 10


@pytest.fixture
def janitor():
    janitor = Janitor.start()
    yield janitor
    janitor.finish()


@pytest.fixture
def exchange(janitor, tmp_path):
    exchange = Exchange.start(str(tmp_path / "v"), janitor)
    exchange.seal(print)
    yield exchange
    exchange.finish()


@pytest.fixture
def listener(tmp_path):
    """A host program at port 80."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "v_80"))
        listener.listen()
        yield listener


def dial(exchange, port):
    exchange.device.send(port.to_bytes(4, "little"))
    return answer(exchange)


def answer(exchange):
    """(word, connection or None) of the next frame to the device."""
    assert select.select([exchange.device], [], [], PATIENCE_S)[0]
    frame, fds, _, _ = socket.recv_fds(exchange.device, 8, 2)
    assert len(fds) <= 1
    return frame, socket.socket(fileno=fds[0]) if fds else None


def test_who_listens_at_the_path_with_the_port_is_connected(exchange, listener):
    word, ours = dial(exchange, 80)
    theirs, _ = listener.accept()
    with ours, theirs:
        assert word == b"D"
        assert not os.get_blocking(ours.fileno())
        ours.send(b"to the host")
        theirs.send(b"to the guest")
        assert (theirs.recv(99), ours.recv(99)) == (b"to the host", b"to the guest")


@pytest.mark.parametrize("port", [0, 81, 2**32 - 1])
def test_where_nobody_listens_there_is_no_connection(exchange, listener, port):
    assert dial(exchange, port) == (b"D", None)


def test_who_is_too_busy_is_nobody(exchange, tmp_path):
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(tmp_path / "v_5"))
        busy.listen(0)
        assert dial(exchange, 5)[1] is not None
        assert dial(exchange, 5) == (b"D", None)


def test_a_caller_is_handed_over_with_all_that_it_says(exchange, tmp_path):
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(tmp_path / "v"))
        caller.send(b"CONNECT 5\n")
        word, ours = answer(exchange)
        with ours:
            assert word == b"A"
            assert not os.get_blocking(ours.fileno())
            assert ours.recv(99) == b"CONNECT 5\n"
        assert caller.recv(1) == b"", "the exchange has kept it"


def test_nobody_is_handed_over_before_it_is_sealed(janitor, tmp_path):
    exchange = Exchange.start(str(tmp_path / "v"), janitor)
    try:
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(tmp_path / "v"))
            assert not select.select([exchange.device], [], [], 0.1)[0]
            exchange.seal(print)
            assert answer(exchange)[0] == b"A"
    finally:
        exchange.finish()


@pytest.mark.parametrize("frame", [b"\0", b"12345"])
def test_a_device_that_sends_anything_else_than_a_port_ends_it(exchange, frame):
    exchange.device.send(frame)
    assert select.select([exchange.device], [], [], PATIENCE_S)[0]
    assert exchange.device.recv(1) == b""


def test_it_holds_nothing_but_its_sockets_and_no_right_but_one(exchange):
    fds = os.listdir(f"/proc/{exchange.pid}/fd")
    kinds = [os.stat(f"/proc/{exchange.pid}/fd/{fd}").st_mode for fd in fds]
    assert sorted(map(stat.S_IFMT, kinds)) == [stat.S_IFCHR] * 3 + [stat.S_IFSOCK] * 3
    status = Path(f"/proc/{exchange.pid}/status").read_text().split("\n")
    assert "NoNewPrivs:\t1" in status and "Seccomp:\t2" in status
    effective = next(line.split()[1] for line in status if line.startswith("CapEff"))
    assert int(effective, 16) in (0, 1 << 1)


def test_it_ends_with_the_supervisor_and_the_path_goes(tmp_path):
    path = tmp_path / "v"
    ready, tell = os.pipe()
    supervisor = os.fork()
    if supervisor == 0:
        try:
            janitor = Janitor.start()
            exchange = Exchange.start(str(path), janitor)
            exchange.seal(print)
            os.write(tell, b"%d" % exchange.pid)
            signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    try:
        pidfd = os.pidfd_open(int(os.read(ready, 32)))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.close(ready)
        os.kill(supervisor, signal.SIGKILL)
        os.waitpid(supervisor, 0)
    assert select.select([pidfd], [], [], PATIENCE_S)[0], "it stays"
    os.close(pidfd)
    for _ in range(1000):
        if not path.exists():
            return
        select.select([], [], [], 0.01)
    raise AssertionError("the path stays")


def test_it_lives_on_when_a_signal_is_for_all(exchange, listener):
    os.kill(exchange.pid, signal.SIGINT)
    os.kill(exchange.pid, signal.SIGTERM)
    assert dial(exchange, 80)[1] is not None


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("taken", "Address already in use"),
        ("no/such/directory", "No such file or directory"),
        ("x" * PATH_MAX, f"with a port it is longer than a socket's path may be, expected {PATH_MAX} bytes"),
    ],
)
def test_where_nobody_can_listen_it_does_not_start(janitor, tmp_path, name, why):
    (tmp_path / "taken").touch()
    with pytest.raises(ConfigError, match=f"--vsock: {tmp_path / name}: {why}"):
        Exchange.start(str(tmp_path / name), janitor)
