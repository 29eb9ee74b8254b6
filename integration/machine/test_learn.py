"""Learning from a whole machine: a guest runs, and what one kind of device did for it becomes a policy."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.boot import vm

pytestmark = pytest.mark.kvm


def vmsup(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        vm.command(*words),
        cwd=vm.ROOT,
        env=os.environ | env,
        stdin=subprocess.DEVNULL,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_what_a_guest_makes_of_a_device_is_learnt(elf: Callable[[str], str], irqchip: str) -> None:
    run = vm.command("run", "--irqchip", irqchip, elf("ports"))
    done = vmsup("policy", "learn", "serial", "--", *run)
    assert done.returncode == 0
    assert done.stderr == "vmsup: WARNING: VMSUP_LEARN: what serial may not do is recorded, and not refused\n"
    assert "still here" in done.stdout  # the guest's console
    assert "system calls of serial1, serial2, serial3, serial4 recorded\n" in done.stdout
    assert "  write: arg0 == FD_OUTPUT" in done.stdout
    assert done.stdout.endswith("what the shipped policy lacks:\n  nothing\n")


def test_a_device_beside_the_watched_one_is_not_recorded(elf: Callable[[str], str], tmp_path: Path) -> None:
    records = tmp_path / "records"
    assert vmsup("run", elf("hello"), VMSUP_LEARN=f"rtc:{records}").returncode == 0
    assert {line.split()[0] for line in records.read_text().splitlines()} == {"rtc"}


def test_nothing_is_recorded_without_a_jail(elf: Callable[[str], str], tmp_path: Path) -> None:
    records = tmp_path / "records"
    done = vmsup("run", "--no-jail", elf("hello"), VMSUP_LEARN=f"rtc:{records}")
    assert done.returncode == 35
    assert done.stderr.splitlines()[-1] == "vmsup: VMSUP_LEARN: nothing can be learnt without a jail"
    assert not records.exists()


def test_a_start_that_fails_leaves_no_watcher(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"not a kernel")
    done = vmsup("run", str(kernel), VMSUP_LEARN=f"rtc:{tmp_path / 'records'}")
    assert (done.returncode, done.stdout) == (35, "")
