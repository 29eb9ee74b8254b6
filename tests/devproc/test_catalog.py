"""What a catalogue entry says of its process: descriptors by number and name, and the values it takes."""

from __future__ import annotations

import pytest

from devproc.catalog import CATALOG, FD_FIRST, RNG, Descriptor, Entry, Param, virtio_descriptors

ENTRY = Entry(
    "kind",
    "a device",
    "unused",
    "Kind",
    regions=(),
    descriptors=(
        Descriptor("irq", "signal", "one for each vector", 3),
        Descriptor("input", "input", "bytes in"),
        Descriptor("kick", "kick", "an array of one", 1),
    ),
    params=(Param("gain", 1, 9, "a number"), Param("id", 0, 4, "bytes", bytes)),
)


def test_an_array_takes_successive_numbers_and_is_named_by_its_ends() -> None:
    assert {d.name: list(fds) for d, fds in ENTRY.own_slots()} == {
        "irq": [7, 8, 9],
        "input": [10],
        "kick": [11],
    }
    assert ENTRY.held == 12
    assert ENTRY.slots() == {
        "FD_LOG": 2, "FD_ACCESS": 3, "FD_CONTROL": 4, "FD_MAILBOX": 5, "FD_BELL": 6,
        "FD_IRQ_FIRST": 7, "FD_IRQ_LAST": 9, "FD_INPUT": 10, "FD_KICK_FIRST": 11, "FD_KICK_LAST": 11,
    }  # fmt: skip


@pytest.mark.parametrize(
    "values", [(), (1,), (0, b""), (10, b""), (True, b""), (1, b"12345"), (1, "id"), (b"", 1)]
)
def test_a_value_that_is_not_allowed_is_refused(values: tuple[int | str | bytes, ...]) -> None:
    with pytest.raises(ValueError, match="kind: "):
        ENTRY.check_params(values)


def test_values_are_given_by_name() -> None:
    assert ENTRY.check_params((1, b"1234")) == {"gain": 1, "id": b"1234"}


def test_every_virtio_function_has_a_vector_and_a_kick_for_each_queue_and_guest_memory_first() -> None:
    assert [(d.name, d.count) for d in virtio_descriptors(RNG)] == [
        ("memory", None), ("irq", 2), ("intx", None), ("resample", None), ("kick", 1)
    ]  # fmt: skip
    for entry in CATALOG.values():
        if entry.virtio is not None:
            assert entry.descriptors[0].kind == "memory"
            assert [p.name for p in entry.params[:2]] == ["mem_below_4g", "mem_above_4g"]
            assert {d.name: d.count for d in entry.descriptors}["kick"] == len(entry.virtio.queue_sizes)
        else:
            assert not entry.guest_memory


def test_a_process_starts_to_count_where_the_common_descriptors_end() -> None:
    assert all(
        min((fds[0] for _, fds in e.own_slots()), default=FD_FIRST) == FD_FIRST for e in CATALOG.values()
    )
