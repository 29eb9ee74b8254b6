"""Functions whose queues programs of Debian's serve: QEMU's storage daemon, and virtiofsd."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import pack

import pytest

from devproc.devices.virtio_blk import F_FLUSH, HEADER, S_OK, Type
from devproc.driver import PciDriver
from devproc.virtio import spec
from devproc.wire import Space
from integration.boot import vm
from integration.machine.conftest import PATIENCE_S, Machine
from integration.machine.remote import Remote, RemoteFunction, RemoteMemory
from integration.vhost.client import back_end
from integration.vhost.programs import (
    NEEDS_STORAGE_DAEMON,
    NEEDS_VIRTIOFSD,
    Program,
    storage_daemon,
    virtiofsd,
)

pytestmark = pytest.mark.kvm

SLOT = 1
RINGS = 0x400000
SIZE = 1 << 20
VECTOR = 0x41
Start = Callable[..., Machine]


def within_patience(condition: Callable[[], bool]) -> bool:
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.001)
    return True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(SIZE))
    return image


@pytest.fixture
def daemon(path: Path, image: Path) -> Iterator[Program]:
    with storage_daemon(image, path) as program:
        yield program


class Function:
    """A VM with one such function, and its driver."""

    def __init__(self, vmsup: Machine) -> None:
        self.vmsup = vmsup
        self.guest = Remote(vmsup)
        memory = RemoteMemory(self.guest)
        self.driver = PciDriver(RemoteFunction(self.guest, SLOT), memory, RINGS)  # type: ignore[arg-type]

    def start(self, *, msix: bool = True, features: int = 0) -> None:
        for vector in range(len(self.driver.queues) + 3):
            for n, word in enumerate((0xFEE00000, 0, VECTOR + vector, 0)):
                self.driver.function.write(Space.BAR0, spec.BAR_MSIX_TABLE + 16 * vector + 4 * n, 4, word)
        self.driver.start(spec.F_VERSION_1 | features, size=16, msix=msix)

    def ask(self, index: int, *parts: bytes | int) -> bytes:
        """What the back end writes into a request's room."""
        queue = self.driver.queues[index]
        queue.interrupts(1)
        queue.request(*parts)
        self.driver.notify(index)
        used: list[bytes] = []
        assert within_patience(lambda: bool(used.extend(u.data for u in queue.used()) or used))
        return used[0]

    def interrupted(self, queue: int, vector: int) -> bool:
        """Whether what the queue gives back comes with an interrupt by `vector`."""
        before = self.guest.interrupts(VECTOR + vector)
        for _ in range(3):
            self.ask(queue, HEADER.pack(Type.IN, 0, 0), 512, 1)
        # Once more than there must be: a back end may interrupt whenever it is told how.
        return within_patience(lambda: self.guest.interrupts(VECTOR + vector) >= before + 2)


def start(machine: Start, *options: str) -> Function:
    return Function(machine("remote", "--no-rng", *options, stdin=subprocess.PIPE))


@NEEDS_STORAGE_DAEMON
def test_a_disk_of_the_storage_daemons(machine: Start, daemon: Program, path: Path, image: Path) -> None:
    disk = start(machine, "--vhost-user", f"block,socket={path}")
    driver, guest = disk.driver, disk.guest
    assert driver.config(0, 8) == SIZE // 512
    assert driver.config(0x22, 2) == 2, "queues"
    disk.start(features=F_FLUSH)
    before = image.read_bytes()
    for queue in (0, 1):
        *data, status = disk.ask(queue, HEADER.pack(Type.IN, 0, 5 + queue), 512, 1)
        assert (bytes(data), status) == (before[512 * (5 + queue) :][:512], S_OK)
        assert disk.interrupted(queue, 1 + queue)

    # Reset in the middle of its life, and on with INTA.
    disk.start(features=F_FLUSH, msix=False)
    before_inta = guest.interrupts(VECTOR + 1)
    guest.acknowledge_at(driver.function.base + spec.BAR_ISR)  # type: ignore[attr-defined]
    assert disk.ask(0, HEADER.pack(Type.OUT, 0, 9), b"written!" * 64, 1) == bytes([S_OK])
    assert disk.ask(0, HEADER.pack(Type.FLUSH, 0, 0), 1) == bytes([S_OK])
    assert image.read_bytes() == before[: 9 * 512] + b"written!" * 64 + before[10 * 512 :]
    assert within_patience(lambda: driver.isr() == spec.ISR_QUEUE), "no cause"
    assert guest.interrupts(VECTOR + 1) == before_inta

    # MSI-X is switched on while the rings run.
    driver.function.write(Space.CONFIG, driver.msix + 2, 2, 0x8000)
    driver.put(spec.QUEUE_SELECT, 2, 0)
    driver.put(spec.QUEUE_MSIX_VECTOR, 2, 2)
    assert disk.interrupted(0, 2)

    daemon.send_signal(signal.SIGKILL)
    assert within_patience(lambda: bool(driver.status & spec.DEVICE_NEEDS_RESET))
    driver.reset()
    assert guest.power_off() == 0
    assert disk.vmsup.errors() == "vmsup: vhost1: needs a reset: the back end has closed its socket\n"


@NEEDS_STORAGE_DAEMON
def test_rings_go_on_where_they_were_when_bus_mastering_is_back(
    machine: Start, daemon: Program, path: Path, image: Path
) -> None:
    disk = start(machine, "--vhost-user", f"block,socket={path},queues=1")
    driver = disk.driver
    assert driver.config(0x22, 2) == 1, "queues"
    disk.start()
    disk.ask(0, HEADER.pack(Type.IN, 0, 0), 512, 1)
    driver.function.write(Space.CONFIG, 4, 2, 2)
    driver.queues[0].request(HEADER.pack(Type.IN, 0, 1), 512, 1)
    driver.function.write(Space.CONFIG, 4, 2, 6)
    used: list[bytes] = []
    assert within_patience(lambda: bool(used.extend(u.data for u in driver.queues[0].used()) or used))
    assert used[0] == image.read_bytes()[512:1024] + bytes([S_OK])
    assert disk.guest.power_off() == 0


@pytest.mark.parametrize("rings", ["split", "packed"])
def test_a_disk_of_our_own(machine: Start, path: Path, image: Path, rings: str) -> None:
    features = spec.F_EVENT_IDX | (spec.F_RING_PACKED if rings == "packed" else 0)
    with back_end(path, "block", "--block", f"{image},queues=2,packed-queue"):
        disk = start(machine, "--vhost-user", f"block,socket={path}")
        driver = disk.driver
        assert driver.config(0x22, 2) == 2, "queues"
        disk.start(features=features)
        assert disk.ask(1, HEADER.pack(Type.OUT, 0, 9), b"written!" * 64, 1) == bytes([S_OK])
        assert image.read_bytes()[9 * 512 :][:512] == b"written!" * 64
        # The rings stop, and go on where they were: in another process of the back end's.
        driver.function.write(Space.CONFIG, 4, 2, 2)
        driver.function.write(Space.CONFIG, 4, 2, 6)
        assert disk.interrupted(1, 2)
        disk.start(features=features)
        assert disk.ask(0, HEADER.pack(Type.IN, 0, 9), 512, 1) == b"written!" * 64 + bytes([S_OK])
        assert disk.guest.power_off() == 0
    assert disk.vmsup.errors() == ""


@NEEDS_VIRTIOFSD
def test_a_directory_of_virtiofsds(machine: Start, path: Path, tmp_path: Path) -> None:
    with virtiofsd(tmp_path, path):
        shared = start(machine, "--vhost-user", f"fs,socket={path},tag=shared")
        assert shared.driver.config(0, 4).to_bytes(4, "little") == b"shar"
        shared.start()
        # FUSE_INIT of version 7.31: length, opcode, unique, node, uid, gid, pid, padding; then the versions
        init = pack("<IIQQIIII", 56, 26, 77, 0, 0, 0, 0, 0) + pack("<IIII", 7, 31, 1 << 17, 0)
        answer = shared.ask(1, init, 80)
        assert answer[:16] == pack("<IiQ", 80, 0, 77)
        assert answer[16:20] == pack("<I", 7)
        assert shared.guest.power_off() == 0


def test_no_back_end_is_one_line_and_no_vm(elf: Callable[[str], str], path: Path) -> None:
    result = vm.run("--vhost-user", f"block,socket={path}", elf("idle"))
    assert result.code == 35
    assert result.errors == f"vmsup: --vhost-user block,socket={path}: No such file or directory\n"
