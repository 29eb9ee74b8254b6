"""The exit loop without KVM: exits are written into a run page, devices are threads on real sockets."""

import mmap
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devproc import wire
from kvmcore.exitloop import Core, CoreVcpu, DeviceGone, Exit, ExitKind, Route, install_kick_signal

RUN_SIZE = 3 * mmap.PAGESIZE
PIO_DATA = mmap.PAGESIZE  # where KVM puts the data of port accesses
DEADLINE_MS = 300

KVM_EXIT_UNKNOWN, KVM_EXIT_IO, KVM_EXIT_HLT, KVM_EXIT_MMIO = 0, 2, 5, 6
KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_SHUTDOWN, KVM_EXIT_FAIL_ENTRY = 7, 8, 9
KVM_EXIT_INTR, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_IOAPIC_EOI = 10, 17, 24, 26


class Device:
    """A device process's half of the access channel: answers reads, keeps all it was sent."""

    def __init__(self, answer: Callable[[wire.Read], bytes | None] | None = None) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.got: list[wire.Message] = []
        self._answer = answer or (lambda read: wire.encode(wire.Value(0x1122334455667788 % 256**read.size)))
        self._thread = threading.Thread(target=self._main)
        self._thread.start()

    def _main(self) -> None:
        while frame := self.theirs.recv(4096):
            message = wire.decode(frame, wire.ACCESS_FRAME_MAX)
            self.got.append(message)
            if isinstance(message, wire.Read):
                reply = self._answer(message)
                if reply is None:
                    break
                self.theirs.send(reply)
            elif isinstance(message, wire.Write) and not message.posted:
                self.theirs.send(wire.encode(wire.Done()))
        self.theirs.close()

    def finish(self) -> list[wire.Message]:
        """Everything it was sent, once the exit loop has let go of it."""
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self.got


class Machine:
    """A core, a vCPU whose run page we write, and devices."""

    def __init__(self) -> None:
        self.core = Core(DEADLINE_MS)
        self.run_page = mmap.mmap(-1, RUN_SIZE)
        self.vcpu = CoreVcpu(self.core, -1, self.run_page)
        self.devices: list[Device] = []

    def add(self, device: Device) -> int:
        self.devices.append(device)
        index = self.core.add_device(device.ours.fileno())
        device.ours.close()  # the core has its own
        return index

    def close(self) -> None:
        for index, device in enumerate(self.devices):
            self.core.mark_dead(index)
            device.finish()
        self.vcpu.close()
        self.run_page.close()

    def _exit(self, reason: int, data: bytes) -> None:
        self.run_page[8:12] = reason.to_bytes(4, "little")
        self.run_page[32 : 32 + len(data)] = data

    def exit(self, reason: int, data: bytes = b"") -> Exit | None:
        self._exit(reason, data)
        return self.vcpu.dispatch()

    def pio(self, port: int, size: int, data: bytes, count: int = 1, *, write: bool) -> Exit | None:
        self.run_page[PIO_DATA : PIO_DATA + len(data)] = data
        return self.exit(KVM_EXIT_IO, struct.pack("<BBHIQ", write, size, port, count, PIO_DATA))

    def outs(self, port: int, size: int, data: bytes) -> Exit | None:
        return self.pio(port, size, data, len(data) // size, write=True)

    def ins(self, port: int, size: int, count: int = 1) -> bytes:
        assert self.pio(port, size, bytes(size * count), count, write=False) is None
        return self.pio_data(size * count)

    def pio_data(self, size: int) -> bytes:
        return self.run_page[PIO_DATA : PIO_DATA + size]

    def mmio(self, addr: int, size: int, data: bytes | None = None) -> Exit | None:
        fields = struct.pack("<Q8sIB", addr, data or bytes(8), size, data is not None)
        return self.exit(KVM_EXIT_MMIO, fields)

    def mmio_data(self, size: int) -> bytes:
        return self.run_page[40 : 40 + size]


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


# -- routing


def test_an_access_reaches_its_device_at_its_offset(machine: Machine) -> None:
    device = Device()
    index = machine.add(device)
    machine.core.set_routes([Route.device(0x3F8, 8, index, wire.Space.PORT2, 16)], [])
    assert machine.outs(0x3FB, 1, b"\x83") is None
    assert machine.ins(0x3FD, 2) == b"\x88\x77"
    machine.core.mark_dead(index)
    space = wire.Space.PORT2
    assert device.finish() == [wire.Write(space, 19, 1, 0x83, True), wire.Read(space, 21, 2)]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_mmio_of_every_size_reaches_its_device(machine: Machine, size: int) -> None:
    device = Device()
    index = machine.add(device)
    base = (1 << 52) - 0x1000
    machine.core.set_routes([], [Route.device(base, 0x1000, index, wire.Space.BAR0)])
    value = bytes(range(0xF0, 0xF0 + size))
    assert machine.mmio(base + 0xFF0, size, value) is None
    assert machine.mmio(base + 0xFF8, size) is None
    assert machine.mmio_data(size) == 0x1122334455667788.to_bytes(8, "little")[:size]
    machine.core.mark_dead(index)
    data = int.from_bytes(value, "little")
    assert device.finish() == [
        wire.Write(wire.Space.BAR0, 0xFF0, size, data, True),
        wire.Read(wire.Space.BAR0, 0xFF8, size),
    ]


def test_a_hole_reads_all_ones_and_swallows_writes_and_counts(machine: Machine) -> None:
    machine.core.set_routes([Route.floating(0xED, 1)], [])
    assert machine.ins(0x80, 4) == b"\xff" * 4
    assert machine.ins(0xED, 1) == b"\xff"
    assert machine.outs(0x80, 1, b"\x01") is None
    assert machine.mmio(0xFEC00000, 8) is None
    assert machine.mmio_data(8) == b"\xff" * 8
    assert machine.mmio(0, 4, b"abcd") is None
    assert machine.core.float_counters() == (3, 2)


def test_an_access_across_a_boundary_is_cut_into_bytes(machine: Machine) -> None:
    left, right = Device(), Device()
    machine.core.set_routes(
        [
            Route.device(0x60, 2, machine.add(left), wire.Space.PORT),
            Route.device(0x62, 1, machine.add(right), wire.Space.PORT),
        ],
        [],
    )
    assert machine.ins(0x61, 4) == b"\x88\x88\xff\xff"  # left, right, two holes
    assert machine.outs(0x5F, 4, b"\x01\x02\x03\x04") is None
    machine.core.mark_dead(0)
    machine.core.mark_dead(1)
    port = wire.Space.PORT
    assert left.finish() == [
        wire.Read(port, 1, 1),
        wire.Write(port, 0, 1, 2, True),
        wire.Write(port, 1, 1, 3, True),
    ]
    assert right.finish() == [wire.Read(port, 0, 1), wire.Write(port, 0, 1, 4, True)]
    assert machine.core.float_counters() == (2, 1)


def test_the_last_port_has_no_successor(machine: Machine) -> None:
    device = Device()
    machine.core.set_routes([Route.device(0xFFFF, 1, machine.add(device), 0)], [])
    assert machine.ins(0xFFFF, 2) == b"\x88\xff"
    assert machine.ins(0xFFFE, 1) == b"\xff"


def test_an_mmio_access_that_is_no_power_of_two_is_cut_into_bytes(machine: Machine) -> None:
    """KVM reports the two halves of a page-crossing access with whatever lengths they have."""
    device = Device()
    index = machine.add(device)
    machine.core.set_routes([], [Route.device(0x1000, 0x1000, index, wire.Space.BAR1)])
    assert machine.mmio(0x1001, 3) is None
    assert machine.mmio_data(3) == b"\x88\x88\x88"
    machine.core.mark_dead(index)
    assert device.finish() == [wire.Read(wire.Space.BAR1, n, 1) for n in (1, 2, 3)]


def test_both_buses_are_apart(machine: Machine) -> None:
    machine.core.set_routes([Route.python(0x100, 4)], [])
    assert machine.mmio(0x100, 4) is None
    assert machine.mmio_data(4) == b"\xff" * 4


@given(
    st.sets(st.integers(0, 40), max_size=8),
    st.lists(st.sampled_from(list(range(3))), min_size=41, max_size=41),
    st.integers(0, 40),
    st.sampled_from([1, 2, 4]),
)
def test_each_byte_of_any_access_is_answered_by_its_owner(
    starts: set[int], kinds: list[int], port: int, size: int
) -> None:
    """Against a model: a list that says for each port who owns it."""
    machine = Machine()
    machine.vcpu.complete(0)
    edges = [*sorted(starts), 41]
    routes, owner = [], [None] * 64
    for start, end in pairwise(edges):
        if kinds[start] < 2:
            routes.append(
                Route.python(start, end - start) if kinds[start] else Route.floating(start, end - start)
            )
            owner[start:end] = [start if kinds[start] else None] * (end - start)  # type: ignore[list-item]
    machine.core.set_routes(reversed(routes), [])
    seen = []
    exit_ = machine.pio(port, size, bytes(size), write=False)
    while exit_ is not None:
        assert exit_.kind is ExitKind.IO
        seen += [owner[exit_.addr + n] for n in range(exit_.size)]
        assert len(set(seen[-exit_.size :])) == 1
        assert seen[-1] is not None
        machine.vcpu.complete(0)
        exit_ = resume(machine)
    owners = owner[port : port + size]
    assert machine.pio_data(size) == bytes(0xFF if o is None else 0 for o in owners)
    assert seen == [o for o in owners if o is not None]
    machine.close()


def resume(machine: Machine) -> Exit | None:
    """What `run` does next: the rest of the access, then KVM_RUN, which without a vCPU is EBADF."""
    exit_ = machine.vcpu.run()
    return None if exit_.kind is ExitKind.RUN_FAILED else exit_


def test_a_checked_range_is_read_from_its_device_and_written_by_python(machine: Machine) -> None:
    index = machine.add(Device(lambda read: wire.encode(wire.Value(0x5678))))
    machine.core.set_routes([], [Route.checked(0xE0000000, 0x1000, index, wire.Space.BAR0, 0x100)])
    assert machine.mmio(0xE0000018, 2) is None
    assert machine.mmio_data(2) == b"\x78\x56"
    exit_ = machine.mmio(0xE000001C, 2, b"\x01\x00")
    assert exit_ is not None
    assert (exit_.kind, exit_.is_write, exit_.addr, exit_.data) == (ExitKind.IO, True, 0xE000001C, 1)
    assert resume(machine) is None
    assert machine.devices[0].got == [wire.Read(wire.Space.BAR0, 0x118, 2)]


# -- tables


@pytest.mark.parametrize(
    ("pio", "mmio"),
    [
        ([Route.python(0x60, 4), Route.floating(0x63, 1)], []),
        ([Route.python(0x60, 4), Route.floating(0x60, 1)], []),
        ([Route.python(0x60, 0)], []),
        ([Route.python(0xFFFF, 2)], []),
        ([Route.python(0x10000, 1)], []),
        ([Route.device(0x60, 1, 0, 0)], []),
        ([], [Route.checked(0x60, 1, 0, 0)]),
        ([], [Route.python(1 << 63, 1 << 63), Route.python((1 << 64) - 1, 1)]),
        ([], [Route.python((1 << 64) - 1, 2)]),
    ],
)
def test_a_table_that_makes_no_sense_is_refused_whole(
    machine: Machine, pio: list[Route], mmio: list[Route]
) -> None:
    machine.core.set_routes([Route.python(0x70, 1)], [])
    with pytest.raises(ValueError, match="cannot route"):
        machine.core.set_routes([Route.python(0x70, 2), *pio], mmio)
    exit_ = machine.pio(0x70, 2, bytes(2), write=False)
    assert exit_ is not None
    assert exit_.size == 1  # the table before is still in force


def test_a_table_may_fill_the_bus(machine: Machine) -> None:
    machine.core.set_routes([Route.python(0, 0x10000)], [Route.python(0, 1 << 63)])
    exit_ = machine.mmio((1 << 63) - 8, 8)
    assert exit_ is not None
    assert exit_.kind is ExitKind.IO


def test_moving_a_range_for_ever_takes_no_memory(machine: Machine) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    def move(times: int) -> None:
        for n in range(times):
            machine.core.set_routes([], [Route.python(0x1000 * (n + i), 0x1000) for i in range(64)])

    move(100)
    before = resident()
    move(1000)  # leaked, these tables would be 2.5 MB
    assert resident() - before < 1 << 20


def test_tables_change_under_a_running_vcpu(machine: Machine) -> None:
    over = threading.Event()

    def move() -> None:
        while not over.is_set():
            machine.core.set_routes([Route.floating(0x60, 1)], [])
            machine.core.set_routes([Route.floating(0x61, 1), Route.floating(0x62, 1)], [])

    mover = threading.Thread(target=move)
    mover.start()
    try:
        for _ in range(500):
            assert machine.ins(0x60, 1, 16) == b"\xff" * 16
    finally:
        over.set()
        mover.join()


# -- exits to Python


def test_a_python_read_gives_what_completes_it(machine: Machine) -> None:
    machine.core.set_routes([Route.python(0xCF8, 8)], [])
    exit_ = machine.pio(0xCFC, 2, bytes(2), write=False)
    assert exit_ is not None
    assert (exit_.kind, exit_.is_mmio, exit_.is_write) == (ExitKind.IO, False, False)
    assert (exit_.addr, exit_.size, exit_.data) == (0xCFC, 2, 0xFFFF)
    assert exit_.describe() == "read of 2 at port 0xcfc"
    machine.vcpu.complete(0xABCDEF)
    assert resume(machine) is None
    assert machine.pio_data(2) == b"\xef\xcd"


def test_a_python_read_that_nobody_completes_floats(machine: Machine) -> None:
    machine.core.set_routes([Route.python(0xCF8, 8)], [])
    assert machine.pio(0xCFC, 4, bytes(4), write=False) is not None
    assert resume(machine) is None
    assert machine.pio_data(4) == b"\xff" * 4


def test_a_python_write_shows_its_data_once(machine: Machine) -> None:
    machine.core.set_routes([], [Route.python(0xE0000000, 0x100000)])
    exit_ = machine.mmio(0xE0000004, 4, b"\x01\x02\x03\x80")
    assert exit_ is not None
    assert (exit_.is_mmio, exit_.is_write, exit_.addr, exit_.data) == (True, True, 0xE0000004, 0x80030201)
    assert resume(machine) is None


def test_string_io_goes_on_after_python_in_its_middle(machine: Machine) -> None:
    device = Device()
    index = machine.add(device)
    machine.core.set_routes([Route.device(0x1F0, 1, index, 0), Route.python(0x1F1, 1)], [])
    exit_ = machine.pio(0x1F0, 2, bytes(6), 3, write=False)
    for n in range(3):
        assert exit_ is not None
        assert (exit_.addr, exit_.size) == (0x1F1, 1)
        machine.vcpu.complete(0x40 + n)
        exit_ = resume(machine)
    assert exit_ is None
    assert machine.pio_data(6) == b"\x88\x40\x88\x41\x88\x42"
    machine.core.mark_dead(index)
    assert device.finish() == [wire.Read(0, 0, 1)] * 3


def test_string_output_arrives_in_order(machine: Machine) -> None:
    device = Device()
    index = machine.add(device)
    machine.core.set_routes([Route.device(0x3F8, 8, index, 0)], [])
    text = bytes(range(200))
    assert machine.outs(0x3F8, 1, text) is None
    assert machine.outs(0x3F8, 2, text) is None
    machine.core.mark_dead(index)
    words = struct.unpack("<100H", text)
    assert device.finish() == [
        *(wire.Write(0, 0, 1, byte, True) for byte in text),
        *(wire.Write(0, 0, 2, word, True) for word in words),
    ]


# -- other exits


def test_exits_carry_what_kvm_says(machine: Machine) -> None:
    def exit_of(reason: int, data: bytes = b"") -> Exit:
        exit_ = machine.exit(reason, data)
        assert exit_ is not None
        return exit_

    assert exit_of(KVM_EXIT_HLT).kind is ExitKind.HLT
    assert exit_of(KVM_EXIT_SHUTDOWN).kind is ExitKind.SHUTDOWN
    assert exit_of(KVM_EXIT_IRQ_WINDOW_OPEN).kind is ExitKind.IRQ_WINDOW_OPEN
    eoi = exit_of(KVM_EXIT_IOAPIC_EOI, b"\x31")
    assert (eoi.kind, eoi.vector) == (ExitKind.IOAPIC_EOI, 0x31)
    event = exit_of(KVM_EXIT_SYSTEM_EVENT, struct.pack("<IIQ", 2, 1, 7))
    assert (event.kind, event.event, event.values) == (ExitKind.SYSTEM_EVENT, 2, (7,))
    entry = exit_of(KVM_EXIT_FAIL_ENTRY, struct.pack("<QI", 0x80000021, 0))
    assert (entry.kind, entry.reason) == (ExitKind.FAIL_ENTRY, 0x80000021)
    unknown = exit_of(99)
    assert (unknown.kind, unknown.reason) == (ExitKind.UNKNOWN, 99)
    assert unknown.describe() == "unexpected KVM exit reason 99"
    assert machine.exit(KVM_EXIT_INTR) is None


def test_an_emulation_failure_shows_the_instruction(machine: Machine) -> None:
    instruction = bytes.fromhex("48 0f c7 0f") + bytes(11)
    failure = struct.pack("<IIQ", 1, 3, 1) + bytes([4]) + instruction
    exit_ = machine.exit(KVM_EXIT_INTERNAL_ERROR, failure)
    assert exit_ is not None
    assert exit_.describe() == "KVM cannot emulate an instruction of the guest: 48 0f c7 0f"


def test_a_failure_without_an_instruction_is_described(machine: Machine) -> None:
    exit_ = machine.exit(KVM_EXIT_INTERNAL_ERROR, struct.pack("<IIQ", 1, 0, 0))
    assert exit_ is not None
    assert exit_.describe() == "KVM cannot emulate an instruction of the guest"


@pytest.mark.parametrize(
    "fields",
    [
        struct.pack("<BBHIQ", 0, 4, 0x60, 1, RUN_SIZE),
        struct.pack("<BBHIQ", 0, 4, 0x60, 1, RUN_SIZE - 3),
        struct.pack("<BBHIQ", 0, 255, 0x60, 0xFFFFFFFF, PIO_DATA),
        struct.pack("<BBHIQ", 0, 1, 0x60, 1, (1 << 64) - 1),
        struct.pack("<BBHIQ", 0, 0, 0x60, 0xFFFFFFFF, PIO_DATA),
    ],
)
def test_port_data_outside_the_run_page_is_not_touched(machine: Machine, fields: bytes) -> None:
    exit_ = machine.exit(KVM_EXIT_IO, fields)
    assert exit_ is not None
    assert exit_.kind is ExitKind.UNKNOWN


@pytest.mark.parametrize("size", [0, 9])
def test_an_mmio_length_that_its_data_cannot_have_is_not_used(machine: Machine, size: int) -> None:
    exit_ = machine.mmio(0, size)
    assert exit_ is not None
    assert exit_.kind is ExitKind.UNKNOWN


def test_more_values_than_there_is_room_for_are_cut(machine: Machine) -> None:
    exit_ = machine.exit(KVM_EXIT_SYSTEM_EVENT, struct.pack("<II", 1, 0xFFFFFFFF) + b"\x01" * 128)
    assert exit_ is not None
    assert exit_.values == (0x0101010101010101,) * 16


def test_a_failing_kvm_run_is_reported_with_its_errno(machine: Machine) -> None:
    exit_ = machine.vcpu.run()
    assert exit_.kind is ExitKind.RUN_FAILED
    assert exit_.describe() == "KVM_RUN: Bad file descriptor (EBADF)"


def test_a_run_page_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="run page"):
        CoreVcpu(Core(), -1, mmap.mmap(-1, 1024))


# -- stopping


def test_a_stop_comes_before_the_guest_is_entered_and_once(machine: Machine) -> None:
    machine.vcpu.stop()
    machine.vcpu.stop()
    assert machine.run_page[1] == 1  # immediate_exit, for a KVM_RUN about to begin
    assert machine.vcpu.run().kind is ExitKind.STOPPED
    assert machine.run_page[1] == 0
    assert machine.vcpu.run().kind is ExitKind.RUN_FAILED


def test_a_stop_in_the_middle_of_string_io_loses_nothing(machine: Machine) -> None:
    machine.core.set_routes([Route.python(0x60, 1)], [])
    assert machine.pio(0x60, 1, bytes(2), 2, write=False) is not None
    machine.vcpu.complete(1)
    machine.vcpu.stop()
    assert machine.vcpu.run().kind is ExitKind.STOPPED
    exit_ = machine.vcpu.run()
    assert exit_.kind is ExitKind.IO
    machine.vcpu.complete(2)
    assert resume(machine) is None
    assert machine.pio_data(2) == b"\x01\x02"


# -- dying devices


def dead(machine: Machine, exit_: Exit | None) -> str:
    assert exit_ is not None
    assert exit_.kind is ExitKind.DEVICE_DEAD
    assert exit_.index == 0
    return exit_.cause


@pytest.mark.parametrize(
    "reply",
    [
        b"\x92\x03",  # truncated
        b"\x92\x03\xcc",
        b"\x92\x03\x01\x00",  # trailing
        b"\x92\x03\xcd\x01\x00",  # 256 does not fit one byte
        b"\x92\x03\xff",  # -1
        b"\x92\x03\xc3",  # true
        b"\x92\x03\xd0\x01",  # signed
        b"\x92\x03\xca\x00\x00\x00\x00",  # a float
        b"\x92\x04\x01",  # another tag
        b"\x91\x04",  # Done
        b"\x93\x03\x01\x02",
        b"\x01",
        b"\xc1",
        b"\x92\x03\xcf" + b"\xff" * 8,
        b"\x92" * 33,
        bytes(4096),
    ],
)
def test_a_reply_that_is_not_one_kills_the_device(machine: Machine, reply: bytes) -> None:
    machine.core.set_routes([Route.device(0x60, 4, machine.add(Device(lambda read: reply)), 0)], [])
    assert dead(machine, machine.pio(0x60, 1, bytes(1), write=False)) == "its reply is not one"
    assert machine.pio_data(1) == b"\0"  # no value was made up
    assert dead(machine, machine.pio(0x61, 1, b"x", write=True)) == "its reply is not one"


@given(st.binary(max_size=40))
def test_any_reply_is_a_value_that_fits_or_the_end(reply: bytes) -> None:
    machine = Machine()
    try:
        index = machine.add(Device(lambda read: reply))
        try:
            value = machine.core.read(index, 0, 0, 2)
        except DeviceGone:
            return
        assert 0 <= value <= 0xFFFF
        assert wire.decode(reply) == wire.Value(value)
    finally:
        machine.close()


@pytest.mark.parametrize(
    "value", [0, 1, 0x7F, 0x80, 0xFF, 0x100, 0xFFFF, 0x10000, (1 << 32) - 1, 1 << 32, (1 << 64) - 1]
)
def test_every_width_of_integer_passes_both_ways(machine: Machine, value: int) -> None:
    device = Device(lambda read: msgpack.packb([3, value]))
    index = machine.add(device)
    assert machine.core.read(index, wire.Space.BAR5, value, 8) == value
    machine.core.write(index, wire.Space.BAR5, value, 8, value, posted=True)
    machine.core.mark_dead(index)
    assert device.finish() == [
        wire.Read(wire.Space.BAR5, value, 8),
        wire.Write(wire.Space.BAR5, value, 8, value, True),
    ]


def test_a_device_that_closes_its_channel_is_dead(machine: Machine) -> None:
    machine.core.set_routes([Route.device(0x60, 4, machine.add(Device(lambda read: None)), 0)], [])
    assert dead(machine, machine.pio(0x60, 1, bytes(1), write=False)) == "it closed its access channel"


def test_a_posted_write_to_a_closed_channel_is_noticed(machine: Machine) -> None:
    device = Device()
    machine.core.set_routes([Route.device(0x60, 4, machine.add(device), 0)], [])
    device.theirs.shutdown(socket.SHUT_RDWR)
    device.finish()
    cause = dead(machine, machine.pio(0x60, 1, b"x", write=True))
    assert cause == "nothing can be sent to it: Broken pipe"


def test_a_device_that_does_not_answer_is_dead_at_the_deadline(machine: Machine) -> None:
    release = threading.Event()

    def hang(read: wire.Read) -> bytes | None:
        release.wait(10)
        return None

    machine.core.set_routes([Route.device(0x60, 4, machine.add(Device(hang)), 0)], [])
    assert dead(machine, machine.pio(0x60, 1, bytes(1), write=False)) == "it did not answer in time"
    with pytest.raises(DeviceGone, match="did not answer"):
        machine.core.read(0, 0, 0, 1)
    release.set()


def test_a_patient_deadline_is_the_devices_own(machine: Machine) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    patient = machine.core.add_device(ours.fileno(), 60_000)

    def answer_late() -> None:
        theirs.recv(64)
        hung.set()
        assert died.wait(30)
        theirs.send(wire.encode(wire.Value(7)))

    def hang(read: wire.Read) -> bytes | None:
        assert hung.wait(30)
        died.wait(30)
        return None

    hung, died = threading.Event(), threading.Event()
    late = threading.Thread(target=answer_late)
    late.start()
    impatient = machine.add(Device(hang))

    def look() -> None:
        with pytest.raises(DeviceGone):
            machine.core.read(impatient, 0, 0, 1)
        died.set()

    looker = threading.Thread(target=look)
    looker.start()
    assert machine.core.read(patient, 0, 0, 1) == 7
    looker.join()
    late.join()
    ours.close()
    theirs.close()


def test_a_device_that_reads_nothing_is_dead_when_its_channel_is_full(machine: Machine) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    machine.core.set_routes([Route.device(0x60, 4, machine.core.add_device(ours.fileno()), 0)], [])
    exit_ = None
    while exit_ is None:
        exit_ = machine.outs(0x60, 1, bytes(4096))
    assert dead(machine, exit_) == "it did not answer in time"
    ours.close()
    theirs.close()


def test_signals_do_not_extend_the_deadline(machine: Machine) -> None:
    """A kick every few milliseconds, as the supervisor sends to a vCPU it wants to stop."""
    release = threading.Event()

    def hang(read: wire.Read) -> bytes | None:
        release.wait(10)
        return None

    index = machine.add(Device(hang))
    install_kick_signal()
    causes = []

    def access() -> None:
        try:
            machine.core.read(index, 0, 0, 1)
        except DeviceGone as e:
            causes.append(e.cause)

    accessor = threading.Thread(target=access)
    accessor.start()
    for _ in range(2000):
        if not accessor.is_alive():
            break
        signal.pthread_kill(accessor.ident or 0, signal.SIGRTMIN)
        accessor.join(0.005)
    assert causes == ["it did not answer in time"]
    release.set()


def test_a_device_given_up_wakes_who_waits_for_it(machine: Machine) -> None:
    asked = threading.Event()
    release = threading.Event()

    def hang(read: wire.Read) -> bytes | None:
        asked.set()
        release.wait(10)
        return None

    core = Core(60_000)
    device = Device(hang)
    index = core.add_device(device.ours.fileno())
    causes = []

    def access() -> None:
        try:
            core.read(index, 0, 0, 1)
        except DeviceGone as e:
            causes.append(e.cause)

    accessor = threading.Thread(target=access)
    accessor.start()
    assert asked.wait(10)
    core.mark_dead(index)
    accessor.join(10)
    assert causes == ["it was given up"]
    release.set()
    device.finish()
    device.ours.close()


def test_an_access_that_lost_its_device_is_tried_again_by_the_new_routes(machine: Machine) -> None:
    old = machine.add(Device(lambda read: None))
    machine.core.set_routes([Route.device(0x60, 4, old, 0)], [])
    assert dead(machine, machine.pio(0x60, 1, bytes(2), 2, write=False))
    machine.core.set_routes([Route.device(0x60, 4, machine.add(Device()), 0)], [])
    assert resume(machine) is None
    assert machine.pio_data(2) == b"\x88\x88"


def test_one_device_s_death_leaves_the_others_alone(machine: Machine) -> None:
    machine.add(Device(lambda read: None))
    machine.add(Device())
    with pytest.raises(DeviceGone):
        machine.core.read(0, 0, 0, 1)
    assert machine.core.read(1, 0, 0, 1) == 0x88


# -- accesses from Python


def test_a_marked_write_waits_until_it_is_done(machine: Machine) -> None:
    device = Device()
    index = machine.add(device)
    machine.core.write(index, wire.Space.CONFIG, 4, 2, 0x107, posted=False)
    assert device.got == [wire.Write(wire.Space.CONFIG, 4, 2, 0x107, False)]


def test_two_threads_never_mix_their_replies(machine: Machine) -> None:
    index = machine.add(Device(lambda read: wire.encode(wire.Value(read.offset))))
    wrong = []

    def ask(first: int) -> None:
        for offset in range(first, first + 300):
            if machine.core.read(index, 0, offset, 4) != offset:
                wrong.append(offset)

    threads = [threading.Thread(target=ask, args=(1000 * n,)) for n in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert machine.core.device_counters(index).reads == 900


def test_an_access_that_makes_no_sense_is_our_own_error(machine: Machine) -> None:
    index = machine.add(Device())
    for access in (
        lambda: machine.core.read(index + 1, 0, 0, 1),
        lambda: machine.core.read(index, 0, 0, 3),
        lambda: machine.core.write(index, 0, 0, 1, 0x100, posted=True),
    ):
        with pytest.raises(ValueError, match="no such access"):
            access()
    for missing in (machine.core.mark_dead, machine.core.device_counters):
        with pytest.raises(IndexError):
            missing(index + 1)


def test_transactions_are_counted(machine: Machine) -> None:
    index = machine.add(Device())
    machine.core.set_routes([Route.device(0x60, 4, index, 0)], [])
    machine.ins(0x60, 1, 3)
    machine.outs(0x60, 1, b"ab")
    counters = machine.core.device_counters(index)
    assert (counters.reads, counters.writes) == (3, 2)
    assert counters.wait_ns > 0


# -- channels


def test_only_a_seqpacket_socket_is_an_access_channel(machine: Machine) -> None:
    stream, other = socket.socketpair()
    with pytest.raises(OSError, match="wrong type"):
        machine.core.add_device(stream.fileno())
    read, write = os.pipe()
    with pytest.raises(OSError, match="non-socket"):
        machine.core.add_device(read)
    for fd in (read, write, stream.detach(), other.detach()):
        os.close(fd)


def test_a_channel_in_non_blocking_mode_is_made_blocking(machine: Machine) -> None:
    device = Device(lambda read: (time.sleep(0.05), wire.encode(wire.Value(7)))[1])
    device.ours.setblocking(False)
    assert machine.core.read(machine.add(device), 0, 0, 1) == 7


def test_the_table_of_devices_is_bounded() -> None:
    core = Core()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for n in range(256):
        assert core.add_device(ours.fileno()) == n
    with pytest.raises(OSError, match="No space"):
        core.add_device(ours.fileno())
    ours.close()
    theirs.close()


# -- coalesced writes

RING_MAX = (mmap.PAGESIZE - 8) // 24  # KVM_COALESCED_MMIO_MAX


class Ring:
    """KVM's half of the ring of `machine`'s device 0 at port 0x600."""

    def __init__(self, machine: Machine, device: Device, first: int = 0) -> None:
        index = machine.add(device)
        machine.core.set_routes([Route.device(0x600, 8, index, 0)], [])
        fd = os.memfd_create("ring")
        os.ftruncate(fd, 3 * mmap.PAGESIZE)
        machine.core.coalesce(fd, 2, index)
        self._page = mmap.mmap(fd, mmap.PAGESIZE, offset=2 * mmap.PAGESIZE)
        os.close(fd)
        self._last = first
        self._page[:8] = struct.pack("=II", first, first)

    def put(self, port: int, data: bytes, size: int | None = None) -> None:
        entry = struct.pack("=QII8s", port, len(data) if size is None else size, 1, data)
        self._page[8 + 24 * self._last : 32 + 24 * self._last] = entry
        self._last = (self._last + 1) % RING_MAX
        self._page[4:8] = struct.pack("=I", self._last)

    @property
    def is_empty(self) -> bool:
        return self._page[:4] == self._page[4:8]


def test_coalesced_writes_come_in_order_and_before_a_later_access(machine: Machine) -> None:
    device = Device()
    ring = Ring(machine, device, first=RING_MAX - 2)
    for n in range(100):
        ring.put(0x600 + n % 3, bytes([n]))
    machine.ins(0x607, 1)
    assert ring.is_empty
    machine.core.mark_dead(0)
    writes = [wire.Write(0, n % 3, 1, n, True) for n in range(100)]
    assert device.finish() == [*writes, wire.Read(0, 7, 1)]


def test_an_access_to_another_device_leaves_coalesced_writes_where_they_are(machine: Machine) -> None:
    ring = Ring(machine, Device())
    other = machine.add(Device())
    ring.put(0x600, b"x")
    machine.core.read(other, 0, 0, 1)
    assert not ring.is_empty


def test_coalesced_writes_arrive_without_an_access(machine: Machine) -> None:
    device = Device()
    ring = Ring(machine, device)
    ring.put(0x600, b"x")
    ring.put(0x602, b"yz")
    machine.core.drain()
    assert ring.is_empty
    machine.core.mark_dead(0)
    assert device.finish() == [wire.Write(0, 0, 1, 0x78, True), wire.Write(0, 2, 2, 0x7A79, True)]


def test_a_coalesced_write_that_no_device_takes_is_dropped(machine: Machine) -> None:
    device = Device()
    ring = Ring(machine, device)
    ring.put(0x700, b"x")
    ring.put(0x607, b"xy")
    ring.put(0x600, b"xyz")
    ring.put(0x600, b"", size=0xFFFFFFFF)
    machine.core.drain()
    assert ring.is_empty
    machine.core.mark_dead(0)
    assert device.finish() == []


def test_a_device_that_is_gone_when_its_coalesced_writes_come_is_named_once(machine: Machine) -> None:
    ring = Ring(machine, Device())
    machine.core.mark_dead(0)
    ring.put(0x600, b"x")
    with pytest.raises(DeviceGone) as e:
        machine.core.drain()
    assert (e.value.index, e.value.cause) == (0, "it was given up")
    machine.core.drain()


def test_a_ring_that_cannot_be_mapped_or_is_nobodys_is_refused(machine: Machine) -> None:
    machine.add(Device())
    for fd, index in ((-1, 0), (0, 1)):
        with pytest.raises(OSError, match="coalesced writes"):
            machine.core.coalesce(fd, 2, index)
