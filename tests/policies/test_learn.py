"""Records of system calls become the least policy that allows them, and the shipped one's margin and gaps."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devproc.catalog import CATALOG
from policies import bpf
from policies.learn import Call, Lesson, answer, idle, learn, propose, record, report
from policies.lint import NEVER, lint
from policies.parse import load, parse
from policies.syscalls import NAMES, SYSCALLS

SLOTS = {"FD_LOG": 2, "FD_ACCESS": 3, "FD_CONTROL": 4, "FD_KICK_FIRST": 5, "FD_KICK_LAST": 8}
U64_MAX = (1 << 64) - 1


def call(name: str, *args: int) -> Call:
    return Call(SYSCALLS[name], (*args, *(0,) * (6 - len(args))))


def lesson(policy: str, *calls: Call) -> Lesson:
    return learn(parse(policy, constants=SLOTS), [record("host1", c) for c in calls], SLOTS)


def rules(policy: str, *calls: Call) -> dict[str, str]:
    return {r.name: r.condition() for r in lesson(policy, *calls).proposal.rules}


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(NAMES)), st.lists(st.integers(0, U64_MAX), min_size=6, max_size=6))
    )
)
def test_a_proposal_can_be_parsed_and_answers_every_call_as_it_was_answered(
    made: list[tuple[int, list[int]]],
) -> None:
    policy = load("serial", slots := CATALOG["serial"].slots())
    calls = [Call(nr, tuple(args)) for nr, args in made]
    proposal = parse(str(propose(policy, dict.fromkeys(calls, 1), slots)), constants=slots)
    for c in calls:
        error = answer(policy, c)
        assert proposal.verdict(*c).action == (bpf.ERRNO | error if error else bpf.ALLOW)


def test_idle_rules_are_named_but_for_what_a_run_may_well_not_need() -> None:
    policy = (
        "brk: 1\nmmap: arg2 == 3\nwrite: arg0 == FD_LOG || arg0 == FD_ACCESS || arg0 == FD_CONTROL\nread: 1"
    )
    found = idle(lesson(policy, call("write", 3)))
    assert [(d.place.line, d.message) for d in found] == [
        (3, "no call used `write: arg0 == FD_CONTROL`"),
        (4, "no call used `read: 1`"),
    ]


def test_a_record_survives_its_line() -> None:
    made = call("pwrite64", 3, U64_MAX, 1 << 40, 7)
    (rule,) = lesson("brk: 1", made).proposal.rules
    assert record("host1", made) == "host1 18 3 ffffffffffffffff 10000000000 7 0 0\n"
    assert (rule.name, rule.condition()) == ("pwrite64", "arg0 == FD_ACCESS")


def test_descriptors_flags_and_commands_are_proposed_by_name() -> None:
    assert rules(
        "brk: 1",
        call("write", 2, 0x7F00, 10),
        call("write", 3, 0x7F10, 20),
        call("mmap", 0, 4096, 3, 0x22, U64_MAX),
        call("sendto", 4, 0x7F00, 9, 0x4040),
        call("clock_gettime", 1, 0x7F00),
        call("fcntl", 3, 4, 0x800),
        call("lseek", 9, 0, 2),
    ) == {
        "write": "arg0 == FD_LOG || arg0 == FD_ACCESS",
        "mmap": "arg2 == PROT_READ|PROT_WRITE && arg3 == MAP_PRIVATE|MAP_ANONYMOUS",
        "sendto": "arg0 == FD_CONTROL && arg3 == MSG_DONTWAIT|MSG_NOSIGNAL && arg4 == 0",
        "clock_gettime": "arg0 == CLOCK_MONOTONIC",
        "fcntl": "arg0 == FD_ACCESS && arg1 == F_SETFL",
        "lseek": "arg0 == 9 && arg2 == SEEK_END",
    }


def test_one_of_an_array_of_descriptors_stands_for_all() -> None:
    made = lesson("brk: 1", call("read", 5), call("read", 7), call("read", 8), call("read", 2))
    (rule,) = made.proposal.rules
    assert rule.condition() == "arg0 == FD_LOG || arg0 >= FD_KICK_FIRST && arg0 <= FD_KICK_LAST"
    assert lint(made.proposal) == []


def test_flags_that_are_not_all_known_are_a_number() -> None:
    assert rules("brk: 1", call("mprotect", 0, 0, 0x80000001)) == {"mprotect": "arg2 == 0x80000001"}


def test_an_address_is_compared_only_where_it_is_always_null() -> None:
    without, with_one = call("recvfrom", 3), call("recvfrom", 3, 0, 0, 0, 0x7F00)
    assert rules("brk: 1", without) == {"recvfrom": "arg0 == FD_ACCESS && arg3 == 0 && arg4 == 0"}
    assert rules("brk: 1", without, with_one) == {"recvfrom": "arg0 == FD_ACCESS && arg3 == 0"}


def test_calls_that_differ_in_addresses_are_one_rule_counted() -> None:
    taught = lesson("brk: 1", *(call("read", 3, 0x1000 * n, n) for n in range(1200)))
    assert str(taught.proposal) == "read: arg0 == FD_ACCESS  # seen 1,200\n"
    assert (taught.calls, taught.instances) == (1200, ("host1",))


def test_what_nothing_needed_is_an_alternative_of_the_shipped_policy() -> None:
    policy = "write: arg0 == FD_LOG || arg0 == FD_ACCESS\nbrk: 1\nopenat: return ENOENT\nmunmap: 1"
    taught = lesson(policy, call("write", 3), call("munmap", 0x7F00, 4096))
    assert [(r.name, " ".join(map(str, c))) for r, c in taught.unneeded] == [
        ("write", "arg0 == FD_LOG"), ("brk", ""), ("openat", ""),
    ]  # fmt: skip
    assert taught.lacking.rules == ()


def test_what_the_shipped_policy_lacks_is_said_with_arguments() -> None:
    taught = lesson("write: arg0 == FD_LOG", call("write", 2), call("write", 3), call("fsync", 3))
    assert str(taught.lacking) == "write: arg0 == FD_ACCESS  # seen 1\nfsync: arg0 == FD_ACCESS  # seen 1\n"
    assert taught.unneeded == ()


def test_a_call_that_the_policy_fails_is_failed_while_learning_too() -> None:
    policy = parse("openat: return ENOENT\nread: arg0 == 3")
    assert answer(policy, call("openat")) == errno.ENOENT
    assert answer(policy, call("read", 4)) == 0
    assert rules("openat: return ENOENT", call("openat", 5)) == {"openat": "return ENOENT"}


@pytest.mark.parametrize("name", sorted(NEVER))
def test_what_no_policy_may_allow_does_not_go_on(name: str) -> None:
    assert answer(parse("brk: 1"), call(name)) == errno.ENOSYS
    taught = lesson("brk: 1", call(name))
    assert str(taught.lacking) == f"{name}: return ENOSYS  # seen 1\n"
    assert lint(taught.proposal) == []


def test_a_number_without_a_name_does_not_go_on_and_is_said() -> None:
    assert answer(parse("brk: 1"), Call(599, (0,) * 6)) == errno.ENOSYS
    taught = lesson("brk: 1", Call(599, (0,) * 6))
    assert taught.unknown == (599,)
    assert "numbers without a name here: 599" in report(taught)


@pytest.mark.parametrize("line", ["host1", "host1 read 0 0 0 0 0 0", "host1 0 xyz 0 0 0 0 0"])
def test_what_is_not_a_record_is_refused(line: str) -> None:
    with pytest.raises(ValueError):
        learn(parse("brk: 1"), [line], {})


def test_the_report_names_places_and_findings() -> None:
    text = report(lesson("brk: 1\nwrite: arg0 == FD_LOG", call("close", 77), call("brk", 0)))
    assert text.splitlines() == [
        "<policy>: 2 system calls of host1 recorded",
        "",
        "the least policy that allows them:",
        "  close: arg0 == 0x4d  # seen 1",
        "  brk: 1  # seen 1",
        "",
        "of these rules the linter says, by their line:",
        "  1: `arg0 == 0x4d`: write the descriptor's name, FD_...",
        "",
        "what the shipped policy allows beyond the need of this run:",
        "  <policy>:2: write: arg0 == FD_LOG",
        "",
        "what the shipped policy lacks:",
        "  close: arg0 == 0x4d  # seen 1",
    ]


def test_the_report_says_nothing_where_there_is_nothing() -> None:
    text = report(lesson("brk: 1", call("brk", 0)))
    assert text.count("\n  nothing") == 2
    assert "linter" not in text
