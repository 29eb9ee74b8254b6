"""Recordings: what a device process writes down of itself, and that a new one does the same."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from devproc.backends.output import Output
from devproc.catalog import CATALOG
from devproc.devices.rtc import Rtc
from devproc.devices.serial import Serial
from devproc.fuzz import recording
from devproc.fuzz.inputs import Op, Rep, canonical, default_params, records, to_text
from devproc.fuzz.recording import Recorded
from kvmcore.errors import ConfigError
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
    assert sum(count for _, raised, _ in steps for _, count in raised) == host.edges
    assert "".join(sent for _, _, sent in steps) == b"ok".hex()


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
