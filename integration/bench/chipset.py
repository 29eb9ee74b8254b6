"""How fast Linux finds what is on the PCI bus and reads the PIT, against QEMU microvm's and q35's.

The PIT is a device process of ours and code of QEMU's own: both have their interrupt chip split.  There is no
figure of the PIT in q35, where a program's own `in` is a segmentation fault under an emulated KVM.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from integration.bench import guest
from integration.bench.report import Result
from integration.boot import images

TARGET = 1.0
ROUNDS = 3
RESCANS, READS = 50, 2000
# The time in hundredths of a second, without its point.
JOB = rf"""
now() {{ cut -d' ' -f1 /proc/uptime | tr -d .; }}
began=$(now); for n in $(seq {RESCANS}); do echo 1 > /sys/bus/pci/rescan; done; ended=$(now)
echo "{guest.FIGURE} rescans $(({RESCANS} * 1000 / (ended - began + 1)))"
began=$(now); calibrate {READS} && ended=$(now) &&
    echo "{guest.FIGURE} reads $(({READS} * 1000 / (ended - began + 1)))"
true
"""


def calibrator(directory: Path) -> bytes:
    """The guest's program, calibrate.c."""
    made = directory / "calibrate"
    source = Path(__file__).with_name("calibrate.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-static", "-o", made, source], check=True)
    return made.read_bytes()


def results() -> list[Result]:
    with tempfile.TemporaryDirectory(prefix="vmsup-bench-") as name:
        program = images.file(calibrator(Path(name)))
        linux = guest.Guest.of(Path(name), JOB, (), **{"bin/calibrate": program})
        machines = {"microvm": guest.MICROVM, "q35": "q35"}
        theirs = {m: linux.qemu(machine=f"{words},kernel-irqchip=split") for m, words in machines.items()}
        ours = linux.vmsup("--no-rng", "--irqchip", "split")
        found = guest.interleaved({"ours": ours, **theirs}, ROUNDS)
    texts = {"rescans": "PCI enumerations a second", "reads": "reads of the PIT a second"}
    return [
        Result.ratio(f"{text}, to QEMU {m}'s", found[figure]["ours"], found[figure][m], TARGET, "higher")
        for figure, text in texts.items()
        for m in machines
        if m in found[figure]
    ]
