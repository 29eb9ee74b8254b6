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
import socket
import termios
from collections.abc import Callable

from devproc import jail
from supervisor import companion
from supervisor.companion import Companion

CAPABILITIES = 1 << jail.CAP_DAC_OVERRIDE
"""What root's janitor keeps: root may have made a path in a directory that belongs to somebody else."""


class Janitor:
    """The supervisor's end; `start` must run while the process has one thread."""

    def __init__(self, process: Companion) -> None:
        self._process = process
        self._sock = process.sock
        self.pid = process.pid

    @classmethod
    def start(cls, mode: jail.Mode = jail.Mode.FULL) -> Janitor:
        """Fork the janitor, which will seal itself as `mode` says."""
        return cls(Companion.fork("janitor", mode, lambda sock: _serve(sock, mode)))

    def restore_terminal(self, fd: int) -> None:
        """Remember the mode that terminal `fd` has now."""
        socket.send_fds(self._sock, [b"T"], [fd])
        self._sock.recv(1)  # the mode must be saved before the caller changes it

    def unlink(self, path: str) -> None:
        """Remember to remove `path`, which the caller has just made; only that same file is removed."""
        st = os.lstat(path)
        self._sock.send(b"U%d %d %s" % (st.st_dev, st.st_ino, os.fsencode(os.path.abspath(path))))
        self._sock.recv(1)

    def listen(self, path: str, backlog: int = 1) -> socket.socket:
        """A unix stream socket at `path`, for this user alone; the path will be removed.

        Raises:
            OSError: nobody can listen there.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            listener.bind(path)
            listener.listen(backlog)  # at once: who waits for the path connects as soon as it is there
            self.unlink(path)
        except OSError:
            listener.close()
            raise
        finally:
            os.umask(before)
        return listener

    def seal(self, warn: Callable[[str], None]) -> None:
        """It remembers nothing more, and has given up all rights but that of doing what it was told.

        Raises:
            VmsupError: it could not; in mode "best-effort" that is a warning.
        """
        self._process.seal(warn)

    def finish(self) -> None:
        """Have everything put back now, and wait until it is."""
        self._process.finish()


def _serve(sock: socket.socket, mode: jail.Mode) -> None:
    terminals: list[tuple[int, list[object]]] = []
    paths: list[tuple[int, int, bytes]] = []
    while True:
        try:
            frame, fds, _, _ = socket.recv_fds(sock, companion.FRAME_MAX, 1)
        except ConnectionResetError:  # it died before it took our last answer
            break
        if not frame:
            break
        if frame == companion.SEAL:
            companion.seal("janitor", sock, mode, CAPABILITIES)
            _await_the_end(sock)
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


def _await_the_end(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while sock.recv(companion.FRAME_MAX):
            pass
