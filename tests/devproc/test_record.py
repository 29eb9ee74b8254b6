from __future__ import annotations

import pickle
from typing import ClassVar

import pytest

from devproc.record import record, replace


@record
class Base:
    kind: ClassVar[str] = "none"


@record
class Point(Base):
    kind = "point"
    x: int
    y: int = 0


@record
class Other(Base):
    x: int
    y: int = 0


@record
class Positive:
    value: int

    def __post_init__(self) -> None:
        if self.value <= 0:
            raise ValueError(f"{self.value}")


def test_fields_are_given_in_order_or_by_name_or_by_default() -> None:
    assert Point(1, 2) == Point(1, y=2) == Point(y=2, x=1)
    assert Point(1) == Point(1, 0)
    assert Point.__match_args__ == ("x", "y")  # type: ignore[attr-defined]
    assert repr(Point(1)) == "Point(x=1, y=0)"


@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {}), ((1, 2, 3), {}), ((1,), {"z": 2}), ((1,), {"x": 2}), ((), {"y": 2})]
)
def test_fields_missing_unknown_or_given_twice_are_refused(
    args: tuple[int, ...], kwargs: dict[str, int]
) -> None:
    with pytest.raises(TypeError, match="Point is made of x, y, not of"):
        Point(*args, **kwargs)


def test_records_of_different_kinds_differ() -> None:
    assert Point(1, 2) != Other(1, 2)
    assert Point(1, 2) != (1, 2)
    assert len({Point(1, 2), Point(1, 2), Point(2, 1)}) == 2


def test_a_record_does_not_change() -> None:
    point = Point(1)
    with pytest.raises(AttributeError):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del point.x
    assert replace(point, y=5) == Point(1, 5) != point
    with pytest.raises(TypeError):
        replace(point, z=5)


def test_a_record_checks_itself() -> None:
    with pytest.raises(ValueError):
        replace(Positive(1), value=0)


def test_a_record_can_be_pickled_and_matched() -> None:
    match pickle.loads(pickle.dumps(Point(3, 4))):
        case Point(x, y):
            assert (x, y) == (3, 4)
        case _:
            pytest.fail("not a Point")
