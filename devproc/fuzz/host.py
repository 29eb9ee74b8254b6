"""The host's end of a device's ports (devproc/ports.py), in memory: what a bench hands to a model."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec
from types import ModuleType, SimpleNamespace
from typing import Any, Final

from devproc.backends import directory
from devproc.fuzz import tree
from devproc.fuzz.inputs import ROOM_MAX
from devproc.vhost.message import (
    HEADER_SIZE,
    Header,
    MessageError,
    Request,
    VringAddr,
    VringFile,
    VringState,
    pack_reply,
    parse,
    parse_header,
)

DISK_SIZE: Final = 1 << 16
_PART: Final = 4096
_TOLD: Final = 6  # what a vhost-user back end is told of a ring before it runs


class Source:
    """The host's end of a port at which something comes without being asked for."""

    def give(self, data: bytes) -> None:
        """This comes from the host."""
        raise NotImplementedError

    @property
    def left(self) -> object:
        """What there is that the model has not taken; false if that is nothing."""
        raise NotImplementedError

    def ready(self) -> bool:
        """Whether the loop would have to call the model."""
        raise NotImplementedError

    def act(self) -> None:
        """Call the model."""
        raise NotImplementedError


class Input(Source):
    """`ports.Input`; `typed` is what the host has sent and the model has not taken."""

    def __init__(self) -> None:
        self.typed = bytearray()
        self.wanted: Callable[[], bool] = lambda: False
        self.on_input: Callable[[], None] = lambda: None

    def give(self, data: bytes) -> None:
        self.typed += data

    @property
    def left(self) -> int:
        return len(self.typed)

    def ready(self) -> bool:
        return bool(self.typed) and self.wanted()

    def act(self) -> None:
        self.on_input()

    def listen(self, wanted: Callable[[], bool], on_input: Callable[[], None]) -> None:
        self.wanted, self.on_input = wanted, on_input

    def read(self, limit: int) -> bytes:
        data = bytes(self.typed[: max(limit, 0)])
        del self.typed[: len(data)]
        return data


class Drain:
    """The host's end of a port that takes `room` more bytes, or frames; of bytes it has what was `sent`."""

    def __init__(self) -> None:
        self.room = ROOM_MAX
        self.sent = bytearray()
        self.on_room: Callable[[], None] = lambda: None

    def drain(self, room: int) -> None:
        """It takes so much from now on."""
        full, self.room = not self.room, room
        if full and room:
            self.on_room()


class Output(Drain):
    """`ports.Output`."""

    def listen(self, on_room: Callable[[], None]) -> None:
        self.on_room = on_room

    def write(self, data: bytes) -> int:
        taken = min(self.room, len(data))
        self.sent += data[:taken]
        self.room -= taken
        return taken


class Kick:
    """`ports.Kick`: what the loop calls after an edge."""

    def __init__(self) -> None:
        self.on_kick: Callable[[], None] = lambda: None

    def listen(self, on_kick: Callable[[], None]) -> None:
        self.on_kick = on_kick


class Disk:
    """`ports.File` of `size` bytes; like a file it fails outside of them."""

    def __init__(self, size: int) -> None:
        self.size: Final = size
        # In parts that are replaced, so that putting the disk back to what it was costs next to nothing.
        self._parts = [bytes(_PART)] * (size // _PART)

    @property
    def length(self) -> int:
        return self.size

    def read(self, offset: int, into: Sequence[memoryview]) -> None:
        for part in into:
            data, at = self._at(offset, len(part))
            part[:] = data[at : at + len(part)]
            offset += len(part)

    def write(self, offset: int, data: Sequence[memoryview | bytes]) -> None:
        for part in data:
            old, at = self._at(offset, len(part))
            new = b"".join((old[:at], part, old[at + len(part) :]))
            first = offset // _PART
            self._parts[first : first + len(new) // _PART] = [
                new[start : start + _PART] for start in range(0, len(new), _PART)
            ]
            offset += len(part)

    def flush(self) -> None:
        pass

    def discard(self, offset: int, size: int) -> None:
        self.zero(offset, size, unmap=True)

    def zero(self, offset: int, size: int, *, unmap: bool) -> None:
        self.write(offset, [bytes(size)])

    def extend(self, length: int) -> None:
        raise OSError(errno.ENOSPC, "the disk of a bench does not grow")

    def close(self) -> None:
        pass

    def _at(self, offset: int, size: int) -> tuple[bytes, int]:
        """The parts that [offset, offset + size) lies in, and where in them it begins."""
        # A model that gets here with more has checked nothing: a real file would have grown.
        assert 0 <= offset <= self.size - size, f"{size} bytes at {offset:#x} of {self.size:#x}"
        return b"".join(self._parts[offset // _PART : -(-(offset + size) // _PART)]), offset % _PART


class Link(Source, Drain):
    """`ports.Link`; `incoming` are frames for the model."""

    def __init__(self) -> None:
        super().__init__()
        self.offloads = True
        self.up = True
        self.incoming: deque[bytes] = deque()
        self.wanted: Callable[[], bool] = lambda: False
        self.on_frame: Callable[[], None] = lambda: None

    def listen(
        self,
        wanted: Callable[[], bool],
        on_frame: Callable[[], None],
        on_room: Callable[[], None],
        on_down: Callable[[], None],
    ) -> None:
        self.wanted, self.on_frame, self.on_room = wanted, on_frame, on_room

    def give(self, data: bytes) -> None:
        self.incoming.append(data)

    @property
    def left(self) -> int:
        return len(self.incoming)

    def ready(self) -> bool:
        return bool(self.incoming) and self.wanted()

    def act(self) -> None:
        self.on_frame()

    def receive(self, buffers: Sequence[Any]) -> int:
        if not self.incoming:
            return 0
        frame, done = self.incoming.popleft(), 0
        for buffer in buffers:
            part = frame[done : done + len(buffer)]
            memoryview(buffer)[: len(part)] = part
            done += len(part)
        return done

    def send(self, buffers: Sequence[Any]) -> bool | None:
        if not self.room:
            return False
        self.room -= 1
        frame = b"".join(buffers)
        return None if frame[:1] == b"\xff" else True  # some are refused, as a tap does

    def offload(self, *, checksum: bool, tso4: bool, tso6: bool, ecn: bool) -> None:
        pass


def _on(calls: dict[str, Any]) -> ModuleType:
    """backends.directory as a module of its own, whose system calls are these."""
    assert directory.__spec__ is not None and directory.__spec__.loader is not None
    module = module_from_spec(directory.__spec__)
    directory.__spec__.loader.exec_module(module)
    for name in ("os", "syscalls"):
        constants = {n: v for n, v in vars(getattr(module, name)).items() if n.isupper()}
        setattr(module, name, SimpleNamespace(**constants, **calls, strerror=os.strerror))
    return module


Directory: Final[type[Any]] = _on(tree.CALLS).Directory
"""`backends.directory.Directory`, on a `tree`."""


class Line(Source, Drain):
    """`ports.Line` number `number`, and the host program at its other end.

    The program says what is given; nothing: it says no more; 0xff first: it is gone.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.is_open = self.is_connected = False
        self._incoming = bytearray()
        self._ended = self._gone = False
        self._shut = (False, False)  # what is received, what is sent

    def listen(
        self,
        wants_read: Callable[[], bool],
        wants_write: Callable[[], bool],
        on_readable: Callable[[], None],
        on_writable: Callable[[], None],
    ) -> None:
        self._wants_read, self._wants_write = wants_read, wants_write
        self._on_readable, self._on_writable = on_readable, on_writable

    def connect(self, said: bytes) -> None:
        """There is a program, which has said something."""
        self.is_connected = True
        self._incoming[:] = said
        self._ended = self._gone = False
        self._shut = (False, False)
        self.room = ROOM_MAX

    def open(self) -> None:
        assert self.is_connected and not self.is_open
        self.is_open = True

    def receive(self, buffers: Sequence[Any]) -> int | None:
        assert self.is_open and any(map(len, buffers)), "nothing that is received looks like an end"
        if self._gone:
            raise ConnectionResetError(errno.ECONNRESET, "gone")
        done = 0
        for buffer in buffers:
            part = self._incoming[: len(buffer)]
            del self._incoming[: len(part)]
            memoryview(buffer)[: len(part)] = part
            done += len(part)
        return done if done or self._ended or self._shut[0] else None

    def send(self, buffers: Sequence[Any]) -> int:
        assert self.is_open
        if self._gone or self._shut[1]:
            raise BrokenPipeError(errno.EPIPE, "gone")
        taken = b"".join(buffers)[: self.room]
        self.sent += taken
        self.room -= len(taken)
        return len(taken)

    def shut(self, *, receive: bool = False, send: bool = False) -> None:
        assert self.is_open
        self._shut = (self._shut[0] or receive, self._shut[1] or send)

    def close(self) -> None:
        assert self.is_open
        self.is_open = self.is_connected = False

    def give(self, data: bytes) -> None:
        if not self.is_open or self._ended:
            return
        self._ended |= not data
        self._gone |= data[:1] == b"\xff"
        if not self._shut[0]:
            self._incoming += data

    @property
    def left(self) -> object:
        readable = len(self._incoming), self._ended, self._gone
        waits = self.is_open and (any(readable) or self._wants_write())
        return (*readable, self.room) if waits else ()

    def _readable(self) -> bool:
        return bool(self._incoming or self._ended or self._gone or self._shut[0]) and self._wants_read()

    def _writable(self) -> bool:
        return bool(self.room or self._gone) and self._wants_write()

    def ready(self) -> bool:
        return self.is_open and (self._readable() or self._writable())

    def act(self) -> None:
        if self._readable():
            self._on_readable()
        if self.is_open and self._writable():
            self._on_writable()


class Exchange(Source):
    """`ports.Exchange`: what is given a program says that calls.

    Of the ports that are dialled each fourth takes the call at once; one has nobody, one is not to be dialled
    so fast, and one takes its time: until something is given, which is not a call then.

    Args:
        lines: the places.
        wake: there is something to tell the model.
    """

    def __init__(self, lines: Sequence[Line], wake: Callable[[], None]) -> None:
        self._lines = lines
        self._wake = wake
        self._late = 0  # dialled, and not yet answered
        self._calls: deque[tuple[bool, bool, bytes]] = deque()  # dialled or not, anybody there, what it says
        self._on_call: Callable[[bool, int | None], None] = lambda dialled, number: None

    def listen(self, on_call: Callable[[bool, int | None], None]) -> None:
        self._on_call = on_call

    def dial(self, port: int) -> bool:
        assert 0 <= port < 1 << 32
        if port % 4 == 3:
            return False
        if self._late or port % 4 == 2:
            self._late += 1
        else:
            self._calls.append((True, port % 4 == 0, b""))
            self._wake()
        return True

    def give(self, data: bytes) -> None:
        if self._late:
            self._late -= 1
            self._calls.append((True, bool(data), b""))
        else:
            self._calls.append((False, True, data))

    @property
    def left(self) -> int:
        return len(self._calls)

    def ready(self) -> bool:
        return bool(self._calls)

    def act(self) -> None:
        dialled, there, said = self._calls.popleft()
        line = next((place for place in self._lines if not place.is_open), None) if there else None
        if line is not None:
            line.connect(said)
        self._on_call(dialled, None if line is None else line.number)
        assert line is None or line.is_open or not line.is_connected, "a connection that nobody looks at"


class BackEnd(Source):
    """`ports.BackEnd` that stops a ring at once when it is asked to.

    What is given is a message, or if it is too short for one: nothing, it closes its socket; 1, it answers no
    more; 2, it answers what it was asked meanwhile, and at once again; 3, it takes nothing more; another
    byte, it tells of a ring that nobody has asked for.
    """

    def __init__(self) -> None:
        self.up = True
        self._given: deque[bytes] = deque()
        self._asked: list[VringState] = []  # and not answered
        self._answers = self._takes = True
        self._regions: Sequence[Any] = ()  # `MemoryRegion`s
        self._rings: dict[int, dict[Request, Any]] = {}  # what it was told of each

    def listen(self, on_answer: Callable[[Header, bytes], None], on_gone: Callable[[str], None]) -> None:
        self._on_answer, self._on_gone = on_answer, on_gone

    def send(self, message: bytes, shared: Sequence[Any] = ()) -> None:
        if not self.up:
            return
        if not self._takes:
            self.hang_up("does not take what it is sent")
            return
        request, payload = parse(parse_header(message[:HEADER_SIZE]), message[HEADER_SIZE:], len(shared))
        match payload:
            case VringState() if request is Request.GET_VRING_BASE:
                assert Request.SET_VRING_ENABLE in self._rings[payload.vring], "a ring that does not run"
                base = self._rings.pop(payload.vring)[Request.SET_VRING_BASE].num
                self._asked.append(payload._replace(num=base))
                if self._answers:
                    self.answer()
            case VringState() | VringAddr() | VringFile():
                assert self._regions
                ring = self._rings.setdefault(payload.vring, {})
                assert request is Request.SET_VRING_CALL or request not in ring, "a ring that runs"
                ring[request] = payload
                if isinstance(payload, VringAddr):
                    places = payload.descriptor, payload.used, payload.available
                    assert all(any(0 <= at - r.user_address < r.size for r in self._regions) for at in places)
                assert request is not Request.SET_VRING_ENABLE or len(ring) == _TOLD
            case tuple():
                self._regions = payload
            case _:
                assert request is Request.SET_FEATURES and not self._rings

    def answer(self) -> None:
        """From now on at once, too."""
        self._answers = True
        while self._asked:
            self._say(pack_reply(Request.GET_VRING_BASE, self._asked.pop(0)))

    def hang_up(self, why: str) -> None:
        if self.up:
            self.up = False
            self._asked.clear()
            self._on_gone(why)

    def give(self, data: bytes) -> None:
        self._given.append(data)

    @property
    def left(self) -> int:
        return len(self._given)

    def ready(self) -> bool:
        return self.up and bool(self._given)

    def act(self) -> None:
        given = self._given.popleft()
        if len(given) >= HEADER_SIZE:
            self._say(given)
            return
        match given[:1]:
            case b"":
                self.hang_up("has closed its socket")
            case b"\1":
                self._answers = False
            case b"\2":
                self.answer()
            case b"\3":
                self._takes = False
            case other:
                self._say(pack_reply(Request.GET_VRING_BASE, VringState(other[0] & 3, 0)))

    def _say(self, message: bytes) -> None:
        if not self.up:
            return
        try:
            header = parse_header(message[:HEADER_SIZE])
            self._on_answer(header, message[HEADER_SIZE:][: header.size].ljust(header.size, b"\0"))
        except MessageError as e:
            self.hang_up(f"has broken the protocol: {e}")
