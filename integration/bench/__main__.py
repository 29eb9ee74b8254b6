"""Every benchmark, or those named: a table, a plot, what was measured as JSON, and exit status 1 for a miss.

    python -m integration.bench [--raw FILE] [--plot FILE] [NAME...]

A benchmark is a module here with a `results()`.  Those that boot stock kernels run in one testbed where the
local /dev/kvm cannot; their ratios are of that machine then.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from integration import kvm
from integration.bench import report

TINY: Final = ("exit", "scale", "processes", "crowd")  # our own guests
STOCK: Final = ("boot", "console", "chipset", "block", "net")  # Linux
TESTBED: Final = Path(__file__).parents[1] / "testbed/run"
TESTBED_S: Final = 3600


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
    return f"{model}, {os.cpu_count()} CPUs, Linux {os.uname().release}; {kvm.name()}"


def in_testbed(names: list[str]) -> list[report.Result]:
    """Raises CalledProcessError."""
    with tempfile.TemporaryDirectory(prefix="vmsup-bench-") as directory:
        raw = Path(directory, "raw.json")
        command = [sys.executable, "-m", __package__ or "", "--raw", str(raw), *names]
        ran = subprocess.run(
            [TESTBED, "--timeout", str(TESTBED_S), "--rw", directory, "--", *command], check=False
        )
        if ran.returncode not in (0, 1) or not raw.exists():
            raise subprocess.CalledProcessError(ran.returncode, command)
        return report.load(raw)


def draw(path: Path, results: list[report.Result]) -> None:
    """The plot at `path`, or why there is none."""
    try:
        report.plot(path, machine(), results)
    except ImportError:
        print("no plot: there is no matplotlib (pip install 'vmsup[bench]')")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m integration.bench", description=__doc__)
    parser.add_argument("--raw", type=Path, metavar="FILE", help="where what was measured goes, as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where the plot goes, PNG or SVG")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join([*TINY, *STOCK]))
    options = parser.parse_args()
    names = options.names or [*TINY, *STOCK]
    if unknown := set(names) - {*TINY, *STOCK}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    elsewhere = [n for n in names if n in STOCK and kvm.no_linux()]
    results = []
    for name in names:
        if name not in elsewhere:
            results += importlib.import_module(f"integration.bench.{name}").results()
    if elsewhere:
        results += in_testbed(elsewhere)
    print(machine())
    print(report.table(results))
    if options.raw:
        report.save(options.raw, machine(), results)
    if options.plot:
        draw(options.plot, results)
    return any(not r.passed for r in results)


if __name__ == "__main__":
    sys.exit(main())
