"""What is wrong with a policy, and where: one diagnostic per finding, with a caret."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Place(NamedTuple):
    """Where something stands in a policy file: `line` and `column` count from 1, `width` in characters."""

    file: str
    line: int
    column: int = 1
    width: int = 1
    text: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class Diagnostic(NamedTuple):
    """One finding at one place."""

    place: Place
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"

    def render(self) -> str:
        """The finding, the line it is about, and carets below the offending part."""
        # The indent repeats the line's own tabs, so that the caret stands below its column.
        indent = "".join(c if c == "\t" else " " for c in self.place.text[: self.place.column - 1])
        return f"{self}\n    {self.place.text}\n    {indent}{'^' * self.place.width}"


class PolicyError(Exception):
    """A policy cannot be used; `diagnostics` says everything that is wrong, the text is the first of it."""

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        super().__init__(str(diagnostics[0]))
        self.diagnostics = tuple(diagnostics)
