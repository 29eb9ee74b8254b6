"""A policy as an immutable tree, what it decides, and its text.

The language is the strict subset of minijail's (minijail0(5)) that parse.py describes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, get_args

from policies import bpf
from policies.errors import Place
from policies.syscalls import AUDIT_ARCH_X86_64, NAMES

Op = Literal["==", "!=", "<", "<=", ">", ">=", "&", "in"]
OPS: Final[tuple[Op, ...]] = get_args(Op)
U64_MAX: Final = (1 << 64) - 1


class Atom(NamedTuple):
    """One comparison of a whole 64-bit argument; all are unsigned.

    `&` holds when any bit of `value` is set in the argument, `in` when no bit outside `value` is.
    `spelled` is the value as the author wrote it.
    """

    arg: int
    op: Op
    value: int
    spelled: str = ""

    # However it is spelt; != too, because a tuple has one of its own.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Atom) and self[:3] == other[:3]

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self[:3])

    def holds(self, x: int) -> bool:
        """Whether the comparison is true of the argument value `x`."""
        v = self.value
        match self.op:
            case "==":
                return x == v
            case "!=":
                return x != v
            case "<":
                return x < v
            case "<=":
                return x <= v
            case ">":
                return x > v
            case ">=":
                return x >= v
            case "&":
                return x & v != 0
            case "in":
                return x & ~v == 0

    def __str__(self) -> str:
        return f"arg{self.arg} {self.op} {self.spelled or format(self.value, '#x')}"


Clause = tuple[Atom, ...]
"""A conjunction."""


def clause_holds(clause: Clause, args: Sequence[int]) -> bool:
    """Whether every comparison of `clause` is true of the six arguments."""
    return all(a.holds(args[a.arg]) for a in clause)


class Rule(NamedTuple):
    """One line of a policy.

    `clauses` is a disjunction that allows the call; empty, the rule is unconditional: it allows when
    `errno` is 0 and otherwise makes the call fail with that number.
    """

    name: str
    clauses: tuple[Clause, ...]
    errno: int
    reason: str
    place: Place

    # Wherever it stands; != too, because a tuple has one of its own.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rule) and self[:4] == other[:4]

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self[:4])

    @property
    def action(self) -> int:
        """The SECCOMP_RET_ value when the rule applies."""
        return bpf.ERRNO | self.errno if self.errno else bpf.ALLOW

    def applies(self, args: Sequence[int]) -> bool:
        """Whether this rule decides a call with these six arguments."""
        return not self.clauses or any(clause_holds(c, args) for c in self.clauses)

    def condition(self) -> str:
        """What stands after the colon."""
        if self.errno:
            return f"return {bpf.action_name(self.action).removeprefix('ERRNO ')}"
        return " || ".join(" && ".join(map(str, clause)) for clause in self.clauses) or "1"


class Verdict(NamedTuple):
    """What a policy decides: a SECCOMP_RET_ value, and the rule that says so (None: nothing allows it)."""

    action: int
    rule: Rule | None


class Policy(NamedTuple):
    """What one process may do: the first rule of a call that applies decides; whatever no rule allows is
    KILL_PROCESS."""

    name: str
    rules: tuple[Rule, ...]

    def by_call(self) -> dict[str, tuple[Rule, ...]]:
        """System call -> its rules, both in order of appearance."""
        calls: dict[str, tuple[Rule, ...]] = {}
        for rule in self.rules:
            calls[rule.name] = (*calls.get(rule.name, ()), rule)
        return calls

    def verdict(self, nr: int, args: Sequence[int], arch: int = AUDIT_ARCH_X86_64) -> Verdict:
        """Decide by walking the tree: what every compiled filter has to agree with."""
        if arch == AUDIT_ARCH_X86_64:
            name = NAMES.get(nr)  # an x32 number has none
            for rule in self.rules:
                if rule.name == name and rule.applies(args):
                    return Verdict(rule.action, rule)
        return Verdict(bpf.KILL_PROCESS, None)

    def __str__(self) -> str:
        """The policy in its own language, includes expanded."""
        return "".join(
            f"{r.name}: {r.condition()}" + (f"  # {r.reason}" if r.reason else "") + "\n" for r in self.rules
        )
