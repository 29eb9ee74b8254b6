import os
from pathlib import Path

from supervisor.procstatus import NAMESPACES, ProcStatus, table


def test_this_process_shares_every_namespace_with_itself():
    status = ProcStatus.of("me", os.getpid(), os.getpid())
    assert status is not None
    assert status.namespaces == ()
    assert status.uid == os.getuid()
    assert set(NAMESPACES) <= set(os.listdir("/proc/self/ns"))


def test_a_process_that_is_gone_has_no_status():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert ProcStatus.of("gone", pid, os.getpid()) is None


def test_the_seccomp_mode_and_no_new_privs_are_the_kernels():
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":\t") for line in lines if ":\t" in line)
    status = ProcStatus.of("me", os.getpid(), os.getpid())
    assert status is not None
    assert status.seccomp == int(fields["Seccomp"])
    assert status.no_new_privs == int(fields["NoNewPrivs"])
    assert status.capabilities == any(
        int(fields[f"Cap{which}"], 16) for which in ("Inh", "Prm", "Eff", "Bnd", "Amb")
    )


def row(**changes):
    base = {"name": "serial1", "pid": 7, "uid": 1000, "seccomp": 2, "no_new_privs": 1, "capabilities": False}
    return {**base, "namespaces": ("user", "pid"), **changes}


def test_the_table_has_a_line_for_each_process():
    text = table([row(), row(name="rtc", namespaces=None, capabilities=True)]).splitlines()
    assert len(text) == 3
    assert text[1].split() == ["serial1", "7", "1000", "2", "1", "none", "user", "pid"]
    assert text[2].endswith("some  (hidden)")


def test_a_process_without_namespaces_of_its_own_says_none():
    assert table([row(namespaces=())]).endswith("none")
