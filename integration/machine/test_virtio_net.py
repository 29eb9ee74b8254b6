"""A network card in the whole machine: a guest's frames reach passt and come back; its cable."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devproc.devices.virtio_net import F_MAC, F_MRG_RXBUF, F_STATUS, HEADER, S_LINK_UP
from devproc.driver import PciDriver
from devproc.virtio import spec
from integration.boot import vm
from integration.machine.conftest import PATIENCE_S, Machine, alive
from integration.machine.remote import Remote, RemoteFunction, RemoteMemory
from integration.vhost.client import back_end

pytestmark = pytest.mark.kvm

SLOT = 1
RINGS = 0x400000
RX, TX = 0, 1
MAC, ANYBODY = b"\x02\0\0\0\0\x02", b"\xff" * 6
STATUS = 6
HAS_ROUTE = "00000000\t" in Path("/proc/net/route").read_text()


@pytest.fixture
def on_passt() -> tuple[str, str]:
    if shutil.which("passt") is None:
        pytest.skip("there is no passt")
    if not HAS_ROUTE:
        pytest.skip("passt needs a default route")
    return "--net", "passt,mac=02:00:00:00:00:02"


@pytest.fixture
def running(
    machine: Callable[..., Machine], on_passt: tuple[str, str]
) -> Iterator[tuple[Machine, PciDriver]]:
    vmsup = machine("remote", *on_passt, stdin=subprocess.PIPE)
    guest = Remote(vmsup)
    yield vmsup, started(guest, F_STATUS)
    assert guest.power_off() == 0  # and that nothing is left behind


def started(guest: Remote, features: int = 0) -> PciDriver:
    driver = PciDriver(RemoteFunction(guest, SLOT), RemoteMemory(guest), RINGS)  # type: ignore[arg-type]
    driver.start(spec.F_VERSION_1 | F_MAC | F_MRG_RXBUF | features, size=16)
    for _ in range(8):
        driver.queues[RX].request(1526)
    driver.notify(RX)
    return driver


def until(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until_s


def passt_of(vmsup: Machine) -> int:
    (pid,) = (
        pid
        for name, pid in vmsup.pids.items()
        if name.startswith("child") and Path(f"/proc/{pid}/comm").read_text().startswith("passt")
    )
    return pid


def link(vmsup: Machine, *args: str) -> subprocess.CompletedProcess[str]:
    command = vm.command("link", str(vmsup.socket), *args)
    return subprocess.run(command, capture_output=True, text=True, cwd=vm.ROOT, check=False)


def ask_by_arp(driver: PciDriver) -> None:
    """And be answered."""
    arp = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + MAC + bytes([192, 0, 2, 2]) + bytes(6)
    frame = ANYBODY + MAC + b"\x08\x06" + arp + bytes([192, 0, 2, 1])
    driver.queues[TX].request(bytes(HEADER.size) + frame)
    driver.notify(TX)
    heard: list[bytes] = []

    def answered() -> bool:
        heard.extend(u.data[HEADER.size :] for u in driver.queues[RX].used())
        return any(f[:6] == MAC and f[12:14] == b"\x08\x06" for f in heard)

    until(answered)
    assert len(driver.queues[TX].used()) == 1


def test_a_guest_asks_by_arp_and_passt_answers(running: tuple[Machine, PciDriver]) -> None:
    ask_by_arp(running[1])


def test_passt_answers_when_the_card_is_another_vmsups(
    machine: Callable[..., Machine], on_passt: tuple[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "card"
    with back_end(path, "net", *on_passt):
        card = "--vhost-user", f"net,socket={path},mac=02:00:00:00:00:02"
        guest = Remote(machine("remote", "--no-rng", *card, stdin=subprocess.PIPE))
        driver = started(guest)
        assert bytes(driver.config(n, 1) for n in range(6)) == MAC
        ask_by_arp(driver)
        assert guest.power_off() == 0


def test_vmsup_link_pulls_the_cable_and_plugs_it_in_again(running: tuple[Machine, PciDriver]) -> None:
    vmsup, driver = running
    assert driver.config(STATUS, 2) == S_LINK_UP
    for word, status in (("down", 0), ("up", S_LINK_UP)):
        assert link(vmsup, "net1", word).returncode == 0
        until(lambda status=status: driver.config(STATUS, 2) == status)  # type: ignore[misc]
    refused = link(vmsup, "net2", "down")
    assert refused.returncode == 35
    assert refused.stderr.endswith("this VM has no network card 'net2', expected one of: net1\n")


def test_a_guest_whose_passt_is_gone_has_no_link_and_goes_on(running: tuple[Machine, PciDriver]) -> None:
    vmsup, driver = running
    os.kill(passt_of(vmsup), signal.SIGKILL)
    until(lambda: driver.config(STATUS, 2) == 0)
    driver.queues[TX].request(bytes(HEADER.size) + ANYBODY + MAC + bytes(50))
    driver.notify(TX)
    until(lambda: bool(driver.queues[TX].used()))


def test_passt_does_not_outlive_a_supervisor_that_is_killed(
    machine: Callable[..., Machine], on_passt: tuple[str, str]
) -> None:
    vmsup = machine("idle", *on_passt)
    passt = passt_of(vmsup)
    vmsup.process.kill()
    until(lambda: not alive(passt))
