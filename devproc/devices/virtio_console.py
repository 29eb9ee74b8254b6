"""Up to four ports of bytes, consoles or not, on one function (virtio 1.2, section 5.3).

Left out: VIRTIO_CONSOLE_F_EMERG_WRITE, because a kernel that prints before its drivers has COM1; ports that
come and go, which Linux's own names (hvc0) would not survive.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from struct import Struct
from typing import Annotated, Any, Final

from devproc import state
from devproc.catalog import CONSOLE, CONSOLE_PORTS
from devproc.ports import Input, Output
from devproc.record import record
from devproc.regs import Register
from devproc.state import U16, Length, Range
from devproc.virtio.chain import Chain, part
from devproc.virtio.device import TransportState, VirtioDevice, virtio_tables

F_SIZE, F_MULTIPORT = 1 << 0, 1 << 1
CONTROL_RX, CONTROL_TX = 2, 3
CONTROL: Final = Struct("<IHH")  # 5.3.6.2: id, event, value
DEVICE_READY, PORT_ADD, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = 0, 1, 3, 4, 5, 6, 7
# 5.3.6.2: columns, rows.  Linux took rows first until 6.15 and the stable releases of that time; in the
# configuration, which is what counts without F_MULTIPORT, columns always were.
SIZE: Final = Struct("<HH")
INPUT_MAX: Final = 4096  # bytes taken from the host at a time
OUTPUT_MAX: Final = 65536  # bytes copied for the host at a time


@record
class PortState:
    added: bool
    ready: bool
    opened: bool
    sent: Annotated[int, Range(0, 1 << 32)]
    columns: U16
    rows: U16


@record
class VirtioConsoleState:
    """`owed` has the port number times 8 plus the event."""

    transport: TransportState
    ports: Annotated[tuple[PortState, ...], Length(1, CONSOLE_PORTS)]
    owed: Annotated[tuple[Annotated[int, Range(0, 8 * CONSOLE_PORTS - 1)], ...], Length(0, 8 * CONSOLE_PORTS)]


class _Port:
    """One port: what it is connected to, and how far the driver and it have come."""

    def __init__(self, number: int, name: bytes, input: Input, output: Output) -> None:
        self.name: Final = name
        self.input: Final = input
        self.output: Final = output
        self.rx: Final = 2 * number + 2 if number else 0
        self.tx: Final = self.rx + 1
        self.columns = self.rows = 0
        self.forget()

    def forget(self) -> None:
        """The driver starts anew."""
        self.added = self.ready = self.opened = False
        self.room: Chain | None = None  # for what comes in next
        self.leaving: Chain | None = None  # on its way out
        self.sent = 0  # bytes of `leaving` that the output has taken


class VirtioConsole(VirtioDevice):
    """All ports of a machine's virtio consoles; a port without a name is a console.

    A console's output waits while the host does not drain it, and so does the guest that printed it: it is
    not lost, and not gathered here.

    Ports:
        input: what the guest receives, by port.  It is read only into a buffer that the driver has provided,
            on a port that it has open: nothing typed is lost.
        output: what the guest transmits, by port.

    Settings:
        size: the window of a port: columns, rows << 16, number of the port << 32.

    Threats:
        1. The guest transmits faster than the host drains → the buffer waits in its ring, half of it sent.
        2. A transmitted buffer of gigabytes → OUTPUT_MAX bytes are copied at a time, and what the
           output does not take waits in guest memory.
        3. The guest provides no buffers, or has the port closed → input stays on the host.
        4. A receive buffer without room, or one too short for a control message → DEVICE_NEEDS_RESET.
        5. Control messages that are short, or of ports and events there are not → nothing, counted.
        6. Control messages without end, and no buffers for the answers → each answer is owed once.
        7. Queues of ports there are not, or of F_MULTIPORT without it → they are not looked at.
        8. A reset with input on its way → it stays on the host.
    """

    VIRTIO = CONSOLE
    TABLES = virtio_tables(
        CONSOLE,
        (
            Register("cols", 0, "RO", "columns of port 0; 0: not known", "5.3.4", size=2, mask=0),
            Register("rows", 2, "RO", "its rows", "5.3.4", size=2, mask=0),
            Register("max_nr_ports", 4, "RO", "ports there are", "5.3.4", size=4, mask=0),
        ),
    )

    def __init__(
        self, *, input: Sequence[Input], output: Sequence[Output], names: bytes, **transport: Any
    ) -> None:
        super().__init__(features=F_SIZE | F_MULTIPORT, **transport)
        self._ports: Final = [
            _Port(number, *port)
            for number, port in enumerate(zip(names.split(b"\0"), input, output, strict=False))
        ]
        self._owed: dict[tuple[int, int], None] = {}  # (port, event), to be sent in this order
        self._counts |= {"rx_bytes": 0, "tx_bytes": 0, "bad_messages": 0}
        for port in self._ports:
            port.input.listen(partial(self._wants_input, port), partial(self._on_input, port))
            port.output.listen(partial(self._transmit, port))

    def set(self, name: str, value: int) -> None:
        assert name == "size"
        number, rows, columns = value >> 32, value >> 16 & 0xFFFF, value & 0xFFFF
        if number >= len(self._ports):
            return
        port = self._ports[number]
        port.columns, port.rows = columns, rows
        if number == 0:
            self.config_changed()
        if port.ready and not port.name:
            self._owe(number, RESIZE)
            self._send_control()

    def read_cols(self) -> int:
        return self._ports[0].columns

    def read_rows(self) -> int:
        return self._ports[0].rows

    def read_max_nr_ports(self) -> int:
        return len(self._ports)

    def on_reset(self) -> None:
        self._owed.clear()
        for port in self._ports:
            port.forget()

    def on_queue(self, index: int) -> None:
        if index > 1 and not self._multiport:
            return
        if index == CONTROL_RX:
            self._send_control()
        elif index == CONTROL_TX:
            self._take_control()
        elif (number := max(0, index // 2 - 1)) < len(self._ports):
            port = self._ports[number]
            if index == port.tx:
                self._transmit(port)
            else:
                self._provide(port)

    # -- what the guest receives

    def _provide(self, port: _Port) -> None:
        """Have the driver's next buffer at hand."""
        if port.room is None:
            port.room = self.pop(port.rx)
        if port.room is not None and not port.room.write_size:
            self.fail(f"queue {port.rx}: a receive buffer without room")

    def _wants_input(self, port: _Port) -> bool:
        return self.active and port.room is not None and (port.opened or not self._multiport)

    def _on_input(self, port: _Port) -> None:
        if not self._wants_input(port):
            return
        room = port.room
        assert room is not None
        if data := port.input.read(min(room.write_size, INPUT_MAX)):
            self._counts["rx_bytes"] += self.memory.copy_in(room.writable, data)
            self.push(port.rx, room, len(data))
            self.notify(port.rx)
            port.room = None
            self._provide(port)

    # -- what it transmits

    def _transmit(self, port: _Port) -> None:
        """Let out what the output has room for; called again when it has more."""
        if self.active and (port.leaving is None or self._let_out(port, port.leaving)):
            for chain in self.chains(port.tx):
                if not self._let_out(port, chain):
                    break
            self.notify(port.tx)

    def _let_out(self, port: _Port, chain: Chain) -> bool:
        """Whether all of the buffer has gone."""
        port.leaving = chain
        while port.sent < chain.read_size:
            data = self.memory.copy_out(part(chain.readable, port.sent, OUTPUT_MAX), OUTPUT_MAX)
            taken = port.output.write(data)
            port.sent += taken
            self._counts["tx_bytes"] += taken
            if taken < len(data):
                return False
        self.push(port.tx, chain, 0)
        port.leaving = None
        port.sent = 0
        return True

    # -- control messages

    @property
    def _multiport(self) -> bool:
        return bool(self.features & F_MULTIPORT)

    def _take_control(self) -> None:
        for chain in self.chains(CONTROL_TX):
            data = self.memory.copy_out(chain.readable, CONTROL.size)
            self.push(CONTROL_TX, chain, 0)
            if len(data) < CONTROL.size or not self._obey(*CONTROL.unpack(data)):
                self._counts["bad_messages"] += 1
        self.notify(CONTROL_TX)
        self._send_control()

    def _obey(self, id: int, event: int, value: int) -> bool:
        """Whether the message made sense."""
        if event == DEVICE_READY:
            for number, port in enumerate(self._ports):
                if value and not port.added:
                    port.added = True
                    self._owe(number, PORT_ADD)
            return True
        if id >= len(self._ports) or not self._ports[id].added:
            return False
        port = self._ports[id]
        if event == PORT_OPEN:
            port.opened = bool(value)
        elif event == PORT_READY:
            port.ready = bool(value)
            if port.ready:
                for answer in (PORT_NAME,) if port.name else (CONSOLE_PORT, RESIZE):
                    self._owe(id, answer)
                self._owe(id, PORT_OPEN)
        else:
            return False
        return True

    def _owe(self, number: int, event: int) -> None:
        self._owed[number, event] = None

    def _send_control(self) -> None:
        """Tell the driver as much of what it is owed as it has provided buffers for."""
        while self._owed and (chain := self.pop(CONTROL_RX)) is not None:
            number, event = next(iter(self._owed))
            port = self._ports[number]
            message = CONTROL.pack(number, event, 1)
            if event == PORT_NAME:
                message += port.name
            elif event == RESIZE:
                message += SIZE.pack(port.columns, port.rows)
            if chain.write_size < len(message):
                self.push(CONTROL_RX, chain, 0)
                self.fail(f"queue {CONTROL_RX}: {chain.write_size} bytes for a message of {len(message)}")
                return
            del self._owed[number, event]
            self.memory.copy_in(chain.writable, message)
            self.push(CONTROL_RX, chain, len(message))
        self.notify(CONTROL_RX)

    # -- state

    def save(self) -> bytes:
        for port in self._ports:
            for index, chain in ((port.rx, port.room), (port.tx, port.leaving)):
                if chain is not None and (queue := self.queues[index]) is not None:
                    queue.unpop(chain)
                    self.go_on(index)
            port.room = port.leaving = None
        return state.pack(
            VirtioConsoleState(
                transport=self.save_transport(),
                ports=tuple(
                    PortState(p.added, p.ready, p.opened, p.sent, p.columns, p.rows) for p in self._ports
                ),
                owed=tuple(8 * number + event for number, event in self._owed),
            )
        )

    def restore(self, data: bytes) -> None:
        s = state.unpack(VirtioConsoleState, data)
        if len(s.ports) != len(self._ports):
            raise ValueError(f"{len(s.ports)} ports, expected {len(self._ports)}")
        owed = dict.fromkeys(divmod(message, 8) for message in s.owed)
        for number, event in owed:
            if number >= len(self._ports) or event not in (
                PORT_ADD,
                CONSOLE_PORT,
                RESIZE,
                PORT_OPEN,
                PORT_NAME,
            ):
                raise ValueError(f"no message {event} of port {number} can be owed")
        self.restore_transport(s.transport)
        self._owed = owed
        for port, p in zip(self._ports, s.ports, strict=True):
            port.forget()
            port.added, port.ready, port.opened, port.sent = p.added, p.ready, p.opened, p.sent
            port.columns, port.rows = p.columns, p.rows

    def counters(self) -> dict[str, int]:
        return {**super().counters(), **self._counts}
