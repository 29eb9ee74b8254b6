"""An edge from KVM or the supervisor: an eventfd that is only ever read (eventfd(2))."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from devproc.ports import Watched


class Kick(Watched):
    """The port `ports.Kick` on the eventfd `fd`, which must be non-blocking."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._on_kick: Callable[[], None] = lambda: None

    def listen(self, on_kick: Callable[[], None]) -> None:
        self._on_kick = on_kick

    @property
    def wants_read(self) -> bool:
        return True

    def on_readable(self) -> None:
        with contextlib.suppress(BlockingIOError):  # the supervisor, which has it too, may have taken it
            os.read(self.fd, 8)
        self._on_kick()
