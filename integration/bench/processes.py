"""What jailed devices cost to start and to keep: time, memory, and the processor of a VM that does nothing.

Figures by themselves, in units; they hold for machines like the one that they are measured on.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from devproc import jail, zygote
from devproc.catalog import CATALOG
from integration.bench.report import Result
from integration.boot import vm
from integration.machine.conftest import HERE as GUESTS
from kvmcore.exitloop import Core
from supervisor.host import Opened
from supervisor.machine import Instance
from supervisor.spawn import Spawner

ROUNDS: Final = 9
DEVICES: Final = 10
IDLE_S: Final = 10.0
IDLE_ROUNDS: Final = 3


def spawn(nursery: zygote.Zygote, number: int) -> tuple[float, float]:
    """Milliseconds until ten serial devices are ready; their memory, MiB (PSS)."""
    null, (quiet, typing) = os.open(os.devnull, os.O_RDWR), os.pipe()
    names = [f"serial{n}" for n in range(DEVICES)]
    opened = {name: Opened({"input": (quiet,), "output": (null,)}) for name in names}
    core = Core()
    spawner = Spawner(nursery, core, jail.Mode.FULL, 2.0, {}, -1, opened, print, _count=number * DEVICES)
    began_s = time.monotonic()
    proxies = [spawner.spawn(Instance(name, CATALOG["serial"], gsi=4)) for name in names]
    for proxy in proxies:
        proxy.await_ready(jail.Mode.FULL)
    took_ms = (time.monotonic() - began_s) * 1e3
    pss_kib = 0
    for proxy in proxies:
        rollup = Path(f"/proc/{proxy.pid}/smaps_rollup").read_text()
        pss_kib += sum(int(kib) for kib in re.findall(r"^Pss: +(\d+)", rollup, re.MULTILINE))
    for proxy in proxies:
        proxy.kill()
        os.waitpid(proxy.pid, 0)
        proxy.close()
    spawner.close()
    for fd in (null, quiet, typing):
        os.close(fd)
    return took_ms, pss_kib / 1024


def busy_ns(pids: list[int]) -> int:
    """What all threads of the processes have spent on a CPU (schedstat)."""
    files = [f for pid in pids for f in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(f.read_text().split()[0]) for f in files)


def idle(rounds: int) -> list[float]:
    """Per cent of a core that a halted guest with twelve device processes costs, once per round."""
    with tempfile.TemporaryDirectory(prefix="vmsup-bench-") as directory, contextlib.ExitStack() as undo:
        elf, socket = Path(directory, "halt"), Path(directory, "socket")
        subprocess.run(
            ["as", "--64", "-I", GUESTS, "-o", f"{elf}.o", Path(__file__).with_name("halt.S")], check=True
        )
        subprocess.run(["ld", "-Ttext", "0x200000", "-e", "start", "-o", elf, f"{elf}.o"], check=True)
        words = vm.command("run", "-s", str(socket), "--irqchip", "split", "--rng", "--balloon", str(elf))
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=vm.ROOT)
        undo.callback(process.communicate)
        undo.callback(process.terminate)
        assert process.stdout is not None
        process.stdout.readline()
        rows = json.loads(subprocess.check_output(vm.command("ps", "--json", str(socket)), cwd=vm.ROOT))
        pids = [row["pid"] for row in rows]
        print(f"idle: {', '.join(row['name'] for row in rows)}")
        found = []
        for _ in range(rounds):
            began_s, before_ns = time.monotonic(), busy_ns(pids)
            time.sleep(IDLE_S)
            found.append((busy_ns(pids) - before_ns) / (time.monotonic() - began_s) / 1e7)
        return found


def results() -> Iterator[Result]:
    jail.adopt_orphans()
    nursery = zygote.start(("serial",))
    took = [spawn(nursery, n) for n in range(ROUNDS)]
    nursery.close()
    times_ms, pss_mib = zip(*took, strict=True)
    yield Result.of("spawn of 10 jailed devices", times_ms, 30, "lower", "ms")
    yield Result.of("memory of 10 jailed devices", pss_mib, 35, "lower", "MiB PSS")
    yield Result.of("idle VM", idle(IDLE_ROUNDS), 1, "lower", "% of a core")
