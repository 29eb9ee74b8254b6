"""A guest under vmsup and under QEMU in turn: the same kernel, initramfs, images and job.

QEMU is `microvm`, which has no firmware to wait for; with pcie=on its virtio functions are on PCI, as ours.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from integration.boot import images, vm
from integration.testbed.debian import tool

MICROVM = "microvm,acpi=on,pcie=on,pit=on,pic=on,rtc=on,isa-serial=on"
FIGURE = "figure:"  # the guest says "figure: NAME VALUE" of each
_WORDS = ("quiet", "tsc=reliable", "nokaslr", "mitigations=off")
_TIMEOUT_S = 300


@dataclass(frozen=True)
class Guest:
    """What both boot: Debian's cloud kernel with an initramfs, on one processor."""

    initrd: Path
    mem_mib: int = 512

    @classmethod
    def of(cls, directory: Path, job: str, modules: Sequence[str], **files: images.Node) -> Guest:
        """One whose init runs `job`, with `modules` inserted and `files` by name, and powers off."""
        script = images.POWEROFF.replace(images.REPORT, images.REPORT + job)
        initrd = directory / "initrd"
        initrd.write_bytes(images.initramfs(script, images.kernel(images.CLOUD), modules, files))
        return cls(initrd)

    def vmsup(self, *options: str) -> list[str]:
        """The command of vmsup, every device jailed, with these options more."""
        words = [w for p in _WORDS for w in ("-p", p)]
        machine = ("--jail", "-m", str(self.mem_mib), "--device-timeout", vm.DEVICE_TIMEOUT_S)
        kernel = images.kernel(images.CLOUD).bzimage
        return vm.command("run", *machine, "-i", str(self.initrd), *words, *options, str(kernel))

    def qemu(self, *options: str, machine: str = MICROVM) -> list[str]:
        """The command of QEMU: COM1 on its standard output, and what `options` say."""
        base = "-accel kvm -cpu host -nodefaults -no-user-config -nographic -no-reboot -serial stdio"
        append = " ".join(("console=ttyS0 reboot=k panic=-1", *_WORDS))
        kernel = images.kernel(images.CLOUD).bzimage
        files = ("-kernel", str(kernel), "-initrd", str(self.initrd), "-append", append)
        qemu = tool("qemu-system-x86_64", "qemu-system-x86")
        return [qemu, "-M", machine, "-m", str(self.mem_mib), *base.split(), *files, *options]


@contextmanager
def started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """`command` and what it starts, which are ended when they take longer than any guest of a benchmark."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        killer = threading.Timer(_TIMEOUT_S, os.killpg, (process.pid, signal.SIGKILL))
        killer.start()
        try:
            yield process
        finally:
            killer.cancel()


def failed(command: Sequence[str], code: int, said: str) -> SystemExit:
    """What ends the benchmark when a guest did not do its job."""
    return SystemExit(f"{' '.join(command)}\nended with {code}: {said[-2000:]}")


def figures(command: Sequence[str]) -> dict[str, float]:
    """What the guest that `command` boots has measured, by name.

    Raises:
        SystemExit: nothing, or it did not end as it should.
    """
    with started(command) as process:
        out, errors = process.communicate()
    found = [line.split()[1:] for line in out.splitlines() if line.startswith(FIGURE)]
    if process.returncode or not found or {len(words) for words in found} != {2}:
        raise failed(command, process.returncode, out + errors)
    return {name: float(value) for name, value in found}


def interleaved(
    commands: dict[str, list[str]], rounds: int, run: Callable[[list[str]], dict[str, float]] = figures
) -> dict[str, dict[str, list[float]]]:
    """Figure -> who of `commands` -> its value in each round; the guests take turns."""
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for who, command in commands.items():
            for name, value in run(command).items():
                found.setdefault(name, {}).setdefault(who, []).append(value)
    return found
