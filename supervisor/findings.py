"""What fuzzing found: told apart, made small, and kept in crashes/KEY.

A key begins with libFuzzer's name for the sort of thing it is: crash, timeout or oom.  What follows tells
findings apart: the kind of oracle, the exception and the innermost frames, or the system call.  In the
directory are `input` (bytes), `input.vmrep` (text), `report.json`, and `repro.py`, which shows it without a
jail.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from devproc import jail
from devproc.catalog import Entry
from devproc.fuzz.inputs import RECORD, Op, Record, Rep, encode, records, to_text
from devproc.wire import Scalar

FOUND: Final = {"crash": 77, "oom": 71, "timeout": 70}
"""libFuzzer's exit code by the sort of finding, the worst first."""
COMPARED: Final = ("disagree", "transport")
"""Kinds that show only where a device is compared with another process of it."""
_SORTS: Final = {"hang": "timeout", "growth": "oom"}
_TEXT_MAX: Final = 1000
_FRAMES_MAX: Final = 20
_SLOW_TRIES: Final = 40  # to make smaller what costs a process each time

Verdicts = Callable[[Sequence[bytes]], list["Finding | None"]]


@dataclass(frozen=True)
class Finding:
    """What is wrong with an input.

    Attributes:
        kind: the oracle, as devproc/fuzz/finding.py has them.
        why: one line.
        frames: "module:line function", the innermost first.
        key: the same for what is the same.
    """

    kind: str
    why: str
    frames: tuple[str, ...]
    key: str

    @classmethod
    def of(cls, kind: str, why: str) -> Self:
        """One that was seen from outside the process: by its kind, and for a refused call by which one."""
        told = why.partition("(")[0] if kind == "violation" else ""
        return cls(kind, why, (), hashlib.sha256(f"{kind}\n{told}".encode()).hexdigest()[:16])

    @classmethod
    def told(cls, item: Any) -> Self | None:
        """One as `executor.describe` gives it, or None; the process that tells it is not trusted."""
        if type(item) is not dict:
            return None
        frames = tuple(str(f)[:_TEXT_MAX] for f in list(item.get("frames", ()))[:_FRAMES_MAX])
        key = "".join(c for c in str(item.get("key", "")) if c in "0123456789abcdef")[:16]
        return cls(str(item.get("kind", ""))[:32], str(item.get("why", ""))[:_TEXT_MAX], frames, key)

    @property
    def sort(self) -> str:
        """libFuzzer's word."""
        return _SORTS.get(self.kind, "crash")

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.sort}-{self.key}"


class Findings:
    """The directory they are kept in."""

    def __init__(self, entry: Entry, params: tuple[Scalar, ...], where: Path, mode: jail.Mode) -> None:
        self._entry = entry
        self._params = params
        self._where = where
        self._mode = mode

    def keep(self, finding: Finding, data: bytes, verdicts: Verdicts) -> Finding:
        """Make `data` small and write it down; returns the finding as the small input shows it.

        `verdicts` says what is wrong with each of some inputs, as often as it is asked.
        """
        data = minimised(data, finding, verdicts)
        shown = verdicts([data])[0]
        if shown is not None and shown.key == finding.key:
            finding = shown
        rep = Rep(self._entry.name, data, self._params)
        where = self._where / finding.name
        where.mkdir(parents=True, exist_ok=True)
        (where / "input").write_bytes(data)
        (where / "input.vmrep").write_text(to_text(rep))
        report = {
            "device": self._entry.name,
            "key": finding.key,
            "kind": finding.kind,
            "why": finding.why,
            "frames": finding.frames,
            "operations": len(data) // RECORD.size,
            "jail": self._mode.value,
            "python": platform.python_version(),
            "kernel": platform.release(),
        }
        (where / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        (where / "repro.py").write_text(_REPRO.format(why=finding.why.replace('"', "'")))
        return finding


_REPRO: Final = '''"""Shows {why!r:.200}, without a jail: python repro.py"""

from pathlib import Path

from devproc import child
from devproc.catalog import CATALOG
from devproc.fuzz.bench import Bench
from devproc.fuzz.inputs import parse

rep = parse(Path(__file__).with_name("input.vmrep").read_text())
entry = CATALOG[rep.device]
params = entry.check_params(rep.params)
bench = Bench(entry, child.load(entry), params, rep.clock_ns, rep.wall_ns)
bench.run(rep.data)
bench.check(rep.data)
print("nothing found")
'''


def minimised(data: bytes, finding: Finding, verdicts: Verdicts) -> bytes:
    """The smallest input found that still shows `finding`: fewer operations, then smaller values.

    An input that does not show it when it is tried again stays as it is.
    """
    batch = 1 if finding.kind in ("hang", "died", "violation", *COMPARED) else 64
    tries = _SLOW_TRIES if batch == 1 else 100_000

    def first(candidates: list[bytes]) -> bytes | None:
        nonlocal tries
        for start in range(0, len(candidates), batch):
            if tries <= 0:
                return None
            some = candidates[start : start + batch]
            tries -= len(some)
            for candidate, verdict in zip(some, verdicts(some), strict=True):
                if verdict is not None and verdict.key == finding.key:
                    return candidate
        return None

    size = max(len(data) // RECORD.size // 2, 1)
    while True:
        step = size * RECORD.size
        shorter = first([data[:at] + data[at + step :] for at in range(0, len(data), step)][::-1])
        if shorter is not None:
            data = shorter
        elif size == 1:
            break
        else:
            size //= 2
    while (simpler := first(_simpler(data))) is not None:
        data = simpler
    return data


def _simpler(data: bytes) -> list[bytes]:
    """Inputs like `data` but for one value, which is simpler."""
    items = list(records(data))
    found = []
    for n, r in enumerate(items):
        for less in _less(r):
            found.append(encode([*items[:n], less, *items[n + 1 :]]))
    return found


def _less(r: Record) -> list[Record]:
    values = {0, 1, r.data >> 32, r.data >> 8, r.data & 0xFFFFFFFF, r.data & 0xFF, r.data & (r.data - 1)}
    if r.op == Op.READ:
        values = {r.data}
    elif r.op == Op.REPEAT:
        values -= {0}
    less = [r._replace(data=v) for v in sorted(values) if v < r.data]
    if r.op in (Op.READ, Op.WRITE) and r.size > 1:
        half = r.size // 2
        less.append(r._replace(size=half, data=r.data & ((1 << 8 * half) - 1)))
    return less
