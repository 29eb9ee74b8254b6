import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.pcishadow import (
    BAR0,
    COMMAND,
    COMMAND_IO,
    COMMAND_MEMORY,
    Bar,
    FunctionShadow,
    Mapping,
    PciBus,
)

IO, MEM32, MEM64 = Bar(0, "io", 0x40), Bar(1, "mem32", 0x1000), Bar(2, "mem64", 0x10000)
ENABLE = 1 << 31


class Function:
    """A function whose configuration space is plain memory."""

    def __init__(self):
        self.data = bytearray(4096)
        self.writes = []

    def config_read(self, offset, size):
        return int.from_bytes(self.data[offset : offset + size], "little")

    def config_write(self, offset, size, data):
        self.writes.append((offset, size, data))
        self.data[offset : offset + size] = data.to_bytes(size, "little")


@pytest.fixture
def shadow():
    return FunctionShadow((IO, MEM32, MEM64))


def test_no_bar_is_decoded_before_the_command_register_says_so(shadow):
    shadow.write(BAR0, 4, 0xC000)
    assert shadow.mappings() == ()
    assert shadow.write(COMMAND, 2, COMMAND_IO)
    assert shadow.mappings() == (Mapping(IO, 0xC000),)


def test_memory_and_io_are_enabled_separately(shadow):
    shadow.write(BAR0, 4, 0xC000)
    shadow.write(BAR0 + 4, 4, 0xE0000000)
    shadow.write(COMMAND, 2, COMMAND_MEMORY)
    assert shadow.mappings() == (Mapping(MEM32, 0xE0000000),)


def test_the_low_bits_of_a_bar_are_hard_wired(shadow):
    shadow.write(COMMAND, 1, COMMAND_IO)
    shadow.write(BAR0, 4, 0xC07F)
    assert shadow.mappings() == (Mapping(IO, 0xC040),)


def test_asking_for_the_size_maps_nothing(shadow):
    shadow.write(COMMAND, 2, COMMAND_IO | COMMAND_MEMORY)
    for n in range(4):
        shadow.write(BAR0 + 4 * n, 4, 0xFFFFFFFF)
    assert shadow.mappings() == ()


def test_a_64_bit_bar_takes_two_registers(shadow):
    shadow.write(COMMAND, 2, COMMAND_MEMORY)
    shadow.write(BAR0 + 12, 4, 2)
    shadow.write(BAR0 + 8, 4, 0x10004)
    assert shadow.mappings() == (Mapping(MEM64, 0x200010000),)


def test_a_bar_can_be_written_byte_by_byte(shadow):
    shadow.write(COMMAND, 1, COMMAND_MEMORY)
    for i, byte in enumerate((0x00, 0x20, 0x00, 0xE0)):
        shadow.write(BAR0 + 4 + i, 1, byte)
    assert shadow.mappings() == (Mapping(MEM32, 0xE0002000),)


def test_a_write_that_moves_nothing_says_so(shadow):
    shadow.write(COMMAND, 2, COMMAND_MEMORY)
    assert shadow.write(BAR0 + 4, 4, 0xE0000000)
    assert not shadow.write(BAR0 + 4, 4, 0xE0000000)
    assert not shadow.write(0x3C, 1, 5)


@given(st.lists(st.tuples(st.integers(0, 63), st.sampled_from((1, 2, 4)), st.integers(0, (1 << 32) - 1))))
def test_whatever_is_written_every_mapping_is_aligned_and_inside_its_space(writes):
    shadow = FunctionShadow((IO, MEM32, MEM64))
    for offset, size, data in writes:
        shadow.write(offset, size, data & (1 << 8 * size) - 1)
    limits = {"io": 1 << 16, "mem32": 1 << 32, "mem64": 1 << 64}
    for bar, base in ((m.bar, m.base) for m in shadow.mappings()):
        assert base % bar.size == 0
        assert 0 < base < base + bar.size <= limits[bar.kind]


class Machine:
    """Bus 0 with one function, in slot 3; `address` is CONFIG_ADDRESS."""

    def __init__(self):
        self.moved = []
        self.address = 0
        self.bus = PciBus(lambda: self.address, lambda slot, mappings: self.moved.append((slot, mappings)))
        self.function = Function()
        self.bus.add(3, self.function, FunctionShadow((IO,)))

    def select(self, slot, register, function=0, bus=0):
        self.address = ENABLE | bus << 16 | slot << 11 | function << 8 | register


@pytest.fixture
def machine():
    return Machine()


@pytest.mark.parametrize(("port", "register"), [(0, 0x40), (4, 0x40), (5, 0x41), (7, 0x43)])
def test_the_address_and_the_port_choose_the_register(machine, port, register):
    machine.select(3, 0x40)
    machine.bus.port_write(port, 1, 7)
    assert machine.function.writes == [(register, 1, 7)]


@pytest.mark.parametrize("where", [{"slot": 4}, {"slot": 3, "function": 1}, {"slot": 3, "bus": 1}])
def test_a_write_to_a_function_that_is_not_there_vanishes(machine, where):
    machine.select(register=COMMAND, **where)
    machine.bus.port_write(4, 4, 3)
    assert machine.function.writes == machine.moved == []


def test_ecam_reaches_the_whole_4_kib(machine):
    machine.bus.ecam_write(3 << 15 | 0xFFC, 4, 7)
    assert machine.function.writes == [(0xFFC, 4, 7)]


def test_moving_a_bar_is_told_with_where_it_is_now(machine):
    machine.select(3, COMMAND)
    machine.bus.port_write(4, 2, COMMAND_IO)
    assert machine.moved == []
    machine.select(3, BAR0)
    machine.bus.port_write(4, 4, 0xC001)
    assert machine.moved == [(3, (Mapping(IO, 0xC000),))]


def test_the_device_sees_the_write_before_its_bar_moves(machine):
    seen = []
    machine.bus = PciBus(
        lambda: machine.address, lambda slot, mappings: seen.append(bytes(machine.function.data))
    )
    machine.bus.add(3, machine.function, FunctionShadow((IO,)))
    machine.bus.ecam_write(3 << 15 | COMMAND, 2, COMMAND_IO)
    machine.bus.ecam_write(3 << 15 | BAR0, 4, 0xC000)
    assert [data[BAR0 : BAR0 + 4] for data in seen] == [b"\x00\xc0\x00\x00"]


def test_what_the_device_answers_moves_nothing(machine):
    machine.bus.ecam_write(3 << 15 | COMMAND, 2, COMMAND_IO)
    machine.bus.ecam_write(3 << 15 | BAR0, 4, 0xC000)
    machine.function.data[BAR0 : BAR0 + 4] = b"\x00\x80\x00\x00"  # it now claims to be elsewhere
    machine.bus.ecam_write(3 << 15 | 0x3C, 1, 5)
    assert machine.moved == [(3, (Mapping(IO, 0xC000),))]
