"""A network card in its full jail, on a tap of a network namespace of the test's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("how", ["tap-name", "tap-fd"])
def test_a_jailed_card_and_the_host_s_kernel_talk(how: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("making a tap in a network namespace needs root")
    if not os.path.exists("/dev/net/tun"):
        pytest.skip("there is no /dev/net/tun")
    path = f"{ROOT}:{ROOT / 'integration/jail'}"  # what stand_in.py imports by name
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-m", "integration.net.talk", how],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "pings": [True, True, True],
        "checksum_to_host": True,
        "checksum_from_host": True,
        "segments_to_host": 20000,
        "end": [os.CLD_EXITED, 0],
    }
