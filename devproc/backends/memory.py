"""Guest memory in a device process: what it was handed, mapped before its jail is sealed.

That is one memfd, our own; or, where the guest is another VMM's, a socket with the front end's SET_MEM_TABLE
in it (QEMU, docs/interop/vhost-user.rst), whose regions may lie anywhere in several files.  Nobody keeps
those files from being truncated: this process then dies of SIGBUS, and no other, because no other maps them.
Left out: files of huge pages, which only map in pieces of their size.
"""

from __future__ import annotations

import _thread  # not threading, which has much to do in each process that is forked
import mmap
import os
import socket
import stat
from collections.abc import Sequence
from typing import Final, cast

from devproc import syscalls
from devproc.ports import HostError
from devproc.vhost.connection import Connection
from devproc.vhost.message import Memory, Request, parse
from kvmcore.memory import MAP_NORESERVE, GuestMemory, Region

_HIGH_GPA: Final = 1 << 32


def attach(fd: int, below: int, above: int) -> GuestMemory:
    """RAM of `below` bytes from 0 and `above` bytes from 4 GiB, in this order in the file `fd`; or see above.

    It takes over `fd`, and is kept until the process ends.

    Raises:
        ValueError: the file has another size.
        HostError: a region of the front end's cannot be mapped.
    """
    if stat.S_ISSOCK(os.fstat(fd).st_mode):
        return _receive(Connection(socket.socket(fileno=os.dup(fd))))
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


def _receive(connection: Connection) -> GuestMemory:
    received = connection.receive()
    connection.close()
    try:
        request, regions = parse(received.header, received.body, len(received.fds))
        assert request is Request.SET_MEM_TABLE
        return _Patchwork(cast(Memory, regions), received.fds)
    except OSError as e:
        raise HostError(f"guest memory: {e.strerror}") from None
    finally:
        received.close()


class _Patchwork(GuestMemory):
    """RAM that is pieces of files, which lie one after the other in one mapping."""

    def __init__(self, regions: Memory, fds: Sequence[int]) -> None:
        at = 0
        placed = []
        for r in regions:
            placed.append(Region(r.guest_address, r.size, at))
            at += r.size
        self.regions = tuple(sorted(placed))
        self.size = at
        self._map = mmap.mmap(-1, at, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        self._view = memoryview(self._map)
        self._lock = _thread.allocate_lock()
        for r, fd in zip(regions, fds, strict=True):
            host = self.host_address(r.guest_address, r.size)
            syscalls.map_over(host, r.size, fd, r.mmap_offset)
