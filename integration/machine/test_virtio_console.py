"""A virtio console in the whole machine: a file, a socket and a terminal at its ports."""

from __future__ import annotations

import fcntl
import os
import pty
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from devproc.devices.virtio_console import (
    CONTROL,
    CONTROL_RX,
    CONTROL_TX,
    DEVICE_READY,
    F_MULTIPORT,
    F_SIZE,
    PORT_NAME,
    PORT_OPEN,
    PORT_READY,
)
from devproc.driver import PciDriver
from devproc.virtio import spec
from integration.machine.conftest import PATIENCE_S, Machine
from integration.machine.remote import Remote, RemoteFunction, RemoteMemory

pytestmark = pytest.mark.kvm

SLOT = 1
RINGS = 0x400000
COLS, ROWS, MAX_NR_PORTS = 0, 2, 4


def until(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until_s


def send(driver: PciDriver, queue: int, data: bytes) -> None:
    driver.queues[queue].request(data)
    driver.notify(queue)
    until(lambda: bool(driver.queues[queue].used()))


def receive(driver: PciDriver, queue: int) -> bytes:
    got: list[bytes] = []
    until(lambda: got.extend(used.data for used in driver.queues[queue].used()) or bool(got))
    return b"".join(got)


def drive(vmsup: Machine, features: int) -> PciDriver:
    guest = Remote(vmsup)
    driver = PciDriver(RemoteFunction(guest, SLOT), RemoteMemory(guest), RINGS)  # type: ignore[arg-type]
    driver.start(spec.F_VERSION_1 | features)
    return driver


def test_each_port_goes_where_its_option_says(machine: Callable[..., Machine], tmp_path: Path) -> None:
    log, path = tmp_path / "log", tmp_path / "agent"
    console = "hardware=virtio-console,num="
    vmsup = machine(
        "remote", "--no-rng",
        "--serial", "stdio,num=1",
        "--serial", f"file,{console}1,path={log},console",
        "--serial", f"socket,{console}2,path={path},name=agent",
        stdin=subprocess.PIPE,
    )  # fmt: skip
    driver = drive(vmsup, F_MULTIPORT)
    assert driver.config(MAX_NR_PORTS, 4) == 2
    for _ in range(16):
        driver.queues[CONTROL_RX].request(32)
    for id, event in ((0, DEVICE_READY), (1, PORT_READY), (1, PORT_OPEN)):
        send(driver, CONTROL_TX, CONTROL.pack(id, event, 1))
    assert CONTROL.pack(1, PORT_NAME, 1) + b"agent" in receive(driver, CONTROL_RX)

    send(driver, 1, b"printed on hvc0")
    until(lambda: log.read_bytes() == b"printed on hvc0")
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE_S)
        client.connect(str(path))
        send(driver, 5, b"to the host")
        assert client.recv(100) == b"to the host"
        client.sendall(b"to the guest")
        driver.queues[4].request(64)
        driver.notify(4)
        assert receive(driver, 4) == b"to the guest"


def test_the_guest_hears_how_large_the_terminal_is_and_becomes(
    machine: Callable[..., Machine], tmp_path: Path
) -> None:
    master, slave = pty.openpty()

    def resize(rows: int, columns: int) -> None:
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("<4H", rows, columns, 0, 0))

    resize(24, 80)
    path = str(tmp_path / "com1")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        vmsup = machine(
            "remote", "--no-rng",
            "--serial", f"socket,path={path}",
            "--serial", "stdio,hardware=virtio-console",
            ready=False, stdin=slave, stdout=slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        com1, _ = listener.accept()
    os.close(slave)
    vmsup.process.stdin = com1.makefile("wb", buffering=0)  # type: ignore[assignment]
    vmsup.process.stdout = com1.makefile("rb", buffering=0)  # type: ignore[assignment]
    com1.close()
    vmsup.wait_for(b"ready")
    driver = drive(vmsup, F_SIZE)
    assert (driver.config(COLS, 2), driver.config(ROWS, 2)) == (80, 24)
    resize(50, 132)
    until(lambda: (driver.config(COLS, 2), driver.config(ROWS, 2)) == (132, 50))
    os.write(master, b"typed")
    driver.queues[0].request(64)
    driver.notify(0)
    assert receive(driver, 0) == b"typed"
    send(driver, 1, b"shown")
    assert b"shown" in os.read(master, 100)
    guest = driver.function
    assert isinstance(guest, RemoteFunction)
    assert guest.guest.power_off() == 0
    os.close(master)
