import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devproc.wire import Space
from kvmcore.errors import ConfigError
from kvmcore.exitloop import Core, Route
from supervisor.bus import Bus, Buses, Callbacks, Checked, Claim, DeviceTarget

NOBODY = Callbacks(lambda offset, size: 0, lambda offset, size, data: None)


def claim(start, size, owner="a", target=NOBODY):
    return Claim(start, size, owner, target)


@pytest.fixture
def bus():
    return Bus("io", 1 << 16)


def test_overlapping_claims_are_refused_with_both_owners_named(bus):
    bus.insert(claim(0x60, 5, "i8042"))
    with pytest.raises(ConfigError, match=r"i8042 \[0x60, 0x65\) overlaps pit \[0x64, 0x65\)"):
        bus.insert(claim(0x64, 1, "pit"))


def test_a_refused_claim_leaves_the_bus_as_it_was(bus):
    bus.insert(claim(0x10, 4, "a"))
    bus.insert(claim(0x20, 4, "b"))
    before = bus.claims()
    with pytest.raises(ConfigError):
        bus.replace("a", [claim(0x22, 4, "a")])
    assert bus.claims() == before


@pytest.mark.parametrize(("start", "size"), [(-1, 2), (0xFFFF, 2), (0x10, 0), (0x10, -1), (1 << 16, 1)])
def test_a_claim_outside_the_bus_is_refused(bus, start, size):
    with pytest.raises(ConfigError, match="is outside"):
        bus.insert(claim(start, size))


def test_neighbours_do_not_overlap(bus):
    bus.insert(claim(0x40, 4))
    bus.insert(claim(0x44, 4))
    assert [c.start for c in bus.claims()] == [0x40, 0x44]


def test_replacing_takes_away_what_the_owner_had(bus):
    bus.insert(claim(0x40, 4, "a"))
    bus.insert(claim(0x50, 4, "b"))
    bus.replace("a", [claim(0x60, 4, "a")])
    assert [(c.start, c.owner) for c in bus.claims()] == [(0x50, "b"), (0x60, "a")]


def test_a_handler_gets_the_offset_in_its_claim(bus):
    bus.insert(claim(0xCF8, 8))
    assert bus.handler(0xCF8) == (NOBODY, 0)
    assert bus.handler(0xCFF) == (NOBODY, 7)


@pytest.mark.parametrize("addr", [0, 0xCF7, 0xD00, 0x3F8])
def test_what_a_device_or_nobody_owns_has_no_handler(bus, addr):
    bus.insert(claim(0xCF8, 8))
    bus.insert(claim(0x3F8, 8, "serial1", DeviceTarget(0, Space.PORT)))
    with pytest.raises(LookupError):
        bus.handler(addr)


def test_routes_say_who_answers(bus):
    bus.insert(claim(0xCF8, 8))
    bus.insert(claim(0x62, 3, "i8042", DeviceTarget(2, Space.PORT, 2)))
    assert bus.routes() == [Route.device(0x62, 3, 2, Space.PORT, 2), Route.python(0xCF8, 8)]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 8), st.sampled_from("abc"))))
def test_whatever_is_claimed_nothing_overlaps_and_every_address_finds_its_owner(wanted):
    bus = Bus("io", 64)
    owned = {}
    for start, size, owner in wanted:
        target = Callbacks(lambda o, s: 0, lambda o, s, d: None)
        covered = set(range(start, start + size))
        if start + size <= 64 and not covered & owned.keys():
            bus.insert(Claim(start, size, owner, target))
            owned |= dict.fromkeys(covered, target)
        else:
            with pytest.raises(ConfigError):
                bus.insert(Claim(start, size, owner, target))
    for addr in range(64):
        if addr in owned:
            assert bus.handler(addr)[0] is owned[addr]
        else:
            with pytest.raises(LookupError):
                bus.handler(addr)


def test_a_look_up_never_meets_a_half_changed_bus(bus):
    """As when one vCPU moves a BAR while another reads 0xcf8."""
    bus.insert(claim(0xCF8, 8, "pci"))
    stop = threading.Event()
    failures = []

    def look():
        try:
            while not stop.is_set():
                assert bus.handler(0xCFC) == (NOBODY, 4)
        except Exception as e:
            failures.append(e)

    thread = threading.Thread(target=look)
    thread.start()
    for n in range(2000):
        bus.replace("bars", [claim(0x10 * i, 8, "bars") for i in range(n % 5)])
    stop.set()
    thread.join()
    assert not failures


@pytest.fixture
def buses():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    core = Core(100)
    index = core.add_device(ours.fileno())
    with ours, theirs:
        yield Buses(core, 1 << 16, 1 << 40), index


def bar(index, base):
    return [Claim(base, 0x1000, "blk", DeviceTarget(index, Space.BAR0))]


def test_what_has_been_placed_is_where_it_was_moved_to(buses):
    buses, index = buses
    assert buses.place("blk", bar(index, 0xE0000000))
    assert buses.place("blk", bar(index, 0xE0001000))
    assert buses.mmio.routes() == [Route.device(0xE0001000, 0x1000, index, Space.BAR0)]


def test_what_is_no_longer_decoded_is_gone(buses):
    buses, index = buses
    buses.place("blk", bar(index, 0xE0000000))
    assert buses.place("blk", [])
    assert buses.mmio.routes() == []


def test_what_is_put_on_top_of_another_is_not_decoded_and_the_other_stays(buses):
    buses, index = buses
    buses.mmio.insert(Claim(0xE0000800, 8, "ioapic", NOBODY))
    buses.place("blk", bar(index, 0xE0002000))
    assert not buses.place("blk", bar(index, 0xE0000000))
    assert [c.owner for c in buses.mmio.claims()] == ["ioapic"]


def test_a_checked_claim_is_read_from_its_device_and_written_here(buses):
    buses, index = buses
    got = []
    checked = Checked(index, Space.BAR0, 0x10, lambda *write: got.append(write))
    buses.place("blk", [Claim(0xE0000000, 0x1000, "blk", checked)])
    assert buses.mmio.routes() == [Route.checked(0xE0000000, 0x1000, index, Space.BAR0, 0x10)]
    handler, offset = buses.mmio.handler(0xE0000014)
    handler.write(offset, 1, 4)
    assert got == [(0x14, 1, 4)]
