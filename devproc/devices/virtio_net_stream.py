"""A virtio network card on a stream of plain frames, such as passt's (virtio 1.2, section 5.1).

Left out, beside what `virtio_net` leaves out: offloads, for which the stream has no header, and more than one
pair of queues.
"""

from __future__ import annotations

from devproc.catalog import NET_STREAM
from devproc.devices.virtio_net import CONFIG, VirtioNet
from devproc.virtio.device import virtio_tables


class VirtioNetStream(VirtioNet):
    """One card; its ports are those of `VirtioNet`.

    Threats: those of `VirtioNet`, and
        1. A header asks for a checksum or segments, of which the stream could say nothing → dropped.
    """

    VIRTIO = NET_STREAM
    TABLES = virtio_tables(NET_STREAM, CONFIG)
