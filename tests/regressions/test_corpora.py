"""What fuzzing once found or reached, again: `make fuzz` finds more and adds it to these files."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from devproc import wire
from integration.fuzz import corpus
from integration.fuzz.wire import check
from kvmcore.exitloop import Core, DeviceGone

HARNESS = Path(__file__).parents[2] / "integration" / "fuzz" / "core.c"
CORE_DEVICES_MAX = 256


def test_the_wire_holds_for_every_frame() -> None:
    for frame in corpus.load("wire"):
        check(frame)


def test_the_exit_loop_takes_the_replies_that_the_wire_takes() -> None:
    core = Core()
    for n, frame in enumerate(corpus.load("wire")):
        if n % CORE_DEVICES_MAX == 0:
            core = Core()
        try:
            message = wire.decode(frame, wire.ACCESS_FRAME_MAX)
        except wire.PeerError:
            message = wire.Done()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            index = core.add_device(ours.fileno())
            theirs.send(frame)
            if isinstance(message, wire.Value):
                assert core.read(index, 0, 0, 8) == message.data
            else:
                with pytest.raises(DeviceGone):
                    core.read(index, 0, 0, 8)
            core.mark_dead(index)


def test_the_exit_loop_holds_under_the_sanitizers(tmp_path: Path) -> None:
    """Every input of its fuzzer, in the machine code of another compiler."""
    cc = shutil.which("gcc") or shutil.which("cc")
    if cc is None:
        pytest.skip("no C compiler")
    flags = ["-g", "-O1", "-Wall", "-DREPLAY", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    subprocess.run([cc, *flags, HARNESS, "-o", tmp_path / "replay"], check=True)
    done = subprocess.run(
        [tmp_path / "replay", corpus.REGRESSIONS / "core.hex"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(corpus.load('core'))} inputs\n"
