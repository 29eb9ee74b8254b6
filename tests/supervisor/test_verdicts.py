"""Asking the kernel about calls that are never made."""

import os

import pytest

from kvmcore.errors import VmsupError
from policies import bpf
from policies.compile import compile_single
from policies.parse import parse
from policies.syscalls import SYSCALLS
from supervisor.verdicts import verdicts


def call(name: str, *args: int) -> tuple[int, tuple[int, ...]]:
    return SYSCALLS[name], args


def test_an_allowed_call_is_not_made() -> None:
    ours, theirs = os.pipe()
    allow = compile_single(parse("write: 1\nexit_group: 1\npause: 1"))
    readable = id(theirs)  # a write from there would work
    calls = [call("write", theirs, readable, 1), call("exit_group", 0), call("pause")]
    assert verdicts([allow], calls) == [bpf.ALLOW] * 3
    os.close(theirs)
    assert os.read(ours, 1) == b""
    os.close(ours)


def test_the_policys_own_errno_is_seen_and_not_ours() -> None:
    assert verdicts([compile_single(parse("read: return EPERM"))], [call("read")]) == [bpf.ERRNO | 1]


def test_killed_calls_between_others_are_each_asked_about() -> None:
    program = compile_single(parse("read: 1"))
    calls = [call(name) for name in ("read", "write", "write", "read", "write")]
    allow, kill = bpf.ALLOW, bpf.KILL_PROCESS
    assert verdicts([program], calls) == [allow, kill, kill, allow, kill]


def test_nothing_asked_is_nothing_answered() -> None:
    assert verdicts([], []) == []


def test_a_filter_that_does_not_load_is_an_error() -> None:
    with pytest.raises(VmsupError, match="system call 0 ended with 1"):
        verdicts([b"\0" * 8], [call("read")])
