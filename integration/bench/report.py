"""What benchmarks find: figures and what they are held to, as a table, a plot, and with raw data as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Self


@dataclass(frozen=True)
class Result:
    """One figure: `value` in `unit`, the median of the rounds; a ratio has no unit.

    `spread` is its least and its greatest in a round, `raw` what each side had, a number per round or more.
    """

    name: str
    value: float
    spread: tuple[float, float]
    target: float
    better: Literal["lower", "higher"]
    unit: str = ""
    raw: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, name: str, rounds: Sequence[float], target: float, better: Literal["lower", "higher"], unit: str
    ) -> Self:
        """A figure by itself, which holds for machines like the one that it was measured on."""
        spread = min(rounds), max(rounds)
        return cls(name, statistics.median(rounds), spread, target, better, unit, {name: list(rounds)})

    @classmethod
    def ratio(
        cls,
        name: str,
        ours: Sequence[float],
        theirs: Sequence[float],
        target: float,
        better: Literal["lower", "higher"],
    ) -> Self:
        """Ours to theirs, measured in turn: a pair for each round.

        Raises:
            ValueError: they are not pairs.
        """
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        raw = {"ours": list(ours), "theirs": list(theirs)}
        spread = min(ratios), max(ratios)
        return cls(name, statistics.median(ratios), spread, target, better, raw=raw)

    @property
    def passed(self) -> bool:
        return self.value <= self.target if self.better == "lower" else self.value >= self.target

    @property
    def shares(self) -> tuple[float, float, float]:
        """The least, `value` and the greatest in shares of the target: 1 just passes, less is better."""
        low, high = self.spread
        if self.better == "lower":
            return low / self.target, self.value / self.target, high / self.target
        return self.target / high, self.target / self.value, self.target / low


def table(results: Sequence[Result]) -> str:
    """A line for each."""
    rows = []
    for r in results:
        bound = "at most" if r.better == "lower" else "at least"
        rows.append(
            (
                "pass" if r.passed else "MISS",
                r.name,
                f"{r.value:.3g} {r.unit}".rstrip(),
                f"({r.spread[0]:.3g}-{r.spread[1]:.3g})",
                f"{bound} {r.target:g} {r.unit}".rstrip(),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def plot(path: Path, machine: str, results: Sequence[Result]) -> None:
    """A row for each: the median between the rounds' extremes, beside its target; PNG or SVG by the suffix.

    Raises:
        ImportError: there is no matplotlib.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  optional

    figure = Figure(figsize=(10, 1.5 + 0.3 * len(results)), layout="constrained")
    axes = figure.subplots()
    for row, r in enumerate(results):
        low, middle, high = r.shares
        colour = "tab:green" if r.passed else "tab:red"
        axes.plot((low, high), (row, row), color=colour, linewidth=2)
        axes.plot(middle, row, "o", color=colour)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(results)), [r.name for r in results])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("share of the target: left of 1 passes")
    axes.set_title(machine, fontsize="small")
    figure.savefig(path)


def save(path: Path, machine: str, results: Iterable[Result]) -> None:
    """Raises OSError."""
    found = {"machine": machine, "results": [asdict(r) for r in results]}
    path.write_text(json.dumps(found, indent=1) + "\n")


def load(path: Path) -> list[Result]:
    """What `save` wrote.  Raises OSError."""
    return [Result(**{**r, "spread": tuple(r["spread"])}) for r in json.loads(path.read_text())["results"]]
