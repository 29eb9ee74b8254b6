"""The command line of `vmsup fuzz`; what it does is supervisor/fuzzcommands.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

HANG_S: Final = 0.05
WORDS: Final = ("replay", "minimize", "cmin", "coverage")
EPILOG: Final = """\
vmsup fuzz DEVICE                      fuzz it, in its jail, until Ctrl-C, --time or --runs
vmsup fuzz replay FILE...              run inputs again, and say what is wrong with each
vmsup fuzz minimize FILE -o FILE       the smallest input that shows the same
vmsup fuzz cmin DEVICE -o DIR          the smallest part of --corpus that reaches as much
vmsup fuzz coverage DEVICE -o FILE     an HTML page of the lines that --corpus reaches

Each input is watched for what raises, hangs, is forbidden, interrupts without end or uses a queue wrongly.
What takes longer is done with each that reaches something new, and with one in 1,024 of the others: the same
from a new model, what is saved and restored, memory that is not the device's to write, interrupts that go on
without a cause.  And for a tenth of the time at most, such inputs are run again behind the real wire.

Inputs are bytes of any kind, or the text of a .vmrep file; a corpus is a directory of either, libFuzzer's and
AFL's among them.  To go on where the last campaign ended, give its --corpus again.

exit codes: 0 nothing found; 77 a finding; 70 inputs that take too long, nothing worse; 71 inputs that take
too much memory, nothing worse; 33 vmsup itself failed; 35 bad arguments or files.
"""


def _corpus(text: str) -> Path | str:
    return text if "://" in text else Path(text)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` what `command` takes."""
    add = parser.add_argument
    add("target", metavar="DEVICE", help=f"a device of the catalogue, or one of {', '.join(WORDS)}")
    add(
        "operands",
        nargs="*",
        metavar="...",
        help="of replay and minimize: FILE; of cmin and coverage: DEVICE",
    )
    add(
        "--corpus",
        type=_corpus,
        metavar="DIR",
        help="inputs to start from; what reaches more is added; a directory or an fsspec URL",
    )
    add("--crashes", type=Path, metavar="DIR", default=Path("crashes"), help="where findings go [crashes]")
    add("--time", type=float, metavar="S", help="end after so many seconds")
    add("--runs", type=int, metavar="N", help="end after so many inputs")
    add("--workers", type=int, metavar="N", default=1, help="processes that fuzz at once, 1 to 64 [1]")
    add("--seed", type=int, metavar="N", default=1, help="other inputs for another seed [1]")
    add("--scheduler", metavar="ADDRESS", help="let the workers of a Dask cluster do it, --workers at once")
    add("--dict", type=Path, metavar="FILE", help='words to try, name="text" in each line, as AFL reads it')
    add(
        "--timeout",
        type=float,
        metavar="S",
        default=HANG_S,
        help=f"CPU time that an input may take [{HANG_S:g}]",
    )
    add("--device", metavar="DEVICE", help="what an input of bytes is for")
    add("--stop", action="store_true", help="end with the first finding")
    add("--no-jail", action="store_true", help="run the device processes without a jail")
    add("--no-compare", action="store_true", help="do not rehearse a sample behind the real wire")
    add("--junit", type=Path, metavar="FILE", help="write what was found as JUnit XML")
    add("--sarif", type=Path, metavar="FILE", help="write what was found as SARIF 2.1.0")
    add("-o", "--output", type=Path, metavar="PATH", help="what minimize, cmin and coverage write")
