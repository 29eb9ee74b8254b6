"""Byte streams to programs on the host, each a unix socket that somebody else has connected (unix(7)).

The process can make no socket and connect none.  It has places for connections, and an exchange
(supervisor/exchange.py) that puts one in when a host program calls, or when it is asked to call one.  A
descriptor that comes by SCM_RIGHTS gets the lowest free number, and the process may hold no number beyond its
last place: the only free ones are those of places that are empty.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Callable, Sequence
from typing import Final

from devproc.ports import Buffer, HostError, Watched

_PORT_SIZE: Final = 4
_DIALLED: Final = b"D"
_CMSG_ROOM: Final = socket.CMSG_LEN(array.array("i").itemsize)


class Line(Watched):
    """The port `ports.Line`; `fd` holds its place and is closed."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        os.close(fd)
        self.number: Final = fd
        self._socket: socket.socket | None = None
        self._wants_read: Callable[[], bool] = lambda: False
        self._wants_write: Callable[[], bool] = lambda: False
        self._on_readable: Callable[[], None] = lambda: None
        self._on_writable: Callable[[], None] = lambda: None

    def listen(
        self,
        wants_read: Callable[[], bool],
        wants_write: Callable[[], bool],
        on_readable: Callable[[], None],
        on_writable: Callable[[], None],
    ) -> None:
        self._wants_read, self._wants_write = wants_read, wants_write
        self._on_readable, self._on_writable = on_readable, on_writable

    def open(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, self.fd)

    def receive(self, buffers: Sequence[Buffer]) -> int | None:
        try:
            return os.readv(self.fd, buffers)
        except BlockingIOError:
            return None

    def send(self, buffers: Sequence[Buffer]) -> int:
        try:
            return os.writev(self.fd, buffers)
        except BlockingIOError:
            return 0

    def shut(self, *, receive: bool = False, send: bool = False) -> None:
        assert self._socket is not None
        for how, wanted in ((socket.SHUT_RD, receive), (socket.SHUT_WR, send)):
            if wanted:
                self._socket.shutdown(how)

    def close(self) -> None:
        assert self._socket is not None
        self._socket.close()
        self._socket = None

    @property
    def wants_read(self) -> bool:
        return self._socket is not None and self._wants_read()

    @property
    def wants_write(self) -> bool:
        return self._socket is not None and self._wants_write()

    def on_readable(self) -> None:
        if self._socket is not None:  # another port may have closed it since select
            self._on_readable()

    def on_writable(self, idle: bool) -> None:
        if self._socket is not None:
            self._on_writable()


class Exchange(Watched):
    """The port `ports.Exchange` on `fd`, a non-blocking SOCK_SEQPACKET whose other end is the exchange's."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd)
        self._on_call: Callable[[bool, int | None], None] = lambda dialled, number: None

    def listen(self, on_call: Callable[[bool, int | None], None]) -> None:
        self._on_call = on_call

    def dial(self, port: int) -> bool:
        try:
            os.write(self.fd, port.to_bytes(_PORT_SIZE, "little"))
        except BlockingIOError:
            return False
        except OSError:
            raise HostError("the exchange is gone") from None
        return True

    @property
    def wants_read(self) -> bool:
        return True

    def on_readable(self) -> None:
        """Raises HostError."""
        flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        try:
            frame, ancillary, _, _ = self._socket.recvmsg(1, _CMSG_ROOM, flags)
        except BlockingIOError:
            return
        except OSError:
            frame = b""
        if not frame:
            raise HostError("the exchange is gone")
        # One that found no empty place is closed already.
        self._on_call(frame == _DIALLED, array.array("i", ancillary[0][2])[0] if ancillary else None)
