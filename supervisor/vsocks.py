"""Opens what the virtio-vsock process works on: its end of the exchange, and places for connections."""

from __future__ import annotations

import os

from devproc.catalog import VSOCK_LINES
from supervisor.host import Host, Opened


def open_vsock(host: Host) -> Opened:
    """The opener of the virtio-vsock process."""
    assert host.exchange is not None
    place = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)  # the process empties its places itself
    host.undo.callback(os.close, place)
    return Opened({"exchange": (host.exchange,), "line": (place,) * VSOCK_LINES})
