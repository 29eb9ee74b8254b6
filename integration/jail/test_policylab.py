"""Shipped policies against the devices they confine, in the whole jail, as root and as an ordinary user."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from devproc import jail, nursery, zygote
from devproc.catalog import CATALOG, Entry
from integration.ordinary import as_user
from policies.compile import compile_notify, compile_single
from policies.learn import learn
from policies.parse import load, parse
from policies.policy import Policy
from policies.verify import probes
from supervisor import confine, policylab
from supervisor.exercise import ACCESSES, exercise
from supervisor.policylab import judged
from supervisor.reaper import DeviceDied
from supervisor.recorder import Recorder
from supervisor.verdicts import verdicts

ROOT = Path(__file__).resolve().parents[2]
# The heap's, and `write` to a log that may have had nothing to say: not made in every life.
SOMETIMES = {"brk", "mmap", "munmap", "mremap", "write"}
# Made only if the device has gone to sleep before the supervisor asks, or the other way round.
BY_CHANCE = {"read", "futex"}


@pytest.fixture
def said() -> list[str]:
    return []


def without(entry: Entry, name: str) -> Policy:
    policy = load(entry.name, entry.slots())
    return Policy(policy.name, tuple(r for r in policy.rules if r.name != name))


@pytest.fixture(scope="module")
def small_process() -> Iterator[Executor]:
    """For what forks: of pytest that takes ten times as long, and it has more data than a device may."""
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        yield executor


def heard_while_it_lives(device: str, enough: Policy | None = None) -> list[str]:
    """What `device` says while it is put through its lives, by its own policy or by another."""
    said: list[str] = []
    filters = None if enough is None else lambda _: compile_notify(enough, jail.SETUP_CALLS)
    exercise(device, lambda name, line: said.append(line), filters)
    return said


def heard_while_it_is_watched(device: str, records: Path) -> list[str]:
    """The same, its calls written to `records`."""
    said: list[str] = []
    recorder = Recorder(device, str(records), said.append)
    exercise(device, lambda name, line: said.append(line), recorder.filters, recorder.watch)
    recorder.close()
    return said


@pytest.mark.parametrize("device", sorted(CATALOG))
def test_a_device_lives_with_its_policy(small_process: Executor, device: str) -> None:
    assert small_process.submit(heard_while_it_lives, device).result() == []


@pytest.mark.parametrize("device", sorted(CATALOG))
def test_a_policy_lacks_nothing_that_its_device_needs(
    small_process: Executor, device: str, tmp_path: Path
) -> None:
    entry, path = CATALOG[device], tmp_path / "records"
    said = small_process.submit(heard_while_it_is_watched, device, path).result()
    policy = load(device, entry.slots())
    with open(path) as records:
        lesson = learn(policy, records, entry.slots())
    assert str(lesson.lacking) == ""
    # Those over the access channel: the mailbox needs none while both sides are awake.
    assert lesson.calls > ACCESSES // 4
    # What was proposed is a policy that does: the device lives with it too.
    proposal = parse(str(lesson.proposal), constants=entry.slots())
    proposed = [r for r in proposal.rules if r.name not in BY_CHANCE]
    lacking = (SOMETIMES | BY_CHANCE) - {r.name for r in proposed}
    enough = Policy(device, (*proposed, *(r for r in policy.rules if r.name in lacking)))
    said += small_process.submit(heard_while_it_lives, device, enough).result()
    assert said == []
    with open(path) as records:
        lesson = learn(without(entry, "recvfrom"), records, entry.slots())
    assert list(lesson.lacking.by_call()) == ["recvfrom"]


POLICIES = {name: entry.slots() for name, entry in CATALOG.items()}
POLICIES |= {name: confine.constants() for name in confine.POLICIES}


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_this_kernel_takes_each_rule_and_kills_for_each_mutated_argument_and_unlisted_call(
    small_process: Executor, name: str
) -> None:
    if "VMSUP_TESTBED" in os.environ and name != "serial":
        pytest.skip("4,000 processes take too long under emulation")
    policy = load(name, POLICIES[name])
    asked = list(probes(policy))
    assert {p.about for p in asked if p.kind == "listed"} == {str(r.place) for r in policy.rules}
    calls = [(p.nr, p.args) for p in asked]
    answers = small_process.submit(verdicts, [compile_single(policy)], calls).result()
    assert judged(asked, answers)[1] == []


# A drive of random accesses reaches no pending event of the SCI; the rest has tests of its own.
NOT_EXERCISED = {
    "acpi-pm", "virtio-blk", "virtio-fs", "virtio-net", "virtio-net-stream", "virtio-vsock",
    "vhost-user-blk", "vhost-user-net", "vhost-user-fs",
}  # fmt: skip


@pytest.mark.parametrize("device", sorted(set(CATALOG) - NOT_EXERCISED))
def test_an_exercise_uses_every_rule(device: str, said: list[str]) -> None:
    assert policylab.idle(CATALOG[device], said.append) == []
    assert said == []


@pytest.mark.parametrize(("name", "number"), [("sendto", 44), ("recvfrom", 45), ("exit_group", 231)])
def test_a_policy_that_lacks_a_call_is_named_with_it(name: str, number: int, said: list[str]) -> None:
    def filters(entry: Entry) -> zygote.Filters:
        return compile_notify(without(entry, name), jail.SETUP_CALLS)

    with pytest.raises(DeviceDied, match=rf"killed for system call {number} \({name}\)"):
        exercise("pvpanic", lambda n, line: said.append(line), filters)


def test_the_default_is_the_shipped_policy() -> None:
    entry = CATALOG["pvpanic"]
    assert nursery.compiled(entry) == compile_notify(load(entry.name, entry.slots()), jail.SETUP_CALLS)


@pytest.mark.parametrize("who", ["root", "user"])
def test_verify_finds_this_kernel_and_this_device_as_the_policy_says(who: str) -> None:
    command = [sys.executable, "-m", "supervisor.cli", "policy", "verify", "pvpanic"]
    if who == "root" and os.geteuid() != 0:
        pytest.skip("needs root")
    if who == "user":
        command = [*as_user(), *command]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "each as the policy says" in done.stdout
    assert "no call was refused" in done.stdout
