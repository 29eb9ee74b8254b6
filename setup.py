"""Only here because setuptools cannot yet name extensions in pyproject.toml."""

from setuptools import Extension, setup

setup(
    cffi_modules=["kvmcore/_build.py:ffibuilder"],
    ext_modules=[
        Extension(
            "devproc._mailbox",
            ["devproc/_mailbox.c"],
            depends=["kvmcore/_mailbox.h"],
            py_limited_api=True,
            define_macros=[("Py_LIMITED_API", "0x030b0000"), ("_FORTIFY_SOURCE", "2")],
            extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fstack-protector-strong"],
        )
    ],
)
