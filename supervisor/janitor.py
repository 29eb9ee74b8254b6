"""A small process that outlives the supervisor, however it ends, and puts back what it changed.

It holds the terminal and its saved mode, and the paths of the sockets and links that were made.  When
its socket closes (the supervisor left, was killed, or crashed) it restores the mode, unlinks the paths
and leaves.  The supervisor itself never does either, so there is one way of cleaning up and it is
always taken; a clean end waits for it.  Before the guest runs it is sealed: from then on it hears only
the end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import termios
from collections.abc import Callable

from devproc import jail
from kvmcore.errors import VmsupError
from policies.errors import PolicyError
from supervisor import confine

_FRAME_MAX = 8192

CAPABILITIES = 1 << jail.CAP_DAC_OVERRIDE
"""What root's janitor keeps: root may have made a path in a directory that belongs to somebody else."""


class Janitor:
    """The supervisor's end; `start` must run while the process has one thread."""

    def __init__(self, pid: int, sock: socket.socket, mode: jail.Mode) -> None:
        self.pid = pid
        self._sock = sock
        self._mode = mode

    @classmethod
    def start(cls, mode: jail.Mode = jail.Mode.FULL) -> Janitor:
        """Fork the janitor, which will seal itself as `mode` says."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                _serve(theirs, mode)
            finally:
                os._exit(0)
        theirs.close()
        return cls(pid, ours, mode)

    def restore_terminal(self, fd: int) -> None:
        """Remember the mode that terminal `fd` has now."""
        socket.send_fds(self._sock, [b"T"], [fd])
        self._sock.recv(1)  # the mode must be saved before the caller changes it

    def unlink(self, path: str) -> None:
        """Remember to remove `path`, which the caller has just made; only that same file is removed."""
        st = os.lstat(path)
        self._sock.send(b"U%d %d %s" % (st.st_dev, st.st_ino, os.fsencode(os.path.abspath(path))))
        self._sock.recv(1)

    def seal(self, warn: Callable[[str], None]) -> None:
        """It remembers nothing more, and has given up all rights but that of doing what it was told.

        Raises:
            VmsupError: it could not; in mode "best-effort" that is a warning.
        """
        self._sock.send(b"S")
        why = self._sock.recv(_FRAME_MAX).decode().removeprefix(".")
        if why and self._mode is not jail.Mode.BEST_EFFORT:
            raise VmsupError(f"the janitor: {why}")
        if why:
            warn(f"the janitor: {why}")

    def finish(self) -> None:
        """Have everything put back now, and wait until it is."""
        self._sock.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _serve(sock: socket.socket, mode: jail.Mode) -> None:
    os.setsid()  # a signal to the supervisor's process group is not for us
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTTOU, signal.SIGPIPE):
        signal.signal(s, signal.SIG_IGN)
    jail.title("janitor")
    os.closerange(3, sock.fileno())
    os.closerange(sock.fileno() + 1, 1 << 16)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):  # holding the caller's stdout would keep a pipeline open
        os.dup2(null, fd)
    os.close(null)
    terminals: list[tuple[int, list[object]]] = []
    paths: list[tuple[int, int, bytes]] = []
    while True:
        try:
            frame, fds, _, _ = socket.recv_fds(sock, _FRAME_MAX, 1)
        except ConnectionResetError:  # it died before it took our last answer
            break
        if not frame:
            break
        if frame == b"S":
            _seal(sock, mode)
            break
        if frame == b"T":
            terminals += [(fd, termios.tcgetattr(fd)) for fd in fds]
        else:
            device, inode, name = frame[1:].split(b" ", 2)
            paths.append((int(device), int(inode), name))
        with contextlib.suppress(BrokenPipeError):
            sock.send(b".")
    for fd, attributes in terminals:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(fd, termios.TCSADRAIN, attributes)  # type: ignore[arg-type]
    for dev, ino, path in paths:
        with contextlib.suppress(OSError):
            st = os.lstat(path)
            if (st.st_dev, st.st_ino) == (dev, ino):
                os.unlink(path)


def _seal(sock: socket.socket, mode: jail.Mode) -> None:
    """Give up what is not needed any more, say how that went, and wait for the supervisor's end."""
    complaints: list[str] = []
    try:
        load_filter = confine.seal("janitor", mode, complaints.append)
        if mode is not jail.Mode.NONE:
            jail.drop_privileges(CAPABILITIES)
        load_filter()
    except (OSError, VmsupError, PolicyError) as e:
        complaints.append(str(e))
    with contextlib.suppress(OSError):
        sock.send(b"." + "; ".join(complaints).encode()[: _FRAME_MAX - 1])
        while sock.recv(_FRAME_MAX):
            pass
