"""A byte source on the host, read only when select has said that it will not block (read(2))."""

from __future__ import annotations

import errno
import os


class Input:
    """`fd` is watched by the child's loop until `closed`; `ready`, set by select, lets one read through."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.ready = False
        self.closed = False

    def read(self, limit: int) -> bytes:
        """Up to `limit` bytes; b"" when there are none now, or never again.

        Raises:
            OSError: the source failed other than by ending.
        """
        if not self.ready or limit <= 0:
            return b""
        self.ready = False
        try:
            data = os.read(self.fd, limit)
        except BlockingIOError:
            return b""
        except OSError as e:
            if e.errno != errno.EIO:  # a terminal that was hung up ends like this
                raise
            data = b""
        self.closed = not data
        return data
