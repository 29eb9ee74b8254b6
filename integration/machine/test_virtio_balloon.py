"""A balloon in the whole machine: its pages leave the supervisor, its size is what `vmsup balloon` says."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devproc.devices.virtio_balloon import F_STATS_VQ, INFLATE, PAGE_SIZE, STATS
from devproc.driver import PciDriver
from devproc.virtio import spec
from integration.boot import vm
from integration.machine.conftest import PATIENCE_S, Machine
from integration.machine.remote import Remote, RemoteFunction, RemoteMemory

pytestmark = pytest.mark.kvm

SLOT = 1
RINGS = 0x400000
FREE, FREE_PAGES = 16 << 20, 512


@pytest.fixture
def running(machine: Callable[..., Machine]) -> Iterator[tuple[Machine, PciDriver]]:
    vmsup = machine("remote", "--no-rng", "--balloon", stdin=subprocess.PIPE)
    guest = Remote(vmsup)
    driver = PciDriver(RemoteFunction(guest, SLOT), RemoteMemory(guest), RINGS)  # type: ignore[arg-type]
    driver.start(spec.F_VERSION_1 | F_STATS_VQ)
    yield vmsup, driver
    assert guest.power_off() == 0


def shared_pages(pid: int) -> int:
    """Pages of guest memory that process `pid` has touched and the host still holds."""
    kib = re.search(r"RssShmem:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert kib is not None
    return int(kib[1]) * 1024 // PAGE_SIZE


def until(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until_s


def balloon(vmsup: Machine, *args: str) -> subprocess.CompletedProcess[str]:
    command = vm.command("balloon", str(vmsup.socket), *args)
    return subprocess.run(command, capture_output=True, text=True, cwd=vm.ROOT, check=False)


def test_what_the_guest_gives_leaves_the_supervisor_and_comes_back_as_zeros(
    running: tuple[Machine, PciDriver],
) -> None:
    vmsup, driver = running
    memory, ring = driver.memory, driver.queues[INFLATE]
    for page in range(FREE_PAGES):
        memory.write(FREE + page * PAGE_SIZE, b"in use")
    before = shared_pages(vmsup.process.pid)
    first = FREE // PAGE_SIZE
    ring.request(struct.pack(f"<{FREE_PAGES}I", *range(first, first + FREE_PAGES)))
    driver.notify(INFLATE)
    until(lambda: bool(ring.used()))
    given = before - shared_pages(vmsup.process.pid)
    assert FREE_PAGES - 32 < given <= FREE_PAGES, "less what the rings took meanwhile"
    assert memory.read(FREE, 6) == bytes(6)
    memory.write(FREE, b"again")
    assert memory.read(FREE, 5) == b"again"


def test_vmsup_balloon_sets_the_target_and_shows_the_guests_statistics(
    running: tuple[Machine, PciDriver],
) -> None:
    vmsup, driver = running
    assert balloon(vmsup, "8").returncode == 0
    until(lambda: driver.config(0, 4) == 8 << 20 >> 12)
    for wrong in ("256", "-1"):
        refused = balloon(vmsup, "--", wrong)
        assert refused.returncode == 35
        assert refused.stderr.endswith(f"expected 0 to 255 MiB, not {wrong}\n")

    ring = driver.queues[STATS]
    ring.request(struct.pack("<HQ", 4, 1 << 20))
    driver.notify(STATS)
    asked = subprocess.Popen(
        vm.command("balloon", "--json", str(vmsup.socket)), stdout=subprocess.DEVNULL, cwd=vm.ROOT
    )
    until(lambda: bool(ring.used()))  # the device asks
    ring.request(struct.pack("<HQ", 4, 2 << 20))
    driver.notify(STATS)
    assert asked.wait(timeout=PATIENCE_S) == 0
    # If this guest took too long to be waited for, that is what is known now.
    counters = json.loads(balloon(vmsup, "--json").stdout)
    assert counters["target_mib"] == 8 and counters["free_bytes"] == 2 << 20
    assert re.search(r"^free_bytes +2097152$", balloon(vmsup).stdout, re.MULTILINE)


def test_a_vm_without_a_balloon_says_so(machine: Callable[..., Machine]) -> None:
    refused = balloon(machine("idle"), "8")
    assert refused.returncode == 35
    assert "started without --balloon" in refused.stderr
