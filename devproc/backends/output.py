"""A bounded buffer in front of a descriptor the host may drain slowly (write(2), pipe(7))."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from devproc.ports import HostError, Watched

BUFFER_MAX: Final = 65536
# POSIX.1-2017, PIPE_BUF: a pipe reported writable takes this much at once without blocking, and we may not
# make the descriptor non-blocking because its description can be shared with the user's shell.
WRITE_MAX: Final = 4096


class Output(Watched):
    """The port `ports.Output` on `fd`: `write` queues, and the loop lets it out when `fd` is writable."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._buffer = bytearray()
        self._on_room: Callable[[], None] = lambda: None

    def listen(self, on_room: Callable[[], None]) -> None:
        self._on_room = on_room

    @property
    def wants_write(self) -> bool:
        return bool(self._buffer)

    @property
    def room(self) -> int:
        """Bytes that `write` takes now."""
        return BUFFER_MAX - len(self._buffer)

    @property
    def pending(self) -> int:
        """Bytes waiting for the host."""
        return len(self._buffer)

    def write(self, data: bytes) -> int:
        """Queue up to `room` bytes of `data`; returns how many were taken."""
        if len(data) > self.room:
            data = data[: self.room]
        self._buffer += data
        return len(data)

    def on_writable(self, idle: bool) -> None:
        # While accesses keep coming a console's bytes are gathered: a write costs as much as one.
        pending = len(self._buffer)
        if idle or pending >= WRITE_MAX:
            self.flush()
            if pending == BUFFER_MAX and self.room:
                self._on_room()

    def flush(self) -> None:
        """Write up to WRITE_MAX of the pending bytes.

        Raises:
            HostError: the host no longer takes output (EPIPE, ENOSPC, EIO...).
        """
        # bytes(), because a view of the buffer would still pin its size when an exception keeps it alive
        try:
            written = os.write(self.fd, bytes(self._buffer[:WRITE_MAX]))
        except BlockingIOError:
            return
        except OSError as e:
            raise HostError(f"cannot write output: {e.strerror}") from e
        del self._buffer[:written]
