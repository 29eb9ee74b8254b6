from hypothesis import given
from hypothesis import strategies as st

from kvmcore.pic import DualPic

EOI, POLL, READ_IRR, READ_ISR = 0x20, 0x0C, 0x0A, 0x0B


def initialized(icw4: int = 0x01, icw1: int = 0x11) -> DualPic:
    """As a PC's firmware leaves it: vectors 0x20 and 0x28, nothing masked."""
    pic = DualPic()
    for base, vector, icw3 in ((0x20, 0x20, 4), (0xA0, 0x28, 2)):
        pic.write(base, icw1)
        pic.write(base + 1, vector)
        pic.write(base + 1, icw3)
        pic.write(base + 1, icw4)
        pic.write(base + 1, 0)
    return pic


def edge(pic: DualPic, *irqs: int) -> None:
    for irq in irqs:
        pic.set_line(irq, False)
        pic.set_line(irq, True)


def isr(pic: DualPic, base: int = 0x20) -> int:
    pic.write(base, READ_ISR)
    return pic.read(base)


def irr(pic: DualPic, base: int = 0x20) -> int:
    pic.write(base, READ_IRR)
    return pic.read(base)


def test_the_mask_reads_back() -> None:
    """How Linux finds out whether there is a PIC at all (probe_8259A)."""
    pic = DualPic()
    pic.write(0xA1, 0xFF)
    pic.write(0x21, 0xFB)
    assert (pic.read(0x21), pic.read(0xA1)) == (0xFB, 0xFF)


def test_an_edge_interrupts_once() -> None:
    pic = initialized()
    edge(pic, 4)
    assert pic.intr
    assert pic.acknowledge() == 0x24
    assert not pic.intr
    assert (irr(pic), isr(pic)) == (0, 0x10)
    pic.write(0x20, EOI)
    assert isr(pic) == 0
    pic.set_line(4, True)
    assert not pic.intr  # still high: no new edge


def test_an_edge_withdrawn_before_it_is_acknowledged_is_spurious() -> None:
    pic = initialized()
    edge(pic, 4)
    pic.set_line(4, False)
    assert not pic.intr
    assert pic.acknowledge() == 0x27
    assert isr(pic) == 0  # IR7's vector without its ISR bit


def test_a_masked_edge_is_kept() -> None:
    pic = initialized()
    pic.write(0x21, 0x10)
    edge(pic, 4)
    assert not pic.intr
    assert pic.masked(4)
    pic.write(0x21, 0)
    assert not pic.masked(4)
    assert pic.acknowledge() == 0x24


def test_initialization_forgets_edges_and_masks() -> None:
    pic = initialized()
    edge(pic, 4)
    pic.write(0x21, 0xFF)
    pic.write(0x20, 0x11)
    for data in (0x40, 4, 1):
        pic.write(0x21, data)
    assert pic.read(0x21) == 0
    assert not pic.intr
    edge(pic, 4)
    assert pic.acknowledge() == 0x44


def test_without_icw4_the_mask_follows_icw3() -> None:
    pic = DualPic()
    pic.write(0x20, 0x10)
    pic.write(0x21, 0x20)
    pic.write(0x21, 4)
    pic.write(0x21, 0xAA)
    assert pic.read(0x21) == 0xAA


def test_a_single_chip_has_no_icw3() -> None:
    pic = DualPic()
    for data in (0x20, 1, 0xAA):
        if data == 0x20:
            pic.write(0x20, 0x13)
        pic.write(0x21, data)
    assert pic.read(0x21) == 0xAA


def test_the_lower_line_comes_first_and_interrupts_the_higher() -> None:
    pic = initialized()
    edge(pic, 5, 3)
    assert pic.acknowledge() == 0x23
    assert not pic.intr  # 5 waits for 3
    edge(pic, 1)
    assert pic.acknowledge() == 0x21
    pic.write(0x20, EOI)
    assert isr(pic) == 0x08
    pic.write(0x20, EOI)
    assert pic.acknowledge() == 0x25


def test_a_specific_eoi_ends_that_line() -> None:
    pic = initialized()
    edge(pic, 5)
    pic.acknowledge()
    edge(pic, 3)
    pic.acknowledge()
    pic.write(0x20, 0x60 | 5)
    assert isr(pic) == 0x08


def test_the_slave_comes_through_line_2() -> None:
    pic = initialized()
    edge(pic, 10)
    assert irr(pic) == 0x04
    assert pic.acknowledge() == 0x2A
    assert (isr(pic), isr(pic, 0xA0)) == (0x04, 0x04)
    pic.write(0xA0, EOI)
    pic.write(0x20, EOI)
    assert (isr(pic), isr(pic, 0xA0)) == (0, 0)


def test_two_of_the_slave_s_come_one_after_the_other() -> None:
    pic = initialized()
    edge(pic, 14, 10)
    assert pic.acknowledge() == 0x2A
    pic.write(0xA0, EOI)
    assert not pic.intr  # the master still serves line 2
    pic.write(0x20, EOI)
    assert pic.acknowledge() == 0x2E


def test_special_fully_nested_mode_lets_a_higher_slave_line_through() -> None:
    plain, nested = initialized(), initialized(icw4=0x11)
    for pic, expected in ((plain, False), (nested, True)):
        edge(pic, 14)
        assert pic.acknowledge() == 0x2E
        edge(pic, 9)
        assert pic.intr is expected
    assert nested.acknowledge() == 0x29


def test_line_2_is_the_slave_s_alone() -> None:
    pic = initialized()
    pic.set_line(2, True)
    assert not pic.intr


def test_automatic_eoi_leaves_nothing_in_service() -> None:
    pic = initialized(icw4=0x03)
    edge(pic, 4)
    assert pic.acknowledge() == 0x24
    assert isr(pic) == 0


def test_rotation_makes_the_line_just_served_the_lowest() -> None:
    pic = initialized()
    edge(pic, 3)
    pic.acknowledge()
    pic.write(0x20, 0xA0)  # rotate on non-specific EOI
    edge(pic, 3, 4)
    assert pic.acknowledge() == 0x24


def test_automatic_rotation_does_so_at_each_acknowledge() -> None:
    pic = initialized(icw4=0x03)
    pic.write(0x20, 0x80)
    edge(pic, 3)
    pic.acknowledge()
    edge(pic, 3, 4)
    assert pic.acknowledge() == 0x24
    pic.write(0x20, 0x00)
    edge(pic, 4)
    assert pic.acknowledge() == 0x23


def test_priority_can_be_set() -> None:
    pic = initialized()
    pic.write(0x20, 0xC0 | 4)  # 4 lowest, 5 highest
    edge(pic, 0, 5)
    assert pic.acknowledge() == 0x25


def test_special_mask_mode_lets_lower_priorities_through() -> None:
    pic = initialized()
    edge(pic, 3)
    pic.acknowledge()
    pic.write(0x21, 0x08)
    edge(pic, 5)
    assert not pic.intr
    pic.write(0x20, 0x68)
    assert pic.acknowledge() == 0x25
    pic.write(0x20, EOI)
    assert isr(pic) == 0x08  # the masked one is passed over
    pic.write(0x20, 0x48)
    edge(pic, 6)
    assert not pic.intr


def test_a_poll_acknowledges_by_reading() -> None:
    pic = initialized()
    pic.write(0x20, POLL)
    assert pic.read(0x20) == 0
    edge(pic, 6)
    pic.write(0x20, POLL)
    assert pic.read(0x20) == 0x86
    assert isr(pic) == 0x40


def test_elcr_keeps_only_what_may_be_a_level() -> None:
    pic = DualPic()
    pic.write(0x4D0, 0xFF)
    pic.write(0x4D1, 0xFF)
    assert (pic.read(0x4D0), pic.read(0x4D1)) == (0xF8, 0xDE)


def test_a_level_comes_again_while_it_lasts() -> None:
    pic = initialized()
    pic.write(0x4D1, 0x04)
    pic.set_line(10, True)
    for _ in range(2):
        assert pic.acknowledge() == 0x2A
        pic.write(0xA0, EOI)
        pic.write(0x20, EOI)
    pic.set_line(10, False)
    assert not pic.intr


def test_icw1_can_make_every_line_a_level() -> None:
    pic = initialized(icw1=0x19)
    pic.set_line(0, True)
    pic.acknowledge()
    pic.write(0x20, EOI)
    assert pic.intr


PORTS = st.sampled_from([0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1])
STEPS = st.one_of(
    st.tuples(st.just("write"), PORTS, st.integers(0, 255)),
    st.tuples(st.just("read"), PORTS, st.just(0)),
    st.tuples(st.just("line"), st.integers(0, 15), st.booleans()),
    st.tuples(st.just("ack"), st.just(0), st.just(0)),
)


@given(st.lists(STEPS, max_size=40))
def test_any_sequence_keeps_every_register_a_byte(steps: list[tuple[str, int, int]]) -> None:
    """Threat 1."""
    pic = initialized()
    for name, a, b in steps:
        if name == "write":
            pic.write(a, b)
        elif name == "read":
            assert 0 <= pic.read(a) <= 0xFF
        elif name == "line":
            pic.set_line(a, bool(b))
        else:
            assert 0 <= pic.acknowledge() <= 0xFF
    for port in (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1):
        assert 0 <= pic.read(port) <= 0xFF
