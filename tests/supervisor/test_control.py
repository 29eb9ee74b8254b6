"""The control socket with real clients, some of them hostile."""

import os
import select
import socket
import stat
import threading

import pytest

from kvmcore.errors import ConfigError
from supervisor import control
from supervisor.control import ControlServer
from supervisor.janitor import Janitor


@pytest.fixture
def server(tmp_path):
    """(the server, its path, what was asked)"""
    asked = []

    def stop(request):
        asked.append(request["do"])
        return {}

    path = str(tmp_path / "vm.sock")
    janitor = Janitor.start()
    verbs = {"ps": lambda _: {"processes": [["rtc", 7]]}, "stop": stop, "echo": lambda request: request}
    vm = ControlServer(path, verbs, janitor)
    yield vm, path, asked
    vm.close()
    janitor.finish()
    assert not os.path.exists(path)


def settle(vm):
    for _ in range(100):
        poll = select.poll()
        for fd, events in vm.wants().items():
            poll.register(fd, events)
        ready = poll.poll(0)
        if not ready:
            return
        for fd, got in ready:
            vm.ready(fd, got)
    raise AssertionError("the run loop spins")


def connect(path):
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(5)
    client.connect(path)
    return client


def answer(server, request):
    vm, path, _ = server
    with connect(path) as client:
        client.sendall(request)
        settle(vm)
        return client.recv(1 << 16)


def in_background(vm, act):
    """`act()`, while the server serves."""
    results = []
    thread = threading.Thread(target=lambda: results.append(act()))
    thread.start()
    while thread.is_alive():
        settle(vm)
        thread.join(0.01)
    return results[0]


def test_only_the_owner_may_connect(server):
    assert stat.S_IMODE(os.stat(server[1]).st_mode) == 0o600


def test_a_request_is_answered_with_one_line(server):
    assert answer(server, b'{"do": "ps"}\n') == b'{"processes": [["rtc", 7]]}\n'


def test_a_request_may_come_in_pieces(server):
    vm, path, asked = server
    with connect(path) as client:
        for piece in (b'{"do"', b': "stop"', b"}\n"):
            settle(vm)
            client.sendall(piece)
        settle(vm)
        assert client.recv(100) == b"{}\n"
    assert asked == ["stop"]


@pytest.mark.parametrize(
    "request_",
    [
        b"\n", b"ps\n", b"[]\n", b"{}\n", b'{"do": 1}\n', b'{"do": []}\n', b'{"do": "reboot"}\n',
        b"\xff\xfe\n", b"[" * 4000 + b"\n", b"null\n",
    ],
)  # fmt: skip
def test_nonsense_is_answered_with_an_error(server, request_):
    assert answer(server, request_).startswith(b'{"error": "expected')
    assert server[2] == []


def test_a_request_without_end_is_cut_off(server):
    with pytest.raises(ConnectionResetError):
        answer(server, b"x" * 9000)
    assert len(server[0].wants()) == 1


def test_a_client_that_leaves_without_asking_is_forgotten(server):
    vm, path, _ = server
    connect(path).close()
    settle(vm)
    assert len(vm.wants()) == 1


def test_a_client_that_leaves_before_the_answer_is_no_trouble(server):
    vm, path, asked = server
    with connect(path) as client:
        client.sendall(b'{"do": "stop"}\n')
    settle(vm)
    assert asked == ["stop"]


def test_the_number_of_clients_is_bounded(server):
    vm, path, _ = server
    clients = []
    for _ in range(9):
        clients.append(connect(path))
        settle(vm)
    assert len(vm.wants()) == 8  # the ninth waits to be accepted, and the listener is not watched
    clients.pop(0).close()
    settle(vm)
    assert len(vm.wants()) == 8
    for client in clients:
        client.close()


def test_ask_gets_the_answer(server):
    vm, path, _ = server
    assert in_background(vm, lambda: control.ask(path, "ps")) == {"processes": [["rtc", 7]]}


def test_a_verb_gets_the_whole_request(server):
    vm, path, _ = server
    assert in_background(vm, lambda: control.ask(path, "echo", n=[1])) == {"do": "echo", "n": [1]}


def test_ask_for_what_there_is_not_says_what_there_is(server):
    vm, path, _ = server

    def ask():
        with pytest.raises(ConfigError, match="ps, stop") as e:
            control.ask(path, "reboot")
        return str(e.value)

    assert "\n" not in in_background(vm, ask)


def test_the_balloons_counters_are_those_of_after_the_question(tmp_path):
    answers = [{"updates": 7}, {"updates": 8}, {"updates": 8}, {"updates": 9, "free_bytes": 1}]
    janitor = Janitor.start()
    path = str(tmp_path / "vm.sock")
    vm = ControlServer(path, {"balloon": lambda _: {"counters": answers.pop(0)}}, janitor)
    assert in_background(vm, lambda: control.balloon_counters(path)) == {"updates": 9, "free_bytes": 1}
    vm.close()
    janitor.finish()


@pytest.mark.parametrize("becomes", [16, 8])
def test_a_disk_is_waited_for_until_it_has_its_new_size(tmp_path, monkeypatch, becomes):
    monkeypatch.setattr(control, "_TIMEOUT_S", 5.0 if becomes == 16 else 0.2)
    capacities, sizes = [8, 8], []

    def resize(request):
        if "size" in request:
            sizes.append((request["disk"], request["size"]))
            return {}
        return {"counters": {"capacity": capacities.pop() if capacities else becomes}}

    janitor = Janitor.start()
    path = str(tmp_path / "vm.sock")
    vm = ControlServer(path, {"resize": resize}, janitor)

    def ask():
        if becomes == 16:
            control.resize(path, "block1", 8192)
            return
        with pytest.raises(ConfigError, match="block1 has 4096 bytes still"):
            control.resize(path, "block1", 8192)

    in_background(vm, ask)
    assert sizes == [("block1", 8192)]
    vm.close()
    janitor.finish()


def test_a_path_that_is_taken_is_refused_and_kept(tmp_path):
    path = tmp_path / "taken"
    path.write_text("mine")
    janitor = Janitor.start()
    with pytest.raises(ConfigError, match=f"--socket {path}: .*in use"):
        ControlServer(str(path), {}, janitor)
    janitor.finish()
    assert path.read_text() == "mine"


@pytest.mark.parametrize("path", ["/nonexistent/vm.sock", "/tmp/" + "x" * 200])
def test_a_path_that_cannot_be_made_is_one_line(path):
    janitor = Janitor.start()
    with pytest.raises(ConfigError, match=r"^--socket .*: .+"):
        ControlServer(path, {}, janitor)
    janitor.finish()


def test_nobody_there_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        control.ask(str(tmp_path / "none"), "ps")


@pytest.mark.parametrize("said", [b"", b"hello\n", b"[1]\n", b'"x"\n', b"[" * 100_000])
def test_somebody_else_there_is_one_line(tmp_path, said):
    path = str(tmp_path / "other")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)

        def other():
            client, _ = listener.accept()
            with client:
                client.recv(100)
                client.sendall(said)

        thread = threading.Thread(target=other)
        thread.start()
        with pytest.raises(ConfigError, match="not a"):
            control.ask(path, "ps")
        thread.join()
