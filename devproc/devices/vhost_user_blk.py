"""A disk that a vhost-user back end serves (virtio 1.2, section 5.2; devproc/virtio/vhost_user.py).

What is left out is what needs more than rings: CONFIG_WCE, by which a driver would write the configuration,
lifetime, secure erase and zones.
"""

from __future__ import annotations

from typing import Any, Final

from devproc.catalog import BLOCK
from devproc.regs import Register
from devproc.virtio import spec
from devproc.virtio.device import virtio_tables
from devproc.virtio.vhost_user import VhostUser

_CONFIG: Final = tuple(
    Register(name, offset, "RO", meaning, "5.2.4", size=size, via="config")
    for name, offset, size, meaning in (
        ("capacity", 0x00, 8, "sectors of 512 bytes"),
        ("size_max", 0x08, 4, "bytes in a segment"),
        ("seg_max", 0x0C, 4, "segments in a request"),
        ("cylinders", 0x10, 2, "geometry"),
        ("heads", 0x12, 1, "geometry"),
        ("sectors", 0x13, 1, "geometry"),
        ("blk_size", 0x14, 4, "bytes in a block"),
        ("physical_block_exp", 0x18, 1, "blocks in a physical block, as a power of 2"),
        ("alignment_offset", 0x19, 1, "first aligned block"),
        ("min_io_size", 0x1A, 2, "blocks"),
        ("opt_io_size", 0x1C, 4, "blocks"),
        ("writeback", 0x20, 1, "cache mode"),
        ("unused0", 0x21, 1, "padding"),
        ("blk_num_queues", 0x22, 2, "num_queues"),
        ("max_discard_sectors", 0x24, 4, "sectors in a range"),
        ("max_discard_seg", 0x28, 4, "ranges in a request"),
        ("discard_sector_alignment", 0x2C, 4, "sectors"),
        ("max_write_zeroes_sectors", 0x30, 4, "sectors in a range"),
        ("max_write_zeroes_seg", 0x34, 4, "ranges in a request"),
        ("write_zeroes_may_unmap", 0x38, 1, "unmap may give room back"),
        ("unused1", 0x39, 3, "padding"),
    )
)


class VhostUserBlk(VhostUser):
    """One disk; its other ports are those of `VhostUser`.

    Ports:
        config: the device configuration, as the back end gave it.

    Threats: those of `VhostUser`, and of a back end
        1. Its configuration is nonsense → it is the guest's to read, and nothing here goes by it.
    """

    VIRTIO = BLOCK
    TABLES = virtio_tables(BLOCK, _CONFIG)

    def __init__(self, *, config: bytes, **transport: Any) -> None:
        super().__init__(**transport)
        self._values: Final = {
            spec.BAR_DEVICE + r.offset: int.from_bytes(config[r.offset : r.offset + r.size], "little")
            for r in _CONFIG
        }

    def read_config(self, offset: int) -> int:
        return self._values[offset]
