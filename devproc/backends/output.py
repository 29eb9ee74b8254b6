"""A bounded buffer in front of a descriptor the host may drain slowly (write(2), pipe(7))."""

from __future__ import annotations

import os
from typing import Final

BUFFER_MAX: Final = 65536
# POSIX.1-2017, PIPE_BUF: a pipe reported writable takes this much at once without blocking, and we may not
# make the descriptor non-blocking because its description can be shared with the user's shell.
WRITE_MAX: Final = 4096


class Output:
    """`write` queues, `flush` is called by the child's loop when select says `fd` is writable."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._buffer = bytearray()

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
        taken = min(self.room, len(data))
        self._buffer += data if taken == len(data) else data[:taken]
        return taken

    def flush(self) -> None:
        """Write up to WRITE_MAX of the pending bytes.

        Raises:
            OSError: the host no longer takes output (EPIPE, ENOSPC, EIO...).
        """
        # bytes(), because a view of the buffer would still pin its size when an exception keeps it alive
        try:
            written = os.write(self.fd, bytes(self._buffer[:WRITE_MAX]))
        except BlockingIOError:
            return
        del self._buffer[:written]
