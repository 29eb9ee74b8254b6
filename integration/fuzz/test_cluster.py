"""`vmsup fuzz --scheduler` on a Dask cluster of this machine: two workers, one killed in its round."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from devproc.catalog import CATALOG
from devproc.fuzz.inputs import Op, records
from integration.fuzz.seeded import BUGS, changed_text
from integration.ordinary import ROOT
from supervisor.fuzz import read_corpus

distributed = pytest.importorskip(
    "distributed", reason="needs dask.distributed: pip install 'vmsup[cluster]'"
)
WITHIN_S = 120
RUNS = 4000


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A copy of this tree with a bug in i8042, for processes that share nothing with this one."""
    tree = tmp_path / "tree"
    for package in ("devproc", "kvmcore", "policies", "supervisor"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    bug = BUGS["value-too-wide"]
    (tree / "devproc/devices/i8042.py").write_text(changed_text(CATALOG[bug.device].module, bug.changes))
    return tree


def test_a_worker_that_is_lost_takes_no_finding_with_it(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(planted), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)  # else this tree, the current directory, comes first
    corpus, crashes = tmp_path / "corpus", tmp_path / "crashes"
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        command = [sys.executable, "-m", "supervisor.cli", "fuzz", "i8042", "--no-jail", "--timeout=1"]
        command += ["--workers=2", f"--runs={RUNS}"]
        ours = subprocess.Popen(
            [
                *command,
                f"--scheduler={cluster.scheduler_address}",
                f"--corpus={corpus}",
                f"--crashes={crashes}",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            until_s = time.monotonic() + WITHIN_S
            while [len(tasks) for tasks in client.processing().values()] != [1, 1]:
                assert ours.poll() is None, ours.communicate()
                assert time.monotonic() < until_s
                time.sleep(0.05)
            os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
            said, errors = ours.communicate(timeout=WITHIN_S)
        finally:
            ours.kill()
            ours.wait()
    assert ours.returncode == 77, errors
    runs = re.match(r"i8042: ([\d,]+) runs", said)
    assert runs is not None and int(runs[1].replace(",", "")) >= RUNS
    (finding,) = crashes.iterdir()
    write, read = records((finding / "input").read_bytes())
    assert (write.op, read.op) == (Op.WRITE, Op.READ)
    assert read_corpus(CATALOG["i8042"], corpus)
