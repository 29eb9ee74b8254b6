"""Guest memory in a device process: the memfd it was handed, mapped before its jail is sealed."""

from __future__ import annotations

from typing import Final

from kvmcore.memory import GuestMemory, Region

_HIGH_GPA: Final = 1 << 32


def attach(fd: int, below: int, above: int) -> GuestMemory:
    """RAM of `below` bytes from 0 and `above` bytes from 4 GiB, in this order in the file `fd`.

    Raises:
        ValueError: the file has another size.
    """
    regions = (Region(0, below, 0), Region(_HIGH_GPA, above, below))
    return GuestMemory.attach(fd, [r for r in regions if r.size])
