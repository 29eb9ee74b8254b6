"""Disks in the whole machine: what a guest writes is in the image, whoever ends the VM and however."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devproc.devices.virtio_blk import F_FLUSH, HEADER, S_IOERR, S_OK, Type
from devproc.driver import PciDriver
from devproc.virtio import spec
from integration.boot import vm
from integration.machine.conftest import PATIENCE_S, Machine
from integration.machine.remote import Remote, RemoteFunction, RemoteMemory

pytestmark = pytest.mark.kvm

SLOT = 1
RINGS = 0x400000
SIZE = 1 << 20
NEEDS_QEMU_IMG = pytest.mark.skipif(
    shutil.which("qemu-img") is None, reason="qemu-img (Debian: qemu-utils) is not installed"
)

Start = Callable[..., Machine]


class Disk:
    """A VM with one disk, and its driver."""

    def __init__(self, vmsup: Machine) -> None:
        self.vmsup = vmsup
        self.guest = Remote(vmsup)
        memory = RemoteMemory(self.guest)
        self.driver = PciDriver(RemoteFunction(self.guest, SLOT), memory, RINGS)  # type: ignore[arg-type]
        self.driver.start(spec.F_VERSION_1 | F_FLUSH, size=8)

    def ask(self, kind: Type, sector: int, *parts: bytes | int) -> bytes:
        """What the device writes into a request's room, the status last."""
        queue = self.driver.queues[0]
        queue.request(HEADER.pack(kind, 0, sector), *parts, 1)
        self.driver.notify(0)
        until_s = time.monotonic() + PATIENCE_S
        while not (used := queue.used()):
            assert time.monotonic() < until_s
        return used[0].data


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "64M"], check=True)
    return path


@pytest.fixture
def start(machine: Start) -> Iterator[Callable[..., Disk]]:
    def start(*options: str) -> Disk:
        blocks = [word for option in options for word in ("--block", option)]
        return Disk(machine("remote", "--no-rng", *blocks, stdin=subprocess.PIPE))

    yield start


def test_a_guest_reads_and_writes_its_image(start: Callable[..., Disk], image: Path) -> None:
    before = image.read_bytes()
    disk = start(f"{image},id=of the test")
    assert disk.driver.config(0, 4) == SIZE // 512
    assert disk.ask(Type.IN, 7, 1024) == before[7 * 512 : 9 * 512] + bytes([S_OK])
    assert disk.ask(Type.GET_ID, 0, 20)[:11] == b"of the test"
    data = os.urandom(4096)
    assert disk.ask(Type.OUT, 16, data) == bytes([S_OK])
    assert disk.ask(Type.FLUSH, 0) == bytes([S_OK])
    assert disk.ask(Type.OUT, SIZE // 512, data) == bytes([S_IOERR])
    assert image.read_bytes() == before[:8192] + data + before[12288:]
    assert disk.guest.power_off() == 0


def test_a_disk_that_is_read_only_stays_as_it_is(start: Callable[..., Disk], image: Path) -> None:
    before = image.read_bytes()
    image.chmod(0o444)
    disk = start(f"{image},ro")
    assert disk.ask(Type.OUT, 0, bytes(512)) == bytes([S_IOERR])
    assert disk.ask(Type.IN, 0, 512) == before[:512] + bytes([S_OK])
    assert disk.guest.power_off() == 0
    assert image.read_bytes() == before


def test_a_shrunken_image_is_an_error_of_the_guests_and_no_death(
    start: Callable[..., Disk], image: Path
) -> None:
    disk = start(str(image))
    os.truncate(image, SIZE // 2)
    assert disk.ask(Type.OUT, SIZE // 512 - 8, bytes(4096)) == bytes([S_IOERR])
    assert disk.ask(Type.OUT, 0, bytes(4096)) == bytes([S_OK])
    assert disk.guest.power_off() == 0
    assert image.stat().st_size == SIZE // 2
    assert "block1: a request failed: the image has become shorter" in disk.vmsup.errors()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A directory with room for 16 KiB."""
    path = tmp_path / "small"
    path.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(path)], check=True)
    except subprocess.CalledProcessError:
        pytest.skip("cannot mount a small file system: needs root")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_host_is_an_error_of_the_guests_until_there_is_room_again(
    start: Callable[..., Disk], small: Path
) -> None:
    image = small / "image"
    image.touch()
    os.truncate(image, SIZE)
    disk = start(str(image))
    statuses = [disk.ask(Type.OUT, at, b"full" * 1024)[0] for at in range(0, SIZE // 512, 256)]
    assert S_OK in statuses and statuses[-1] == S_IOERR
    subprocess.run(["mount", "-o", "remount,size=2M", str(small)], check=True)
    assert disk.ask(Type.OUT, SIZE // 512 - 8, b"room" * 1024) == bytes([S_OK])
    assert disk.guest.power_off() == 0
    assert "block1: a request failed: No space left on device" in disk.vmsup.errors()


def test_a_second_vm_is_refused_the_image_in_one_line(start: Callable[..., Disk], image: Path) -> None:
    disk = start(str(image))
    second = vm.run("--block", str(image), str(Path(__file__)))
    assert second.code == 35
    assert second.errors == f"vmsup: --block {image}: another program uses it\n"
    assert disk.guest.power_off() == 0


def resize(disk: Disk, name: str, size: int) -> subprocess.CompletedProcess[str]:
    command = vm.command("resize", str(disk.vmsup.socket), name, str(size))
    return subprocess.run(command, capture_output=True, text=True, cwd=vm.ROOT, check=False)


def test_a_disk_becomes_larger_while_its_guest_uses_it(start: Callable[..., Disk], image: Path) -> None:
    before = image.read_bytes()
    disk = start(f"{image},max-size={3 * SIZE}")
    assert disk.ask(Type.OUT, SIZE // 512, bytes(512)) == bytes([S_IOERR])
    done = resize(disk, "block1", 2 * SIZE)
    assert (done.returncode, done.stderr) == (0, "")
    assert disk.driver.config(0, 4) == 2 * SIZE // 512
    assert disk.ask(Type.OUT, 2 * SIZE // 512 - 1, b"last" * 128) == bytes([S_OK])
    assert image.read_bytes() == before + bytes(SIZE - 512) + b"last" * 128
    for name, size, why in (
        ("block1", 4 * SIZE, f"block1: expected at most its max-size= of {3 * SIZE} bytes, not {4 * SIZE}"),
        ("block2", SIZE, "this VM has no disk 'block2', expected one of: block1"),
    ):
        refused = resize(disk, name, size)
        assert refused.returncode == 35
        assert refused.stderr.endswith(why + "\n")
    assert disk.guest.power_off() == 0
    assert image.stat().st_size == 2 * SIZE


@NEEDS_QEMU_IMG
def test_a_qcow2_disk_becomes_larger_and_its_image_as_it_is_written(
    start: Callable[..., Disk], qcow2: Path
) -> None:
    disk = start(f"{qcow2},format=qcow2,max-size={1 << 30}")
    assert resize(disk, "block1", 1 << 30).returncode == 0
    assert disk.ask(Type.OUT, (1 << 30) // 512 - 1, b"last" * 128) == bytes([S_OK])
    assert disk.guest.power_off() == 0
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(qcow2)], check=True)
    info = subprocess.run(
        ["qemu-img", "info", "--output=json", str(qcow2)], check=True, capture_output=True
    ).stdout
    assert json.loads(info)["virtual-size"] == 1 << 30


@NEEDS_QEMU_IMG
def test_a_qcow2_image_is_whole_after_the_guest_has_powered_off(
    start: Callable[..., Disk], qcow2: Path
) -> None:
    disk = start(f"{qcow2},format=qcow2")
    data = os.urandom(4096)
    for sector in (0, 1000, 100000):
        assert disk.ask(Type.OUT, sector, data) == bytes([S_OK])
    assert disk.ask(Type.IN, 1000, 4096) == data + bytes([S_OK])
    assert disk.guest.power_off() == 0
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(qcow2)], check=True)


@NEEDS_QEMU_IMG
def test_what_was_flushed_survives_the_death_of_the_supervisor(
    start: Callable[..., Disk], qcow2: Path, tmp_path: Path
) -> None:
    disk = start(f"{qcow2},format=qcow2")
    data = os.urandom(4096)
    disk.ask(Type.OUT, 1000, data)
    disk.ask(Type.FLUSH, 0)
    disk.ask(Type.OUT, 100000, data)
    disk.vmsup.process.kill()
    disk.vmsup.process.wait(PATIENCE_S)
    raw = tmp_path / "raw"
    until_s = time.monotonic() + PATIENCE_S  # the device process, which holds the lock too, ends with it
    while (
        done := subprocess.run(["qemu-img", "check", "-q", "-r", "leaks", str(qcow2)], check=False)
    ).returncode:
        assert time.monotonic() < until_s, done
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(qcow2), str(raw)], check=True)
    with raw.open("rb") as file:
        assert os.pread(file.fileno(), 4096, 1000 * 512) == data
    again = start(f"{qcow2},format=qcow2")
    assert again.ask(Type.IN, 1000, 4096) == data + bytes([S_OK])
    assert again.guest.power_off() == 0


@NEEDS_QEMU_IMG
def test_a_damaged_qcow2_image_is_named_and_starts_nothing(qcow2: Path) -> None:
    with qcow2.open("r+b") as file:
        file.seek(72)
        file.write(b"\xff" * 8)  # features that nobody knows
    done = vm.run("--block", f"{qcow2},format=qcow2", str(Path(__file__)))
    assert done.code == 33
    assert "block1: a qcow2 image with features that are not here" in done.errors
    assert len(done.errors.splitlines()) == 1
