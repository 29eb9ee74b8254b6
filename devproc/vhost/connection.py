"""A vhost-user connection: whole messages, with their descriptors, over a stream socket (unix(7))."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence
from typing import Final, NamedTuple

from devproc.vhost.message import HEADER_SIZE, REGIONS_MAX, Header, MessageError, parse_header

PATIENCE_S: Final = 5.0
"""The longest that the rest of a message may take, or the other end to take one."""

_INT_SIZE: Final = array.array("i").itemsize


class Closed(Exception):
    """The other end has left."""


class Received(NamedTuple):
    """A message that is not parsed yet; whoever has it closes `fds`."""

    header: Header
    body: bytes
    fds: list[int]

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


class Connection:
    """One end; takes over `sock`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.settimeout(PATIENCE_S)

    def fileno(self) -> int:
        return self._sock.fileno()

    def receive(self) -> Received:
        """The next message, descriptors close-on-exec.

        Raises:
            Closed: there is none.
            MessageError: it has no header that makes sense, is cut off, or carries too many descriptors.
        """
        room = socket.CMSG_LEN(REGIONS_MAX * _INT_SIZE)
        fds = array.array("i")
        try:
            start, ancillary, flags, _ = self._sock.recvmsg(HEADER_SIZE, room, socket.MSG_CMSG_CLOEXEC)
            for level, kind, data in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.frombytes(data[: len(data) - len(data) % _INT_SIZE])
            if not start:
                raise Closed
            header = parse_header(start + self._exactly(HEADER_SIZE - len(start)))
            if flags & socket.MSG_CTRUNC:  # the kernel has closed the others
                raise MessageError(f"request {header.request} with more than {REGIONS_MAX} descriptors")
            return Received(header, self._exactly(header.size), list(fds))
        except BaseException as e:
            for fd in fds:
                os.close(fd)
            if isinstance(e, TimeoutError):
                raise MessageError(f"a message is cut off for {PATIENCE_S:g} s") from None
            if isinstance(e, ConnectionError):
                raise Closed from None
            raise

    def _exactly(self, size: int) -> bytes:
        """Descriptors that come with these bytes are the kernel's to close."""
        data = b""
        while len(data) < size:
            more = self._sock.recv(size - len(data))
            if not more:
                raise Closed
            data += more
        return data

    def send(self, frame: bytes, fds: Sequence[int] = ()) -> None:
        """Send what `message.pack` made.

        Raises:
            Closed: there is nobody.
            MessageError: they do not take it.
        """
        try:
            if fds:
                # Frames are shorter than what a socket takes at once.
                socket.send_fds(self._sock, [frame], list(fds))
            else:
                self._sock.sendall(frame)
        except TimeoutError:
            raise MessageError(f"the other end takes nothing for {PATIENCE_S:g} s") from None
        except ConnectionError:
            raise Closed from None

    def close(self) -> None:
        self._sock.close()
