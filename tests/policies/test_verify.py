"""The questions to a kernel: no rule, no argument bit and no number is left out."""

import pytest

from devproc.catalog import CATALOG
from policies import bpf
from policies.compile import compile_single
from policies.errors import PolicyError
from policies.parse import load, parse
from policies.policy import clause_holds
from policies.simulate import simulate
from policies.syscalls import SYSCALLS, X32_BIT
from policies.verify import NUMBERS, probes

POLICY = "read: arg0 == 3 || arg0 == 5 && arg2 <= 9\nread: return EPERM\nbrk: 1\nopenat: return ENOENT"


@pytest.mark.parametrize("device", sorted(CATALOG))
def test_our_compiler_answers_as_expected(device: str) -> None:
    policy = load(device, CATALOG[device].slots())
    program = compile_single(policy)
    for probe in probes(policy):
        assert simulate(program, probe.nr, probe.args) == probe.expected, probe


def test_every_alternative_is_reached_by_its_own_rule() -> None:
    policy = parse(POLICY)
    listed = [p for p in probes(policy) if p.kind == "listed"]
    alternatives = [(r, c) for r in policy.rules for c in r.clauses or ((),)]
    assert len(listed) == len(alternatives) == 5
    for probe, (rule, clause) in zip(listed, alternatives, strict=True):
        assert policy.verdict(probe.nr, probe.args) == (probe.expected, rule)
        assert clause_holds(clause, probe.args)
    assert [p.expected for p in listed] == [bpf.ALLOW, bpf.ALLOW, bpf.ERRNO | 1, bpf.ALLOW, bpf.ERRNO | 2]


def test_each_bit_of_each_compared_argument_is_flipped() -> None:
    asked = list(probes(parse("read: arg0 == 3 && arg2 == 1\nbrk: 1")))
    (good,) = [p.args for p in asked if p.kind == "listed" and p.nr == 0]
    mutated = [p for p in asked if p.kind == "mutated"]
    flips = {tuple(a ^ b for a, b in zip(p.args, good, strict=True)) for p in mutated}
    assert flips == {
        tuple(1 << bit if i == arg else 0 for i in range(6)) for arg in (0, 2) for bit in range(64)
    }
    assert {p.expected for p in mutated} == {bpf.KILL_PROCESS}


def test_a_flip_that_another_alternative_allows_is_expected_to_pass() -> None:
    mutated = [p for p in probes(parse("write: arg0 == 4 || arg0 == 5")) if p.kind == "mutated"]
    assert sorted(p.args[0] for p in mutated if p.expected == bpf.ALLOW) == [4, 5]


def test_every_number_without_a_rule_is_expected_to_kill() -> None:
    asked = list(probes(parse(POLICY)))
    unlisted = {p.nr for p in asked if p.kind == "unlisted"}
    assert unlisted | {SYSCALLS[n] for n in ("read", "brk", "openat")} == set(NUMBERS)
    assert set(SYSCALLS.values()) <= set(NUMBERS)
    assert {p.nr for p in asked if p.kind == "x32"} == {
        X32_BIT | SYSCALLS[n] for n in ("read", "brk", "openat")
    }


def test_an_alternative_that_nothing_reaches_is_an_error() -> None:
    with pytest.raises(PolicyError, match=r"<policy>:2:1: no call of read comes this far"):
        list(probes(parse("read: arg0 == 3\nread: arg0 == 3")))


def test_a_difference_is_one_line() -> None:
    (probe,) = [p for p in probes(parse("openat: return ENOENT")) if p.kind == "listed"]
    assert probe.differs(bpf.KILL_PROCESS) == (
        "<policy>:1:1: listed 0x101 (openat)(0x0, 0x0, 0x0, 0x0, 0x0, 0x0): "
        "expected ERRNO ENOENT, the kernel says KILL_PROCESS"
    )
