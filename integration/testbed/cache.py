"""What is made once and kept outside the tree, in ~/.cache/vmsup or VMSUP_CACHE.

Nothing is ever refreshed: to have a newer kernel, delete the directory.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def directory() -> Path:
    """Where everything is kept."""
    if chosen := os.environ.get("VMSUP_CACHE"):
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmsup"


def once(name: str, build: Callable[[Path], None], good: Callable[[Path], bool] = Path.is_dir) -> Path:
    """The directory `name` of the cache, filled by `build(empty directory)` unless it is there and `good`.

    It appears whole or not at all, whoever runs at the same time or is killed half-way.

    Raises:
        OSError: the cache cannot be written.
    """
    final, building = directory() / name, directory() / f"{name}.building"
    if final.is_dir() and good(final):
        return final
    directory().mkdir(parents=True, exist_ok=True)
    with open(directory() / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if final.is_dir():
            if good(final):  # somebody else built it while we waited
                return final
            shutil.rmtree(final)
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        try:
            build(building)
            building.rename(final)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    return final
