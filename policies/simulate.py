"""Run filters without a kernel: the verdict on one system call, and the arguments worth asking about.

Linux kernel/seccomp.c: seccomp_check_filter (what loads) and seccomp_run_filters (who wins).  Left out:
the instructions that bpf.py leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from policies import bpf
from policies.policy import U64_MAX, Atom
from policies.syscalls import AUDIT_ARCH_X86_64


@lru_cache(maxsize=64)
def checked(program: bytes) -> tuple[bpf.Insn, ...]:
    """The instructions of `program`, if the kernel would load it.

    Raises:
        ValueError: an unknown instruction, a jump or load out of range, or an end without a return.
    """
    insns = tuple(bpf.unpack(program))
    if not 0 < len(insns) <= bpf.MAXINSNS:
        raise ValueError(f"{len(insns)} instructions, expected 1 to {bpf.MAXINSNS}")
    for at, (code, jt, jf, k) in enumerate(insns):
        left = len(insns) - at - 1
        match code:
            case bpf.LD_ABS:
                ok = k % 4 == 0 and k < bpf.SECCOMP_DATA.size
            case bpf.JA:
                ok = k < left
            case bpf.JEQ | bpf.JGT | bpf.JGE | bpf.JSET:
                ok = max(jt, jf) < left
            case _:
                ok = code in (bpf.AND, bpf.RET)
        if not ok:
            raise ValueError(f"instruction {at} would not load: {insns[at]}")
    if insns[-1].code != bpf.RET:
        raise ValueError("the last instruction is not a return")
    return insns


def simulate(
    program: bytes, nr: int, args: Sequence[int] = (), arch: int = AUDIT_ARCH_X86_64, ip: int = 0
) -> int:
    """The SECCOMP_RET_ value of `program` for one system call; arguments not given are 0.

    Raises:
        ValueError: the kernel would not load `program`.
    """
    insns = checked(program)
    padded = [*args, *(0,) * (bpf.ARGS - len(args))]
    data = bpf.SECCOMP_DATA.pack(nr & 0xFFFFFFFF, arch, ip, *padded)
    a = at = 0
    while True:
        code, jt, jf, k = insns[at]
        at += 1
        match code:
            case bpf.LD_ABS:
                a = int.from_bytes(data[k : k + 4], "little")
            case bpf.AND:
                a &= k
            case bpf.JA:
                at += k
            case bpf.JEQ:
                at += jt if a == k else jf
            case bpf.JGT:
                at += jt if a > k else jf
            case bpf.JGE:
                at += jt if a >= k else jf
            case bpf.JSET:
                at += jt if a & k else jf
            case _:
                return k


def simulate_stack(
    programs: Iterable[bytes], nr: int, args: Sequence[int] = (), arch: int = AUDIT_ARCH_X86_64
) -> int:
    """The verdict of several loaded filters: the most severe; of equals, that of the filter loaded last."""
    verdicts = [simulate(p, nr, args, arch) for p in programs]
    return min(reversed(verdicts), key=bpf.severity)


def corners(atoms: Iterable[Atom]) -> list[int]:
    """Values of one argument at which `atoms` change their mind, with wrong high halves among them."""
    values = {0, 1, U64_MAX, 1 << 31, 1 << 32, 0xFFFFFFFF}
    masks = []
    for atom in atoms:
        v = atom.value
        values |= {v, v - 1, v + 1, v ^ (1 << 32), v ^ (1 << 63), v & 0xFFFFFFFF, v << 32}
        if atom.op in ("&", "in"):
            masks += [v]
    # Bits that no mask tells apart behave alike, so one bit of each kind stands for all of them.
    kinds = {tuple(m >> bit & 1 for m in masks): 1 << bit for bit in range(63, -1, -1)}
    values |= set(kinds.values())
    values |= {a | b for a in [*masks, *kinds.values()] for b in kinds.values()}
    values |= {~m for m in masks}
    return sorted({v & U64_MAX for v in values})


def cells(atoms: Sequence[Atom]) -> list[int]:
    """One value of an argument for each combination of truths that `corners` finds among `atoms`."""
    return list({tuple(a.holds(v) for a in atoms): v for v in reversed(corners(atoms))}.values())
