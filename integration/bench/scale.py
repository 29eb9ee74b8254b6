"""Whether vCPUs that exit all the time slow each other down, or a busy Python thread in the supervisor them.

Each vCPU has a CPU of its own and reads a port that nobody owns (hammer.S), so no device process competes for
one.  Rates and latencies are the guest's, by its time stamp counter.
"""

from __future__ import annotations

import array
import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Final

from integration.bench.report import Result
from integration.guests.harness import LOAD, Guest
from kvmcore.abi import Regs, Segment

GUEST: Final = "../bench/hammer"
COUNT: Final = 10_000
SAMPLES: Final = (0x10000, 0x20000)
HOLE: Final = 0x700
ROUNDS: Final = 9


class Hammers:
    """A VM of two vCPUs, pinned."""

    def __init__(self) -> None:
        self._guest = Guest(GUEST, cpus=2)

    def _main(self, number: int) -> None:
        os.sched_setaffinity(0, {number % (os.cpu_count() or 1)})
        vcpu = self._guest.vcpus[number]
        flat = Segment(0, 0xFFFF, 0, type=3, present=1, s=1)
        where = flat._replace(base=SAMPLES[number])
        sregs = vcpu.get_sregs()
        vcpu.set_sregs(sregs._replace(cs=flat._replace(type=0xB), ds=flat, ss=flat, es=where))
        vcpu.set_regs(Regs(rip=LOAD, rcx=COUNT, rdx=HOLE))
        self._guest.run(number=number)

    def run(self, *numbers: int) -> list[tuple[float, float]]:
        """(reads per tick, 99th percentile in ticks) of each of the vCPUs, running at once."""
        threads = [threading.Thread(target=self._main, args=[n]) for n in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = []
        for n in numbers:
            samples = sorted(array.array("I", self._guest.memory.read(SAMPLES[n], 4 * COUNT)))
            found.append((COUNT / sum(samples), samples[COUNT * 99 // 100]))
        return found

    def close(self) -> None:
        self._guest.finish()


@contextlib.contextmanager
def busy_thread() -> Iterator[None]:
    """One that computes in Python and takes no break."""
    over = threading.Event()

    def compute() -> None:
        while not over.is_set():
            sum(range(100))

    thread = threading.Thread(target=compute)
    thread.start()
    yield
    over.set()
    thread.join()


def results() -> Iterator[Result]:
    hammers = Hammers()
    alone, both, beside = [], [], []
    for _ in range(ROUNDS):
        alone += hammers.run(0)
        both.append(hammers.run(0, 1))
        with busy_thread():
            beside += hammers.run(0)
    hammers.close()
    rates, tails = zip(*alone, strict=True)
    yield Result.ratio("2 vCPUs: exits per second to 1", [a[0] + b[0] for a, b in both], rates, 1.9, "higher")
    yield Result.ratio("2 vCPUs: p99 to 1", [max(a[1], b[1]) for a, b in both], tails, 1.5, "lower")
    yield Result.ratio(
        "1 vCPU beside a busy Python thread: exits per second to alone",
        [rate for rate, _ in beside],
        rates,
        0.95,
        "higher",
    )
