"""A source of random numbers for the guest (virtio 1.2, section 5.4).

Left out: nothing; the device has no features and no configuration.
"""

from __future__ import annotations

from typing import Any, Final

from devproc import state
from devproc.catalog import RNG
from devproc.ports import Entropy
from devproc.record import record
from devproc.virtio.device import TransportState, VirtioDevice, virtio_tables

FILL_MAX: Final = 65536
"""Bytes that one chain is given at most; a driver that wants more asks again (5.4.6)."""


@record
class VirtioRngState:
    transport: TransportState


class VirtioRng(VirtioDevice):
    """One queue of buffers to be filled.

    Ports:
        entropy: random bytes of the host.

    Threats:
        1. A buffer of megabytes → FILL_MAX bytes of it are filled.
        2. A readable part, or no room at all → it is given back with nothing written.
        3. Buffers without end → at most BATCH in a row; see VirtioDevice.
        4. The host has no randomness yet → the buffer comes back with what there is, never with other bytes.
    """

    VIRTIO = RNG
    TABLES = virtio_tables(RNG)

    def __init__(self, *, entropy: Entropy, **transport: Any) -> None:
        super().__init__(**transport)
        self._entropy: Final = entropy
        self._counts["bytes"] = 0

    def on_queue(self, index: int) -> None:
        for chain in self.chains(index):
            data = self._entropy(min(chain.write_size, FILL_MAX))
            self._counts["bytes"] += self.memory.copy_in(chain.writable, data)
            self.push(index, chain, len(data))
        self.notify(index)

    def save(self) -> bytes:
        return state.pack(VirtioRngState(self.save_transport()))

    def restore(self, data: bytes) -> None:
        self.restore_transport(state.unpack(VirtioRngState, data).transport)
