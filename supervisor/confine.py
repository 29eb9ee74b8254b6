"""The supervisor's own seccomp filters: main thread, each vCPU's, its companions' (ARCHITECTURE.md).

Spec: seccomp(2).  Each thread loads its own; a call that its policy does not allow kills the process.
Threads are made before and never after, so no policy allows that.  Left out: the threads of
supervisor/recorder.py, which answer for a device that is watched on purpose.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import Final

from devproc import jail, syscalls
from kvmcore.abi import Ioctl
from kvmcore.errors import VmsupError
from policies.compile import compile_single
from policies.parse import load

POLICIES: Final = ("supervisor", "vcpu", "janitor", "exchange", "frontend")
FDS: Final = {"FD_VM": 1000, "FD_VCPU": 1001}
"""Descriptors that are numbered as they come, and the numbers by which `vmsup policy` speaks of them."""


def constants(fds: Mapping[str, int] = FDS) -> dict[str, int]:
    """What the policies may name beyond `policies.constants`: `fds`, this process, and the ioctls of KVM."""
    own = {"PID": os.getpid(), "SIG_KICK": signal.SIGRTMIN}
    return {**{i.name: i.value for i in Ioctl}, **own, **fds}


def seal(
    policy: str, mode: jail.Mode, warn: Callable[[str], None], fds: Mapping[str, int] = FDS
) -> Callable[[], None]:
    """What confines the thread that calls it to policies/NAME.policy, for good; needs no_new_privs.

    It raises VmsupError if the kernel refuses; in mode "best-effort" it warns, in "none" it does nothing.

    Raises:
        PolicyError: the policy is missing or wrong.
    """
    if mode is jail.Mode.NONE:
        return lambda: None
    program = compile_single(load(policy, constants(fds)))

    def load_filter() -> None:
        try:
            syscalls.seccomp_load(program)
        except OSError as e:
            error = VmsupError(f"cannot load policies/{policy}.policy: {e.strerror}")
            if mode is not jail.Mode.BEST_EFFORT:
                raise error from e
            warn(f"WARNING: {error}")

    return load_filter
