"""Guest memory in a device process: the memfd it was handed, mapped before its jail is sealed."""

from __future__ import annotations

import os
from typing import Final

from kvmcore.memory import GuestMemory, Region

_HIGH_GPA: Final = 1 << 32


def attach(fd: int, below: int, above: int) -> GuestMemory:
    """RAM of `below` bytes from 0 and `above` bytes from 4 GiB, in this order in the file `fd`.

    It takes over `fd`, and is kept until the process ends.

    Raises:
        ValueError: the file has another size.
    """
    regions = (Region(0, below, 0), Region(_HIGH_GPA, above, below))
    # Until Python 3.13 a mapping keeps a duplicate of its descriptor.  In a device process, whose numbers are
    # all taken, it gets the one that is free: the declared one, and there is no other.
    spare = os.dup(fd)
    os.close(fd)
    try:
        memory = GuestMemory.attach(spare, [r for r in regions if r.size])
        memory.fd = os.dup2(spare, fd, inheritable=False)
    finally:
        os.close(spare)
    return memory
