"""Drives a `stand_in.StandIn` in another process, as root or as an ordinary user."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from integration.ordinary import as_user

HERE = Path(__file__).resolve().parent


class Remote:
    """Calls the methods of a `stand_in.StandIn` in another process."""

    def __init__(self, who: str, mode: str) -> None:
        self.who = who
        self.pipe, theirs = Pipe()
        command = [sys.executable, str(HERE / "stand_in.py"), str(theirs.fileno()), mode]
        if who == "user" and os.geteuid() == 0:
            command = [*as_user(), *command]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        self.pid: int = self.pipe.recv()

    def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        self.pipe.send((method, args, kwargs))
        ok, answer = self.pipe.recv()
        if not ok:
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        self.pipe.close()
        self.process.wait(10)


def start(who: str, mode: str = "") -> Remote:
    """`mode`: the jail mode that its zygote is for; empty, any."""
    if who == "root" and os.geteuid() != 0:
        pytest.skip("needs root")
    return Remote(who, mode)
