"""Virtual sockets in the whole machine: a guest and programs on the host reach each other."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devproc.devices.virtio_vsock import (
    F_STREAM,
    HEADER,
    HOST_CID,
    HOST_PORT,
    RX,
    SHUTDOWN_RCV,
    SHUTDOWN_SEND,
    TX,
    TYPE_STREAM,
    Op,
)
from devproc.driver import PciDriver
from devproc.virtio import spec
from integration.boot import vm
from integration.machine.conftest import PATIENCE_S, Machine
from integration.machine.remote import Remote, RemoteFunction, RemoteMemory

pytestmark = pytest.mark.kvm

SLOT = 1
RINGS = 0x400000
CID, PORT = 3, 1024


class Guest:
    """A driver of the function; its program has port 1024."""

    def __init__(self, vmsup: Machine) -> None:
        self.remote = Remote(vmsup)
        self.driver = PciDriver(RemoteFunction(self.remote, SLOT), RemoteMemory(self.remote), RINGS)  # type: ignore[arg-type]
        self.driver.start(spec.F_VERSION_1 | F_STREAM, size=16)
        for _ in range(8):
            self.driver.queues[RX].request(512)
        self.driver.notify(RX)

    def send(self, op: Op, host_port: int, data: bytes = b"", flags: int = 0) -> None:
        header = HEADER.pack(CID, HOST_CID, PORT, host_port, len(data), TYPE_STREAM, op, flags, 1 << 16, 0)
        self.driver.queues[TX].request(header + data)
        self.driver.notify(TX)

    def hear(self) -> tuple[Op, int, bytes]:
        """(op, port of the host, payload) of the next packet."""
        until_s = time.monotonic() + PATIENCE_S
        while not (used := self.driver.queues[RX].used()):
            assert time.monotonic() < until_s
        (one,) = used
        self.driver.queues[RX].request(512)
        _, _, host_port, _, _, _, op, *_ = HEADER.unpack(one.data[: HEADER.size])
        return Op(op), host_port, one.data[HEADER.size :]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vsock"


@pytest.fixture
def vmsup(machine: Callable[..., Machine], path: Path) -> Machine:
    return machine("remote", "--no-rng", "--vsock", f"{CID},path={path}", stdin=subprocess.PIPE)


@pytest.fixture
def guest(vmsup: Machine, path: Path) -> Iterator[Guest]:
    guest = Guest(vmsup)
    yield guest
    assert guest.remote.power_off() == 0
    assert not path.exists()


def connected(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(PATIENCE_S)
    client.connect(str(path))
    return client


def test_the_guest_reaches_who_listens_at_its_port(guest: Guest, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}_80")
        listener.listen()
        listener.settimeout(PATIENCE_S)
        guest.send(Op.REQUEST, 80)
        assert guest.hear() == (Op.RESPONSE, 80, b"")
        host, _ = listener.accept()
    with host:
        host.settimeout(PATIENCE_S)
        guest.send(Op.RW, 80, b"to the host")
        assert host.recv(99) == b"to the host"
        host.sendall(b"to the guest")
        assert guest.hear() == (Op.RW, 80, b"to the guest")
        guest.send(Op.SHUTDOWN, 80, flags=SHUTDOWN_RCV | SHUTDOWN_SEND)
        assert guest.hear() == (Op.RST, 80, b"")
        assert host.recv(99) == b""
    guest.send(Op.REQUEST, 80)
    assert guest.hear() == (Op.RST, 80, b""), "nobody listens any more"


def test_a_host_program_reaches_the_guest(guest: Guest, path: Path) -> None:
    with connected(path) as client:
        client.sendall(b"CONNECT 1024\n")
        assert guest.hear() == (Op.REQUEST, HOST_PORT, b"")
        guest.send(Op.RESPONSE, HOST_PORT)
        assert client.recv(99) == b"OK 1073741824\n"
        client.sendall(b"to the guest")
        assert guest.hear() == (Op.RW, HOST_PORT, b"to the guest")
    assert guest.hear() == (Op.SHUTDOWN, HOST_PORT, b"")
    guest.send(Op.SHUTDOWN, HOST_PORT, flags=SHUTDOWN_RCV | SHUTDOWN_SEND)
    assert guest.hear() == (Op.RST, HOST_PORT, b"")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root sees all of a process")
def test_every_process_is_as_declared_while_there_is_a_connection(
    vmsup: Machine, guest: Guest, path: Path
) -> None:
    with connected(path) as client:
        client.sendall(b"CONNECT 1024\n")
        assert guest.hear()[0] == Op.REQUEST
        command = vm.command("jail", "inspect", "--require", str(vmsup.socket))
        done = subprocess.run(command, cwd=vm.ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "\nexchange " in done.stdout


def test_before_there_is_a_driver_a_host_program_is_hung_up_on(vmsup: Machine, path: Path) -> None:
    with connected(path) as client:
        assert client.recv(1) == b""
    assert Remote(vmsup).power_off() == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_device_ends_the_vm_by_name(vmsup: Machine, path: Path, number: signal.Signals) -> None:
    os.kill(vmsup.pids["vsock"], number)
    assert vmsup.end() == 33
    assert vmsup.errors() == f"vmsup: vsock: {'killed' if number == 9 else 'stopped'} by {number.name}\n"
    assert not path.exists()


def test_a_dead_exchange_ends_the_vm_with_the_cause(vmsup: Machine, path: Path) -> None:
    (exchange,) = (
        pid
        for name, pid in vmsup.pids.items()
        if name.startswith("child") and Path(f"/proc/{pid}/comm").read_text() == "exchange\n"
    )
    os.kill(exchange, signal.SIGKILL)
    assert vmsup.end() == 33
    assert vmsup.errors() == "vmsup: vsock: the exchange is gone\n"
    assert not path.exists()
