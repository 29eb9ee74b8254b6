"""What a device process in the full jail is, as root and as an ordinary user, seen from outside."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from remote import start

from devproc.catalog import CATALOG, Entry, shared_directory
from devproc.jail import INSIDE_ID, zygote_capabilities

SHIPPED = sorted(CATALOG)
NAMESPACES = ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup")
HOST_ID = 2_000_001
EXITED, KILLED = os.CLD_EXITED, os.CLD_KILLED


def host_id(supervisor: Any) -> int:
    return HOST_ID if supervisor.who == "root" else 0


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {k: v.strip() for k, _, v in (line.partition(":") for line in lines)}


def need_root_to_look() -> None:
    if os.geteuid() != 0:
        pytest.skip("a device is not dumpable: only root can look at its /proc files")


def spawn(supervisor: Any, entry: Entry, name: str, **kwargs: Any) -> Any:
    if importlib.util.find_spec(entry.module) is None:
        pytest.fail(f"{entry.module} does not exist")
    kwargs.setdefault("host_id", host_id(supervisor))
    return supervisor("spawn", entry.name, name, **kwargs)


@pytest.fixture(params=SHIPPED)
def sealed(request: pytest.FixtureRequest, supervisor: Any) -> Any:
    entry = CATALOG[request.param]
    greeting = spawn(supervisor, entry, f"{entry.name}9")
    yield entry, greeting["pid"], greeting
    assert supervisor("stop", f"{entry.name}9") == (EXITED, 0)


def test_nothing_can_be_gained_and_nothing_is_left(sealed: Any) -> None:
    _, pid, greeting = sealed
    s = status(pid)
    assert (s["Seccomp"], s["Seccomp_filters"], s["NoNewPrivs"], s["Threads"]) == ("2", "2", "1", "1")
    assert {int(s[f"Cap{c}"], 16) for c in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
    assert s["NSpid"].split() == [str(pid), "1"]
    assert greeting["listener"]
    assert all(level == 10 for level, _ in greeting["notes"]), "a layer failed"


def test_the_process_is_the_supervisors_child_and_carries_the_instance_name(
    sealed: Any, supervisor: Any
) -> None:
    entry, pid, _ = sealed
    s = status(pid)
    assert int(s["PPid"]) == supervisor.pid
    assert s["Name"] == f"{entry.name}9"[:15]  # TASK_COMM_LEN
    assert Path(f"/proc/{pid}/cmdline").read_bytes().startswith(f"vmsup: {entry.name}9\0".encode())


def test_the_host_id_is_the_only_one(sealed: Any, supervisor: Any) -> None:
    entry, pid, _ = sealed
    if shared_directory(entry) is not None:
        pytest.skip("it is the directory's owner's: test_virtio_fs.py")
    s = status(pid)
    expected = HOST_ID if supervisor.who == "root" else int(status(supervisor.pid)["Uid"].split()[0])
    assert {int(i) for k in ("Uid", "Gid") for i in s[k].split()} == {expected}
    need_root_to_look()
    for kind in ("uid_map", "gid_map"):
        assert Path(f"/proc/{pid}/{kind}").read_text().split() == [str(INSIDE_ID), str(expected), "1"]
    assert Path(f"/proc/{pid}/setgroups").read_text() == "deny\n"


def test_every_namespace_is_its_own(sealed: Any) -> None:
    need_root_to_look()
    _, pid, _ = sealed
    for kind in NAMESPACES:
        assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"), kind


def test_the_descriptors_are_the_declared_ones(sealed: Any) -> None:
    need_root_to_look()
    entry, pid, _ = sealed
    held = {int(fd): os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    free = {
        fd for d, fds in entry.own_slots() if d.kind == "line" for fd in fds
    }  # until there is a connection
    assert set(held) == set(range(entry.held)) - free
    assert held[0] == held[1] == "/dev/null"
    kinds = {
        "signal": "anon_inode:[eventfd]",
        "kick": "anon_inode:[eventfd]",
        "memory": "/memfd:guest-memory",
        "directory": "/",
    }
    for d, fds in entry.own_slots():
        for fd in set(fds) - free:
            assert held[fd].startswith(kinds.get(d.kind, ("pipe:", "socket:", "/tmp/")))


def test_the_root_is_empty_and_read_only(sealed: Any) -> None:
    need_root_to_look()
    entry, pid, _ = sealed
    if shared_directory(entry) is not None:
        pytest.skip("it is what is shared: test_virtio_fs.py")
    assert os.listdir(f"/proc/{pid}/root/") == []
    mounts = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    assert len(mounts) == 1
    assert mounts[0].split()[5].split(",")[:4] == ["ro", "nosuid", "nodev", "noexec"]
    assert os.readlink(f"/proc/{pid}/cwd") == os.readlink(f"/proc/{pid}/root") == "/"


def test_no_undeclared_guest_memory_and_nothing_both_writable_and_executable_is_mapped(
    sealed: Any, supervisor: Any
) -> None:
    need_root_to_look()
    assert "guest-memory" in Path(f"/proc/{supervisor.pid}/maps").read_text()
    entry, pid, _ = sealed
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert maps.count("/memfd:mailbox") == 1
    assert maps.count("memfd") - 1 == maps.count("/memfd:guest-memory") == entry.guest_memory
    for line in maps.splitlines():
        assert not {"w", "x"} <= set(line.split()[1]), line


def test_the_limits_are_what_the_page_says(sealed: Any) -> None:
    need_root_to_look()
    entry, pid, _ = sealed
    text = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    limits = {line[:26].strip(): line[26:].split()[:2] for line in text}
    for name, value in (
        ("Max core file size", 0),
        ("Max data size", entry.data_mib << 20),
        ("Max file size", 0 if entry.fsize == "fsize" else entry.fsize),  # the least of the parameter
        ("Max locked memory", 0),
        ("Max processes", 0),
        ("Max open files", entry.descriptors_max),
    ):
        assert limits[name] == [str(value), str(value)], name


def gone(pid: int) -> bool:
    try:
        return status(pid)["State"].startswith("Z")
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("who", ["root", "user"])
@pytest.mark.parametrize("mode", ["full", "none"])
def test_a_killed_supervisor_leaves_no_process(who: str, mode: str) -> None:
    remote = start(who)
    for n in range(3):
        remote("spawn", "hostile", f"hostile{n}", mode, host_id=host_id(remote) + n if who == "root" else 0)
    remote("drop_privileges")  # as it does before the guest runs; the devices' ids are not its own
    assert remote("kill", "hostile2") == (KILLED, signal.SIGKILL)
    # A device that is stopped reads no end of file; only the parent-death signal ends it.
    pids = remote("pids")
    if os.geteuid() == 0:
        os.kill(pids[1], signal.SIGSTOP)
    remote.process.kill()
    remote.process.wait()
    until = time.monotonic() + 5
    while not all(map(gone, pids)) and time.monotonic() < until:
        time.sleep(0.01)
    assert [p for p in pids if not gone(p)] == []


def test_a_zygote_asked_to_terminate_stays_and_a_killed_one_takes_no_device_along(supervisor: Any) -> None:
    remote = start(supervisor.who)
    spawn_hostile(remote, "first")
    zygote = remote("pids")[0]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(zygote, number)
    spawn_hostile(remote, "second")
    os.kill(zygote, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="third: the zygote is gone"):
        spawn_hostile(remote, "third")
    assert remote("ask_ping", "first") == 7
    assert remote("stop", "first") == remote("stop", "second") == (EXITED, 0)
    remote.close()


@pytest.mark.parametrize("who", ["root", "user"])
def test_a_zygote_for_the_full_jail_keeps_no_right_but_to_map_ids_and_makes_nothing_else(who: str) -> None:
    remote = start(who, "full")
    greeting = spawn(remote, CATALOG["rtc"], "rtc9")
    assert greeting["listener"]
    s = status(remote("pids")[0])
    sets = {c: int(s[f"Cap{c}"], 16) for c in ("Inh", "Prm", "Eff", "Bnd", "Amb")}
    keep = zygote_capabilities(shares=False) if who == "root" else 0
    assert keep in (0, 0xC0, 0x2000C0)
    if who == "user":
        del sets["Bnd"]  # which it may not change, and which without new privileges bounds nothing
    assert sets == {c: keep if c in ("Prm", "Eff", "Bnd") else 0 for c in sets}
    assert s["NoNewPrivs"] == "1"
    for mode in ("none", "best-effort"):
        with pytest.raises(RuntimeError, match=f"odd: asked for jail mode {mode}"):
            spawn_hostile(remote, "odd", mode)
    assert remote("stop", "rtc9") == (EXITED, 0)
    remote.close()


def spawn_hostile(supervisor: Any, name: str, mode: str = "full") -> Any:
    return supervisor("spawn", "hostile", name, mode, host_id=host_id(supervisor))


def test_a_model_that_raises_is_named_logged_and_dead(supervisor: Any) -> None:
    spawn_hostile(supervisor, "bug")
    supervisor("write", "bug", 0, 0)
    assert supervisor("next_word", "bug") == "Failed(why='ZeroDivisionError: as a broken model would')"
    assert supervisor("next_word", "bug") == "closed"
    assert supervisor("reap", "bug") == (EXITED, 1)
    log = supervisor("log", "bug")
    assert log.startswith("Traceback (most recent call last)") and "hostile.py" in log


@pytest.mark.parametrize(
    "frame",
    [b"\xc1", b"\x94\x01\x00\x00\x03", b"\x91\x10", bytes(65)],
    ids=["nonsense", "size", "tag", "long"],
)
def test_garbage_from_the_supervisor_ends_the_device(supervisor: Any, frame: bytes) -> None:
    spawn_hostile(supervisor, "deaf")
    supervisor("garbage", "deaf", frame)
    assert supervisor("next_word", "deaf").startswith("Failed(why='the supervisor broke the protocol: ")
    assert supervisor("reap", "deaf") == (EXITED, 1)


def test_a_closed_access_channel_ends_the_device(supervisor: Any) -> None:
    spawn_hostile(supervisor, "lonely")
    assert supervisor("close_access", "lonely") == (EXITED, 0)


def test_one_descriptor_too_few_is_refused(supervisor: Any) -> None:
    with pytest.raises(RuntimeError, match="few: 5 descriptors, expected 6"):
        supervisor("spawn", "hostile", "few", withhold=1)


def test_an_unknown_device_is_refused(supervisor: Any) -> None:
    with pytest.raises(RuntimeError, match="KeyError"):
        supervisor("spawn", "hostile", "odd", ask_for="nothing-like-it")


def test_an_id_that_may_not_be_mapped_is_an_error_that_names_the_step() -> None:
    remote = start("user")
    with pytest.raises(RuntimeError, match=r"jail: namespaces: .*Operation not permitted"):
        remote("spawn", "hostile", "stolen", host_id=HOST_ID)
    remote.close()


def test_best_effort_says_what_it_lacks_and_keeps_the_rest() -> None:
    remote = start("user")
    greeting = remote("spawn", "hostile", "weak", "best-effort", host_id=HOST_ID)
    warned = [text for level, text in greeting["notes"] if level == 30]
    assert [w.split(":")[1].strip() for w in warned] == ["namespaces", "identity"]
    s = status(greeting["pid"])
    assert (s["Seccomp"], s["NoNewPrivs"], int(s["CapEff"], 16)) == ("2", "1", 0)
    assert remote("stop", "weak") == (EXITED, 0)
    remote.close()


def test_without_a_jail_it_is_still_a_process_of_its_own(supervisor: Any) -> None:
    greeting = spawn_hostile(supervisor, "free", "none")
    s = status(greeting["pid"])
    assert (s["Seccomp"], s["NoNewPrivs"], int(s["PPid"])) == ("0", "0", supervisor.pid)
    assert not greeting["listener"]
    assert supervisor("kill", "free") == (KILLED, signal.SIGKILL)
