"""The real kernel takes our filters and does what the simulator says; needs no privilege."""

import ctypes
import os
import signal
from collections.abc import Callable, Sequence

import pytest

from devproc.catalog import CATALOG
from policies.compile import compile_notify, compile_single
from policies.parse import load, parse

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2


class SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def fate(programs: Sequence[bytes], act: Callable[[], object]) -> int:
    """How a child ends that loads `programs` and then acts: 0, or minus the signal that killed it."""
    libc = ctypes.CDLL(None, use_errno=True)
    pid = os.fork()
    if pid == 0:
        try:
            loaded = libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            for program in programs:
                fprog = SockFprog(len(program) // 8, program)
                loaded |= libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(fprog), 0, 0)
            if loaded == 0:
                act()
                os._exit(0)
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("device", sorted(CATALOG))
def test_the_kernel_enforces_every_shipped_policy(device: str) -> None:
    program = compile_single(load(device, CATALOG[device].slots()))
    assert fate([program], lambda: None) == 0
    assert fate([program], os.getppid) == -signal.SIGSYS
    assert fate([program], lambda: os.close(99)) == -signal.SIGSYS


def test_an_errno_rule_fails_the_call_and_not_the_process() -> None:
    def look_for_a_file() -> None:
        with pytest.raises(FileNotFoundError):
            os.open("/", os.O_RDONLY)

    program = compile_single(load("pvpanic", CATALOG["pvpanic"].slots()))
    assert fate([program], look_for_a_file) == 0


def test_the_kernel_compares_whole_arguments() -> None:
    policy = parse("getpriority: arg1 == 5\nexit_group: 1\nbrk: 1\nmunmap: 1")
    libc = ctypes.CDLL(None)
    number = 140
    asked = [lambda who=who: libc.syscall(number, 0, ctypes.c_uint64(who)) for who in (5, 4, 5 | 1 << 32)]
    assert [fate([compile_single(policy)], ask) for ask in asked] == [0, -signal.SIGSYS, -signal.SIGSYS]


def test_setup_calls_die_only_once_the_second_filter_is_loaded() -> None:
    pair = compile_notify(parse("exit_group: 1\nbrk: 1\nmunmap: 1"), ("seccomp", "prctl", "close"))

    def close() -> None:
        ctypes.CDLL(None).close(99)

    assert fate(pair[:1], close) == 0
    assert fate(pair, close) == -signal.SIGSYS
