"""The checked-in numbers against libseccomp's and Python's own."""

import errno
import fcntl
import mmap
import os
import resource
import signal
import socket
import time
from types import ModuleType

import pytest

from policies.constants import CONSTANTS, ERRNOS
from policies.crosscheck import resolve
from policies.syscalls import ARGUMENTS, NAMES, SYSCALLS

LIBSECCOMP_KNOWS_TO = 450  # set_mempolicy_home_node, in libseccomp 2.5.4
PRIVATE_TO_LIBC = {"O_LARGEFILE"}  # glibc on 64 bits says 0, the kernel's value is the one a filter sees


def test_libseccomp_has_the_same_numbers() -> None:
    known = {name: resolve(name) for name in SYSCALLS}
    assert {n: nr for n, nr in known.items() if nr >= 0} == {
        n: SYSCALLS[n] for n, nr in known.items() if nr >= 0
    }
    assert all(known[name] >= 0 for name, nr in SYSCALLS.items() if nr < LIBSECCOMP_KNOWS_TO)


def test_numbers_and_names_are_one_to_one() -> None:
    assert len(NAMES) == len(SYSCALLS)
    assert set(ARGUMENTS) <= set(SYSCALLS)
    assert all(len(arguments) <= 6 for arguments in ARGUMENTS.values())


@pytest.mark.parametrize("module", [mmap, fcntl, socket, signal, os, resource, time])
def test_python_has_the_same_constants(module: ModuleType) -> None:
    ours = {n: v for n, v in CONSTANTS.items() if hasattr(module, n) and n not in PRIVATE_TO_LIBC}
    assert ours
    assert ours == {n: int(getattr(module, n)) & (1 << 64) - 1 for n in ours}


def test_errnos_are_the_kernels() -> None:
    assert (ERRNOS["EPERM"], ERRNOS["ENOENT"], ERRNOS["ENOSYS"]) == (1, 2, 38)
    assert all(getattr(errno, name) == number for name, number in ERRNOS.items())
