"""Only here because setuptools cannot yet name extensions in pyproject.toml."""

from setuptools import Extension, setup


def extension(name: str, *headers: str) -> Extension:
    """A type of a device process, in C; `headers` are what the file includes."""
    return Extension(
        f"devproc.{name}",
        [f"devproc/{name}.c"],
        depends=[*headers],
        py_limited_api=True,
        define_macros=[("Py_LIMITED_API", "0x030b0000"), ("_FORTIFY_SOURCE", "2")],
        extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fstack-protector-strong"],
    )


setup(
    cffi_modules=["kvmcore/_build.py:ffibuilder"],
    ext_modules=[
        extension("_mailbox", "kvmcore/_mailbox.h"),
        extension("_ring", "devproc/_ring.h", "devproc/_batch.h", "devproc/_frames.h"),
    ],
)
