"""Values that do not change: `@record` is `@dataclass(frozen=True)` that costs next to nothing to import.

`dataclass` writes six functions for each class and has Python compile them.  That is 1 ms, and a start of a
VM makes some fifty such classes; here the functions close over the fields instead.  Left out: `field`, so a
default is one value for all; slots and order; `fields`, which `__match_args__` names.
"""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """Give `cls` what makes its annotated names, after those of its base, fields: `__init__` and its kin."""
    own = [name for name, kind in cls.__annotations__.items() if not kind.startswith("ClassVar")]
    names = (*getattr(cls, "__match_args__", ()), *own)
    defaults = {name: getattr(cls, name) for name in names if hasattr(cls, name)}
    check = getattr(cls, "__post_init__", None)

    def init(self: Any, /, *args: Any, **kwargs: Any) -> None:
        values = self.__dict__
        if len(args) == len(names) and not kwargs:
            values.update(zip(names, args, strict=True))
        else:
            given = dict(zip(names, args, strict=False), **kwargs)
            values.update({**defaults, **given})
            if len(given) != len(args) + len(kwargs) or values.keys() != set(names):
                raise TypeError(f"{cls.__name__} is made of {', '.join(names)}, not of {args} and {kwargs}")
        if check is not None:
            check(self)

    methods = {
        "__match_args__": names,
        "__init__": init,
        "__eq__": lambda self, other: vars(self) == vars(other) if type(other) is cls else NotImplemented,
        "__hash__": lambda self: hash(tuple([getattr(self, name) for name in names])),
        "__repr__": lambda self: (
            f"{cls.__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"
        ),
        "__setattr__": _frozen,
        "__delattr__": _frozen,
    }
    for name, method in methods.items():
        setattr(cls, name, method)
    return cls


def is_record(kind: Any) -> bool:
    """Whether `kind` is such a class."""
    return isinstance(kind, type) and kind.__setattr__ is _frozen


def replace(value: T, /, **changes: Any) -> T:
    """The record `value` with other values of some fields."""
    return type(value)(**{**vars(value), **changes})


def _frozen(self: Any, name: str, value: Any = None) -> NoReturn:
    raise AttributeError(f"cannot assign to or delete {name!r} of a {type(self).__name__}")
