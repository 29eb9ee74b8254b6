"""What a policy may say and still should not: every finding has a place and one sentence.

What is dangerous is data in this module.  Left out: rules that nothing exercises, which only running the
device can tell: policies/learn.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Final

from policies import bpf
from policies.constants import CONSTANTS
from policies.errors import Diagnostic
from policies.policy import Atom, Clause, Policy, Rule, clause_holds
from policies.simulate import cells
from policies.syscalls import ARGUMENTS

SYSCALLS_MAX: Final = 25
MORE_SYSCALLS: Final = {"virtio-fs": 33}
"""The one page that may have more: each thing that can be done to a file is a call of its own."""

_NEVER = """
io_uring_setup io_uring_enter io_uring_register userfaultfd memfd_create memfd_secret execve execveat ptrace
process_vm_readv process_vm_writev process_madvise pidfd_getfd kcmp mount umount2 pivot_root chroot move_mount
open_tree open_tree_attr fsopen fsconfig fsmount fspick mount_setattr unshare setns clone3 fork vfork socket
socketpair bpf perf_event_open keyctl add_key request_key init_module finit_module delete_module kexec_load
kexec_file_load modify_ldt open_by_handle_at personality
"""
NEVER: Final = frozenset(_NEVER.split())
"""May fail with an errno, and may not be allowed with any arguments."""

OURS: Final = frozenset(("socket",))
"""May be allowed to a process of the supervisor's own, whose policy names no descriptors: the exchange."""

ARGUMENT_NEEDED: Final[Mapping[str, tuple[int, ...]]] = {
    "clone": (0,),
    "fcntl": (0, 1),
    "ioctl": (0, 1),
    "kill": (0, 1),
    "madvise": (2,),
    "mmap": (2, 3),
    "mprotect": (2,),
    "pkey_mprotect": (2,),
    "prctl": (0,),
    "prlimit64": (1, 2),
    "seccomp": (0,),
    "setsockopt": (0, 1, 2),
    "socket": (0, 1, 2),
    "tgkill": (2,),
    "tkill": (1,),
}
"""Allowed only where every alternative compares these arguments."""

_ON_DESCRIPTORS = """
read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 recvfrom sendto recvmsg sendmsg
recvmmsg sendmmsg close dup dup2 dup3 ftruncate fallocate lseek
"""
DESCRIPTOR_NEEDED: Final = frozenset(_ON_DESCRIPTORS.split())
"""Allowed only on named descriptors: argument 0 is compared with FD_ constants."""

PROTECTION: Final[Mapping[str, int]] = {"mmap": 2, "mprotect": 2, "pkey_mprotect": 2}
"""Which argument is a protection that must not include PROT_EXEC."""


def lint(policy: Policy, slots: bool = True) -> list[Diagnostic]:
    """Everything that should be said otherwise, in order of appearance.

    `slots`: the process has its descriptors at fixed numbers, and one thread, as a device has.
    """
    found = []
    for name, rules in policy.by_call().items():
        # The later rules of a call are reached only where the earlier ones did not apply.
        for at, rule in enumerate(rules):
            found += [Diagnostic(rule.place, message) for message in _findings(name, rule, rules[:at], slots)]
    most = MORE_SYSCALLS.get(policy.name, SYSCALLS_MAX)
    if slots and (count := len(policy.by_call())) > most:
        found.append(Diagnostic(policy.rules[-1].place, f"{count} system calls, at most {most}"))
    return sorted(found, key=lambda d: (d.place.file, d.place.line))


def _findings(name: str, rule: Rule, earlier: Sequence[Rule], slots: bool) -> Iterator[str]:
    if not rule.reason:
        yield f"no reason given for {name}: end the line with a comment, or put one right above"
    if any(repeated.place.file == rule.place.file for repeated in earlier) and rule.clauses:
        yield f"{name} has a rule in this file already: join them with ||"
    if rule.errno:
        return
    if any(not_needed.clauses for not_needed in earlier) and not rule.clauses:
        yield f"this allows every {name}: the rules before it are not needed"
    if name in (NEVER if slots else NEVER - OURS):
        yield f"{name} is never allowed"
    missing = set(ARGUMENT_NEEDED.get(name, ()))
    if slots and name in DESCRIPTOR_NEEDED:
        missing |= {0}
    if not slots:
        missing -= {i for i, a in enumerate(ARGUMENTS.get(name, ())) if a.name.startswith("fd")}
    for clause in rule.clauses or ((),):
        if lacking := missing - {a.arg for a in clause}:
            which = ", ".join(f"arg{i}" for i in sorted(lacking))
            yield f"{name} is dangerous without a condition on {which}"
        yield from _clause_findings(name, clause)
    protection = PROTECTION.get(name)
    if protection is not None and _can_execute(rule, protection):
        yield f"{name} may make memory executable"
    yield from _idle_alternatives(rule, [c for r in earlier for c in r.clauses])


def _clause_findings(name: str, clause: Clause) -> Iterator[str]:
    arguments = ARGUMENTS.get(name)
    arrays = _arrays(clause)
    for atom in clause:
        if arguments is not None and atom.arg >= len(arguments):
            yield f"{name} has {len(arguments)} arguments, there is no arg{atom.arg}"
        elif arguments is not None and arguments[atom.arg].is_32_bit:
            if atom.op in ("!=", ">", ">=") and atom not in arrays:
                yield f"`{atom}`: the kernel ignores this argument's upper half, so setting it passes"
            elif atom.value >> 32 and atom.op in ("==", "<", "<="):
                yield f"`{atom}`: the C library decides whether the upper half of a 32-bit argument is set"
        if name in DESCRIPTOR_NEEDED and atom.arg == 0 and not atom.spelled.startswith("FD_"):
            yield f"`{atom}`: write the descriptor's name, FD_..."
        if name in DESCRIPTOR_NEEDED and atom.arg == 0 and atom.op != "==" and atom not in arrays:
            yield f"`{atom}`: compare a descriptor with ==, an array with >= its FIRST and <= its LAST"
        if atom.op == "&" and atom.value.bit_count() > 1:
            yield f"`{atom}` holds if any of the {atom.value.bit_count()} bits is set: write one & for each"


def _arrays(clause: Clause) -> set[Atom]:
    """The comparisons that together say: one of an array of descriptors."""
    lows = {(a.arg, a.spelled.removesuffix("_FIRST")): a for a in clause if _is_slot(a, ">=", "_FIRST")}
    highs = {(a.arg, a.spelled.removesuffix("_LAST")): a for a in clause if _is_slot(a, "<=", "_LAST")}
    return {a for name in lows.keys() & highs.keys() for a in (lows[name], highs[name])}


def _is_slot(atom: Atom, op: str, end: str) -> bool:
    return atom.op == op and atom.spelled.startswith("FD_") and atom.spelled.endswith(end)


def _vectors(atoms: Sequence[Atom]) -> Iterator[tuple[int, ...]]:
    """Arguments for each combination of truths that the atoms can have."""
    return product(*(cells([a for a in atoms if a.arg == i]) for i in range(bpf.ARGS)))


def _can_execute(rule: Rule, protection: int) -> bool:
    atoms = [a for clause in rule.clauses for a in clause]
    executable = Atom(protection, "&", CONSTANTS["PROT_EXEC"])
    return any(executable.holds(v[protection]) and rule.applies(v) for v in _vectors([*atoms, executable]))


def _idle_alternatives(rule: Rule, earlier: Sequence[Clause]) -> Iterator[str]:
    """Alternatives that nothing needs: those that never hold, always hold, or add nothing to the others."""
    for at, clause in enumerate(rule.clauses):
        before = [*earlier, *rule.clauses[:at]]
        vectors = list(_vectors([a for c in (clause, *before) for a in c]))
        text = " && ".join(map(str, clause))
        holding = [v for v in vectors if clause_holds(clause, v)]
        if not holding:
            yield f"`{text}` never holds"
        elif all(clause_holds(clause, v) for v in vectors):
            yield f"`{text}` always holds: write 1"
        elif all(any(clause_holds(c, v) for c in before) for v in holding):
            yield f"`{text}` adds nothing to the alternatives before it"
