"""What the guest may still write to a virtio function's common configuration, by what it has written before.

Virtio 1.2, 4.1.4.3 and 3.1.1.  Every write comes here before the device sees it, and what the specification
forbids the driver, the device never sees: a queue whose size changed while it was in use has cost others a
guest that writes to its host.  Nothing here is taken from the device's words.  Left out: queue reset, which
is not offered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

from devproc.virtio import spec

_QUEUE_ADDRESSES: Final = range(spec.QUEUE_DESC, spec.QUEUE_DEVICE + 8, 4)
# 4.1.3.1: the width in which the driver must write each; 64-bit fields as two halves.
_WIDTHS: Final = {
    spec.DEVICE_FEATURE_SELECT: 4,
    spec.DRIVER_FEATURE_SELECT: 4,
    spec.DRIVER_FEATURE: 4,
    spec.CONFIG_MSIX_VECTOR: 2,
    spec.DEVICE_STATUS: 1,
    spec.QUEUE_SELECT: 2,
    spec.QUEUE_SIZE: 2,
    spec.QUEUE_MSIX_VECTOR: 2,
    spec.QUEUE_ENABLE: 2,
    **dict.fromkeys(_QUEUE_ADDRESSES, 4),
}


class _Queue:
    """One queue as the guest has set it up; `addresses` as three 64-bit words, in the registers' order."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.addresses = 0
        self.enabled = False

    def address(self, register: int) -> int:
        return self.addresses >> 8 * (register - spec.QUEUE_DESC) & (1 << 64) - 1


class VirtioShadow:
    """The common configuration of one function.

    Args:
        queue_sizes: the largest size of each queue.
        is_ram: whether (gpa, size) is wholly the guest's memory.
        forward: (offset, size, data) to the device; returns when the device has taken it.

    Attributes:
        refused: how many writes the device was spared.

    Threats: the guest, against a device that it has set up,
        1. writes a queue's size or rings after DRIVER_OK, or of an enabled queue -> refused until reset.
        2. writes a size of 0, above the maximum, or for split rings not a power of 2 -> refused.
        3. enables a queue whose rings are misaligned or not wholly RAM, or twice, or by another value than 1,
           or before FEATURES_OK -> refused.
        4. writes features after FEATURES_OK -> refused.
        5. writes in another width, across registers, to a read-only one or past the last -> refused.
        6. selects a queue that does not exist and writes to it -> refused.
        7. clears status bits -> they stay set here; only a reset, 0, opens anything again.
        8. writes from two processors at once -> one after the other, the device in the same order.
    """

    def __init__(
        self,
        queue_sizes: Sequence[int],
        is_ram: Callable[[int, int], bool],
        forward: Callable[[int, int, int], None],
    ) -> None:
        self.refused = 0
        self._queue_sizes = queue_sizes
        self._is_ram = is_ram
        self._forward = forward
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._status = 0
        self._features = 0
        self._select = 0
        self._feature_select = 0
        self._queues = [_Queue(size) for size in self._queue_sizes]

    def write(self, offset: int, size: int, data: int) -> None:
        """A guest write, from the start of the structure."""
        if size == 8:  # as a bus of 32 bits carries it
            self.write(offset, 4, data & 0xFFFFFFFF)
            self.write(offset + 4, 4, data >> 32)
            return
        with self._lock:
            if _WIDTHS.get(offset) != size or not self._note(offset, data):
                self.refused += 1
                return
            self._forward(offset, size, data)
            if offset == spec.DEVICE_STATUS and data == 0:
                # We must mean the same queue, and the specification does not say which a reset selects.
                self._forward(spec.QUEUE_SELECT, 2, 0)
                self._forward(spec.DRIVER_FEATURE_SELECT, 4, 0)

    def _note(self, offset: int, data: int) -> bool:
        """Take the write into account; False if the driver must not make it now."""
        match offset:
            case spec.DEVICE_STATUS if data == 0:
                self._reset()
            case spec.DEVICE_STATUS:
                self._status |= data
            case spec.QUEUE_SELECT:
                self._select = data
            case spec.DRIVER_FEATURE_SELECT:
                self._feature_select = data
            case spec.DRIVER_FEATURE if self._status & spec.FEATURES_OK:
                return False
            case spec.DRIVER_FEATURE if self._feature_select < 2:
                shift = 32 * self._feature_select
                self._features = self._features & ~(0xFFFFFFFF << shift) | data << shift
            case spec.QUEUE_SIZE | spec.QUEUE_ENABLE:
                return self._note_queue(offset, data)
            case _ if offset in _QUEUE_ADDRESSES:
                return self._note_queue(offset, data)
        return True

    def _note_queue(self, offset: int, data: int) -> bool:
        if self._select >= len(self._queues) or self._status & spec.DRIVER_OK:
            return False
        queue = self._queues[self._select]
        if queue.enabled:
            return False
        if offset == spec.QUEUE_SIZE:
            if not self._is_size(data):
                return False
            queue.size = data
        elif offset == spec.QUEUE_ENABLE:
            # After FEATURES_OK it is settled which rings these are.
            if data != 1 or not self._status & spec.FEATURES_OK or not self._is_sound(queue):
                return False
            queue.enabled = True
        else:
            shift = 8 * (offset - spec.QUEUE_DESC)
            queue.addresses = queue.addresses & ~(0xFFFFFFFF << shift) | data << shift
        return True

    @property
    def _packed(self) -> bool:
        """Whether packed rings are negotiated."""
        return bool(self._status & spec.FEATURES_OK and self._features & spec.F_RING_PACKED)

    def _is_size(self, size: int) -> bool:
        """2.7: split rings have a power of 2; 2.8.10.1: packed ones any size."""
        return 0 < size <= self._queue_sizes[self._select] and (self._packed or not size & (size - 1))

    def _is_sound(self, queue: _Queue) -> bool:
        """2.7 and 2.8.10: every ring aligned and wholly in RAM."""
        n = queue.size
        driver: tuple[int, int]
        device: tuple[int, int]
        if self._packed:
            driver = device = (spec.PACKED_EVENT_SIZE, spec.PACKED_EVENT_ALIGN)
        else:
            driver = (6 + 2 * n, spec.SPLIT_DRIVER_ALIGN)
            device = (6 + 8 * n, spec.SPLIT_DEVICE_ALIGN)
        rings = {
            spec.QUEUE_DESC: (spec.DESC_SIZE * n, spec.DESC_ALIGN),
            spec.QUEUE_DRIVER: driver,
            spec.QUEUE_DEVICE: device,
        }
        return self._is_size(n) and all(
            queue.address(register) % align == 0 and self._is_ram(queue.address(register), size)
            for register, (size, align) in rings.items()
        )
