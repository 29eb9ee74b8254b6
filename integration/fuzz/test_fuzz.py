"""`vmsup fuzz` in the jail, as root and as an ordinary user, of devices as they are and with a bug planted.

The table of seeded bugs, with how many inputs each took: `pytest -s -k seeded`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from devproc.catalog import CATALOG
from devproc.fuzz.recording import recorded
from integration.fuzz.seeded import BUGS
from integration.fuzz.small import campaign
from integration.ordinary import ROOT, as_user

RUNS = 2000
SEEDED_RUNS = 200_000
SEEDED_S = 120.0


@pytest.mark.parametrize("device", CATALOG)
def test_a_shipped_device_is_fuzzed_in_its_jail_and_nothing_is_found(device: str, tmp_path: Path) -> None:
    result = campaign(tmp_path, device, runs=RUNS, timeout_s=1.0)
    assert result.findings == []
    assert result.runs >= RUNS
    assert result.covered > result.blocks // 3
    assert bool(result.compared) == recorded(CATALOG[device])


def test_an_ordinary_user_can_fuzz(tmp_path: Path) -> None:
    words = as_user()
    with tempfile.TemporaryDirectory() as where:
        os.chmod(where, 0o777)  # not below pytest's own directory, which is closed to others
        command = [sys.executable, "-m", "supervisor.cli", "fuzz", "serial", "--runs", str(RUNS)]
        done = subprocess.run(
            [*words, *command, "--crashes", f"{where}/crashes", "--corpus", f"{where}/corpus"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        if "jail:" in done.stderr:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("serial: ")
        assert list(Path(where, "corpus").iterdir())
        assert not Path(where, "crashes").exists()


def test_a_call_that_the_policy_forbids_is_a_finding_with_its_arguments(tmp_path: Path) -> None:
    before = "        if data & PULSE == PULSE and not data & LINE_RESET:\n"
    wrong = f"        if data == 0x42:\n            import os\n            os.kill(1, 9)\n{before}"
    result = campaign(tmp_path, "i8042", changes=((before, wrong),), runs=20_000, stop=True)
    ((kind, why),) = result.findings
    assert kind == "violation"
    assert why.startswith("system call 62 kill(0x1, 0x9")
    assert result.exit_code == 77


@pytest.mark.parametrize("name", BUGS)
def test_a_seeded_bug_is_found(name: str, tmp_path: Path) -> None:
    bug = BUGS[name]
    result = campaign(
        tmp_path, bug.device, bug=name, time_s=SEEDED_S, runs=SEEDED_RUNS, compare=False, stop=True
    )
    assert {bug.kind, bug.or_kind} & {kind for kind, _ in result.findings}
    print(f"\n{name:28} {bug.device:12} {bug.kind:10} {result.runs:>8,} inputs, {result.seconds:.1f} s")
