"""The second opinion: the same policy compiled by libseccomp, and where the two filters disagree.

libseccomp 2.5 through pyseccomp, whose only importer this is (importing it costs some 30 ms, so nothing that
starts a VM imports this module).  libseccomp cannot express an allow under conditions beside an errno for
the rest (the errno silently wins), nor two comparisons of one argument in a conjunction, but the numbers
between two ends can be told one by one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import pyseccomp

from policies import bpf
from policies.compile import compile_single
from policies.policy import U64_MAX, Atom, Clause, Policy, Rule
from policies.simulate import corners, simulate
from policies.syscalls import AUDIT_ARCH_X86_64, NAMES, SYSCALLS, X32_BIT

_COMPARE = {
    "==": pyseccomp.EQ, "!=": pyseccomp.NE, "<": pyseccomp.LT,
    "<=": pyseccomp.LE, ">": pyseccomp.GT, ">=": pyseccomp.GE,
}  # fmt: skip


_RANGE_MAX = 64
_I386 = 0x40000003  # linux/audit.h AUDIT_ARCH_I386


class Inexpressible(Exception):
    """libseccomp cannot say what the policy says; the text names the rule."""


class Disagreement(NamedTuple):
    """One system call on which two filters differ; the actions are SECCOMP_RET_ values."""

    name: str
    args: tuple[int, ...]
    ours: int
    theirs: int


def resolve(name: str) -> int:
    """The number libseccomp has for a system call on x86-64; negative: it knows of none."""
    number: int = pyseccomp.resolve_syscall(pyseccomp.Arch.X86_64, name)
    return number


def compile_with_libseccomp(policy: Policy) -> bytes:
    """The filter that libseccomp makes of `policy`.

    Raises:
        Inexpressible: it cannot.
    """
    theirs = pyseccomp.SyscallFilter(pyseccomp.KILL_PROCESS)
    theirs.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    for name, rules in policy.by_call().items():
        if len({r.action for r in rules}) > 1:
            raise Inexpressible(f"{rules[-1].place}: {name} is allowed under conditions beside an errno")
        for rule in rules:
            for alternative in _alternatives(rule):
                if len({a.arg for a in alternative}) < len(alternative):
                    raise Inexpressible(f"{rule.place}: {name} compares one argument twice")
                action = pyseccomp.ERRNO(rule.errno) if rule.errno else pyseccomp.ALLOW
                theirs.add_rule_exactly(action, SYSCALLS[name], *map(_argument, alternative))
    fd = os.memfd_create("filter", os.MFD_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        theirs.export_bpf(file)
        file.seek(0)
        return file.read()


def _alternatives(rule: Rule) -> Iterator[tuple[Atom, ...]]:
    """The conjunctions of `rule`, with `&` split into a masked comparison per bit, a range into numbers."""
    for clause in rule.clauses or ((),):
        ranges = {a.arg: values for a in clause if (values := _range(clause, a.arg))}
        others = [a for a in clause if a.arg not in ranges]
        yield from product(*ranges.values(), *(_bits(a) if a.op == "&" else [a] for a in others))


def _range(clause: Clause, arg: int) -> list[Atom]:
    """The numbers from one end to the other, if that is what `clause` says of the argument."""
    match sorted((a.op, a.value) for a in clause if a.arg == arg):
        case [("<=", last), (">=", first)] if last - first < _RANGE_MAX:
            return [Atom(arg, "==", value) for value in range(first, last + 1)]
    return []


def _bits(atom: Atom) -> list[Atom]:
    return [Atom(atom.arg, "&", 1 << bit) for bit in range(64) if atom.value >> bit & 1]


def _argument(atom: Atom) -> pyseccomp.Arg:
    if atom.op == "&":
        return pyseccomp.Arg(atom.arg, pyseccomp.MASKED_EQ, atom.value, atom.value)
    if atom.op == "in":
        return pyseccomp.Arg(atom.arg, pyseccomp.MASKED_EQ, ~atom.value & U64_MAX, 0)
    return pyseccomp.Arg(atom.arg, _COMPARE[atom.op], atom.value)


def disagreements(policy: Policy) -> Iterator[Disagreement]:
    """Where our filter and libseccomp's differ: every system call, at the corners of its comparisons.

    Raises:
        Inexpressible: libseccomp cannot express the policy.
    """
    ours, theirs = compile_single(policy), compile_with_libseccomp(policy)
    calls = policy.by_call()
    for nr, name in NAMES.items():
        atoms = [a for r in calls.get(name, ()) for c in r.clauses for a in c]
        compared = {a.arg for a in atoms}
        for args in product(
            *(corners([a for a in atoms if a.arg == i]) if i in compared else [0] for i in range(bpf.ARGS))
        ):
            for number, arch in ((nr, AUDIT_ARCH_X86_64), (nr | X32_BIT, AUDIT_ARCH_X86_64), (nr, _I386)):
                a, b = simulate(ours, number, args, arch), simulate(theirs, number, args, arch)
                if a != b:
                    yield Disagreement(name, args, a, b)
