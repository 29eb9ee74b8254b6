"""What to ask of a kernel that enforces a policy: every rule, every mutated argument, every unlisted call.

seccomp(2).  The answers that are expected are those of the policy's tree (`Policy.verdict`), not of the
compiler under test.  Left out: other architectures, which the jail's own tests try.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Final, Literal, NamedTuple, get_args

from policies import bpf
from policies.errors import Diagnostic, PolicyError
from policies.policy import Policy, clause_holds
from policies.simulate import cells
from policies.syscalls import NAMES, SYSCALLS, X32_BIT

_PROBES: Final = (335, 336)
NUMBERS: Final = tuple(nr for nr in range(600) if nr not in _PROBES)
"""Every number that Linux has given out, the x32 ABI's own and those it may give out next.

Without uretprobe and uprobe: the kernel (since 6.14) does not show them to filters, and answers them with
SIGILL wherever it has not placed them itself.
"""

_ZEROS: Final = (0,) * bpf.ARGS

Kind = Literal["listed", "mutated", "unlisted", "x32"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


class Probe(NamedTuple):
    """One question: a call, the SECCOMP_RET_ value it should get, and what asks for it."""

    kind: Kind
    nr: int
    args: tuple[int, ...]
    expected: int
    about: str

    def differs(self, action: int) -> str:
        """One line for the user about a kernel that answered `action`."""
        name = NAMES.get(self.nr & ~X32_BIT, "")
        call = f"{self.nr:#x} ({'x32 ' * (self.kind == 'x32')}{name or 'no call'})"
        args = ", ".join(f"{a:#x}" for a in self.args)
        expected, got = bpf.action_name(self.expected), bpf.action_name(action)
        return f"{self.about}: {self.kind} {call}({args}): expected {expected}, the kernel says {got}"


def probes(policy: Policy) -> Iterator[Probe]:
    """The questions.

    Per alternative of a rule, arguments that only it is there to decide, and those with each bit of each
    compared argument flipped; every number without a rule; and the x32 twin of every number with one.

    Raises:
        PolicyError: no arguments reach an alternative, so it cannot be tried.
    """
    listed = policy.by_call()
    for name, rules in listed.items():
        nr = SYSCALLS[name]
        atoms = [a for r in rules for c in r.clauses for a in c]
        vectors = list(product(*(cells([a for a in atoms if a.arg == i]) for i in range(bpf.ARGS))))
        for rule in rules:
            about = str(rule.place)
            for clause in rule.clauses or ((),):
                reach = (v for v in vectors if clause_holds(clause, v) and policy.verdict(nr, v).rule is rule)
                good = next(reach, None)
                if good is None:
                    raise PolicyError([Diagnostic(rule.place, f"no call of {name} comes this far")])
                yield Probe("listed", nr, good, rule.action, about)
                yield Probe("x32", nr | X32_BIT, good, bpf.KILL_PROCESS, about)
                for arg in sorted({a.arg for a in clause}):
                    for bit in range(64):
                        bad = tuple(v ^ 1 << bit if i == arg else v for i, v in enumerate(good))
                        yield Probe("mutated", nr, bad, policy.verdict(nr, bad).action, about)
    numbers = {SYSCALLS[name] for name in listed}
    for nr in NUMBERS:
        if nr not in numbers:
            yield Probe("unlisted", nr, _ZEROS, bpf.KILL_PROCESS, policy.name)
