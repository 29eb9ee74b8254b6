"""The policies we ship: linted, within budget, and rule by rule what they allow and what dies beside it."""

import pytest

from devproc.catalog import CATALOG, FD_BELL, FD_LOG
from policies import bpf, commands
from policies.compile import compile_single
from policies.lint import MORE_SYSCALLS, NEVER, OURS, SYSCALLS_MAX
from policies.parse import DIRECTORY, load
from policies.policy import Rule
from policies.simulate import cells, simulate
from policies.syscalls import SYSCALLS
from supervisor import confine

DEVICES = sorted(CATALOG)
WITHOUT_THREADS = 20

CONSTANTS = {name: CATALOG[name].slots() for name in DEVICES} | {
    name: confine.constants() for name in confine.POLICIES
}
ALL = sorted(CONSTANTS)


def rules() -> list[tuple[str, Rule]]:
    return [(name, rule) for name in ALL for rule in load(name, CONSTANTS[name]).rules]


def test_every_policy_file_belongs_to_a_device_or_is_shared() -> None:
    assert {p.stem for p in DIRECTORY.glob("*.policy")} == {
        *DEVICES, "base", "virtio", "vhost-user", *confine.POLICIES, "interpreter",
    }  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_the_linter_finds_nothing(name: str) -> None:
    found = commands.check([name], CONSTANTS[name], slots=name in CATALOG)
    assert [d.render() for d in found] == []


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_needs_few_system_calls(device: str) -> None:
    calls = load(device, CATALOG[device].slots()).by_call()
    budget = MORE_SYSCALLS.get(device, SYSCALLS_MAX if "clone" in calls else WITHOUT_THREADS)
    assert len(calls) <= budget, f"{device} has grown to {len(calls)} system calls, {budget} are allowed"


@pytest.mark.parametrize("device", ALL)
def test_everything_unlisted_dies(device: str) -> None:
    policy = load(device, CONSTANTS[device])
    program, listed = compile_single(policy), policy.by_call()
    for name, nr in SYSCALLS.items():
        if name not in listed:
            assert simulate(program, nr) == bpf.KILL_PROCESS, name
    ours = OURS if device == "exchange" else frozenset()
    assert not (NEVER - ours) & {name for name, rs in listed.items() if any(not r.errno for r in rs)}


@pytest.mark.parametrize(("device", "rule"), rules(), ids=lambda x: x if isinstance(x, str) else x.name)
def test_each_rule_passes_its_arguments_and_kills_each_mutated_one(device: str, rule: Rule) -> None:
    policy = load(device, CONSTANTS[device])
    program, rules_of_call = compile_single(policy), policy.by_call()[rule.name]
    nr = SYSCALLS[rule.name]
    if not rule.clauses:
        assert simulate(program, nr) == rule.action
    for clause in rule.clauses:
        good = [0] * 6
        for arg in {a.arg for a in clause}:
            atoms = [a for a in clause if a.arg == arg]
            good[arg] = next(v for v in cells(atoms) if all(a.holds(v) for a in atoms))
        assert simulate(program, nr, good) == bpf.ALLOW
        for atom in clause:
            for bit in range(64):
                bad = list(good)
                bad[atom.arg] ^= 1 << bit
                expected = bpf.ALLOW if any(r.applies(bad) for r in rules_of_call) else bpf.KILL_PROCESS
                assert simulate(program, nr, bad) == expected
            high = list(good)
            high[atom.arg] |= 1 << 32
            assert simulate(program, nr, high) == bpf.KILL_PROCESS


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_writes_only_to_descriptors_that_are_written(device: str) -> None:
    entry = CATALOG[device]
    program = compile_single(load(device, entry.slots()))
    kinds = {fd: d.kind for d, fds in entry.own_slots() for fd in fds}
    written = {FD_LOG, *(fd for fd, kind in kinds.items() if kind in ("signal", "output", "exchange"))}
    read = {FD_BELL, *(fd for fd, kind in kinds.items() if kind in ("input", "kick"))}
    for fd in range(entry.held + 1):
        assert (simulate(program, SYSCALLS["write"], [fd]) == bpf.ALLOW) is (fd in written)
        assert (simulate(program, SYSCALLS["read"], [fd]) == bpf.ALLOW) is (fd in read)
