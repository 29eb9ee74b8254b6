"""What one and ten machines cost whose guest has halted: memory and processor, beside QEMU microvm's.

Memory is the proportional set size of all processes of a machine, guest memory among it; processor time is
theirs while nothing happens for some seconds.  No more than four times QEMU's memory is a target of our own.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from integration.bench.report import Result
from integration.boot import vm
from integration.testbed.debian import tool

MEMORY_TARGET, PROCESSOR_TARGET = 4.0, 1.0
CROWDS = (1, 10)
ROUNDS = 2
SETTLE_S, WATCH_S = 2.0, 5.0
# The same in 32 and 64 bits; the note is what QEMU starts an ELF by (PVH: XEN_ELFNOTE_PHYS32_ENTRY).
HALT = """
        .globl start
start:  mov $0x3f8, %dx
        mov $'.', %al
        out %al, %dx
1:      cli
        hlt
        jmp 1b
        .section .note.Xen, "a", @note
        .long 4, 8, 18
        .asciz "Xen"
        .quad start
"""


def halting(directory: Path) -> Path:
    """An ELF kernel that sends a byte and halts."""
    kernel, object_file = directory / "halt", directory / "halt.o"
    subprocess.run(["as", "--64", "-o", object_file, "-"], input=HALT, text=True, check=True)
    subprocess.run(["ld", "-Ttext", "0x200000", "-e", "start", "-o", kernel, object_file], check=True)
    return kernel


def processes(pid: int) -> Iterator[int]:
    """`pid` and all below it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from processes(int(child))


def pss_kib(pid: int) -> int:
    found = re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    return int(found[1]) if found else 0


def ticks(pid: int) -> int:
    """Processor time it has used, user and system, in the kernel's ticks (proc(5), stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def cost(command: list[str], count: int) -> tuple[float, float]:
    """(MiB, per cent of a core) for each of `count` machines that run at once."""
    crowd = [
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(count)
    ]
    try:
        for machine in crowd:
            assert machine.stdout is not None
            if machine.stdout.read(1) != b".":
                raise SystemExit(f"{command[0]}: the guest did not start")
        time.sleep(SETTLE_S)
        pids = [pid for machine in crowd for pid in processes(machine.pid)]
        began = sum(map(ticks, pids))
        time.sleep(WATCH_S)
        used_s = (sum(map(ticks, pids)) - began) / os.sysconf("SC_CLK_TCK")
        return sum(map(pss_kib, pids)) / 1024 / count, used_s / WATCH_S * 100 / count
    finally:
        for machine in crowd:
            machine.terminate()
        for machine in crowd:
            machine.communicate()


def results() -> list[Result]:
    found = []
    with tempfile.TemporaryDirectory(prefix="vmsup-bench-") as name:
        kernel = str(halting(Path(name)))
        ours = vm.command("run", "--jail", "-m", "128", kernel)
        options = "-accel kvm -M microvm -m 128 -nodefaults -no-user-config -nographic -serial stdio"
        theirs = [tool("qemu-system-x86_64", "qemu-system-x86"), *options.split(), "-kernel", kernel]
        for count in CROWDS:
            rounds = [(cost(ours, count), cost(theirs, count)) for _ in range(ROUNDS)]
            what = f"each of {count} idle machines" if count > 1 else "an idle machine"
            memory = [a[0] for a, _ in rounds], [b[0] for _, b in rounds]
            found.append(Result.ratio(f"{what}: memory to QEMU's", *memory, MEMORY_TARGET, "lower"))
            shares = [a[1] for a, _ in rounds]
            found.append(Result.of(f"{what}: of a core", shares, PROCESSOR_TARGET, "lower", "%"))
    return found
