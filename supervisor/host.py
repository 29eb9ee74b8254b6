"""What a device works on at the host, opened by the supervisor before the device's process exists.

An instance's opener turns what the user asked for (a path, a tap's name) into descriptors, because the
device process can name nothing.  What an opener opens it also has undone: `Host.undo`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Protocol

from devproc.record import record
from devproc.wire import Scalar
from supervisor.janitor import Janitor
from supervisor.terminal import Keyboard


class Watched(Protocol):
    """Something with descriptors that the main thread polls: a relay, the control socket."""

    def wants(self) -> dict[int, int]: ...
    def ready(self, fd: int, got: int) -> None: ...


class Host:
    """What an opener may use, and where it leaves what outlives it.

    Attributes:
        undo: takes what closes and ends whatever was opened; it runs after the devices have gone.
        janitor: keeps the terminal's mode, and paths to be removed, even from our own death.
        tell: takes a line that the user did not ask for but needs: where a pseudo-terminal is.
        watched: relays, for the main thread to poll while the guest runs.
        keyboard: the terminal, if a console is on it.
        exchange: the device's end of the exchange (supervisor/exchange.py), if there is one.
        window: the port of the virtio console whose window the terminal's is.
    """

    def __init__(self, undo: ExitStack, janitor: Janitor, tell: Callable[[str], None]) -> None:
        self.undo = undo
        self.janitor = janitor
        self.tell = tell
        self.watched: list[Watched] = []
        self.keyboard: Keyboard | None = None
        self.window: int | None = None
        self.exchange: int | None = None


@record
class Opened:
    """What an opener has opened; the descriptors stay its own, the device gets duplicates.

    Attributes:
        fds: by the name of the catalogue's `Descriptor`, as many as its `count`.
        params: values that were known only now (a disk's size), after those of `Instance.params`.
    """

    fds: Mapping[str, tuple[int, ...]]
    params: tuple[Scalar, ...] = ()


Opener = Callable[[Host], Opened]
"""Raises ConfigError, naming the option and the file, when the user's wish cannot be met."""
