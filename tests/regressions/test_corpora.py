"""What fuzzing once found or reached, again: `make fuzz` finds more and adds it to these files."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from devproc import child, wire
from devproc.catalog import CATALOG
from devproc.fuzz.bench import Bench, memory_of
from devproc.fuzz.inputs import Op, parse, records
from integration.fuzz import corpus
from integration.fuzz.wire import check
from kvmcore.exitloop import Core, DeviceGone

FUZZ = Path(__file__).parents[2] / "integration" / "fuzz"
CORE_DEVICES_MAX = 256
LITMUS_ROUNDS = 4_000_000 if os.environ.get("VMSUP_FULL_MATRIX") else 20_000  # each some 3 accesses


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


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("*.vmrep")), ids=lambda path: path.stem)
def test_an_input_that_showed_something_of_a_device_shows_nothing(path: Path) -> None:
    rep = parse(path.read_text())
    entry = CATALOG[rep.device]
    params = entry.check_params(rep.params)
    alive: list[None] = []
    memory = memory_of(entry, params)
    bench = Bench(entry, child.load(entry), params, memory=memory, alive=lambda: alive.append(None))
    bench.run(rep.data)
    repeated = sum(r.data for r in records(rep.data) if r.op == Op.REPEAT)
    assert len(alive) == repeated // 256  # so that what takes long because it is long is no hang
    bench.check(rep.data)


def built(source: str, sanitizers: str, where: Path) -> Path:
    cc = shutil.which("gcc")  # whose sanitizers come with it
    if cc is None:
        pytest.skip("no gcc")
    flags = ["-g", "-O1", "-Wall", "-DREPLAY", f"-fsanitize={sanitizers}", "-fno-sanitize-recover"]
    subprocess.run([cc, *flags, FUZZ / source, "-o", where / "program"], check=True)
    return where / "program"


@pytest.mark.parametrize("name", ["core", "ring"])
def test_what_is_in_c_holds_for_every_input(name: str, tmp_path: Path) -> None:
    program = built(f"{name}.c", "address,undefined", tmp_path)
    inputs = corpus.REGRESSIONS / f"{name}.hex"
    done = subprocess.run([program, inputs], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(corpus.load(name))} inputs\n"


def test_the_exit_loop_holds_under_threads(tmp_path: Path) -> None:
    program = built("core_threads.c", "thread", tmp_path)
    # ThreadSanitizer finds its shadow memory only where addresses are not too random.
    done = subprocess.run(["setarch", "-R", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 100


def test_no_read_overtakes_a_posted_write(tmp_path: Path) -> None:
    program = built("core_litmus.c", "address,undefined", tmp_path)
    done = subprocess.run([program, str(LITMUS_ROUNDS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reads, writes, shadowed = map(int, re.findall(r"\d+", done.stdout))
    assert reads + writes + shadowed > 2.5 * LITMUS_ROUNDS


def test_no_notification_and_no_interrupt_is_lost_on_a_ring(tmp_path: Path) -> None:
    program = built("ring_litmus.c", "address,undefined", tmp_path)
    done = subprocess.run([program, str(5 * LITMUS_ROUNDS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    without, with_event_idx = done.stdout.splitlines()
    for line in without, with_event_idx:
        rounds, notifications, interrupts = map(int, re.findall(r"\d+", line))
        assert rounds == 5 * LITMUS_ROUNDS and notifications and interrupts
