"""Classic BPF as seccomp(2) takes it: instructions, return values, and a listing to read.

Linux include/uapi/linux/{bpf_common,filter,seccomp}.h.  A program is `bytes`: an array of struct
sock_filter.  Left out: the X register, scratch memory and arithmetic other than AND, which compilers of
system-call policies have no use for.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

LD_ABS: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
AND: Final = 0x54  # BPF_ALU | BPF_AND | BPF_K
JA: Final = 0x05  # BPF_JMP | BPF_JA
JEQ: Final = 0x15  # BPF_JMP | BPF_J?? | BPF_K, likewise the next three
JGT: Final = 0x25
JGE: Final = 0x35
JSET: Final = 0x45
RET: Final = 0x06  # BPF_RET | BPF_K

MNEMONICS: Final = {
    LD_ABS: "ld", AND: "and", JA: "ja", JEQ: "jeq", JGT: "jgt", JGE: "jge", JSET: "jset", RET: "ret",
}  # fmt: skip

MAXINSNS: Final = 4096
JUMP_MAX: Final = 255  # jt and jf are 8 bits wide

KILL_PROCESS: Final = 0x80000000
KILL_THREAD: Final = 0x00000000
TRAP: Final = 0x00030000
ERRNO: Final = 0x00050000
USER_NOTIF: Final = 0x7FC00000
TRACE: Final = 0x7FF00000
LOG: Final = 0x7FFC0000
ALLOW: Final = 0x7FFF0000
ACTION_FULL: Final = 0xFFFF0000
DATA: Final = 0x0000FFFF

_ACTIONS: Final = {
    KILL_PROCESS: "KILL_PROCESS", KILL_THREAD: "KILL_THREAD", TRAP: "TRAP", ERRNO: "ERRNO",
    USER_NOTIF: "USER_NOTIF", TRACE: "TRACE", LOG: "LOG", ALLOW: "ALLOW",
}  # fmt: skip

# struct seccomp_data: int nr; __u32 arch; __u64 instruction_pointer; __u64 args[6];
NR_OFFSET: Final = 0
ARCH_OFFSET: Final = 4
ARGS_OFFSET: Final = 16
ARGS: Final = 6
SECCOMP_DATA: Final = struct.Struct("=IIQ6Q")

_SOCK_FILTER: Final = struct.Struct("=HBBI")


class Insn(NamedTuple):
    """struct sock_filter."""

    code: int
    jt: int
    jf: int
    k: int


def pack(insns: Iterable[Insn]) -> bytes:
    """The program as the kernel reads it."""
    return b"".join(_SOCK_FILTER.pack(*i) for i in insns)


def unpack(program: bytes) -> list[Insn]:
    """The instructions of `program`.

    Raises:
        ValueError: its length is not that of whole instructions.
    """
    if len(program) % _SOCK_FILTER.size:
        raise ValueError(f"{len(program)} bytes are not whole instructions of {_SOCK_FILTER.size}")
    return [Insn(*fields) for fields in _SOCK_FILTER.iter_unpack(program)]


def arg_offset(arg: int, high: bool) -> int:
    """Where the high or low half of an argument stands in struct seccomp_data (little-endian)."""
    return ARGS_OFFSET + 8 * arg + 4 * high


def action_name(action: int) -> str:
    """How a return value reads: "ALLOW", "ERRNO ENOENT", "KILL_PROCESS"."""
    name = _ACTIONS.get(action & ACTION_FULL, f"{action:#x}")
    if action & ACTION_FULL != ERRNO:
        return name
    number = action & DATA
    return f"{name} {errno.errorcode.get(number, number)}"


def severity(action: int) -> int:
    """The kernel's order of precedence: of several filters the *lowest* wins, KILL_PROCESS before all."""
    masked = action & ACTION_FULL
    return masked - (1 << 32) if masked & 0x80000000 else masked


def _loaded(offset: int) -> str:
    if offset >= ARGS_OFFSET:
        arg, half = divmod(offset - ARGS_OFFSET, 8)
        return f"arg{arg}.{'high' if half else 'low'}"
    return {NR_OFFSET: "nr", ARCH_OFFSET: "arch", 8: "ip.low", 12: "ip.high"}[offset]


def disassemble(program: bytes) -> str:
    """One line per instruction, jump targets as absolute indices.

    Raises:
        ValueError: not whole instructions, or one that is not in `MNEMONICS`.
    """
    lines = []
    for at, (code, jt, jf, k) in enumerate(unpack(program)):
        if code not in MNEMONICS:
            raise ValueError(f"instruction {at} has unknown code {code:#x}")
        if code == LD_ABS:
            operand = _loaded(k)
        elif code == RET:
            operand = action_name(k)
        elif code == JA:
            operand = f"{at + 1 + k}"
        elif code == AND:
            operand = f"{k:#x}"
        else:
            operand = f"{k:#010x}  true {at + 1 + jt}  false {at + 1 + jf}"
        lines.append(f"{at:4}  {MNEMONICS[code]:<4}  {operand}")
    return "\n".join(lines)
