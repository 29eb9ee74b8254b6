"""A device process: builds the model's ports, seals itself, and serves until a channel closes.

The supervisor may make accesses over the access channel or through the mailbox; either is served at any time.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NoReturn, Protocol

from devproc import jail, regs, state
from devproc.backends import memory
from devproc.backends.back_end import BackEnd
from devproc.backends.directory import Directory
from devproc.backends.disk import Disk
from devproc.backends.entropy import entropy
from devproc.backends.input import Input
from devproc.backends.kick import Kick
from devproc.backends.line import Exchange, Line
from devproc.backends.output import Output
from devproc.backends.signal import Signal
from devproc.backends.stream import Stream
from devproc.backends.tap import Tap
from devproc.catalog import (
    FD_ACCESS,
    FD_BELL,
    FD_CONTROL,
    FD_FIRST,
    FD_LOG,
    FD_MAILBOX,
    MEMORY_PARAMS,
    Entry,
    Params,
)
from devproc.channel import Channel, ChannelClosed
from devproc.mailbox import Mailbox
from devproc.ports import Device, HostError, Watched
from devproc.record import record
from devproc.wire import (
    ACCESS_FRAME_MAX,
    CONTROL_TABLE,
    DONE_FRAME,
    TEXT_MAX,
    VERSION,
    Counters,
    Done,
    Failed,
    Hello,
    Log,
    Message,
    PeerError,
    Ping,
    Pong,
    Ready,
    Restore,
    Save,
    Sender,
    Set,
    State,
    Stats,
    Stop,
    WireError,
    decode,
    decode_access,
    encode,
    encode_value,
)

EXTRA_FDS: Final = 0  # nursery.Program
_BURST: Final = 64  # posted writes taken in a row before the other descriptors get their turn
_LINGER_S: Final = 1.0  # how long Stop waits for the host to take what the guest has sent
_LOG_MAX: Final = 4096  # a pipe takes this in one piece
_WARNING: Final = 30  # as in the logging module
_BACKENDS: Final[dict[str, Callable[[int], Any]]] = {
    "signal": Signal,
    "kick": Kick,
    "input": Input,
    "output": Output,
    "disk": Disk,
    "directory": Directory,
    "tap": Tap,
    "stream": Stream,
    "exchange": Exchange,
    "line": Line,
    "back-end": BackEnd,
}
SOURCES: Final = {"clock": time.monotonic_ns, "wall": time.time_ns, "entropy": entropy}


def load(entry: Entry) -> type[Any]:
    """Import the device's model, a class that makes a `ports.Device`; raises what the import raises.

    What each process of the kind would find out, the zygote has found out then, in memory that they share.
    """
    model: Any = getattr(importlib.import_module(entry.module), entry.model)
    state.prepare(model)
    regs.digest(model)
    kind: type[Any] = model
    return kind


@record
class _Sample:
    value: state.U8


def warm_up() -> None:
    """In the zygote: run what is imported, opened or set up at its first use, so that the devices share it.

    Sealed, they could neither import nor open.
    """
    try:
        raise ValueError
    except ValueError:
        traceback.format_exc()
    decode(encode(Hello(VERSION, "")))
    state.unpack(_Sample, state.pack(_Sample(1)))
    # Nothing changes, but the dynamic linker has then found them once, not in each child.
    os.sched_setscheduler(0, os.sched_getscheduler(0), os.sched_getparam(0))
    os.umask(os.umask(0))
    os.setresgid(-1, -1, -1)
    os.setresuid(-1, -1, -1)


class Serving(Protocol):
    """What a device process does once it is sealed; `Server` where there is a guest."""

    device: Device

    def serve(self) -> None:
        """Until `Stop`; raises as `Server.serve` does."""


def main(
    ctx: jail.Context,
    model: type[Any],
    name: str,
    serving: Callable[[Entry, type[Any], Params, socket.socket, Channel], Serving] | None = None,
) -> NoReturn:
    """The device process, from the moment it is the supervisor's child; leaves by `os._exit`.

    `serving` takes the first arguments of `Server`, which it is in place of.
    """
    status = 1
    control: Channel | None = None
    try:
        # A posted write then does not take the CPU from the vCPU that sent it.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        os.umask(0)  # a file that is made for the guest has the mode that the guest says
        jail.title(name)
        steps = iter(jail.plan(ctx.mode, "device", ctx.entry.without))
        jail.enter([next(steps)], ctx)  # "descriptors"
        control = ctx.control = Channel(
            socket.socket(fileno=FD_CONTROL), CONTROL_TABLE, "start", Sender.DEVICE, Sender.SUPERVISOR
        )
        access = socket.socket(fileno=FD_ACCESS)
        control.send(Hello(VERSION, ctx.entry.name))
        ready = Ready(regs.digest(model))
        server = (serving or Server)(ctx.entry, model, ctx.params, access, control)
        # A model that imports something only to be saved is found out here, not when the policy kills it.
        server.device.restore(server.device.save())
        server.device.counters()
        jail.await_ids(ctx)
        jail.enter(steps, ctx)
        for level, text in ctx.notes:
            control.send(Log(level, text[:TEXT_MAX]))
        control.send(ready)
        server.serve()
        status = 0
    except ChannelClosed:
        status = 0
    except jail.JailError as e:
        _fail(control, str(e))
    except HostError as e:
        _fail(control, str(e))
    except PeerError as e:
        _fail(control, f"the supervisor broke the protocol: {e}")
    except BaseException as e:
        _log(traceback.format_exc())
        _fail(control, f"{type(e).__name__}: {e}")
    finally:
        os._exit(status)


def _log(text: str) -> None:
    os.write(FD_LOG, text.encode(errors="replace")[-_LOG_MAX:])


def _fail(control: Channel | None, why: str) -> None:
    if control is None:
        _log(why + "\n")
        return
    with contextlib.suppress(OSError):  # a supervisor that is gone, or does not read, must not keep us alive
        control.sock.send(encode(Failed(why[:TEXT_MAX])), socket.MSG_DONTWAIT)


class Server:
    """The loop around one device model.

    Args:
        entry: its kind: which descriptors become which ports, how long each register space is.
        model: the class, called with ports, clocks and parameters by keyword.
        params: the parameters by name.
        access, control: the two channels.
        first: the descriptor number of the entry's first descriptor.
        mailbox: those of the mailbox and its eventfd.
        host: what there is of the host without a descriptor, by name of the source.
    """

    def __init__(
        self,
        entry: Entry,
        model: type[Any],
        params: Params,
        access: socket.socket,
        control: Channel,
        first: int = FD_FIRST,
        mailbox: tuple[int, int] = (FD_MAILBOX, FD_BELL),
        host: Mapping[str, Any] = SOURCES,
    ) -> None:
        self._now: Callable[[], int] = host["clock"]
        self._access = access
        self._control = control
        self._entry = entry
        self._sizes = {int(r.space): r.size for r in entry.regions}
        self._watched: list[Watched] = []
        ports: dict[str, Any] = {name: v for name, v in params.items() if name != entry.fsize}
        for d, fds in entry.own_slots(first):
            if d.kind == "memory":
                ports[d.name] = memory.attach(fds[0], *(ports.pop(p.name) for p in MEMORY_PARAMS))
                continue
            backends = tuple(map(_BACKENDS[d.kind], fds))
            self._watched += [b for b in backends if isinstance(b, Watched)]
            ports[d.name] = backends[0] if d.count is None else backends
        sources = {**host, "log": self._say}
        self.device: Device = model(**ports, **{s: sources[s] for s in entry.sources})
        channels = (access.fileno(), control.fileno())
        self._mailbox = Mailbox(*mailbox, self._sizes, channels, self._watched, self.device, self._now)

    def serve(self) -> None:
        """Serve until `Stop`.

        Raises:
            ChannelClosed: the supervisor closed a channel, or died.
            PeerError: it sent what the protocol does not allow.
            HostError: the host's end of a port is gone.
            Exception: whatever a model raises is our bug.
        """
        device, mailbox, clock = self.device, self._mailbox, self._now
        access, control = self._access.fileno(), self._control.fileno()
        while True:
            busy = mailbox.serve()
            due = device.deadline_ns
            if due is not None and (now := clock()) >= due:
                device.on_deadline(now)
            if mailbox.is_readable(access):
                self._serve_accesses()
                busy = True
            for w, readable, writable in mailbox.ready():
                if writable:
                    w.on_writable(not busy)
                if readable:
                    w.on_readable()
            if mailbox.is_readable(control):
                message = self._control.recv()
                if isinstance(message, Stop):
                    self._drain()
                    device.stop()
                    return
                if isinstance(message, Set):
                    self._set(message)
                else:
                    self._control.send(self._answer(message))

    def _serve_accesses(self) -> None:
        device, sizes = self.device, self._sizes
        recv, send = self._access.recv, self._access.send
        for _ in range(_BURST):
            try:
                frame = recv(ACCESS_FRAME_MAX + 1, socket.MSG_DONTWAIT)
            except BlockingIOError:  # that was all of them
                return
            if not frame:
                raise ChannelClosed
            space, offset, size, *write = decode_access(frame)
            if offset + size > sizes.get(space, 0):
                raise PeerError(f"no register at {offset:#x} of space {space}")
            if not write:
                send(encode_value(device.read(space, offset, size), size))
                return
            data, posted = write
            device.write(space, offset, size, data)
            if not posted:
                send(DONE_FRAME)
                return

    def _say(self, text: str) -> None:
        self._control.send(Log(_WARNING, text[:TEXT_MAX]))

    def _drain(self) -> None:
        until = time.monotonic() + _LINGER_S
        while any(w.wants_write for w in self._watched) and (left := until - time.monotonic()) > 0:
            if self._mailbox.wait(int(left * 1e9)):
                for w, _, writable in self._mailbox.ready():
                    if writable:
                        w.on_writable(True)

    def _set(self, message: Set) -> None:
        try:
            self._entry.check_setting(message.name, message.value)
        except ValueError as e:
            raise PeerError(str(e)) from None
        self.device.set(message.name, message.value)

    def _answer(self, message: Message) -> Message:
        match message:
            case Ping(token):
                return Pong(token)
            case Save():
                return State(self.device.save())
            case Restore(state):
                try:
                    self.device.restore(state)
                except ValueError as e:
                    return Failed(f"restore: {e}"[:TEXT_MAX])
                return Done()
            case Stats():
                return Counters(tuple(self._counters()))
        raise WireError(f"the table lets {type(message).__name__} through")

    def _counters(self) -> Iterator[str | int]:
        for name, count in self.device.counters().items():
            yield name
            yield count
