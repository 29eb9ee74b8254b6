"""`vmsup policy`: one function per verb, each returning what the command line prints.

Left out: learn and verify, which need a running device: supervisor/policylab.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

from policies import bpf
from policies.compile import compile_notify, compile_single
from policies.errors import Diagnostic, PolicyError
from policies.lint import lint
from policies.parse import load
from policies.policy import Policy, Rule
from policies.simulate import cells, simulate
from policies.syscalls import ARGUMENTS, NAMES, SYSCALLS

Constants = Mapping[str, int]


def check(paths: Sequence[str], constants: Constants, slots: bool = True) -> list[Diagnostic]:
    """Everything wrong with these policies (names or paths): errors, and what the linter finds.

    `slots`: see `policies.lint.lint`.
    """
    found: list[Diagnostic] = []
    for path in paths:
        try:
            found += lint(load(path, constants), slots)
        except PolicyError as e:
            found += e.diagnostics
    return found


def show(name: str, constants: Constants) -> str:
    """The system-call half of a device's page: every rule with its reason and where it stands.

    Raises:
        PolicyError: the policy cannot be loaded.
    """
    policy = load(name, constants)
    calls = len(policy.by_call())
    lines = [f"{policy.name}: {calls} system calls, everything else kills the process"]
    for rule in policy.rules:
        where = f"{Path(rule.place.file).name}:{rule.place.line}"
        lines += [f"  {rule.name}: {rule.condition()}", f"      {rule.reason} ({where})"]
    return "\n".join(lines)


class Explanation(NamedTuple):
    """Why one call ends as it does: a SECCOMP_RET_ value and the rule that decides, None if none does."""

    action: int
    rule: Rule | None
    text: str


def explain(name: str, syscall: str, args: Sequence[int], constants: Constants) -> Explanation:
    """What becomes of one system call (a name or a number), decided by the compiled filter.

    Raises:
        PolicyError: the policy cannot be loaded.
        ValueError: no such system call.
    """
    policy = load(name, constants)
    nr = SYSCALLS[syscall] if syscall in SYSCALLS else int(syscall, 0)
    padded = [*args, *(0,) * (bpf.ARGS - len(args))]
    action = simulate(compile_single(policy), nr, padded)
    rule = policy.verdict(nr, padded).rule
    call = NAMES.get(nr, str(nr))
    shape = ARGUMENTS.get(call)
    shown = [f"{shape[i].name}={v:#x}" if shape and i < len(shape) else f"{v:#x}" for i, v in enumerate(args)]
    because = f"{rule.place}: {call}: {rule.condition()}" if rule else f"no rule of {policy.name} allows it"
    return Explanation(action, rule, f"{call}({', '.join(shown)}): {bpf.action_name(action)}: {because}")


class Difference(NamedTuple):
    """One system call that two policies decide differently, with arguments for which they do."""

    name: str
    args: tuple[int, ...]
    before: int
    after: int

    @property
    def looser(self) -> bool:
        """Whether the second policy lets more happen than the first."""
        return bpf.severity(self.after) > bpf.severity(self.before)

    def __str__(self) -> str:
        stricter = bpf.severity(self.after) < bpf.severity(self.before)
        mark = "LOOSER" if self.looser else "stricter" if stricter else "changed"
        args = ", ".join(f"{a:#x}" for a in self.args)
        change = f"{bpf.action_name(self.before)} -> {bpf.action_name(self.after)}"
        return f"{mark:<8}  {self.name}({args}): {change}"


def diff(before: Policy, after: Policy) -> list[Difference]:
    """How two policies differ in what they decide, one example of each kind, by running their filters.

    Raises:
        PolicyError: a policy does not compile.
    """
    programs = compile_single(before), compile_single(after)
    old, new = before.by_call(), after.by_call()
    found: dict[tuple[str, int, int], Difference] = {}
    for name in sorted({*old, *new}, key=SYSCALLS.__getitem__):
        atoms = [a for r in (*old.get(name, ()), *new.get(name, ())) for c in r.clauses for a in c]
        for args in product(*(cells([a for a in atoms if a.arg == i]) for i in range(bpf.ARGS))):
            was, now = (simulate(p, SYSCALLS[name], args) for p in programs)
            if was != now:
                found.setdefault((name, was, now), Difference(name, args, was, now))
    return list(found.values())


def compile_policy(
    name: str, constants: Constants, form: Literal["single", "notify"] = "single"
) -> tuple[bytes, ...]:
    """The filters of a policy as the kernel takes them, in the order in which they are loaded.

    Raises:
        PolicyError: the policy cannot be loaded, or does not compile.
    """
    policy = load(name, constants)
    return (compile_single(policy),) if form == "single" else compile_notify(policy)


def disasm(program: bytes) -> str:
    """A listing of a filter.

    Raises:
        ValueError: it is not a filter.
    """
    return bpf.disassemble(program)
