"""Random bytes of the host's kernel (getrandom(2))."""

from __future__ import annotations

import os


def entropy(size: int) -> bytes:
    """Up to `size` bytes; none while the kernel has not gathered enough to start with."""
    try:
        return os.getrandom(size, os.GRND_NONBLOCK)
    except BlockingIOError:
        return b""
