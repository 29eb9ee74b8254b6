"""`vmsup run --record` of a guest, and `vmsup replay` of what its devices were asked."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from devproc.devices.virtio_blk import HEADER, Type
from devproc.driver import PciDriver
from devproc.virtio import spec
from integration.boot import vm
from integration.machine.conftest import PATIENCE_S, Machine
from integration.machine.remote import Remote, RemoteFunction, RemoteMemory

RINGS = 0x400000

TYPED = "typed before it asks q"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        vm.command(*words), cwd=vm.ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_what_a_guest_and_its_devices_said_is_recorded_and_said_again(
    elf: Callable[[str], str], tmp_path: Path
) -> None:
    keys, log, where = tmp_path / "keys", tmp_path / "log", tmp_path / "record"
    keys.write_text(TYPED)
    done = run("run", "--record", str(where), "--serial", f"type=file,path={log},input={keys}", elf("echo"))
    assert done.returncode == 0, done.stderr
    assert log.read_text().endswith(TYPED[:-1])
    text = (where / "serial1.vmrep").read_text()
    assert f"input {TYPED[0].encode().hex()}" in text.splitlines()
    assert text.count("\nsent ") >= len(TYPED)
    assert "write PORT" in (where / "acpi-pm.vmrep").read_text()  # the power-off

    again = run("replay", str(where))
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{where}/serial1.vmrep: " in again.stdout

    changed = text.replace("= 0x60", "= 0x61", 1)
    (where / "serial1.vmrep").write_text(changed)
    again = run("replay", str(where))
    assert again.returncode == 33
    assert "read 0x5: [96, " in again.stdout


def test_a_disk_and_random_numbers_are_recorded_with_what_the_guest_has_in_memory(
    machine: Callable[..., Machine], tmp_path: Path
) -> None:
    image, where = tmp_path / "image", tmp_path / "record"
    image.write_bytes(os.urandom(1 << 16))
    vmsup = machine("remote", "--record", str(where), "--block", str(image), stdin=subprocess.PIPE)
    guest = Remote(vmsup)
    memory = RemoteMemory(guest)
    for slot, parts in ((1, (16,)), (2, (HEADER.pack(Type.IN, 0, 3), 512, 1))):
        driver = PciDriver(RemoteFunction(guest, slot), memory, RINGS + slot * RINGS)  # type: ignore[arg-type]
        driver.start(spec.F_VERSION_1 | (spec.F_RING_PACKED if slot == 1 else 0), size=8, enabled=1)
        for _ in range(3):
            driver.queues[0].request(*parts)
            driver.notify(0)
            until_s = time.monotonic() + PATIENCE_S
            while not (used := driver.queues[0].used()):
                assert time.monotonic() < until_s
    assert used[0].data == image.read_bytes()[3 * 512 : 4 * 512] + b"\0"
    assert guest.power_off() == 0
    image.unlink()  # what it gave is in the record

    disk = where / "block1.vmrep"
    for record in (disk, where / "rng.vmrep"):
        again = run("replay", str(record))
        assert again.returncode == 0, again.stdout + again.stderr
        assert "operations, each as recorded" in again.stdout
    text = disk.read_text()
    assert "gave disk" in text and "memory 0x" in text
    disk.write_text(re.sub(r"(wrote \S+ )..", r"\1aa", text))
    again = run("replay", str(disk))
    assert again.returncode == 33
    assert "memory at 0x" in again.stdout
