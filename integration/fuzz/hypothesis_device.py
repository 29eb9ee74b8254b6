"""Fuzzes a device on a bench with hypothesis: `-m integration.fuzz.hypothesis_device DEVICE [EXAMPLES]`.

The same target and oracles as `vmsup fuzz`, without process, jail, wire and coverage.  Inputs are made of
what mutation inserts.  What is found hypothesis makes small, and its text is a note of the exception.
"""

from __future__ import annotations

import sys

from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st

from devproc import child
from devproc.catalog import CATALOG, Entry
from devproc.fuzz.bench import Bench, memory_of
from devproc.fuzz.inputs import Rep, canonical, default_params, to_text
from devproc.fuzz.mutate import Mutator

OPERATIONS_MAX = 16


def survives(entry: Entry, examples: int) -> None:
    """Raises what is wrong with the device if one of so many inputs shows it, for a small one."""
    params = entry.check_params(default_params(entry))
    model = child.load(entry)
    memory = memory_of(entry, params)
    bench = Bench(entry, model, params, memory=memory)
    some = st.sampled_from(Mutator(entry, model.TABLES, (), 1).snippets)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate, Phase.shrink),  # explaining traces every line
    )
    @given(st.lists(some, max_size=OPERATIONS_MAX))
    def one(snippets: list[bytes]) -> None:
        nonlocal bench
        data = canonical(entry, b"".join(snippets))
        note(to_text(Rep(entry.name, data, default_params(entry))))
        bench.reset()
        try:
            bench.run(data)
            bench.check(data)
        except Exception:
            bench = Bench(entry, model, params, memory=memory)
            raise

    one()


if __name__ == "__main__":
    survives(CATALOG[sys.argv[1]], int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
