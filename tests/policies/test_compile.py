"""The compiled filters decide what the tree decides, in every shape and at every corner."""

import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import bpf
from policies.compile import SETUP, SETUP_MARK, compile_notify, compile_single
from policies.errors import Place, PolicyError
from policies.parse import parse
from policies.policy import OPS, Atom, Policy, Rule
from policies.simulate import checked, corners, simulate, simulate_stack
from policies.syscalls import SYSCALLS, X32_BIT

CALLS = ("read", "write", "open", "close", "sendmsg", "prctl", "seccomp", "mmap", "clone3", "mseal")
I386 = 0x40000003

values = st.one_of(
    st.integers(0, 8),
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([1 << 31, 1 << 32, (1 << 32) - 1, (1 << 64) - 1, 0x5_0000_0003]),
)
atoms = st.builds(Atom, st.integers(0, 5), st.sampled_from(OPS), values)
clauses = st.lists(atoms, min_size=1, max_size=3).map(tuple)
names = st.sampled_from(CALLS)
place = st.just(Place("<test>", 1))
conditional = st.builds(
    Rule, names, st.lists(clauses, min_size=1, max_size=3).map(tuple), st.just(0), st.just(""), place
)
final = st.builds(Rule, names, st.just(()), st.sampled_from([0, 1, 38, 4095]), st.just(""), place)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    finals = draw(st.lists(final, unique_by=lambda r: r.name, max_size=8))
    return Policy("test", (*draw(st.lists(conditional, max_size=8)), *finals))


def calls_of(policy: Policy, seed: int) -> list[tuple[int, tuple[int, ...]]]:
    """System calls at the corners of `policy`'s own comparisons, and of calls it does not name."""
    rng = random.Random(seed)
    every = [a for r in policy.rules for c in r.clauses for a in c]
    interesting = [corners(a for a in every if a.arg == i) for i in range(6)]
    numbers = [SYSCALLS[n] for n in CALLS] + [0x3FFFFFFF, 335, 9999]
    return [(rng.choice(numbers), tuple(rng.choice(v) for v in interesting)) for _ in range(60)]


@given(policies(), st.integers())
def test_a_filter_agrees_with_its_tree(policy: Policy, seed: int) -> None:
    program = compile_single(policy)
    for nr, args in calls_of(policy, seed):
        assert simulate(program, nr, args) == policy.verdict(nr, args).action


@given(policies(), st.integers())
def test_the_pair_of_filters_is_the_single_one_that_notifies(policy: Policy, seed: int) -> None:
    pair, single = compile_notify(policy), compile_single(policy)
    for nr, args in calls_of(policy, seed):
        expected = simulate(single, nr, args)
        if expected == bpf.KILL_PROCESS:
            expected = bpf.USER_NOTIF
        assert simulate_stack(pair, nr, args) == expected


@given(policies())
def test_foreign_architectures_and_x32_are_killed_by_every_filter(policy: Policy) -> None:
    for program in (compile_single(policy), *compile_notify(policy)):
        for nr in (*(SYSCALLS[n] for n in CALLS), 0xFFFFFFFF):
            assert simulate(program, nr, arch=I386) == bpf.KILL_PROCESS
            assert simulate(program, nr | X32_BIT) == bpf.KILL_PROCESS


def test_between_the_two_filters_marked_setup_is_possible_and_then_it_kills() -> None:
    first, second = compile_notify(parse("close: arg0 == 9"))
    for name in SETUP:
        for args, before, after in (
            ([3, 0, 0, 0, 0, SETUP_MARK], bpf.ALLOW, bpf.KILL_PROCESS),
            ([9, 0, 0, 0, 0, SETUP_MARK], bpf.ALLOW, bpf.KILL_PROCESS),
            ([3], bpf.USER_NOTIF, bpf.ALLOW),
            ([3, 0, 0, 0, 0, SETUP_MARK & 0xFFFF_FFFF], bpf.USER_NOTIF, bpf.ALLOW),
        ):
            assert simulate(first, SYSCALLS[name], args) == before
            assert simulate(second, SYSCALLS[name], args) == after
    assert simulate_stack((first, second), SYSCALLS["close"], [9]) == bpf.ALLOW
    assert simulate_stack((first, second), SYSCALLS["socket"], [0, 0, 0, 0, 0, SETUP_MARK]) == bpf.USER_NOTIF


def test_an_errno_rule_on_a_setup_call_survives_the_pair() -> None:
    pair = compile_notify(parse("prctl: return EPERM"))
    assert simulate_stack(pair, SYSCALLS["prctl"]) == bpf.ERRNO | 1


def test_an_empty_policy_kills_everything() -> None:
    program = compile_single(Policy("empty", ()))
    assert {simulate(program, nr) for nr in SYSCALLS.values()} == {bpf.KILL_PROCESS}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "value", [0, 5, 1 << 32, 0xFFFFFFFF, 0x5_0000_0003, (1 << 64) - 1, ~4 & (1 << 64) - 1]
)
def test_both_halves_of_an_argument_are_compared(op: str, value: int) -> None:
    policy = parse(f"read: arg2 {op} {value:#x}")
    program = compile_single(policy)
    atom = policy.rules[0].clauses[0][0]
    for x in corners([atom]):
        assert (simulate(program, 0, [0, 0, x]) == bpf.ALLOW) is atom.holds(x), hex(x)


@pytest.mark.parametrize("clauses", [40, 120, 220])
def test_jumps_over_more_than_255_instructions_arrive(clauses: int) -> None:
    condition = " || ".join(f"arg0 == {i} && arg1 > {i}" for i in range(clauses))
    policy = parse(f"ioctl: {condition}\nread: {condition}\nmseal: 1\nwrite: return EPERM")
    program = compile_single(policy)
    checked(program)
    calls = [SYSCALLS[name] for name in ("ioctl", "read", "mseal", "write", "open")]
    for nr, i, j in product(calls, (0, clauses - 1, clauses), (0, 9999)):
        assert simulate(program, nr, [i, j]) == policy.verdict(nr, [i, j, 0, 0, 0, 0]).action


def test_a_policy_too_long_for_the_kernel_is_refused() -> None:
    condition = " || ".join(f"arg0 == {i}" for i in range(1100))
    with pytest.raises(PolicyError, match="4096"):
        compile_single(parse(f"ioctl: {condition}"))


@given(st.sets(st.sampled_from(sorted(SYSCALLS)), min_size=1))
def test_the_search_finds_each_number_in_few_steps(allowed: set[str]) -> None:
    program = compile_single(Policy("test", tuple(Rule(n, (), 0, "", Place("", 1)) for n in allowed)))
    assert len(program) // 8 <= 2 * len(allowed) + 8
    for name, nr in SYSCALLS.items():
        assert (simulate(program, nr) == bpf.ALLOW) is (name in allowed)
