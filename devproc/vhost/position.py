"""Where a virtio device's queues go on, read from its saved state and written into it, with no device code.

A position is `QueueState.position` of devproc/virtio/device.py: of a split ring the index of the next
available entry, of a packed one its offset with the wrap counter as bit 15.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

_MOST: Final = 0xFFFF


def positions(saved: bytes) -> list[int | None]:
    """The position of each queue, None of one that is not in use.

    Raises:
        ValueError: this is not the state of a virtio device.
    """
    return [_checked(queue["position"]) for queue in _queues(_load(saved))]


def at_positions(saved: bytes, wanted: Mapping[int, int]) -> bytes:
    """The same state, with the queues of these numbers at other positions.

    Raises:
        ValueError: this is not the state of a virtio device that uses them.
    """
    state = _load(saved)
    queues = _queues(state)
    for index, position in wanted.items():
        if index >= len(queues) or queues[index]["position"] is None:
            raise ValueError(f"queue {index} is not in use")
        queues[index]["position"] = position
    return json.dumps(state, separators=(",", ":")).encode()


def _load(saved: bytes) -> Any:
    try:
        return json.loads(saved.decode())
    except (ValueError, RecursionError):
        raise ValueError("not a saved state") from None


def _queues(state: Any) -> list[dict[str, Any]]:
    try:
        (model,) = state.values()
        queues = model["transport"]["queues"]
        for queue in queues:
            _checked(queue["position"])
    except (AttributeError, LookupError, TypeError, ValueError):
        raise ValueError("not a virtio device's saved state") from None
    if type(queues) is not list:
        raise ValueError("not a virtio device's saved state")
    return queues


def _checked(position: Any) -> int | None:
    if position is None or (type(position) is int and 0 <= position <= _MOST):
        return position
    raise ValueError("not a position")
