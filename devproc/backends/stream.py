"""Frames over a unix stream socket, each after 4 bytes of length, as passt and QEMU's stream netdev speak.

Spec: passt(1), --fd; QEMU net/stream.c.  The length is big-endian and counts the frame alone.  There is no
`virtio_net_hdr` on the wire, so there are no offloads: the one a frame gets here says "nothing to do".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from devproc.backends.link import Link
from devproc.ports import Buffer

FRAME_MAX: Final = 65535 + 18  # an IP packet, Ethernet header, VLAN tag
_LENGTH: Final = 4
_HEADER: Final = bytes(12)
_BUFFER: Final = 2 * (_LENGTH + FRAME_MAX)


class Stream(Link):
    """The port `ports.Link` on a socket's `fd`; what comes is read in large pieces."""

    offloads = False
    tap = -1

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._buffer = memoryview(bytearray(_BUFFER))
        self._start = self._end = 0  # of what was read and not yet asked for
        self._unsent = b""  # the end of a frame whose beginning is sent

    def receive(self, buffers: Sequence[Buffer]) -> int:
        size = self._size()
        if size is None and self._fill():
            size = self._size()
        if size is None:
            return 0
        start = self._start + _LENGTH
        self._start = start + size
        frame = memoryview(_HEADER + bytes(self._buffer[start : self._start]))
        done = 0
        for buffer in buffers:
            part = frame[done : done + len(buffer)]
            memoryview(buffer)[: len(part)] = part
            done += len(part)
        return done

    def send(self, buffers: Sequence[Buffer]) -> bool | None:
        if self._unsent:
            return False
        if not self.up:
            return None
        header, *parts = buffers
        assert bytes(header) == _HEADER, "this link has no offloads"
        size = sum(map(len, parts))
        try:
            sent = os.writev(self.fd, [size.to_bytes(_LENGTH, "big"), *parts])
        except BlockingIOError:
            self._full = True
            return False
        except OSError:
            self._down()
            return None
        if sent < _LENGTH + size:
            self._unsent = b"".join([size.to_bytes(_LENGTH, "big"), *parts])[sent:]
            self._full = True
        return True

    def offload(self, *, checksum: bool, tso4: bool, tso6: bool, ecn: bool) -> None:
        assert not checksum, "this link has no offloads"

    def on_writable(self, idle: bool) -> None:
        if self._unsent:
            try:
                self._unsent = self._unsent[os.writev(self.fd, [self._unsent]) :]
            except BlockingIOError:
                return
            except OSError:
                self._unsent = b""
                self._down()
            if self._unsent:
                return
        super().on_writable(idle)

    def _size(self) -> int | None:
        """The size of the frame that is there in full."""
        have = self._end - self._start
        if have < _LENGTH:
            return None
        size = int.from_bytes(self._buffer[self._start : self._start + _LENGTH], "big")
        if not 0 < size <= FRAME_MAX:  # that is no frame, and there is no way back into step
            self._down()
            self._start = self._end = 0
            return None
        return size if have >= _LENGTH + size else None

    def _fill(self) -> bool:
        """Read what there is; whether that was anything."""
        if not self.up:
            return False
        rest = bytes(self._buffer[self._start : self._end])
        self._buffer[: len(rest)] = rest
        self._start, self._end = 0, len(rest)
        try:
            count = os.readv(self.fd, [self._buffer[self._end :]])
        except BlockingIOError:
            return False
        except OSError:
            count = 0
        if not count:
            self._down()
        self._end += count
        return count > 0
