"""The simulator against hand-written programs, and the arguments it proposes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import bpf
from policies.bpf import Insn
from policies.policy import OPS, Atom
from policies.simulate import cells, checked, corners, simulate, simulate_stack

RET_ALLOW = Insn(bpf.RET, 0, 0, bpf.ALLOW)
RET_KILL = Insn(bpf.RET, 0, 0, bpf.KILL_PROCESS)


def test_every_field_of_seccomp_data_can_be_loaded() -> None:
    fields = {0: 7, 4: 0xC000003E, 8: 0x55667788, 12: 0x11223344}
    fields |= {16 + 8 * i: 100 + i for i in range(6)} | {20 + 8 * i: 200 + i for i in range(6)}
    args = [(200 + i) << 32 | 100 + i for i in range(6)]
    for offset, expected in fields.items():
        program = bpf.pack(
            [Insn(bpf.LD_ABS, 0, 0, offset), Insn(bpf.JEQ, 0, 1, expected), RET_ALLOW, RET_KILL]
        )
        assert simulate(program, 7, args, ip=0x1122334455667788) == bpf.ALLOW


@pytest.mark.parametrize(
    ("code", "k", "true", "false"),
    [
        (bpf.JEQ, 5, [5], [4, 6, 0xFFFFFFFF]),
        (bpf.JGT, 5, [6, 0xFFFFFFFF], [5, 0]),
        (bpf.JGE, 5, [5, 0x80000000], [4, 0]),
        (bpf.JSET, 6, [2, 4, 7], [0, 1, 8]),
    ],
)
def test_jumps_compare_unsigned(code: int, k: int, true: list[int], false: list[int]) -> None:
    program = bpf.pack([Insn(bpf.LD_ABS, 0, 0, 0), Insn(code, 0, 1, k), RET_ALLOW, RET_KILL])
    assert {simulate(program, nr) for nr in true} == {bpf.ALLOW}
    assert {simulate(program, nr) for nr in false} == {bpf.KILL_PROCESS}


def test_and_masks_and_ja_skips() -> None:
    program = bpf.pack(
        [Insn(bpf.LD_ABS, 0, 0, 0), Insn(bpf.AND, 0, 0, 0xF0), Insn(bpf.JA, 0, 0, 1), RET_KILL,
         Insn(bpf.JEQ, 0, 1, 0x30), RET_ALLOW, RET_KILL]
    )  # fmt: skip
    assert simulate(program, 0x35) == bpf.ALLOW
    assert simulate(program, 0x05) == bpf.KILL_PROCESS


@pytest.mark.parametrize(
    "insns",
    [
        [],
        [Insn(bpf.LD_ABS, 0, 0, 0)],
        [Insn(bpf.LD_ABS, 0, 0, 64), RET_ALLOW],
        [Insn(bpf.LD_ABS, 0, 0, 2), RET_ALLOW],
        [Insn(bpf.JA, 0, 0, 1), RET_ALLOW],
        [Insn(bpf.JEQ, 1, 0, 0), RET_ALLOW],
        [Insn(bpf.JEQ, 0, 1, 0), RET_ALLOW],
        [Insn(0xFF, 0, 0, 0), RET_ALLOW],
        [RET_ALLOW] * 4097,
    ],
)
def test_what_the_kernel_would_not_load_is_refused(insns: list[Insn]) -> None:
    with pytest.raises(ValueError, match=r"instruction|return"):
        checked(bpf.pack(insns))


def test_bytes_that_are_not_whole_instructions_are_refused() -> None:
    with pytest.raises(ValueError, match="whole instructions"):
        simulate(b"\0" * 9, 0)


def test_of_several_filters_the_most_severe_wins() -> None:
    order = [bpf.KILL_PROCESS, bpf.KILL_THREAD, bpf.TRAP, bpf.ERRNO | 1, bpf.USER_NOTIF, bpf.TRACE, bpf.LOG]
    programs = [bpf.pack([Insn(bpf.RET, 0, 0, action)]) for action in (*order, bpf.ALLOW)]
    for i, action in enumerate(order):
        assert simulate_stack(programs[i:], 0) == action
        assert simulate_stack(programs[: i - 1 : -1] if i else programs[::-1], 0) == action


def test_of_equally_severe_filters_the_last_loaded_wins() -> None:
    programs = [bpf.pack([Insn(bpf.RET, 0, 0, bpf.ERRNO | n)]) for n in (1, 2)]
    assert simulate_stack(programs, 0) == bpf.ERRNO | 2


@given(st.sampled_from(OPS), st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
def test_corners_include_both_truths_of_any_comparison_that_has_two(op: str, value: int, x: int) -> None:
    atom = Atom(0, op, value)  # type: ignore[arg-type]
    truths = {atom.holds(v) for v in corners([atom])}
    assert atom.holds(x) in truths
    assert len(cells([atom])) == len(truths)


def test_a_listing_names_what_is_loaded_and_returned() -> None:
    program = bpf.pack(
        [Insn(bpf.LD_ABS, 0, 0, 28), Insn(bpf.JEQ, 0, 1, 9), RET_ALLOW, Insn(bpf.RET, 0, 0, bpf.ERRNO | 2)]
    )
    assert bpf.disassemble(program).splitlines() == [
        "   0  ld    arg1.high",
        "   1  jeq   0x00000009  true 2  false 3",
        "   2  ret   ALLOW",
        "   3  ret   ERRNO ENOENT",
    ]
