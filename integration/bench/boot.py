"""Time from the command to user space, against QEMU microvm, and what a device process costs in memory.

    integration/testbed/run --timeout 900 -- .venv/bin/python -m integration.bench.boot [ROUNDS]

Both boot the same kernel with the same initramfs and the same command line, in turn; only the ratio means
anything.  Where the local /dev/kvm boots stock kernels, leave the testbed out.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from integration.boot import images, vm

PARAMS = "console=ttyS0 reboot=k panic=-1 quiet tsc=reliable"
LAST_STEP = b"drop privileges: done"
WAIT = images.REPORT + "read -r line\npoweroff -f\n"


def until_up(command: list[str]) -> float:
    """Seconds from starting `command` to the guest's first line; ends the guest."""
    began_s = time.monotonic()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for line in process.stdout:
            if images.UP.encode() in line:
                took_s = time.monotonic() - began_s
                process.stdin.write(b"\n")
                process.stdin.flush()
                process.stdout.read()
                return took_s
        assert process.stderr is not None
        raise SystemExit(
            f"{command[0]} never came up: {process.stderr.read().decode(errors='replace')[-2000:]}"
        )


def until_first_instruction(initrd: Path, kernel: Path) -> float:
    """Milliseconds from starting vmsup to what --verbose says one line above the first KVM_RUN."""
    began_s = time.monotonic()
    words = vm.command("run", "-v", "-i", str(initrd), "-p", "quiet", str(kernel))
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as vmsup:
        assert vmsup.stderr is not None
        for line in vmsup.stderr:
            if LAST_STEP in line:
                break
        took_ms = (time.monotonic() - began_s) * 1e3
        vmsup.terminate()
        vmsup.stderr.read()
    return took_ms


def private_kib(kernel: Path, initrd: Path, socket: Path) -> dict[str, int]:
    """Device -> private memory of its process, KiB (smaps_rollup), once the guest is in user space."""
    words = vm.command(
        "run", "-s", str(socket), "-i", str(initrd), "-p", "quiet", "-p", "tsc=reliable", str(kernel)
    )
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        for line in process.stdout:
            if images.UP.encode() in line:
                break
        rows = json.loads(subprocess.check_output(vm.command("ps", "--json", str(socket))))
        found = {}
        for row in rows:
            rollup = Path(f"/proc/{row['pid']}/smaps_rollup").read_text()
            found[row["name"]] = sum(int(kib) for kib in re.findall(r"Private_\w+: +(\d+)", rollup))
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.read()
    return found


def main(rounds: int) -> None:
    kernel = images.kernel(images.CLOUD)
    with tempfile.TemporaryDirectory(prefix="vmsup-bench-") as directory:
        initrd = Path(directory, "initrd")
        initrd.write_bytes(images.initramfs(WAIT, kernel))
        options = "-accel kvm -cpu host -M microvm,pit=on,pic=on,rtc=on,isa-serial=on -m 256 -nodefaults"
        options += " -no-user-config -nographic -no-reboot -serial stdio"
        files = ["-kernel", str(kernel.bzimage), "-initrd", str(initrd), "-append", PARAMS]
        qemu = ["qemu-system-x86_64", *options.split(), *files]
        vmsup = vm.command(
            "run", "--jail", "-i", str(initrd), "-p", "quiet", "-p", "tsc=reliable", str(kernel.bzimage)
        )
        times: dict[str, list[float]] = {"vmsup": [], "qemu microvm": []}
        for n in range(rounds + 1):
            for name, command in (("qemu microvm", qemu), ("vmsup", vmsup)):
                took_s = until_up(command)
                if n:  # the first round reads everything from the disk
                    times[name].append(took_s)
        start_ms = statistics.median(until_first_instruction(initrd, kernel.bzimage) for _ in range(rounds))
        memory = private_kib(kernel.bzimage, initrd, Path(directory, "socket"))
    print(f"{'':14} {'median s':>9} {'min':>7} {'max':>7}   to user space, {rounds} rounds")
    for name, values in times.items():
        print(f"{name:14} {statistics.median(values):9.2f} {min(values):7.2f} {max(values):7.2f}")
    ratio = statistics.median(times["vmsup"]) / statistics.median(times["qemu microvm"])
    print(f"vmsup / qemu microvm: {ratio:.2f}")
    print(f"vmsup, from its start to the first guest instruction: {start_ms:.0f} ms, median")
    print("private memory of the device processes, KiB:", ", ".join(f"{n} {k}" for n, k in memory.items()))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
