"""What a network card may be connected to, as far as that is seen without a tap or passt."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

import pytest

from kvmcore.errors import ConfigError
from supervisor.config import NetConfig
from supervisor.host import Host
from supervisor.nets import open_net


def refused(**keys: Any) -> str:
    with ExitStack() as undo, pytest.raises(ConfigError) as caught:
        open_net(NetConfig(**keys), Host(undo, None, print))  # type: ignore[arg-type]
    return str(caught.value)


def test_a_tap_that_is_not_there_is_not_made() -> None:
    said = refused(tap_name="vmsup-nosuch")
    assert said.startswith(
        "--net tap-name=vmsup-nosuch: there is no such interface, expected one made by: ip tuntap"
    )


def test_an_interface_of_another_kind_is_no_tap() -> None:
    assert refused(tap_name="lo").startswith("--net tap-name=lo: ")


def test_a_descriptor_of_something_else_is_no_tap() -> None:
    read, write = os.pipe()
    assert refused(tap_fd=read) == f"--net tap-fd={read}: is not a tap's descriptor"
    os.close(read)
    os.close(write)
    assert refused(tap_fd=read) == f"--net tap-fd={read}: is not a tap's descriptor"


def test_a_passt_that_is_not_installed_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    before = len(os.listdir("/proc/self/fd"))
    assert refused(passt=True) == "--net passt: there is no passt, expected Debian's package passt"
    assert len(os.listdir("/proc/self/fd")) == before
