"""`python -m devproc.show NAME`: a device's page, as text: ports it holds, registers, threats.

`vmsup device show` runs this as a process of its own, because the supervisor never loads device code.
"""

from __future__ import annotations

import importlib
import inspect
import sys

from devproc.catalog import CATALOG
from devproc.regs import describe


def page(name: str) -> str:
    """The page of the catalogue entry `name`.

    Raises:
        KeyError: there is no such entry.
    """
    entry = CATALOG[name]
    model = getattr(importlib.import_module(entry.module), entry.model)
    ports = [f"  {d.name} ({d.kind}): {d.meaning}" for d in entry.descriptors]
    params = [f"  {p.name} in [{p.low}, {p.high}]: {p.meaning}" for p in entry.params]
    parts = [f"{entry.name}: {entry.summary}", describe(model), inspect.getdoc(model) or ""]
    if ports:
        parts.insert(1, "descriptors:\n" + "\n".join(ports))
    if params:
        parts.insert(-2, "parameters:\n" + "\n".join(params))
    return "\n\n".join(parts)


def main(arguments: list[str]) -> int:
    """Print the page, or on a wrong name the known ones; returns the exit code."""
    if len(arguments) != 1 or arguments[0] not in CATALOG:
        sys.stderr.write(f"usage: python -m devproc.show {'|'.join(sorted(CATALOG))}\n")
        return 2
    sys.stdout.write(page(arguments[0]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
