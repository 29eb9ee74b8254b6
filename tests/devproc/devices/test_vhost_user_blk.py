"""devproc/devices/vhost_user_blk.py; the rest is in test_vhost_user.py."""

from __future__ import annotations

from typing import Any


def test_the_configuration_is_the_back_ends_byte_by_byte(bench: Any) -> None:
    """Threat 1."""
    driver = bench("vhost-user-blk").driver()
    assert bytes(driver.config(n, 1) for n in range(60)) == bytes(range(60))
    assert driver.config(0, 8) == int.from_bytes(bytes(range(8)), "little")
    assert driver.config(0x22, 2) == 0x2322
    driver.set_config(0x20, 1, 0xFF)
    assert driver.config(0x20, 1) == 0x20
