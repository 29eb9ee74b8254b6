"""How the escape matrix is counted and shown; integration/jail makes the attempts."""

import pytest

from devproc import jail
from devproc.catalog import CATALOG
from devproc.escapes import ATTEMPTS, attacker
from supervisor.selftest import COLUMNS, FULL, KILLED, NONE, SUCCEEDED, Matrix, Outcome, Row, single_layers


def row(full, none, number=0):
    outcomes = {c.name: Outcome(KILLED, "socket") for c in COLUMNS}
    return Row(ATTEMPTS[number], outcomes | {FULL: Outcome(full), NONE: Outcome(none)})


def matrix(*rows):
    return Matrix("serial", 0, COLUMNS, rows)


def test_there_are_a_hundred_attempts_and_no_two_have_the_same_name():
    assert len(ATTEMPTS) >= 100
    assert len({(a.group, a.name) for a in ATTEMPTS}) == len(ATTEMPTS)


def test_a_success_in_the_full_jail_has_escaped_and_is_named():
    found = matrix(row(SUCCEEDED, SUCCEEDED), row(KILLED, SUCCEEDED, 1))
    assert [r.attempt for r in found.escaped] == [ATTEMPTS[0]]
    assert f"ESCAPED: {ATTEMPTS[0].group}: {ATTEMPTS[0].name}: succeeded" in found.text()


@pytest.mark.parametrize("word", [KILLED, "EPERM", "SIGSEGV"])
def test_a_refusal_and_a_death_are_contained(word):
    assert Outcome(word).contained


@pytest.mark.parametrize("word", [SUCCEEDED, "silence", "exit 0", "exit 1", "9999"])
def test_what_is_not_understood_is_not_contained(word):
    assert not Outcome(word).contained


def test_an_attempt_that_fails_without_a_jail_proves_nothing_and_is_counted_apart():
    found = matrix(row(KILLED, "ENOSYS"), row(KILLED, SUCCEEDED, 1))
    assert found.vacuous == 1
    assert "1 rows are vacuous: nothing here lets them succeed; 1 prove something" in found.text()
    assert found.as_json()["successes"] == {c.name: int(c.name == NONE) for c in COLUMNS}


def test_the_columns_are_the_full_jail_its_halves_and_none():
    modes = {c.name: (c.mode, {s.name for s in jail.plan(c.mode, without=c.without)}) for c in COLUMNS}
    hygiene = {s.name for s in jail.STEPS if s.always}
    everything = {s.name for s in jail.STEPS}
    assert modes[FULL] == (jail.Mode.FULL, everything)
    assert modes["seccomp alone"] == (jail.Mode.FULL, hygiene | {"no-gain", "seccomp"})
    assert modes["all but seccomp"] == (jail.Mode.BEST_EFFORT, everything - {"seccomp"})
    assert modes[NONE] == (jail.Mode.NONE, hygiene)


def test_every_layer_is_left_out_once():
    left = {c.name.removeprefix("no ") for c in single_layers()} | {"seccomp", "no-gain"}
    assert left == {s.name for s in jail.STEPS if not s.always}


@pytest.mark.parametrize("name", sorted(CATALOG))
def test_an_attacker_has_the_descriptors_and_limits_of_its_victim(name):
    entry, victim = attacker("attacker", name), CATALOG[name]
    assert entry.slots() == victim.slots()
    assert (entry.data_mib, entry.fsize, entry.guest_memory) == (
        victim.data_mib, victim.fsize, victim.guest_memory,
    )  # fmt: skip
    assert "attacker" not in CATALOG
