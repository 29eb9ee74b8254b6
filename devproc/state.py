"""Device state as validated records: `pack` to bytes, `unpack` checking every value.

A state is a record whose field types say what is allowed: bool, an `Annotated` int with a
`Range`, `Annotated` bytes or tuple with a `Length`, another such record, or one of these `| None`.
Relations between fields belong in `__post_init__`, which raises ValueError.  The encoding is JSON (bytes
as hexadecimal) with every field present by name, so a saved state can be read and compared as text.
Left out: versions; a field added or removed makes older states invalid, on purpose.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Final, TypeVar, get_args, get_origin, get_type_hints

from devproc.record import is_record, record


@record
class Range:
    """An int lies in [low, high]."""

    low: int
    high: int


@record
class Length:
    """Bytes or a tuple have between `low` and `high` elements."""

    low: int
    high: int


U3 = Annotated[int, Range(0, 7)]
U8 = Annotated[int, Range(0, 0xFF)]
U16 = Annotated[int, Range(0, 0xFFFF)]
I64 = Annotated[int, Range(-(1 << 63), (1 << 63) - 1)]  # nanoseconds: 292 years either way
U64 = Annotated[int, Range(0, (1 << 64) - 1)]

T = TypeVar("T")

_NONE: Final = type(None)


def pack(state: Any) -> bytes:
    """The bytes of a state.

    Raises:
        ValueError: a field is not what its type says: a bug of the model, found before it is saved.
    """
    plain = _checked(state)
    return json.dumps({type(state).__name__: plain}, separators=(",", ":")).encode()


def unpack(cls: type[T], data: bytes) -> T:
    """The `cls` in `data`.

    Raises:
        ValueError: `data` is not exactly one valid `cls`.
    """
    try:
        top = json.loads(data.decode())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not a saved state: {type(e).__name__}") from None
    if type(top) is not dict or list(top) != [cls.__name__]:
        raise ValueError(f"not a saved {cls.__name__}")
    kind: Any = cls
    state: T = _builder(kind)(top[cls.__name__], cls.__name__)
    return state


@cache
def prepare(model: type[Any]) -> None:
    """Find out now what `pack` and `unpack` must know of a model's states: its modules' own ...State."""
    for base in model.__mro__:
        for name, kind in vars(sys.modules[base.__module__]).items():
            if name.endswith("State") and kind.__module__ == base.__module__:
                _builder(kind)


def check(state: Any) -> None:
    """Check every field of a state against its type.

    Raises:
        ValueError: naming the field.
    """
    _checked(state)


def _checked(state: Any) -> Any:
    cls: Any = type(state)
    plain = _plain(state)
    _builder(cls)(plain, cls.__name__)
    return plain


def _plain(value: Any) -> Any:
    kind: Any = type(value)
    if kind is int or kind is bool:
        return value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if is_record(kind):
        return {name: _plain(getattr(value, name)) for name in kind.__match_args__}
    return value


_Builder = Callable[[Any, str], Any]
"""A value (as JSON gives it) as one of its kind; the text names it in errors."""


@cache
def _builder(kind: Any) -> _Builder:
    """What builds a `kind`: found out once, because a state is saved and restored for each that is fuzzed."""
    if is_record(kind):
        return _of_fields(kind)
    if kind is bool:
        return _bool
    if get_origin(kind) is types.UnionType or _NONE in get_args(kind):
        (some,) = (_builder(k) for k in get_args(kind) if k is not _NONE)
        return lambda value, where: None if value is None else some(value, where)
    base, limit = get_args(kind)
    if isinstance(limit, Range):
        return _of_range(limit)
    return _of_length(_hex if base is bytes else _of_elements(get_args(base)[0]), limit)


def _of_fields(kind: type[Any]) -> _Builder:
    builders = {name: _builder(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}

    def build(value: Any, where: str) -> Any:
        if type(value) is not dict or value.keys() != builders.keys():
            raise ValueError(f"{where}: expected exactly the fields {', '.join(builders)}")
        return kind(*[b(value[name], f"{where}.{name}") for name, b in builders.items()])

    return build


def _bool(value: Any, where: str) -> Any:
    if type(value) is not bool:
        raise ValueError(f"{where}: expected true or false")
    return value


def _of_range(limit: Range) -> _Builder:
    low, high = limit.low, limit.high

    def build(value: Any, where: str) -> Any:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{where}: expected an integer in [{low}, {high}]")
        return value

    return build


def _hex(value: Any, where: str) -> Any:
    if type(value) is not str:
        raise ValueError(f"{where}: expected hexadecimal")
    return bytes.fromhex(value)


def _of_elements(kind: Any) -> _Builder:
    one = _builder(kind)

    def build(value: Any, where: str) -> Any:
        if type(value) is not list:
            raise ValueError(f"{where}: expected a list")
        return tuple([one(v, f"{where}[{i}]") for i, v in enumerate(value)])

    return build


def _of_length(whole: _Builder, limit: Length) -> _Builder:
    def build(value: Any, where: str) -> Any:
        built = whole(value, where)
        if not limit.low <= len(built) <= limit.high:
            raise ValueError(f"{where}: expected {limit.low} to {limit.high} elements")
        return built

    return build
