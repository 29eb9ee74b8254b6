"""What the guests of real boots are made of: Debian's kernels, initramfs images of busybox, fio on a disk.

    python -m integration.boot.images

downloads both kernels into the cache, where the testbed's L1, which has no network, finds them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from integration.testbed import cache, debian
from integration.testbed import initramfs as archive
from integration.testbed.debian import CLOUD, GENERIC, Kernel, TestbedError
from integration.testbed.initramfs import Node, file, program

__all__ = [
    "CLOUD", "FIO", "GENERIC", "Kernel", "Node", "TestbedError",
    "file", "fio", "initramfs", "kernel", "program",
]  # fmt: skip

kernel = debian.kernel

UP = "vmsup-guest: up"  # printed once user space runs
REPORT = f"""
echo "{UP}"
uname -a
echo "cpus: $(grep -c ^processor /proc/cpuinfo)"
"""
# -f: busybox's init is not running here, so make the system call directly.
POWEROFF = REPORT + "poweroff -f\n"
REBOOT = REPORT + "reboot -f\n"
PANIC = REPORT + "echo c > /proc/sysrq-trigger\n"
SHELL = REPORT + "setsid cttyhack sh\npoweroff -f\n"

FIO = "/fio/ld-linux-x86-64.so.2 --library-path /fio /fio/fio"  # with the disk that is `fio()` mounted there

_PRELUDE = """#!/bin/sh
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do insmod "/modules/$module.ko"; done < /modules/order
"""


def initramfs(
    script: str, boots: Kernel, modules: Iterable[str] = (), files: Mapping[str, Node] | None = None
) -> bytes:
    """An initramfs for `boots` whose init mounts /dev, /proc, /sys, inserts `modules` and runs `script`.

    The script must not return (end it with POWEROFF, REBOOT or PANIC): the kernel panics when init exits.
    `files` are added by path without a leading slash; `program("/usr/bin/lscpu")` is one with its libraries.

    Raises:
        TestbedError: busybox or one of the modules is missing.
    """
    init = {"init": file((_PRELUDE + script).encode())}
    return archive.archive(archive.busybox() | archive.modules(boots, modules) | init | dict(files or {}))


def fio() -> Path:
    """An ext4 image of Debian's fio and its libraries, which are far too large for an initramfs.

    Raises:
        TestbedError: fio or mke2fs is missing.
    """
    files = archive.program(debian.tool("fio", "fio"))
    mke2fs = debian.tool("mke2fs", "e2fsprogs")

    def build(into: Path) -> None:
        root = into / "root"
        root.mkdir()
        for path, node in files.items():
            (root / Path(path).name).write_bytes(node.data)
            (root / Path(path).name).chmod(0o755)
        mib = sum(len(node.data) for node in files.values()) * 5 // 4 >> 20
        image = str(into / "fio.img")
        command = [mke2fs, "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(root), image, f"{mib}M"]
        subprocess.run(command, check=True)

    return cache.once("fio", build) / "fio.img"


def main() -> int:
    try:
        for package in (GENERIC, CLOUD):
            print(f"{package}: {kernel(package).release}")
        print(f"fio: {fio()}")
    except TestbedError as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
