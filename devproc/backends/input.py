"""A byte source on the host, read only when select has said that it will not block (read(2))."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from devproc.ports import HostError, Watched


class Input(Watched):
    """The port `ports.Input` on `fd`; at its end it is never watched again."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._wanted: Callable[[], bool] = lambda: False
        self._on_input: Callable[[], None] = lambda: None
        self._ready = False  # lets one read through
        self._closed = False

    def listen(self, wanted: Callable[[], bool], on_input: Callable[[], None]) -> None:
        self._wanted, self._on_input = wanted, on_input

    @property
    def wants_read(self) -> bool:
        return not self._closed and self._wanted()

    def on_readable(self) -> None:
        self._ready = True
        self._on_input()

    def read(self, limit: int) -> bytes:
        """Up to `limit` bytes; b"" when there are none now, or never again.

        Raises:
            HostError: the source failed other than by ending.
        """
        if not self._ready or limit <= 0:
            return b""
        self._ready = False
        try:
            data = os.read(self.fd, limit)
        except BlockingIOError:
            return b""
        except OSError as e:
            if e.errno != errno.EIO:  # a terminal that was hung up ends like this
                raise HostError(f"cannot read input: {e.strerror}") from e
            data = b""
        self._closed = not data
        return data
