"""The errors a user may see: each is one line, and each knows its exit code (ARCHITECTURE.md)."""

from __future__ import annotations

import errno as _errno
import os

EXIT_POWEROFF = 0
EXIT_RESET = 32
EXIT_CRASH = 33
EXIT_PANIC = 34
EXIT_USAGE = 35


class VmsupError(Exception):
    """Base of every error that ends the program with one line on stderr."""

    exit_code = EXIT_CRASH


class ConfigError(VmsupError):
    """The user's file, key or option cannot be used; the text names it and says what was expected."""

    exit_code = EXIT_USAGE


class KvmError(VmsupError):
    """A KVM ioctl failed; names the ioctl and the likely cause."""

    def __init__(self, ioctl: str, err: int, likely: str = "") -> None:
        name = _errno.errorcode.get(err, str(err))
        super().__init__(f"{ioctl}: {os.strerror(err)} ({name})" + (f": {likely}" if likely else ""))
        self.ioctl = ioctl
        self.errno = err


class MemoryFault(VmsupError):
    """A guest-physical range is not wholly inside guest RAM: [gpa, gpa + size)."""

    def __init__(self, gpa: int, size: int) -> None:
        super().__init__(f"guest-physical [{gpa:#x}, {gpa + size:#x}) is not RAM")
        self.gpa = gpa
        self.size = size
