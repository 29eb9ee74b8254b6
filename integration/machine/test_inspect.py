"""`vmsup jail inspect` of a running VM: every process of it, by the kernel's word."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from integration.boot import vm
from integration.machine.conftest import Machine
from supervisor.config import RunConfig
from supervisor.machine import instances

pytestmark = pytest.mark.kvm


def inspect(machine: Machine, *words: str) -> tuple[int, str]:
    command = vm.command("jail", "inspect", *words, str(machine.socket))
    done = subprocess.run(command, cwd=vm.ROOT, text=True, stdout=subprocess.PIPE, check=False)
    return done.returncode, done.stdout


def report(machine: Machine) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(inspect(machine, "--json")[1])
    return read


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_every_process_is_as_declared_and_the_vm_goes_on(
    machine: Callable[..., Machine], irqchip: str
) -> None:
    one = machine("idle", "--irqchip", irqchip)
    found = report(one)
    ours = {"supervisor", "zygote", "janitor"}
    assert {f["process"] for f in found["findings"]} == {*ours, *devices(irqchip)}
    assert not [f for f in found["findings"] if f["verdict"] == "differs"]
    assert found["proven"] == (os.geteuid() == 0)
    assert inspect(one, "--require")[0] == (0 if found["proven"] else 33)
    subprocess.run(vm.command("stop", str(one.socket)), cwd=vm.ROOT, check=True)
    assert one.end() == 0


def devices(irqchip: str) -> set[str]:
    return {i.name for i in instances(RunConfig(kernel="", irqchip=irqchip), 256 << 20, 0)}


def test_without_a_jail_each_device_is_named_with_each_field(machine: Callable[..., Machine]) -> None:
    one = machine("idle", "--no-jail")
    code, text = inspect(one, "--require")
    assert code == 33
    for name in devices("kernel"):
        assert f"DIFFERS: {name}: seccomp mode: declared 2, found 0\n" in text
        assert f"DIFFERS: {name}: no_new_privs: declared 1, found 0\n" in text
    assert inspect(one)[0] == 0  # it is told, and nothing was required
    subprocess.run(vm.command("stop", str(one.socket)), cwd=vm.ROOT, check=True)
    one.end()
