"""The bench, its coverage and its oracles, each of which speaks of the bug that it is for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from devproc import child
from devproc.catalog import CATALOG, Entry
from devproc.devices.virtio_vsock import HEADER, HOST_CID, HOST_PORT, TYPE_STREAM, Op
from devproc.fuzz import instrument
from devproc.fuzz.bench import Bench, Step, memory_of
from devproc.fuzz.finding import Finding
from devproc.fuzz.inputs import RECORD, Rep, Twist, canonical, default_params, parse, records, to_text
from devproc.fuzz.mutate import LENGTH_MAX, Mutator
from integration.fuzz.hypothesis_device import survives
from integration.fuzz.seeded import BUGS, plant

LEGACY = ("serial", "rtc", "i8042", "pit", "pci-host", "acpi-pm", "pvpanic")


def bench_of(entry: Entry) -> Bench:
    params = entry.check_params(default_params(entry))
    # The modules that virtio devices share stay as other tests have imported them.
    model = child.load(entry) if entry.virtio is not None else instrument.load(entry)
    return Bench(entry, model, params, memory=memory_of(entry, params))


def copied(device: str, where: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> Entry:
    """The entry with an exact copy of the model: what the other tests import stays as it is."""
    return plant(device, (), module, where, monkeypatch)


def mutator(entry: Entry, seed: int = 1) -> Mutator:
    tables = instrument.load(entry).TABLES
    return Mutator(entry, tables, getattr(sys.modules[entry.module], instrument.WORDS), seed)


def input_of(entry: Entry, lines: str) -> bytes:
    head = to_text(Rep(entry.name, b"", default_params(entry)))
    return parse(head + lines.replace("; ", "\n")).data


@pytest.mark.parametrize(
    "name", [name for name, bug in BUGS.items() if bug.kind != "hang" and not bug.module]
)
def test_each_oracle_finds_its_bug_and_nothing_without_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug = BUGS[name]
    module = name.replace("-", "_")
    data = input_of(CATALOG[bug.device], bug.shown_by)
    right = bench_of(plant(bug.device, (), f"right_{module}", tmp_path, monkeypatch))
    right.run(data)
    right.check(data)
    monkeypatch.undo()
    wrong = bench_of(plant(bug.device, bug.changes, f"wrong_{module}", tmp_path, monkeypatch))

    def run() -> None:
        wrong.run(data)
        wrong.check(data)

    with pytest.raises(Exception) as found:
        run()
    assert (found.value.kind if isinstance(found.value, Finding) else "exception") == bug.kind


@pytest.mark.parametrize("name", LEGACY)
def test_no_oracle_speaks_of_a_device_as_it_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(copied(name, tmp_path, monkeypatch, f"clean_{name.replace('-', '_')}"))
    source = mutator(bench.entry)
    data = source.fresh()
    for n in range(200):
        data = source.mutate(data, source.fresh())
        bench.reset()
        bench.run(data)
        if n % 20 == 0:
            bench.check(data)


@pytest.mark.parametrize("name", LEGACY)
def test_a_reset_bench_is_as_a_new_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = copied(name, tmp_path, monkeypatch, f"reset_{name.replace('-', '_')}")
    bench = bench_of(entry)
    fresh = bench.model.save()
    source = mutator(entry)
    for _ in range(50):
        bench.reset()
        bench.run(source.mutate(source.fresh(), source.fresh()))
    bench.reset()
    assert bench.model.save() == fresh
    assert bench.model.counters() == bench_of(entry).model.counters()


@pytest.mark.parametrize("name", CATALOG)
def test_from_the_mark_of_its_beginning_an_input_does_what_it_does_as_a_whole(name: str) -> None:
    entry = CATALOG[name]
    params = entry.check_params(default_params(entry))
    model = child.load(entry)
    bench, whole = (Bench(entry, model, params, memory=memory_of(entry, params)) for _ in range(2))
    source = Mutator(entry, model.TABLES, (), 1)
    for _ in range(15):
        data = source.mutate(source.fresh(), source.fresh())
        stem = data[: int(source.random() * (len(data) // RECORD.size + 1)) * RECORD.size]
        bench.reset()
        bench.run(stem, [])
        bench.mark(b"here")
        for _ in range(10):
            tail = source.tail(data[len(stem) :], source.fresh())
            bench.reset(b"here")
            whole.reset()
            whole.run(stem, [])
            told: list[list[Step]] = []
            for one in (bench, whole):
                told.append([])
                one.run(tail, told[-1])
            assert told[0] == told[1]
            assert bench.model.save() == whole.model.save()
            assert bench.model.counters() == whole.model.counters()
        bench.unmark(b"here")


@pytest.mark.parametrize("name", LEGACY)
def test_what_mutation_makes_is_canonical(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = copied(name, tmp_path, monkeypatch, f"made_{name.replace('-', '_')}")
    source = mutator(entry)
    data = source.fresh()
    for _ in range(400):
        data = source.mutate(data, source.fresh())
        assert len(data) <= LENGTH_MAX
        for r in records(data):
            # One by one, because data for the host's input may have lost the INPUT that takes it.
            assert canonical(entry, RECORD.pack(*r)) in (RECORD.pack(*r), b"")


def test_the_same_seed_makes_the_same_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = copied("rtc", tmp_path, monkeypatch, "seeds_rtc")
    first, again, other = (mutator(entry, seed) for seed in (7, 7, 8))
    inputs = [first.fresh() for _ in range(20)]
    assert [again.fresh() for _ in range(20)] == inputs
    assert [other.fresh() for _ in range(20)] != inputs


def test_a_bench_tells_what_each_operation_brings() -> None:
    rep = parse(
        "vmrep 1 serial clock=0 wall=0\n"
        "write PORT 0x4 1 0xa\n"  # RTS, OUT2
        "write PORT 0x1 1 0x1\n"  # an interrupt for received data
        "input 6869\n"  # one byte fits
        "read PORT 0x0 1\n"
        "read PORT 0x0 1\n"
        "write PORT 0x0 1 0x41\n"
    )
    entry = CATALOG["serial"]
    steps: list[Step] = []
    from devproc.devices.serial import Serial  # noqa: PLC0415 - the model as it is, beside instrumented ones

    bench = Bench(entry, Serial, {}, rep.clock_ns, rep.wall_ns)
    bench.run(rep.data, steps)
    # data hi, then INPUT: the interrupt; then each byte read lets the next in
    assert [(s.value, s.raised, s.sent) for s in steps[2:]] == [
        (None, {}, b""),
        (None, {0: 1}, b""),
        (0x68, {0: 1}, b""),
        (0x69, {}, b""),
        (None, {}, b"A"),
    ]


def test_blocks_are_numbered_by_the_text_and_reached_by_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "covered_text.py").write_text(
        "def sign(n):\n"  # 0
        '    """Doc."""\n'
        "    if n > 0:\n"
        "        return 1\n"  # 1; 2 is "not taken"
        "    for _ in range(n):\n"
        "        pass\n"  # 3
        "    try:\n"
        "        return 0x1234 // n\n"
        "    except ZeroDivisionError:\n"
        "        return 0\n"  # 4
        "class Model:\n"
        "    def none(self):\n"  # 5
        "        pass\n"
        "    def text(self):\n"
        '        """Has no code."""\n'
        "sign(7)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = Entry("covered", "", "covered_text", "Model", regions=())
    assert [(b.line, b.function, b.taken) for b in instrument.blocks(entry)] == [
        (1, "sign", True), (4, "sign", True), (3, "sign", False), (6, "sign", True), (10, "sign", True),
        (12, "Model.none", True),
    ]  # fmt: skip
    instrument.load(entry)
    module = sys.modules["covered_text"]
    assert module.sign.__doc__ == "Doc."
    assert 0x1234 in getattr(module, instrument.WORDS)
    assert instrument.attach([module], bytearray(16)) == bytes([1, 1, 0, 0, 0, 0]), "by loading it"

    def reached(n: int) -> list[int]:
        cov = bytearray(16)
        assert len(instrument.attach([module], cov)) == 6
        module.sign(n)
        return [i for i, byte in enumerate(cov) if byte]

    assert reached(5) == [0, 1]
    assert reached(0) == [0, 2, 4]
    assert reached(-1) == [0, 2]
    with pytest.raises(Exception, match="sign"):
        raise RuntimeError(str(module.sign))


def test_a_traceback_names_the_lines_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bug = BUGS["value-not-checked"]
    bench = bench_of(plant(bug.device, bug.changes, "lines_rtc", tmp_path, monkeypatch))
    with pytest.raises(ValueError) as found:
        bench.run(input_of(bench.entry, bug.shown_by))
    text = (tmp_path / "lines_rtc.py").read_text().splitlines()
    ours = [e.lineno for e in found.traceback if e.path == tmp_path / "lines_rtc.py"]
    assert "monthrange(" in text[ours[-1]]


@pytest.mark.parametrize("packed", [False, True])
def test_a_driver_is_given_what_it_asked_for(packed: bool) -> None:
    entry = CATALOG["virtio-rng"]
    steps: list[Step] = []
    bench = bench_of(entry)
    bench.run(
        input_of(
            entry,
            f"restart 0x{8 if packed else 0:x} 2; chain 0 0 0 64 8 indirect; chain 0 0 0 16 0 plain; kick 0; "
            "chain 0 4 0 0 0 plain 61626364; kick 0",
        ),
        steps,
    )
    assert [[written for _, _, written in s.used] for s in steps] == [[], [], [], [72, 16], [], [], [0]]
    assert [sum(s.raised.values()) for s in steps] == [0, 0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("twist", [t.name.lower() for t in Twist if t > Twist.INDIRECT])
def test_a_chain_that_is_wrong_stops_the_device_until_it_starts_again(twist: str) -> None:
    entry = CATALOG["virtio-rng"]
    bench = bench_of(entry)
    steps: list[Step] = []
    lines = f"chain 0 4 0 64 0 {twist} 61626364; kick 0; read BAR0 0x14 1; "
    bench.run(input_of(entry, lines + "restart 0x0 4; chain 0 0 0 64 0 plain; kick 0"), steps)
    status = [s.value for s in steps if s.value is not None]
    assert status == [0x4F] or twist == "ring", hex(
        status[0]
    )  # a ring that is written is the guest's own doing
    assert [written for _, _, written in steps[-1].used] == [64]


VIRTIO = [name for name, e in CATALOG.items() if e.virtio is not None]


@pytest.mark.parametrize("name", VIRTIO)
def test_a_virtio_bench_finds_nothing_in_a_device_as_it_is_and_resets_as_new(name: str) -> None:
    entry = CATALOG[name]
    bench = bench_of(entry)
    fresh = bench.model.save()
    source = Mutator(entry, child.load(entry).TABLES, (), 1)
    data = source.fresh()
    for n in range(60):
        data = source.mutate(data, source.fresh())
        bench.reset()
        bench.run(data)
        if n % 20 == 0:
            bench.check(data)
    bench.reset()
    assert bench.model.save() == fresh


@pytest.mark.parametrize("packed", [False, True])
def test_what_follows_a_mark_is_what_followed_it_before(packed: bool) -> None:
    entry = CATALOG["virtio-rng"]
    first = input_of(entry, f"restart {8 if packed else 0:#x} 1")
    rest = input_of(entry, "chain 0 0 0 64 0 plain; kick 0; read BAR0 0x12 2; chain 0 0 0 5 0 plain; kick 0")
    bench = bench_of(entry)
    whole: list[Step] = []
    bench.run(first + rest, whole)
    bench.reset()
    bench.run(first)
    bench.mark(first)
    for _ in range(2):  # the second time from what the first has left
        steps: list[Step] = []
        bench.run(rest, steps)
        assert steps == whole[1:]
        bench.reset(first)
    assert [s.used for s in whole[1:]] == [
        [],
        [(0, whole[2].used[0][1], 64)],
        [],
        [],
        [(0, whole[5].used[0][1], 5)],
    ]


@pytest.mark.parametrize("name", VIRTIO)
def test_virtio_inputs_are_canonical_and_have_a_text(name: str) -> None:
    entry = CATALOG[name]
    source = Mutator(entry, child.load(entry).TABLES, (), 1)
    for _ in range(40):
        data = canonical(entry, source.mutate(source.fresh(), source.fresh()))
        rep = Rep(name, data, default_params(entry))
        assert canonical(entry, data) == data
        assert parse(to_text(rep)) == rep


def test_hypothesis_drives_the_same_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    survives(CATALOG["i8042"], 20)
    survives(CATALOG["virtio-rng"], 20)
    bug = BUGS["value-too-wide"]
    with pytest.raises(Finding) as found:
        survives(plant(bug.device, bug.changes, "hypothesis_i8042", tmp_path, monkeypatch), 200)
    assert found.value.kind == bug.kind
    (text,) = (line for line in found.value.__notes__ if line.startswith("vmrep 1 i8042"))
    assert len(list(records(parse(text).data))) == 2


def ran(device: str, lines: str) -> list[Step]:
    steps: list[Step] = []
    bench = bench_of(CATALOG[device])
    bench.run(input_of(CATALOG[device], lines), steps)
    return steps


def packet(op: Op, port: int, data: bytes = b"") -> str:
    header = HEADER.pack(3, HOST_CID, 1, port, len(data), TYPE_STREAM, op, 0, 1 << 18, 0)
    return f"chain 1 {HEADER.size} {len(data)} 0 0 plain {(header + data).hex()}; kick 1; "


def test_programs_of_the_host_call_are_called_and_hear_what_the_guest_sends() -> None:
    room = "chain 0 0 0 44 100 plain; kick 0; " * 4
    said = packet(Op.RW, 0, b"hi")
    assert ran("virtio-vsock", room + packet(Op.REQUEST, 0) + said)[-1].sent == b"hi"
    assert ran("virtio-vsock", room + packet(Op.REQUEST, 1) + said)[-1].sent == b"", "nobody listens there"
    call = f"input {b'CONNECT 1'.hex()}0a; " + packet(Op.RESPONSE, HOST_PORT)
    assert ran("virtio-vsock", room + call)[-1].sent == b"OK 1073741824\n"
    late = room + packet(Op.REQUEST, 2), packet(Op.RW, 2, b"hi")
    assert ran("virtio-vsock", "".join(late))[-1].sent == b"", "the program has not answered"
    assert ran("virtio-vsock", "input 00; ".join(late))[-1].sent == b"hi"


@pytest.mark.parametrize(("held", "status"), [("", 0), ("input 01; ", 15), ("input 01; input; ", 0)])
def test_a_back_end_stops_its_rings_when_it_likes(held: str, status: int) -> None:
    write_and_read = "write BAR0 0x14 1 0x0; read BAR0 0x14 1"
    assert ran("vhost-user-blk", held + write_and_read)[-1].value == status
    patience = "clock 10000000000; read BAR0 0x14 1"
    assert ran("vhost-user-blk", f"{held}{write_and_read}; {patience}")[-1].value == 0
