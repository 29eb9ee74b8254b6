"""What the processes of a running VM are seen to be from outside."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.machine.conftest import PATIENCE_S, Machine

pytestmark = pytest.mark.kvm

Start = Callable[..., Machine]
CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


@pytest.mark.skipif(
    os.geteuid() != 0, reason="much of a process that is not dumpable is hidden from all but root"
)
@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_every_device_is_a_sealed_process_and_only_virtio_has_guest_memory(
    machine: Start, irqchip: str
) -> None:
    one = machine("idle", "--irqchip", irqchip)
    devices = {name: pid for name, pid in one.pids.items() if not name.startswith("child")}
    expected = {"serial1", "serial2", "serial3", "serial4", "rtc", "i8042", "acpi-pm", "pvpanic", "pci-host"}
    assert set(devices) == expected | {"rng"} | ({"pit"} if irqchip == "split" else set())
    assert "guest-memory" in Path(f"/proc/{one.process.pid}/maps").read_text()
    for name, pid in devices.items():
        seen = status(pid)
        assert (seen["Seccomp"], seen["NoNewPrivs"]) == ("2", "1"), name
        assert {int(seen[c], 16) for c in CAPABILITIES} == {0}, name
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert ("guest-memory" in maps) == (name == "rng"), name
        assert not any({"w", "x"} <= set(line.split()[1]) for line in maps.splitlines()), name
        assert os.listdir(f"/proc/{pid}/root") == [], name
        own = [n for n in ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup")
               if os.readlink(f"/proc/{pid}/ns/{n}") != os.readlink(f"/proc/self/ns/{n}")]  # fmt: skip
        assert len(own) == 7, name
    assert len({status(pid)["Uid"] for pid in devices.values()}) == len(devices)  # no two share a host uid


def test_the_supervisor_has_given_up_its_capabilities(machine: Start) -> None:
    one = machine("idle")
    # An ordinary user's bounding set cannot be changed, and without new privileges bounds nothing.
    sets = [c for c in CAPABILITIES if c != "CapBnd" or os.geteuid() == 0]
    for task in Path(f"/proc/{one.process.pid}/task").iterdir():
        seen = status(int(task.name))
        assert {int(seen[c], 16) for c in sets} == {0}, seen["Name"]
        assert seen["NoNewPrivs"] == "1"
    limits = Path(f"/proc/{one.process.pid}/limits").read_text().splitlines()
    (core,) = (line.split()[4:6] for line in limits if line.startswith("Max core file size"))
    assert core == ["0", "0"]  # a core would hold the guest's memory


def test_vcpus_run_where_they_are_told(machine: Start) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("this machine has one CPU")
    first, last = cpus[0], cpus[-1]
    one = machine("idle", "-c", "2", "--cpu-affinity", f"0={first}:1={last}")
    tasks = Path(f"/proc/{one.process.pid}/task")

    def masks() -> dict[str, str]:
        found = {
            (t / "comm").read_text().strip(): status(int(t.name))["Cpus_allowed_list"]
            for t in tasks.iterdir()
        }
        return {name: mask for name, mask in found.items() if name.startswith("vcpu")}

    until_s = time.monotonic() + PATIENCE_S
    while masks() != {"vcpu0": str(first), "vcpu1": str(last)}:
        assert time.monotonic() < until_s, masks()
        time.sleep(0.02)
