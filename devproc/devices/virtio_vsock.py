"""Sockets between programs in the guest and programs on the host (virtio 1.2, section 5.10).

On the host a port of the guest is reached by saying "CONNECT <port>" on a unix socket, which answers
"OK <port>" with the connection's port at the host, as Firecracker has it (docs/vsock.md there).  Left out:
VIRTIO_VSOCK_F_SEQPACKET, because a unix stream has no boundaries; connections that outlive a restore.
"""

from __future__ import annotations

import enum
import re
from collections import deque
from collections.abc import Sequence
from functools import partial
from struct import Struct
from typing import Any, Final

from devproc import state
from devproc.catalog import VSOCK
from devproc.ports import Exchange, Line
from devproc.record import record
from devproc.regs import Register
from devproc.virtio.chain import Chain, Span, part
from devproc.virtio.device import BATCH, TransportState, VirtioDevice, virtio_tables

F_STREAM: Final = 1 << 0
RX, TX, EVENT = 0, 1, 2
# 5.10.6: src_cid, dst_cid, src_port, dst_port, len, type, op, flags, buf_alloc, fwd_cnt
HEADER: Final = Struct("<QQIIIHHIII")
HOST_CID: Final = 2
TYPE_STREAM: Final = 1
SHUTDOWN_RCV, SHUTDOWN_SEND = 1, 2
TRANSPORT_RESET: Final = bytes(4)  # 5.10.6.7, an event

BUF_ALLOC: Final = 1 << 18  # bytes from the guest that a connection may hold
OWED_MAX: Final = 512  # packets that wait for the driver's buffers before none of its own are taken
HOST_PORT: Final = 1 << 30  # the first that a host program gets, as Firecracker has it

_U32: Final = 0xFFFF_FFFF
_WRITE_MAX: Final = 1 << 16
_CONNECT: Final = re.compile(rb"CONNECT ([0-9]{1,10})\n")
_CONNECT_MAX: Final = len("CONNECT 4294967295\n")


class Op(enum.IntEnum):
    """What a packet is for."""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


Key = tuple[int, int]
"""A connection's port at the host and its port in the guest."""
NOBODY: Final = -1, -1
"""The key of a connection whose host program has not yet said whom it wants."""


@record
class VirtioVsockState:
    """`interrupted`: there were connections, which the driver is to be told are no more."""

    transport: TransportState
    interrupted: bool


class _Stage(enum.Enum):
    DIALLED = "the exchange is asked for the host's end"
    GREETED = "a host program has called, and not yet said whom"
    REQUESTED = "the driver is asked for the guest's end"
    OPEN = "both ends are there"
    OVER = "the exchange may still bring the host's end"


class _Connection:
    """One connection; the names are the specification's, and `peer_` is the driver."""

    def __init__(self, stage: _Stage, key: Key = NOBODY) -> None:
        self.stage = stage
        self.key = key
        self.line: Line | None = None
        self.said = b""  # by a host program that has called
        self.unsent = bytearray()  # from the guest, for the host
        self.fwd_cnt = self.told_fwd_cnt = 0
        self.tx_cnt = 0
        self.peer_buf_alloc = self.peer_fwd_cnt = 0
        self.shut = 0  # what the guest has said that it will not do any more
        self.ended = False  # there is nothing more to come from the host
        self.begging = False  # the driver has been asked for credit

    def hear(self, buf_alloc: int, fwd_cnt: int) -> None:
        """What every packet says of the driver's room."""
        self.peer_buf_alloc, self.peer_fwd_cnt = buf_alloc, fwd_cnt
        if self.peer_free:
            self.begging = False

    @property
    def peer_free(self) -> int:
        """Bytes that the driver has room for; whatever it says, never less than 0 nor more than it says."""
        return max(0, self.peer_buf_alloc - (self.tx_cnt - self.peer_fwd_cnt & _U32))


class VirtioVsock(VirtioDevice):
    """The host's end of all connections.

    What comes from the host is read straight into the driver's buffers, when it has provided some and has
    given credit.  What the guest sends is written straight out of them; what the host does not take is kept,
    as much of it as we have given credit for.

    Ports:
        exchange: connects the guest with host programs.
        line: places for connections, of which there can be no more.
        cid: the guest's context id.

    Threats:
        1. Packets that are short, or longer than their chain, or of or to another context → dropped, counted.
        2. A header changes while we look at it → it is copied once.
        3. Packets of an unknown type, to no connection, or out of turn → RST, and what there was is over.
        4. More bytes than there is credit for → RST; at most BUF_ALLOC are kept for a connection.
        5. buf_alloc and fwd_cnt that cannot be → at most that driver's buffers are filled, and its own
           connections stand still.
        6. Connections without end → RST beyond the places there are, of which those dialled have one each.
        7. Packets without end that call for an answer, and no buffers for it → OWED_MAX are remembered, then
           nothing is taken from the driver until it provides buffers.
        8. Packets or host data without end → BATCH of a queue or connection, then the others' turn.
        9. Receive buffers without room for a packet, or with a readable part → DEVICE_NEEDS_RESET.
        10. A reset with connections at any stage → all are closed, and those on their way when they come.
        11. A host program takes nothing → its connection's bytes wait, the others go on.
        12. A host program says anything but CONNECT and a port, or goes away → its connection is closed.
    """

    VIRTIO = VSOCK
    TABLES = virtio_tables(
        VSOCK, (Register("guest_cid", 0, "RO", "the guest's context id", "5.10.4", size=8, mask=0),)
    )

    def __init__(self, *, exchange: Exchange, line: Sequence[Line], cid: int, **transport: Any) -> None:
        super().__init__(features=F_STREAM, **transport)
        self._exchange: Final = exchange
        self._lines: Final = {place.number: place for place in line}
        self._cid: Final = cid
        self._connections: dict[Key, _Connection] = {}
        self._by_line: dict[int, _Connection] = {}
        self._dialled: deque[_Connection] = deque()  # in the order in which the exchange answers
        self._owed: dict[tuple[Key, Op, int], None] = {}  # and the type, in their order
        self._held = False  # so many that nothing more is taken from the driver
        self._starved = False  # nothing can be sent until the driver notifies
        self._interrupted = False
        self._next_port = HOST_PORT  # for the next host program that calls
        self._counts |= {"rx_bytes": 0, "tx_bytes": 0, "bad_packets": 0, "resets": 0}
        exchange.listen(self._on_call)
        for place in line:
            place.listen(
                partial(self._wants_read, place),
                partial(self._wants_write, place),
                partial(self._on_readable, place),
                partial(self._on_writable, place),
            )

    def read_guest_cid(self) -> int:
        return self._cid

    def on_reset(self) -> None:
        self._forget()
        self._interrupted = False

    def on_queue(self, index: int) -> None:
        if index == RX:
            self._starved = False
            self._send_owed()
        elif index == TX:
            self._take()
        else:
            self._send_event()

    def _forget(self) -> None:
        """There are no connections any more; who was dialled will be hung up on."""
        for connection in (*self._by_line.values(), *self._connections.values()):
            self._hang_up(connection)
        self._connections.clear()
        self._owed.clear()
        self._held = False
        self._next_port = HOST_PORT

    # -- from the driver

    def _take(self) -> None:
        if self._held:
            return
        for chain in self.chains(TX):
            if not self._packet(chain):
                self._counts["bad_packets"] += 1
            self.push(TX, chain, 0)
        self._held = len(self._owed) >= OWED_MAX
        self.notify(TX)
        self._send_owed()

    def _packet(self, chain: Chain) -> bool:
        """Whether it was one."""
        header = self.memory.copy_out(chain.readable, HEADER.size)
        if len(header) < HEADER.size:
            return False
        src_cid, dst_cid, src_port, dst_port, size, type, op, flags, *credit = HEADER.unpack(header)
        if src_cid != self._cid or dst_cid != HOST_CID or size > chain.read_size - HEADER.size:
            return False
        key = dst_port, src_port
        connection = self._connections.get(key)
        if type != TYPE_STREAM:
            if op != Op.RST:
                self._owe(key, Op.RST, type)
        elif op == Op.RST:
            if connection is not None:
                self._close(connection)
        elif connection is None and op == Op.REQUEST and self._dial(key):
            self._connections[key].hear(*credit)
        elif connection is None:
            self._abort(key)
        else:
            connection.hear(*credit)
            data = part(chain.readable, HEADER.size, size) if op == Op.RW else ()
            try:
                understood = self._obey(connection, op, flags, data, size)
            except OSError:  # the host program is gone
                understood = False
            if not understood:
                self._abort(key)
        return True

    def _obey(self, connection: _Connection, op: int, flags: int, data: Sequence[Span], size: int) -> bool:
        """Whether the packet makes sense for the connection as it is; raises OSError."""
        line = connection.line
        if line is None:
            return False
        if connection.stage is _Stage.REQUESTED and op == Op.RESPONSE:
            connection.stage = _Stage.OPEN
            said = b"OK %d\n" % connection.key[0]
            return line.send([said]) == len(said)
        if connection.stage is not _Stage.OPEN:
            return False
        match op:
            case Op.RW if not connection.shut & SHUTDOWN_SEND:
                return self._forward(connection, line, data, size)
            case Op.SHUTDOWN:
                connection.shut |= flags & (SHUTDOWN_RCV | SHUTDOWN_SEND)
                if connection.shut & SHUTDOWN_RCV:
                    line.shut(receive=True)
                self._settle(connection, line)
            case Op.CREDIT_REQUEST:
                self._owe(connection.key, Op.CREDIT_UPDATE)
            case Op.CREDIT_UPDATE:
                pass
            case _:
                return False
        return True

    def _forward(self, connection: _Connection, line: Line, data: Sequence[Span], size: int) -> bool:
        """Let the bytes out, or keep them; whether there was credit for them."""
        if len(connection.unsent) + size > BUF_ALLOC:
            return False
        sent = line.send(self.memory.views(data)) if size and not connection.unsent else 0
        connection.unsent += self.memory.copy_out(part(data, sent, size), size)
        self._sent(connection, sent)
        return True

    def _sent(self, connection: _Connection, count: int) -> None:
        """The host has taken `count` bytes: there is room for more."""
        self._counts["tx_bytes"] += count
        connection.fwd_cnt = connection.fwd_cnt + count & _U32
        if connection.fwd_cnt - connection.told_fwd_cnt & _U32 >= BUF_ALLOC // 4:
            self._owe(connection.key, Op.CREDIT_UPDATE)

    def _settle(self, connection: _Connection, line: Line) -> None:
        """Once all is written, the host hears of what the guest has ended; raises OSError."""
        if connection.unsent:
            return
        if connection.shut == SHUTDOWN_RCV | SHUTDOWN_SEND:
            self._abort(connection.key)  # 5.10.6.5: the answer that makes the ports free again
        elif connection.shut & SHUTDOWN_SEND:
            line.shut(send=True)

    # -- connections begin and end

    @property
    def _full(self) -> bool:
        """Whether every place is taken, or promised to one that is on its way."""
        return len(self._by_line) + len(self._dialled) >= len(self._lines)

    def _dial(self, key: Key) -> bool:
        """Have the exchange find the host's end; whether there is hope for one."""
        if self._full or not self._exchange.dial(key[0]):
            return False
        connection = self._connections[key] = _Connection(_Stage.DIALLED, key)
        self._dialled.append(connection)
        return True

    def _on_call(self, dialled: bool, number: int | None) -> None:
        """The exchange has an answer, or a host program has called."""
        connection = self._dialled.popleft() if dialled else _Connection(_Stage.GREETED)
        if number is not None:
            line = self._lines[number]
            line.open()
            if connection.stage is _Stage.OVER or not self.active:
                line.close()
            else:
                connection.line = line
                self._by_line[number] = connection
        if connection.stage is _Stage.DIALLED:
            if connection.line is None:
                self._abort(connection.key)
            else:
                connection.stage = _Stage.OPEN
                self._owe(connection.key, Op.RESPONSE)
        self._send_owed()

    def _greeted(self, connection: _Connection, line: Line) -> None:
        """Hear, byte by byte, whom a host program wants; what follows is for that one.  Raises OSError."""
        byte = bytearray(1)
        while not connection.said.endswith(b"\n"):
            count = line.receive([byte])
            if count is None:
                return
            if not count or len(connection.said) == _CONNECT_MAX:
                self._close(connection)
                return
            connection.said += byte
        found = _CONNECT.fullmatch(connection.said)
        if found is None or (port := int(found[1])) > _U32:
            self._close(connection)
            return
        while (key := (self._next_port, port)) in self._connections:
            self._next_port = self._port_after(self._next_port)
        self._next_port = self._port_after(self._next_port)
        connection.key = key
        connection.stage = _Stage.REQUESTED
        self._connections[key] = connection
        self._owe(connection.key, Op.REQUEST)

    @staticmethod
    def _port_after(port: int) -> int:
        return (port + 1) % HOST_PORT + HOST_PORT

    def _abort(self, key: Key) -> None:
        """Answer with RST; if there was a connection it is over."""
        connection = self._connections.get(key)
        if connection is not None:
            self._close(connection)
        self._counts["resets"] += 1
        self._owe(key, Op.RST)

    def _close(self, connection: _Connection) -> None:
        """The connection is over, and the driver knows, or is not to."""
        self._hang_up(connection)
        if connection.key != NOBODY:
            del self._connections[connection.key]
            for op in Op:
                self._owed.pop((connection.key, op, TYPE_STREAM), None)

    def _hang_up(self, connection: _Connection) -> None:
        connection.stage = _Stage.OVER
        if connection.line is not None:
            del self._by_line[connection.line.number]
            connection.line.close()
            connection.line = None

    # -- from and to the host

    def _wants_read(self, line: Line) -> bool:
        connection = self._by_line[line.number]
        if connection.stage is _Stage.GREETED:
            return True
        return (
            self.active
            and not self._starved
            and connection.stage is _Stage.OPEN
            and not connection.ended
            and not connection.shut & SHUTDOWN_RCV
            and connection.peer_free > 0
        )

    def _wants_write(self, line: Line) -> bool:
        return bool(self._by_line[line.number].unsent)

    def _on_readable(self, line: Line) -> None:
        connection = self._by_line[line.number]
        try:
            if connection.stage is _Stage.GREETED:
                self._greeted(connection, line)
            else:
                self._receive(connection, line)
        except OSError:  # the host program is gone, and has left bytes unread
            self._gone(connection)
        self._send_owed()

    def _on_writable(self, line: Line) -> None:
        connection = self._by_line[line.number]
        try:
            count = line.send([bytes(connection.unsent[:_WRITE_MAX])])
            del connection.unsent[:count]
            self._sent(connection, count)
            self._settle(connection, line)
        except OSError:
            self._gone(connection)
        self._send_owed()

    def _gone(self, connection: _Connection) -> None:
        if connection.key == NOBODY:
            self._close(connection)
        else:
            self._abort(connection.key)

    def _receive(self, connection: _Connection, line: Line) -> None:
        """Bytes of the host for the driver, as many packets as make a turn; raises OSError."""
        for _ in range(BATCH):
            chain = self._room() if self._wants_read(line) else None
            if chain is None:
                break
            size = min(connection.peer_free, chain.write_size - HEADER.size)
            try:
                count = line.receive(self.memory.views(part(chain.writable, HEADER.size, size)))
            except OSError:
                self._give_back(chain)
                raise
            if not count:
                self._give_back(chain)
                if count == 0:
                    connection.ended = True
                    self._owe(connection.key, Op.SHUTDOWN)
                break
            connection.tx_cnt = connection.tx_cnt + count & _U32
            self._counts["rx_bytes"] += count
            self._put(chain, connection.key, Op.RW, TYPE_STREAM, count)
        if not connection.peer_free and not connection.begging:
            connection.begging = True
            self._owe(connection.key, Op.CREDIT_REQUEST)

    # -- to the driver

    def _owe(self, key: Key, op: Op, type: int = TYPE_STREAM) -> None:
        self._owed[key, op, type] = None

    def _send_owed(self) -> None:
        """As much of what the driver is owed as it has provided buffers for."""
        while self._owed and (chain := self._room()) is not None:
            packet = next(iter(self._owed))
            del self._owed[packet]
            self._put(chain, *packet, 0)
        if self._held and len(self._owed) < OWED_MAX:
            self._held = False
            self.go_on(TX)
        self.notify(RX)

    def _room(self) -> Chain | None:
        """The driver's next buffer for a packet."""
        chain = self.pop(RX)
        if chain is None:
            self._starved = True
        elif chain.readable or chain.write_size <= HEADER.size:
            self.fail(
                f"a receive buffer of {chain.write_size} bytes, {chain.read_size} of them readable: "
                f"expected more than {HEADER.size}, none readable"
            )
            return None
        return chain

    def _give_back(self, chain: Chain) -> None:
        queue = self.queues[RX]
        assert queue is not None
        queue.unpop(chain)

    def _put(self, chain: Chain, key: Key, op: Op, type: int, size: int) -> None:
        """Send a packet whose payload is in place."""
        connection = self._connections.get(key)
        buf_alloc = fwd_cnt = 0
        if connection is not None:
            connection.told_fwd_cnt = fwd_cnt = connection.fwd_cnt
            buf_alloc = BUF_ALLOC
        flags = SHUTDOWN_SEND if op == Op.SHUTDOWN else 0
        header = HEADER.pack(HOST_CID, self._cid, *key, size, type, op, flags, buf_alloc, fwd_cnt)
        self.memory.copy_in(chain.writable, header)
        self.push(RX, chain, HEADER.size + size)

    def _send_event(self) -> None:
        if self._interrupted and (chain := self.pop(EVENT)) is not None:
            if chain.write_size < len(TRANSPORT_RESET):
                self.fail(f"a buffer of {chain.write_size} bytes for an event of {len(TRANSPORT_RESET)}")
                return
            self.memory.copy_in(chain.writable, TRANSPORT_RESET)
            self.push(EVENT, chain, len(TRANSPORT_RESET))
            self._interrupted = False
            self.notify(EVENT)

    # -- state

    def save(self) -> bytes:
        return state.pack(
            VirtioVsockState(
                transport=self.save_transport(), interrupted=self._interrupted or bool(self._connections)
            )
        )

    def restore(self, data: bytes) -> None:
        s = state.unpack(VirtioVsockState, data)
        self.restore_transport(s.transport)
        self._forget()
        self._interrupted = s.interrupted
