"""Fuzzes devproc/wire.py with Atheris, which is libFuzzer for Python: `atheris_wire.py [OPTIONS] CORPUS`.

msgpack's C extension shows the fuzzer no coverage, so each frame also goes through msgpack's own Python
implementation: that guides, and is not believed in anything else.
"""

from __future__ import annotations

import contextlib
import sys

import atheris

with atheris.instrument_imports(include=["devproc.wire", "msgpack.fallback"]):
    from msgpack import fallback

    from integration.fuzz.wire import check


def one(frame: bytes) -> None:
    with contextlib.suppress(Exception):
        fallback.unpackb(frame, use_list=False, max_map_len=0, max_ext_len=0)
    check(frame)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
