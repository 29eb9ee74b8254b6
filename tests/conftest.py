"""No property here is about time: a loaded machine is no counter-example.  In CI each run tries the same."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("vmsup", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("vmsup")


@pytest.fixture
def no_process_left() -> Iterator[None]:
    """The test leaves no child of ours behind; those that were there before it, as the testbed's, stay."""
    before = _children()
    yield
    assert _children() == before


def _children() -> set[str]:
    tasks = Path("/proc/self/task").iterdir()
    return {pid for task in tasks for pid in (task / "children").read_text().split()}
