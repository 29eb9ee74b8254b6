"""Running a command of this checkout as an ordinary user, who can reach a test's files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_UID = 1000
_NEEDED = f"import msgpack, prctl, kvmcore._core, devproc.child, supervisor.cli; open({__file__!r})"


def as_user(python: str = sys.executable) -> list[str]:
    """The words in front of a command that is to run as an ordinary user, none if we are one; or skips.

    A checkout or an interpreter in somebody's private home directory is nothing an ordinary user can run.
    """
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv (util-linux) is needed to become an ordinary user")
    words = ["setpriv", f"--reuid={_UID}", f"--regid={_UID}", "--clear-groups"]
    try_it = [*words, python, "-c", _NEEDED]
    done = subprocess.run(
        try_it, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=False
    )
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        pytest.skip(f"uid {_UID} cannot run vmsup from {ROOT} with {python}: {''.join(why)}")
    return words


def let_in(directory: Path) -> None:
    """Open a test's directory, and those of pytest's that it is in, to everybody."""
    temporary = Path(tempfile.gettempdir()).resolve()
    for one in directory, *directory.parents:
        if one != temporary and one.is_relative_to(temporary):
            one.chmod(0o755)
