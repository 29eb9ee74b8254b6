"""What the running kernel makes of system calls under seccomp filters, without making the calls.

Spec: seccomp(2).  Of several filters the most severe verdict counts, and of equals that of the filter loaded
last.  So a filter that lets every call fail with an error of its own is loaded *below* those under test: it
is seen exactly where they allow, while what they refuse or kill is refused and killed.  Left out: telling
apart the verdicts that are weaker than an errno (allow, log, trace, notify).
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import resource
import signal
from collections.abc import Sequence
from typing import Final, NoReturn

from devproc import jail, syscalls
from kvmcore.errors import VmsupError
from policies import bpf
from policies.syscalls import SYSCALLS

_WITNESS: Final = 4095  # MAX_ERRNO, which no call gives
_MARK: Final = 0x766D7375  # of our own calls, in an argument that they do not have
_BELOW: Final = bpf.pack(
    [
        bpf.Insn(bpf.LD_ABS, 0, 0, bpf.arg_offset(5, False)),
        bpf.Insn(bpf.JEQ, 1, 0, _MARK),
        bpf.Insn(bpf.RET, 0, 0, bpf.ERRNO | _WITNESS),
        bpf.Insn(bpf.RET, 0, 0, bpf.ALLOW),
    ]
)
_UNKNOWN: Final = 0xFFFF_FFFF  # not yet asked
_WORD: Final = 4

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


def verdicts(filters: Sequence[bytes], calls: Sequence[tuple[int, Sequence[int]]]) -> list[int]:
    """The SECCOMP_RET_ value that `filters`, loaded in this order, give each (x86-64 number, arguments).

    A process of its own asks, a new one after each that was killed: about 1 ms per call that kills.

    Raises:
        VmsupError: such a process did not load the filters, or ended as no filter of ours makes it end.
    """
    words = [[ctypes.c_ulong(word) for word in (nr, *args)] for nr, args in calls]
    with mmap.mmap(-1, max(1, len(calls)) * _WORD) as shared, memoryview(shared).cast("I") as found:
        found[:] = memoryview(_UNKNOWN.to_bytes(_WORD, "little") * len(found)).cast("I")
        at = 0
        while at < len(calls):
            pid = os.fork()
            if pid == 0:
                _ask(filters, words, found, at)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            while at < len(calls) and found[at] != _UNKNOWN:
                at += 1
            if at == len(calls):
                break
            if status != -signal.SIGSYS:
                raise VmsupError(f"asking the kernel about system call {calls[at][0]} ended with {status}")
            found[at] = bpf.KILL_PROCESS
            at += 1
        return list(found[: len(calls)])


def _ask(
    filters: Sequence[bytes], words: Sequence[Sequence[ctypes.c_ulong]], found: memoryview[int], at: int
) -> NoReturn:
    try:
        gc.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        jail.forbid_gain()
        for program in (_BELOW, *filters):
            syscalls.seccomp_load(program, mark=_MARK)
        for i in range(at, len(words)):
            result = _syscall(*words[i])
            error = ctypes.get_errno()
            assert result == -1, "a call was made"
            found[i] = bpf.ALLOW if error == _WITNESS else bpf.ERRNO | error
    finally:
        _syscall(*map(ctypes.c_ulong, (SYSCALLS["exit_group"], 1, 0, 0, 0, 0, _MARK)))
        os._exit(1)
