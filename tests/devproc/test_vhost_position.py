"""Positions in what real models save, and nonsense that says so."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devproc.devices.virtio_rng import VirtioRng
from devproc.driver import PciDriver
from devproc.vhost.position import at_positions, positions
from devproc.virtio import spec
from devproc.wire import Space
from kvmcore.memory import GuestMemory


class NoKick:
    def listen(self, on_kick: Any) -> None:
        pass


@pytest.fixture
def rng() -> Any:
    signal = lambda: None  # noqa: E731
    return VirtioRng(
        entropy=partial(bytes),
        memory=GuestMemory.create([(0, 4 << 20)]),
        irq=(signal, signal),
        intx=signal,
        resample=NoKick(),
        kick=(NoKick(),),
        log=print,
    )


@pytest.mark.parametrize("features", [0, spec.F_RING_PACKED])
def test_a_device_goes_on_from_a_position_that_is_put_into_its_state(rng: VirtioRng, features: int) -> None:
    driver = PciDriver(rng, rng.memory)
    assert positions(rng.save()) == [None]
    driver.start(spec.F_VERSION_1 | features)
    assert positions(rng.save()) == [0x8000 if features else 0]
    rng.write(Space.CONFIG, 4, 2, 0)
    rng.restore(at_positions(rng.save(), {0: 0x8005}))
    assert rng.queues[0] is not None
    assert rng.queues[0].position == 0x8005
    assert positions(rng.save()) == [0x8005]


def test_a_queue_that_is_not_in_use_has_no_position_to_set(rng: VirtioRng) -> None:
    for index in (0, 1):
        with pytest.raises(ValueError, match=f"queue {index} is not in use"):
            at_positions(rng.save(), {index: 5})


@given(
    st.binary(max_size=40)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["transport", "queues", "position", "x"]), inner, max_size=3)
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_bytes_give_positions_or_a_value_error(saved: bytes) -> None:
    for use in (positions, lambda s: at_positions(s, {0: 1})):
        try:
            use(saved)
        except ValueError:
            continue


@pytest.mark.parametrize("position", [True, -1, 1 << 16, "0", 1.0, [0]])
def test_what_is_no_position_is_refused(position: Any) -> None:
    saved = json.dumps({"X": {"transport": {"queues": [{"position": position}]}}}).encode()
    with pytest.raises(ValueError, match="not a virtio device's"):
        positions(saved)
