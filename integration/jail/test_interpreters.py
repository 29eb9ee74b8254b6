"""The jail holds, and devices live in it, whichever Python runs them: each version makes other calls."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from remote import HERE

from integration.ordinary import as_user
from integration.testbed import cache

ROOT = HERE.parents[1]
VERSIONS = [v for v in ("3.11", "3.12", "3.13") if v != "{}.{}".format(*sys.version_info)]
EXERCISE_ALL = """
from devproc.catalog import CATALOG
from supervisor.exercise import exercise
for device in CATALOG:
    exercise(device, print)
"""


def interpreter(version: str) -> str:
    """The interpreter of this version, from PATH or from pyenv."""
    found = [
        shutil.which(f"python{version}") or "",
        *Path.home().glob(f".pyenv/versions/{version}.*/bin/python"),
    ]
    for python in map(str, found):  # what PATH has may be pyenv's, which refuses what is not chosen there
        if python and not subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode:
            return python
    pytest.skip(f"there is no Python {version} here")


@pytest.fixture(scope="module", params=VERSIONS)
def python(request: pytest.FixtureRequest) -> str:
    """A Python of another version that has what vmsup depends on."""
    base = interpreter(request.param)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def build(where: Path) -> None:
        subprocess.run([base, "-m", "venv", where], check=True, capture_output=True)
        install = [where / "bin/python", "-m", "pip", "install", "-q", *project["dependencies"]]
        subprocess.run(install, check=True, capture_output=True, text=True)

    try:
        return str(cache.once(f"python-{request.param}", build) / "bin/python")
    except subprocess.CalledProcessError as e:
        why = (e.stderr or b"").strip().splitlines()[-1:]
        pytest.skip(f"no environment for Python {request.param}: {why}")


@pytest.mark.parametrize("who", ["root", "user"])
def test_nothing_gets_out_of_the_jail_of_another_python(python: str, who: str) -> None:
    if who == "root" and os.geteuid() != 0:
        pytest.skip("needs root")
    command = [python, "-m", "supervisor.cli", "jail", "selftest", "--json"]
    before = as_user(python) if who == "user" else []
    done = subprocess.run([*before, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    matrix = json.loads(done.stdout)
    assert matrix["successes"]["full"] == 0
    assert matrix["attempts"] - matrix["vacuous"] >= 100


def test_every_device_lives_with_its_policy_on_another_python(python: str) -> None:
    done = subprocess.run([python, "-c", EXERCISE_ALL], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
