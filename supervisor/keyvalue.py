"""The `key=value,...` form of options that describe one thing (crosvm's words, README.md).

The first key's name may be omitted, a bare boolean is true, a value with a comma may stand in double
quotes, unknown keys are refused with the known ones listed.  The same `Key`s check the tables of
`--config vm.toml`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from devproc.record import record
from kvmcore.errors import ConfigError

Value = str | int | bool

_NAME = "[A-Za-z][A-Za-z0-9_-]*"
_ITEM = re.compile(
    rf'(?:(?P<key>{_NAME})=|(?!{_NAME}=))(?P<value>"(?:[^"\\]|\\.)*"|(?!")[^,]*)(?P<end>,|$)', re.S
)
_TRUE, _FALSE = ("true", "on", "1"), ("false", "off", "0")


@record
class Key:
    """One key: its type, its range (integers) or its choices (strings)."""

    name: str
    type: type[str] | type[int] | type[bool] = str
    low: int = 0
    high: int = (1 << 63) - 1
    choices: tuple[str, ...] = ()

    def check(self, where: str, value: object) -> Value:
        """`value` (from TOML, or text from a command line) as this key's type.

        Raises:
            ConfigError: it is not one; the text names `where` and the key.
        """
        at = f"{where}: {self.name}"
        if self.type is bool:
            if isinstance(value, str):
                value = True if value in _TRUE else False if value in _FALSE else value
            if not isinstance(value, bool):
                raise ConfigError(f"{at}: expected true or false, not {value!r}")
            return value
        if self.type is int:
            if isinstance(value, str):
                try:
                    value = int(value, 0)
                except ValueError:
                    raise ConfigError(f"{at}: expected an integer, not {value!r}") from None
            if type(value) is not int or not self.low <= value <= self.high:
                raise ConfigError(f"{at}: expected an integer from {self.low} to {self.high}, not {value!r}")
            return value
        if not isinstance(value, str) or not value or "\0" in value:
            raise ConfigError(f"{at}: expected a non-empty string, not {value!r}")
        if self.choices and value not in self.choices:
            raise ConfigError(f"{at}: expected one of {', '.join(self.choices)}, not {value!r}")
        return value


def check_table(where: str, keys: Sequence[Key], table: Mapping[str, object]) -> dict[str, Value]:
    """The values of `table`, each checked by its key.

    Raises:
        ConfigError: an unknown key or a bad value.
    """
    known = {k.name: k for k in keys}
    for name in table:
        if name not in known:
            raise ConfigError(f"{where}: unknown key {name!r}, expected one of {', '.join(known)}")
    return {name: known[name].check(where, value) for name, value in table.items()}


def parse(where: str, keys: Sequence[Key], text: str) -> dict[str, Value]:
    """The values in `text`, a `key=value,...` list.

    Raises:
        ConfigError: an unknown, repeated or valueless key, or a bad value.
    """
    known = {k.name: k for k in keys}
    found: dict[str, object] = {}
    at = 0
    while at < len(text):
        m = _ITEM.match(text, at)
        if m is None:
            raise ConfigError(f"{where}: cannot read {text[at:]!r}, expected key=value")
        name, value = m["key"], m["value"]
        if name is None:
            if value in known and known[value].type is bool:
                name, value = value, "true"
            elif at == 0:
                name = keys[0].name
            else:
                raise ConfigError(f"{where}: {value!r} has no value, expected {', '.join(known)} (key=value)")
        if value.startswith('"'):
            value = re.sub(r"\\(.)", r"\1", value[1:-1])
        if name in found:
            raise ConfigError(f"{where}: {name} given twice")
        found[name] = value
        if m.end() == len(text) and m["end"] == ",":
            raise ConfigError(f"{where}: ends with a comma")
        at = m.end()
    return check_table(where, keys, found)
