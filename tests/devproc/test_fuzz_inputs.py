"""Inputs: any bytes are one, and text and records hold the same."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from devproc.catalog import CATALOG
from devproc.fuzz.inputs import (
    RECORD,
    RECORDS_MAX,
    STIMULI,
    Gave,
    InputError,
    Op,
    Record,
    Rep,
    canonical,
    chunks,
    default_params,
    encode,
    parse,
    records,
    to_text,
)
from devproc.wire import Space

NAMES = ("serial", "rtc", "i8042", "pit", "pci-host", "acpi-pm", "pvpanic", "virtio-net")
relaxed = settings(max_examples=60, deadline=None)
# Mostly operations that exist, so that what is kept is not mostly nothing.
some_records = st.lists(
    st.builds(
        Record,
        st.sampled_from(list(Op)) | st.integers(0, 255),
        st.integers(0, 9),
        st.integers(0, 9),
        st.integers(0, 2),
        st.integers(0, 20) | st.integers(0, (1 << 32) - 1),
        st.integers(0, 300) | st.integers(0, (1 << 64) - 1),
    ),
    max_size=30,
).map(encode)


def rep(name: str, data: bytes) -> Rep:
    return Rep(name, data, default_params(CATALOG[name]))


@pytest.mark.parametrize("name", NAMES)
@relaxed
@example(data=encode([*chunks(b"none"), Record(Op.GAVE, 0, Gave.NUMBER, 0, 0, 1)]), recorded=True)
@given(data=some_records | st.binary(max_size=200), recorded=st.booleans())
def test_any_bytes_are_an_input_that_its_text_gives_back(name: str, data: bytes, recorded: bool) -> None:
    entry = CATALOG[name]
    kept = canonical(entry, data, recorded=recorded)
    assert canonical(entry, kept, recorded=recorded) == kept
    assert parse(to_text(rep(name, kept))) == rep(name, kept)


@pytest.mark.parametrize("name", NAMES)
@relaxed
@given(data=some_records)
def test_every_access_of_an_input_lies_in_the_device(name: str, data: bytes) -> None:
    sizes = {int(r.space): r.size for r in CATALOG[name].regions}
    for r in records(canonical(CATALOG[name], data)):
        if r.op in (Op.READ, Op.WRITE):
            assert r.offset + r.size <= sizes[r.space]
            assert r.data >> 8 * r.size == 0


def test_what_says_how_a_device_answered_is_no_part_of_an_input_for_fuzzing() -> None:
    recorded = [
        Record(Op.READ, Space.PORT, 1, 1, 5, 0x60),
        Record(Op.RAISED, aux=0, data=1),
        *chunks(b"ok"),
        Record(Op.SENT),
    ]
    kept = list(records(canonical(CATALOG["serial"], encode(recorded))))
    assert kept[0] == Record(Op.READ, Space.PORT, 1, 0, 5, 0)
    assert all(r.op in STIMULI for r in kept)


def test_a_device_gets_nothing_that_it_has_no_port_for() -> None:
    everything = encode([*chunks(b"typed"), Record(Op.INPUT), Record(Op.CLOCK, data=1), Record(Op.SAVE)])
    assert list(records(canonical(CATALOG["i8042"], everything))) == [Record(Op.SAVE)]


def test_an_input_for_fuzzing_is_bounded_and_a_recording_is_not() -> None:
    data = encode([Record(Op.SAVE)] * (RECORDS_MAX + 5))
    assert len(canonical(CATALOG["pit"], data)) == RECORDS_MAX * RECORD.size
    assert len(canonical(CATALOG["pit"], data, recorded=True)) == len(data)


def test_the_text_reads_as_the_module_says() -> None:
    text = (
        "vmrep 1 serial clock=5 wall=-7\n"
        "write PORT 0x1 1 0x5\n"
        "read PORT 0x2 1 = 0xc1\n"
        "read PORT 0x5 1\n"
        "clock 1000000\n"
        "input 6869\n"
        "room 16\n"
        "repeat 100\n"
        "save\n"
        "raised irq 1\n"
        "sent 6f6b\n"
    )
    read = parse(text)
    assert (read.clock_ns, read.wall_ns) == (5, -7)
    assert to_text(read) == text
    assert parse("# a comment\n\n" + text.replace("save", "save  # here")) == read


def test_bytes_from_the_host_longer_than_a_record_stay_together() -> None:
    text = "vmrep 1 serial clock=0 wall=0\ninput " + bytes(range(21)).hex() + "\n"
    assert [r.size for r in records(parse(text).data)] == [8, 8, 5, 0]
    assert to_text(parse(text)) == text


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("write PORT 0x8 1 0x0", "line 2: serial cannot be given"),
        ("write PORT 0x0 1 0x100", "line 2: serial cannot be given"),
        ("write PORT 0x0 3 0x0", "line 2: serial cannot be given"),
        ("write CONFIG 0x0 1 0x0", "line 2: serial cannot be given"),
        ("read PORT 0x0 1 = ", "line 2: expected: read"),
        ("read PORT 0x0", "line 2: cannot read"),
        ("wall 5", "line 2: serial cannot be given"),
        ("clock -1", "line 2: serial cannot be given"),
        ("raised dma 1", "line 2: cannot read"),
        ("save now", "line 2: cannot read"),
        ("jump", "line 2: cannot read"),
    ],
)
def test_a_line_that_is_wrong_is_named(line: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        parse(f"vmrep 1 serial clock=0 wall=0\n{line}\n")


@pytest.mark.parametrize(
    "head",
    ["", "vmrep 2 serial clock=0 wall=0", "vmrep 1 floppy clock=0 wall=0", "vmrep 1 rtc clock=0 wall=0"],
)
def test_a_head_that_is_wrong_is_named(head: str) -> None:
    with pytest.raises(InputError, match="line 1"):
        parse(head)
