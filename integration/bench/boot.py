"""Time from the command to user space, against QEMU microvm with the same kernel, words and console."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from integration.bench import guest
from integration.bench.report import Result
from integration.boot import images

TARGET = 1.0
ROUNDS = 3


def until_up(command: list[str]) -> dict[str, float]:
    """Seconds from starting `command` to the guest's first line.

    Raises:
        SystemExit: there was none, or it did not end as it should.
    """
    began_s = time.monotonic()
    with guest.started(command) as process:
        assert process.stdout is not None and process.stderr is not None
        took_s = 0.0
        for line in process.stdout:
            if images.UP in line:
                took_s = time.monotonic() - began_s
        errors = process.stderr.read()
    if process.returncode or not took_s:
        raise guest.failed(command, process.returncode, errors)
    return {"up": took_s}


def results() -> list[Result]:
    with tempfile.TemporaryDirectory(prefix="vmsup-bench-") as name:
        linux = guest.Guest.of(Path(name), "", ())
        # Without PCI, as it is fastest: the guest has nothing there.
        microvm = linux.qemu(machine="microvm,pit=on,pic=on,rtc=on,isa-serial=on")
        commands = {"ours": linux.vmsup("--no-rng"), "theirs": microvm}
        guest.interleaved(commands, 1, until_up)  # reads everything from the disk
        times = guest.interleaved(commands, ROUNDS, until_up)["up"]
    return [
        Result.ratio("boot to init, time to QEMU microvm's", times["ours"], times["theirs"], TARGET, "lower")
    ]
