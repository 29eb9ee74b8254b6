from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmcore import layout
from kvmcore.allocator import Exhausted, Overlap, Resources, Space
from kvmcore.layout import GIB, MIB

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), st.integers(1, 64), st.integers(0, 6).map(lambda n: 1 << n)),
        st.tuples(st.just("claim"), st.integers(0x90, 0x210), st.integers(1, 64)),
        st.tuples(st.just("free"), st.integers(0, 30), st.just(0)),
    ),
    max_size=60,
)


@given(ACTIONS)
def test_regions_never_overlap_and_nothing_is_lost(actions):
    space = Space("test", 0x100, 0x200)
    held = []
    for action, a, b in actions:
        try:
            if action == "allocate":
                region = space.allocate("x", a, b)
                assert region.size == a and region.base % b == 0
                held.append(region)
            elif action == "claim":
                held.append(space.claim("x", a, b))
            elif held:
                space.free(held.pop(a % len(held)))
        except (Exhausted, Overlap):
            pass
        assert space.regions == tuple(sorted(held))
        assert all(r.base >= 0x100 and r.end <= 0x200 for r in space.regions)
        assert all(low.end <= high.base for low, high in pairwise(space.regions))


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(1, 32))), st.integers(1, 64), st.integers(0, 6))
def test_a_hole_that_fits_is_found_and_the_lowest_is_taken(claims, size, shift):
    space = Space("test", 0, 256)
    taken = set()
    for base, length in claims:
        try:
            space.claim("x", base, length)
        except Overlap:
            continue
        taken.update(range(base, base + length))
    fits = [
        base for base in range(0, 256 - size + 1, 1 << shift) if taken.isdisjoint(range(base, base + size))
    ]
    if fits:
        assert space.allocate("y", size, 1 << shift).base == fits[0]
    else:
        with pytest.raises(Exhausted):
            space.allocate("y", size, 1 << shift)


def test_exhaustion_names_the_space_and_who_asked():
    space = Space("interrupt lines", 5, 6)
    space.allocate("first", 1)
    with pytest.raises(Exhausted, match="interrupt lines: no room for 0x1 for virtio-net0"):
        space.allocate("virtio-net0", 1)


def test_a_claim_on_anothers_region_names_both():
    space = Space("I/O ports", 0, 0x10000)
    space.claim("serial1", 0x3F8, 8)
    with pytest.raises(Overlap, match=r"pvpanic at \[0x3ff, 0x400\) overlaps serial1"):
        space.claim("pvpanic", 0x3FF)


def test_a_claim_outside_the_space_is_refused():
    with pytest.raises(Overlap, match="outside"):
        Space("I/O ports", 0, 0x10000).claim("x", 0xFFFF, 2)


def test_what_is_freed_is_handed_out_again():
    space = Space("test", 0, 4)
    region = space.allocate("a", 4)
    space.free(region)
    assert space.allocate("b", 4).base == 0


def test_freeing_twice_is_an_error():
    space = Space("test", 0, 4)
    region = space.allocate("a", 4)
    space.free(region)
    with pytest.raises(ValueError):
        space.free(region)


@pytest.mark.parametrize(("size", "align"), [(0, 1), (-1, 1), (1, 0), (1, 3)])
def test_sizes_that_cannot_be_meant_are_refused(size, align):
    with pytest.raises(ValueError):
        Space("test", 0, 4).allocate("a", size, align)


def test_first_pci_interrupt_line_is_5_and_claimed_ones_are_passed_over():
    gsi = Resources(256 * MIB).gsi
    gsi.claim("rtc", 8)
    gsi.claim("acpi-pm", 9)
    lines = [gsi.allocate(f"dev{i}", 1).base for i in range(17)]
    assert lines == [5, 6, 7, *range(10, 24)]


def test_spaces_are_where_the_layout_says():
    resources = Resources(5 * GIB)
    assert resources.io.allocate("a", 0x20, 0x20).base == 0xC000
    assert resources.io.end == 0x10000
    assert resources.mmio.allocate("a", 0x8000, 0x8000).base == 0xE0000000
    assert resources.high_mmio.allocate("a", MIB, MIB).base == layout.high_mmio(5 * GIB)
