"""devproc.state: what is packed comes back, and nothing else comes in."""

from __future__ import annotations

import json
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devproc import state
from devproc.record import record
from devproc.state import I64, U8, Length


@record
class Inner:
    level: bool
    value: U8


@record
class Outer:
    fifo: Annotated[bytes, Length(0, 4)]
    due_ns: I64 | None
    pair: Annotated[tuple[Inner, ...], Length(2, 2)]

    def __post_init__(self) -> None:
        if self.due_ns == 13:
            raise ValueError("13 is refused")


inners = st.builds(Inner, st.booleans(), st.integers(0, 255))
outers = st.builds(
    Outer,
    st.binary(max_size=4),
    st.none() | st.integers(14, 1 << 60),
    st.tuples(inners, inners),
)


@given(outers)
def test_what_is_packed_comes_back(outer: Outer) -> None:
    assert state.unpack(Outer, state.pack(outer)) == outer


@given(st.binary(max_size=64))
def test_any_bytes_give_a_state_or_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        state.unpack(Outer, data)


GOOD = json.loads(state.pack(Outer(b"\x01", None, (Inner(True, 1), Inner(False, 2)))))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fifo": "zz"}, "hexadecimal"),
        ({"fifo": 1}, "fifo"),
        ({"fifo": "0102030405"}, "fifo"),
        ({"due_ns": 1 << 63}, "due_ns"),
        ({"due_ns": True}, "due_ns"),
        ({"due_ns": 1.0}, "due_ns"),
        ({"due_ns": 13}, "13 is refused"),
        ({"pair": []}, "pair"),
        ({"pair": "ab"}, "pair"),
        ({"pair": [{"level": 1, "value": 1}, {"level": True, "value": 1}]}, "level"),
        ({"pair": [{"level": True}, {"level": True, "value": 1}]}, "exactly the fields"),
        ({"extra": 1}, "exactly the fields"),
    ],
)
def test_a_wrong_field_is_refused_by_name(change: dict[str, object], named: str) -> None:
    bad = {"Outer": GOOD["Outer"] | change}
    with pytest.raises(ValueError, match=named):
        state.unpack(Outer, json.dumps(bad).encode())


def test_another_kinds_state_is_refused() -> None:
    with pytest.raises(ValueError, match="not a saved Outer"):
        state.unpack(Outer, state.pack(Inner(True, 1)))


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(ValueError):
        state.unpack(Outer, b"[" * 50000)


def test_an_invalid_state_is_not_packed() -> None:
    with pytest.raises(ValueError, match="value"):
        state.pack(Inner(True, 256))
