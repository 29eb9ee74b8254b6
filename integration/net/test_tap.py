"""A network card in its full jail, on a tap of a network namespace of the test's own."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def in_namespace(module: str, *args: str) -> list[dict[str, Any]]:
    """The lines that the module prints in a network namespace of its own."""
    if os.geteuid() != 0:
        pytest.skip("making a tap in a network namespace needs root")
    if not os.path.exists("/dev/net/tun"):
        pytest.skip("there is no /dev/net/tun")
    path = f"{ROOT}:{ROOT / 'integration/jail'}"  # what stand_in.py imports by name
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-m", f"integration.net.{module}", *args],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("how", ["tap-name", "tap-fd"])
def test_a_jailed_card_and_the_host_s_kernel_talk(how: str) -> None:
    (found,) = in_namespace("talk", how)
    assert found == {
        "pings": [True, True, True],
        "checksum_to_host": True,
        "checksum_from_host": True,
        "segments_to_host": 20000,
        "end": [os.CLD_EXITED, 0],
    }


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_nothing_stands_still_while_driver_and_host_race_with_the_card(tmp_path: Path) -> None:
    library = tmp_path / "race.so"
    source = ROOT / "integration/net/race.c"
    subprocess.run(
        ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", source, "-o", library], check=True
    )
    rounds = in_namespace("race", str(random.getrandbits(32)), "4", str(library))
    assert len(rounds) == 8
    assert [r for r in rounds if r["why"]] == []
    assert all(r["sent"] for r in rounds)
