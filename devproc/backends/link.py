"""What the links of a network card have in common: who is told what, and the end of the other side."""

from __future__ import annotations

from collections.abc import Callable

from devproc.ports import Watched


class Link(Watched):
    """Base of the backends that are the port `ports.Link`.

    Args:
        fd: non-blocking.
    """

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.up = True
        self._full = False  # the last send found no room
        self._wanted: Callable[[], bool] = lambda: False
        self._on_frame: Callable[[], None] = lambda: None
        self._on_room: Callable[[], None] = lambda: None
        self._on_down: Callable[[], None] = lambda: None

    def listen(
        self,
        wanted: Callable[[], bool],
        on_frame: Callable[[], None],
        on_room: Callable[[], None],
        on_down: Callable[[], None],
    ) -> None:
        self._wanted, self._on_frame, self._on_room, self._on_down = wanted, on_frame, on_room, on_down

    @property
    def wants_read(self) -> bool:
        return self.up and self._wanted()

    @property
    def wants_write(self) -> bool:
        return self.up and self._full

    def on_readable(self) -> None:
        self._on_frame()

    def on_writable(self, idle: bool) -> None:
        self._full = False
        self._on_room()

    def _down(self) -> None:
        if self.up:
            self.up = False
            self._on_down()
