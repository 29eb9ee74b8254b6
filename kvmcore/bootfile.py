"""A kernel or initrd on its way from a file of the user's into guest memory.

Every error is one ConfigError line that names the file, for a file is the user's and never our bug.
Left out: anything but regular files, whose size is known before the first byte is read.
"""

from __future__ import annotations

import os
import stat
from types import TracebackType
from typing import Protocol, Self

from kvmcore import layout
from kvmcore.errors import ConfigError


class Memory(Protocol):
    """The part of kvmcore.memory.GuestMemory that loaders use."""

    @property
    def size(self) -> int:
        """Bytes of RAM."""

    def write(self, gpa: int, data: bytes) -> None: ...

    def pread_from(self, fd: int, file_offset: int, gpa: int, size: int) -> int: ...


class BootFile:
    """An open regular file of `size` bytes; `what` ("kernel", "initrd") and `path` begin every error."""

    def __init__(self, what: str, path: str) -> None:
        self._name = f"{what} {path}"
        try:
            # O_NONBLOCK: opening a FIFO must fail below, not wait for a writer.
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as e:
            raise self.error(str(e.strerror)) from None
        except ValueError as e:  # a NUL in the path
            raise self.error(str(e)) from None
        status = os.fstat(self.fd)
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            os.close(self.fd)
            raise self.error("expected a regular file")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        os.close(self.fd)

    def error(self, text: str) -> ConfigError:
        """The error to raise for this file."""
        return ConfigError(f"{self._name}: {text}")

    def check(self, offset: int, size: int, what: str) -> None:
        """Raises ConfigError unless the file holds [offset, offset + size)."""
        if offset + size > self.size:
            raise self.error(f"truncated: {what} ends at {offset + size}, the file at {self.size}")

    def read(self, offset: int, size: int, what: str) -> bytes:
        """Exactly `size` bytes.

        Raises:
            ConfigError: the file ends before that, or cannot be read.
        """
        self.check(offset, size, what)
        try:
            data = os.pread(self.fd, size, offset)
        except OSError as e:
            raise self.error(str(e.strerror)) from None
        if len(data) != size:
            raise self.error(f"truncated while it was read: {what}")
        return data

    def load(self, memory: Memory, offset: int, gpa: int, size: int, what: str) -> None:
        """Put [offset, offset + size) of the file at `gpa`, without a copy in between.

        Raises:
            ConfigError: the file ends before that, or cannot be read.
            MemoryFault: the range is not RAM.
        """
        self.check(offset, size, what)
        try:
            done = memory.pread_from(self.fd, offset, gpa, size)
        except OSError as e:
            raise self.error(str(e.strerror)) from None
        if done != size:
            raise self.error(f"truncated while it was read: {what}")

    def check_kernel_end(self, end: int, memory: Memory) -> None:
        """Raises ConfigError unless a kernel may use guest memory up to `end`."""
        limit = min(layout.low_ram_end(memory.size), layout.IDENTITY_MAPPED)
        if end > limit:
            mem_mib = memory.size // layout.MIB
            raise self.error(f"needs memory up to {end:#x}, expected at most {limit:#x} of {mem_mib} MiB")
