"""A disk image: bytes between guest memory and a file or block device (preadv(2), pwritev(2), fallocate(2)).

Everything is synchronous.  Left out: io_uring, which no device process may have, and holes that a guest
could find (a read of one gives zeros as any other).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Final

from devproc import syscalls
from devproc._ring import Ring

SECTOR: Final = 512
BLOCK: Final = 4096  # no host's block is larger, so direct transfers and holes are whole ones of these

_IOV_MAX: Final = 1024  # <bits/xopen_lim.h>
_BOUNCE: Final = 1 << 18  # a multiple of BLOCK
_ZEROS: Final = memoryview(bytes(1 << 16))
_UNSUPPORTED: Final = (
    errno.EOPNOTSUPP,
    errno.EINVAL,
)  # by the file system; for a block device's part of a block

Transfer = Callable[[int, list[memoryview], int], int]


class Disk:
    """The port `ports.Disk` on `fd`, opened for reading or for both, with or without O_DIRECT.

    Attributes:
        length: where the image ends, in bytes.
        size: the whole sectors of it.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.length = self._end()
        self._bounce: memoryview | None = None
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            self._bounce = memoryview(mmap.mmap(-1, _BOUNCE))  # page-aligned

    @property
    def size(self) -> int:
        return self.length // SECTOR * SECTOR

    def read(self, offset: int, into: Sequence[memoryview]) -> None:
        """Fill `into` from `offset` on.

        Raises:
            OSError: it cannot be read to the last byte; some of `into` may be filled.
        """
        try:
            self._transfer(os.preadv, offset, into)
        except OSError as e:
            if self._bounce is None or e.errno != errno.EINVAL:
                raise
            self._bounced(self._bounce, offset, into, write=False)

    def write(self, offset: int, data: Sequence[memoryview]) -> None:
        """Write `data` at `offset`; it is safe after the next `flush`.

        Raises:
            OSError: it cannot be written to the last byte, or would make the image longer; some of it may
                have been written.
        """
        self._check(offset + sum(map(len, data)))
        try:
            self._transfer(os.pwritev, offset, data)
        except OSError as e:
            if self._bounce is None or e.errno != errno.EINVAL:
                raise
            self._bounced(self._bounce, offset, data, write=True)

    def serve(self, ring: Ring, left: int, least: int, *, writable: bool) -> tuple[int, int, int]:
        """Serve the plain reads and writes at the front of `ring` in C: see `ports.File`."""
        return ring.transfer(self._fd, self.size, writable, left, least)

    def flush(self) -> None:
        """Wait until everything written before is on stable storage; raises OSError."""
        os.fdatasync(self._fd)

    def discard(self, offset: int, size: int) -> None:
        """Give the host's blocks wholly in [offset, offset + size) back, where it can take them.

        Raises:
            OSError: the host failed.
        """
        start, end = -(-offset // BLOCK) * BLOCK, (offset + size) // BLOCK * BLOCK
        if start < end:
            self._fallocate(syscalls.FALLOC_FL_PUNCH_HOLE, start, end - start)

    def zero(self, offset: int, size: int, *, unmap: bool) -> None:
        """Make [offset, offset + size) read as zeros; `unmap`: and give its blocks back if possible.

        Raises:
            OSError: not all of it is zeros, or it lies past the image's end.
        """
        self._check(offset + size)
        mode = syscalls.FALLOC_FL_PUNCH_HOLE if unmap else syscalls.FALLOC_FL_ZERO_RANGE
        if not self._fallocate(mode, offset, size):
            for at in range(offset, offset + size, len(_ZEROS)):
                self.write(at, [_ZEROS[: offset + size - at]])

    def close(self) -> None:
        """Nothing is kept in memory."""

    def extend(self, length: int) -> None:
        """Make the image `length` bytes long, unless the host has done that already; raises OSError."""
        assert length >= self.length
        if self._end() < length:
            os.ftruncate(self._fd, length)
        self.length = length

    def _end(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_END)  # of a block device too, which fstat does not give

    def _check(self, end: int) -> None:
        """Writing past the end would make a file longer that someone has made shorter."""
        if end > self._end():
            raise OSError(errno.EIO, "the image has become shorter")

    def _fallocate(self, mode: int, offset: int, size: int) -> bool:
        """Whether the host can do that at all."""
        try:
            syscalls.fallocate(self._fd, mode | syscalls.FALLOC_FL_KEEP_SIZE, offset, size)
        except OSError as e:
            if e.errno not in _UNSUPPORTED:
                raise
            return False
        return True

    def _transfer(self, transfer: Transfer, offset: int, views: Sequence[memoryview]) -> None:
        left = list(views)
        while left:
            done = transfer(self._fd, left[:_IOV_MAX], offset)
            if not done:
                raise OSError(errno.EIO, "the image ends early")
            offset += done
            while left and done >= len(left[0]):
                done -= len(left.pop(0))
            if done:
                left[0] = left[0][done:]

    def _bounced(self, bounce: memoryview, offset: int, views: Sequence[memoryview], *, write: bool) -> None:
        """The transfer in whole aligned blocks, as O_DIRECT needs it (open(2))."""
        end = offset + sum(map(len, views))
        cut = Cut(views)
        for at in range(offset // BLOCK * BLOCK, end, _BOUNCE):
            size = min(_BOUNCE, -(-(end - at) // BLOCK) * BLOCK)
            block = bounce[:size]
            low, high = max(offset, at) - at, min(end, at + size) - at
            if not write or low or high < size:
                self._transfer(os.preadv, at, [block])
            for view in cut.take(high - low):
                if write:
                    block[low : low + len(view)] = view
                else:
                    view[:] = block[low : low + len(view)]
                low += len(view)
            if write:
                self._transfer(os.pwritev, at, [block])


class Cut:
    """Takes a sequence of views apart, front to back."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = iter(views)
        self._view = memoryview(b"")

    def take(self, size: int) -> list[memoryview]:
        """The next `size` bytes, which there must be."""
        taken = []
        while size:
            if not self._view:
                self._view = next(self._views)
                continue
            piece, self._view = self._view[:size], self._view[size:]
            taken.append(piece)
            size -= len(piece)
        return taken
