"""The real kernel takes our filters and does what the simulator says; needs no privilege."""

import pytest

from devproc.catalog import CATALOG
from policies import bpf
from policies.compile import compile_notify, compile_single
from policies.parse import load, parse
from policies.syscalls import SYSCALLS
from supervisor.verdicts import verdicts

KILL = bpf.KILL_PROCESS
CLOSE = (SYSCALLS["close"], (99,))


@pytest.mark.parametrize("device", sorted(CATALOG))
def test_the_kernel_enforces_every_shipped_policy(device: str) -> None:
    program = compile_single(load(device, CATALOG[device].slots()))
    calls = [(SYSCALLS[name], ()) for name in ("brk", "exit_group", "openat", "getppid", "pselect6")]
    enoent = bpf.ERRNO | 2
    assert verdicts([program], [*calls, CLOSE]) == [bpf.ALLOW, bpf.ALLOW, enoent, KILL, bpf.ALLOW, KILL]


def test_the_kernel_compares_whole_arguments() -> None:
    program = compile_single(parse("getpriority: arg1 == 5"))
    calls = [(SYSCALLS["getpriority"], (0, who)) for who in (5, 4, 5 | 1 << 32)]
    assert verdicts([program], calls) == [bpf.ALLOW, KILL, KILL]


def test_setup_calls_die_only_once_the_second_filter_is_loaded() -> None:
    pair = compile_notify(parse("exit_group: 1"), ("seccomp", "prctl", "close"))
    assert verdicts(pair[:1], [CLOSE]) == [bpf.ALLOW]
    assert verdicts(pair, [CLOSE]) == [KILL]
