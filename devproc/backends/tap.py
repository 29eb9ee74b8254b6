"""A queue of a tap interface (Linux Documentation/networking/tuntap.rst; include/uapi/linux/if_tun.h).

The descriptor comes with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR set and headers of 12 bytes: supervisor/nets.py.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from typing import Final

from devproc.backends.link import Link
from devproc.ports import Buffer

TUNSETOFFLOAD: Final = 0x400454D0
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN = 1, 2, 4, 8


class Tap(Link):
    """The port `ports.Link` on a tap's `fd`; reads and writes move one frame each."""

    offloads = True

    @property
    def tap(self) -> int:
        return self.fd if self.up else -1

    def receive(self, buffers: Sequence[Buffer]) -> int:
        try:
            return os.readv(self.fd, buffers)
        except BlockingIOError:
            return 0
        except OSError:  # EBADFD: the interface was deleted
            self._down()
            return 0

    def send(self, buffers: Sequence[Buffer]) -> bool | None:
        try:
            os.writev(self.fd, buffers)
        except BlockingIOError:
            self._full = True
            return False
        except OSError as e:
            if e.errno == errno.EBADFD:
                self._down()
            return None  # EIO: the interface is not up; EINVAL: the frame is none after all
        return True

    def offload(self, *, checksum: bool, tso4: bool, tso6: bool, ecn: bool) -> None:
        flags = 0
        if checksum:  # which the kernel wants before any other
            flags = TUN_F_CSUM | TUN_F_TSO4 * tso4 | TUN_F_TSO6 * tso6
            flags |= TUN_F_TSO_ECN * (ecn and (tso4 or tso6))
        if self.up:
            try:
                fcntl.ioctl(self.fd, TUNSETOFFLOAD, flags)
            except OSError:
                self._down()
