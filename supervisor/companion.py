"""A process of the supervisor's own beside it, on one socket, that seals itself before the guest runs."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
from collections.abc import Callable

from devproc import jail
from kvmcore.errors import VmsupError
from policies.errors import PolicyError
from supervisor import confine

FRAME_MAX = 8192
SEAL = b"S"
"""The frame that asks a companion to seal itself; the answer is b"." and what could not be done."""


class Companion:
    """The supervisor's end.

    Attributes:
        sock: its socket; what is said there before `seal` is between the two.
    """

    def __init__(self, name: str, pid: int, sock: socket.socket, mode: jail.Mode) -> None:
        self.name = name
        self.pid = pid
        self.sock = sock
        self._mode = mode

    @classmethod
    def fork(
        cls, name: str, mode: jail.Mode, serve: Callable[[socket.socket], None], keep: tuple[int, ...] = ()
    ) -> Companion:
        """Fork, while the process has one thread; the child runs `serve` with its end, and `keep` open."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            try:
                gc.freeze()  # or it would write to all that it shares with the supervisor
                _stand_apart(name, {theirs.fileno(), *keep})
                serve(theirs)
            finally:
                os._exit(0)
        theirs.close()
        return cls(name, pid, ours, mode)

    def seal(self, warn: Callable[[str], None]) -> None:
        """Have it give up all rights but those that it needs.

        Raises:
            VmsupError: it could not; in mode "best-effort" that is a warning.
        """
        self.sock.send(SEAL)
        why = self.sock.recv(FRAME_MAX).decode().removeprefix(".")
        if why and self._mode is not jail.Mode.BEST_EFFORT:
            raise VmsupError(f"the {self.name}: {why}")
        if why:
            warn(f"the {self.name}: {why}")

    def finish(self) -> None:
        """Let it end, and wait until it has."""
        self.sock.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def seal(name: str, sock: socket.socket, mode: jail.Mode, capabilities: int) -> None:
    """In the companion, asked to: give up what is not needed any more, and say how that went."""
    complaints: list[str] = []
    try:
        load_filter = confine.seal(name, mode, complaints.append)
        if mode is not jail.Mode.NONE:
            jail.drop_privileges(capabilities)
        load_filter()
    except (OSError, VmsupError, PolicyError) as e:
        complaints.append(str(e))
    with contextlib.suppress(OSError):
        sock.send(b"." + "; ".join(complaints).encode()[: FRAME_MAX - 1])


def _stand_apart(name: str, keep: set[int]) -> None:
    os.setsid()  # a signal to the supervisor's process group is not for us
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTTOU, signal.SIGPIPE):
        signal.signal(s, signal.SIG_IGN)
    jail.title(name)
    first = 3
    for fd in sorted(keep):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, 1 << 16)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):  # holding the caller's stdout would keep a pipeline open
        os.dup2(null, fd)
    os.close(null)
