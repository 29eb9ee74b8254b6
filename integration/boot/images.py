"""What the guests of real boots are made of: Debian's kernels, and initramfs images of busybox.

    python -m integration.boot.images

downloads both kernels into the cache, where the testbed's L1, which has no network, finds them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from integration.testbed import debian
from integration.testbed import initramfs as archive
from integration.testbed.debian import CLOUD, GENERIC, Kernel, TestbedError
from integration.testbed.initramfs import Node, file, program

__all__ = ["CLOUD", "GENERIC", "Kernel", "Node", "TestbedError", "file", "initramfs", "kernel", "program"]

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


def main() -> int:
    try:
        for package in (GENERIC, CLOUD):
            print(f"{package}: {kernel(package).release}")
    except TestbedError as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
