"""Fuzzes a device on a bench with Atheris: `atheris_device.py DEVICE [OPTIONS] CORPUS`.

The same target as `vmsup fuzz`, without process, jail and wire, guided by another coverage and another
mutator: something to compare with.  What it finds `vmsup fuzz replay --device DEVICE` shows again.
"""

from __future__ import annotations

import sys

import atheris

from devproc import child
from devproc.catalog import CATALOG
from devproc.fuzz import instrument
from devproc.fuzz.bench import Bench, memory_of
from devproc.fuzz.inputs import canonical, default_params

if __name__ == "__main__":
    name = sys.argv.pop(1)
    entry = CATALOG[name]
    with atheris.instrument_imports(include=list(instrument.modules(entry))):
        model = child.load(entry)
    params = entry.check_params(default_params(entry))
    bench = Bench(entry, model, params, memory=memory_of(entry, params))

    def one(data: bytes) -> None:
        bench.reset()
        bench.run(canonical(entry, data))

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
