"""The list of steps: its order, what it says, and who is named when a step fails."""

from __future__ import annotations

import os

import pytest

from devproc import jail
from devproc.catalog import CATALOG
from devproc.jail import Context, JailError, Mode, NotOffered, Step, enter, plan

ENTRY = CATALOG["serial"]


def context(mode: Mode) -> Context:
    return Context(ENTRY, mode, [], None, lambda: None)


def fails(ctx: Context) -> None:
    os.stat("/no/such/path")


def lacking(ctx: Context) -> None:
    raise NotOffered("it came later")


def notes(ctx: Context) -> None:
    ctx.notes.append((0, "ran"))


def step(name: str, apply: object) -> Step:
    return Step(name, "device", lambda e: "", apply)  # type: ignore[arg-type]


def names(mode: Mode, who: jail.Who | None = None) -> list[str]:
    return [s.name for s in plan(mode, who)]


def test_the_order_is_one_that_works() -> None:
    order = names(Mode.FULL)
    assert order[-1] == "seccomp"
    assert order.index("namespaces") < order.index("identity") < order.index("root")
    assert order.index("root") < order.index("capabilities")  # mounting needs them
    assert order.index("capabilities") < order.index("parent")  # dropping them clears it
    assert order.index("no-gain") < order.index("landlock")  # needs no_new_privs


def test_the_zygotes_steps_come_first() -> None:
    assert names(Mode.FULL, "zygote") + names(Mode.FULL, "device") == names(Mode.FULL)


def test_no_step_is_left_out_in_best_effort_and_only_hygiene_stays_in_none() -> None:
    assert names(Mode.BEST_EFFORT) == names(Mode.FULL)
    assert names(Mode.NONE) == ["descriptors", "parent"]


def test_a_layer_can_be_left_out_but_not_hygiene_and_no_shipped_device_does_so() -> None:
    left = [s.name for s in plan(Mode.FULL, without={"landlock", "parent"})]
    assert left == [n for n in names(Mode.FULL) if n != "landlock"]
    assert not any(e.without for e in CATALOG.values())


@pytest.mark.parametrize("name", sorted(CATALOG))
def test_every_step_says_what_it_does_for_every_kind(name: str) -> None:
    entry = CATALOG[name]
    text = {s.name: s.describe(entry) for s in plan(Mode.FULL)}
    assert all(text.values())
    assert f"policies/{name}.policy" in text["seccomp"]
    for d, fds in entry.own_slots():
        numbers = str(fds[0]) if len(fds) == 1 else f"{fds[0]}-{fds[-1]}"
        assert f" {numbers} {d.name}, " in text["descriptors"]


def test_a_failing_step_is_named_with_its_cause_and_path() -> None:
    ctx = context(Mode.FULL)
    with pytest.raises(JailError, match=r"^jail: odd: No such file or directory \(/no/such/path\)$") as e:
        enter([step("odd", fails), step("next", notes)], ctx)
    assert e.value.step == "odd"
    assert ctx.notes == []


def test_best_effort_warns_and_goes_on() -> None:
    ctx = context(Mode.BEST_EFFORT)
    enter([step("odd", fails), step("next", notes)], ctx)
    assert ctx.notes == [(30, "jail: odd: No such file or directory (/no/such/path)"), (0, "ran")]


@pytest.mark.parametrize("mode", [Mode.FULL, Mode.BEST_EFFORT])
def test_a_layer_the_kernel_lacks_is_recorded_and_not_fatal(mode: Mode) -> None:
    ctx = context(mode)
    enter([step("new", lacking), step("next", notes)], ctx)
    assert ctx.notes == [(10, "jail: new: not offered by this kernel: it came later"), (0, "ran")]


@pytest.mark.parametrize("name", ["root", "identity"])
def test_without_namespaces_no_step_touches_the_hosts_mounts_or_ids(name: str) -> None:
    (found,) = (s for s in plan(Mode.FULL) if s.name == name)
    before = os.stat("/").st_ino, os.getuid()
    with pytest.raises(JailError, match=f"jail: {name}: there is no"):
        found.apply(context(Mode.FULL))
    assert (os.stat("/").st_ino, os.getuid()) == before


def test_the_descriptor_limit_is_the_number_of_slots() -> None:
    assert ENTRY.held == max(ENTRY.slots().values()) + 1
