"""The MSI-X table against a KVM that is an interrupt log: the eventfds are real, irqfd acts as KVM's does."""

import os
import select

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmcore.irq import GsiRouter, MsiMessage
from supervisor.msix import ENABLE, FUNCTION_MASK, PBA, Msix

FIRST = 24
MESSAGE = MsiMessage(0xFEE01000, 0x4041)
UNMASKED, MASKED = 0, 1


class Kvm:
    """Irqfds and routes as the kernel's: an event in a bound eventfd is an interrupt of its message."""

    def __init__(self):
        self.bound = {}
        self.routes = {}
        self.injected = []

    def route(self, routes):
        self.routes = {r.gsi: r.message for r in routes}

    def irqfd(self, eventfd, gsi, resample=None, deassign=False):
        assert resample is None
        if deassign:
            assert self.bound.pop(eventfd) == gsi
            return
        assert eventfd not in self.bound
        self.bound[eventfd] = gsi
        if select.select([eventfd], [], [], 0)[0]:  # pending before it was bound: injected, but not read
            self._inject(gsi)

    def _inject(self, gsi):
        if gsi in self.routes:
            self.injected.append(self.routes[gsi])

    def signal(self, eventfd):
        os.eventfd_write(eventfd, 1)
        if eventfd in self.bound:
            os.eventfd_read(eventfd)
            self._inject(self.bound[eventfd])


class Function:
    def __init__(self, vectors=3):
        self.kvm = Kvm()
        self.fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(vectors)]
        router = GsiRouter(self.kvm.route, split=True)
        self.msix = Msix(self.kvm, router, self.fds, FIRST)

    def close(self):
        for fd in self.fds:
            os.close(fd)

    def program(self, n, message=MESSAGE, control=UNMASKED):
        self.msix.write(16 * n, 4, message.address & 0xFFFFFFFF)
        self.msix.write(16 * n + 4, 4, message.address >> 32)
        self.msix.write(16 * n + 8, 4, message.data)
        self.msix.write(16 * n + 12, 4, control)

    def signal(self, n):
        self.kvm.signal(self.fds[n])

    @property
    def pending(self):
        return self.msix.read(PBA, 8)


@pytest.fixture
def function():
    function = Function()
    yield function
    function.close()


def test_every_vector_is_masked_at_first(function):
    assert [function.msix.read(16 * n + 12, 4) for n in range(3)] == [MASKED] * 3
    function.msix.set_control(ENABLE)
    assert function.kvm.bound == {}


def test_an_unmasked_vector_of_an_enabled_function_is_an_interrupt(function):
    function.program(1)
    function.signal(1)
    assert function.kvm.injected == []
    function.msix.set_control(ENABLE)
    function.signal(1)
    assert set(function.kvm.injected) == {MESSAGE}
    assert function.kvm.routes == {FIRST + 1: MESSAGE}


@pytest.mark.parametrize("how", ["vector", "function", "off"])
def test_what_comes_while_masked_is_pending_and_delivered_once_unmasked(function, how):
    """Threat 3."""
    controls = {"vector": ENABLE, "function": ENABLE | FUNCTION_MASK, "off": 0}
    function.msix.set_control(ENABLE)
    function.program(1)
    if how == "vector":
        function.msix.write(16 + 12, 4, MASKED)
    function.msix.set_control(controls[how])
    for _ in range(3):
        function.signal(1)
    assert function.kvm.injected == []
    assert function.pending == 1 << 1
    function.msix.write(16 + 12, 4, UNMASKED)
    function.msix.set_control(ENABLE)
    assert function.kvm.injected == [MESSAGE]
    assert function.pending == 0


def test_an_event_is_delivered_once_however_often_the_guest_masks(function):
    """Threat 3."""
    function.msix.set_control(ENABLE)
    function.program(0, control=MASKED)
    function.signal(0)
    for control in (UNMASKED, MASKED, UNMASKED, MASKED):
        function.msix.write(12, 4, control)
    assert function.kvm.injected == [MESSAGE]
    assert function.pending == 0


def test_a_message_changed_while_masked_is_the_one_that_is_delivered(function):
    function.msix.set_control(ENABLE)
    function.program(0)
    other = MsiMessage(0xFEE02000, 0x4042)
    function.msix.write(12, 4, MASKED)
    function.signal(0)
    function.program(0, other)
    assert function.kvm.injected == [other]


def test_a_message_changed_while_unmasked_is_the_next_one(function):
    function.msix.set_control(ENABLE)
    function.program(0)
    function.msix.write(8, 4, 0x4077)
    function.signal(0)
    assert function.kvm.injected == [MsiMessage(MESSAGE.address, 0x4077)]


@pytest.mark.parametrize("address", [0x1000, 0xFEC00000, 0x1_FEE0_0000, 0])
def test_a_message_to_anything_but_a_local_apic_goes_nowhere(function, address):
    """Threat 2."""
    function.msix.set_control(ENABLE)
    function.program(0, MsiMessage(address, 0x41))
    function.signal(0)
    assert function.kvm.routes == {}
    assert function.kvm.injected == []


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 1), (0, 2), (2, 4), (4, 8), (12, 1), (16 * 3, 4), (PBA, 4), (PBA, 8), (0x1FF8, 8)],
)
def test_a_write_that_pci_does_not_know_changes_nothing(function, offset, size):
    """Threat 1."""
    before = [function.msix.read(n, 8) for n in range(0, 48, 8)]
    function.msix.write(offset, size, (1 << 8 * size) - 1)
    assert [function.msix.read(n, 8) for n in range(0, 48, 8)] == before


def test_reserved_bits_read_as_zero(function):
    for n in range(0, 16, 4):
        function.msix.write(n, 4, 0xFFFFFFFF)
    assert [function.msix.read(n, 4) for n in range(0, 16, 4)] == [0xFFFFFFFC, 0xFFFFFFFF, 0xFFFFFFFF, 1]
    function.msix.write(8, 8, 0)
    assert function.msix.read(8, 8) == 0


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_what_lies_past_the_structures_reads_as_zero(function, size):
    """Threat 1."""
    assert function.msix.read(16 * 3, size) == function.msix.read(PBA + 8, size) == 0
    assert function.msix.read(PBA - size, size) == 0


def test_pending_bits_of_many_vectors_are_where_pci_has_them():
    function = Function(70)
    function.signal(0)
    function.signal(65)
    assert function.msix.read(PBA, 8) == 1
    assert function.msix.read(PBA + 8, 4) == 2
    assert function.msix.read(PBA + 8, 1) == 2
    function.close()


ACTIONS = st.one_of(
    st.tuples(st.just("signal"), st.integers(0, 2)),
    st.tuples(st.just("mask"), st.integers(0, 2)),
    st.tuples(st.just("unmask"), st.integers(0, 2)),
    st.tuples(st.just("control"), st.sampled_from([0, ENABLE, ENABLE | FUNCTION_MASK])),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(ACTIONS, max_size=30))
def test_in_any_order_nothing_is_lost_and_nothing_is_delivered_while_masked(actions):
    """Threat 3, against a model: a pending bit a vector."""
    function = Function()
    messages = [MsiMessage(0xFEE00000, 0x40 + n) for n in range(3)]
    for n, message in enumerate(messages):
        function.program(n, message, MASKED)
    masked, control, pending, delivered = [True] * 3, 0, [False] * 3, []
    for what, value in actions:
        if what == "signal":
            function.signal(value)
            pending[value] = True
        elif what == "control":
            control = value
            function.msix.set_control(value)
        else:
            masked[value] = what == "mask"
            function.msix.write(16 * value + 12, 4, masked[value])
        for n in range(3):
            if pending[n] and control == ENABLE and not masked[n]:
                pending[n] = False
                delivered.append(messages[n])
        assert sorted(function.kvm.injected) == sorted(delivered)
        assert function.pending == sum(p << n for n, p in enumerate(pending))
    function.close()
