"""A watched process goes on, call by call, and every call is on file; needs no privilege."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from devproc import jail, syscalls
from devproc.catalog import CATALOG
from kvmcore.errors import ConfigError
from policies.compile import SETUP_MARK, compile_notify
from policies.parse import load
from policies.syscalls import NAMES, SYSCALLS
from supervisor.recorder import Recorder

PVPANIC = CATALOG["pvpanic"]
NAME = "pvpanic1"


def fate(
    recorder: Recorder, act: Callable[[], object], meanwhile: Callable[[], object] = lambda: None
) -> int:
    """How a process ends that seals itself as a device does, watched by `recorder`, and then acts."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            jail.forbid_gain()
            first, second = recorder.filters(PVPANIC)
            listener = syscalls.seccomp_load(first, syscalls.SECCOMP_FILTER_FLAG_NEW_LISTENER)
            syscalls.send_descriptor(theirs.fileno(), b".", listener, SETUP_MARK)
            os.close(listener)
            syscalls.seccomp_load(second)
            act()
            status = 0
        finally:
            os._exit(status)
    with ours:
        (listener,) = socket.recv_fds(ours, 1, 1)[1]
    theirs.close()
    watch = recorder.watch("pvpanic", NAME)
    assert watch is not None
    watch(listener)
    os.close(listener)
    meanwhile()
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    recorder.close()
    return ended


NOBODYS = 1 << 20  # a descriptor that is not open


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records"


@pytest.fixture
def recorder(path: Path, said: list[str]) -> Recorder:
    return Recorder("pvpanic", str(path), said.append)


def recorded(path: Path) -> list[tuple[str, list[int]]]:
    lines = [line.split() for line in path.read_text().splitlines()]
    assert all(line[0] == NAME and len(line) == 8 for line in lines)
    return [(NAMES[int(nr)], [int(a, 16) for a in args]) for _, nr, *args in lines]


def test_calls_that_the_policy_forbids_go_on_and_are_recorded_in_order(
    recorder: Recorder, path: Path
) -> None:
    parent = os.getpid()

    def act() -> None:
        assert os.getppid() == parent
        with pytest.raises(OSError):
            os.lseek(NOBODYS, 0x1234, os.SEEK_END)
        os.umask(0o77)

    assert fate(recorder, act) == 0
    calls = [(name, args) for name, args in recorded(path) if name in ("getppid", "lseek", "umask")]
    assert [name for name, _ in calls] == ["getppid", "lseek", "umask"]
    assert calls[1][1][:3] == [NOBODYS, 0x1234, 2]


def test_no_call_is_lost(recorder: Recorder, path: Path) -> None:
    def act() -> None:
        for n in range(1000):
            os.umask(n & 0o777)

    assert fate(recorder, act) == 0
    assert [args[0] for name, args in recorded(path) if name == "umask"] == [n & 0o777 for n in range(1000)]


def test_what_the_jail_itself_does_is_not_recorded(recorder: Recorder, path: Path) -> None:
    assert fate(recorder, lambda: None) == 0
    names = [name for name, _ in recorded(path)]
    assert names[-1] == "exit_group"
    assert not {"seccomp", "close", "sendmsg"} & set(names)


def test_a_call_that_the_policy_fails_is_failed(recorder: Recorder, path: Path) -> None:
    def act() -> None:
        with pytest.raises(FileNotFoundError):
            os.open("/", os.O_RDONLY)

    assert fate(recorder, act) == 0
    assert "openat" in [name for name, _ in recorded(path)]


def test_what_no_policy_may_allow_is_not_done(recorder: Recorder, path: Path) -> None:
    def act() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        for name in ("memfd_create", "socket", "execve"):
            assert libc.syscall(SYSCALLS[name], 1, 1, 0) == -1
            assert ctypes.get_errno() == 38

    assert fate(recorder, act) == 0
    names = [name for name, _ in recorded(path)]
    assert [n for n in names if n in ("memfd_create", "socket", "execve")] == [
        "memfd_create",
        "socket",
        "execve",
    ]


@pytest.mark.parametrize(("mark", "end"), [(0, 0), (SETUP_MARK, -signal.SIGSYS)])
def test_sending_descriptors_is_recorded_and_as_the_jail_does_it_kills(
    recorder: Recorder, path: Path, mark: int, end: int
) -> None:
    def act() -> None:
        with pytest.raises(OSError):
            syscalls.send_descriptor(NOBODYS, b".", 0, mark)

    assert fate(recorder, act) == end
    assert ("sendmsg" in [name for name, _ in recorded(path)]) == (not mark)


def test_records_that_cannot_be_written_fail_every_call(said: list[str]) -> None:
    def act() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        assert (libc.umask(0), ctypes.get_errno()) == (-1, 38)

    # Not even _exit() works any more: the C library then ends the process by a fault.
    assert fate(Recorder("pvpanic", "/dev/full", said.append), act) == -signal.SIGSEGV
    assert said == [f"{NAME}: cannot record its system calls: No space left on device"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has privileges to give up")
def test_the_watching_thread_has_no_privileges(recorder: Recorder) -> None:
    before = set(os.listdir("/proc/self/task"))
    ready, its_ready = os.pipe()
    its_go, go = os.pipe()

    def act() -> None:
        os.write(its_ready, b".")
        os.read(its_go, 1)

    def look() -> None:
        os.read(ready, 1)
        (thread,) = set(os.listdir("/proc/self/task")) - before
        status = Path(f"/proc/self/task/{thread}/status").read_text()
        os.write(go, b".")
        assert "CapEff:\t0000000000000000" in status
        assert "NoNewPrivs:\t1" in status

    assert fate(recorder, act, look) == 0
    assert "CapEff:\t0000000000000000" not in Path("/proc/self/status").read_text()
    for fd in (ready, its_ready, its_go, go):
        os.close(fd)


def test_other_devices_keep_their_policies(recorder: Recorder) -> None:
    rtc = CATALOG["rtc"]
    assert recorder.filters(rtc) == compile_notify(load("rtc", rtc.slots()), jail.SETUP_CALLS)
    assert recorder.watch("rtc", "rtc") is None
    recorder.close()


def test_records_are_appended_and_for_the_user_alone(path: Path) -> None:
    path.write_text("before\n")
    path.chmod(0o600)
    Recorder.asked_for(f"pvpanic:{path}", print).close()
    assert path.read_text() == "before\n"
    new = path.with_name("a:b")
    Recorder.asked_for(f"pvpanic:{new}", print).close()
    assert new.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("pvpanic", "VMSUP_LEARN: expected DEVICE:FILE, not 'pvpanic'"),
        ("pvpanic:", "VMSUP_LEARN: expected DEVICE:FILE"),
        ("pvpanik:/x", "device 'pvpanik' is unknown, expected one of serial"),
        ("pvpanic:/nowhere/x", "records of pvpanic: /nowhere/x: No such file or directory"),
    ],
)
def test_what_cannot_be_recorded_is_refused(value: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Recorder.asked_for(value, print)
