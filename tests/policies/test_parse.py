"""Text to tree: what is said, what is refused, and where the caret points."""

import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.constants import ERRNOS
from policies.errors import Place, PolicyError
from policies.parse import load, parse
from policies.policy import OPS, Atom, Policy, Rule
from policies.syscalls import SYSCALLS

values = st.one_of(st.integers(0, 9), st.integers(0, (1 << 64) - 1))
atoms = st.builds(Atom, st.integers(0, 5), st.sampled_from(OPS), values, st.just(""))
clauses = st.lists(atoms, min_size=1, max_size=3).map(tuple)
reasons = st.text(string.ascii_letters + "&|#:;, é", max_size=30).map(lambda s: s.strip("# "))
names = st.sampled_from(sorted(SYSCALLS))
place = st.just(Place("<test>", 1))
conditional = st.builds(
    Rule, names, st.lists(clauses, min_size=1, max_size=3).map(tuple), st.just(0), reasons, place
)
final = st.builds(Rule, names, st.just(()), st.sampled_from([0, *ERRNOS.values()]), reasons, place)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    finals = draw(st.lists(final, unique_by=lambda r: r.name, max_size=5))
    return Policy("test", (*draw(st.lists(conditional, max_size=5)), *finals))


def refusal(text: str, **constants: int) -> str:
    with pytest.raises(PolicyError) as e:
        parse(text, constants=constants)
    return "\n".join(d.render() for d in e.value.diagnostics)


def value(text: str, **constants: int) -> int:
    return parse(f"read: arg0 == {text}", constants=constants).rules[0].clauses[0][0].value


@given(policies())
def test_what_is_printed_reads_back_the_same(policy: Policy) -> None:
    assert parse(str(policy), "test") == policy


@given(st.text())
def test_any_text_is_a_policy_or_a_policy_error(text: str) -> None:
    try:
        parse(text)
    except PolicyError as e:
        assert all(d.render() for d in e.diagnostics)


WORDS = r"read write : 1 return ENOENT arg0 arg9 == in & && || | ( ) ~ 0x1 ; \ # @include ./x.policy"


@given(st.lists(st.sampled_from([*WORDS.split(), "\n"])))
def test_any_words_are_a_policy_or_a_policy_error(words: list[str]) -> None:
    try:
        parse(" ".join(words))
    except PolicyError as e:
        assert all(d.place.line >= 1 and d.place.column >= 1 for d in e.diagnostics)


def test_a_condition_is_a_disjunction_of_conjunctions() -> None:
    (rule,) = parse("mmap: arg0 == 1 && arg1 in PROT_READ || arg2 & 4").rules
    assert rule.clauses == ((Atom(0, "==", 1), Atom(1, "in", 1)), (Atom(2, "&", 4),))


def test_values_are_constants_joined_inverted_and_grouped() -> None:
    u64 = (1 << 64) - 1
    assert value("PROT_READ|PROT_WRITE|0x100") == 0x103
    assert value("~PROT_EXEC") == u64 ^ 4
    assert value("~PROT_EXEC|4") == u64
    assert value("~(PROT_EXEC|1)") == u64 ^ 5
    assert value("-1") == u64
    assert value(f"{u64}") == u64
    assert value("FD_CONTROL", FD_CONTROL=4) == 4


def test_errnos_are_names_or_numbers() -> None:
    assert [r.errno for r in parse("open: return ENOENT\nread: return 38").rules] == [2, 38]


def test_a_reason_stands_behind_the_rule_or_right_above() -> None:
    policy = parse("# far\n\n# one\n# two\nread: 1\nwrite: 1 # three\n# four\nopen: \\\n  1 # five\nbrk: 1\n")
    assert [r.reason for r in policy.rules] == ["one two", "three", "five", ""]


def test_a_rule_may_go_on_behind_a_backslash() -> None:
    (rule,) = parse("read: arg0 == 1 || \\\n      arg0 == 2").rules
    assert len(rule.clauses) == 2
    assert rule.place.line == 1


def test_the_caret_stands_below_the_offence() -> None:
    assert refusal("\tread: arg0 == 1 && arg1 == NOPE").splitlines() == [
        "<policy>:1:29: unknown constant NOPE",
        "    \tread: arg0 == 1 && arg1 == NOPE",
        "    \t" + " " * 27 + "^^^^",
    ]


def test_every_bad_line_is_reported() -> None:
    with pytest.raises(PolicyError) as e:
        parse("raed: 1\nread: 1\nwrite: arg9 == 1\n")
    assert [(d.place.line, d.place.column) for d in e.value.diagnostics] == [(1, 1), (3, 8)]
    assert "did you mean read?" in str(e.value)


def test_condition_then_return_is_refused_with_both_readings() -> None:
    text = refusal("read: arg0 == 3; return EPERM")
    assert "two opposite readings" in text
    assert "library allows" in text
    assert "compiler returns X" in text
    assert "`read: arg0 == 3` and `read: return X`" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("read: kill-thread", "deadlocked"),
        ("read: kill-process", "nothing needs"),
        ("read: kill", "nothing needs"),
        ("read: allow", "write 1"),
        ("read: log", "lets the call through"),
        ("read: user-notify", "refused"),
        ("@default allow", "no default"),
        ("@default kill-thread", "no default"),
        ("@frequency ./x.frequency", "refused"),
        ("@denylist", "refused"),
        ("{ read, write }: 1", "expected a system call"),
        ("read[arch=x86_64]: 1", "expected a colon"),
        ("read", "expected a colon"),
        ("read:", "expected 1"),
        ("read: 2", "expected arg0"),
        ("read: 1 1", "end of the rule"),
        ("read: return", "error name"),
        ("read: return 0", "1 to 4095"),
        ("read: return 4096", "1 to 4095"),
        ("read: return ENOTHING", "1 to 4095"),
        ("read: arg6 == 1", "arg0 to arg5"),
        ("read: arg0 = 1", "one of =="),
        ("read: arg0 == 1 &&", "expected argN"),
        ("read: arg0 ==", "a value"),
        ("read: arg0==1", "space is missing"),
        ("read: arg0 == 1 | 2", "end of the rule"),
        ("read: arg0 == 1|", "ends too early"),
        ("read: arg0 == ~~1", "expected a number"),
        ("read: arg0 == (1", "not closed"),
        ("read: arg0 == 1)", "end of the value"),
        ("read: arg0 == 0755", "octal"),
        ("read: arg0 == 1x", "decimal or hexadecimal"),
        ("read: arg0 == 0x1_0", "64 bits"),
        ("read: arg0 == 0x10000000000000000", "64 bits"),
        ("read: arg0 == -0x8000000000000001", "64 bits"),
        ("read: 1 # why \\\nwrite: 1", "may not end in"),
        ("read: 1 \\", "nothing follows"),
        ("read: 1\r\n", "end of the rule"),
    ],
)  # fmt: skip
def test_what_the_two_readers_might_take_differently_is_refused(text: str, message: str) -> None:
    assert message in refusal(text)


def test_nothing_may_follow_an_unconditional_rule() -> None:
    text = refusal("read: arg0 == 1\nread: return EPERM\nread: arg0 == 2")
    assert "<policy>:3:1" in text
    assert "<policy>:2:1 decides every read" in text


def test_an_include_is_a_file_beside_this_one(tmp_path: Path) -> None:
    (tmp_path / "base.policy").write_text("read: 1 # base\n")
    (tmp_path / "dev.policy").write_text("@include ./base.policy\nwrite: 1 # own\n")
    policy = load(str(tmp_path / "dev.policy"))
    assert policy.name == "dev"
    assert [(r.name, Path(r.place.file).name) for r in policy.rules] == [
        ("read", "base.policy"), ("write", "dev.policy"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "path", ["/etc/base.policy", "../base.policy", "base.policy", "./a/base.policy", "./x"]
)
def test_an_include_elsewhere_is_refused(tmp_path: Path, path: str) -> None:
    assert "expected ./NAME.policy" in refusal(f"@include {path}")


def test_an_included_file_includes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.policy").write_text("@include ./a.policy\n")
    with pytest.raises(PolicyError, match="includes nothing"):
        load(str(tmp_path / "a.policy"))


def test_a_missing_file_is_named_where_it_is_included(tmp_path: Path) -> None:
    (tmp_path / "a.policy").write_text("\n@include ./b.policy\n")
    with pytest.raises(PolicyError, match=r"a\.policy:2:10: cannot read .*b\.policy"):
        load(str(tmp_path / "a.policy"))


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.policy").write_bytes(b"read: 1 # \xff")
    with pytest.raises(PolicyError, match="not UTF-8"):
        load(str(tmp_path / "a.policy"))


def test_importing_parser_and_compiler_does_not_import_libseccomp() -> None:
    code = "import sys, policies.parse, policies.compile; sys.exit('pyseccomp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
