"""Builds `kvmcore._core` from _core.c through cffi's API mode; setup.py points here.

The extension uses only Python's stable ABI (abi3), so one build serves every Python from 3.11 on.
"""

from pathlib import Path

from cffi import FFI

_HEADER = Path(__file__).with_name("_core.h").read_text(encoding="ascii")

ffibuilder = FFI()
ffibuilder.cdef("\n".join(line for line in _HEADER.splitlines() if not line.startswith("#include")))
ffibuilder.set_source(
    "kvmcore._core",
    '#include "_core.c"',
    include_dirs=["kvmcore"],
    depends=["kvmcore/_core.c", "kvmcore/_core.h", "kvmcore/_mailbox.h"],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fstack-protector-strong", "-pthread"],
    define_macros=[("_FORTIFY_SOURCE", "2")],
)
