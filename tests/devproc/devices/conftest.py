"""A bench on which any catalogue entry's model runs: fake clocks, signals, input and output, real memory."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import tempfile
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from devproc.backends.directory import Directory
from devproc.backends.disk import Disk
from devproc.catalog import CATALOG, MEMORY_PARAMS, Descriptor, Entry
from devproc.driver import PciDriver
from devproc.vhost.message import (
    HEADER_SIZE,
    Header,
    MessageError,
    Payload,
    Request,
    VringState,
    pack_reply,
    parse,
    parse_header,
)
from devproc.wire import Space
from kvmcore.memory import GuestMemory

PARAMS = {
    "names": b"",
    "cid": 3,
    "mem_below_4g": 1 << 30,
    "mem_above_4g": 2 << 30,
    "mac": b"\x02net\0\1",
    "mtu": 0,
    "pairs": 1,
    "bps": 0,
    "pps": 0,
    "iops": 0,
    "read_only": 0,
    "tag": b"shared",
    "sparse": 1,
    "block_size": 512,
    "queues": 1,
    "id": b"vmsup",
    "format": 0,
    "backing_format": 0,
    "packed": 1,
    "features": (1 << 64) - 1 & ~(1 << 33),
    "rings": 2,
    "config": bytes(range(60)),
}
IMAGE_SIZE = 8 << 20
MEMORY = ((0, 16 << 20), (1 << 32, 1 << 20))
NO_LIMIT = 1 << 30


class Port:
    """Whatever kind a port is, the handlers that the model gave it."""

    def __init__(self, **methods: Any) -> None:
        self.handlers: tuple[Callable[..., Any], ...] = ()
        self.__dict__ |= methods

    def listen(self, *handlers: Callable[..., Any]) -> None:
        self.handlers = handlers


class Cable:
    """A queue of an interface on the host, and its other end; frames have their header in front.

    `plain`: while nothing is asked that a socket cannot do, it is one, at which the card may work in C.
    """

    def __init__(self, offloads: bool) -> None:
        self.offloads = offloads
        self.up = True
        self.room = NO_LIMIT  # frames
        self.refuses = False
        self.peek: Callable[[], None] | None = None  # called in the middle of `send`
        self.asked: dict[str, bool] = {}
        self.plain = False
        self._incoming: deque[bytes] = deque()
        self._sent: list[bytes] = []
        self._near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in self._near, self._far:
            end.setblocking(False)
            weakref.finalize(self, end.close)

    @property
    def incoming(self) -> deque[bytes]:
        """Frames for the card, which the host may still add to."""
        waiting = self._take(self._near)
        self._incoming.extendleft(reversed(waiting))
        return self._incoming

    @incoming.setter
    def incoming(self, frames: deque[bytes]) -> None:
        self._incoming = frames

    @property
    def sent(self) -> list[bytes]:
        """What the card has sent."""
        self._sent += self._take(self._far)
        return self._sent

    def _take(self, end: socket.socket) -> list[bytes]:
        frames = []
        with contextlib.suppress(BlockingIOError):
            while True:
                frames.append(end.recv(1 << 18))
        return frames

    @property
    def tap(self) -> int:
        if not self.plain or self.room != NO_LIMIT or self.refuses or self.peek:
            return -1
        with contextlib.suppress(BlockingIOError):
            while self._incoming:
                self._far.send(self._incoming[0])
                self._incoming.popleft()
        return self._near.fileno()

    def listen(self, wanted: Any, on_frame: Any, on_room: Any, on_down: Any) -> None:
        self.wanted, self.on_frame, self.on_room, self.on_down = wanted, on_frame, on_room, on_down

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
        if self.peek:
            self.peek()
        if self.refuses:
            return None
        self.room -= self.room != NO_LIMIT
        self.sent.append(b"".join(buffers))
        return True

    def offload(self, **asked: bool) -> None:
        self.asked = asked


class Operator:
    """The exchange and every host program: `numbers` was dialled; `connect` puts a connection in a place."""

    def __init__(self) -> None:
        self.lines: list[Place] = []
        self.numbers: list[int] = []
        self.busy = False

    def listen(self, on_call: Callable[[bool, int | None], None]) -> None:
        self.on_call = on_call

    def dial(self, port: int) -> bool:
        if not self.busy:
            self.numbers.append(port)
        return not self.busy

    def connect(self, dialled: bool, there: bool = True) -> Place | None:
        """A program has called, or what was dialled is answered; `there`: by anybody."""
        place = next((p for p in self.lines if not p.is_open), None) if there else None
        self.on_call(dialled, None if place is None else place.number)
        return place


class Place:
    """A place for a connection, and the host program at its other end."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.is_open = False

    def listen(self, *handlers: Callable[[], Any]) -> None:
        self.wants_read, self.wants_write, self.on_readable, self.on_writable = handlers

    def open(self) -> None:
        assert not self.is_open
        self.is_open = True
        self.incoming = bytearray()
        self.got = bytearray()
        self.room = 1 << 30
        self.hung_up = self.gone = False
        self.shut_down: set[str] = set()

    def receive(self, buffers: Sequence[Any]) -> int | None:
        assert self.is_open
        if self.gone:
            raise ConnectionResetError
        done = 0
        for buffer in buffers:
            part = bytes(self.incoming[: len(buffer)])
            del self.incoming[: len(part)]
            memoryview(buffer)[: len(part)] = part
            done += len(part)
        return done if done or self.hung_up else None

    def send(self, buffers: Sequence[Any]) -> int:
        assert self.is_open
        if self.gone:
            raise BrokenPipeError
        taken = b"".join(buffers)[: self.room]
        self.got += taken
        self.room -= len(taken)
        return len(taken)

    def shut(self, *, receive: bool = False, send: bool = False) -> None:
        assert self.is_open
        self.shut_down |= {name for name, wanted in (("receive", receive), ("send", send)) if wanted}

    def close(self) -> None:
        assert self.is_open
        self.is_open = False


class Program:
    """A vhost-user back end: what it was `asked`, each with what was shared; how far it is in a ring.

    While it `answers` it does at once.
    """

    def __init__(self) -> None:
        self.up = True
        self.answers = True
        self.asked: list[tuple[Request, Payload, tuple[Any, ...]]] = []
        self.bases: dict[int, int] = {}

    def listen(self, on_answer: Callable[[Header, bytes], None], on_gone: Callable[[str], None]) -> None:
        self.on_answer, self.on_gone = on_answer, on_gone

    def send(self, message: bytes, shared: Sequence[Any] = ()) -> None:
        if not self.up:
            return
        request, payload = parse(parse_header(message[:HEADER_SIZE]), message[HEADER_SIZE:], len(shared))
        self.asked.append((request, payload, tuple(shared)))
        if request is Request.GET_VRING_BASE and self.answers:
            assert isinstance(payload, VringState)
            self.answer(request, VringState(payload.vring, self.bases.get(payload.vring, 0)))

    def answer(self, request: Request, payload: Payload) -> None:
        reply = pack_reply(request, payload)
        try:
            self.on_answer(parse_header(reply[:HEADER_SIZE]), reply[HEADER_SIZE:])
        except MessageError as e:
            self.hang_up(f"has broken the protocol: {e}")

    def hang_up(self, why: str) -> None:
        if self.up:
            self.up = False
            self.on_gone(why)

    def heard(self) -> list[tuple[Request, Payload, tuple[Any, ...]]]:
        """What it was asked since this was last called."""
        asked, self.asked = self.asked, []
        return asked


class Bench:
    """The host's side of one device model, and its guest's: all ports, built from the catalogue entry."""

    def __init__(self, name: str | Entry, memory: GuestMemory | None = None, **params: int) -> None:
        entry = CATALOG[name] if isinstance(name, str) else name
        self.name = name
        self.now_ns = 5_000_000_000_000
        self.wall_ns = 1_700_000_000_000_000_000  # 2023-11-14 22:13:20 UTC, a Tuesday
        self.edges: Counter[str] = Counter()
        self.typed = bytearray()
        self.sent = bytearray()
        self.room = 1 << 30
        self.said: list[str] = []
        self.draws = 0
        self.input = Port(read=self.read)
        self.output = Port(write=self.write)
        self.operator = Operator()
        if entry.guest_memory:
            self.memory = memory or GuestMemory.create(MEMORY)
        self.image = os.memfd_create("image")
        os.truncate(self.image, IMAGE_SIZE)
        self.nothing = os.memfd_create("nothing")
        for fd in self.image, self.nothing:
            weakref.finalize(self, os.close, fd)
        if any(d.kind == "directory" for d in entry.descriptors):
            self.tree = tempfile.TemporaryDirectory()  # pytest's own would be one for all benches of a test
            fd = os.open(self.tree.name, os.O_PATH | os.O_DIRECTORY)
            weakref.finalize(self, os.close, fd)
            self.directory = Directory(fd)
        own = entry.params if not entry.guest_memory else entry.params[len(MEMORY_PARAMS) :]
        self.ports: dict[str, Any] = {d.name: self.port(d) for d in entry.descriptors}
        values = {p.name: params.get(p.name, PARAMS.get(p.name)) for p in own if p.name != entry.fsize}
        sources = {source: getattr(self, source) for source in entry.sources}
        model = getattr(importlib.import_module(entry.module), entry.model)
        self.model = model(**self.ports, **values, **sources)

    # the ports

    def port(self, d: Descriptor) -> Any:
        """What the model gets for a descriptor of the catalogue."""
        if d.count is not None:
            return tuple(self.one_port(d.kind, f"{d.name}{n}") for n in range(d.count))
        return self.one_port(d.kind, d.name)

    def one_port(self, kind: str, name: str) -> Any:
        match kind:
            case "signal":
                return self.signal(name)
            case "kick":
                return Port()
            case "memory":
                return self.memory
            case "disk":
                return Disk(self.image if name == "disk" else self.nothing)
            case "input" | "output":
                return getattr(self, kind)
            case "directory":
                return self.directory
            case "exchange":
                return self.operator
            case "line":
                self.operator.lines.append(Place(100 + len(self.operator.lines)))
                return self.operator.lines[-1]
            case "back-end":
                self.program = Program()
                return self.program
            case "tap" | "stream":
                return Cable(offloads=kind == "tap")
            case _:
                return getattr(self, name)

    def log(self, text: str) -> None:
        self.said.append(text)

    def entropy(self, size: int) -> bytes:
        self.draws += 1
        return bytes([self.draws & 0xFF]) * size

    def signal(self, name: str) -> Any:
        def edge() -> None:
            self.edges[name] += 1

        return edge

    def clock(self) -> int:
        return self.now_ns

    def wall(self) -> int:
        return self.wall_ns

    def write(self, data: bytes) -> int:
        taken = data[: self.room]
        self.sent += taken
        self.room -= len(taken)
        return len(taken)

    def read(self, limit: int) -> bytes:
        assert limit > 0
        data = bytes(self.typed[:limit])
        del self.typed[:limit]
        return data

    # the guest

    def inb(self, offset: int, space: int = Space.PORT) -> int:
        return self.model.read(space, offset, 1)

    def outb(self, offset: int, data: int, space: int = Space.PORT) -> None:
        self.model.write(space, offset, 1, data)

    def driver(self) -> PciDriver:
        """A driver of the virtio function, which it has found and not yet brought up."""
        return PciDriver(self.model, self.memory)

    # the child's loop

    def kick(self, name: str, index: int | None = None) -> None:
        """An edge on a kick, or on one of an array of them."""
        port = self.ports[name] if index is None else self.ports[name][index]
        port.handlers[0]()
        self.pump()

    def pump(self) -> None:
        """Deliver input while the model wants it, then the deadlines that have passed."""
        while self.input.handlers and self.typed and self.input.handlers[0]():
            left = len(self.typed)
            self.input.handlers[1]()
            assert len(self.typed) < left, "watched, readable and not read: a busy loop"
        for _ in range(1000):
            due = self.model.deadline_ns
            if due is None or due > self.now_ns:
                return
            self.model.on_deadline(self.now_ns)
        raise AssertionError("a deadline that does not move: a busy loop")

    def type(self, data: bytes) -> None:
        self.typed += data
        self.pump()

    def drain(self, room: int) -> None:
        self.room = room
        for on_room in self.output.handlers:
            on_room()

    def advance(self, ns: int) -> None:
        """Let time pass, stopping at every deadline."""
        end = self.now_ns + ns
        self.pump()
        while (due := self.model.deadline_ns) is not None and due <= end:
            self._pass(max(0, due - self.now_ns))
            self.pump()
        self._pass(end - self.now_ns)

    def sleep(self, ns: int) -> None:
        """Let time pass without running the device process, then run it."""
        self._pass(ns)
        self.pump()

    def _pass(self, ns: int) -> None:
        self.now_ns += ns
        self.wall_ns += ns

    def fork(self) -> Bench:
        """Another bench in the same state, its model a fresh one that was given the saved state."""
        other = Bench(self.name, getattr(self, "memory", None))
        other.now_ns, other.wall_ns = self.now_ns, self.wall_ns
        other.typed, other.sent, other.room = bytearray(self.typed), bytearray(self.sent), self.room
        other.edges, other.draws = Counter(self.edges), self.draws
        other.model.restore(self.model.save())
        return other


@pytest.fixture
def bench() -> type[Bench]:
    return Bench
