"""devproc/virtio/vhost_user.py: what a back end is asked, and what becomes of a bad one; with a disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from devproc.driver import NotReady, PciDriver
from devproc.vhost.message import F_PROTOCOL_FEATURES, MemoryRegion, Request, VringAddr, VringFile, VringState
from devproc.virtio import spec
from devproc.virtio.vhost_user import STOP_NS, VhostUser
from devproc.wire import Space

V1 = spec.F_VERSION_1
F_BLK_SIZE = 1 << 6
NOTIFY = spec.BAR_NOTIFY
R = Request


class Machine:
    """A disk on its bench, its driver and its back end, which serves two of the four queues."""

    def __init__(self, bench: Any, **params: int) -> None:
        self.bench = bench("vhost-user-blk", **params)
        self.driver = PciDriver(self.bench.model, self.bench.memory)
        self.program = self.bench.program
        self.model = self.bench.model

    def start(self, features: int = V1, *, msix: bool = True) -> list[Any]:
        """What the back end is asked meanwhile."""
        self.program.heard()
        self.driver.start(features, size=8, msix=msix)
        return self.asked()

    def asked(self) -> list[Any]:
        return [(request, payload) for request, payload, _ in self.program.heard()]

    def command(self, *, master: bool) -> None:
        self.model.write(Space.CONFIG, 4, 2, 6 if master else 2)

    def set_msix(self, control: int) -> None:
        self.model.write(Space.CONFIG, self.driver.msix + 2, 2, control)

    @property
    def status(self) -> int:
        return self.driver.status


@pytest.fixture
def machine(bench: Any) -> Machine:
    return Machine(bench)


def ring(machine: Machine, index: int, base: int) -> list[Any]:
    queue = machine.driver.queues[index]
    return [
        (R.SET_VRING_NUM, VringState(index, 8)),
        (R.SET_VRING_BASE, VringState(index, base)),
        (R.SET_VRING_ADDR, VringAddr(index, 0, queue.desc, queue.device, queue.driver, 0)),
        (R.SET_VRING_CALL, VringFile(index, True)),
        (R.SET_VRING_KICK, VringFile(index, True)),
        (R.SET_VRING_ENABLE, VringState(index, 1)),
    ]


TABLE = (MemoryRegion(0, 16 << 20, 0, 0), MemoryRegion(1 << 32, 1 << 20, 1 << 32, 16 << 20))
STOP = [(R.GET_VRING_BASE, VringState(0, 0)), (R.GET_VRING_BASE, VringState(1, 0))]


def test_every_threat_has_a_test_that_cites_it() -> None:
    assert VhostUser.__doc__ is not None
    numbers = set(re.findall(r"^ +(\d+)\. ", VhostUser.__doc__, re.MULTILINE))
    assert set(re.findall(r'"""Threat (\d+)', Path(__file__).read_text())) == numbers


@pytest.mark.parametrize(("packed", "base"), [(0, 0), (spec.F_RING_PACKED, 0x8000_8000)])
def test_driver_ok_gives_the_back_end_memory_rings_and_eventfds(
    machine: Machine, packed: int, base: int
) -> None:
    """Threat 1."""
    machine.driver.start(V1 | F_BLK_SIZE | packed, size=8)
    asked = machine.program.heard()
    assert [(request, payload) for request, payload, _ in asked] == [
        (R.SET_FEATURES, V1 | F_BLK_SIZE | packed | F_PROTOCOL_FEATURES),
        (R.SET_MEM_TABLE, TABLE),
        *ring(machine, 0, base),
        *ring(machine, 1, base),
    ]
    ports = machine.bench.ports
    assert [shared for _, _, shared in asked if shared] == [
        (ports["memory"],) * 2,
        (ports["irq"][1],), (ports["kick"][0],),
        (ports["irq"][2],), (ports["kick"][1],),
    ]  # fmt: skip
    assert machine.bench.edges["kick0"] == 1, "what was made available before anyone listened"
    assert "kick2" not in machine.bench.edges


def test_what_the_back_end_does_not_offer_is_not_offered(bench: Any) -> None:
    machine = Machine(bench, features=V1 | F_BLK_SIZE)
    assert machine.driver.offered() == V1 | F_BLK_SIZE
    with pytest.raises(NotReady):
        machine.driver.start(V1 | spec.F_EVENT_IDX)
    assert machine.asked() == []


def test_a_queue_without_a_vector_has_no_eventfd(machine: Machine) -> None:
    machine.start()
    machine.driver.put(spec.QUEUE_SELECT, 2, 1)
    machine.driver.put(spec.QUEUE_MSIX_VECTOR, 2, spec.MSI_NO_VECTOR)
    assert machine.asked() == [(R.SET_VRING_CALL, VringFile(1, False))]


def test_vectors_are_followed_while_the_rings_run(machine: Machine) -> None:
    """Threat 3."""
    machine.start(msix=False)
    machine.set_msix(0x8000)
    assert machine.asked() == [(R.SET_VRING_CALL, VringFile(n, False)) for n in (0, 1)]
    machine.driver.put(spec.QUEUE_SELECT, 2, 0)
    for vector in (3, 3, 4):
        machine.driver.put(spec.QUEUE_MSIX_VECTOR, 2, vector)
    (_, _, first), (_, _, second) = machine.program.heard()
    assert (*first, *second) == machine.bench.ports["irq"][3:5]
    machine.set_msix(0xC000)
    assert machine.asked() == [], "the function mask is the supervisor's"
    machine.set_msix(0)
    assert [shared for *_, shared in machine.program.heard()] == [
        (p,) for p in machine.bench.ports["call"][:2]
    ]


def test_without_msix_a_call_is_inta_with_its_cause(machine: Machine) -> None:
    machine.start(msix=False)
    machine.bench.kick("call", 1)
    assert machine.bench.edges["intx"] == 1
    assert machine.driver.isr() == spec.ISR_QUEUE
    assert machine.driver.isr() == 0


def test_a_call_that_comes_late_goes_to_the_vector_that_there_is_now(machine: Machine) -> None:
    machine.start(msix=False)
    machine.set_msix(0x8000)
    machine.driver.put(spec.QUEUE_SELECT, 2, 1)
    machine.driver.put(spec.QUEUE_MSIX_VECTOR, 2, 4)
    machine.bench.kick("call", 1)
    assert machine.bench.edges["irq4"] == 1
    machine.driver.reset()
    machine.bench.kick("call", 1)
    assert machine.bench.edges["irq4"] == 1


def test_a_kick_by_the_register_is_passed_on(machine: Machine) -> None:
    machine.start()
    machine.model.write(Space.BAR0, NOTIFY + 4 * 3, 2, 3)
    assert machine.bench.edges["kick3"] == 1


def test_a_reset_is_done_when_every_ring_has_stopped(machine: Machine) -> None:
    """Threat 2."""
    machine.start()
    machine.program.answers = False
    machine.driver.put(spec.DEVICE_STATUS, 1, 0)
    machine.driver.put(spec.DEVICE_STATUS, 1, 0)
    assert machine.asked() == STOP
    for at in (0, 1):
        assert machine.status & spec.DRIVER_OK
        machine.driver.put(spec.DEVICE_STATUS, 1, spec.ACKNOWLEDGE)  # by a driver that does not wait
        machine.program.answer(R.GET_VRING_BASE, VringState(at, 5))
    assert machine.status == 0
    assert machine.model.deadline_ns is None
    machine.program.answers = True
    assert ring(machine, 0, 0)[1] in machine.start(), "from the start again"


def test_without_bus_mastering_the_rings_stop_and_go_on(machine: Machine) -> None:
    """Threat 4."""
    machine.start()
    machine.program.bases = {0: 7, 1: 9}
    machine.command(master=False)
    machine.command(master=False)
    assert machine.asked() == STOP
    machine.command(master=True)
    machine.command(master=True)
    asked = machine.asked()
    assert asked[2:] == ring(machine, 0, 7) + ring(machine, 1, 9)
    machine.program.answers = False
    machine.command(master=False)
    machine.command(master=True)
    machine.driver.put(spec.DEVICE_STATUS, 1, 0)
    assert machine.asked() == STOP
    for at in (0, 1):
        machine.program.answer(R.GET_VRING_BASE, VringState(at, 5))
    assert (machine.status, machine.asked()) == (0, [])


def test_driver_ok_without_bus_mastering_starts_nothing(machine: Machine) -> None:
    machine.driver.negotiate(V1)
    machine.driver.add_status(spec.DRIVER_OK)
    assert machine.asked() == []
    machine.command(master=True)
    assert [request for request, _ in machine.asked()] == [R.SET_FEATURES, R.SET_MEM_TABLE]


@pytest.mark.parametrize("msix", [True, False])
def test_a_back_end_that_ends_leaves_a_function_that_needs_a_reset(machine: Machine, msix: bool) -> None:
    """Threat 5."""
    machine.start(msix=msix)
    machine.program.hang_up("has closed its socket")
    assert machine.status & spec.DEVICE_NEEDS_RESET
    assert machine.bench.edges["irq0" if msix else "intx"] == 1
    assert machine.bench.said == ["needs a reset: the back end has closed its socket"]
    machine.driver.reset()
    machine.start(msix=msix)
    assert machine.status & spec.DEVICE_NEEDS_RESET
    assert len(machine.bench.said) == 1


def test_a_back_end_that_ends_before_its_driver_begins_is_in_the_log(machine: Machine) -> None:
    machine.program.hang_up("has closed its socket")
    assert machine.status == 0
    assert machine.bench.said == ["the back end has closed its socket"]
    machine.start()
    assert machine.status & spec.DEVICE_NEEDS_RESET
    assert machine.bench.said[1:] == ["needs a reset: the back end is gone"]


def test_a_back_end_that_ends_during_a_reset_has_stopped(machine: Machine) -> None:
    machine.start()
    machine.program.answers = False
    machine.driver.put(spec.DEVICE_STATUS, 1, 0)
    machine.program.hang_up("has closed its socket")
    assert machine.status == 0
    assert machine.bench.said == ["the back end has closed its socket"]


def test_a_back_end_that_never_stops_its_rings_is_given_up(machine: Machine) -> None:
    """Threat 6."""
    machine.start()
    machine.program.answers = False
    machine.driver.put(spec.DEVICE_STATUS, 1, 0)
    machine.program.answer(R.GET_VRING_BASE, VringState(0, 0))
    machine.bench.advance(STOP_NS - 1)
    assert machine.status
    machine.bench.advance(1)
    assert machine.status == 0
    assert not machine.program.up
    assert machine.bench.said == ["the back end does not stop its rings"]


@pytest.mark.parametrize(
    ("request_", "payload", "said"),
    [
        (R.GET_VRING_BASE, VringState(1, 0), "the base of ring 1, not 0"),
        (R.GET_FEATURES, 0, "request 1 where an answer to GET_VRING_BASE is due"),
    ],
)
def test_a_wrong_answer_ends_the_conversation(
    machine: Machine, request_: Request, payload: Any, said: str
) -> None:
    """Threat 7."""
    machine.start()
    machine.program.answers = False
    machine.driver.put(spec.DEVICE_STATUS, 1, 0)
    machine.program.answer(request_, payload)
    assert machine.status == 0
    assert machine.bench.said == [f"the back end has broken the protocol: {said}"]


def test_an_answer_to_nothing_ends_the_conversation(machine: Machine) -> None:
    """Threat 7."""
    machine.start()
    machine.program.answer(R.GET_VRING_BASE, VringState(0, 0))
    assert machine.bench.said == [
        "needs a reset: the back end has broken the protocol: request 11, and nothing was asked"
    ]


@pytest.mark.parametrize("after", range(14))
def test_a_back_end_that_ends_between_any_two_messages(machine: Machine, after: int) -> None:
    """Threat 8."""
    program, send = machine.program, machine.program.send

    def stuck(message: bytes, shared: Any = ()) -> None:
        if len(program.asked) == after:
            program.hang_up("does not take what it is sent")
        send(message, shared)

    program.send = stuck
    machine.driver.start(V1, size=8)
    assert machine.status & spec.DEVICE_NEEDS_RESET
    assert len(program.asked) == after
    machine.driver.reset()
    assert machine.model.deadline_ns is None
    assert machine.bench.said == ["needs a reset: the back end does not take what it is sent"]


def test_a_back_end_that_does_not_take_the_question_for_its_rings_has_stopped(machine: Machine) -> None:
    machine.start()
    machine.program.send = lambda *_: machine.program.hang_up("does not take what it is sent")
    machine.driver.reset()
    assert machine.model.deadline_ns is None


def test_a_function_restored_while_its_rings_ran_needs_a_reset(machine: Machine) -> None:
    machine.start()
    saved = machine.model.save()
    other = machine.bench.fork()
    assert other.model.save() == saved
    assert other.program.asked == []
    driver = PciDriver(other.model, other.memory)
    assert driver.status & spec.DEVICE_NEEDS_RESET
    driver.start(V1, size=8)
    assert other.program.asked
    assert not driver.status & spec.DEVICE_NEEDS_RESET
    running = saved.replace(b'"status":79', b'"status":15')
    assert running != saved
    with pytest.raises(ValueError, match="rings that run"):
        machine.bench.fork().model.restore(running)
