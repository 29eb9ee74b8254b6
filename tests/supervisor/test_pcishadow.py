import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.pcishadow import BAR0, COMMAND, COMMAND_MEMORY, FunctionShadow, PciBus

BAR_SIZE = 0x8000
ENABLE = 1 << 31


@pytest.fixture
def shadow():
    return FunctionShadow(BAR_SIZE)


def test_no_bar_is_decoded_before_the_command_register_says_so(shadow):
    shadow.write(BAR0, 4, 0xE0000000)
    assert shadow.base is None
    shadow.write(COMMAND, 2, COMMAND_MEMORY)
    assert shadow.base == 0xE0000000
    shadow.write(COMMAND, 2, 0)
    assert shadow.base is None


def test_a_bar_that_was_given_no_address_is_not_decoded(shadow):
    shadow.write(COMMAND, 2, COMMAND_MEMORY)
    assert shadow.base is None


def test_the_low_bits_of_a_bar_are_hard_wired(shadow):
    shadow.write(COMMAND, 1, COMMAND_MEMORY)
    shadow.write(BAR0, 4, 0xE000FFFF)
    assert shadow.base == 0xE0008000


def test_asking_for_the_size_maps_nothing(shadow):
    shadow.write(COMMAND, 2, COMMAND_MEMORY)
    shadow.write(BAR0, 4, 0xFFFFFFFF)
    assert shadow.base is None


def test_a_bar_can_be_written_byte_by_byte(shadow):
    shadow.write(COMMAND, 1, COMMAND_MEMORY)
    for i, byte in enumerate((0x00, 0x80, 0x00, 0xE0)):
        shadow.write(BAR0 + i, 1, byte)
    assert shadow.base == 0xE0008000


def test_the_extended_configuration_space_holds_nothing(shadow):
    shadow.write(0x100 + BAR0, 4, 0xE0000000)
    shadow.write(COMMAND, 2, COMMAND_MEMORY)
    assert shadow.base is None


@given(st.lists(st.tuples(st.integers(0, 0x3FF), st.sampled_from((1, 2, 4)), st.integers(0, (1 << 32) - 1))))
def test_whatever_is_written_the_bar_is_aligned_and_below_4_gib(writes):
    shadow = FunctionShadow(BAR_SIZE)
    shadow.write(COMMAND, 2, COMMAND_MEMORY)
    for register, size, data in writes:
        shadow.write(register * 4, size, data & (1 << 8 * size) - 1)
    if shadow.base is not None:
        assert shadow.base % BAR_SIZE == 0
        assert 0 < shadow.base < shadow.base + BAR_SIZE < 1 << 32


class Function:
    def __init__(self, log):
        self.log = log

    def config_write(self, offset, size, data):
        self.log.append((offset, size, data))


class Machine:
    """Bus 0 with one function, in slot 3; `address` is CONFIG_ADDRESS."""

    def __init__(self):
        self.log = []
        self.address = 0
        self.bus = PciBus(lambda: self.address, lambda: self.log.append("settle"))
        self.bus.add(3, Function(self.log))

    def select(self, slot, register, function=0, bus=0):
        self.address = ENABLE | bus << 16 | slot << 11 | function << 8 | register


@pytest.fixture
def machine():
    return Machine()


@pytest.mark.parametrize(("port", "register"), [(0, 0x40), (4, 0x40), (5, 0x41), (7, 0x43)])
def test_the_address_and_the_port_choose_the_register(machine, port, register):
    machine.select(3, 0x40)
    machine.bus.port_write(port, 1, 7)
    assert machine.log == [(register, 1, 7), "settle"]


@pytest.mark.parametrize("where", [{"slot": 4}, {"slot": 3, "function": 1}, {"slot": 3, "bus": 1}])
def test_a_write_to_a_function_that_is_not_there_vanishes(machine, where):
    machine.select(register=COMMAND, **where)
    machine.bus.port_write(4, 4, 3)
    assert machine.log == []


def test_ecam_reaches_the_whole_4_kib(machine):
    machine.bus.ecam_write(3 << 15 | 0xFFC, 4, 7)
    assert machine.log == [(0xFFC, 4, 7), "settle"]
