"""libseccomp's filter and ours decide alike wherever libseccomp can say what we say."""

import pytest

from devproc.catalog import CATALOG
from policies import bpf
from policies.crosscheck import Inexpressible, compile_with_libseccomp, disagreements
from policies.parse import load, parse
from policies.simulate import simulate


@pytest.mark.parametrize("name", sorted(CATALOG))
def test_libseccomp_agrees_on_every_shipped_policy(name: str) -> None:
    slots = CATALOG[name].slots()
    if "FD_OPENED_LAST" in slots:  # libseccomp needs a rule for each number of a range: a few are enough
        slots["FD_OPENED_LAST"] = slots["FD_OPENED_FIRST"] + 3
    assert list(disagreements(load(name, slots))) == []


@pytest.mark.parametrize("op", ["==", "!=", "<", "<=", ">", ">=", "&", "in"])
@pytest.mark.parametrize("value", ["5", "0x500000003", "~PROT_EXEC", "0x100000000"])
def test_libseccomp_agrees_on_every_operator(op: str, value: str) -> None:
    policy = parse(f"read: arg0 {op} {value} && arg2 == 7 || arg1 {op} {value}\nopen: return ENOENT\nbrk: 1")
    assert list(disagreements(policy)) == []


def test_libseccomp_agrees_on_a_range() -> None:
    policy = parse("read: arg0 >= 5 && arg0 <= 9 && arg2 == 7 || arg0 >= 0x100000001 && arg0 <= 0x100000001")
    assert list(disagreements(policy)) == []


@pytest.mark.parametrize(
    "text", ["read: arg0 == 1\nread: return EPERM", "read: arg0 > 1 && arg0 < 9 && arg1 == 1"]
)
def test_what_libseccomp_cannot_express_is_said(text: str) -> None:
    with pytest.raises(Inexpressible, match="read"):
        list(disagreements(parse(text)))


def test_a_disagreement_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    looser = compile_with_libseccomp(parse("read: arg0 == 1 || arg0 == 2"))
    monkeypatch.setattr("policies.crosscheck.compile_with_libseccomp", lambda policy: looser)
    (found,) = disagreements(parse("read: arg0 == 1"))
    assert (found.name, found.args[0]) == ("read", 2)
    assert (found.ours, found.theirs) == (bpf.KILL_PROCESS, bpf.ALLOW)
    assert simulate(looser, 0, [2]) == bpf.ALLOW
