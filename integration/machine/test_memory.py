"""How much memory each process of a VM has for itself, against budget.toml."""

from __future__ import annotations

import platform
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.machine.conftest import Machine

pytestmark = pytest.mark.kvm

HERE = Path(__file__).parent
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SHARE = ("--shared-dir", "/usr/share,tag=share,ro")
OPTIONS = ("--irqchip", "split", "--serial", "sink,hardware=virtio-console", "--balloon", *SHARE)


def private_kib(pid: int) -> int:
    """What would be free without the process (proc_pid_smaps(5))."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kib) for kib in re.findall(r"^Private_\w+: +(\d+) kB", text, re.MULTILINE))


def process_name(pid: int) -> str:
    """The title that it gave itself."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode().removeprefix("vmsup: ")


@pytest.fixture
def budget_kib() -> dict[str, int]:
    """By process; skips where no process is as large as those that it was measured with."""
    budget = tomllib.loads((HERE / "budget.toml").read_text())
    here = f"{platform.python_implementation()} {sys.version_info.major}.{sys.version_info.minor}"
    if here != budget["python"]:
        pytest.skip(f"budget.toml is for {budget['python']}, this is {here}")
    if HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text():
        pytest.skip("transparent huge pages are always on: they round up what a process has")
    kib: dict[str, int] = budget["private_kib"]
    return kib


@pytest.mark.parametrize("transport", ["mailbox", "socket"])
def test_no_process_has_more_memory_of_its_own_than_its_budget(
    machine: Callable[..., Machine], tmp_path: Path, budget_kib: dict[str, int], transport: str
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    vsock = f"3,path={tmp_path / 'vsock'}"
    one = machine("unasked", "--transport", transport, *OPTIONS, "--block", str(disk), "--vsock", vsock)
    one.wait_for(b"!")
    children = Path(f"/proc/{one.process.pid}/task/{one.process.pid}/children").read_text().split()
    used_kib = {process_name(pid): private_kib(pid) for pid in map(int, children)}
    used_kib["supervisor"] = private_kib(one.process.pid)
    assert used_kib.keys() == budget_kib.keys(), "budget.toml names the processes of this VM"
    over = [
        f"{name}: {kib} KiB of memory of its own, budget {budget_kib[name]} KiB"
        for name, kib in used_kib.items()
        if kib > budget_kib[name]
    ]
    assert not over, "\n".join(over)
