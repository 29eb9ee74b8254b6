"""What a vhost-user front end asks of us, and what becomes of it: the back end's half of the protocol.

Spec: QEMU's docs/interop/vhost-user.rst.  The front end is as hostile as its guest: every message is parsed
whole, every address translated, every descriptor looked at before the device's process (supervisor/worker.py)
is given it.  All of that happens in a process of its own, sealed by policies/frontend.policy, which maps none
of the front end's memory, reads none of its eventfds, and holds nothing else.

A ring is served once it is set up, enabled and kicked.  Whatever changes what the process holds ends it, and
another goes on; the front end's own quiet is what is waited for before that.  Left out: dirty logging,
postcopy, in-flight tracking, in-band notifications and the error eventfd: none of them is offered, or needed.
A disabled ring is not served at all, where a network card should take frames from it and drop them.
"""

from __future__ import annotations

import os
import select
import socket
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, cast

from devproc import jail
from devproc.vhost import message
from devproc.vhost.connection import Closed, Connection, Received
from devproc.vhost.message import (
    ConfigSpace,
    Memory,
    MessageError,
    Payload,
    Request,
    VringAddr,
    VringFile,
    VringState,
)
from devproc.virtio import spec
from supervisor import companion
from supervisor.errand import Asker
from supervisor.worker import NotAccepted, Vring

_PROTOCOL: Final = message.PROTOCOL_F_MQ | message.PROTOCOL_F_REPLY_ACK
_SETTLE_MS: Final = 5
"""How long a front end is quiet before a process is made for what it has set up so far."""
_PAGE: Final = 4096
_GPA_END: Final = 1 << 52
_EVENTFD: Final = "anon_inode:[eventfd]"


@dataclass
class _Ring:
    """What the front end has said of one ring; the descriptors are ours."""

    size: int = 0
    addr: VringAddr | None = None
    base: int = 0
    kick: int | None = None
    call: int | None = None
    enabled: bool = False
    kicked: bool = False

    def close(self) -> None:
        for fd in (self.kick, self.call):
            if fd is not None:
                os.close(fd)
        self.kick = self.call = None


class FrontEnd:
    """One connection, from its first message to its last.

    Args:
        offered: the features of virtio that it may have.
        rings: how many it may set up; `queues` what it is told, which for a card counts pairs.
        has_config: whether the device's configuration is ours, and not the front end's.
    """

    def __init__(
        self, sock: socket.socket, worker: Asker, offered: int, rings: int, queues: int, has_config: bool
    ) -> None:
        self._connection = Connection(sock)
        self._worker = worker
        self._offered = offered | message.F_PROTOCOL_FEATURES
        self._protocol_offered = _PROTOCOL | (message.PROTOCOL_F_CONFIG if has_config else 0)
        self._queues = queues
        self._features = 0
        self._protocol = 0
        self._memory: Memory = ()
        self._files: list[int] = []
        self._rings = [_Ring() for _ in range(rings)]
        self._answers: Mapping[Request, Callable[[], int]] = {
            Request.GET_FEATURES: lambda: self._offered,
            Request.GET_PROTOCOL_FEATURES: lambda: self._protocol_offered,
            Request.GET_QUEUE_NUM: lambda: self._queues,
        }

    # -- the run loop's side

    def wants(self) -> list[int]:
        """What to wait for: messages, and kicks of rings that nobody serves yet."""
        fds = [self._connection.fileno()]
        fds += [r.kick for i, r in enumerate(self._rings) if r.kick is not None and self._waits(i)]
        return fds

    def ready(self, fd: int) -> None:
        """Take a message, or start serving what has been kicked.

        Raises:
            Closed: it has left.
            MessageError: it does what the protocol does not allow.
            NotAccepted: the device does not take what it has set up.
            EOFError: who starts the device's process has ended.
        """
        if fd == self._connection.fileno():
            self._take(self._connection.receive())
        else:
            for ring in self._rings:
                ring.kicked = ring.kicked or ring.kick == fd
        self._serve()

    def close(self) -> None:
        """Forget it; the device's process must not be serving any more."""
        self._connection.close()
        for fd in self._files:
            os.close(fd)
        for ring in self._rings:
            ring.close()

    # -- serving

    def _settled(self, index: int) -> bool:
        """Whether all that ring `index` needs has been said."""
        ring = self._rings[index]
        enabled = ring.enabled or not self._features & message.F_PROTOCOL_FEATURES
        return bool(enabled and self._memory and ring.size and ring.addr) and ring.kick is not None

    def _waits(self, index: int) -> bool:
        return index not in self._worker.vrings and self._settled(index)

    def _serve(self) -> None:
        """Have all rings served that can be, if one that is not was kicked."""
        if not any(ring.kicked and self._waits(i) for i, ring in enumerate(self._rings)):
            return
        if _readable([self._connection.fileno()], _SETTLE_MS):
            return
        self._halt()
        vrings = {i: self._translated(i, ring) for i, ring in enumerate(self._rings) if self._settled(i)}
        self._worker.serve(self._features & ~message.F_PROTOCOL_FEATURES, self._memory, self._files, vrings)
        for i in vrings:
            self._rings[i].kicked = True

    def _halt(self) -> None:
        for index, position in self._worker.halt().items():
            self._rings[index].base = position

    def _translated(self, index: int, ring: _Ring) -> Vring:
        addr, packed = ring.addr, self._features & spec.F_RING_PACKED
        assert addr is not None and ring.kick is not None  # it is settled
        if packed and ring.base & 0x7FFF >= ring.size:
            raise MessageError(f"vring {index} of {ring.size} entries is to go on at {ring.base:#x}")
        return Vring(
            ring.size,
            self._gpa(addr.descriptor),
            self._gpa(addr.available),
            self._gpa(addr.used),
            ring.base,
            ring.kick,
            ring.call,
        )

    def _gpa(self, user_address: int) -> int:
        """That what starts there is in RAM to its end is the device's to see, from ring format and size."""
        for r in self._memory:
            if 0 <= user_address - r.user_address < r.size:
                return r.guest_address + user_address - r.user_address
        raise MessageError(f"user address {user_address:#x} is in no memory region")

    # -- messages

    def _take(self, received: Received) -> None:
        try:
            request, payload = message.parse(received.header, received.body, len(received.fds))
            answer = self._do(request, payload, received.fds)
        finally:
            received.close()
        if message.answered(request) or (
            received.header.need_reply and self._protocol & message.PROTOCOL_F_REPLY_ACK
        ):
            self._connection.send(message.pack_reply(request, answer))

    def _do(self, request: Request, payload: Payload, fds: list[int]) -> Payload:
        """Do what is asked; `fds` that are kept are taken out.  The answer, or 0."""
        match request, payload:
            case ((Request.GET_FEATURES | Request.GET_PROTOCOL_FEATURES | Request.GET_QUEUE_NUM), _):
                return self._answers[request]()
            case Request.SET_FEATURES, int(features):
                self._set_features(features)
            case Request.SET_PROTOCOL_FEATURES, int(features):
                if features & ~self._protocol_offered:
                    raise MessageError(f"protocol features {features:#x} of {self._protocol_offered:#x}")
                self._protocol = features
            case ((Request.SET_OWNER | Request.RESET_OWNER), _):
                pass  # the connection says who owns us, and rings are stopped one by one
            case Request.SET_MEM_TABLE, _:
                self._set_memory(cast(Memory, payload), fds)
            case ((Request.SET_VRING_NUM | Request.SET_VRING_BASE | Request.SET_VRING_ENABLE), VringState()):
                self._set_state(request, payload)
            case Request.SET_VRING_ADDR, VringAddr():
                ring = self._ring(payload.vring)
                if payload.flags:
                    raise MessageError(f"vring {payload.vring} with flags {payload.flags:#x}: not offered")
                if ring.addr != payload:
                    self._halt()
                    ring.addr = payload
            case Request.GET_VRING_BASE, VringState():
                return self._get_base(payload.vring)
            case ((Request.SET_VRING_KICK | Request.SET_VRING_CALL | Request.SET_VRING_ERR), VringFile()):
                self._set_file(request, payload, fds)
            case Request.GET_CONFIG, ConfigSpace():
                return ConfigSpace(
                    payload.offset, self._worker.read_config(payload.offset, len(payload.data))
                )
            case Request.SET_CONFIG, ConfigSpace():
                self._worker.write_config(payload.offset, payload.data)
        return 0

    def _ring(self, index: int) -> _Ring:
        if index >= len(self._rings):
            raise MessageError(f"vring {index}, there are {len(self._rings)}")
        return self._rings[index]

    def _set_features(self, features: int) -> None:
        if features & ~self._offered:
            raise MessageError(f"features {features:#x} of {self._offered:#x}")
        if features != self._features:
            self._halt()
            self._features = features

    def _set_memory(self, memory: Memory, fds: list[int]) -> None:
        for r, fd in zip(memory, fds, strict=True):
            _check_region(r, fd)
        _check_apart("guest", [(r.guest_address, r.size) for r in memory])
        _check_apart("user", [(r.user_address, r.size) for r in memory])
        self._halt()
        for fd in self._files:
            os.close(fd)
        self._memory = memory
        self._files = [fds.pop(0) for _ in memory]

    def _set_state(self, request: Request, state: VringState) -> None:
        ring = self._ring(state.vring)
        if request is Request.SET_VRING_ENABLE:
            if ring.enabled != bool(state.num):
                self._halt()
                ring.enabled = bool(state.num)
            return
        self._halt()
        if request is Request.SET_VRING_BASE:
            # Of a packed ring the upper half is where its used descriptors are: nothing is in flight.
            ring.base = state.num & 0xFFFF
        elif 0 < state.num <= spec.QUEUE_SIZE_MAX:
            ring.size = state.num
        else:
            raise MessageError(f"vring {state.vring} of {state.num} entries")

    def _get_base(self, index: int) -> VringState:
        """Stop the ring."""
        ring = self._ring(index)
        self._halt()
        if ring.kick is not None:
            os.close(ring.kick)
        ring.kick, ring.kicked = None, False
        packed = self._features & spec.F_RING_PACKED
        return VringState(index, ring.base | (ring.base << 16 if packed else 0))

    def _set_file(self, request: Request, file: VringFile, fds: list[int]) -> None:
        ring = self._ring(file.vring)
        if fds and os.readlink(f"/proc/self/fd/{fds[0]}") != _EVENTFD:
            raise MessageError(f"{request.name}: not an eventfd")
        if request is Request.SET_VRING_ERR:
            return
        if request is Request.SET_VRING_KICK and not fds:
            raise MessageError(f"vring {file.vring} is to be polled, which is not offered")
        self._halt()
        fd = fds.pop() if fds else None
        if fd is not None:
            os.set_blocking(fd, False)  # or whoever shares it could make the device wait
        if request is Request.SET_VRING_KICK:
            ring.kick, fd = fd, ring.kick
        else:
            ring.call, fd = fd, ring.call
        if fd is not None:
            os.close(fd)


def _check_region(r: message.MemoryRegion, fd: int) -> None:
    what = f"memory region {r.guest_address:#x}"
    if not r.size or r.guest_address % _PAGE or r.size % _PAGE or r.mmap_offset % _PAGE:
        raise MessageError(f"{what}: {r.size:#x} bytes from {r.mmap_offset:#x} on, expected whole pages")
    if r.guest_address + r.size > _GPA_END or r.user_address + r.size > 1 << 64:
        raise MessageError(f"{what}: {r.size:#x} bytes are beyond what there is")
    file = os.fstat(fd)
    if not stat.S_ISREG(file.st_mode):
        raise MessageError(f"{what}: not a file")
    if r.mmap_offset + r.size > file.st_size:
        raise MessageError(
            f"{what}: ends at {r.mmap_offset + r.size:#x} of a file of {file.st_size:#x} bytes"
        )


def _check_apart(kind: str, ranges: list[tuple[int, int]]) -> None:
    end = 0
    for start, size in sorted(ranges):
        if start < end:
            raise MessageError(f"memory regions overlap at {kind} address {start:#x}")
        end = start + size


def serve(
    control: socket.socket,
    listener: socket.socket,
    make: Callable[[socket.socket, Asker], FrontEnd],
    mode: jail.Mode,
) -> None:
    """The sealed process: one front end after the other, until the other end of `control` closes."""
    if control.recv(1) != companion.SEAL:
        return
    companion.seal("frontend", control, mode, 0)
    asker = Asker(control)
    front_end: FrontEnd | None = None
    while True:
        others = [listener.fileno()] if front_end is None else front_end.wants()
        ready = _readable([control.fileno(), *others])
        if control.fileno() in ready:
            return
        if front_end is None:
            front_end = make(listener.accept()[0], asker)
            continue
        try:
            for fd in ready:
                if fd in front_end.wants():  # not so if what was ready before it has changed that
                    front_end.ready(fd)
        except (Closed, MessageError, NotAccepted) as e:
            asker.left("" if isinstance(e, Closed) else f"the front end is disconnected: {e}")
            front_end.close()
            front_end = None


def _readable(fds: Iterable[int], timeout_ms: int | None = None) -> list[int]:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(timeout_ms)]
