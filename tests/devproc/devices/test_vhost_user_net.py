"""devproc/devices/vhost_user_net.py; the rest is in test_vhost_user.py."""

from __future__ import annotations

from typing import Any

from devproc.virtio import spec


def test_the_address_is_ours_to_say(bench: Any) -> None:
    """Threat 1."""
    driver = bench("vhost-user-net", features=spec.F_VERSION_1).driver()
    assert driver.offered() == spec.F_VERSION_1 | 1 << 5
    assert driver.config(0, 6).to_bytes(6, "little") == b"\x02net\0\1"
    assert driver.get(spec.NUM_QUEUES, 2) == 2
