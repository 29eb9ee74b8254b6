"""`vmsup fuzz` without a jail, as whoever runs the tests; integration/fuzz/test_fuzz.py has it in one."""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from devproc import jail
from devproc.catalog import CATALOG
from devproc.fuzz import instrument
from devproc.fuzz.inputs import RECORD, Op, Record, Rep, default_params, encode, parse, records, to_text
from devproc.fuzz.recording import recorded
from devproc.mailbox import Mailbox
from devproc.ports import Device
from integration.fuzz.seeded import BUGS, Bug, plant, plant_bug
from kvmcore.errors import ConfigError
from supervisor import fuzzcluster, fuzzreport
from supervisor.findings import Finding, minimised
from supervisor.fuzz import Campaign, Plan, Result, name_of, read_corpus, read_dictionary, read_input
from supervisor.fuzzoptions import HANG_S
from supervisor.subject import Died

Seeded = Callable[[str], Plan]


@pytest.fixture
def seeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Seeded:
    """Plants a bug, and gives the plan that starts from the input that shows it."""

    def seed(name: str) -> Plan:
        bug = BUGS[name]
        entry = plant(bug.device, bug.changes, f"fuzzed_{name.replace('-', '_')}", tmp_path, monkeypatch)
        corpus = tmp_path / "corpus"
        corpus.mkdir(exist_ok=True)
        head = to_text(Rep(entry.name, b"", default_params(entry)))
        noise = "read PORT 0x0 1\n"
        (corpus / "seed").write_text(head + noise + bug.shown_by.replace("; ", "\n") + "\n" + noise)
        # On a busy machine an input takes several times its CPU time.
        limit_s = HANG_S if bug.kind == "hang" else 1.0
        crashes = tmp_path / "crashes"
        return Plan(
            entry.name, corpus, crashes, runs=1, mode=jail.Mode.NONE, timeout_s=limit_s, compare=False
        )

    return seed


def nothing(_: str) -> None:
    pass


def shown_by(bug: Bug) -> bytes:
    head = to_text(Rep(bug.device, b"", default_params(CATALOG[bug.device])))
    return parse(head + bug.shown_by.replace("; ", "\n")).data


SHOWN_BY = {name: shown_by(bug) for name, bug in BUGS.items() if bug.module}
"""All of virtio-rng, which has the least of its own."""


@pytest.mark.parametrize("name", ["value-not-checked", "fifo-without-end", "state-not-restored"])
def test_a_finding_is_made_small_and_kept(
    seeded: Seeded, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = seeded(name)
    said: list[str] = []
    with Campaign(plan, said.append) as campaign:
        result = campaign.run(nothing)
    (finding,) = result.findings
    assert finding.kind == BUGS[name].kind
    sort, code = {"growth": ("oom", 71)}.get(finding.kind, ("crash", 77))
    assert result.exit_code == code
    assert finding.name == f"{sort}-{finding.key}"
    where = plan.crashes / finding.name
    assert str(where) in said[0]
    data = (where / "input").read_bytes()
    operations = BUGS[name].shown_by.count(";") + 1
    assert len(data) <= operations * RECORD.size  # what was noise is gone
    assert parse((where / "input.vmrep").read_text()).data == data
    report = json.loads((where / "report.json").read_text())
    assert (report["kind"], report["key"]) == (finding.kind, finding.key)
    with pytest.raises(Exception) as shown:
        runpy.run_path(str(where / "repro.py"))
    assert str(shown.value) in finding.why


@pytest.mark.parametrize("name", SHOWN_BY)
def test_each_oracle_finds_its_bug_in_what_virtio_devices_share(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_bug(name, tmp_path, monkeypatch)
    with Campaign(Plan("virtio-rng", crashes=tmp_path, mode=jail.Mode.NONE), nothing) as campaign:
        (found,) = campaign.verdicts([SHOWN_BY[name]])
    assert found is not None and found.kind == BUGS[name].kind


def test_no_oracle_speaks_without_a_bug_in_what_virtio_devices_share(tmp_path: Path) -> None:
    with Campaign(Plan("virtio-rng", crashes=tmp_path, mode=jail.Mode.NONE), nothing) as campaign:
        assert campaign.verdicts(list(SHOWN_BY.values())) == [None] * len(SHOWN_BY)


def test_a_hang_ends_the_process_and_not_the_campaign(seeded: Seeded) -> None:
    plan = seeded("loop-without-end")
    with Campaign(plan, nothing) as campaign:
        result = campaign.run(nothing)
        assert result.findings[0].kind == "hang"
        assert result.exit_code == 70
        # and the next process fuzzes on
        assert campaign.verdicts([encode([Record(Op.READ, size=1)])]) == [None]
    assert result.runs >= 1
    small = (plan.crashes / result.findings[0].name / "input").read_bytes()
    assert list(records(small)) == [Record(Op.WRITE, size=1, offset=3, data=0x3A)]


def test_the_same_bug_is_one_finding(seeded: Seeded) -> None:
    plan = seeded("value-not-checked")
    assert plan.corpus is not None
    text = (plan.corpus / "seed").read_text()
    (plan.corpus / "other").write_text(text + "write PORT 0x0 1 0x8\nwrite PORT 0x1 1 0x0\n")
    with Campaign(plan, nothing) as campaign:
        assert len(campaign.run(nothing).findings) == 1


def test_what_reaches_more_is_kept_and_a_later_campaign_begins_with_it(tmp_path: Path) -> None:
    plan = Plan("i8042", tmp_path / "corpus", tmp_path / "crashes", runs=400, mode=jail.Mode.NONE, workers=2)
    with Campaign(plan, nothing) as campaign:
        first = campaign.run(nothing)
    assert first.exit_code == 0
    assert not plan.crashes.exists()
    assert first.runs >= 400
    assert first.compared >= 1
    assert {p.name for p in (tmp_path / "corpus").iterdir()} == set(first.corpus)
    with Campaign(Plan("i8042", plan.corpus, plan.crashes, mode=jail.Mode.NONE), nothing) as campaign:
        reached = campaign.blocks_of(list(first.corpus.values()))
    assert set().union(*reached) == first.covered


def test_how_a_driver_starts_a_device_counts_each_time(tmp_path: Path) -> None:
    start = encode([Record(Op.RESTART, size=4, offset=8), Record(Op.KICK)])
    plan = Plan("virtio-rng", crashes=tmp_path, mode=jail.Mode.NONE)
    with Campaign(plan, nothing) as campaign:
        first, again = campaign.blocks_of([start, start])
        reached = {campaign.result.blocks[n].function for n in again}
    assert first == again
    assert {"PackedQueue.__init__", "VirtioDevice._reset"} <= reached


def test_the_bench_is_the_device_behind_the_wire(tmp_path: Path) -> None:
    text = {
        "serial": "write PORT 0x4 1 0xa\nwrite PORT 0x2 1 0x1\nwrite PORT 0x1 1 0x3\ninput 616263\n"
        "read PORT 0x0 1\nclock 1000000000\nread PORT 0x2 1\nwrite PORT 0x0 1 0x41\nsave\nread PORT 0x5 1\n",
        "rtc": "write PORT 0x0 1 0xb\nwrite PORT 0x1 1 0x52\nclock 2000000000\nwrite PORT 0x0 1 0xc\n"
        "read PORT 0x1 1\nwall -400000000000\nwrite PORT 0x0 1 0x0\nread PORT 0x1 1\n",
    }
    for device, lines in text.items():
        rep = parse(to_text(Rep(device, b"", default_params(CATALOG[device]))) + lines)
        with Campaign(Plan(device, crashes=tmp_path, mode=jail.Mode.NONE), nothing) as campaign:
            assert campaign.compare(rep.data) is None
            assert campaign.result.compared == 1


@pytest.mark.parametrize("device", [e.name for e in CATALOG.values() if e.guest_memory and recorded(e)])
def test_the_bench_is_the_device_with_guest_memory_behind_the_wire(device: str, tmp_path: Path) -> None:
    head = to_text(Rep(device, b"", default_params(CATALOG[device])))
    lines = "chain 0 16 0 64 1 plain 00\nkick 0\nsave\nrestart 0x8 3\nchain 0 0 0 64 0 loop\nkick 0\n"
    with Campaign(Plan(device, crashes=tmp_path, mode=jail.Mode.NONE), nothing) as campaign:
        assert campaign.compare(parse(head + lines).data) is None
        assert campaign.result.compared == 1


def test_an_input_with_the_memory_of_a_whole_machine_is_not_compared(tmp_path: Path) -> None:
    params = (256 << 20, 0)
    plan = Plan("virtio-rng", crashes=tmp_path, mode=jail.Mode.NONE, params=params)
    with Campaign(plan, nothing) as campaign:
        assert campaign.verdict(SHOWN_BY["completed-twice"]) is None
        assert campaign.result.compared == 0


def test_a_device_that_differs_behind_the_wire_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By a global that the process of the bench has, and that of the wire has not: its coverage map.
    changes = (
        ("        return STATUS_OBF\n", "        return 3 if '__cov__' in globals() else STATUS_OBF\n"),
    )
    entry = plant("i8042", changes, "fuzzed_differs", tmp_path, monkeypatch)
    plan = Plan(entry.name, None, tmp_path / "crashes", 60.0, mode=jail.Mode.NONE, stop=True)
    with Campaign(plan, nothing) as campaign:
        result = campaign.run(nothing)
    assert [f.kind for f in result.findings] == ["disagree"]
    assert result.findings[0].why.startswith("operation 0, read 0x")
    (record,) = records((plan.crashes / result.findings[0].name / "input").read_bytes())
    assert record.offset <= 4 < record.offset + record.size


def test_a_device_with_guest_memory_that_differs_behind_the_wire_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = "            self.push(index, chain, len(data))\n"
    wrong = "            self.push(index, chain, len(data) - ('__cov__' in globals()))\n"
    plant("virtio-rng", ((right, wrong),), "fuzzed_rng_differs", tmp_path, monkeypatch)
    data = SHOWN_BY["completed-twice"]
    with Campaign(Plan("virtio-rng", crashes=tmp_path, mode=jail.Mode.NONE), nothing) as campaign:
        campaign.report(campaign.verdict(data), data)
        (finding,) = campaign.result.findings
    assert finding.kind == "disagree"
    assert re.match(r"operation \d+, kick.0 calls: memory at 0x\w+ is 40", finding.why)  # 64 bytes, not 63


@pytest.mark.parametrize(
    ("device", "data"),
    [
        ("i8042", encode([Record(Op.WRITE, size=1, offset=1, data=1), Record(Op.READ, size=1, offset=1)])),
        ("virtio-rng", SHOWN_BY["completed-twice"]),
    ],
)
def test_what_differs_through_the_mailbox_alone_is_a_finding(
    device: str, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        def __init__(self, device: Device) -> None:
            self._device = device

        def __getattr__(self, name: str) -> Any:
            return getattr(self._device, name)

        def write(self, space: int, offset: int, size: int, data: int) -> None:
            self._device.write(space, offset, size, data & 0xFE)

    def init(mailbox: Mailbox, *args: Any) -> None:
        *others, device, clock = args
        made(mailbox, *others, Other(device), clock)

    made: Any = Mailbox.__init__
    monkeypatch.setattr(Mailbox, "__init__", init)
    with Campaign(Plan(device, crashes=tmp_path, mode=jail.Mode.NONE), nothing) as campaign:
        campaign.report(campaign.verdict(data), data)
        (finding,) = campaign.result.findings
    assert finding.kind == "transport"
    assert "in its process, " in finding.why


def test_a_device_that_dies_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = "        if data & PULSE == PULSE and not data & LINE_RESET:\n"
    changes = (
        (before, f"        if data == 0x42:\n            import os\n            os._exit(3)\n{before}"),
    )
    entry = plant("i8042", changes, "fuzzed_dies", tmp_path, monkeypatch)
    plan = Plan(entry.name, None, tmp_path / "crashes", runs=5000, mode=jail.Mode.NONE, compare=False)
    with Campaign(plan, nothing) as campaign:
        result = campaign.run(nothing)
    assert [(f.kind, f.why) for f in result.findings] == [("died", "exited with status 3")]
    (record,) = records((plan.crashes / result.findings[0].name / "input").read_bytes())
    assert (record.op, record.offset, record.data) == (Op.WRITE, 4, 0x42)


@pytest.mark.usefixtures("no_process_left")
def test_no_process_is_left(tmp_path: Path) -> None:
    with Campaign(Plan("pvpanic", crashes=tmp_path, runs=50, mode=jail.Mode.NONE), nothing) as campaign:
        campaign.run(nothing)


def test_making_small_keeps_what_is_needed() -> None:
    def verdicts(inputs: list[bytes]) -> list[Finding | None]:
        """Wrong: a write of an odd number to 3 after a read of anything."""
        found: list[Finding | None] = []
        for data in inputs:
            seen = False
            wrong = False
            for r in records(data):
                seen |= r.op == Op.READ
                wrong |= seen and r.op == Op.WRITE and r.offset == 3 and bool(r.data & 1)
            found.append(Finding("value", "", (), "1") if wrong else None)
        return found

    noise = [Record(Op.CLOCK, data=5)] * 9
    data = encode([*noise, Record(Op.READ, size=4), *noise, Record(Op.WRITE, 0, 2, 0, 3, 0x1235), *noise])
    finding = Finding("value", "", (), "1")
    small = minimised(data, finding, verdicts)  # type: ignore[arg-type]
    assert list(records(small)) == [Record(Op.READ, size=1), Record(Op.WRITE, 0, 1, 0, 3, 1)]


def test_any_file_of_a_corpus_is_an_input(tmp_path: Path) -> None:
    (tmp_path / "afl").write_bytes(os.urandom(100))
    (tmp_path / "text").write_text(to_text(Rep("serial", encode([Record(Op.READ, size=1)]))))
    (tmp_path / "empty").write_bytes(b"")
    found = read_corpus(CATALOG["serial"], tmp_path)
    assert len(found) == 2
    assert name_of(encode([Record(Op.READ, size=1)])) in found
    with pytest.raises(ConfigError, match=r"text: an input for serial, not pit"):
        read_input(CATALOG["pit"], tmp_path / "text")
    with pytest.raises(ConfigError, match="No such file"):
        read_input(CATALOG["pit"], tmp_path / "missing")


def test_a_recording_in_a_corpus_is_several_inputs_without_its_answers(tmp_path: Path) -> None:
    read = Record(Op.READ, size=1, aux=1, data=7)
    many = encode([*[read] * 100, Record(Op.RAISED, data=1)])
    (tmp_path / "serial1.vmrep").write_text(to_text(Rep("serial", many)))
    found = read_corpus(CATALOG["serial"], tmp_path)
    plain = Record(Op.READ, size=1)
    assert sorted(found.values(), key=len) == [encode([plain] * n) for n in (4, 48)]


def test_the_recordings_of_a_whole_machine_are_a_corpus_of_each_of_its_devices(tmp_path: Path) -> None:
    sent = "write PORT 0x0 1 0x41\nsent 41\n"
    kicked = "event kick.0 0\nmemory 0x1000 0102\ngave entropy 0x1 00\nwrote 0x2000 ff\nraised irq.1 1\n"
    for device, lines in (("serial", sent), ("virtio-rng", kicked), ("rtc", "")):
        head = to_text(Rep(device, b"", default_params(CATALOG[device])))
        (tmp_path / f"{device}.vmrep").write_text(head + lines)
    for device, record in (("serial", Record(Op.WRITE, size=1, data=0x41)), ("virtio-rng", Record(Op.KICK))):
        assert list(read_corpus(CATALOG[device], tmp_path).values()) == [encode([record])]


def test_a_corpus_may_be_files_that_are_somewhere_else(tmp_path: Path) -> None:
    read = encode([Record(Op.READ, size=1)])
    elsewhere = {"any": read, "text": to_text(Rep("i8042", read)).encode()}
    plan = Plan("i8042", elsewhere, tmp_path, runs=50, mode=jail.Mode.NONE, timeout_s=1.0, compare=False)
    with Campaign(plan, nothing) as campaign:
        assert campaign.seeds == [read]
        result = campaign.run(nothing)
    assert {name: elsewhere[name] for name in result.corpus} == result.corpus


def test_a_corpus_may_be_where_fsspec_can_put_it() -> None:
    fsspec = pytest.importorskip("fsspec", reason="needs fsspec: pip install 'vmsup[cluster]'")
    corpus = fuzzcluster.open_corpus("memory://inputs/i8042")
    corpus["one"] = encode([Record(Op.READ, size=1)])
    assert fsspec.filesystem("memory").ls("/inputs/i8042", detail=False) == ["/inputs/i8042/one"]
    assert list(read_corpus(CATALOG["i8042"], corpus).values()) == [encode([Record(Op.READ, size=1)])]


def test_what_is_optional_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ConfigError, match=r"--scheduler: .*vmsup\[cluster\]"):
        fuzzcluster.fuzz(Plan("pvpanic", crashes=tmp_path, mode=jail.Mode.NONE), "x", nothing, nothing)
    with pytest.raises(ConfigError, match=r"--corpus s3://x: .*vmsup\[cluster\]"):
        fuzzcluster.open_corpus("s3://x")


def test_a_round_gives_back_what_it_found_and_not_what_it_was_given() -> None:
    options = ["--runs=300", "--no-jail", "--timeout=1", "--no-compare"]
    first = fuzzcluster.play("i8042", options, [])
    assert first.runs >= 300
    assert first.corpus and not first.found
    again = fuzzcluster.play("i8042", [*options, "--seed=2"], first.corpus)
    assert not {*first.corpus} & {*again.corpus}
    with pytest.raises(RuntimeError, match="device 'nothing' is unknown"):
        fuzzcluster.play("nothing", options, [])


def test_a_dictionary_gives_texts_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "words"
    path.write_text('# words\n\nkw="AT\\x0d"\n"\\x34\\x12"\n')
    assert read_dictionary(path) == (b"AT\r", 0x0D5441, b"\x34\x12", 0x1234)
    path.write_text("nothing quoted\n")
    with pytest.raises(ConfigError, match="line 1"):
        read_dictionary(path)


def test_reports_are_what_their_readers_expect() -> None:
    finding = Finding("exception", 'ValueError: "<&>"', ("devices/rtc.py:270 write_TIME",), "ab")
    result = Result("rtc", seconds=1.0, findings=[finding])
    suite = ET.fromstring(fuzzreport.junit(result))
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    failure = suite.find("testcase/failure")
    assert failure is not None and failure.get("message") == finding.why
    log = json.loads(fuzzreport.sarif(result))
    (found,) = log["runs"][0]["results"]
    place = found["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "devproc/devices/rtc.py"
    assert place["region"]["startLine"] == 270


def test_the_page_marks_what_was_reached() -> None:
    entry = CATALOG["i8042"]
    blocks = instrument.blocks(entry)
    (reached,) = [n for n, b in enumerate(blocks) if b.function == "I8042.read_STATUS"]
    lines = fuzzreport.page("i8042", blocks, {reached}).splitlines()
    assert any("return STATUS_OBF" in line and 'class="line hit"' in line for line in lines)
    assert any("self._reset()" in line and 'class="line missed"' in line for line in lines)


def test_a_finding_is_not_believed_further_than_it_can_be_written_down() -> None:
    told = Finding.told({"kind": "x" * 99, "why": "y" * 9999, "frames": ["z"] * 99, "key": "../../etc"})
    assert told is not None
    assert (len(told.kind), len(told.why), len(told.frames)) == (32, 1000, 20)
    assert told.key == "ec"  # hexadecimal digits, so no path
    assert Finding.told("nothing") is None


def test_a_death_is_told_apart_by_its_call() -> None:
    one = Died("violation", "system call 41 socket(0x1), which its policy forbids")
    same = Finding.of(one.kind, one.why.replace("0x1", "0x2"))
    assert Finding.of(one.kind, one.why).key == same.key
    assert Finding.of(one.kind, one.why.replace("41 socket", "57 fork")).key != same.key
