import gc
import os

import pytest

from devproc import jail, zygote
from devproc.catalog import CATALOG
from kvmcore.errors import ConfigError
from kvmcore.exitloop import Core
from supervisor import spawn
from supervisor.machine import Instance


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


def test_those_asked_for_before_one_that_cannot_be_leave_nothing_open():
    nursery = zygote.start(("pvpanic",), mode=jail.Mode.NONE)
    event = os.eventfd(0)

    def extra(name, entry, params):
        if name == "second":
            raise ConfigError("its record cannot be written")
        return os.dup(event)

    spawner = spawn.Spawner(
        nursery, Core(), jail.Mode.NONE, 2, {"panic": event}, -1, {}, lambda *_: None, "mailbox", extra
    )
    gc.collect()
    before = os.listdir("/proc/self/fd")
    try:
        with pytest.raises(ConfigError):
            [*spawner.spawn_all([Instance(name, CATALOG["pvpanic"]) for name in ("first", "second")])]
        assert os.listdir("/proc/self/fd") == before
    finally:
        spawner.close()
        nursery.close()
        os.waitpid(nursery.pid, 0)
        os.close(event)
