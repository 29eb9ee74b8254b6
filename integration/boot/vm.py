"""Runs `vmsup` as a user would, and keeps what it said and when."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Under emulation a device process may wait long for a CPU; the deadline itself has tests of its own.
DEVICE_TIMEOUT_S = "20"


@dataclass(frozen=True)
class Result:
    """How a VM went: exit code, the console's lines with the time of each (s since the epoch), and stderr."""

    code: int
    lines: list[tuple[float, str]]
    errors: str

    @property
    def console(self) -> str:
        return "\n".join(text for _, text in self.lines)

    def find(self, start: str) -> tuple[float, str]:
        """(time, what follows) of the first line that begins with `start`; fails the test without one."""
        for at, text in self.lines:
            if text.startswith(start):
                return at, text.removeprefix(start).strip()
        raise AssertionError(f"no line {start!r}:\n{self.console[-3000:]}\n{self.errors}")

    def __getitem__(self, start: str) -> str:
        return self.find(start)[1]


def command(*args: str) -> list[str]:
    """The command line of `vmsup ARGS`, of this checkout."""
    return [sys.executable, "-m", "supervisor.cli", *args]


def start(*args: str, user: tuple[str, ...] = (), **how: object) -> subprocess.Popen[bytes]:
    """`vmsup run ARGS`, with nothing on its standard input unless `how` says otherwise.

    `user` is a command line that runs another as somebody else.
    """
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = os.environ | {"VMSUP_DEBUG": "1", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": str(ROOT)}
    words = [*user, *command("run", "--device-timeout", DEVICE_TIMEOUT_S, *args)]
    return subprocess.Popen(words, env=env, **(pipes | how))  # type: ignore[call-overload,no-any-return]


def run(*args: str, timeout_s: float = 400, user: tuple[str, ...] = ()) -> Result:
    """`vmsup run ARGS` to its end."""
    with start(*args, user=user) as process:
        assert process.stdout is not None and process.stderr is not None
        killer = threading.Timer(timeout_s, process.kill)
        killer.start()
        errors: list[bytes] = []
        reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))  # type: ignore[union-attr]
        reader.start()
        lines = [(time.time(), raw.decode(errors="replace").rstrip("\r\n")) for raw in process.stdout]
        reader.join()
        killer.cancel()
    return Result(process.returncode, lines, errors[0].decode(errors="replace"))
