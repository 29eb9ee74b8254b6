"""The supervisor's own filters on this kernel: what its threads go on doing, and what kills it."""

import ctypes
import fcntl
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback

import pytest

from devproc import jail, syscalls
from kvmcore.abi import Ioctl
from kvmcore.errors import VmsupError
from supervisor import confine

FULL = jail.Mode.FULL
THREADS = ("supervisor", "vcpu")
OURS = os.open(os.devnull, os.O_RDWR)  # stands for what /dev/kvm gave
OTHER = os.dup(OURS)
FDS = {"FD_VM": OURS, "FD_VCPU": OURS}
LIBC = ctypes.CDLL(None, use_errno=True)


def fate(policy, act):
    """How a child that confines itself to `policy` and then acts ends: 0, or minus what killed it."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            seal = confine.seal(policy, FULL, print, FDS)
            jail.forbid_gain()
            seal()
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ioctl(fd, command, arg=0):
    def act():
        try:
            fcntl.ioctl(fd, command, arg)
        except OSError:  # /dev/null knows none of them
            return

    return act


def new_thread():
    threading.Thread(target=int).start()


ATTEMPTS = {
    "socket": socket.socket,
    "socketpair": socket.socketpair,
    "exec": lambda: os.execv(sys.executable, [sys.executable]),
    "fork": os.fork,
    "spawn": lambda: subprocess.run(["true"], check=False),
    "thread": new_thread,
    "memfd": lambda: os.memfd_create("x"),
    "pipe": os.pipe,
    "unlink": lambda: os.unlink("/nonexistent"),
    "old open": lambda: LIBC.syscall(2, b"/dev/null", 0),
    "executable memory": lambda: mmap.mmap(-1, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC),
    "shared memory": lambda: mmap.mmap(-1, 4096),
    "memory of a descriptor": lambda: mmap.mmap(OURS, 4096, mmap.MAP_PRIVATE),
    "becoming executable": lambda: LIBC.mprotect(0, 4096, mmap.PROT_EXEC),
    "ptrace": lambda: LIBC.ptrace(16, 1, 0, 0),
    "another filter": lambda: syscalls.seccomp_load(b"\0" * 8),
    "capabilities": syscalls.drop_capabilities,
    "a signal to others": lambda: os.kill(os.getppid(), signal.SIGTERM),
    "an end of others": lambda: os.kill(-1, signal.SIGKILL),
    "a signal to ourselves": lambda: signal.pthread_kill(threading.get_ident(), signal.SIGABRT),
    "sending to an address": lambda: LIBC.sendto(OURS, b"", 0, 0, b"\1\0/x\0", 5),
    "a new VM": ioctl(OURS, Ioctl.KVM_CREATE_VM),
    "guest memory": ioctl(OURS, Ioctl.KVM_SET_USER_MEMORY_REGION),
    "typing into the terminal": ioctl(2, 0x5412),
}


@pytest.mark.parametrize(
    ("policy", "attempt"),
    [(p, a) for p in confine.POLICIES for a in ATTEMPTS if (p, a) != ("janitor", "unlink")],
)
def test_no_process_of_ours_may_do_it(policy, attempt):
    assert fate(policy, ATTEMPTS[attempt]) == -signal.SIGSYS


@pytest.mark.parametrize("policy", THREADS)
def test_no_file_opens(policy):
    def look():
        for path in ("/etc/passwd", "/dev/null", __file__):
            with pytest.raises(FileNotFoundError):
                os.open(path, os.O_RDONLY)

    assert fate(policy, look) == 0


RUNS = (Ioctl.KVM_RUN, Ioctl.KVM_INTERRUPT)
ROUTES = (Ioctl.KVM_SET_GSI_ROUTING, Ioctl.KVM_SIGNAL_MSI, Ioctl.KVM_IRQFD, Ioctl.KVM_IOEVENTFD)


@pytest.mark.parametrize("command", [*RUNS, *ROUTES])
def test_a_vcpu_thread_runs_and_routes_its_own_vm_only(command):
    assert fate("vcpu", ioctl(OURS, command)) == 0
    assert fate("vcpu", ioctl(OTHER, command)) == -signal.SIGSYS
    assert fate("supervisor", ioctl(OURS, command)) == -signal.SIGSYS


def test_a_vcpu_thread_sees_and_takes_the_events_of_interrupts():
    eventfd = os.eventfd(1)

    def look():
        poll = select.poll()
        poll.register(eventfd, select.POLLIN)
        assert poll.poll(0)
        os.eventfd_read(eventfd)

    assert fate("vcpu", look) == 0


VCPU_MAY_NOT = {
    "read": lambda: os.read(OURS, 1),
    "close": lambda: os.close(OTHER),
    "wait for descriptors": lambda: select.poll().poll(1),
    "sleep": lambda: time.sleep(0),
    "kill": lambda: os.kill(2**22 - 2, signal.SIGKILL),
    "wait": lambda: os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG),
    "a violation": ioctl(OURS, 0xC0502100),
    "handlers": lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
}


@pytest.mark.parametrize("what", VCPU_MAY_NOT)
def test_a_vcpu_thread_may_not_do_the_main_threads_work(what):
    def main_thread():
        try:
            VCPU_MAY_NOT[what]()
        except OSError:  # no such process, no child: the call was made
            return

    assert fate("supervisor", main_thread) == 0
    assert fate("vcpu", VCPU_MAY_NOT[what]) == -signal.SIGSYS


def a_lot_of_memory():
    grown = bytearray()
    for _ in range(64):
        grown.extend(bytes(1 << 20))  # realloc: mremap
    kept = [bytes(2000) for _ in range(40000)]  # the C library's heap: more than one, in a second thread
    kept += [bytes(100) for _ in range(100000)]  # Python's arenas
    del kept, grown


@pytest.mark.parametrize("policy", confine.POLICIES)
def test_memory_is_had_and_given_back(policy):
    assert fate(policy, a_lot_of_memory) == 0


@pytest.mark.parametrize("policy", THREADS)
def test_a_traceback_is_still_printed(policy):
    def fail():
        try:
            raise RuntimeError("on purpose")
        except RuntimeError:
            assert "on purpose" in traceback.format_exc()

    assert fate(policy, fail) == 0


def test_a_thread_that_was_there_before_works_and_ends_under_its_own_filter():
    def both():
        jail.forbid_gain()
        ready, go = threading.Event(), threading.Event()
        seal = confine.seal("vcpu", FULL, print, FDS)

        def vcpu():
            seal()
            ready.set()
            go.wait()
            a_lot_of_memory()  # from a heap of the thread's own

        thread = threading.Thread(target=vcpu)
        thread.start()
        ready.wait()
        confine.seal("supervisor", FULL, print)()
        os.close(OTHER)  # which a vCPU's thread may not
        go.set()
        thread.join()
        with open(f"/proc/{os.getpid()}/status", encoding="ascii"):
            raise AssertionError("the main thread is not confined")

    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            both()
        except FileNotFoundError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def refuses(program):
    raise OSError(22, "Invalid argument")


def test_a_filter_that_the_kernel_refuses_is_an_error_with_its_name(monkeypatch):
    seal = confine.seal("vcpu", FULL, print)
    monkeypatch.setattr(syscalls, "seccomp_load", refuses)
    with pytest.raises(VmsupError, match=r"^cannot load policies/vcpu\.policy: Invalid argument$"):
        seal()


def test_best_effort_says_that_a_filter_is_missing(monkeypatch):
    said = []
    seal = confine.seal("supervisor", jail.Mode.BEST_EFFORT, said.append)
    monkeypatch.setattr(syscalls, "seccomp_load", refuses)
    seal()
    assert said == ["WARNING: cannot load policies/supervisor.policy: Invalid argument"]


def test_no_jail_loads_nothing(monkeypatch):
    monkeypatch.setattr(syscalls, "seccomp_load", refuses)
    confine.seal("supervisor", jail.Mode.NONE, print)()
