"""What an access to a jailed Python device costs, against two C baselines that are built here (baseline.c).

    .venv/bin/python -m integration.bench.exit [ROUNDS]

Latency is what the guest sees by its time stamp counter (access.S).  Everything runs in turn within a round;
a figure is the median of the rounds' medians (p50) or of their 99th percentiles (p99), and only ratios to a
baseline of the same run mean anything.  The device is the serial port, its scratch register what is read and
written; a burst is a read of LSR and 16 bytes.  Exits non-zero if a target is missed.
"""

from __future__ import annotations

import array
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from devproc import jail, zygote
from devproc.catalog import CATALOG
from devproc.wire import Space
from integration.guests.harness import DEVICE, MMIO, Guest, assemble
from kvmcore.exitloop import Route
from supervisor.host import Opened
from supervisor.machine import Instance
from supervisor.spawn import Spawner

HERE: Final = Path(__file__).parent
GUEST: Final = "../bench/access"
OP, SAMPLES = 0x900, 0x10000  # access.S
SCR: Final = 7
COUNT: Final = 2000
IN, OUT, READ, WRITE, BURST = range(5)
OPS: Final = ("in", "out", "mmio read", "mmio write", "burst")
PLACES: Final = {"same core": (0, 0), "other core": (0, 1), "free": (-1, -1)}


class Way(Protocol):
    """A guest and its device."""

    def run(self, op: int, place: str) -> array.array[int]:
        """The ticks that each of COUNT accesses took."""


class Baseline:
    """baseline.c, a process for each placement."""

    def __init__(self, program: Path, guest: Path, kind: str) -> None:
        self._processes = {
            place: subprocess.Popen(
                [program, guest, kind, *map(str, cpus)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for place, cpus in PLACES.items()
        }

    def run(self, op: int, place: str) -> array.array[int]:
        process = self._processes[place]
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"%d %d %d\n" % (op, COUNT, _place(op)))
        process.stdin.flush()
        return array.array("I", process.stdout.read(4 * COUNT))

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.communicate()


class Vmsup:
    """The product: its exit loop, and a jailed serial device behind `transport`."""

    def __init__(self, nursery: zygote.Zygote, number: int, transport: str) -> None:
        self._guest = Guest(GUEST).real_mode()
        null = os.open(os.devnull, os.O_RDWR)
        quiet, typing = os.pipe()
        self._fds = (null, quiet, typing)
        opened = {"serial1": Opened({"input": (quiet,), "output": (null,)})}
        self._spawner = Spawner(
            nursery,
            self._guest.core,
            jail.Mode.FULL,
            2.0,
            {},
            -1,
            opened,
            print,
            transport=transport,
            _count=number,
        )
        self._proxy = self._spawner.spawn(Instance("serial1", CATALOG["serial"], gsi=4))
        self._proxy.await_ready(jail.Mode.FULL)
        index = self._proxy.index
        pio = [*self._guest.pio, Route.device(DEVICE, 8, index, Space.PORT)]
        self._guest.core.set_routes(pio, [Route.device(MMIO, 8, index, Space.PORT)])

    def run(self, op: int, place: str) -> array.array[int]:
        everywhere = set(range(os.cpu_count() or 1))
        vcpu, device = ({cpu} if cpu >= 0 else everywhere for cpu in PLACES[place])
        os.sched_setaffinity(self._proxy.pid, device)
        os.sched_setaffinity(0, vcpu)
        memory = self._guest.memory
        memory.write(OP, array.array("H", (op, COUNT, _place(op))))
        self._guest.run()
        os.sched_setaffinity(0, everywhere)
        return array.array("I", memory.read(SAMPLES, 4 * COUNT))

    def close(self) -> None:
        self._proxy.kill()
        os.waitpid(self._proxy.pid, 0)
        self._proxy.close()
        self._spawner.close()
        self._guest.finish()
        for fd in self._fds:
            os.close(fd)


def _place(op: int) -> int:
    """What access.S is told of where the scratch register is."""
    return SCR if op in (READ, WRITE) else DEVICE + SCR


class Target(NamedTuple):
    """`way` must not take more than `most` of what `than` takes."""

    op: int
    place: str
    way: str
    most: float
    than: str


TARGETS: Final = (
    Target(IN, "same core", "mailbox", 1.05, "C socket"),
    Target(IN, "other core", "mailbox", 0.12, "C socket"),
    Target(OUT, "same core", "mailbox", 0.70, "C socket"),
    Target(OUT, "other core", "mailbox", 0.85, "C socket"),
)


@contextlib.contextmanager
def ways() -> Iterator[dict[str, Way]]:
    with tempfile.TemporaryDirectory(prefix="vmsup-bench-") as directory, contextlib.ExitStack() as undo:
        guest, program = Path(directory, "guest"), Path(directory, "baseline")
        guest.write_bytes(assemble(GUEST))
        subprocess.run(["gcc", "-O2", "-Wall", "-o", program, HERE / "baseline.c"], check=True)
        jail.adopt_orphans()
        nursery = zygote.start(("serial",))
        undo.callback(nursery.close)
        found: dict[str, Way] = {}
        for kind in ("floor", "socket"):
            baseline = Baseline(program, guest, kind)
            undo.callback(baseline.close)
            found[f"C {kind}"] = baseline
        for n, transport in enumerate(("socket", "mailbox")):
            vmsup = Vmsup(nursery, n, transport)
            undo.callback(vmsup.close)
            found[transport] = vmsup
        yield found


def main(rounds: int) -> int:
    p50: dict[tuple[int, str, str], list[float]] = {}
    p99: dict[tuple[int, str, str], list[float]] = {}
    with ways() as found:
        for n in range(rounds + 1):
            for op in range(len(OPS)):
                for place in PLACES:
                    for name, way in found.items():
                        samples = sorted(way.run(op, place))
                        if n:  # the first round warms everything up
                            p50.setdefault((op, place, name), []).append(samples[COUNT // 2])
                            p99.setdefault((op, place, name), []).append(samples[COUNT * 99 // 100])
    ghz = _ghz()
    print(f"{'':11} {'':10} " + " ".join(f"{name:>24}" for name in found))
    for op, what in enumerate(OPS):
        for place in PLACES:
            cells = []
            for name in found:
                middle, spread = p50[op, place, name], p99[op, place, name]
                us = statistics.median(middle) / ghz / 1e3
                least, most = min(middle) / ghz / 1e3, max(middle) / ghz / 1e3
                cells.append(
                    f"{us:6.1f} ({least:.1f}-{most:.1f}) {statistics.median(spread) / ghz / 1e3:6.1f}"
                )
            print(f"{what:11} {place:10} " + " ".join(f"{cell:>24}" for cell in cells))
    print("microseconds: median of the rounds' medians (least-most), median of their 99th percentiles")
    missed = 0
    for t in TARGETS:
        ratio = statistics.median(
            a / b for a, b in zip(p50[t.op, t.place, t.way], p50[t.op, t.place, t.than], strict=True)
        )
        missed += ratio > t.most
        verdict = "pass" if ratio <= t.most else "MISS"
        print(f"{verdict} {OPS[t.op]}, {t.place}: {t.way} / {t.than} = {ratio:.2f}, at most {t.most:.2f}")
    return missed


def _ghz() -> float:
    """Of the time stamp counter, nominally."""
    model = Path("/proc/cpuinfo").read_text()
    bogomips = next(line.split(":")[1] for line in model.splitlines() if line.startswith("bogomips"))
    return float(bogomips) / 2000


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5) > 0)
