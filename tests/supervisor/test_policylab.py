"""The two verbs around the parts: commands that record, tables that count, command lines that are taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from devproc.catalog import CATALOG
from kvmcore.errors import ConfigError
from policies import bpf
from policies.compile import compile_single
from policies.parse import parse
from policies.verify import probes
from supervisor import cli, policylab
from supervisor.verdicts import verdicts

SERIAL = CATALOG["serial"]


@pytest.fixture
def said() -> list[str]:
    return []


def records(*lines: str, status: int = 0) -> list[str]:
    """A command that does as `vmsup run` does when it is asked to record."""
    script = "".join(f'echo "{line} 0 0 0 0 0" >> "${{VMSUP_LEARN#serial:}}"; ' for line in lines)
    return ["sh", "-c", f"{script}exit {status}"]


def test_a_run_that_needs_no_more_than_the_policy_is_well(said: list[str]) -> None:
    text, code = policylab.learnt(SERIAL, records("serial1 1 7", "serial2 1 9", "serial1 1 7"), said.append)
    assert text.startswith("serial: 3 system calls of serial1, serial2 recorded\n")
    assert "  write: arg0 == FD_IRQ || arg0 == FD_OUTPUT  # seen 3\n" in text
    assert "serial.policy:7: read: arg0 == FD_INPUT" in text
    assert (code, said) == (0, [])


def test_a_run_that_needs_more_exits_with_a_code(said: list[str]) -> None:
    text, code = policylab.learnt(SERIAL, records("serial1 1 3"), said.append)
    assert text.endswith("what the shipped policy lacks:\n  write: arg0 == FD_ACCESS  # seen 1")
    assert code == 33


def test_a_command_that_fails_is_said_and_its_records_are_shown(said: list[str]) -> None:
    text, code = policylab.learnt(SERIAL, records("serial1 1 5", status=4), said.append)
    assert "write: arg0 == FD_IRQ" in text
    assert (code, said) == (33, ["WARNING: sh ended with 4: there may be more to learn"])


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (records(), "nothing learnt: no `vmsup run` with a serial"),
        (records(status=3), "sh ended with 3"),
        (["/nowhere/vmsup", "run"], "/nowhere/vmsup: No such file or directory"),
    ],
)
def test_a_command_that_records_nothing_is_an_error(command: list[str], why: str, said: list[str]) -> None:
    with pytest.raises(ConfigError, match=why):
        policylab.learnt(SERIAL, command, said.append)


def test_a_kernel_that_agrees_is_counted() -> None:
    policy = parse("read: arg0 == 4 || arg0 == 5\nopenat: return ENOENT")
    asked = list(probes(policy))
    text, wrong = policylab.judged(asked, [p.expected for p in asked])
    assert text.splitlines() == [
        "          allowed  failed  killed",
        "listed          2       1       0",
        "mutated         2       0     126",
        "unlisted        0       0     596",
        "x32             0       0       3",
        "730 calls, each as the policy says",
    ]
    assert wrong == []


def test_a_filter_that_is_looser_than_its_policy_is_found_out() -> None:
    asked = [p for p in probes(parse("read: arg0 == 4 && arg2 == 0\nbrk: 1")) if p.kind == "mutated"]
    looser = compile_single(parse("read: arg0 == 4\nbrk: 1"))
    text, wrong = policylab.judged(asked, verdicts([looser], [(p.nr, p.args) for p in asked]))
    assert text.endswith("128 calls, 64 of them not as the policy says")
    assert len(wrong) == 64
    assert wrong[0] == (
        "<policy>:1:1: mutated 0x0 (read)(0x4, 0x0, 0x1, 0x0, 0x0, 0x0): "
        "expected KILL_PROCESS, the kernel says ALLOW"
    )


def test_a_filter_that_is_stricter_is_found_out() -> None:
    asked = [p for p in probes(parse("read: 1\nbrk: 1")) if p.kind == "listed"]
    answers = verdicts([compile_single(parse("brk: 1"))], [(p.nr, p.args) for p in asked])
    assert answers == [bpf.KILL_PROCESS, bpf.ALLOW]
    assert len(policylab.judged(asked, answers)[1]) == 1


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["learn", "serial"], []),
        (["learn", "serial", "--", "vmsup", "run", "-v", "--", "x"], ["vmsup", "run", "-v", "--", "x"]),
    ],
)
def test_the_command_line_takes_a_whole_command(
    words: list[str], command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def learnt(device: object, command: object, say: Callable[[str], None]) -> tuple[str, int]:
        seen.extend((device, command))
        return "", 7

    monkeypatch.setattr(policylab, "learnt", learnt)
    with pytest.raises(SystemExit) as ended:
        cli.main(["policy", *words])
    assert seen == [SERIAL, command]
    assert ended.value.code == 7
