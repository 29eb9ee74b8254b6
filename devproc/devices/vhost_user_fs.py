"""A directory that a vhost-user back end serves (virtio 1.2, section 5.11; devproc/virtio/vhost_user.py).

Left out: DAX, notifications, and more than one request queue.
"""

from __future__ import annotations

from typing import Any, Final

from devproc.catalog import FS
from devproc.regs import Register
from devproc.virtio.device import virtio_tables
from devproc.virtio.vhost_user import VhostUser


class VhostUserFs(VhostUser):
    """One directory; its other ports are those of `VhostUser`.

    Ports:
        tag: its name for the guest, up to 36 bytes.

    Threats: those of `VhostUser`, and of a guest
        1. The tag is read in any width, or past its end → its bytes, and NUL; the rest floats.
    """

    VIRTIO = FS
    TABLES = virtio_tables(
        FS,
        (
            Register("tag", 0, "RO", "name to mount by, padded with NUL", "5.11.4", size=36),
            Register(
                "num_request_queues", 36, "RO", "request queues", "5.11.4", size=4,
                reset=len(FS.queue_sizes) - 1, stored=True,
            ),
        ),
    )  # fmt: skip

    def __init__(self, *, tag: bytes, **transport: Any) -> None:
        super().__init__(**transport)
        self._tag: Final = int.from_bytes(tag, "little")

    def read_tag(self) -> int:
        return self._tag
