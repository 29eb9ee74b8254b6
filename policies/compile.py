"""Policy to classic BPF, for one filter or for the pair that lets a supervisor see violations.

seccomp(2), "Caveats" (check arch, refuse x32).  Code is emitted from the end towards the beginning, because
BPF jumps only forward: every target is then known when a jump to it is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from policies import bpf
from policies.errors import Diagnostic, Place, PolicyError
from policies.policy import U64_MAX, Atom, Op, Policy, Rule
from policies.syscalls import AUDIT_ARCH_X86_64, SYSCALLS, X32_BIT

SETUP: Final = ("seccomp", "sendmsg", "close", "prctl")
"""What a process still does between loading the two filters of `compile_notify`."""
SETUP_MARK: Final = 0x7365616C_6A61696C
"""The sixth argument of such a call: none of them has one, so the kernel ignores it, but a filter sees it."""

_MARK_ARG: Final = 5


class _Chain(NamedTuple):
    """What happens to one system call: its rules in order, then `otherwise`."""

    rules: Sequence[Rule]
    otherwise: int


def compile_single(policy: Policy) -> bytes:
    """The policy as one filter; what it does not allow is KILL_PROCESS.

    Raises:
        PolicyError: the filter is longer than the kernel takes.
    """
    chains = {name: _Chain(rules, bpf.KILL_PROCESS) for name, rules in policy.by_call().items()}
    return _program(policy.name, chains, bpf.KILL_PROCESS)


def compile_notify(policy: Policy, setup: Sequence[str] = SETUP) -> tuple[bytes, bytes]:
    """The policy as two filters, to be loaded in this order.

    The first allows the policy, and `setup` calls with SETUP_MARK, and is loaded with
    SECCOMP_FILTER_FLAG_NEW_LISTENER: what it does not allow waits for the listener, who learns number and
    arguments and kills.  The second, loaded when the listener has been sent away, is KILL_PROCESS for setup
    calls with the mark.  Foreign architectures and x32 are KILL_PROCESS in both.

    Raises:
        PolicyError: a filter is longer than the kernel takes.
    """
    calls = policy.by_call()
    first = {name: _Chain(rules, bpf.USER_NOTIF) for name, rules in calls.items()}
    first |= {n: _Chain((_marked(n, "=="), *calls.get(n, ())), bpf.USER_NOTIF) for n in setup}
    second = {n: _Chain((_marked(n, "!="),), bpf.KILL_PROCESS) for n in setup}
    return _program(policy.name, first, bpf.USER_NOTIF), _program(policy.name, second, bpf.ALLOW)


def _marked(name: str, op: Op) -> Rule:
    return Rule(name, ((Atom(_MARK_ARG, op, SETUP_MARK),),), 0, "", Place(name, 1))


def _program(name: str, chains: Mapping[str, _Chain], unlisted: int) -> bytes:
    code = _Assembler()
    # The verdict is a step function of the call's number: steps holds where each value of it begins.
    steps = [(0, code.ret(unlisted))]
    for call in sorted(chains, key=SYSCALLS.__getitem__):
        nr = SYSCALLS[call]
        if steps[-1][0] == nr:  # the call before left its "unlisted" step here
            steps.pop()
        steps += [(nr, code.chain(chains[call])), (nr + 1, code.ret(unlisted))]
    steps += [(X32_BIT, code.ret(bpf.KILL_PROCESS))]
    merged = [s for i, s in enumerate(steps) if i == 0 or s[1] != steps[i - 1][1]]
    code.goto(code.search(merged))
    numbers = code.load(bpf.NR_OFFSET)
    code.jump(bpf.JEQ, AUDIT_ARCH_X86_64, numbers, code.ret(bpf.KILL_PROCESS))
    code.load(bpf.ARCH_OFFSET)
    if len(code.out) > bpf.MAXINSNS:
        what = f"compiles to {len(code.out)} instructions, the kernel takes {bpf.MAXINSNS}"
        raise PolicyError([Diagnostic(Place(name, 1), what)])
    return bpf.pack(reversed(code.out))


class _Assembler:
    """Instructions in reverse order; a label is how many had been emitted when its target was the last."""

    def __init__(self) -> None:
        self.out: list[bpf.Insn] = []
        self._returns: dict[int, int] = {}

    def _emit(self, code: int, k: int, jt: int = 0, jf: int = 0) -> int:
        self.out.append(bpf.Insn(code, jt, jf, k))
        return len(self.out)

    def ret(self, action: int) -> int:
        """A label that returns `action`."""
        if action not in self._returns:
            self._returns[action] = self._emit(bpf.RET, action)
        return self._returns[action]

    def _near(self, label: int, margin: int) -> int:
        """`label`, or one that leads there within reach of a jump `margin` instructions further on."""
        if len(self.out) + margin - label <= bpf.JUMP_MAX:
            return label
        target = self.out[label - 1]
        if target.code == bpf.RET:  # as short as a jump to it
            if len(self.out) + margin - self._returns[target.k] > bpf.JUMP_MAX:
                self._returns[target.k] = self._emit(bpf.RET, target.k)
            return self._returns[target.k]
        return self._emit(bpf.JA, len(self.out) - label)

    def jump(self, code: int, k: int, yes: int, no: int) -> int:
        """A label that goes to `yes` or `no`."""
        if yes == no:
            return yes
        # The second stepping stone is emitted after the first and may push it one further away.
        yes = self._near(yes, 1)
        no = self._near(no, 0)
        here = len(self.out)
        return self._emit(code, k, here - yes, here - no)

    def load(self, offset: int) -> int:
        """Load 32 bits of struct seccomp_data, then fall through to what was emitted last."""
        return self._emit(bpf.LD_ABS, offset)

    def goto(self, label: int) -> int:
        """Make `label` what was emitted last."""
        return label if label == len(self.out) else self._emit(bpf.JA, len(self.out) - label)

    def search(self, steps: Sequence[tuple[int, int]]) -> int:
        """A balanced tree over the loaded number: the label of the last step that begins at or below it."""
        if len(steps) == 1:
            return steps[0][1]
        half = len(steps) // 2
        upper = self.search(steps[half:])
        return self.jump(bpf.JGE, steps[half][0], upper, self.search(steps[:half]))

    def chain(self, chain: _Chain) -> int:
        """A label that decides one system call."""
        label = self.ret(chain.otherwise)
        for rule in reversed(chain.rules):
            if rule.clauses:
                for clause in reversed(rule.clauses):
                    yes = self.ret(rule.action)
                    for atom in reversed(clause):
                        yes = self._atom(atom, yes, label)
                    label = yes
            else:
                label = self.ret(rule.action)
        return label

    def _atom(self, atom: Atom, yes: int, no: int) -> int:
        v = atom.value
        if yes == no:
            return yes
        match atom.op:
            case "==":
                return self._equal(atom.arg, v, yes, no)
            case "!=":
                return self._equal(atom.arg, v, no, yes)
            case ">":
                return self._above(atom.arg, bpf.JGT, v, yes, no)
            case ">=":
                return self._above(atom.arg, bpf.JGE, v, yes, no)
            case "<":
                return self._above(atom.arg, bpf.JGE, v, no, yes)
            case "<=":
                return self._above(atom.arg, bpf.JGT, v, no, yes)
            case "&":
                return self._any_bit(atom.arg, v, yes, no)
            case "in":
                return self._any_bit(atom.arg, ~v & U64_MAX, no, yes)

    def _half(self, arg: int, high: bool, code: int, k: int, yes: int, no: int) -> int:
        self.jump(code, k, yes, no)
        return self.load(bpf.arg_offset(arg, high))

    def _equal(self, arg: int, v: int, yes: int, no: int) -> int:
        low = self._half(arg, False, bpf.JEQ, v & 0xFFFFFFFF, yes, no)
        return self._half(arg, True, bpf.JEQ, v >> 32, low, no)

    def _above(self, arg: int, code: int, v: int, yes: int, no: int) -> int:
        low = self._half(arg, False, code, v & 0xFFFFFFFF, yes, no)
        same = self.jump(bpf.JEQ, v >> 32, low, no)
        # The high half is still loaded when `same` looks at it, so it is loaded once.
        self.jump(bpf.JGT, v >> 32, yes, same)
        return self.load(bpf.arg_offset(arg, True))

    def _any_bit(self, arg: int, mask: int, yes: int, no: int) -> int:
        low = self._half(arg, False, bpf.JSET, mask & 0xFFFFFFFF, yes, no)
        return self._half(arg, True, bpf.JSET, mask >> 32, yes, low) if mask >> 32 else low
