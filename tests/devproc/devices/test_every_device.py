"""What holds for every model in the catalogue, whatever the guest does."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devproc import child, regs, state
from devproc.catalog import CATALOG
from devproc.wire import STATE_MAX, Space

NAMES = sorted(name for name, e in CATALOG.items() if e.module.startswith("devproc.devices."))
every_device = pytest.mark.parametrize("name", NAMES)
relaxed = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

sizes = st.sampled_from((1, 1, 1, 2, 4, 8))
far = st.sampled_from((4095, 4096, (1 << 64) - 1))
spaces = st.sampled_from((0, 0, 0, 0, 1, 2, 3, 8))
values = st.sampled_from(
    (0, 1, 2, 3, 0x10, 0x30, 0x34, 0x36, 0x80, 0xB6, 0xE2, 0xFE, 0xFF, 0x2500)
) | st.integers(0, (1 << 64) - 1)
durations = st.integers(0, 3_000_000) | st.sampled_from((10**9, 60 * 10**9, 86400 * 10**9))
steps = st.one_of(
    st.tuples(st.just("read"), spaces, st.integers(0, 17) | far, sizes),
    st.tuples(st.just("write"), spaces, st.integers(0, 17) | far, sizes, values),
    st.tuples(st.just("advance"), durations.filter(lambda ns: ns <= 3_000_000)),
    st.tuples(st.just("sleep"), durations),
    st.tuples(st.just("type"), st.binary(max_size=40)),
    st.tuples(st.just("drain"), st.integers(0, 30)),
)
scripts = st.lists(steps, max_size=40)


def play(bench: Any, script: list[tuple[Any, ...]]) -> list[object]:
    """Run the script; every answer, edge and byte in order."""
    seen: list[object] = []
    for what, *args in script:
        if what == "read":
            value = bench.model.read(*args)
            assert type(value) is int
            assert 0 <= value < 1 << 8 * args[2]
            seen.append(value)
        elif what == "write":
            bench.model.write(*args)
        else:
            getattr(bench, what)(*args)
        bench.pump()
        seen += [dict(bench.edges), bytes(bench.sent), len(bench.typed), bench.model.deadline_ns]
    return seen


@every_device
@relaxed
@given(before=scripts, after=scripts)
def test_a_restored_device_goes_on_as_the_saved_one(bench: Any, name: str, before: Any, after: Any) -> None:
    first = bench(name)
    play(first, before)
    saved = first.model.save()
    assert len(saved) <= STATE_MAX
    second = first.fork()
    assert second.model.save() == saved
    assert play(second, after) == play(first, after)
    assert second.model.save() == first.model.save()


@every_device
def test_what_each_of_a_kind_would_find_out_is_found_out_as_it_is_loaded(bench: Any, name: str) -> None:
    model = bench(name).model
    caches = state._builder, state.prepare, regs._digest
    for cached in caches:
        cached.cache_clear()
    loaded = child.load(CATALOG[name])
    found_out = [cached.cache_info().misses for cached in caches]
    model.restore(model.save())
    regs.digest(loaded)
    assert [cached.cache_info().misses for cached in caches] == found_out


@every_device
@relaxed
@given(script=scripts, space=spaces, offset=st.integers(0, 7) | far, data=st.binary(min_size=1, max_size=64))
def test_a_run_of_writes_is_as_each_of_them(
    bench: Any, name: str, script: Any, space: int, offset: int, data: bytes
) -> None:
    first = bench(name)
    play(first, script)
    second = first.fork()
    first.model.writes(space, offset, data)
    for byte in data:
        second.model.write(space, offset, 1, byte)
    assert (first.model.save(), first.edges, first.sent) == (second.model.save(), second.edges, second.sent)
    assert play(first, script) == play(second, script)


@pytest.mark.parametrize("name", [n for n in NAMES if CATALOG[n].module == "devproc.devices.serial"])
@relaxed
@given(script=scripts)
def test_a_shadow_is_what_a_read_gives_that_changes_nothing(bench: Any, name: str, script: Any) -> None:
    device = bench(name)
    for step in script:
        play(device, [step])
        for offset, shadow in device.model.shadows.items():
            if (value := shadow()) is not None:
                before = device.model.save()
                assert device.model.read(Space.PORT, offset, 1) == value
                assert device.model.save() == before


@every_device
@relaxed
@given(script=scripts, data=st.data())
def test_a_changed_state_is_refused_or_harmless(bench: Any, name: str, script: Any, data: Any) -> None:
    device = bench(name)
    play(device, script)
    top = json.loads(device.model.save())
    (fields,) = top.values()
    if not fields:
        return
    holder, key = fields, data.draw(st.sampled_from(sorted(fields)))
    while isinstance(holder[key], list | dict) and holder[key]:
        holder = holder[key]
        key = data.draw(st.sampled_from(range(len(holder)) if isinstance(holder, list) else sorted(holder)))
    edges = (
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        255,
        256,
        1 << 16,
        (1 << 63) - 1,
        -(1 << 63),
        1 << 63,
        "",
        "00",
        "0" * 34,
    )
    holder[key] = data.draw(st.sampled_from(edges))
    other = bench(name)
    try:
        other.model.restore(json.dumps(top).encode())
    except ValueError:
        return
    play(other, [("sleep", 10**9), *script])
    other.model.save()


@every_device
@given(data=st.binary(max_size=200))
@relaxed
def test_restore_refuses_what_save_did_not_make(bench: Any, name: str, data: bytes) -> None:
    with pytest.raises(ValueError):
        bench(name).model.restore(data)


@every_device
def test_a_refused_state_changes_nothing(bench: Any, name: str) -> None:
    device = bench(name)
    top = json.loads(device.model.save())
    (fields,) = top.values()
    fields["surplus"] = 1
    before = device.model.save()
    with pytest.raises(ValueError):
        device.model.restore(json.dumps(top).encode())
    assert device.model.save() == before


@every_device
def test_what_no_register_claims_floats_and_is_counted(bench: Any, name: str) -> None:
    device = bench(name)
    space = CATALOG[name].regions[0].space
    end = CATALOG[name].regions[0].size
    assert device.model.read(space, end, 4) == 0xFFFFFFFF
    device.model.write(space, end, 2, 0x1234)
    counters = device.model.counters()
    assert counters["unclaimed_reads"] == 4
    assert counters["unclaimed_writes"] == 2


@every_device
def test_the_tables_fill_the_regions_of_the_catalogue(name: str) -> None:
    entry = CATALOG[name]
    model = getattr(importlib.import_module(entry.module), entry.model)
    tables = {(t.space, t.size) for t in model.TABLES}
    assert {(r.space, r.size) for r in entry.regions} <= tables


@every_device
def test_every_threat_has_a_test_that_cites_it(name: str) -> None:
    entry = CATALOG[name]
    doc = getattr(importlib.import_module(entry.module), entry.model).__doc__
    numbers = set(re.findall(r"^ +(\d+)\. ", doc.split("Threats:")[1], re.MULTILINE))
    assert numbers
    test = Path(__file__).with_name(f"test_{entry.module.rpartition('.')[2]}.py")
    cited = set(re.findall(r'"""Threat (\d+)', test.read_text()))
    assert cited == numbers
