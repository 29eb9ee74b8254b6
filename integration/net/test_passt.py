"""passt as `--net passt` starts it: it answers, ends with its socket, and is missed when it ends before."""

from __future__ import annotations

import os
import select
import shutil
import signal
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from devproc.backends.stream import Stream
from kvmcore.errors import ConfigError
from supervisor.config import NetConfig
from supervisor.host import Host
from supervisor.nets import open_net

PATIENCE_S = 10
MAC, ANYBODY = b"\x02\0\0\0\0\x02", b"\xff" * 6


@pytest.fixture
def host() -> Iterator[Host]:
    if shutil.which("passt") is None:
        pytest.skip("there is no passt")
    with ExitStack() as undo:
        yield Host(undo, None, [].append)  # type: ignore[arg-type]


def start(host: Host, **keys: Any) -> int:
    """Our end of its socket."""
    try:
        return open_net(NetConfig(passt=True, **keys), host).fds["link"][0]
    except ConfigError as e:
        if "interface" in str(e):
            pytest.skip(f"passt needs a default route: {e}")
        raise


def children() -> set[int]:
    """Ours that are running."""
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return {int(pid) for pid in text.split() if Path(f"/proc/{pid}/comm").read_text().startswith("passt")}


def test_it_answers_whoever_asks_for_an_address(host: Host) -> None:
    fd = start(host, mtu=1500)
    stream = Stream(fd)
    arp = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + MAC + bytes([192, 0, 2, 2]) + bytes(6)
    assert stream.send([bytes(12), ANYBODY + MAC + b"\x08\x06" + arp + bytes([192, 0, 2, 1])])
    while select.select([fd], [], [], PATIENCE_S)[0]:
        frame = bytearray(2000)
        if stream.receive([frame]) and frame[24:26] == b"\x08\x06":
            assert frame[12:18] == MAC
            return
    raise AssertionError("no answer")


def test_it_ends_with_its_socket(host: Host) -> None:
    start(host)
    assert len(children()) == 1
    host.undo.close()
    assert not children()


def test_its_end_is_told(host: Host) -> None:
    said: list[str] = []
    host.tell = said.append
    start(host)
    (pid,) = children()
    (watched,) = host.watched
    (fd,) = watched.wants()
    os.kill(pid, signal.SIGTERM)
    assert select.select([fd], [], [], PATIENCE_S)[0]
    watched.ready(fd, select.POLLIN)
    assert said == ["passt: has ended, the network is down"]
    assert watched.wants() == {}


def test_what_it_cannot_do_is_one_line(host: Host) -> None:
    with pytest.raises(ConfigError, match=r"^--net passt: [^\n]*nonsense$"):
        start(host, tcp_ports="nonsense")
    host.undo.close()
    assert not children()
