from hypothesis import given
from hypothesis import strategies as st

from kvmcore.ioapic import IOREGSEL, IOWIN, IoApic
from kvmcore.irq import MsiMessage

MASKED, LEVEL, REMOTE_IRR = 1 << 16, 1 << 15, 1 << 14


class Chip:
    """The guest's half: registers by index; and what was delivered."""

    def __init__(self) -> None:
        self.delivered: list[MsiMessage] = []
        self.ioapic = IoApic(self.delivered.append)
        self.routes: dict[int, MsiMessage | None] = {}

    def select(self, register: int) -> None:
        assert self.ioapic.write(IOREGSEL, 4, register) == {}

    def read(self, register: int) -> int:
        self.select(register)
        return self.ioapic.read(IOWIN, 4)

    def write(self, register: int, data: int) -> None:
        self.select(register)
        self.routes.update(self.ioapic.write(IOWIN, 4, data))

    def redirect(self, pin: int, low: int, dest: int = 0) -> None:
        self.write(0x11 + 2 * pin, dest << 24)
        self.write(0x10 + 2 * pin, low)


def test_reset_leaves_every_pin_masked() -> None:
    chip = Chip()
    assert [chip.read(n) for n in range(0x10, 0x40)] == [MASKED, 0] * 24


def test_the_version_counts_24_pins() -> None:
    assert Chip().read(1) == 0x170011


def test_the_id_keeps_its_four_bits_and_arbitration_none() -> None:
    chip = Chip()
    chip.write(0, 0xFFFFFFFF)
    assert chip.read(0) == 0x0F000000
    chip.write(2, 0xFFFFFFFF)
    assert chip.read(2) == 0


def test_the_select_register_reads_back() -> None:
    chip = Chip()
    chip.select(0x3F)
    assert chip.ioapic.read(IOREGSEL, 4) == 0x3F


def test_status_bits_of_an_entry_cannot_be_written() -> None:
    chip = Chip()
    chip.redirect(3, 0xFFFFFFFF, dest=0xFF)
    assert chip.read(0x16) == 0x1FFFF & ~(1 << 12 | REMOTE_IRR)
    assert chip.read(0x17) == 0xFF000000


def test_what_does_not_exist_floats() -> None:
    """Threats 1 and 2."""
    chip = Chip()
    for register in (3, 0xF, 0x40, 0xFF):
        chip.write(register, 0)
        assert chip.read(register) == 0xFFFFFFFF
    assert chip.ioapic.read(IOWIN, 1) == 0xFF
    assert chip.ioapic.read(0x20, 4) == 0xFFFFFFFF
    assert chip.ioapic.read(IOREGSEL, 8) == (1 << 64) - 1
    chip.select(0x10)
    assert chip.ioapic.write(IOWIN, 2, 0x31) == {}
    assert chip.ioapic.write(IOWIN + 4, 4, 0x31) == {}
    assert chip.read(0x10) == MASKED


def test_an_unmasked_edge_is_a_route_for_its_irqfd() -> None:
    chip = Chip()
    chip.redirect(4, 0x34, dest=2)
    assert chip.routes == {4: MsiMessage(0xFEE02000, 0x4034)}
    chip.redirect(4, MASKED | 0x34, dest=2)
    assert chip.routes == {4: None}
    assert chip.delivered == []


def test_logical_and_lowest_priority_show_in_the_message() -> None:
    chip = Chip()
    chip.redirect(5, 1 << 11 | 1 << 8 | 0x35, dest=0xF0)
    assert chip.routes[5] == MsiMessage(0xFEEF0004, 0x4135)


def test_a_write_that_changes_no_route_says_so() -> None:
    chip = Chip()
    chip.redirect(4, 0x34)
    chip.select(0x18)
    assert chip.ioapic.write(IOWIN, 4, 0x34) == {}


def test_an_edge_from_the_supervisor_is_delivered_unless_masked() -> None:
    chip = Chip()
    chip.ioapic.set_level(4, True)
    chip.redirect(4, 0x34)
    assert chip.delivered == []  # lost while masked
    chip.ioapic.set_level(4, True)
    assert chip.delivered == []  # no new edge
    chip.ioapic.set_level(4, False)
    chip.ioapic.set_level(4, True)
    assert chip.delivered == [MsiMessage(0xFEE00000, 0x4034)]


def test_a_level_falls_at_its_eoi_and_comes_again_when_its_source_raises_it() -> None:
    chip = Chip()
    message = MsiMessage(0xFEE00000, 0xC04A)
    chip.redirect(10, LEVEL | 0x4A)
    chip.ioapic.set_level(10, True)
    chip.ioapic.set_level(10, True)
    assert chip.delivered == [message]
    assert chip.read(0x24) & REMOTE_IRR
    chip.ioapic.set_level(10, True)
    assert chip.delivered == [message]
    assert chip.ioapic.end_of_interrupt(0x4A) == [10]
    assert chip.delivered == [message]
    assert not chip.read(0x24) & REMOTE_IRR
    assert chip.ioapic.end_of_interrupt(0x4A) == []
    chip.ioapic.set_level(10, True)
    assert chip.delivered == [message] * 2


def test_a_level_waits_behind_its_mask() -> None:
    chip = Chip()
    chip.redirect(10, LEVEL | MASKED | 0x4A)
    chip.ioapic.set_level(10, True)
    assert chip.delivered == []
    chip.redirect(10, LEVEL | 0x4A)
    assert len(chip.delivered) == 1


def test_a_level_masked_in_service_keeps_its_route_so_that_its_eoi_is_reported() -> None:
    chip = Chip()
    chip.redirect(10, LEVEL | 0x4A)
    chip.ioapic.set_level(10, True)
    chip.redirect(10, LEVEL | MASKED | 0x4A)
    assert chip.routes[10] == MsiMessage(0xFEE00000, 0xC04A)
    assert chip.ioapic.end_of_interrupt(0x4A) == [10]
    chip.ioapic.set_level(10, True)
    assert len(chip.delivered) == 1  # asserted again, but masked


def test_switching_a_stuck_pin_to_edge_and_back_frees_it() -> None:
    """What Linux does when an EOI was lost (__eoi_ioapic_pin)."""
    chip = Chip()
    chip.redirect(10, LEVEL | 0x4A)
    chip.ioapic.set_level(10, True)
    chip.redirect(10, MASKED | 0x4A)
    chip.redirect(10, LEVEL | 0x4A)
    assert len(chip.delivered) == 2


def test_an_eoi_of_another_vector_changes_nothing() -> None:
    chip = Chip()
    chip.redirect(10, LEVEL | 0x4A)
    chip.ioapic.set_level(10, True)
    assert chip.ioapic.end_of_interrupt(0x4B) == []
    assert len(chip.delivered) == 1


OPERATIONS = st.one_of(
    st.tuples(
        st.just("write"), st.integers(0, 0x1000), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**64 - 1)
    ),
    st.tuples(st.just("entry"), st.integers(0x10, 0x3F), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("line"), st.integers(0, 23), st.booleans()),
    st.tuples(st.just("eoi"), st.integers(0, 255)),
)


@given(st.lists(OPERATIONS, max_size=30))
def test_any_sequence_keeps_its_bounds(operations: list[tuple[str, ...]]) -> None:
    """Threat 3: at most one message for each pin in each step; routes reported are the routes there are."""
    chip = Chip()
    routes = {n: chip.ioapic.route(n) for n in range(24)}
    for name, *arguments in operations:
        before = len(chip.delivered)
        a = [int(x) for x in arguments]
        if name == "write":
            routes.update(chip.ioapic.write(a[0], a[1], a[2] % 256 ** a[1]))
        elif name == "entry":
            chip.select(a[0])
            routes.update(chip.ioapic.write(IOWIN, 4, a[1]))
        elif name == "line":
            chip.ioapic.set_level(a[0], bool(a[1]))
        else:
            chip.ioapic.end_of_interrupt(a[0])
        assert len(chip.delivered) - before <= 24
        assert routes == {n: chip.ioapic.route(n) for n in range(24)}
        assert all(0 <= chip.ioapic.read(offset, 4) < 1 << 32 for offset in (IOREGSEL, IOWIN))
