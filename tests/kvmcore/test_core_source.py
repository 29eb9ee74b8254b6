"""The C files keep to their own rules."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "kvmcore" / "_core.c"
SOURCES = [CORE, ROOT / "devproc" / "_mailbox.c", ROOT / "devproc" / "_ring.c"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_it_compiles_without_a_warning(tmp_path: Path, source: Path) -> None:
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
        "-DPy_LIMITED_API=0x030b0000",
        f"-isystem{sysconfig.get_paths()['include']}",
    ]
    subprocess.run([cc, *flags, "-c", "-o", tmp_path / "object", source], check=True)


def test_it_stays_below_a_thousand_lines() -> None:
    assert len(CORE.read_text().splitlines()) < 1000
