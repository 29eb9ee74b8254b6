"""What an access to a jailed Python device costs, against two C baselines that are built here (baseline.c).

Latency is what the guest sees by its time stamp counter (access.S).  Everything runs in turn within a round;
a figure is the median of the rounds' medians (p50) or of their 99th percentiles (p99), and only ratios to a
baseline of the same run mean anything.  The device is the serial port, its scratch register what is read and
written; a status is its LSR, a burst a read of that and 16 bytes.
"""

from __future__ import annotations

import array
import contextlib
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from devproc import jail, zygote
from devproc.catalog import CATALOG
from devproc.wire import Space
from integration.bench.report import Result
from integration.guests.harness import DEVICE, MMIO, Guest, assemble
from kvmcore.exitloop import Route
from supervisor.host import Opened
from supervisor.machine import Instance
from supervisor.spawn import Spawner

HERE: Final = Path(__file__).parent
GUEST: Final = "../bench/access"
OP, SAMPLES = 0x900, 0x10000  # access.S
MCR, LSR, SCR = 4, 5, 7
RTS: Final = 0x02
COUNT: Final = 2000
ROUNDS: Final = 7
IN, OUT, READ, WRITE, BURST, STATUS = range(6)
OPS: Final = ("in", "out", "mmio read", "mmio write", "burst", "status")
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
        process.stdin.write(b"%d %d %d\n" % (_guest_op(op), COUNT, _place(op)))
        process.stdin.flush()
        return array.array("I", process.stdout.read(4 * COUNT))

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.communicate()


class Vmsup:
    """The product: its exit loop, and a jailed serial device behind `transport`."""

    def __init__(self, nursery: zygote.Zygote, transport: str) -> None:
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
        )
        self._proxy = self._spawner.spawn(Instance("serial1", CATALOG["serial"], gsi=4))
        self._proxy.await_ready(jail.Mode.FULL)
        index = self._proxy.index
        pio = [*self._guest.pio, Route.device(DEVICE, 8, index, Space.PORT)]
        self._guest.core.set_routes(pio, [Route.device(MMIO, 8, index, Space.PORT)])
        page = self._guest.vm.coalesce_ports(DEVICE, 1)
        if page is not None:
            self._guest.core.coalesce(self._guest.vcpus[0].fd, page, index)
        self._guest.core.write(index, Space.PORT, MCR, 1, RTS, posted=True)  # before, LSR has no shadow

    def run(self, op: int, place: str) -> array.array[int]:
        everywhere = set(range(os.cpu_count() or 1))
        vcpu, device = ({cpu} if cpu >= 0 else everywhere for cpu in PLACES[place])
        os.sched_setaffinity(self._proxy.pid, device)
        os.sched_setaffinity(0, vcpu)
        memory = self._guest.memory
        memory.write(OP, array.array("H", (_guest_op(op), COUNT, _place(op))))
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
    """What access.S is told of where the register is."""
    return SCR if op in (READ, WRITE) else DEVICE + (LSR if op == STATUS else SCR)


def _guest_op(op: int) -> int:
    return IN if op == STATUS else op


class Target(NamedTuple):
    """The mailbox must not take more than `most` of what `than` takes."""

    op: int
    place: str
    most: float
    than: str


TARGETS: Final = (
    Target(IN, "same core", 1.05, "C socket"),
    Target(IN, "other core", 0.12, "C socket"),
    Target(OUT, "same core", 0.70, "C socket"),
    Target(OUT, "other core", 0.85, "C socket"),
    Target(STATUS, "same core", 1.03, "C floor"),
    Target(STATUS, "other core", 1.03, "C floor"),
    Target(BURST, "same core", 1 / 8, "C socket"),
)


@contextlib.contextmanager
def ways() -> Iterator[dict[str, Way]]:
    with tempfile.TemporaryDirectory(prefix="vmsup-bench-") as directory, contextlib.ExitStack() as undo:
        guest, program = Path(directory, "guest"), Path(directory, "baseline")
        guest.write_bytes(assemble(GUEST))
        subprocess.run(["gcc", "-O2", "-Wall", "-o", program, HERE / "baseline.c"], check=True)
        nursery = zygote.start(("serial",))
        undo.callback(nursery.close)
        found: dict[str, Way] = {}
        for kind in ("floor", "socket"):
            baseline = Baseline(program, guest, kind)
            undo.callback(baseline.close)
            found[f"C {kind}"] = baseline
        for transport in ("socket", "mailbox"):
            vmsup = Vmsup(nursery, transport)
            undo.callback(vmsup.close)
            found[transport] = vmsup
        yield found


def results() -> Iterator[Result]:
    p50: dict[tuple[int, str, str], list[float]] = {}
    p99: dict[tuple[int, str, str], list[float]] = {}
    ticks_per_us = _ghz() * 1e3
    with ways() as found:
        for n in range(ROUNDS + 1):
            for op in range(len(OPS)):
                for place in PLACES:
                    for name, way in found.items():
                        samples = sorted(way.run(op, place))
                        if n:  # the first round warms everything up
                            p50.setdefault((op, place, name), []).append(samples[COUNT // 2] / ticks_per_us)
                            p99.setdefault((op, place, name), []).append(
                                samples[COUNT * 99 // 100] / ticks_per_us
                            )
    print(f"{'microseconds':22} " + " ".join(f"{name:>24}" for name in found))
    for op, what in enumerate(OPS):
        for place in PLACES:
            cells = []
            for name in found:
                middle, tail = p50[op, place, name], statistics.median(p99[op, place, name])
                spread = f"{min(middle):.1f}-{max(middle):.1f}"
                cells.append(f"{statistics.median(middle):6.1f} ({spread}) {tail:6.1f}")
            print(f"{what:11} {place:10} " + " ".join(f"{cell:>24}" for cell in cells))
    print("each: the median of the rounds' medians (least-most), the median of their 99th percentiles")
    for t in TARGETS:
        ours, theirs = p50[t.op, t.place, "mailbox"], p50[t.op, t.place, t.than]
        yield Result.ratio(f"{OPS[t.op]}, {t.place}: time to {t.than}", ours, theirs, t.most, "lower")


def _ghz() -> float:
    """Of the time stamp counter, nominally."""
    model = Path("/proc/cpuinfo").read_text()
    bogomips = next(line.split(":")[1] for line in model.splitlines() if line.startswith("bogomips"))
    return float(bogomips) / 2000
