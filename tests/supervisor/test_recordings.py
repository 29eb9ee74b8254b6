"""Recordings: what a device process writes down of itself, and that a new one does the same."""

from __future__ import annotations

import functools
import mmap
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from devproc import child
from devproc.backends.output import Output
from devproc.catalog import CATALOG
from devproc.devices.rtc import Rtc
from devproc.devices.serial import Serial
from devproc.fuzz import recording
from devproc.fuzz.bench import Bench, memory_of
from devproc.fuzz.inputs import (
    GUEST_SIZE,
    Op,
    Record,
    Rep,
    canonical,
    default_params,
    encode,
    parse,
    records,
    to_text,
)
from devproc.fuzz.recording import Recorded
from kvmcore.errors import ConfigError
from kvmcore.memory import GuestMemory
from supervisor.recordings import Recordings, expected, replay


class Host:
    """The host of a recorded device: clocks that jump about, bytes that come, an output that takes all."""

    def __init__(self) -> None:
        self.clock_ns, self.wall_ns = 10**12, 17 * 10**17
        self.typed = b""
        self.edges = 0
        self.on_input = self.irq
        self.record = mmap.mmap(-1, recording.SIZE)

    def clock(self) -> int:
        self.clock_ns += 100  # time never stands still
        return self.clock_ns

    def wall(self) -> int:
        self.wall_ns += 100
        return self.wall_ns

    def irq(self) -> None:
        self.edges += 1

    def listen(self, _wanted: object, on_input: object) -> None:
        self.on_input = on_input  # type: ignore[assignment]

    def read(self, limit: int) -> bytes:
        data, self.typed = self.typed[:limit], self.typed[limit:]
        return data

    def rep(self, device: str) -> Rep:
        size, clock_ns, wall_ns, full = recording.HEAD.unpack_from(self.record, 0)
        assert not full
        data = self.record[recording.RECORDS_AT : recording.RECORDS_AT + size]
        assert canonical(CATALOG[device], data, recorded=True) == data
        return Rep(device, data, default_params(CATALOG[device]), clock_ns, wall_ns)


def serial(host: Host) -> Recorded:
    ports = {
        "irq": host.irq,
        "input": host,
        "output": Output(os.open(os.devnull, os.O_WRONLY)),
        "clock": host.clock,
    }
    return Recorded(host.record, CATALOG["serial"], Serial, **ports)


def a_conversation(host: Host) -> Recorded:
    device = serial(host)
    for offset, data in ((4, 0x0A), (2, 0x41), (1, 0x03)):
        device.write(0, offset, 1, data)
    for byte in b"ok":
        device.write(0, 0, 1, byte)
    host.typed = b"typed"
    host.on_input()
    host.clock_ns += 10**9
    device.on_deadline(host.clock_ns)
    for _ in range(7):
        device.read(0, 2, 1)
        device.read(0, 0, 1)
    return device


def test_a_record_says_what_was_asked_answered_raised_and_sent() -> None:
    host = Host()
    a_conversation(host)
    text = to_text(host.rep("serial"))
    for line in ("write PORT 0x4 1 0xa", "sent 6f", "sent 6b", "input 7479706564", "read PORT 0x0 1 = 0x74"):
        assert line in text.splitlines()
    raised = sum(r.data for r in records(host.rep("serial").data) if r.op == Op.RAISED)
    assert raised == host.edges > 0


def test_a_new_device_process_does_as_recorded_and_the_first_difference_is_named(tmp_path: Path) -> None:
    host = Host()
    a_conversation(host)
    good = to_text(host.rep("serial"))
    (tmp_path / "serial1.vmrep").write_text(good)
    text, code = replay(str(tmp_path), jailed=False)
    assert code == 0, text
    assert "operations, each as recorded" in text
    lines = good.splitlines()
    at = lines.index("read PORT 0x0 1 = 0x79")
    (tmp_path / "serial1.vmrep").write_text(
        "\n".join([*lines[:at], "read PORT 0x0 1 = 0x78", *lines[at + 1 :]])
    )
    text, code = replay(str(tmp_path), jailed=False)
    assert code == 33
    assert "read 0x0: [121, " in text and "[120, " in text


def test_the_clocks_of_a_record_are_those_of_the_device(tmp_path: Path) -> None:
    host = Host()
    params = CATALOG["rtc"].check_params(default_params(CATALOG["rtc"]))
    device = Recorded(
        host.record, CATALOG["rtc"], Rtc, irq=host.irq, clock=host.clock, wall=host.wall, **params
    )
    for jump_ns in (0, 5 * 10**9, -7 * 10**9):
        host.wall_ns += jump_ns
        device.write(0, 0, 1, 0)
        device.read(0, 1, 1)
    rep = host.rep("rtc")
    assert [round((r.data - (r.data >> 63 << 64)) / 1e9) for r in records(rep.data) if r.op == Op.WALL] == [
        5,
        -7,
    ]
    (tmp_path / "rtc.vmrep").write_text(to_text(rep))
    text, code = replay(str(tmp_path / "rtc.vmrep"), jailed=False)
    assert code == 0, text


def test_what_is_expected_is_apart_from_what_is_done() -> None:
    host = Host()
    a_conversation(host)
    rep, steps = expected(host.rep("serial"))
    assert canonical(CATALOG["serial"], rep.data) == rep.data
    assert len(steps) == len(list(records(rep.data)))
    assert sum(count for _, raised, *_ in steps for _, count in raised) == host.edges
    assert "".join(sent for _, _, sent, *_ in steps) == b"ok".hex()


def test_a_record_that_is_full_ends_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SIZE", recording.RECORDS_AT + 5 * 16)
    host = Host()
    a_conversation(host)
    size, _, _, full = recording.HEAD.unpack_from(host.record, 0)
    assert full
    assert size == 5 * 16


def test_what_a_device_process_wrote_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SIZE", 4096)
    recordings = Recordings(str(tmp_path / "new"))
    memfd = recordings.extra("serial1", CATALOG["serial"], ())
    with mmap.mmap(memfd, recording.SIZE) as theirs:
        recording.HEAD.pack_into(theirs, 0, 1 << 60, 0, 0, False)
        theirs[recording.RECORDS_AT : recording.RECORDS_AT + 64] = b"\xff" * 64
    os.close(memfd)
    recordings.write(print)
    assert (tmp_path / "new/serial1.vmrep").read_text().startswith("vmrep 1 serial clock=0 wall=0\n")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"--record {tmp_path}/file/below"):
        Recordings(str(tmp_path / "file/below"))
    with pytest.raises(ConfigError, match="there is no"):
        replay(str(tmp_path))


HARD = {
    "virtio-rng": "chain 0 0 0 64 0 plain; kick 0; restart 0x8 4; chain 0 0 0 9 9 plain; kick 0",
    "virtio-console": "chain 0 0 0 64 0 plain; kick 0; input 6869; chain 1 5 0 0 0 plain 68656c6c6f; kick 1; "
    "set size 80; chain 3 8 0 0 0 plain 0000000000000100; kick 3",
    "virtio-balloon": "chain 0 8 0 0 0 plain 0100000002000000; kick 0; set target_mib 1; "
    "chain 3 0 0 64 0 plain; kick 3",
    "virtio-net": "chain 0 0 0 1526 0 plain; kick 0; input " + "00" * 12 + "ff" * 6 + "00" * 54 + "; "
    "chain 1 12 60 0 0 plain " + "00" * 12 + "ff" * 60 + "; kick 1; set link 0; clock 1000000",
    "virtio-net-stream": "chain 2 2 1 1 0 plain 000001; kick 2",
    "virtio-blk": "chain 0 16 512 1 0 plain 0100000000000000" + "01" + "00" * 7 + "5a" * 512 + "; kick 0; "
    "chain 0 16 0 512 1 plain 0000000000000000" + "02" + "00" * 7 + "; kick 0; "
    "chain 0 16 0 512 1 plain 0000000000000000" + "ff" * 8 + "; kick 0; chain 0 16 0 1 0 loop; kick 0",
}


class Busy(GuestMemory):
    """Memory of a guest that does something when a device orders its stores and loads."""

    meanwhile: Callable[[], object]

    def fence(self) -> None:
        super().fence()
        self.meanwhile()


def on_a_bench(device: str, memory: GuestMemory | None = None) -> tuple[Bench, bytearray]:
    entry = CATALOG[device]
    params = entry.check_params(default_params(entry))
    record = bytearray(1 << 20)
    model: Any = functools.partial(recording.on_bench, record, entry, child.load(entry))
    return Bench(entry, model, params, memory=memory or memory_of(entry, params)), record


def text_of(device: str, record: bytearray) -> str:
    size, clock_ns, wall_ns, full = recording.HEAD.unpack_from(record)
    assert not full
    data = bytes(record[recording.RECORDS_AT : recording.RECORDS_AT + size])
    assert canonical(CATALOG[device], data, recorded=True) == data
    rep = Rep(device, data, default_params(CATALOG[device]), clock_ns, wall_ns)
    text = to_text(rep)
    assert parse(text) == rep
    return text


def conversation(device: str) -> str:
    """The record of a device with guest memory, and of its driver."""
    bench, record = on_a_bench(device)
    head = to_text(Rep(device, b"", default_params(CATALOG[device])))
    bench.run(parse(head + HARD[device].replace("; ", "\n")).data, [])
    return text_of(device, record)


def held_again(text: str, where: Path) -> tuple[str, int]:
    where.joinpath("any.vmrep").write_text(text)
    return replay(str(where), jailed=False)


@pytest.mark.parametrize("device", HARD)
def test_a_device_with_guest_memory_does_again_as_recorded(device: str, tmp_path: Path) -> None:
    text = conversation(device)
    assert {"event", "memory", "wrote"} <= {line.split()[0] for line in text.splitlines()}
    said, code = held_again(text, tmp_path)
    assert code == 0, said
    assert "each as recorded" in said


def test_there_is_a_hard_conversation_of_each_device_that_is_recorded() -> None:
    assert set(HARD) == {e.name for e in CATALOG.values() if e.guest_memory and recording.recorded(e)}


@pytest.mark.parametrize(
    ("device", "line", "instead", "why"),
    [
        (
            "virtio-rng",
            r"(wrote \S+ )..",
            r"\1ff",
            r"kick.0 calls: memory at 0x\w+ is \w+ in its process, expected ff",
        ),
        ("virtio-rng", r"(raised irq.1 ).*", r"\g<1>7", r"kick.0 calls: .* in its process, expected .*7"),
        ("virtio-rng", r"(gave entropy \S+ )..", r"\1ff", r"kick.0 calls: memory at "),
        ("virtio-rng", r"gave entropy .*", "", r"kick.0 calls: entropy is asked for another entropy"),
        ("virtio-rng", r"(event kick.0 0)", "\\1\ngave entropy 0x1 =no", r"kick.0 calls: entropy is asked"),
        ("virtio-rng", r"memory .*", "", r"kick.0 calls: entropy is asked 1 times less"),
        ("virtio-blk", r"(gave disk \S+ 0)0", r"\g<1>1", r"kick.0 calls: memory at "),
        ("virtio-blk", r"(gave disk \S+) =none", r"\1 ! 5", r"kick.0 calls: memory at "),
        ("virtio-net", r"gave link.0 \S+ =yes", "gave link.0 0x1 =yes", r"link.0 is asked for another send"),
    ],
)
def test_the_first_difference_is_named(
    device: str, line: str, instead: str, why: str, tmp_path: Path
) -> None:
    text = conversation(device)
    changed = re.sub(line, instead, text)
    assert changed != text
    said, code = held_again(changed, tmp_path)
    assert code == 33
    assert re.search(rf"operation \d+, .*{why}", said), said


@pytest.mark.parametrize("choice", [0, 8])
def test_what_a_guest_writes_meanwhile_is_there_meanwhile_again(choice: int, tmp_path: Path) -> None:
    memory = Busy.create([(0, GUEST_SIZE)])
    memory.meanwhile = lambda: None
    bench, record = on_a_bench("virtio-rng", memory)
    bench.run(encode([Record(Op.RESTART, size=3, offset=choice)]), [])
    assert bench._guest is not None
    queue = bench._guest._pci.queues[0]
    more = [17, 33]
    memory.meanwhile = lambda: queue.request(more.pop()) if more else None
    queue.request(5)
    bench._notify(0)
    assert [u.written for u in queue.used()] == [5, 33, 17]
    text = text_of("virtio-rng", record)
    assert "\nmemory.1 0x" in text
    said, code = held_again(text, tmp_path)
    assert code == 0, said
    said, code = held_again(text.replace("\nmemory.1 ", "\nmemory.9 "), tmp_path)
    assert code == 33, said


def test_what_is_not_recorded_is_named(tmp_path: Path) -> None:
    recordings = Recordings(str(tmp_path))
    os.close(recordings.extra("fs1", CATALOG["virtio-fs"], ()))
    said: list[str] = []
    recordings.write(said.append)
    assert said == ["fs1 is not recorded: what it shares with the host cannot be held again"]
    assert not list(tmp_path.iterdir())
