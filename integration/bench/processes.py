"""What jailed devices cost to start and to keep: time, memory, and the processor of a VM that does nothing.

Figures by themselves, in units; they hold for machines like the one that they are measured on.  The guest
(halt.S) halts at once, with interrupts off.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from integration.bench.report import Result
from integration.boot import vm

HERE: Final = Path(__file__).parent
GUESTS: Final = HERE.parent / "machine"
ROUNDS: Final = 9
DEVICES: Final = 10  # of a VM without options
IDLE_S: Final = 10.0
IDLE_ROUNDS: Final = 3
SUPERVISOR: Final = "supervisor"
BEFORE, SPAWN = "open what the devices work on", "spawn the devices"  # supervisor/launch.py


@contextlib.contextmanager
def halted(directory: str, *options: str) -> Iterator[tuple[dict[str, int], dict[str, float]]]:
    """A VM: pids by name, its devices' and its own, and how many ms after its start each step was done."""
    elf, socket = Path(directory, "halt"), Path(directory, "socket")
    if not elf.exists():
        subprocess.run(["as", "--64", "-I", GUESTS, "-o", f"{elf}.o", HERE / "halt.S"], check=True)
        subprocess.run(["ld", "-Ttext", "0x200000", "-e", "start", "-o", elf, f"{elf}.o"], check=True)
    words = vm.command("run", "-v", "-s", str(socket), *options, str(elf))
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=vm.ROOT
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        rows = json.loads(subprocess.check_output(vm.command("ps", "--json", str(socket)), cwd=vm.ROOT))
        steps: dict[str, float] = {}
        while SPAWN not in steps:
            said = re.fullmatch(r"vmsup: +([\d.]+) ms: (.*): done\n", process.stderr.readline().decode())
            assert said is not None
            steps[said[2]] = float(said[1])
        yield {row["name"]: row["pid"] for row in rows} | {SUPERVISOR: process.pid}, steps
    finally:
        process.terminate()
        process.communicate()


def pss_mib(pids: list[int]) -> float:
    """Proportional set size (smaps_rollup)."""
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    return sum(int(kib) for text in rollups for kib in re.findall(r"^Pss: +(\d+)", text, re.M)) / 1024


def busy_ns(pids: list[int]) -> int:
    """What all threads of the processes have spent on a CPU (schedstat)."""
    files = [f for pid in pids for f in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(f.read_text().split()[0]) for f in files)


def results() -> Iterator[Result]:
    times_ms, memory_mib, idle = [], [], []
    with tempfile.TemporaryDirectory(prefix="vmsup-bench-") as directory:
        for _ in range(ROUNDS):
            with halted(directory) as (pids, steps):
                devices = [pid for name, pid in pids.items() if name != SUPERVISOR]
                assert len(devices) == DEVICES, pids
                times_ms.append(steps[SPAWN] - steps[BEFORE])
                memory_mib.append(pss_mib(devices))
        with halted(directory, "--irqchip", "split", "--balloon") as (pids, _):
            assert len(pids) - 1 == 12, pids
            for _ in range(IDLE_ROUNDS):
                began_ns, before_ns = time.monotonic_ns(), busy_ns([*pids.values()])
                time.sleep(IDLE_S)
                busy = busy_ns([*pids.values()]) - before_ns
                idle.append(100 * busy / (time.monotonic_ns() - began_ns))
    yield Result.of(f"spawn of {DEVICES} jailed devices", times_ms, 30, "lower", "ms")
    yield Result.of(f"memory of {DEVICES} jailed devices", memory_mib, 35, "lower", "MiB (PSS)")
    yield Result.of("idle VM with 12 devices", idle, 1, "lower", "% of a core")
