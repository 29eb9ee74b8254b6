"""The transport of a function whose rings another program serves: a vhost-user front end.

Spec: QEMU's docs/interop/vhost-user.rst, "Starting and stopping rings", "Front-end message types"; virtio
1.2, section 4.1.  The back end has the driver's rings and all of guest memory, kicks reach it by the queues'
own eventfds, and it interrupts by those of the MSI-X vectors; nothing of this process is in between, but for
INTA.  No message is waited for in an access: what a back end fails at it says by closing the socket, and a
reset is done (2.1.2, 4.1.4.3.2) once it has stopped every ring.  Left out: what it may ask of a front end, so
its configuration never changes; reconnecting; dirty logging, REPLY_ACK, in-flight tracking; and its rings
across save and restore, after which the function needs a reset.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Final

from devproc import state
from devproc.ports import BackEnd, Clock, Shared, SharedKick, SharedSignal
from devproc.record import record, replace
from devproc.vhost.message import (
    F_PROTOCOL_FEATURES,
    Header,
    MemoryRegion,
    MessageError,
    Payload,
    Request,
    VringAddr,
    VringFile,
    VringState,
    pack,
    parse_reply,
)
from devproc.virtio import spec
from devproc.virtio.device import MSIX_ENABLE, TransportState, VirtioDevice
from kvmcore.memory import GuestMemory

STOP_NS: Final = 10_000_000_000
"""How long a back end may take to finish what it is at and stop its rings."""
_SPLIT_START, _PACKED_START = 0, 0x8000_8000  # of a packed ring both wrap counters are 1


@record
class VhostUserState:
    transport: TransportState


class VhostUser(VirtioDevice):
    """One function.

    Ports:
        backend: the back end.
        kick: notifies the back end; written here only where no ioeventfd takes it.
        call: the back end's interrupts while there is no vector for them.
        clock: for the patience with it.
        features: of the rings and the device type, that it has offered and the model may pass on.
        rings: how many it serves, of the queues that there are.

    Threats: those of `VirtioDevice`, and of a guest
        1. A queue is enabled that the back end does not serve → it is never told of it.
        2. The function is reset while the back end is busy → device_status is not 0 until it has stopped.
        3. Vectors and MSI-X are changed under a running back end → it is told of the new eventfd; a guest
           that does so without end makes it fall behind, and only this function needs a reset.
        4. Bus mastering is taken away → the rings are stopped, and go on where they were when it is back.
    and of a back end, which has guest memory as it is
        5. It ends or breaks the protocol → one line in the log, the function needs a reset, the VM lives.
        6. It never stops its rings → after STOP_NS as if it had ended; the guest's reset is done.
        7. It answers what it was not asked, or for another ring → it has broken the protocol.
        8. It does not take what it is sent → nothing waits; as if it had ended.
    """

    TRANSPORT: ClassVar[int] = spec.F_VERSION_1

    def __init__(
        self,
        *,
        backend: BackEnd,
        memory: GuestMemory,
        irq: Sequence[SharedSignal],
        kick: Sequence[SharedSignal],
        call: Sequence[SharedKick],
        clock: Clock,
        features: int,
        rings: int,
        **transport: Any,
    ) -> None:
        # What comes in by a queue is here the back end's call, not the driver's kick.
        super().__init__(memory=memory, irq=irq, kick=call, features=features, **transport)
        self._backend: Final = backend
        self._vectors: Final = irq
        self._kicks: Final = kick
        self._call_ports: Final = call
        self._clock: Final = clock
        self._rings: Final = rings
        self._bases = [0] * rings
        self._calls: dict[int, Shared | None] = {}  # of each ring that runs, what it interrupts by
        self._stopping: list[int] = []  # rings whose base is awaited, in the order of the answers
        self._stop_by_ns: int | None = None
        self._resetting = False
        backend.listen(self._on_answer, self._on_gone)

    # -- as the base calls it

    def on_activate(self) -> None:
        start = _PACKED_START if self.features & spec.F_RING_PACKED else _SPLIT_START
        self._bases = [start] * self._rings
        if self._backend.up:
            self._follow()
        else:
            self.fail("the back end is gone")

    def on_kick(self, index: int) -> None:
        """The back end has called, by the eventfd it had when this was how the driver is interrupted."""
        if self.active:
            self._interrupt(self._setups[index].vector, spec.ISR_QUEUE)

    @property
    def deadline_ns(self) -> int | None:
        return self._stop_by_ns

    def on_deadline(self, now_ns: int) -> None:
        self._backend.hang_up("does not stop its rings")

    # -- registers

    def write_PCICMD(self, data: int) -> None:
        super().write_PCICMD(data)
        self._follow()

    def write_MSIX_CONTROL(self, _data: int) -> None:
        self._update_calls()

    def write_queue_msix_vector(self, data: int) -> None:
        super().write_queue_msix_vector(data)
        self._update_calls()

    def write_notify(self, offset: int, _data: int) -> None:
        self._kicks[(offset - spec.BAR_NOTIFY) // spec.NOTIFY_OFF_MULTIPLIER]()

    def _reset(self) -> None:
        self._resetting = True
        self._follow()

    # -- the rings

    def _follow(self) -> None:
        """Have the back end run its rings if the driver and its bus mastering say so, and only then."""
        wanted = self.active and not self._resetting
        if self._calls and not wanted:
            self._stopping = list(self._calls)
            self._calls.clear()
            self._stop_by_ns = self._clock() + STOP_NS
            for ring in list(self._stopping):
                self._tell(Request.GET_VRING_BASE, VringState(ring, 0))
        elif not self._stopping:
            if self._resetting:
                self._resetting = False
                super()._reset()
            elif wanted and not self._calls and self._backend.up:
                self._start()

    def _start(self) -> None:
        self._tell(Request.SET_FEATURES, self.features | F_PROTOCOL_FEATURES)
        # A front end's addresses are its own to choose: here they are the guest's.
        regions = tuple(MemoryRegion(r.gpa, r.size, r.gpa, r.offset) for r in self.memory.regions)
        self._tell(Request.SET_MEM_TABLE, regions, *[self.memory] * len(regions))
        for ring in range(self._rings):
            if self.queues[ring] is None:
                continue
            setup = self._setups[ring]
            desc, driver, device = setup.areas
            self._tell(Request.SET_VRING_NUM, VringState(ring, setup.size))
            self._tell(Request.SET_VRING_BASE, VringState(ring, self._bases[ring]))
            self._tell(Request.SET_VRING_ADDR, VringAddr(ring, 0, desc, device, driver, 0))
            self._set_call(ring, self._call_of(ring))
            self._tell(Request.SET_VRING_KICK, VringFile(ring, True), self._kicks[ring])
            self._tell(Request.SET_VRING_ENABLE, VringState(ring, 1))
            self._kicks[ring]()  # the driver may have made chains available before anyone listened

    def _call_of(self, ring: int) -> Shared | None:
        """What its interrupts go to now."""
        if not self.stored["MSIX_CONTROL"] & MSIX_ENABLE:
            return self._call_ports[ring]
        vector = self._setups[ring].vector
        return None if vector == spec.MSI_NO_VECTOR else self._vectors[vector]

    def _set_call(self, ring: int, call: Shared | None) -> None:
        self._tell(Request.SET_VRING_CALL, VringFile(ring, call is not None), *[call] if call else [])
        if self._backend.up:
            self._calls[ring] = call

    def _update_calls(self) -> None:
        for ring, told in list(self._calls.items()):
            if (call := self._call_of(ring)) is not told:
                self._set_call(ring, call)

    def _tell(self, request: Request, payload: Payload, *shared: Shared) -> None:
        self._backend.send(pack(request, payload), shared)

    # -- the back end

    def _on_answer(self, header: Header, body: bytes) -> None:
        if not self._stopping:
            raise MessageError(f"request {header.request}, and nothing was asked")
        answer = parse_reply(Request.GET_VRING_BASE, header, body)
        ring = self._stopping.pop(0)
        assert isinstance(answer, VringState)
        if answer.vring != ring:
            raise MessageError(f"the base of ring {answer.vring}, not {ring}")
        self._bases[ring] = answer.num
        if not self._stopping:
            self._stop_by_ns = None
            self._follow()

    def _on_gone(self, why: str) -> None:
        self._calls.clear()
        self._stopping.clear()
        self._stop_by_ns = None
        self._follow()  # a reset that was waited for is done
        if self._status & spec.DRIVER_OK:
            self.fail(f"the back end {why}")
        else:
            self._log(f"the back end {why}")

    # -- state

    def save(self) -> bytes:
        transport = self.save_transport()
        if transport.status & spec.DRIVER_OK:
            transport = replace(
                transport,
                status=transport.status | spec.DEVICE_NEEDS_RESET,
                queues=tuple(replace(q, position=None) for q in transport.queues),
            )
        return state.pack(VhostUserState(transport))

    def restore(self, data: bytes) -> None:
        transport = state.unpack(VhostUserState, data).transport
        if transport.status & (spec.DRIVER_OK | spec.DEVICE_NEEDS_RESET) == spec.DRIVER_OK:
            raise ValueError("rings that run, which only their back end knows")
        self.restore_transport(transport)
        self._follow()
