"""`vmsup jail inspect` names what a device lacks: one is started with each single layer left out."""

from __future__ import annotations

import os
import resource
from typing import Any

import pytest
from remote import HERE

from devproc.catalog import CATALOG
from supervisor.attest import Finding, attest, installed_filters

ROOT = HERE.parents[1]
HOST_ID = 2_000_001
RTC = CATALOG["rtc"]
IDS = {"uids", "gids"}
NO_FILTER = {"seccomp mode", "seccomp filters", "policy", "limit on open files"}
LIMITS = {"core file size", "data size", "file size", "locked memory", "processes"}
DIFFERS: dict[str, set[str]] = {
    "weak-namespaces": {
        "namespaces of its own", "pid in its own namespace", "uid map", "gid map", "setgroups",
        "root directory", "mounts",
    },
    "weak-identity": set(),  # an ordinary user has but one
    "weak-root": {"root directory", "mounts"},
    "weak-limits": {f"limit on {name}" for name in LIMITS},
    "weak-capabilities": {"capabilities Prm", "capabilities Eff", "capabilities Bnd"},
    "weak-no-gain": {"no_new_privs", *NO_FILTER},  # without the one there cannot be the other
    "weak-seccomp": NO_FILTER,
    "weak-descriptors": {"descriptors", "limit on open files", "writable and executable memory"},
    "hostile": {"writable and executable memory"},  # it brings code of its own
    # Nothing that the kernel shows tells of these two; selftest is what proves them.
    "weak-memory": set(),
    "weak-landlock": set(),
}  # fmt: skip
HIDDEN = {
    "namespaces of its own", "descriptors", "root directory", "writable and executable memory",
    "guest memory", "policy",
}  # fmt: skip
MORE = {
    # Whether a process of root's is dumpable cannot be seen.
    ("root", "weak-namespaces"): {*IDS, "dumpable"},
    ("root", "weak-identity"): {*IDS, "uid map", "gid map", "dumpable"},
    # Only in a namespace of its own may an ordinary user's process bound its capabilities.
    ("user", "weak-namespaces"): {"capabilities Bnd"},
    ("user", "weak-no-gain"): {"dumpable"},  # as root, the change of ids has seen to that already
}

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="much of a device is hidden from all but root")


def look(supervisor: Any, kind: str, name: str, *others: tuple[str, int, Any]) -> list[Finding]:
    """What differs or is hidden of a device of `kind` that is declared to be an rtc."""
    mode = "full" if kind == "rtc" else "best-effort"  # a layer that builds on the one left out fails too
    host_id = HOST_ID if supervisor.who == "root" else 0
    greeting = supervisor("spawn", kind, name, mode, host_id=host_id)
    try:
        report = attest([(name, greeting["pid"], RTC), *others], supervisor.pid)
    finally:
        supervisor("kill", name)
    assert all(f.process == name and f.pid == greeting["pid"] for f in report.findings if f.field == "parent")
    return [f for f in report.unproven if f.process == name]


@needs_root
def test_a_device_in_the_whole_jail_is_all_that_was_declared(supervisor: Any) -> None:
    assert look(supervisor, "rtc", "whole") == []


@needs_root
@pytest.mark.parametrize("kind", DIFFERS)
def test_a_device_without_one_layer_is_named_with_what_it_lacks(supervisor: Any, kind: str) -> None:
    found = look(supervisor, kind, "weak")
    expected = DIFFERS[kind] | MORE.get((supervisor.who, kind), set())
    if resource.getrlimit(resource.RLIMIT_CORE) == (0, 0):  # nothing can be weaker than what it inherits
        expected = expected - {"limit on core file size"}
    assert {f.field for f in found} == expected
    assert all(f.verdict == "differs" and str(f).startswith(f"weak: {f.field}: declared ") for f in found)


@needs_root
def test_the_programs_that_the_kernel_has_are_those_of_the_policy(supervisor: Any) -> None:
    from policies.compile import compile_notify  # noqa: PLC0415
    from policies.parse import load  # noqa: PLC0415

    greeting = supervisor("spawn", "rtc", "programs", host_id=HOST_ID if supervisor.who == "root" else 0)
    expected = compile_notify(load("rtc", RTC.slots()), ("seccomp", "sendmsg", "close", "prlimit64"))
    assert tuple(installed_filters(greeting["pid"])) == expected
    assert supervisor("ask_ping", "programs") == 7  # it goes on as if nothing had been
    assert supervisor("stop", "programs") == (os.CLD_EXITED, 0)


@needs_root
def test_devices_that_share_namespaces_or_ids_are_named(supervisor: Any) -> None:
    greeting = supervisor("spawn", "rtc", "first", host_id=HOST_ID if supervisor.who == "root" else 0)
    twin = ("twin", greeting["pid"], RTC)
    found = attest([("first", greeting["pid"], RTC), twin], supervisor.pid).unproven
    supervisor("kill", "first")
    assert {f.field for f in found} >= {"namespaces of its own"}


def test_an_ordinary_user_is_told_what_is_hidden_and_that_is_not_called_proven(supervisor: Any) -> None:
    supervisor("spawn", "rtc", "hidden", host_id=HOST_ID if supervisor.who == "root" else 0)
    found = dict(supervisor("look", "hidden"))
    supervisor("kill", "hidden")
    assert set(found) == (set() if supervisor.who == "root" else HIDDEN)
    assert set(found.values()) <= {"hidden"}


def test_a_process_that_is_gone_is_named() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    report = attest([("gone", pid, RTC)], os.getpid())
    found = [f for f in report.unproven if f.process == "gone"]
    assert {f.found for f in found} == {"no such process"}
    assert "gone: seccomp mode: declared 2, found no such process" in report.text()
