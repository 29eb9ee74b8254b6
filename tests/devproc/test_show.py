"""devproc.show: every device's page can be printed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from devproc import show
from devproc.catalog import CATALOG


@pytest.mark.parametrize("name", sorted(CATALOG))
def test_the_page_names_registers_descriptors_and_threats(name: str) -> None:
    page = show.page(name)
    assert CATALOG[name].summary in page
    assert "offset" in page
    assert "Threats:" in page
    assert all(f"  {d.name} ({d.kind})" in page for d in CATALOG[name].descriptors)


def test_it_runs_as_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "devproc.show", "serial"], capture_output=True, text=True, check=True
    )
    assert "THR" in done.stdout


def test_a_wrong_name_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert show.main(["floppy"]) == 2
    assert "serial" in capsys.readouterr().err
