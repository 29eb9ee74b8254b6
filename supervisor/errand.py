"""What the process that hears a front end has done for it: one question, one answer, in frames of one socket.

The process that asks is sealed and parses what a hostile front end says (supervisor/frontend.py); the other
one starts the device's (supervisor/worker.py).  A question is a record of `devproc.state`, whose every
value is checked again, and descriptors; the answer is another.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final

from devproc import state
from devproc.catalog import CATALOG
from devproc.record import record
from devproc.state import U8, U16, U64, Length
from devproc.vhost.message import CONFIG_MAX, REGIONS_MAX, Memory, MemoryRegion
from supervisor.worker import NotAccepted, Vring, Worker

VRINGS_MAX: Final = max(len(e.virtio.queue_sizes) for e in CATALOG.values() if e.virtio is not None)
FDS_MAX: Final = REGIONS_MAX + 2 * VRINGS_MAX
TEXT_MAX: Final = 1000
_FRAME_MAX: Final = 16384
_INT_SIZE: Final = array.array("i").itemsize

Bytes = Annotated[bytes, Length(0, CONFIG_MAX)]


@record
class Region:
    """A `MemoryRegion`, of which a descriptor comes along."""

    guest_address: U64
    size: U64
    user_address: U64
    mmap_offset: U64


@record
class Ring:
    """A `Vring`, of which the kick comes along, and then the call if it has one."""

    index: U8
    size: U16
    desc: U64
    driver: U64
    device: U64
    position: U16
    has_call: bool


@record
class Serve:
    """`Worker.serve`; answered by `Done` or `Refused`."""

    features: U64
    memory: Annotated[tuple[Region, ...], Length(1, REGIONS_MAX)]
    rings: Annotated[tuple[Ring, ...], Length(1, VRINGS_MAX)]


@record
class Halt:
    """`Worker.halt`; answered by `Positions`."""


@record
class Left:
    """The front end has gone, and `why` if we sent it away; answered by `Done`."""

    why: Annotated[bytes, Length(0, TEXT_MAX)]


@record
class ReadConfig:
    """`Worker.read_config`; answered by `Config`."""

    offset: U16
    size: U16


@record
class WriteConfig:
    """`Worker.write_config`; answered by `Done`."""

    offset: U16
    data: Bytes


@record
class Done:
    """It is done."""


@record
class Refused:
    """`NotAccepted`."""

    why: Annotated[bytes, Length(0, TEXT_MAX)]


@record
class Position:
    index: U8
    position: U16


@record
class Positions:
    rings: Annotated[tuple[Position, ...], Length(0, VRINGS_MAX)]


@record
class Config:
    data: Bytes


_QUESTIONS: Final[tuple[type[Any], ...]] = (Serve, Halt, Left, ReadConfig, WriteConfig)


class Asker:
    """The sealed process's end, and there in place of a `Worker`.

    Attributes:
        vrings: what is being served, by queue.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.vrings: Mapping[int, Vring] = {}
        self._sock = sock

    def serve(self, features: int, memory: Memory, files: Sequence[int], vrings: Mapping[int, Vring]) -> None:
        """As `Worker.serve`."""
        fds = list(files)
        for v in vrings.values():
            fds += [v.kick] if v.call is None else [v.kick, v.call]
        rings = tuple(
            Ring(i, v.size, v.desc, v.driver, v.device, v.position, v.call is not None)
            for i, v in vrings.items()
        )
        answer = self._ask(Serve(features, tuple(Region(*r) for r in memory), rings), (Done, Refused), fds)
        if isinstance(answer, Refused):
            raise NotAccepted(answer.why.decode(errors="replace"))
        self.vrings = vrings

    def halt(self) -> dict[int, int]:
        """As `Worker.halt`."""
        if not self.vrings:
            return {}
        self.vrings = {}
        return {at.index: at.position for at in self._ask(Halt(), (Positions,)).rings}

    def left(self, why: str) -> None:
        """The front end is gone; `why` is for the user, if there is anything to say."""
        self.vrings = {}
        self._ask(Left(why.encode()[:TEXT_MAX]), (Done,))

    def read_config(self, offset: int, size: int) -> bytes:
        """As `Worker.read_config`."""
        data: bytes = self._ask(ReadConfig(offset, size), (Config,)).data
        return data

    def write_config(self, offset: int, data: bytes) -> None:
        """As `Worker.write_config`."""
        self._ask(WriteConfig(offset, data), (Done,))

    def _ask(self, question: Any, answers: tuple[type[Any], ...], fds: Sequence[int] = ()) -> Any:
        """Raises EOFError: there is nobody any more."""
        frame = state.pack(question)
        try:
            socket.send_fds(self._sock, [frame], list(fds)) if fds else self._sock.send(frame)
            answer = self._sock.recv(_FRAME_MAX)
        except ConnectionError:
            raise EOFError from None
        if not answer:
            raise EOFError
        return _parse(answers, answer)


def answer(sock: socket.socket, worker: Worker, say: Callable[[str], None]) -> None:
    """Take one question from `sock` and answer it; `say` takes why a front end was sent away.

    Raises:
        EOFError: there is nobody any more.
        ValueError: it asks what it may not.
        DeviceDied: the device's process fails.
    """
    frame, fds = _receive(sock)
    try:
        question = _parse(_QUESTIONS, frame)
        if len(fds) != _fds_of(question):
            raise ValueError(f"{type(question).__name__} with {len(fds)} descriptors")
        done = _do(worker, question, fds, say)
    finally:
        for fd in fds:
            os.close(fd)
    sock.send(state.pack(done))


def _fds_of(question: Any) -> int:
    if not isinstance(question, Serve):
        return 0
    return len(question.memory) + sum(1 + ring.has_call for ring in question.rings)


def _do(worker: Worker, question: Any, fds: list[int], say: Callable[[str], None]) -> Any:
    match question:
        case Serve(features, memory, rings):
            files, rest = fds[: len(memory)], iter(fds[len(memory) :])
            regions = tuple(
                MemoryRegion(r.guest_address, r.size, r.user_address, r.mmap_offset) for r in memory
            )
            vrings = {
                r.index: Vring(
                    r.size, r.desc, r.driver, r.device, r.position,
                    next(rest), next(rest) if r.has_call else None,
                )
                for r in rings
            }  # fmt: skip
            if max(vrings) >= worker.queues:
                raise ValueError(f"queue {max(vrings)}")
            try:
                worker.serve(features, regions, files, vrings)
            except NotAccepted as e:
                return Refused(str(e).encode()[:TEXT_MAX])
            return Done()
        case Halt():
            return Positions(tuple(Position(i, at) for i, at in worker.halt().items()))
        case Left(why):
            worker.stop()
            if why:
                say(why.decode(errors="replace"))
            return Done()
        case ReadConfig(offset, size) if offset + size <= CONFIG_MAX:
            return Config(worker.read_config(offset, size))
        case WriteConfig(offset, data) if offset + len(data) <= CONFIG_MAX:
            worker.write_config(offset, data)
            return Done()
    raise ValueError(f"{question}")


def _parse(kinds: Sequence[type[Any]], frame: bytes) -> Any:
    """Raises ValueError."""
    for kind in kinds:
        if frame.startswith(b'{"%s":' % kind.__name__.encode()):
            return state.unpack(kind, frame)
    raise ValueError(f"unexpected {frame[:40]!r}")


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """A frame and its descriptors, close-on-exec."""
    frame, ancillary, flags, _ = sock.recvmsg(
        _FRAME_MAX, socket.CMSG_LEN(FDS_MAX * _INT_SIZE), socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % _INT_SIZE])
    if not frame or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        for fd in fds:
            os.close(fd)
        raise EOFError if not frame else ValueError("a frame that is too long")
    return frame, list(fds)
