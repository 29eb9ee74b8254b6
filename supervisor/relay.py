"""Moves bytes between a serial port and a peer that may come and go: a socket's client, a pty's opener.

While there is no peer the port's output is discarded, as a UART's is with no cable; while a peer is slow
its bytes wait, and the guest sees a full transmitter.  What is watched is bounded: one buffer each way.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from abc import ABC, abstractmethod

_CHUNK = 4096
_PTY_RETRY_S = 0.2


class Relay(ABC):
    """`inner` is our end of the pair whose other end the device process holds."""

    def __init__(self, inner: socket.socket) -> None:
        inner.setblocking(False)
        self._inner = inner
        self._to_peer = b""
        self._to_port = b""

    @abstractmethod
    def _peer(self) -> int | None:
        """The peer's descriptor, if there is one now."""

    @abstractmethod
    def _peer_gone(self) -> None:
        """The peer hung up."""

    def wants(self) -> dict[int, int]:
        """Descriptor -> poll events, for the run loop."""
        peer = self._peer()
        inner = select.POLLIN if peer is None or not self._to_peer else 0
        if self._to_port:
            inner |= select.POLLOUT
        wanted = {self._inner.fileno(): inner}
        peers = (0 if self._to_port else select.POLLIN) | (select.POLLOUT if self._to_peer else 0)
        if peer is not None and peers:  # its hang-up counts once all that it has said is read
            wanted[peer] = peers
        return wanted

    def ready(self, fd: int, got: int) -> None:
        """`fd` has events `got`: move what can be moved."""
        peer = self._peer()
        if fd == peer and got & (select.POLLHUP | select.POLLERR) and not got & select.POLLIN:
            self._to_peer = b""
            if not self._to_port:
                self._drop_peer()
        elif fd == peer and got & select.POLLIN and not self._to_port:
            try:
                self._to_port = os.read(fd, _CHUNK)
            except BlockingIOError:
                return
            except OSError:
                self._to_port = b""
            if not self._to_port:
                self._drop_peer()
        elif fd == self._inner.fileno() and got & select.POLLIN and not self._to_peer:
            with contextlib.suppress(OSError):
                self._to_peer = self._inner.recv(_CHUNK)
        if self._to_port:
            with contextlib.suppress(OSError):
                self._to_port = self._to_port[self._inner.send(self._to_port) :]
        if self._to_peer:
            peer = self._peer()
            if peer is None:
                self._to_peer = b""
                return
            try:
                self._to_peer = self._to_peer[os.write(peer, self._to_peer) :]
            except BlockingIOError:
                pass
            except OSError:  # it takes nothing any more
                self._to_peer = b""

    def _drop_peer(self) -> None:
        self._to_peer = b""
        self._peer_gone()

    def close(self) -> None:
        self._inner.close()


class SocketRelay(Relay):
    """One client at a time of a listening socket, or one peer that was connected to at the start."""

    def __init__(
        self, inner: socket.socket, listener: socket.socket | None, client: socket.socket | None = None
    ) -> None:
        super().__init__(inner)
        self._listener = listener
        self._client = client
        for s in (listener, client):
            if s is not None:
                s.setblocking(False)

    def _peer(self) -> int | None:
        return self._client.fileno() if self._client else None

    def _peer_gone(self) -> None:
        if self._client:
            self._client.close()
        self._client = None

    def wants(self) -> dict[int, int]:
        wanted = super().wants()
        if self._listener and not self._client:
            wanted[self._listener.fileno()] = select.POLLIN
        return wanted

    def ready(self, fd: int, got: int) -> None:
        if self._listener and fd == self._listener.fileno():
            with contextlib.suppress(OSError):
                self._client, _ = self._listener.accept()
                self._client.setblocking(False)
        else:
            super().ready(fd, got)

    def close(self) -> None:
        super().close()
        self._peer_gone()
        if self._listener:
            self._listener.close()


class PtyRelay(Relay):
    """Whoever has the pty open; while nobody has, poll() reports a hang-up without end, so we look later."""

    def __init__(self, inner: socket.socket, master: int) -> None:
        super().__init__(inner)
        os.set_blocking(master, False)
        self._master = master
        self._absent_until_s = 0.0

    def _peer(self) -> int | None:
        return self._master if time.monotonic() >= self._absent_until_s else None

    def _peer_gone(self) -> None:
        self._absent_until_s = time.monotonic() + _PTY_RETRY_S

    def close(self) -> None:
        super().close()
        os.close(self._master)
