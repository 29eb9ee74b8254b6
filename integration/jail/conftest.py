"""The `root` and `user` supervisors that the jail's tests drive."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # hostile.py, which the zygote imports by name too

from remote import Remote, start


@pytest.fixture(scope="module", params=["root", "user"])
def supervisor(request: pytest.FixtureRequest) -> Iterator[Remote]:
    remote = start(request.param)
    yield remote
    remote.close()
