"""The host bridge: a type 0 header that nothing can change much."""

from __future__ import annotations

from typing import Any

import pytest

from devproc.wire import Space


@pytest.fixture
def host(bench: Any) -> Any:
    return bench("pci-host")


def config(host: Any, offset: int, size: int) -> int:
    value: int = host.model.read(Space.CONFIG, offset, size)
    return value


def test_the_header_is_that_of_a_440fx(host: Any) -> None:
    assert config(host, 0x00, 4) == 0x12378086
    assert config(host, 0x08, 4) == 0x06000002
    assert config(host, 0x0C, 4) == 0
    assert config(host, 0x04, 4) == 0x02800006


def test_every_access_size_gives_the_same_bytes(host: Any) -> None:
    dword = config(host, 0, 4)
    assert config(host, 0, 2) | config(host, 2, 2) << 16 == dword
    assert sum(config(host, i, 1) << 8 * i for i in range(4)) == dword


def test_there_are_no_bars_and_no_interrupt_pin(host: Any) -> None:
    for offset in range(0x10, 0x28, 4):
        host.model.write(Space.CONFIG, offset, 4, 0xFFFFFFFF)
        assert config(host, offset, 4) == 0
    assert config(host, 0x3C, 4) == 0


def test_all_ones_everywhere_change_only_the_writable_bits(host: Any) -> None:
    """Threat 1."""
    before = [config(host, i, 1) for i in range(256)]
    for offset in range(0, 256, 4):
        host.model.write(Space.CONFIG, offset, 4, 0xFFFFFFFF)
    changed = {i: (old, config(host, i, 1)) for i, old in enumerate(before) if config(host, i, 1) != old}
    assert changed == {0x04: (0x06, 0x46), 0x05: (0x00, 0x01), 0x0D: (0x00, 0xF8)}


def test_a_one_byte_write_leaves_the_rest_of_the_command_register(host: Any) -> None:
    host.model.write(Space.CONFIG, 0x04, 2, 0x0140)
    host.model.write(Space.CONFIG, 0x05, 1, 0x00)
    assert config(host, 0x04, 2) == 0x0046


def test_past_256_bytes_and_across_the_end_it_reads_zero(host: Any) -> None:
    """Threat 2."""
    assert config(host, 0x100, 4) == 0
    assert config(host, 0xFFE, 2) == 0
    host.model.write(Space.CONFIG, 0xFFE, 4, 0xFFFFFFFF)
    assert config(host, 0xFFC, 4) == 0
