"""The verbs of `vmsup policy`, on small policies and on a shipped one."""

from pathlib import Path

import pytest

from devproc.catalog import CATALOG
from policies import bpf, commands
from policies.compile import compile_notify, compile_single
from policies.errors import PolicyError
from policies.parse import DIRECTORY, load, parse

SERIAL = CATALOG["serial"].slots()


def diff(before: str, after: str) -> list[tuple[str, int, int, bool]]:
    return [(d.name, d.before, d.after, d.looser) for d in commands.diff(parse(before), parse(after))]


def test_check_reports_errors_and_findings_of_every_file(tmp_path: Path) -> None:
    (tmp_path / "bad.policy").write_text("raed: 1\n")
    (tmp_path / "poor.policy").write_text("brk: 1\n")
    found = commands.check([str(tmp_path / "bad.policy"), str(tmp_path / "poor.policy")], {})
    assert [(Path(d.place.file).name, d.message.split(" ")[0]) for d in found] == [
        ("bad.policy", "no"), ("poor.policy", "no"),
    ]  # fmt: skip
    assert "raed" in found[0].message
    assert "no reason" in found[1].message


def test_show_gives_every_rule_its_reason_and_line() -> None:
    text = commands.show("serial", SERIAL)
    policy = load("serial", SERIAL)
    for rule in policy.rules:
        assert f"  {rule.name}: {rule.condition()}\n" in text
        assert f"{rule.reason} ({Path(rule.place.file).name}:{rule.place.line})" in text


def test_explain_names_the_rule_and_its_line() -> None:
    allowed = commands.explain("serial", "read", [SERIAL["FD_INPUT"], 0, 64], SERIAL)
    assert allowed.action == bpf.ALLOW
    assert allowed.rule is not None
    assert allowed.text.startswith(f"read(fd={SERIAL['FD_INPUT']:#x}, buf=0x0, count=0x40): ALLOW: ")
    assert f"{DIRECTORY / 'serial.policy'}:{allowed.rule.place.line}:" in allowed.text


def test_explain_says_when_no_rule_allows() -> None:
    for syscall, args in (("read", [SERIAL["FD_ACCESS"]]), ("socket", [1, 1, 0]), ("9999", [])):
        killed = commands.explain("serial", syscall, args, SERIAL)
        assert (killed.action, killed.rule) == (bpf.KILL_PROCESS, None)
        assert "KILL_PROCESS: no rule of serial allows it" in killed.text
    with pytest.raises(ValueError, match="raed"):
        commands.explain("serial", "raed", [], SERIAL)


def test_diff_of_differently_written_equals_is_empty() -> None:
    assert diff("munmap: arg0 < 2", "munmap: arg0 == 0 || arg0 == 1") == []
    assert diff("munmap: arg0 in 3", "munmap: arg0 <= 3") == []


def test_diff_says_what_became_looser_and_stricter() -> None:
    kill, allow, eperm = bpf.KILL_PROCESS, bpf.ALLOW, bpf.ERRNO | 1
    assert diff("brk: 1", "brk: 1\nread: arg0 == 3") == [("read", kill, allow, True)]
    assert diff("read: arg0 == 3", "brk: 1") == [("read", allow, kill, False), ("brk", kill, allow, True)]
    assert diff("read: 1", "read: arg0 == 3\nread: return EPERM") == [("read", allow, eperm, False)]
    assert diff("read: arg1 in 3", "read: arg1 in 7") == [("read", kill, allow, True)]
    assert diff("read: return EPERM", "read: return EIO") == [("read", eperm, bpf.ERRNO | 5, False)]


def test_diff_sees_a_rule_that_ignores_the_upper_half() -> None:
    assert diff("read: arg0 == 3", "read: arg0 == 3 || arg0 == 0x100000003") == [
        ("read", bpf.KILL_PROCESS, bpf.ALLOW, True)
    ]


def test_looser_is_said_loudly() -> None:
    (looser,) = commands.diff(parse("brk: 1"), parse("brk: 1\nread: 1"))
    (stricter,) = commands.diff(parse("brk: 1\nread: 1"), parse("brk: 1"))
    (changed,) = commands.diff(parse("brk: return 1"), parse("brk: return 2"))
    assert [str(d).split()[0] for d in (looser, stricter, changed)] == ["LOOSER", "stricter", "changed"]
    assert str(looser).endswith("read(0x0, 0x0, 0x0, 0x0, 0x0, 0x0): KILL_PROCESS -> ALLOW")


def test_compile_gives_the_filters_in_loading_order() -> None:
    policy = load("serial", SERIAL)
    assert commands.compile_policy("serial", SERIAL) == (compile_single(policy),)
    assert commands.compile_policy("serial", SERIAL, "notify") == compile_notify(policy)
    with pytest.raises(PolicyError, match="cannot read"):
        commands.compile_policy("nothing", SERIAL)


def test_disasm_lists_every_instruction() -> None:
    program = compile_single(load("serial", SERIAL))
    lines = commands.disasm(program).splitlines()
    assert len(lines) == len(program) // 8
    assert lines[0].split() == ["0", "ld", "arch"]
