"""Only here because setuptools cannot yet name a cffi extension in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["kvmcore/_build.py:ffibuilder"])
