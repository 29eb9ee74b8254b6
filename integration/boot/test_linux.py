"""Unmodified Debian kernels, booted to user space with every device jailed."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.boot import images, vm
from integration.ordinary import as_user

pytestmark = pytest.mark.linux

Initrd = Callable[..., str]

KERNELS = {
    "cloud": (images.CLOUD, "bzimage", ()),
    "generic": (images.GENERIC, "bzimage", ()),
    "generic-noacpi": (images.GENERIC, "bzimage", ("acpi=off",)),
    "vmlinux": (images.GENERIC, "vmlinux", ()),
}
FACTS = r"""
echo "epoch: $(date +%s)"
echo "epoch: $(date +%s)"
echo "memory-kib: $(awk '/MemTotal/ {print $2}' /proc/meminfo)"
for n in 0 1 2 3; do echo "ttyS$n: $(cat /sys/class/tty/ttyS$n/type)"; done
echo "topology: $(lscpu | grep -E '^(Thread|Core|Socket)' | sed 's/.*: *//' | tr '\n' ' ')"
echo "lspci: $(lspci -n)"
echo "generation: $(ls /sys/bus/acpi/drivers/vmgenid | grep VMSP)"
echo "epoch: $(date +%s)"
dmesg | grep -E 'BUG|Oops|WARNING:|nobody cared|soft lockup' | sed 's/^/trouble: /'
"""
# vCPUs, MiB, irqchip: each kernel with both values of each, between them every triple.  VMSUP_FULL_MATRIX has
# every triple for every kernel, half an hour of boots in the testbed.
MACHINES = {
    "cloud": [(1, 256, "kernel"), (2, 5120, "split")],
    "generic": [(1, 5120, "kernel"), (2, 256, "split")],
    "generic-noacpi": [(1, 256, "split"), (2, 5120, "kernel")],
    "vmlinux": [(1, 5120, "split"), (2, 256, "kernel")],
}
if os.environ.get("VMSUP_FULL_MATRIX"):
    MACHINES = {kind: [*itertools.product((1, 2), (256, 5120), ("kernel", "split"))] for kind in KERNELS}
# Unpacking at a random address and retpolines are what an emulated processor is slowest at.
QUICK = ("quiet", "tsc=reliable", "nokaslr", "mitigations=off")
PORT_16550A = "4"  # <linux/serial_core.h>


@pytest.fixture(scope="session")
def initrd(tmp_path_factory: pytest.TempPathFactory) -> Initrd:
    """(Debian package, script, modules) -> path of an initramfs that runs it."""
    made: dict[tuple[str, str, tuple[str, ...]], Path] = {}

    def make(package: str, script: str, modules: tuple[str, ...] = ()) -> str:
        key = package, script, modules
        if key not in made:
            made[key] = tmp_path_factory.mktemp("initrd") / "initrd"
            files = images.program("/usr/bin/lscpu") | images.program("/usr/bin/lspci")
            made[key].write_bytes(images.initramfs(script, images.kernel(package), modules, files))
        return str(made[key])

    return make


def boot(initrd: Initrd, kind: str, script: str, *options: str, params: tuple[str, ...] = ()) -> vm.Result:
    package, image, more = KERNELS[kind]
    kernel = getattr(images.kernel(package), image)
    words = [w for p in (*QUICK, *more, *params) for w in ("-p", p)]
    return vm.run("--jail", "-i", initrd(package, script), *words, *options, str(kernel))


@pytest.mark.parametrize(
    ("kind", "cpus", "mem", "irqchip"), [(kind, *one) for kind in KERNELS for one in MACHINES[kind]]
)
def test_a_stock_kernel_boots(
    initrd: Initrd, booted: Callable[[], None], kind: str, cpus: int, mem: int, irqchip: str
) -> None:
    # Without ACPI a PC cannot be powered off, so that guest resets instead, by the i8042.
    end, code, said = (images.POWEROFF, 0, "")
    if kind == "generic-noacpi":
        end, code, said = (images.REBOOT, 32, "vmsup: the guest asked for a reset\n")
    end = end.replace(images.REPORT, images.REPORT + FACTS)
    vmsup = boot(initrd, kind, end, "-c", str(cpus), "-m", str(mem), "--irqchip", irqchip)
    vmsup.find("epoch:")
    booted()
    assert (vmsup.code, vmsup.errors) == (code, said)
    assert vmsup["cpus:"] == str(cpus)
    assert 0.75 * mem * 1024 < int(vmsup["memory-kib:"]) < mem * 1024
    # A line may wait for a CPU before we see it: the one that waited least tells the clock's error.
    lags_s = [at - int(text.split()[1]) for at, text in vmsup.lines if text.startswith("epoch:")]
    assert -2 <= min(lags_s) <= 2
    assert [vmsup[f"ttyS{n}:"] for n in range(4)] == [PORT_16550A] * 4
    assert vmsup["topology:"].split() == ["1", str(cpus), "1"]
    assert vmsup["lspci:"].startswith("00:00.0 0600: 8086:1237")
    if kind in ("generic", "vmlinux"):  # with ACPI and CONFIG_VMGENID
        assert vmsup["generation:"] == "VMSP0001:00"
    assert "trouble:" not in vmsup.console, vmsup.console


@pytest.mark.parametrize(
    ("script", "params", "code", "line"),
    [
        (images.REBOOT, ("reboot=a",), 32, "the guest asked for a reset"),
        (images.REBOOT, ("reboot=t",), 32, "triple fault"),
        (
            images.REPORT + "insmod /modules/pvpanic-mmio.ko; echo c > /proc/sysrq-trigger\n",
            (),
            34,
            "panicked",
        ),
    ],
    ids=["acpi-reset", "triple-fault", "panic"],
)
def test_each_other_end_has_its_exit_code(
    initrd: Initrd,
    booted: Callable[[], None],
    script: str,
    params: tuple[str, ...],
    code: int,
    line: str,
) -> None:
    modules = ("pvpanic-mmio",) if code == 34 else ()
    package, image, _ = KERNELS["cloud"]
    kernel = str(getattr(images.kernel(package), image))
    words = [w for p in (*QUICK, *params) for w in ("-p", p)]
    vmsup = vm.run("-i", initrd(package, script, modules), *words, kernel)
    vmsup.find(images.UP)
    booted()
    assert vmsup.code == code, vmsup.errors
    assert line in vmsup.errors


def test_four_vcpus_of_an_ordinary_user_are_four_cores_of_one_package(
    initrd: Initrd, booted: Callable[[], None]
) -> None:
    user = as_user()
    if subprocess.run([*user, "test", "-w", "/dev/kvm"], check=False).returncode:
        pytest.skip("an ordinary user may not use this machine's /dev/kvm")
    package, image, _ = KERNELS["cloud"]
    with tempfile.TemporaryDirectory() as readable:
        os.chmod(readable, 0o755)
        kernel = shutil.copy(getattr(images.kernel(package), image), f"{readable}/kernel")
        script = images.POWEROFF.replace(images.REPORT, images.REPORT + FACTS)
        disk = shutil.copy(initrd(package, script), f"{readable}/initrd")
        quick = [w for p in QUICK for w in ("-p", p)]
        vmsup = vm.run("--jail", "-c", "4", "-i", disk, *quick, kernel, user=tuple(user))
    vmsup.find(images.UP)
    booted()
    assert (vmsup.code, vmsup.errors) == (0, "")
    assert vmsup["topology:"].split() == ["1", "4", "1"]


def test_the_command_line_may_stay_as_it_is(initrd: Initrd, booted: Callable[[], None]) -> None:
    package, image, _ = KERNELS["cloud"]
    kernel = getattr(images.kernel(package), image)
    vmsup = vm.run("-c", "2", "-i", initrd(package, images.POWEROFF), str(kernel))
    vmsup.find(images.UP)
    booted()
    assert vmsup.code == 0, vmsup.errors
    assert "Command line: console=ttyS0 reboot=k panic=-1" in vmsup.console


def test_the_pit_process_can_be_the_only_timer(initrd: Initrd, booted: Callable[[], None]) -> None:
    # No local APIC timer and no kvmclock: the edges of the pit process on GSI 0 are the ticks.
    script = images.REPORT + "sed 's/^/irq: /' /proc/interrupts\nsleep 1\nreboot -f\n"
    timer = ("nolapic_timer", "no-kvmclock")
    vmsup = boot(initrd, "generic-noacpi", script, "--irqchip", "split", params=timer)
    booted()
    assert re.search(r"irq: +0: +[1-9]\d* .*IO-APIC.*timer", vmsup.console), vmsup.console
    assert vmsup.code == 32, vmsup.errors
