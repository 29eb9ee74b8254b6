import os

import pytest

from supervisor import spawn


def test_root_gives_every_device_a_host_id_of_its_own(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    ids = [spawn.host_id(n) for n in range(64)]
    assert len(set(ids)) == 64
    assert all(0x70000000 <= i < 0x80000000 for i in ids)


def test_two_machines_share_no_host_id(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    seen = set()
    for pid in (1, 2, 4095, (1 << 22) - 1):
        monkeypatch.setattr(os, "getpid", lambda p=pid: p)
        ids = {spawn.host_id(n) for n in range(64)}
        assert not ids & seen
        assert max(ids) < 1 << 31
        seen |= ids


@pytest.mark.parametrize("number", [0, 5])
def test_an_ordinary_user_gives_its_own_id(monkeypatch, number):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert spawn.host_id(number) == 0
