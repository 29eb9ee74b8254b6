"""The real kernel takes our filters and does what the simulator says; needs no privilege."""

import errno
import os
import signal

import pytest

from devproc import jail, syscalls
from devproc.catalog import CATALOG
from policies import bpf
from policies.compile import SETUP_MARK, compile_notify, compile_single
from policies.parse import load, parse
from policies.syscalls import SYSCALLS
from supervisor.verdicts import verdicts

KILL = bpf.KILL_PROCESS
CLOSE = (SYSCALLS["close"], (1 << 20,))  # beyond every slot


@pytest.mark.parametrize("device", sorted(CATALOG))
def test_the_kernel_enforces_every_shipped_policy(device: str) -> None:
    program = compile_single(load(device, CATALOG[device].slots()))
    calls = [(SYSCALLS[name], ()) for name in ("brk", "exit_group", "openat", "getppid", "ppoll")]
    enoent = bpf.ERRNO | 2
    assert verdicts([program], [*calls, CLOSE]) == [bpf.ALLOW, bpf.ALLOW, enoent, KILL, bpf.ALLOW, KILL]


def test_the_kernel_compares_whole_arguments() -> None:
    program = compile_single(parse("getpriority: arg1 == 5"))
    calls = [(SYSCALLS["getpriority"], (0, who)) for who in (5, 4, 5 | 1 << 32)]
    assert verdicts([program], calls) == [bpf.ALLOW, KILL, KILL]


def test_setup_calls_die_only_once_the_second_filter_is_loaded() -> None:
    first, second = compile_notify(parse("exit_group: 1\nbrk: 1\nmmap: 1\nmunmap: 1"), ("seccomp", "close"))

    def end(mark: int, *more: bytes) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                jail.forbid_gain()
                syscalls.seccomp_load(first)
                for program in more:
                    syscalls.seccomp_load(program, mark=SETUP_MARK)
                syscalls.close(1 << 20, mark)
            except OSError as e:
                os._exit(e.errno or 255)
            finally:
                os._exit(254)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert end(SETUP_MARK) == errno.EBADF
    assert end(SETUP_MARK, second) == -signal.SIGSYS
    assert end(0) == end(0, second) == errno.ENOSYS  # there is no listener
