"""A virtio device in its full jail serves real rings in the memory that it shares with its guest."""

from __future__ import annotations

import os
from typing import Any

import pytest

from devproc.virtio import spec

V1 = spec.F_VERSION_1
EVERY_RING = spec.F_INDIRECT_DESC | spec.F_EVENT_IDX | spec.F_RING_PACKED


@pytest.mark.parametrize("features", [V1, V1 | EVERY_RING], ids=["split", "packed"])
def test_a_jailed_rng_fills_buffers_by_kick_and_interrupt(supervisor: Any, features: int) -> None:
    host_id = 2_000_002 if supervisor.who == "root" else 0
    supervisor("spawn", "virtio-rng", "rng", host_id=host_id)
    answers = supervisor("converse", "rng", features, 300, 64)
    assert len(answers) == len(set(answers)) == 300
    assert {len(a) for a in answers} == {64}
    assert supervisor("ask_ping", "rng") == 7
    assert supervisor("stop", "rng") == (os.CLD_EXITED, 0)
