"""A vhost-user back end at the other end of a unix stream socket (devproc/vhost/message.py; unix(7)).

The supervisor has connected the socket and settled with the back end what both can do
(supervisor/vhosts.py); what comes after that is sent and heard here.  Descriptors that come from the back end
are none that anybody asked for: recv(2) without room for them drops them.
"""

from __future__ import annotations

import array
import contextlib
import socket
from collections.abc import Callable, Sequence
from typing import Final

from devproc.ports import Shared, Watched
from devproc.vhost.message import HEADER_SIZE, PAYLOAD_MAX, Header, MessageError, parse_header

_CHUNK: Final = HEADER_SIZE + PAYLOAD_MAX


class BackEnd(Watched):
    """The port `ports.BackEnd` on a socket's `fd`."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.up = True
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
        self._heard = b""
        self._on_answer: Callable[[Header, bytes], None] = lambda header, body: None
        self._on_gone: Callable[[str], None] = lambda why: None

    def listen(self, on_answer: Callable[[Header, bytes], None], on_gone: Callable[[str], None]) -> None:
        self._on_answer, self._on_gone = on_answer, on_gone

    def send(self, message: bytes, shared: Sequence[Shared] = ()) -> None:
        if not self.up:
            return
        fds = array.array("i", [port.fd for port in shared])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
        try:
            sent = self._socket.sendmsg([message], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        except OSError as e:
            self.hang_up(f"has gone: {e.strerror}")
            return
        if sent < len(message):
            # It is far behind, and the messages of an activation fit into a socket's buffer many times.
            self.hang_up("does not take what it is sent")

    def hang_up(self, why: str) -> None:
        if not self.up:
            return
        self.up = False
        with contextlib.suppress(OSError):  # it may have done so first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._on_gone(why)

    @property
    def wants_read(self) -> bool:
        return self.up

    def on_readable(self) -> None:
        if not self.up:
            return
        try:
            data = self._socket.recv(_CHUNK, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.hang_up("has closed its socket")
            return
        self._heard += data
        try:
            while self.up and len(self._heard) >= HEADER_SIZE:
                header = parse_header(self._heard[:HEADER_SIZE])
                end = HEADER_SIZE + header.size
                if len(self._heard) < end:
                    return
                body, self._heard = self._heard[HEADER_SIZE:end], self._heard[end:]
                self._on_answer(header, body)
        except MessageError as e:
            self.hang_up(f"has broken the protocol: {e}")
