"""`vmsup jail selftest` on this host, as root and as an ordinary user: nothing gets out of the full jail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from remote import HERE

from devproc.escapes import ATTEMPTS, ON_MEMORY
from devproc.jail import Mode, plan
from integration.ordinary import as_user
from supervisor import cli
from supervisor import selftest as selftest_module

ROOT = HERE.parents[1]
# What the kernel at hand may lack, or refuse whoever asks.
OPTIONAL = {
    "files: make a file without a name",  # overlayfs before Linux 6.3
    "sockets: multipath TCP",
    "sockets: netlink audit",
    "sockets: vsock",
    "sockets: kernel crypto",
    "sockets: xdp",
    "sockets: bluetooth",
    "descriptors: secret memory",
    "memory: a protection key",
    "memory: segments of its own",
    "memory: own code made writable",
    "kernel: x32 call",
    "kernel: i386 call by int 0x80",
    "kernel: io_uring",
    "kernel: asynchronous I/O",
    "kernel: load a module",
    "kernel: unload a module",
    "kernel: I/O ports",
    "kernel: accounting",
    "kernel: performance counters",
    "files: open /dev/kvm",
    "namespaces: time",
}
PRIVILEGED = {
    "files: watch every file",
    "proc: a kernel parameter",
    "sockets: inet raw",
    "sockets: packet",
    "namespaces: the supervisor's network",
    "namespaces: mount a file system",
    "namespaces: make a file system to mount",
    "namespaces: chroot",
    "namespaces: pivot the root",
    "namespaces: set the host name",
    "memory: the page at 0",
    "exhaustion: a higher priority",
    "exhaustion: real-time scheduling",
    "exhaustion: real-time I/O",
    "hiding: become root",
    "hiding: leave its groups",
    "kernel: bpf map",
    "kernel: the kernel's log",
    "memory: userfaultfd",
}
ANSWERS = {"ENOENT", "ENOMEM"}  # to the calls that a policy answers with an errno, or allows within a limit


def selftest(before: list[str], *options: str) -> tuple[int, dict[str, Any]]:
    command = [*before, sys.executable, "-m", "supervisor.cli", "jail", "selftest", "--json", *options]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=False, timeout=300)
    return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module", params=["root", "user"])
def matrix(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "root" and os.geteuid() != 0:
        pytest.skip("needs root")
    code, matrix = selftest(as_user() if request.param == "user" else [])
    assert code == 0
    assert (matrix["uid"] == 0) == (request.param == "root")
    return matrix


def named(row: dict[str, Any]) -> str:
    return f"{row['group']}: {row['attempt']}"


def test_no_attempt_succeeds_in_the_full_jail(
    matrix: dict[str, Any],
) -> None:
    assert len(matrix["rows"]) == len(ATTEMPTS) >= 100
    assert matrix["successes"]["full"] == 0
    words = {named(row): row["outcomes"]["full"]["outcome"] for row in matrix["rows"]}
    assert {w for w in words.values() if w != "killed"} <= ANSWERS
    assert words["exhaustion: a gibibyte mapped"] == "ENOMEM"
    assert words["files: open the root directory"] == "ENOENT"


def test_every_attempt_succeeds_without_a_jail_unless_this_host_refuses_it_by_itself(
    matrix: dict[str, Any],
) -> None:
    may_be = OPTIONAL if matrix["uid"] == 0 else OPTIONAL | PRIVILEGED
    vacuous = {named(row) for row in matrix["rows"] if row["vacuous"]}
    assert vacuous - may_be == set()
    assert matrix["vacuous"] == len(vacuous)
    assert len(matrix["rows"]) - len(vacuous) >= 100


def test_each_half_of_the_jail_stops_what_the_other_does_not(matrix: dict[str, Any]) -> None:
    def succeed(column: str) -> set[str]:
        return {named(r) for r in matrix["rows"] if r["outcomes"][column]["outcome"] == "succeeded"}

    alone, others = succeed("seccomp alone"), succeed("all but seccomp")
    assert alone == {"exhaustion: a gibibyte mapped", "exhaustion: a mapping grown to a gibibyte"}
    assert "sockets: inet stream" in others  # in a network namespace with nothing in it
    assert not any(name.startswith("proc: ") for name in others)
    assert not any(name.startswith("others: ") for name in others - {"others: ask to be traced"})


def test_a_violation_names_the_call(matrix: dict[str, Any]) -> None:
    calls = {named(row): row["outcomes"]["full"].get("call") for row in matrix["rows"]}
    assert calls["sockets: inet stream"] == "socket"
    assert calls["processes: exec"] == "execve"


def test_guest_memory_is_no_way_out_and_its_seals_hold_without_a_jail() -> None:
    code, matrix = selftest([], "virtio-rng")
    assert code == 0
    rows = {r["attempt"]: r["outcomes"] for r in matrix["rows"] if r["group"] == "guest memory"}
    assert rows.keys() == {a.name for a in ON_MEMORY}
    assert {o["full"]["outcome"] for o in rows.values()} == {"killed"} | ANSWERS & {"ENOENT"}
    unjailed = {name: outcomes["none"]["outcome"] for name, outcomes in rows.items()}
    sealed = {name for name in rows if name.startswith(("truncate", "grow", "seal"))}
    assert {name for name, outcome in unjailed.items() if outcome == "EPERM"} == sealed
    assert {outcome for name, outcome in unjailed.items() if name not in sealed} == {"succeeded"}


@pytest.mark.skipif("VMSUP_TESTBED" in os.environ, reason="2,000 processes take too long under emulation")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to leave out each layer")
def test_without_any_single_layer_the_others_hold_but_for_memory() -> None:
    code, matrix = selftest([], "--layers", "rtc")
    assert code == 0
    single = {n: count for n, count in matrix["successes"].items() if n.startswith("no ")}
    layers = {s.name for s in plan(Mode.FULL) if not s.always} - {"seccomp", "no-gain"}
    assert set(single) == {f"no {layer}" for layer in layers}
    assert {n for n, count in single.items() if count} == {"no limits"}


def test_an_escape_is_named_and_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = selftest_module.COLUMNS[-1]
    weak = selftest_module.Column(selftest_module.FULL, frozenset({"seccomp"}))
    monkeypatch.setattr(selftest_module, "COLUMNS", (weak, nothing))
    monkeypatch.setattr(selftest_module, "attempts", lambda victim: ATTEMPTS[:4])
    with pytest.raises(SystemExit) as end:
        cli.main(["jail", "selftest", "rtc"])
    assert end.value.code == 33
    escaped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ESCAPED: ")]
    assert escaped == ["ESCAPED: files: a handle of the root directory: succeeded"]
