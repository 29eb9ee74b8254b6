"""Bytes a second of a serial port that Linux's 8250 driver writes to, against QEMU microvm's and q35's."""

from __future__ import annotations

import tempfile
from pathlib import Path

from integration.bench import guest
from integration.bench.report import Result

TARGET = 1.0
ROUNDS = 3
SIZE = 64 << 10
# Lines, so that nothing waits for the end of one; the time in hundredths of a second, without its point.
JOB = rf"""
now() {{ cut -d' ' -f1 /proc/uptime | tr -d .; }}
yes "$(seq 100 | tr -d '\n' | cut -c1-127)" | head -c {SIZE} > /tmp/text
began=$(now); cat /tmp/text; ended=$(now)
echo; echo "{guest.FIGURE} bytes $(({SIZE} * 100 / (ended - began)))"
"""


def results() -> list[Result]:
    with tempfile.TemporaryDirectory(prefix="vmsup-bench-") as name:
        linux = guest.Guest.of(Path(name), JOB, ())
        commands = {"ours": linux.vmsup(), "microvm": linux.qemu(), "q35": linux.qemu(machine="q35")}
        found = guest.interleaved(commands, ROUNDS)["bytes"]
    return [
        Result.ratio(f"serial output, bytes/s to QEMU {m}'s", found["ours"], found[m], TARGET, "higher")
        for m in ("microvm", "q35")
    ]
