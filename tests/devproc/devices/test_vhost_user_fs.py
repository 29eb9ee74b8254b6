"""devproc/devices/vhost_user_fs.py; the rest is in test_vhost_user.py."""

from __future__ import annotations

from typing import Any


def test_the_tag_is_padded_and_followed_by_the_number_of_queues(bench: Any) -> None:
    """Threat 1."""
    driver = bench("vhost-user-fs").driver()
    assert bytes(driver.config(n, 1) for n in range(36)) == b"shared".ljust(36, b"\0")
    assert driver.config(36, 4) == 1
    assert driver.config(2, 8).to_bytes(8, "little") == b"ared\0\0\0\0"
    assert driver.config(40, 4) == 0xFFFF_FFFF
