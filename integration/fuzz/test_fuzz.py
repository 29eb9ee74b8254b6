"""`vmsup fuzz` in the jail, as root and as an ordinary user, of devices as they are and with a bug planted.

The table of seeded bugs, with how many inputs each took: `VMSUP_FULL_MATRIX=1 pytest -s -k seeded`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from devproc import jail
from devproc.catalog import CATALOG
from integration.fuzz.seeded import BUGS, plant, plant_bug
from integration.ordinary import ROOT, as_user
from kvmcore.errors import VmsupError
from supervisor.fuzz import Campaign, Plan

RUNS = 2000
SLOW = {"interrupt-at-every-look", "register-past-the-end", "size-changed-after-activation"}
SEEDED_RUNS = 200_000
SEEDED_S = 120.0


def nothing(_: str) -> None:
    pass


def campaign(plan: Plan) -> Campaign:
    try:
        return Campaign(plan, nothing)
    except VmsupError as e:
        if "jail:" in str(e):
            pytest.skip(str(e))
        raise


@pytest.mark.parametrize("device", CATALOG)
def test_a_shipped_device_is_fuzzed_in_its_jail_and_nothing_is_found(device: str, tmp_path: Path) -> None:
    with campaign(
        Plan(device, tmp_path / "corpus", tmp_path / "crashes", runs=RUNS, timeout_s=1.0)
    ) as fuzzing:
        result = fuzzing.run(nothing)
    assert result.findings == []
    assert result.runs >= RUNS
    assert len(result.covered) > len(result.blocks) // 3


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


def test_a_call_that_the_policy_forbids_is_a_finding_with_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = "        if data & PULSE == PULSE and not data & LINE_RESET:\n"
    wrong = f"        if data == 0x42:\n            import os\n            os.kill(1, 9)\n{before}"
    entry = plant("i8042", ((before, wrong),), "seeded_violation", tmp_path, monkeypatch)
    with campaign(Plan(entry.name, None, tmp_path / "crashes", runs=20_000)) as fuzzing:
        result = fuzzing.run(nothing)
    (found,) = result.findings
    assert found.kind == "violation"
    assert found.why.startswith("system call 62 kill(0x1, 0x9")
    assert result.exit_code == 77


def in_a_while(name: str) -> object:
    """A bug whose search is left out where all tests are run."""
    skip = name in SLOW and not os.environ.get("VMSUP_FULL_MATRIX")
    return pytest.param(name, marks=pytest.mark.skipif(skip, reason="takes long: set VMSUP_FULL_MATRIX=1"))


@pytest.mark.parametrize("name", [in_a_while(name) for name in BUGS])
def test_a_seeded_bug_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bug = BUGS[name]
    entry = plant_bug(name, tmp_path, monkeypatch)
    plan = Plan(
        entry.name, None, tmp_path / "crashes", SEEDED_S, SEEDED_RUNS, mode=jail.Mode.FULL, compare=False,
        stop=True,
    )  # fmt: skip
    with campaign(plan) as fuzzing:
        result = fuzzing.run(nothing)
    assert bug.kind in [f.kind for f in result.findings]
    print(f"\n{name:28} {bug.device:12} {bug.kind:10} {result.runs:>8,} inputs, {result.seconds:.1f} s")
