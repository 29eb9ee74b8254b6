"""A device process as in a VM but for its clocks, which stand in the page: the program that replays inputs.

Everything else is real: `child.Server`, the wire, the descriptors, the jail and the policy.  So what it does
can be compared with a bench, or with what was recorded (supervisor/rehearse.py).

A device with guest memory has one thing less that is real: what its ports to the host give, kicks apart, is
in the page, too, as is what the guest has written by the time of a fence (private.py).
"""

from __future__ import annotations

import functools
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NoReturn

from devproc import child, jail
from devproc.catalog import FD_FIRST, Entry, Params
from devproc.channel import Channel
from devproc.fuzz.inputs import Gave
from devproc.fuzz.inputs import ports as names
from devproc.fuzz.page import Page
from devproc.fuzz.recording import checksum, filled, is_state, python_queues, recorded
from devproc.ports import Device, HostError
from devproc.wire import Message, Ping
from kvmcore.memory import GuestMemory

EXTRA_FDS: Final = 1  # the page
load = child.load


def main(ctx: jail.Context, model: type[Any], name: str) -> NoReturn:
    """As `child.main`, with the page as one more descriptor."""
    *fds, fd = ctx.fds
    page = Page(fd)
    ctx.fds = fds
    host = {**child.SOURCES, "clock": page.clock, "wall": page.wall}
    serving: Any = functools.partial(child.Server, first=FD_FIRST, host=host)
    if ctx.entry.guest_memory and recorded(ctx.entry):
        serving = functools.partial(Server, page, host)
    child.main(ctx, model, name, serving)


class Server(child.Server):
    """Each `Ping` brings the operation in the page to its end, before its `Pong`."""

    def __init__(
        self,
        page: Page,
        host: dict[str, Any],
        entry: Entry,
        model: type[Any],
        params: Params,
        access: socket.socket,
        control: Channel,
    ) -> None:
        self._feed = Feed(page)
        made: Any = functools.partial(self._feed.make, entry, model)
        super().__init__(entry, made, params, access, control, host=host)

    def _answer(self, message: Message) -> Message:
        if isinstance(message, Ping):
            self._feed.event()
            while (due := self.device.deadline_ns) is not None and due <= self._now():
                self.device.on_deadline(self._now())
            self._feed.finish()
        return super()._answer(message)


class Feed:
    """What the page says that the host gives, and the guest writes, in an operation.

    There is an object with "event", the port and the function to call or nothing; "gave", a list of (port,
    kind, checksum, value) with events that come inside the operation as (port, None, function, None); and
    "memory", a list of (fence, place, bytes).  The first one says in "fences" whether any fence matters.
    """

    def __init__(self, page: Page) -> None:
        self._page = page
        self._operation = -1
        self._event: list[int] | None = None
        self._gave: deque[Any] = deque()
        self._memory: list[Any] = []
        self._fences = 0
        self._told: dict[int, tuple[Callable[[], None], ...]] = {}
        self._states: dict[tuple[int, str], int] = {}

    def make(self, entry: Entry, model: type[Any], **ports: Any) -> Device:
        """The model, with ports that are fed."""
        number = 0
        self._ports = names(entry)
        for d, fds in entry.own_slots():
            if d.kind == "memory":
                ports[d.name] = _Memory(ports[d.name], self)
            elif d.kind not in ("signal", "kick"):
                made = tuple(_Port(self, number + i) for i in range(len(fds)))
                ports[d.name] = made if d.count is not None else made[0]
            number += len(fds) if d.kind not in ("signal", "memory") else 0
        if "entropy" in ports:
            ports["entropy"] = functools.partial(self.ask, number, "entropy")
        device: Device = model(**ports)
        if self._page.request()["fences"]:
            python_queues(device)
        return device

    def _refresh(self) -> None:
        if self._page.operation() != self._operation:
            self._operation = self._page.operation()
            asked = self._page.request()
            self._event, self._gave, self._memory = asked["event"], deque(asked["gave"]), asked["memory"]
            self._fences = 0

    def tell(self, port: int, functions: tuple[Callable[[], None], ...]) -> None:
        """These are the functions that a port may call."""
        self._told[port] = functions

    def event(self) -> None:
        """Have a port call the device, if that is the operation; a kick does so by itself."""
        self._refresh()
        if self._event is not None and self._event[0] in self._told:
            port, which = self._event
            self._event = None
            self._told[port][which]()

    def finish(self) -> None:
        """The operation is over.  Raises HostError if not all was asked for."""
        if self._gave:
            raise HostError(f"{self._ports[self._gave[0][0]]} is asked {len(self._gave)} times less")

    def fence(self, memory: GuestMemory) -> None:
        """The device orders its stores before its loads: it sees what the guest has written meanwhile."""
        self._refresh()
        self._fences += 1
        for fence, gpa, data in self._memory:
            if fence == self._fences:
                memory.write(gpa, bytes.fromhex(data))

    def state(self, port: int, name: str) -> int:
        """What a port is asked without calling it."""
        self._refresh()
        if self._gave and self._gave[0][:3] == [port, Gave.NUMBER, checksum(name, (), {})]:
            self._states[port, name] = self._gave.popleft()[3]
        return self._states.get((port, name), 0)

    def ask(self, port: int, name: str, *args: Any, **named: Any) -> Any:
        """What a port gives when it is called.  Raises HostError for what it was not asked before."""
        self._refresh()
        while self._gave and self._gave[0][:2] == [port, None]:
            self._told[port][self._gave.popleft()[2]]()
        asked = checksum(name, args, named)
        if not self._gave or self._gave[0][0] != port or self._gave[0][2] != asked:
            raise HostError(f"{self._ports[port]} is asked for another {name}")
        _, kind, _, value = self._gave.popleft()
        match kind:
            case Gave.ERROR:
                raise OSError(value, os.strerror(value))
            case Gave.NUMBER:
                return value
            case Gave.BYTES:
                data = bytes.fromhex(value)
                into = filled(name, args)
                if into is None:
                    return data
                done = 0
                for part in into:
                    piece = data[done : done + len(part)]
                    memoryview(part)[: len(piece)] = piece
                    done += len(piece)
                return done if name == "receive" else None
        return {Gave.NO: False, Gave.YES: True, Gave.NONE: None}[kind]


class _Memory(GuestMemory):
    """The real one, into which more is written at a fence."""

    def __init__(self, memory: GuestMemory, feed: Feed) -> None:
        self.__dict__ |= memory.__dict__
        memory.fd = -1  # it is ours
        self._feed = feed

    def fence(self) -> None:
        super().fence()
        self._feed.fence(self)


class _Port:
    """A port to the host that gives what the page says."""

    tap = -1  # as of `ports.Link`, for the same reason as `serve`

    def __init__(self, feed: Feed, number: int) -> None:
        self._feed = feed
        self._number = number

    def listen(self, *functions: Callable[[], None]) -> None:
        self._feed.tell(self._number, functions)

    def serve(self, _ring: object, left: int, _least: int, *, writable: bool) -> tuple[int, int, int]:
        """As of `ports.File`: no request is so plain that it need not come here piece by piece."""
        return left, 0, 0

    def __getattr__(self, name: str) -> Any:
        if is_state(name):
            return self._feed.state(self._number, name)
        return functools.partial(self._feed.ask, self._number, name)
