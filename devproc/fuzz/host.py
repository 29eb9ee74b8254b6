"""The host's end of a device's ports (devproc/ports.py), in memory: what a bench hands to a model."""

from __future__ import annotations

import errno
import stat
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from devproc.backends.directory import ROOT_ID, Node
from devproc.fuzz.inputs import ROOM_MAX
from devproc.vhost.message import (
    HEADER_SIZE,
    MessageError,
    Request,
    VringState,
    pack_reply,
    parse,
    parse_header,
)

DISK_SIZE: Final = 1 << 16
_PART: Final = 4096


class Input:
    """`ports.Input`; `typed` is what the host has sent and the model has not taken."""

    def __init__(self) -> None:
        self.typed = bytearray()
        self.wanted: Callable[[], bool] = lambda: False
        self.on_input: Callable[[], None] = lambda: None

    def listen(self, wanted: Callable[[], bool], on_input: Callable[[], None]) -> None:
        self.wanted, self.on_input = wanted, on_input

    def read(self, limit: int) -> bytes:
        data = bytes(self.typed[: max(limit, 0)])
        del self.typed[: len(data)]
        return data


class Output:
    """`ports.Output` to a host that takes `room` more bytes."""

    def __init__(self) -> None:
        self.room = ROOM_MAX
        self.sent = bytearray()
        self.on_room: Callable[[], None] = lambda: None

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


class Link:
    """`ports.Link`; `incoming` are frames for the model, `room` how many it may send."""

    def __init__(self) -> None:
        self.offloads = True
        self.up = True
        self.incoming: deque[bytes] = deque()
        self.room = ROOM_MAX
        self.wanted: Callable[[], bool] = lambda: False
        self.on_frame: Callable[[], None] = lambda: None
        self.on_room: Callable[[], None] = lambda: None

    def listen(
        self,
        wanted: Callable[[], bool],
        on_frame: Callable[[], None],
        on_room: Callable[[], None],
        on_down: Callable[[], None],
    ) -> None:
        self.wanted, self.on_frame, self.on_room = wanted, on_frame, on_room

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


class Directory:
    """In place of `backends.directory.Directory`: empty, and whatever is asked of it fails."""

    uid = gid = 0
    counts = (1, 0)

    def __init__(self) -> None:
        self._root = Node(ROOT_ID, ((0, 0), ROOT_ID, stat.S_IFDIR, 0), None, b"")

    def forget_all(self) -> None:
        pass

    def forget(self, id: int, lookups: int) -> None:
        pass

    def close(self, handle: int) -> None:
        pass

    def node(self, id: int) -> Node:
        if id != ROOT_ID:
            raise OSError(errno.ESTALE, "no such node")
        return self._root

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def fail(*_: Any, **__: Any) -> Any:
            raise OSError(errno.ENOENT, "it is empty")

        return fail


class Exchange:
    """`ports.Exchange` that is busy for ever: the guest has no connection, whatever it says."""

    def listen(self, on_call: Callable[[bool, int | None], None]) -> None:
        pass

    def dial(self, port: int) -> bool:
        return False


class Line:
    """`ports.Line` that stays empty."""

    number = 0

    def listen(self, *handlers: Callable[..., Any]) -> None:
        pass


class BackEnd(Input):
    """`ports.BackEnd` that stops a ring at once when it is asked to.

    By the first byte of what is `typed` it hangs up (0), or answers what it was not asked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up = True

    def listen(  # type: ignore[override]  # the other port's
        self, on_answer: Callable[..., None], on_gone: Callable[..., None]
    ) -> None:
        self.wanted, self.on_input = lambda: self.up, self._act
        self._on_answer, self._on_gone = on_answer, on_gone

    def send(self, message: bytes, shared: Sequence[Any] = ()) -> None:
        if not self.up:
            return
        request, payload = parse(parse_header(message[:HEADER_SIZE]), message[HEADER_SIZE:], len(shared))
        if request is Request.GET_VRING_BASE:
            self._answer(pack_reply(request, payload))

    def hang_up(self, why: str) -> None:
        if self.up:
            self.up = False
            self._on_gone(why)

    def _act(self) -> None:
        what = self.read(len(self.typed))[0]
        if what:
            self._answer(pack_reply(Request.GET_VRING_BASE, VringState(what & 3, 0)))
        else:
            self.hang_up("has closed its socket")

    def _answer(self, reply: bytes) -> None:
        try:
            self._on_answer(parse_header(reply[:HEADER_SIZE]), reply[HEADER_SIZE:])
        except MessageError as e:
            self.hang_up(str(e))
