"""The one C file keeps to its own rules."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "kvmcore" / "_core.c"


def test_it_compiles_without_a_warning(tmp_path: Path) -> None:
    cc = shutil.which("cc") or shutil.which("gcc")
    if cc is None:
        pytest.skip("no C compiler")
    flags = [
        "-std=gnu11",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Wconversion",
        "-Wshadow",
        "-Wno-sign-conversion",
        "-Werror",
    ]
    subprocess.run([cc, *flags, "-c", "-o", tmp_path / "core.o", SOURCE], check=True)


def test_it_stays_below_a_thousand_lines() -> None:
    assert len(SOURCE.read_text().splitlines()) < 1000
