"""One campaign of `vmsup fuzz` in a process of its own: python -m integration.fuzz.small JSON.

A device process begins as a copy of who starts the campaign, and RLIMIT_DATA counts what that one had: a
pytest with thousands of tests has more than a device may.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from integration.fuzz.seeded import BUGS, Changes, plant, plant_bug
from kvmcore.errors import VmsupError
from supervisor.fuzz import Campaign, Plan


@dataclass(frozen=True)
class Outcome:
    """What a campaign came to: (kind, why) of each finding, and how many blocks it reached of how many.

    `compared`: how many inputs were held behind the real wire, too.
    """

    findings: list[tuple[str, str]]
    exit_code: int
    runs: int
    seconds: float
    covered: int
    blocks: int
    compared: int


def campaign(where: Path, device: str, *, bug: str = "", changes: Changes = (), **plan: Any) -> Outcome:
    """Fuzz `device` with its corpus and crashes below `where`; as it is, with a bug of BUGS, or changed.

    Skips the test where there can be no jail.
    """
    asked = json.dumps({"where": str(where), "device": device, "bug": bug, "changes": changes, "plan": plan})
    done = subprocess.run(
        [sys.executable, "-m", "integration.fuzz.small", asked], capture_output=True, text=True, check=False
    )
    if "jail:" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    asked = json.loads(sys.argv[1])
    where = Path(asked["where"])
    with pytest.MonkeyPatch.context() as patch:
        if asked["bug"]:
            assert BUGS[asked["bug"]].device == asked["device"]
            plant_bug(asked["bug"], where, patch)
        elif asked["changes"]:
            plant(asked["device"], asked["changes"], "seeded", where, patch)
        try:
            with Campaign(
                Plan(asked["device"], crashes=where / "crashes", **asked["plan"]), print
            ) as fuzzing:
                result = fuzzing.run(lambda _: None)
        except VmsupError as e:
            print(e, file=sys.stderr)
            return 1
    found = [(f.kind, f.why) for f in result.findings]
    reached = len(result.covered), len(result.blocks), result.compared
    print(json.dumps(asdict(Outcome(found, result.exit_code, result.runs, result.seconds, *reached))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
