"""Attempts to get out: each succeeds without a jail, none in the full one."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from hostile import ATTEMPTS

HOST_ID = 2_000_001
# Refused without a jail too where no privilege is needed to make it moot; each of them succeeds as root, or
# the kernel at hand lacks what it asks for.
MAY_BE_VACUOUS = {
    "create a file without a name",
    "x32 getpid",
    "i386 getpid by int 0x80",
    "secret memory",
    "io_uring",
    "perf",
    "vsock socket",
}
PRIVILEGED = {"bpf map", "perf", "mount", "chroot", "another filter", "userfaultfd", "signal to itself"}
REFUSED_WITH_ENOENT = {"open / for reading", "create a file without a name"}


def attempt(supervisor: Any, number: int, mode: str) -> tuple[Any, ...]:
    name = f"escape{number}{mode[0]}"
    supervisor("spawn", "hostile", name, mode, host_id=HOST_ID if supervisor.who == "root" else 0)
    outcome: tuple[Any, ...] = supervisor("read", name, number)
    if outcome[0] == "value":
        supervisor("kill", name)
    return outcome


@pytest.mark.parametrize("number", range(len(ATTEMPTS)), ids=[what.replace(" ", "-") for what, _ in ATTEMPTS])
def test_escape_fails_in_the_full_jail(supervisor: Any, number: int) -> None:
    what = ATTEMPTS[number][0]
    free = attempt(supervisor, number, "none")
    jailed = attempt(supervisor, number, "full")
    if what in REFUSED_WITH_ENOENT:
        assert jailed == ("value", 2)
    else:
        # either the supervisor is told the call, or (set-up calls, foreign ABIs) the kernel kills at once
        assert jailed[0] == "violation" or jailed[1:] == (os.CLD_KILLED, signal.SIGSYS), jailed
    succeeded = free == ("value", 0) or (what == "exec" and free == ("died", os.CLD_EXITED, 0))
    if not succeeded:
        assert what in MAY_BE_VACUOUS or (what in PRIVILEGED and supervisor.who == "user"), free
        pytest.skip(f"vacuous: without a jail it gives {free}")


def test_a_violation_names_the_call_and_its_arguments(supervisor: Any) -> None:
    numbers = {what: n for n, (what, _) in enumerate(ATTEMPTS)}
    kind, nr, args = attempt(supervisor, numbers["inet socket"], "full")
    assert (kind, nr, args[:3]) == ("violation", 41, (2, 1, 0))
