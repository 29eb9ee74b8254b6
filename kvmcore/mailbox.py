"""What both ends of a device's mailbox share: a page, and an eventfd that wakes the device (_mailbox.h)."""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import NamedTuple, Self


class Mailbox(NamedTuple):
    """Two descriptors, the caller's to close: `page` is a sealed memfd, `bell` an eventfd."""

    page: int
    bell: int

    @classmethod
    def create(cls) -> Self:
        """Raises OSError."""
        page = os.memfd_create("mailbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(page, mmap.PAGESIZE)
            # A device that shrank it would end the supervisor by SIGBUS.
            fcntl.fcntl(page, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(page, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        except BaseException:
            os.close(page)
            raise

    @property
    def fds(self) -> tuple[int, int]:
        """Both, in the order of a device's slots."""
        return self.page, self.bell

    def close(self) -> None:
        """Give both back; who has mapped or duplicated them goes on."""
        for fd in self.fds:
            os.close(fd)
