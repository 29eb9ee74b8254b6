"""What is settled with a vhost-user back end before its device has a process; the command line's words."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from devproc.vhost import connection
from devproc.vhost.message import (
    F_PROTOCOL_FEATURES,
    HEADER_SIZE,
    PROTOCOL_F_CONFIG,
    PROTOCOL_F_MQ,
    ConfigSpace,
    Payload,
    Request,
    pack_reply,
    parse,
    parse_header,
)
from devproc.virtio import spec
from kvmcore.errors import ConfigError
from supervisor.config import VhostUserConfig, build
from supervisor.host import Host, Opened
from supervisor.janitor import Janitor
from supervisor.vhosts import open_vhost_user

V1 = spec.F_VERSION_1
R = Request
DISK: dict[Request, Any] = {
    R.GET_FEATURES: V1 | F_PROTOCOL_FEATURES | spec.F_EVENT_IDX | spec.F_ACCESS_PLATFORM | 1 << 6 | 1 << 11,
    R.GET_PROTOCOL_FEATURES: PROTOCOL_F_MQ | PROTOCOL_F_CONFIG | 1 << 15,
    R.GET_QUEUE_NUM: 3,
    R.GET_CONFIG: ConfigSpace(0, bytes(range(60))),
}
LISTED = {**DISK, R.GET_PROTOCOL_FEATURES: 0}  # no more than rings


class BackEnd:
    """A program that listens and answers as it is told: a payload, bytes as they are, or None for silence."""

    def __init__(self, path: Path) -> None:
        self.answers: dict[Request, Payload | bytes] = dict(DISK)
        self.asked: list[tuple[Request, Payload]] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        try:
            front, _ = self.listener.accept()
        except OSError:
            return
        with front, front.makefile("rwb") as stream:
            while head := stream.read(HEADER_SIZE):
                header = parse_header(head)
                request, payload = parse(header, stream.read(header.size), 0)
                self.asked.append((request, payload))
                answer = self.answers.get(request)
                if request in DISK and answer is not None:
                    stream.write(answer if isinstance(answer, bytes) else pack_reply(request, answer))
                    stream.flush()
                    if answer == b"":
                        return

    def await_asked(self, count: int) -> None:
        """What needs no answer is asked before this, and heard at any time."""
        until_s = time.monotonic() + 30
        while len(self.asked) < count:
            assert time.monotonic() < until_s
            time.sleep(0.001)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


@pytest.fixture
def program(path: Path) -> Iterator[BackEnd]:
    program = BackEnd(path)
    yield program
    program.close()


@pytest.fixture
def opened(path: Path) -> Iterator[Callable[..., Opened]]:
    """Opens a device of the type, with the options."""
    janitor = Janitor.start()
    with ExitStack() as undo:
        undo.callback(janitor.finish)
        host = Host(undo, janitor, lambda _: None)

        def open_it(kind: str, **options: Any) -> Opened:
            return open_vhost_user(VhostUserConfig(kind, str(path), **options), host)

        yield open_it


def test_a_disk_is_asked_for_its_queues_and_its_configuration(
    program: BackEnd, opened: Callable[..., Opened]
) -> None:
    got = opened("block")
    config = bytearray(range(60))
    config[0x22:0x24] = b"\3\0"
    assert got.params == (V1 | spec.F_EVENT_IDX | 1 << 6, 3, bytes(config))
    (fd,) = got.fds["backend"]
    with socket.socket(fileno=socket.dup(fd)) as sock, pytest.raises(BlockingIOError):
        sock.recv(1)
    assert program.asked == [
        (R.GET_FEATURES, None),
        (R.GET_PROTOCOL_FEATURES, None),
        (R.SET_PROTOCOL_FEATURES, PROTOCOL_F_MQ | PROTOCOL_F_CONFIG),
        (R.SET_OWNER, None),
        (R.GET_QUEUE_NUM, None),
        (R.GET_CONFIG, ConfigSpace(0, bytes(60))),
    ]


@pytest.mark.parametrize(("offered", "asked_for", "rings"), [(3, 2, 2), (1, 4, 1), (1 << 40, 4, 4)])
def test_a_disk_has_the_queues_that_both_want(
    program: BackEnd, opened: Callable[..., Opened], offered: int, asked_for: int, rings: int
) -> None:
    program.answers[R.GET_QUEUE_NUM] = offered
    assert opened("block", queues=asked_for).params[1] == rings


def test_a_disk_of_a_back_end_that_knows_of_one_queue_has_one(
    program: BackEnd, opened: Callable[..., Opened]
) -> None:
    program.answers[R.GET_PROTOCOL_FEATURES] = PROTOCOL_F_CONFIG
    assert opened("block").params[1] == 1
    assert R.GET_QUEUE_NUM not in [request for request, _ in program.asked]


def test_cards_and_directories_are_described_by_the_user(
    program: BackEnd, opened: Callable[..., Opened]
) -> None:
    program.answers = LISTED
    features, rings, tag = opened("fs", tag="täg").params
    assert (features, rings, tag) == (V1 | spec.F_EVENT_IDX, 2, "täg".encode())
    program.await_asked(4)
    assert program.asked[2] == (R.SET_PROTOCOL_FEATURES, 0)


@pytest.mark.parametrize("mac", [None, "02:00:00:00:00:01"])
def test_a_card_has_an_address(program: BackEnd, opened: Callable[..., Opened], mac: str | None) -> None:
    features, rings, address = opened("net", mac=mac).params
    assert (features, rings) == (V1 | spec.F_EVENT_IDX | 1 << 11, 2)
    assert isinstance(address, bytes)
    assert len(address) == 6
    assert address[0] & 3 == 2
    assert mac is None or address == b"\2\0\0\0\0\1"


@pytest.mark.parametrize(
    ("request_", "answer", "why"),
    [
        (R.GET_FEATURES, F_PROTOCOL_FEATURES, "offers features 0x40000000, expected VERSION_1 and PROTOCOL"),
        (R.GET_FEATURES, V1, "offers features 0x100000000, expected VERSION_1 and PROTOCOL_FEATURES"),
        (R.GET_PROTOCOL_FEATURES, PROTOCOL_F_MQ, "offers protocol features 0x1, expected CONFIG"),
        (R.GET_QUEUE_NUM, 0, "has no queues"),
        (R.GET_CONFIG, ConfigSpace(0, bytes(59)), "answers GET_CONFIG by "),
        (R.GET_CONFIG, ConfigSpace(1, bytes(60)), "answers GET_CONFIG by "),
        (R.GET_CONFIG, pack_reply(R.GET_FEATURES, 0), "request 1 where an answer to GET_CONFIG is due"),
        (R.GET_FEATURES, b"\0" * 12, "request 0 with flags 0x0, expected version 1"),
        (R.GET_FEATURES, b"", ""),
    ],
)
def test_a_back_end_that_cannot_be_used_is_one_line(
    program: BackEnd, opened: Callable[..., Opened], path: Path, request_: Request, answer: Any, why: str
) -> None:
    program.answers[request_] = answer
    with pytest.raises(ConfigError) as e:
        opened("block")
    said = f"the back end: {why}" if why else "the back end has closed the connection"
    assert str(e.value).startswith(f"--vhost-user block,socket={path}: {said}")
    assert "\n" not in str(e.value)


def test_a_silent_back_end_is_waited_for_only_so_long(
    program: BackEnd, opened: Callable[..., Opened], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PATIENCE_S", 0.1)
    program.answers[R.GET_FEATURES] = None
    with pytest.raises(ConfigError, match=r"block,socket=.*: the back end: a message is cut off for 0\.1 s$"):
        opened("block")


def test_where_nobody_listens_there_is_no_device(opened: Callable[..., Opened], path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^--vhost-user fs,socket={path}: No such file or directory$"):
        opened("fs", tag="a")


def test_the_command_line_and_the_file_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "vm.toml"
    file.write_text('kernel = "k"\n[[vhost-user]]\ntype = "fs"\nsocket = "/a"\ntag = "a"\n')
    options = ["block,socket=/b,queues=2", "type=net,socket=/c,mac=02:00:00:00:00:01"]
    assert build({"config": str(file), "vhost_user": options}).vhost_user == (
        VhostUserConfig("fs", "/a", tag="a"),
        VhostUserConfig("block", "/b", queues=2),
        VhostUserConfig("net", "/c", mac="02:00:00:00:00:01"),
    )


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("socket=/a", "type is missing, expected block|net|fs,socket=PATH"),
        ("block", "socket is missing, expected block|net|fs,socket=PATH"),
        ("disk,socket=/a", "type: expected one of block, net, fs, not 'disk'"),
        ("net,socket=/a,queues=2", "queues= goes with block"),
        ("block,socket=/a,tag=b", "tag= goes with fs"),
        ("fs,socket=/a,tag=b,mac=02:00:00:00:00:01", "mac= goes with net"),
        ("fs,socket=/a", "tag is missing, expected the name to mount it by"),
        (f"fs,socket=/a,tag={'t' * 37}", f"tag: expected up to 36 bytes, not '{'t' * 37}'"),
        ("net,socket=/a,mac=01:00:00:00:00:01", "mac: expected an address like 02:00:00:00:00:01, not"),
    ],
)
def test_a_wrong_option_is_one_line(option: str, why: str) -> None:
    with pytest.raises(ConfigError) as e:
        build({"kernel": "k", "vhost_user": [option]})
    assert str(e.value).startswith(f"--vhost-user: {why}")


def test_a_tag_is_one_directorys() -> None:
    with pytest.raises(ConfigError, match="tag=a given twice"):
        build({"kernel": "k", "shared_dir": ["/a,tag=a"], "vhost_user": ["fs,socket=/b,tag=a"]})
