"""devproc.regs: the table is checked when the class is defined, and then it is the device."""

from __future__ import annotations

from typing import Any

import pytest

from devproc.regs import INDEXED, Model, Register, Table, describe, digest, names_at
from devproc.wire import Space


def table(*registers: Register, size: int = 8, hole: int = 0xFF) -> Table:
    return Table(Space.PORT, size, registers, hole)


def constant(name: str, offset: int, **more: Any) -> Register:
    return Register(name, offset, "RO", "", "", stored=True, **more)


class Sample(Model):
    TABLES = (
        table(
            Register("KEPT", 0, "RW", "kept", "1", reset=0x81, mask=0x0F, stored=True),
            Register("CONST", 1, "RO", "constant", "1", reset=0x5A, stored=True),
            Register("BANKED_A", 2, "RW", "in bank A", "2", when="A", stored=True),
            Register("BANKED_B", 2, "RW", "in bank B", "2", when="B", stored=True),
            Register("LIVE", 3, "RO", "computed", "3"),
            Register("ORDER", 3, "WO", "command", "3"),
            Register("WIDE", 4, "RW", "wide", "4", size=2, reset=0x8000, mask=0x00FF, stored=True),
            Register("EVENTS", 6, "W1C", "events", "4", size=2, reset=0x0200, mask=0x00FF, stored=True),
        ),
        Table(
            INDEXED,
            2,
            (
                Register("PAIR0", 0, "RW", "grouped", "5", via="PAIR"),
                Register("PAIR1", 1, "RW", "grouped", "5", via="PAIR"),
            ),
        ),
    )

    def __init__(self) -> None:
        super().__init__()
        self.orders: list[int] = []
        self.wide: list[int] = []
        self.pair = [0x10, 0x20]

    def read_LIVE(self) -> int:
        return len(self.orders)

    def write_ORDER(self, data: int) -> None:
        self.orders.append(data)

    def write_WIDE(self, data: int) -> None:
        self.wide.append(data)

    def read_PAIR(self, offset: int) -> int:
        return self.pair[offset]

    def write_PAIR(self, offset: int, data: int) -> None:
        self.pair[offset] = data


@pytest.fixture
def sample() -> Sample:
    return Sample()


def test_a_stored_register_changes_only_its_writable_bits(sample: Sample) -> None:
    assert sample.read(0, 0, 1) == 0x81
    sample.write(0, 0, 1, 0x7E)
    assert sample.read(0, 0, 1) == 0x8E


def test_a_constant_cannot_be_written_and_the_try_is_counted(sample: Sample) -> None:
    sample.write(0, 1, 1, 0)
    assert sample.read(0, 1, 1) == 0x5A
    assert sample.counters()["unclaimed_writes"] == 1


def test_banks_share_an_offset(sample: Sample) -> None:
    sample.write(0, 2, 1, 0xAA)
    sample.select(0, "B")
    assert sample.read(0, 2, 1) == 0
    sample.write(0, 2, 1, 0xBB)
    sample.select(0, "A")
    assert sample.read(0, 2, 1) == 0xAA


def test_reads_and_writes_of_one_offset_can_be_different_registers(sample: Sample) -> None:
    sample.write(0, 3, 1, 0x1FF)
    assert sample.orders == [0xFF]
    assert sample.read(0, 3, 1) == 1


def test_a_group_of_registers_shares_a_handler(sample: Sample) -> None:
    sample.write(INDEXED, 1, 1, 0x33)
    assert [sample.read(INDEXED, i, 1) for i in range(2)] == [0x10, 0x33]


def test_a_wide_register_is_written_whole_or_by_bytes(sample: Sample) -> None:
    sample.write(0, 4, 2, 0x1234)
    assert sample.read(0, 4, 2) == 0x8034
    sample.write(0, 4, 1, 0x56)
    sample.write(0, 5, 1, 0x78)
    assert sample.read(0, 4, 2) == 0x8056
    assert [sample.read(0, 4, 1), sample.read(0, 5, 1)] == [0x56, 0x80]
    assert sample.wide == [0x1234, 0x8056, 0x7856]


def test_writing_one_clears_and_writing_a_byte_leaves_the_other(sample: Sample) -> None:
    sample.stored["EVENTS"] = 0x02FF
    sample.write(0, 6, 1, 0x0F)
    assert sample.read(0, 6, 2) == 0x02F0
    sample.write(0, 7, 1, 0xFF)
    assert sample.read(0, 6, 2) == 0x02F0
    sample.write(0, 6, 2, 0xFFFF)
    assert sample.read(0, 6, 2) == 0x0200


@pytest.mark.parametrize("size", [2, 4, 8])
def test_any_other_access_is_byte_accesses_at_successive_offsets(size: int) -> None:
    whole, bytewise = Sample(), Sample()
    data = 0x8877665544332211
    whole.write(0, 1, size, data)
    for i in range(size):
        bytewise.write(0, 1 + i, 1, data >> 8 * i)
    assert whole.stored == bytewise.stored
    assert whole.orders == bytewise.orders
    assert whole.read(0, 1, size) == sum(bytewise.read(0, 1 + i, 1) << 8 * i for i in range(size))


def test_an_access_past_the_end_floats_in_its_outer_bytes(sample: Sample) -> None:
    assert sample.read(0, 7, 4) == 0xFFFFFF02
    assert sample.read(0, (1 << 64) - 1, 8) == (1 << 64) - 1
    assert sample.read(Space.BAR5, 0, 1) == 0xFF
    sample.write(0, 7, 4, 0)
    assert sample.counters() == {"unclaimed_reads": 12, "unclaimed_writes": 3}


def test_the_hole_byte_is_the_tables() -> None:
    class Quiet(Model):
        TABLES = (table(hole=0x00),)

    assert Quiet().read(0, 2, 4) == 0


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ((0x80, 0x5A, 0, 0, 0x8000, 0x0200), None),
        ((0x80, 0x5A, 0, 0, 0x8000), "expected 6"),
        ((0x90, 0x5A, 0, 0, 0x8000, 0x0200), "KEPT"),
        ((0x01, 0x5A, 0, 0, 0x8000, 0x0200), "KEPT"),
        ((0x81, 0x5B, 0, 0, 0x8000, 0x0200), "CONST"),
        ((0x81, 0x5A, 0x100, 0, 0x8000, 0x0200), "BANKED_A"),
        ((0x81, 0x5A, 0, 0, 0x8000, 0x0000), "EVENTS"),
        ((-1, 0x5A, 0, 0, 0x8000, 0x0200), "KEPT"),
    ],
)
def test_stored_values_a_guest_cannot_have_made_are_refused(
    sample: Sample, values: tuple[int, ...], named: str | None
) -> None:
    if named is None:
        sample.check_stored(values)
        sample.restore_stored(values)
        assert sample.stored_values() == values
        return
    with pytest.raises(ValueError, match=named):
        sample.check_stored(values)


@pytest.mark.parametrize(
    ("registers", "said"),
    [
        ((Register("X", 0, "RO", "", ""),), "lacks read_X"),
        ((Register("X", 0, "WO", "", ""),), "lacks write_X"),
        ((Register("X", 0, "RW", "", "", via="G"),), "lacks read_G, write_G"),
        ((Register("X", 0, "RO", "", "", shadow=True),), "lacks read_X, shadow_X"),
        ((constant("X", 0, size=2, mask=0xFFFF, shadow=True),), "only a byte"),
        ((constant("X", 0, when="A", shadow=True),), "only a byte"),
        ((Register("X", 0, "RW", "", "", shadow=True),), "only a byte"),
        ((Register("X", 0, "RW", "", "", stored=True, run=True),), "takes runs"),
        ((Register("X", 0, "WO", "", "", size=2, run=True),), "takes runs"),
        ((constant("X", 8),), "outside"),
        ((constant("X", 7, size=2),), "outside"),
        ((constant("X", 0, mask=0x100),), "wider"),
        ((constant("X", 0), constant("X", 1)), "same name"),
        ((constant("X", 0), constant("Y", 0)), "both read"),
        ((constant("X", 0), constant("Y", 0, when="A")), "both read"),
    ],
)
def test_a_wrong_table_fails_when_the_class_is_defined(registers: tuple[Register, ...], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        type("Wrong", (Model,), {"TABLES": (table(*registers),)})


@pytest.mark.parametrize("handler", ["read_KEPT", "write_KEPT", "write_KEPTT", "read_X"])
def test_a_handler_that_no_register_uses_fails_when_the_class_is_defined(handler: str) -> None:
    body = {"TABLES": (table(constant("KEPT", 0)),), handler: lambda self: 0}
    with pytest.raises(TypeError, match=handler):
        type("Wrong", (Model,), body)


def test_the_digest_follows_the_table() -> None:
    def model(reset: int) -> type[Model]:
        class One(Model):
            TABLES = (table(constant("X", 0, reset=reset)),)

        return One

    assert digest(model(1)) == digest(model(1))
    assert digest(model(1)) != digest(model(2))
    assert len(digest(Sample)) == 32


def test_names_at_says_what_an_access_may_mean() -> None:
    assert names_at(Sample, 0, 2, write=True) == "BANKED_A|BANKED_B"
    assert names_at(Sample, 0, 3, write=False) == "LIVE"
    assert names_at(Sample, 0, 3, write=True) == "ORDER"
    assert names_at(Sample, 0, 5, write=False) == "WIDE"
    assert names_at(Sample, 0, 99, write=False) == "?"


def test_describe_shows_every_register_once() -> None:
    text = describe(Sample)
    assert text.count("BANKED_B") == 1
    assert "[B]" in text
    assert "0x8000" in text
    assert "behind the index register" in text
