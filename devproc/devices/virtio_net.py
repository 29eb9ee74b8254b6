"""A virtio network card (virtio 1.2, section 5.1).

The host's end is a `Link`: a tap with checksum and segmentation offload, or a stream of plain frames.  A
tap's frames are moved in C (devproc/_frames.h), which has split rings alone, as long as there is nothing to
decide; what is to be dropped, filtered, limited or waited for is decided here.  Left out: UDP segmentation
(UFO, USO), receive-side scaling and hash reports, VLAN filtering (every tag passes), CTRL_RX_EXTRA,
announcements, speed and duplex, coalescing, and the legacy interface.
"""

from __future__ import annotations

import enum
from functools import partial
from struct import Struct
from typing import Annotated, Any, Final

from devproc import state
from devproc._ring import Ring
from devproc.backends.ratelimit import RateLimit
from devproc.catalog import NET, NET_PAIRS
from devproc.ports import Clock, Link
from devproc.record import record
from devproc.regs import Register
from devproc.state import Length, Range
from devproc.virtio.chain import Chain, Queue, Span, part
from devproc.virtio.device import BATCH, TransportState, VirtioDevice, virtio_tables
from devproc.virtio.spec import F_RING_PACKED

# 5.1.3 Feature bits
F_CSUM: Final = 1 << 0
F_GUEST_CSUM: Final = 1 << 1
F_CTRL_GUEST_OFFLOADS: Final = 1 << 2
F_MTU: Final = 1 << 3
F_MAC: Final = 1 << 5
F_GUEST_TSO4: Final = 1 << 7
F_GUEST_TSO6: Final = 1 << 8
F_GUEST_ECN: Final = 1 << 9
F_HOST_TSO4: Final = 1 << 11
F_HOST_TSO6: Final = 1 << 12
F_HOST_ECN: Final = 1 << 13
F_MRG_RXBUF: Final = 1 << 15
F_STATUS: Final = 1 << 16
F_CTRL_VQ: Final = 1 << 17
F_CTRL_RX: Final = 1 << 18
F_MQ: Final = 1 << 22
F_CTRL_MAC_ADDR: Final = 1 << 23

GUEST_OFFLOADS: Final = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN
"""What the driver may turn off again; as bits of a command (5.1.6.5.8) they are the same."""
_OFFLOADS: Final = GUEST_OFFLOADS | F_CTRL_GUEST_OFFLOADS | F_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN
_ALWAYS: Final = F_MAC | F_MRG_RXBUF | F_STATUS | F_CTRL_VQ | F_CTRL_RX | F_CTRL_MAC_ADDR

_NEEDS: Final = (  # 5.1.3.1: each of these needs one of those
    (F_GUEST_TSO4 | F_GUEST_TSO6, F_GUEST_CSUM),
    (F_GUEST_ECN, F_GUEST_TSO4 | F_GUEST_TSO6),
    (F_HOST_TSO4 | F_HOST_TSO6, F_CSUM),
    (F_HOST_ECN, F_HOST_TSO4 | F_HOST_TSO6),
    (F_CTRL_RX | F_CTRL_MAC_ADDR | F_MQ, F_CTRL_VQ),
)

S_LINK_UP: Final = 1  # 5.1.4

# 5.1.6 struct virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers
HEADER: Final = Struct("<BBHHHHH")
HDR_NEEDS_CSUM, HDR_DATA_VALID = 1, 2
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_ECN = 0, 1, 4, 0x80

_NUM_BUFFERS: Final = slice(10, 12)
_HOST_GSO: Final = {GSO_TCPV4: F_HOST_TSO4, GSO_TCPV6: F_HOST_TSO6}
_GUEST_GSO: Final = {GSO_TCPV4: F_GUEST_TSO4, GSO_TCPV6: F_GUEST_TSO6}

CTRL_OK, CTRL_ERR = 0, 1  # 5.1.6.5
CTRL_MAX: Final = 4096  # bytes of a command that is carried out

ETH_SIZE, _VLAN_SIZE = 14, 4
FRAME_MAX: Final = 65535 + ETH_SIZE + _VLAN_SIZE
_PEEK: Final = HEADER.size + 6  # read apart from the rest: the header and the destination address
_SPANS_MAX: Final = 1000  # IOV_MAX is 1024, and a few are ours
_BROADCAST: Final = b"\xff" * 6


class Command(enum.IntEnum):
    """Class and command of what the control queue takes, one byte each."""

    RX_PROMISC = 0x0000
    RX_ALLMULTI = 0x0001
    MAC_TABLE_SET = 0x0100
    MAC_ADDR_SET = 0x0101
    MQ_VQ_PAIRS_SET = 0x0400
    GUEST_OFFLOADS_SET = 0x0500


CONFIG: Final = (
    Register("mac", 0, "RO", "Ethernet address", "5.1.4", size=6),
    Register("status", 6, "RO", "LINK_UP", "5.1.4", size=2),
    Register("max_virtqueue_pairs", 8, "RO", "pairs of queues", "5.1.4", size=2),
    Register("mtu", 10, "RO", "the largest IP packet", "5.1.4", size=2),
)

Address = Annotated[bytes, Length(6, 6)]
Addresses = Annotated[tuple[Address, ...], Length(0, CTRL_MAX // 6)]


@record
class NetState:
    transport: TransportState
    mac: Address
    promisc: bool
    allmulti: bool
    unicast: Addresses
    multicast: Addresses
    offloads: Annotated[int, Range(0, GUEST_OFFLOADS)]
    active: Annotated[int, Range(1, NET_PAIRS)]
    plugged: bool


class _Receiver:
    """A receive queue's chains that are popped and not yet used, and the frame that waits for more of them.

    The frame with its header is `head`, then `direct` bytes that are in the chains already, then `tail`.
    """

    def __init__(self) -> None:
        self.chains: list[Chain] = []
        self.room = 0  # in them, bytes
        self.starved = False  # nothing can be received until the driver notifies
        self.size = 0  # of the frame; 0 when none waits
        self.head = bytearray(_PEEK)
        self.direct = 0
        self.tail = bytearray(HEADER.size + FRAME_MAX)

    def spans(self) -> list[Span]:
        return [span for chain in self.chains for span in chain.writable]

    def give_back(self, queue: Queue | None) -> None:
        """Have the chains popped again."""
        if queue is not None:
            for chain in reversed(self.chains):
                queue.unpop(chain)
        self.chains.clear()
        self.room = 0


class VirtioNet(VirtioDevice):
    """One card: queues receive 0, transmit 0, receive 1, ..., and after the last pair the control queue.

    Ports:
        link: queues of the host's interface, of which the first `pairs` are used.
        clock: for the limits.
        mac, mtu: of the card; an MTU of 0 is not offered.
        pairs: of queues, at most.
        bps, pps: bytes and frames a second, in each direction; 0 for no limit.

    A frame is read straight into the driver's buffers, but for header and destination address, which are
    looked at, and for what does not fit, which is copied into further buffers.  A merged frame that lacks
    buffers waits for them; one that can never fit is dropped.  Where the host has more queues than the driver
    uses, each is read for one of those.

    Threats:
        1. A header asks the host's kernel for offloads that were not negotiated, or for a checksum or
           segments outside the frame → the frame is dropped; what the kernel sees is a header of our making.
        2. A header changes while we look at it → it is copied once.
        3. Frames shorter than an Ethernet header, longer than 64 KiB or in a thousand pieces → dropped.
        4. Receive buffers too small for a frame → it is dropped, never cut off.
        5. Receive buffers that can take no frame at all, or with a readable part → needs a reset.
        6. No receive buffers → the host's queue fills up and drops; we wait for a notification.
        7. Frames without end, from the host or the driver → BATCH of a queue, then the others' turn.
        8. The host takes no more frames → chains stay in the ring; nothing is copied.
        9. Commands that are unknown, of a wrong size or not negotiated → VIRTIO_NET_ERR.
        10. Addresses to receive without end → VIRTIO_NET_ERR beyond 4 KiB.
        11. Offloads are turned off while frames that need them are on their way → these are dropped.
        12. Features without those they need → FEATURES_OK is not taken.
    """

    VIRTIO = NET
    TABLES = virtio_tables(NET, CONFIG)

    def __init__(
        self,
        *,
        link: tuple[Link, ...],
        clock: Clock,
        mac: bytes,
        mtu: int,
        pairs: int,
        bps: int,
        pps: int,
        packed: int,
        **transport: Any,
    ) -> None:
        super().__init__(
            features=_ALWAYS
            | (_OFFLOADS if link[0].offloads else 0)
            | (F_MTU if mtu else 0)
            | (F_MQ if pairs > 1 else 0),
            withheld=0 if packed else F_RING_PACKED,
            **transport,
        )
        self._links: Final = link[:pairs]
        self._clock: Final = clock
        self._own_mac: Final = mac
        self._mtu: Final = mtu
        self._plain: Final = not (bps or pps)
        self._limits: Final = RateLimit(bps, pps), RateLimit(bps, pps)  # of receive and of transmit queues
        self._plugged = True
        self._counts |= dict.fromkeys(
            ("rx_frames", "rx_dropped", "rx_filtered", "tx_frames", "tx_dropped", "tx_refused"), 0
        )
        self._forget()
        for source, port in enumerate(self._links):
            port.listen(
                partial(self._wants_frame, source),
                partial(self._on_frame, source),
                partial(self._transmit, source),
                self.config_changed,
            )

    def _forget(self) -> None:
        """As after a reset."""
        self._mac = self._own_mac
        self._promisc, self._allmulti = True, False  # nothing is filtered before the driver asks for it
        self._unicast: frozenset[bytes] = frozenset()
        self._multicast: frozenset[bytes] = frozenset()
        self._offloads = 0
        self._pairs = 1  # in use
        self._receivers = [_Receiver() for _ in self._links]

    # -- device configuration

    def read_mac(self) -> int:
        return int.from_bytes(self._mac, "little")

    def read_status(self) -> int:
        return S_LINK_UP if self._plugged and self._links[0].up else 0

    def read_max_virtqueue_pairs(self) -> int:
        return len(self._links)

    def read_mtu(self) -> int:
        return self._mtu

    def set(self, name: str, value: int) -> None:
        self._plugged = bool(value)
        self.config_changed()

    # -- the transport

    def _acceptable(self, features: int) -> bool:
        return super()._acceptable(features) and all(
            features & needed for feature, needed in _NEEDS if features & feature
        )

    def on_activate(self) -> None:
        self._offload(self.features & GUEST_OFFLOADS)

    def on_reset(self) -> None:
        self._forget()
        self._offload(0)

    def on_queue(self, index: int) -> None:
        pairs = len(self._links) if self.features & F_MQ else 1
        pair, transmits = divmod(index, 2)
        if pair < pairs and transmits:
            self._transmit(pair)
        elif pair < self._pairs:
            self._receivers[pair].starved = False
            for source in range(pair, len(self._links), self._pairs):
                self._receive(pair, source)
        elif index == 2 * pairs and self.features & F_CTRL_VQ:
            self._control(index)

    def _may(self, index: int) -> bool:
        """Whether a queue may move a frame now; one at its limit has a deadline."""
        if not self.active:
            return False
        ready_ns = self._limits[index % 2].ready_ns
        if ready_ns <= self._clock():
            return True
        self.go_on(index, ready_ns)
        return False

    def _plain_ring(self, index: int, link: Link) -> Ring | None:
        """The queue, if frames may be moved between it and the link in C (devproc/_frames.h)."""
        queue = self.queues[index]
        if isinstance(queue, Ring) and self._plain and self._plugged and link.tap >= 0:
            return queue
        return None

    # -- receiving (5.1.6.3, 5.1.6.4)

    def _wants_frame(self, source: int) -> bool:
        pair = source % self._pairs
        return self.active and not self._receivers[pair].starved and 2 * pair not in self._due

    def _on_frame(self, source: int) -> None:
        self._receive(source % self._pairs, source)

    def _receive(self, pair: int, source: int) -> None:
        """Frames of the host's queue `source` for the driver's `pair`, as many as make a turn."""
        index, r, left = 2 * pair, self._receivers[pair], BATCH
        while left > 0 and self._may(index):
            if not r.size:
                left -= self._read(pair, source, left)
                if not r.size:
                    break
            if not self._take(pair):
                break
            left -= 1
        if left <= 0:
            self.go_on(index)
        self.notify(index)

    def _read(self, pair: int, source: int, most: int) -> int:
        """Read a frame if there is one, after up to `most` that are delivered at once: how many these are."""
        r, link = self._receivers[pair], self._links[source]
        received, odd = 0, True
        if (ring := self._plain_ring(2 * pair, link)) and self.features & F_MRG_RXBUF:
            r.give_back(ring)
            longest = self._mtu + ETH_SIZE + _VLAN_SIZE if self.features & F_MTU else FRAME_MAX
            received, r.starved, odd, r.size, r.direct, chains = ring.receive(
                link.tap,
                r.head,
                r.tail,
                self._mac,
                self._promisc,
                self._allmulti,
                self._offloads,
                longest,
                most,
            )
            r.chains += chains
            r.room = sum(chain.write_size for chain in chains)
            self._counts["rx_frames"] += received
        if odd and self._gather(pair, _PEEK):
            views = self.memory.views(part(r.spans()[:_SPANS_MAX], _PEEK, FRAME_MAX))
            r.direct = sum(map(len, views))
            r.size = link.receive([r.head, *views, r.tail])
        return received

    def _take(self, pair: int) -> bool:
        """Deliver or drop the frame that was read; not so while it waits for buffers."""
        r = self._receivers[pair]
        if self._wanted(r):
            if self._gather(pair, r.size):
                self._limits[0].take(self._clock(), r.size)
                self._deliver(pair)
                self._counts["rx_frames"] += 1
            elif r.starved and sum(chain.descriptors for chain in r.chains) < self._ring_size(pair):
                return False  # the driver has more buffers to give
            else:
                r.starved = False  # it has none, and so would never notify
                self._counts["rx_dropped"] += 1
        r.size = 0
        return True

    def _gather(self, pair: int, size: int) -> bool:
        """Whether the popped chains have room for `size` bytes, after popping what is needed and allowed."""
        r = self._receivers[pair]
        merges = self.features & F_MRG_RXBUF
        while r.room < size:
            if r.chains and not merges:
                return False
            chain = self.pop(2 * pair)
            if chain is None:
                r.starved = True
                return False
            r.chains.append(chain)
            r.room += chain.write_size
            least = HEADER.size if merges else _PEEK
            if chain.readable or chain.write_size < least:
                self.fail(
                    f"a receive buffer of {chain.write_size} bytes, {chain.read_size} of them readable: "
                    f"expected {least} at least, none readable"
                )
                return False
        return True

    def _ring_size(self, pair: int) -> int:
        queue = self.queues[2 * pair]
        return 0 if queue is None else queue.size

    def _wanted(self, r: _Receiver) -> bool:
        """Whether the driver can handle the frame, and wants it."""
        flags, gso_type = r.head[:2]
        most = FRAME_MAX
        if self.features & F_MTU and gso_type in (GSO_NONE, GSO_ECN):
            most = self._mtu + ETH_SIZE + _VLAN_SIZE  # 5.1.4.1
        if (
            not HEADER.size + ETH_SIZE <= r.size <= HEADER.size + most
            or not self._plugged
            or (flags & HDR_NEEDS_CSUM and not self._offloads & F_GUEST_CSUM)
            or not _allowed(gso_type, self._offloads, _GUEST_GSO, F_GUEST_ECN)
        ):
            self._counts["rx_dropped"] += 1
            return False
        if not self._offloads & F_GUEST_CSUM:
            r.head[0] = 0  # 5.1.6.4.1: nor may it say that the checksum is right
        if not self._accepts(bytes(r.head[HEADER.size :])):
            self._counts["rx_filtered"] += 1
            return False
        return True

    def _accepts(self, destination: bytes) -> bool:
        if self._promisc:
            return True
        if destination[0] & 1:
            return self._allmulti or destination == _BROADCAST or destination in self._multicast
        return destination == self._mac or destination in self._unicast

    def _deliver(self, pair: int) -> None:
        r = self._receivers[pair]
        used: list[tuple[Chain, int]] = []
        left = r.size
        while left:
            chain = r.chains[len(used)]
            used.append((chain, min(left, chain.write_size)))
            left -= used[-1][1]
            r.room -= chain.write_size
        r.head[_NUM_BUFFERS] = len(used).to_bytes(2, "little")
        spans = r.spans()
        self.memory.copy_in(spans, r.head)
        rest = r.size - _PEEK - r.direct
        if rest > 0:
            self.memory.copy_in(part(spans, _PEEK + r.direct, rest), memoryview(r.tail)[:rest])
        queue = self.queues[2 * pair]
        assert queue is not None
        queue.push_together(used)
        del r.chains[: len(used)]

    # -- transmitting (5.1.6.2)

    def _transmit(self, pair: int) -> None:
        """Frames of the driver's `pair`, as many as make a turn; also when the host has room again."""
        index = 2 * pair + 1
        left = BATCH
        while left > 0 and self._may(index):
            left -= self._transmit_plain(pair, left)
            chain = self.pop(index) if left > 0 else None
            if chain is None:
                break
            if not self._transmit_one(pair, chain):
                queue = self.queues[index]
                assert queue is not None
                queue.unpop(chain)
                break
            self.push(index, chain, 0)
            left -= 1
        if left <= 0:
            self.go_on(index)
        self.notify(index)

    def _transmit_plain(self, pair: int, most: int) -> int:
        """Have up to `most` frames sent that are plain: how many."""
        link = self._links[pair]
        ring = self._plain_ring(2 * pair + 1, link)
        sent = ring.send(link.tap, self.features, most) if ring else 0
        self._counts["tx_frames"] += sent
        return sent

    def _transmit_one(self, pair: int, chain: Chain) -> bool:
        """Whether the frame has been sent or dropped; not so while the host has no room."""
        size = chain.read_size - HEADER.size
        header = None
        if ETH_SIZE <= size <= FRAME_MAX and not chain.writable and len(chain.readable) <= _SPANS_MAX:
            header = checked_header(self.memory.copy_out(chain.readable, HEADER.size), size, self.features)
        if header is None or not self._plugged:
            self._counts["tx_dropped"] += 1
            return True
        views = self.memory.views(part(chain.readable, HEADER.size, size))
        sent = self._links[pair].send([header, *views])
        if sent is False:
            return False
        self._limits[1].take(self._clock(), size)
        self._counts["tx_frames" if sent else "tx_refused"] += 1
        return True

    # -- control (5.1.6.5)

    def _control(self, index: int) -> None:
        for chain in self.chains(index):
            if chain.read_size < 2 or not chain.writable:
                self.fail(f"a command of {chain.read_size} bytes, {chain.write_size} for the answer")
                return
            done = chain.read_size <= CTRL_MAX and self._command(
                self.memory.copy_out(chain.readable, CTRL_MAX)
            )
            self.memory.copy_in(chain.writable, bytes([CTRL_OK if done else CTRL_ERR]))
            self.push(index, chain, 1)
        self.notify(index)

    def _command(self, command: bytes) -> bool:
        """Whether it was carried out."""
        accepted, data = self.features, command[2:]
        value = int.from_bytes(data[:8], "little")
        match int.from_bytes(command[:2], "big"), len(data):
            case Command.RX_PROMISC, 1 if accepted & F_CTRL_RX:
                self._promisc = bool(value)
            case Command.RX_ALLMULTI, 1 if accepted & F_CTRL_RX:
                self._allmulti = bool(value)
            case Command.MAC_TABLE_SET, _ if accepted & F_CTRL_RX and (tables := _tables(data)) is not None:
                self._unicast, self._multicast = tables
            case Command.MAC_ADDR_SET, 6 if accepted & F_CTRL_MAC_ADDR:
                self._mac = data
            case Command.MQ_VQ_PAIRS_SET, 2 if accepted & F_MQ and 1 <= value <= len(self._links):
                self._pairs = value
                for r in self._receivers[value:]:
                    r.size = 0
                    r.starved = False  # what is notified of a queue that is not in use is lost
            case Command.GUEST_OFFLOADS_SET, 8 if accepted & F_CTRL_GUEST_OFFLOADS and not value & ~(
                accepted & GUEST_OFFLOADS
            ):
                self._offload(value)
            case _:
                return False
        return True

    def _offload(self, offloads: int) -> None:
        self._offloads = offloads
        self._links[0].offload(
            checksum=bool(offloads & F_GUEST_CSUM),
            tso4=bool(offloads & F_GUEST_TSO4),
            tso6=bool(offloads & F_GUEST_TSO6),
            ecn=bool(offloads & F_GUEST_ECN),
        )

    # -- state

    def save(self) -> bytes:
        self._give_back()
        return state.pack(
            NetState(
                transport=self.save_transport(),
                mac=self._mac,
                promisc=self._promisc,
                allmulti=self._allmulti,
                unicast=tuple(sorted(self._unicast)),
                multicast=tuple(sorted(self._multicast)),
                offloads=self._offloads,
                active=self._pairs,
                plugged=self._plugged,
            )
        )

    def _give_back(self) -> None:
        """Return popped chains to their rings, from which they will be popped again; a frame is lost."""
        for queue, r in zip(self.queues[::2], self._receivers, strict=False):
            self._counts["rx_dropped"] += bool(r.size)
            r.size = 0
            r.starved = False
            r.give_back(queue)

    def restore(self, data: bytes) -> None:
        s = state.unpack(NetState, data)
        if s.active > len(self._links) or s.offloads & ~(s.transport.features & GUEST_OFFLOADS):
            raise ValueError(f"{s.active} pairs, offloads {s.offloads:#x}: the card cannot be in that state")
        self.restore_transport(s.transport)
        self._forget()
        self._mac = s.mac
        self._promisc = s.promisc
        self._allmulti = s.allmulti
        self._unicast = frozenset(s.unicast)
        self._multicast = frozenset(s.multicast)
        self._pairs = s.active
        self._plugged = s.plugged
        self._offload(s.offloads)


def checked_header(header: bytes, size: int, features: int) -> bytes | None:
    """The header of a frame of `size` bytes as the host may see it; None if the frame is to be dropped.

    What the driver must do is in 5.1.6.2.1; `hdr_len` is a hint (5.1.6.2.2), so it is made to fit.
    """
    flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, _ = HEADER.unpack(header)
    if not _allowed(gso_type, features, _HOST_GSO, F_HOST_ECN):
        return None
    if not flags & HDR_NEEDS_CSUM:
        return None if gso_type else bytes(HEADER.size)
    if not features & F_CSUM or csum_start < ETH_SIZE or csum_start + csum_offset + 2 > size:
        return None
    if not gso_type:
        gso_size = 0
    elif not 0 < gso_size <= size - csum_start:
        return None
    return HEADER.pack(HDR_NEEDS_CSUM, gso_type, min(hdr_len, size), gso_size, csum_start, csum_offset, 0)


def _allowed(gso_type: int, features: int, kinds: dict[int, int], ecn: int) -> bool:
    """Whether `features` have this kind of segmentation."""
    if gso_type == GSO_NONE:
        return True
    if gso_type & GSO_ECN and not features & ecn:
        return False
    return bool(features & kinds.get(gso_type & ~GSO_ECN, 0))


def _tables(data: bytes) -> tuple[frozenset[bytes], frozenset[bytes]] | None:
    """The unicast and the multicast table of MAC_TABLE_SET, if that is all there is."""
    found = []
    for _ in range(2):
        end = 4 + 6 * int.from_bytes(data[:4], "little")
        if len(data) < end:
            return None
        found.append(frozenset(data[i : i + 6] for i in range(4, end, 6)))
        data = data[end:]
    return None if data else (found[0], found[1])
