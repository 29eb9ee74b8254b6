"""A network card that a vhost-user back end serves (virtio 1.2, section 5.1; devproc/virtio/vhost_user.py).

Left out: the control queue and all that needs it, more than one pair of queues, link status and MTU, of which
a back end says nothing.
"""

from __future__ import annotations

from typing import Any, Final

from devproc.catalog import VHOST_NET
from devproc.regs import Register
from devproc.virtio.device import virtio_tables
from devproc.virtio.vhost_user import VhostUser

_F_MAC: Final = 1 << 5  # 5.1.3


class VhostUserNet(VhostUser):
    """One card; its other ports are those of `VhostUser`.

    Ports:
        mac: its address.

    Threats: those of `VhostUser`, and of a back end
        1. It offers no F_MAC → the card has its address all the same: that is ours to say.
    """

    VIRTIO = VHOST_NET
    TABLES = virtio_tables(VHOST_NET, (Register("mac", 0, "RO", "Ethernet address", "5.1.4", size=6),))

    def __init__(self, *, mac: bytes, features: int, **transport: Any) -> None:
        super().__init__(features=features | _F_MAC, **transport)
        self._mac: Final = int.from_bytes(mac, "little")

    def read_mac(self) -> int:
        return self._mac
