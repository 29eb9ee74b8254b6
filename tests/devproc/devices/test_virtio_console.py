"""The console by a driver that does what Linux's does, over real rings in a real memfd."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devproc.devices.virtio_console import (
    CONSOLE_PORT,
    CONTROL_RX,
    CONTROL_TX,
    DEVICE_READY,
    F_MULTIPORT,
    F_SIZE,
    INPUT_MAX,
    OUTPUT_MAX,
    PORT_ADD,
    PORT_NAME,
    PORT_OPEN,
    PORT_READY,
    RESIZE,
    VirtioConsole,
)
from devproc.virtio import spec
from devproc.virtio.chain import Span

PLAIN = spec.F_VERSION_1 | F_SIZE
ALL = PLAIN | F_MULTIPORT
RX, TX = 0, 1
COLS, ROWS, MAX_NR_PORTS = 0, 2, 4
BIG = 12 << 20  # above the rings


class Line:
    """The host's side of one port: what was typed, and how much of what is printed it takes."""

    def __init__(self) -> None:
        self.typed = bytearray()
        self.shown = bytearray()
        self.room = OUTPUT_MAX
        self.offered = 0  # the most bytes that were offered at once

    def listen(self, *handlers: Any) -> None:
        if len(handlers) == 2:
            self.wanted, self.on_input = handlers
        else:
            (self.on_room,) = handlers

    def read(self, limit: int) -> bytes:
        assert limit > 0
        data = bytes(self.typed[:limit])
        del self.typed[:limit]
        return data

    def write(self, data: bytes) -> int:
        self.offered = max(self.offered, len(data))
        taken = data[: self.room]
        self.shown += taken
        self.room -= len(taken)
        return len(taken)


class Guest:
    """A driver on a bench whose ports are separate lines."""

    def __init__(self, bench: Any, features: int = ALL, names: bytes = b"", packed: bool = False) -> None:
        lines: dict[str, Line] = {}

        def one_port(self: Any, kind: str, name: str) -> Any:
            if kind in ("input", "output"):
                return lines.setdefault(name[-1], Line())
            return bench.one_port(self, kind, name)

        self.bench = type("Lines", (bench,), {"one_port": one_port})("virtio-console", names=names)
        self.lines = [lines[n] for n in sorted(lines)]
        self.model: VirtioConsole = self.bench.model
        self.features = features | (spec.F_RING_PACKED if packed else 0)
        self.driver = self.bench.driver()
        self.driver.start(self.features)
        self.settle()

    def settle(self) -> None:
        """The device process's loop until nothing moves."""
        moved = True
        while moved:
            moved = False
            self.bench.pump()
            for line in self.lines:
                while line.typed and hasattr(line, "wanted") and line.wanted():
                    line.on_input()
                    moved = True

    def send(self, queue: int, *parts: bytes | int, indirect: bool = False) -> None:
        self.driver.queues[queue].request(*parts, indirect=indirect)
        self.driver.kick(queue)
        self.settle()

    def provide(self, queue: int, count: int, size: int = 64) -> None:
        for _ in range(count):
            self.driver.queues[queue].request(size)
        self.driver.kick(queue)
        self.settle()

    def got(self, queue: int) -> bytes:
        return b"".join(used.data for used in self.driver.queues[queue].used())

    def type(self, port: int, data: bytes) -> None:
        self.lines[port].typed += data
        self.settle()

    def drain(self, port: int, room: int) -> None:
        """The host takes `room` more bytes; like the real output, it says so only after having been full."""
        line = self.lines[port]
        full, line.room = not line.room, line.room + room
        if full:
            line.on_room()
        self.settle()

    def say(self, id: int, event: int, value: int = 1) -> None:
        self.send(CONTROL_TX, struct.pack("<IHH", id, event, value))

    def heard(self) -> list[tuple[int, int, bytes]]:
        """(port, event, what follows) of the device's messages since."""
        messages = [used.data for used in self.driver.queues[CONTROL_RX].used()]
        for m in messages:
            assert struct.unpack_from("<H", m, 6) == (1,)
        return [(*struct.unpack_from("<IH", m), m[8:]) for m in messages]

    def open_all(self) -> list[tuple[int, int, bytes]]:
        """What Linux does when it finds the function; the device's messages."""
        self.provide(CONTROL_RX, 32)
        self.say(0xFFFF_FFFF, DEVICE_READY)
        found = self.heard()
        for id, event, _ in list(found):
            assert event == PORT_ADD
            self.say(id, PORT_READY)
            found += self.heard()
            self.say(id, PORT_OPEN)
        return found

    def count(self, name: str) -> int:
        return self.model.counters()[name]


@pytest.fixture
def plain(bench: Any) -> Guest:
    return Guest(bench, PLAIN)


@pytest.fixture
def multi(bench: Any) -> Guest:
    """Ports: console, "agent", console."""
    guest = Guest(bench, names=b"\0agent\0")
    guest.open_all()
    return guest


# -- one port


def test_what_is_typed_arrives(plain: Guest) -> None:
    plain.provide(RX, 2)
    plain.type(0, b"ls\r")
    assert plain.got(RX) == b"ls\r"
    assert plain.bench.edges[f"irq{RX + 1}"] == 1


def test_what_is_printed_leaves(plain: Guest) -> None:
    plain.send(TX, b"hello, ", b"world\n")
    assert plain.lines[0].shown == b"hello, world\n"
    assert len(plain.driver.queues[TX].used()) == 1
    assert plain.bench.edges[f"irq{TX + 1}"] == 1


def test_a_long_paste_fills_buffer_after_buffer(plain: Guest) -> None:
    plain.provide(RX, 5, size=10)
    plain.type(0, bytes(range(64)))
    assert plain.got(RX) == bytes(range(50))
    plain.provide(RX, 4, size=10)
    assert plain.got(RX) == bytes(range(50, 64))


def test_one_read_takes_no_more_than_input_max(plain: Guest) -> None:
    plain.provide(RX, 2, size=2 * INPUT_MAX)
    plain.type(0, bytes(INPUT_MAX + 5))
    assert [used.written for used in plain.driver.queues[RX].used()] == [INPUT_MAX, 5]


def test_a_refilled_ring_is_noticed_after_it_was_empty(plain: Guest) -> None:
    for text in (b"a", b"b", b"c"):
        plain.provide(RX, 1)  # notifies only if the device asked for that
        plain.type(0, text)
        assert plain.got(RX) == text


def test_the_size_of_a_window_is_configuration(plain: Guest) -> None:
    generation = plain.driver.get(spec.CONFIG_GENERATION, 1)
    plain.model.set("size", 80 | 24 << 16)
    assert plain.driver.config(COLS, 2) == 80 and plain.driver.config(ROWS, 2) == 24
    assert plain.driver.get(spec.CONFIG_GENERATION, 1) != generation
    assert plain.bench.edges["irq0"] == 1
    plain.model.set("size", 80 | 24 << 16 | 3 << 32)
    assert plain.bench.edges["irq0"] == 1, "a port that there is not"


# -- several


def test_the_driver_is_told_of_every_port(bench: Any) -> None:
    guest = Guest(bench, names=b"\0agent\0\0")
    assert guest.driver.config(MAX_NR_PORTS, 4) == 4
    guest.model.set("size", 132 | 50 << 16 | 2 << 32)
    size = struct.pack("<HH", 132, 50)
    none = bytes(4)
    assert guest.open_all() == [
        (0, PORT_ADD, b""), (1, PORT_ADD, b""), (2, PORT_ADD, b""), (3, PORT_ADD, b""),
        (0, CONSOLE_PORT, b""), (0, RESIZE, none), (0, PORT_OPEN, b""),
        (1, PORT_NAME, b"agent"), (1, PORT_OPEN, b""),
        (2, CONSOLE_PORT, b""), (2, RESIZE, size), (2, PORT_OPEN, b""),
        (3, CONSOLE_PORT, b""), (3, RESIZE, none), (3, PORT_OPEN, b""),
    ]  # fmt: skip


def test_a_port_that_is_there_is_not_added_again(multi: Guest) -> None:
    multi.say(0, DEVICE_READY)
    assert multi.heard() == []


def test_every_port_has_its_own_queues(multi: Guest) -> None:
    for port in range(3):
        rx = (0, 4, 6)[port]
        multi.provide(rx, 1)
        multi.type(port, b"to%d" % port)
        assert multi.got(rx) == b"to%d" % port
        multi.send(rx + 1, b"from%d" % port)
        assert multi.lines[port].shown == b"from%d" % port


def test_a_resized_window_is_a_message_with_columns_first(multi: Guest) -> None:
    multi.model.set("size", 100 | 30 << 16 | 2 << 32)
    assert multi.heard() == [(2, RESIZE, struct.pack("<HH", 100, 30))]
    multi.model.set("size", 100 | 30 << 16 | 1 << 32)
    assert multi.heard() == [], "the agent has no window"


def test_only_the_last_size_is_told_to_a_driver_that_is_busy(bench: Any) -> None:
    guest = Guest(bench)
    guest.provide(CONTROL_RX, 4)
    guest.say(0, DEVICE_READY)
    guest.say(0, PORT_READY)
    guest.heard()
    guest.model.set("size", 1)
    guest.model.set("size", 2)
    guest.provide(CONTROL_RX, 4)
    assert guest.heard() == [(0, RESIZE, struct.pack("<HH", 2, 0))]


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_saved_console_goes_on_where_it_was(bench: Any, packed: bool) -> None:
    guest = Guest(bench, packed=packed)
    guest.open_all()
    guest.provide(RX, 2)
    guest.lines[0].room = 3
    guest.send(TX, b"abcdef")
    lines = guest.lines
    saved = guest.model.save()
    assert lines[0].shown == b"abc"

    # Another process in its place, with the same descriptors.
    twin = Guest.__new__(Guest)
    twin.__dict__ |= guest.__dict__
    twin.bench = type(guest.bench)("virtio-console", guest.bench.memory, names=b"")
    twin.model = twin.bench.model
    twin.model.restore(saved)
    twin.driver.function = twin.model
    twin.settle()
    twin.drain(0, 9)
    assert lines[0].shown == b"abcdef"
    assert len(twin.driver.queues[TX].used()) == 1
    twin.type(0, b"typed")
    assert twin.got(RX) == b"typed"


def test_a_console_that_was_saved_still_works(multi: Guest) -> None:
    multi.provide(RX, 1)
    multi.model.save()
    multi.type(0, b"x")
    assert multi.got(RX) == b"x"


@pytest.mark.parametrize("change", [lambda s: s.replace("[]", "[9]", 1), lambda s: s.replace("[]", "[2]", 1)])
def test_a_message_that_cannot_be_owed_is_refused(bench: Any, change: Any) -> None:
    guest = Guest(bench)
    saved = guest.model.save().decode()
    assert change(saved) != saved
    with pytest.raises(ValueError, match="can be owed"):
        guest.model.restore(change(saved).encode())


# -- threats


def test_a_host_that_does_not_drain_holds_the_ring_up_and_loses_nothing(plain: Guest) -> None:
    """Threat 1."""
    plain.lines[0].room = 3
    for text in (b"abcdef", b"ghi", b"jkl"):
        plain.send(TX, text)
    assert plain.lines[0].shown == b"abc"
    assert plain.driver.queues[TX].outstanding == 3 and not plain.driver.queues[TX].used()
    plain.drain(0, 4)
    assert plain.lines[0].shown == b"abcdefg"
    plain.drain(0, 100)
    assert plain.lines[0].shown == b"abcdefghijkl"
    assert len(plain.driver.queues[TX].used()) == 3


def test_a_buffer_of_megabytes_is_copied_in_pieces(bench: Any) -> None:
    """Threat 2."""
    plain = Guest(bench, PLAIN | spec.F_INDIRECT_DESC)
    ring = plain.driver.queues[TX]
    span = Span(BIG, 3 << 20)
    plain.bench.memory.write(span.gpa, b"first")
    ring.add([span] * 40, [], indirect=True)
    plain.driver.kick(TX)
    plain.settle()
    line = plain.lines[0]
    assert line.offered == OUTPUT_MAX == len(line.shown)
    assert line.shown.startswith(b"first")
    line.shown.clear()
    plain.drain(0, 3 << 20)
    assert line.shown.index(b"first") == (3 << 20) - OUTPUT_MAX
    assert line.offered == OUTPUT_MAX and not ring.used()


def test_input_stays_on_the_host_while_there_is_no_buffer(plain: Guest) -> None:
    """Threat 3."""
    assert not plain.lines[0].wanted()
    plain.type(0, b"waiting")
    assert plain.lines[0].typed == b"waiting"
    plain.provide(RX, 1)
    assert plain.got(RX) == b"waiting"


def test_input_of_a_port_that_is_closed_stays_on_the_host(multi: Guest) -> None:
    """Threat 3."""
    multi.provide(4, 1)
    multi.say(1, PORT_OPEN, 0)
    multi.type(1, b"later")
    multi.lines[1].on_input()  # select had said so before it was closed
    assert multi.lines[1].typed == b"later"
    multi.say(1, PORT_OPEN, 1)
    assert multi.got(4) == b"later"


def test_a_receive_buffer_without_room_needs_a_reset(plain: Guest) -> None:
    """Threat 4."""
    plain.send(RX, b"readable")
    assert plain.driver.status & spec.DEVICE_NEEDS_RESET
    plain.type(0, b"kept")
    plain.driver.start(PLAIN)
    plain.provide(RX, 1)
    assert plain.got(RX) == b"kept"


@pytest.mark.parametrize("size", [1, 7, 12])
def test_a_buffer_too_short_for_a_message_needs_a_reset(bench: Any, size: int) -> None:
    """Threat 4."""
    guest = Guest(bench, names=b"agent")
    guest.provide(CONTROL_RX, 2, size)
    guest.say(0, DEVICE_READY)
    if size > 8:
        assert guest.heard() == [(0, PORT_ADD, b"")]
        guest.say(0, PORT_READY)
    assert guest.driver.status & spec.DEVICE_NEEDS_RESET


@pytest.mark.parametrize(
    "message",
    [
        b"short",
        struct.pack("<IHH", 3, PORT_READY, 1),
        struct.pack("<IHH", 0xFFFF_FFFF, PORT_OPEN, 1),
        struct.pack("<IHH", 0, PORT_ADD, 1),
        struct.pack("<IHH", 0, RESIZE, 1),
        struct.pack("<IHH", 0, 99, 1),
    ],
)
def test_a_control_message_that_makes_no_sense_is_counted(multi: Guest, message: bytes) -> None:
    """Threat 5."""
    multi.send(CONTROL_TX, message)
    assert multi.count("bad_messages") == 1
    assert multi.heard() == []
    assert not multi.driver.status & spec.DEVICE_NEEDS_RESET


def test_a_port_is_nothing_before_it_was_added(bench: Any) -> None:
    """Threat 5."""
    guest = Guest(bench)
    guest.say(0, PORT_READY)
    guest.say(0, PORT_OPEN)
    assert guest.count("bad_messages") == 2


def test_each_answer_is_owed_once(bench: Any) -> None:
    """Threat 6."""
    guest = Guest(bench, names=b"\0agent\0\0")
    for _ in range(40):
        guest.say(0, DEVICE_READY)
        for id in range(4):
            guest.say(id, PORT_READY)
        guest.driver.queues[CONTROL_TX].used()
    guest.provide(CONTROL_RX, 60)
    assert len(guest.heard()) == 15


@pytest.mark.parametrize(("features", "queue"), [(PLAIN, CONTROL_TX), (PLAIN, 5), (ALL, 5), (ALL, 9)])
def test_a_queue_of_no_port_is_not_looked_at(bench: Any, features: int, queue: int) -> None:
    """Threat 7."""
    guest = Guest(bench, features)
    guest.send(queue, struct.pack("<IHH", 0, DEVICE_READY, 1))
    assert not guest.driver.queues[queue].used()
    assert not any(line.shown for line in guest.lines)
    assert not guest.driver.status & spec.DEVICE_NEEDS_RESET


def test_a_reset_loses_no_input(multi: Guest) -> None:
    """Threat 8."""
    multi.provide(RX, 1)
    line = multi.lines[0]
    line.typed += b"typed"
    assert line.wanted()
    multi.driver.reset()
    line.on_input()  # select had said so before the reset
    assert line.typed == b"typed" and not line.wanted()
    multi.driver.start(ALL)
    multi.open_all()
    multi.provide(RX, 1)
    assert multi.got(RX) == b"typed"


pieces = st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=6)


@given(
    texts=st.lists(pieces, max_size=8),
    rooms=st.lists(st.integers(1, 60), max_size=12),
    packed=st.booleans(),
    indirect=st.booleans(),
    saves=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_output_arrives_whole_and_in_order_however_the_host_drains(
    bench: Any, texts: list[list[bytes]], rooms: list[int], packed: bool, indirect: bool, saves: bool
) -> None:
    features = PLAIN | spec.F_INDIRECT_DESC
    guest = Guest(bench, features, packed=packed)
    guest.lines[0].room = 0
    for text in texts:
        guest.send(TX, *text, indirect=indirect)
    for room in rooms:
        if saves:
            guest.model.restore(guest.model.save())
            guest.settle()
        guest.drain(0, room)
    guest.drain(0, 1 << 20)
    assert guest.lines[0].shown == b"".join(b"".join(text) for text in texts)
    assert len(guest.driver.queues[TX].used()) == len(texts)
