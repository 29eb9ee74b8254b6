"""What a device did while every call of it was watched, as a policy, and how the shipped policy differs.

seccomp_unotify(2).  A record is a line "INSTANCE NUMBER ARG0 ... ARG5", the arguments in hexadecimal.  Left
out: what a call gave, which a listener does not see; ranges, a value seen is proposed with ==, but for an
array of descriptors; and an allow under conditions beside an errno for the rest of the same call, which no
policy of ours needs.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from policies.constants import CONSTANTS
from policies.errors import Diagnostic, Place
from policies.lint import ARGUMENT_NEEDED, DESCRIPTOR_NEEDED, NEVER, lint
from policies.policy import Atom, Clause, Policy, Rule, clause_holds
from policies.syscalls import ARGUMENTS, NAMES, SYSCALLS

# How an argument is compared: with constants of this prefix where there are any, or as one of these three.
_FD, _NUMBER, _NULL, _IGNORED = "FD_", "", "NULL", "ignored"

_KINDS: Final[Mapping[str, Mapping[int, str]]] = {
    "clock_getres": {0: "CLOCK_"},
    "clock_gettime": {0: "CLOCK_"},
    "clock_nanosleep": {0: "CLOCK_"},
    "clone": {0: "CLONE_"},
    "epoll_ctl": {1: "EPOLL_CTL_"},
    "fallocate": {1: "FALLOC_FL_"},
    "fcntl": {1: "F_"},
    "futex": {1: "FUTEX_"},
    "getrandom": {2: "GRND_"},
    "ioctl": {1: "T"},
    "kill": {1: "SIG"},
    "lseek": {2: "SEEK_"},
    "madvise": {2: "MADV_"},
    "mmap": {2: "PROT_", 3: "MAP_", 4: _IGNORED},  # what is mapped follows from the flags
    "mprotect": {2: "PROT_"},
    "mremap": {3: "MREMAP_"},
    "openat": {0: _IGNORED, 2: "O_"},
    "prctl": {0: "PR_"},
    "preadv2": {5: "RWF_"},
    "prlimit64": {1: "RLIMIT_", 2: _NULL},
    "pwritev2": {5: "RWF_"},
    "recvfrom": {3: "MSG_", 4: _NULL},
    "recvmsg": {2: "MSG_"},
    "rt_sigprocmask": {0: "SIG_"},
    "sched_setscheduler": {1: "SCHED_"},
    "sendmsg": {2: "MSG_"},
    "sendto": {3: "MSG_", 4: _NULL},
    "shutdown": {1: "SHUT_"},
    "tgkill": {2: "SIG"},
    "tkill": {1: "SIG"},
}
"""System call -> argument -> how it is compared; a pointer (`_NULL`) only where it was NULL every time."""

_FLAGS: Final = frozenset(("CLONE_", "FALLOC_FL_", "GRND_", "MAP_", "MREMAP_", "MSG_", "O_", "PROT_", "RWF_"))
"""Prefixes of constants that are bits to be joined."""


class Call(NamedTuple):
    """One system call: x86-64 number and the six argument registers."""

    nr: int
    args: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a run has taught.

    Attributes:
        calls: how many system calls were recorded.
        instances: the device processes that made them.
        proposal: the least policy that allows them all.
        unneeded: alternatives of the shipped policy that no call used, each with its rule.
        lacking: the part of `proposal` that the shipped policy forbids.
        unknown: numbers that no policy can name, because we know of no such call.
    """

    calls: int
    instances: tuple[str, ...]
    proposal: Policy
    unneeded: tuple[tuple[Rule, Clause], ...]
    lacking: Policy
    unknown: tuple[int, ...]


def answer(policy: Policy, call: Call) -> int:
    """What becomes of a watched call: 0, it goes on; otherwise the error that it fails with.

    Nothing that a policy may never allow goes on, not even here.
    """
    rule = policy.verdict(*call).rule
    if rule is not None:
        return rule.errno
    name = NAMES.get(call.nr)
    return errno.ENOSYS if name is None or name in NEVER else 0


def record(instance: str, call: Call) -> str:
    """The line that stands for one call."""
    return f"{instance} {call.nr} {' '.join(format(a, 'x') for a in call.args)}\n"


def learn(policy: Policy, records: Iterable[str], slots: Mapping[str, int]) -> Lesson:
    """What `records` say beside the shipped `policy`; `slots` are the descriptors' names.

    Raises:
        ValueError: a line is not a record.
    """
    seen: Counter[Call] = Counter()
    instances: Counter[str] = Counter()
    compared: dict[int, set[int]] = {}
    for line in records:
        instance, nr_text, *words = line.split()
        nr = int(nr_text)
        if nr not in compared:
            compared[nr] = _compared(policy, nr)
        # Arguments that nobody compares, addresses above all, would make every call another one.
        args = tuple(int(w, 16) if i in compared[nr] else 0 for i, w in enumerate(words))
        seen[Call(nr, args)] += 1
        instances[instance] += 1
    used: set[tuple[Rule, Clause]] = set()
    forbidden: Counter[Call] = Counter()
    for call, count in seen.items():
        rule = policy.verdict(*call).rule
        if rule is None:
            forbidden[call] = count
        else:
            used.update((rule, c) for c in rule.clauses or ((),) if clause_holds(c, call.args))
    alternatives = [(rule, clause) for rule in policy.rules for clause in rule.clauses or ((),)]
    return Lesson(
        seen.total(),
        tuple(sorted(instances)),
        propose(policy, seen, slots),
        tuple(a for a in alternatives if a not in used),
        propose(policy, forbidden, slots),
        tuple(sorted({nr for nr, _ in seen if nr not in NAMES})),
    )


MARGIN: Final = frozenset(("brk", "mmap", "munmap", "mremap", "clock_gettime", "openat", "newfstatat"))
"""For memory that grows, another host's clock, a traceback: a run may well make none of these calls."""


def idle(lesson: Lesson) -> list[Diagnostic]:
    """A finding for each alternative that no call used, `MARGIN` and log lines apart."""
    found = []
    for rule, clause in lesson.unneeded:
        if rule.name not in MARGIN and [a.spelled for a in clause] != ["FD_LOG"]:
            condition = " && ".join(map(str, clause)) or rule.condition()
            found.append(Diagnostic(rule.place, f"no call used `{rule.name}: {condition}`"))
    return found


def propose(policy: Policy, seen: Mapping[Call, int], slots: Mapping[str, int]) -> Policy:
    """The least policy that lets go on, or fail, each call of `seen` (with its count) as `answer` does."""
    by_answer: dict[tuple[str, int], list[Call]] = {}
    for call in seen:
        if call.nr in NAMES:
            by_answer.setdefault((NAMES[call.nr], answer(policy, call)), []).append(call)
    rules: list[Rule] = []
    for name, error in sorted(by_answer, key=lambda k: (SYSCALLS[k[0]], k[1])):
        calls = by_answer[name, error]
        clauses = () if error else _clauses(name, calls, slots)
        reason = f"seen {sum(seen[c] for c in calls):,}"
        rules.append(Rule(name, clauses, error, reason, Place("<learnt>", len(rules) + 1)))
    return Policy(policy.name, tuple(rules))


def _kinds(name: str) -> dict[int, str]:
    """Argument -> how it is compared, for those that a rule about `name` should compare."""
    kinds = {i: _FD for i, a in enumerate(ARGUMENTS.get(name, ())) if a.name.startswith("fd")}
    if name in DESCRIPTOR_NEEDED:
        kinds[0] = _FD
    kinds = dict.fromkeys(ARGUMENT_NEEDED.get(name, ()), _NUMBER) | kinds | dict(_KINDS.get(name, {}))
    return {i: kinds[i] for i in sorted(kinds) if kinds[i] != _IGNORED}


def _compared(policy: Policy, nr: int) -> set[int]:
    name = NAMES.get(nr, "")
    atoms = {a.arg for r in policy.by_call().get(name, ()) for c in r.clauses for a in c}
    return atoms | _kinds(name).keys()


def _clauses(name: str, calls: Sequence[Call], slots: Mapping[str, int]) -> tuple[Clause, ...]:
    kinds = _kinds(name)
    compared = [i for i in kinds if kinds[i] != _NULL or not any(c.args[i] for c in calls)]
    values = sorted({tuple(c.args[i] for i in compared) for c in calls})
    if not compared:
        return ()
    found = (
        tuple(a for i, v in zip(compared, combination, strict=True) for a in _atoms(i, v, kinds[i], slots))
        for combination in values
    )
    return tuple(dict.fromkeys(found))  # one for all of an array


def _atoms(arg: int, value: int, kind: str, slots: Mapping[str, int]) -> tuple[Atom, ...]:
    """What holds for `value`, and for the rest of its array if it is one of an array of descriptors."""
    if kind == _FD and (array := _array(value, slots)):
        first, last = f"{array}_FIRST", f"{array}_LAST"
        return Atom(arg, ">=", slots[first], first), Atom(arg, "<=", slots[last], last)
    return (Atom(arg, "==", value, _spelled(value, kind, slots)),)


def _array(fd: int, slots: Mapping[str, int]) -> str:
    """The name of the array that a descriptor belongs to, or ""."""
    arrays = (name.removesuffix("_FIRST") for name in slots if name.endswith("_FIRST"))
    return next((a for a in arrays if slots[f"{a}_FIRST"] <= fd <= slots[f"{a}_LAST"]), "")


def _spelled(value: int, kind: str, slots: Mapping[str, int]) -> str:
    """`value` by name: a descriptor, a constant, or flags joined by |; otherwise as a number."""
    if kind not in (_NUMBER, _NULL):
        known = slots if kind == _FD else {n: v for n, v in CONSTANTS.items() if n.startswith(kind)}
        if (name := next((n for n, v in known.items() if v == value), None)) is not None:
            return name
        bits = {v: n for n, v in known.items() if v.bit_count() == 1 and v & value}
        if bits and kind in _FLAGS and sum(bits) == value:
            return "|".join(bits[bit] for bit in sorted(bits))
    return format(value, "#x") if value > 9 else str(value)


def report(lesson: Lesson) -> str:
    """A lesson to read."""
    who = ", ".join(lesson.instances)
    lines = [f"{lesson.proposal.name}: {lesson.calls:,} system calls of {who} recorded"]
    lines += ["", "the least policy that allows them:", *_indented(str(lesson.proposal))]
    found = [f"{d.place.line}: {d.message}" for d in lint(lesson.proposal)]
    if found:
        lines += ["", "of these rules the linter says, by their line:", *_indented("\n".join(found))]
    lines += ["", "what the shipped policy allows beyond the need of this run:"]
    for rule, clause in lesson.unneeded:
        where = f"{Path(rule.place.file).name}:{rule.place.line}"
        condition = " && ".join(map(str, clause)) or rule.condition()
        lines.append(f"  {where}: {rule.name}: {condition}")
    lines += [] if lesson.unneeded else ["  nothing"]
    lines += ["", "what the shipped policy lacks:", *_indented(str(lesson.lacking) or "nothing")]
    if lesson.unknown:
        lines += [f"  numbers without a name here: {', '.join(map(str, lesson.unknown))}"]
    return "\n".join(lines)


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]
