"""Device state as validated dataclasses: `pack` to bytes, `unpack` checking every value.

A state is a frozen dataclass whose field types say what is allowed: bool, an `Annotated` int with a
`Range`, `Annotated` bytes or tuple with a `Length`, another such dataclass, or one of these `| None`.
Relations between fields belong in `__post_init__`, which raises ValueError.  The encoding is JSON (bytes
as hexadecimal) with every field present by name, so a saved state can be read and compared as text.
Left out: versions; a field added or removed makes older states invalid, on purpose.
"""

from __future__ import annotations

import json
import types
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Final, TypeVar, get_args, get_origin, get_type_hints


@dataclass(frozen=True, slots=True)
class Range:
    """An int lies in [low, high]."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
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
    """The bytes of a state dataclass.

    Raises:
        ValueError: a field is not what its type says: a bug of the model, found before it is saved.
    """
    check(state)
    return json.dumps({type(state).__name__: _plain(state)}, separators=(",", ":")).encode()


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
    state: T = _build(cls, top[cls.__name__], cls.__name__)
    return state


def check(state: Any) -> None:
    """Check every field of a state dataclass against its type.

    Raises:
        ValueError: naming the field.
    """
    cls = type(state)
    _build(cls, _plain(state), cls.__name__)


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value` (as JSON gives it) as a `kind`; `where` names it in errors."""
    if isinstance(kind, type) and is_dataclass(kind):
        hints = _hints(kind)
        if type(value) is not dict or value.keys() != hints.keys():
            raise ValueError(f"{where}: expected exactly the fields {', '.join(hints)}")
        built = {name: _build(hint, value[name], f"{where}.{name}") for name, hint in hints.items()}
        return kind(**built)
    if kind is bool:
        if type(value) is not bool:
            raise ValueError(f"{where}: expected true or false")
        return value
    if get_origin(kind) is types.UnionType or _NONE in get_args(kind):
        if value is None:
            return None
        (kind,) = (k for k in get_args(kind) if k is not _NONE)
        return _build(kind, value, where)
    base, limit = get_args(kind)
    if isinstance(limit, Range):
        if type(value) is not int or not limit.low <= value <= limit.high:
            raise ValueError(f"{where}: expected an integer in [{limit.low}, {limit.high}]")
        return value
    built_value: bytes | tuple[Any, ...]
    if base is bytes:
        if type(value) is not str:
            raise ValueError(f"{where}: expected hexadecimal")
        built_value = bytes.fromhex(value)
    else:
        if type(value) is not list:
            raise ValueError(f"{where}: expected a list")
        (element, _) = get_args(base)
        built_value = tuple(_build(element, v, f"{where}[{i}]") for i, v in enumerate(value))
    if not limit.low <= len(built_value) <= limit.high:
        raise ValueError(f"{where}: expected {limit.low} to {limit.high} elements")
    return built_value
