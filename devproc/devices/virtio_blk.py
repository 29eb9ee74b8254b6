"""A disk (virtio 1.2, section 5.2).

Requests are served one after the other, each before the next is looked at, so nothing is in flight between
two calls.  Reads and writes of a raw image without limits are served in C (devproc/_batch.h), which has split
rings alone, as long as nothing is wrong with them; whatever is different or fails is decided here.  Left out:
CONFIG_WCE, because whether a host's cache may be relied on is not the guest's to say; TOPOLOGY and GEOMETRY,
which describe hardware that is not there; SECURE_ERASE, which a file cannot promise; LIFETIME and ZONED; and
the legacy interface.
"""

from __future__ import annotations

import errno
from enum import IntEnum
from struct import Struct
from typing import Any, Final, NamedTuple

from devproc import state
from devproc._ring import Ring
from devproc.backends.qcow2 import Qcow2
from devproc.backends.ratelimit import RateLimit
from devproc.catalog import BLOCK
from devproc.ports import Clock, Disk, File
from devproc.record import record
from devproc.regs import Register
from devproc.virtio.chain import Chain, Span, part
from devproc.virtio.device import BATCH, TransportState, VirtioDevice, virtio_tables
from devproc.virtio.spec import F_RING_PACKED

# 5.2.3 Feature bits
F_SIZE_MAX: Final = 1 << 1
F_SEG_MAX: Final = 1 << 2
F_RO: Final = 1 << 5
F_BLK_SIZE: Final = 1 << 6
F_FLUSH: Final = 1 << 9
F_MQ: Final = 1 << 12
F_DISCARD: Final = 1 << 13
F_WRITE_ZEROES: Final = 1 << 14


class Type(IntEnum):
    """What a request asks for (5.2.6)."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


# 5.2.6 Device Operation
HEADER: Final = Struct("<IIQ")  # type, reserved, sector; the status is one byte
RANGE: Final = Struct("<QII")  # sector, num_sectors, flags
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2
UNMAP: Final = 1

SECTOR: Final = 512
ID_SIZE: Final = 20
SIZE_MAX: Final = 1 << 16
SEG_MAX: Final = BLOCK.queue_sizes[0] - 2  # the header and the status take a descriptor each
DATA_MAX: Final = SIZE_MAX * SEG_MAX
DISCARD_MAX: Final = 1 << 30
ZEROES_MAX: Final = 1 << 25  # they may have to be written
DISCARD_ALIGNMENT: Final = 4096

_NEEDS: Final = {Type.DISCARD: F_DISCARD, Type.WRITE_ZEROES: F_WRITE_ZEROES}
"""The feature that has to be negotiated for a type."""
_TYPES: Final = {int(t): t for t in Type}
_COUNTER: Final = {t: t.name.lower() for t in Type}
_COUNTED: Final = (*_COUNTER.values(), "refused_requests", "host_errors")
_TURN: Final = 1 << 22  # bytes of one queue before accesses and other queues get their turn
_LOGGED_MAX: Final = 10


class Request(NamedTuple):
    """A request whose every value has been checked.

    `offset` and `size` are bytes of the disk; `data` is where they come from or go to, `unmap` what a
    WRITE_ZEROES asks for.  The ones that have no place on the disk have an offset of 0.
    """

    type: Type
    offset: int
    size: int
    data: tuple[Span, ...]
    unmap: bool = False


def _field(name: str, offset: int, size: int, meaning: str, constant: int | None = None) -> Register:
    return Register(
        name, offset, "RO", meaning, "5.2.4", size=size, reset=constant or 0, stored=constant is not None
    )


def _image(disk: File, format: int, backing: File, backing_format: int, *, read_only: bool) -> Disk:
    """Raises HostError, as it does when it is not what it should be."""
    if not format:
        return disk
    base = backing if not backing_format else Qcow2(backing, read_only=True)
    return Qcow2(disk, base if base.size else None, read_only=read_only)


class _Refused(Exception):
    """The status of a request that is not carried out."""

    def __init__(self, status: int) -> None:
        self.status = status


@record
class BlkState:
    transport: TransportState


class VirtioBlk(VirtioDevice):
    """One disk.

    Ports:
        disk: the image, in `format` 0 raw, 1 qcow2.
        backing: what a qcow2 image is based on, in `backing_format`; empty if it is based on nothing.
        clock: for the limits.
        read_only: writes are refused.
        sparse: what the guest discards or unmaps may be given back to the host.
        block_size: bytes; a hint, any request may be for single sectors.
        queues: how many the driver may use.
        bps, iops: limits of bytes and requests a second; 0 for none.
        id: what GET_ID says, up to 20 bytes.

    Threats:
        1. A request lies outside the disk, or its sector number overflows → IOERR, nothing moves.
        2. Data that are not whole sectors, in the wrong direction, or more than SEG_MAX segments of SIZE_MAX
           → IOERR.
        3. A chain without room for header or status → needs reset.
        4. Header, status or data in pieces of any size (2.7.4) → the same as in one.
        5. The header or a range changes while we look → it is copied once.
        6. A write to a read-only disk → IOERR, the image was opened for reading.
        7. Ranges of a discard or WRITE_ZEROES with unknown flags, too long, too many → UNSUPP or IOERR.
        8. The image has become shorter, or the host is full or failing → IOERR; the image never grows.
        9. Requests without end → 64 or 4 MiB of them in turn, accesses in between; the limits hold.
        10. FLUSH was not negotiated → a write is on stable storage when it is done (5.2.6.2).
    """

    VIRTIO = BLOCK
    TABLES = virtio_tables(
        BLOCK,
        (
            _field("capacity", 0x00, 8, "sectors of 512 bytes"),
            _field("size_max", 0x08, 4, "bytes in a segment", SIZE_MAX),
            _field("seg_max", 0x0C, 4, "segments in a request", SEG_MAX),
            _field("blk_size", 0x14, 4, "bytes in a block"),
            _field("unused0", 0x21, 1, "padding", 0),
            _field("blk_num_queues", 0x22, 2, "num_queues"),
            _field("max_discard_sectors", 0x24, 4, "sectors in a range", DISCARD_MAX // SECTOR),
            _field("max_discard_seg", 0x28, 4, "ranges in a request", 1),
            _field("discard_sector_alignment", 0x2C, 4, "sectors", DISCARD_ALIGNMENT // SECTOR),
            _field("max_write_zeroes_sectors", 0x30, 4, "sectors in a range", ZEROES_MAX // SECTOR),
            _field("max_write_zeroes_seg", 0x34, 4, "ranges in a request", 1),
            _field("write_zeroes_may_unmap", 0x38, 1, "unmap may give room back"),
            _field("unused1", 0x39, 3, "padding", 0),
        ),
    )

    def __init__(
        self,
        *,
        disk: File,
        clock: Clock,
        read_only: int,
        sparse: int,
        block_size: int,
        queues: int,
        bps: int,
        iops: int,
        id: bytes,
        backing: File,
        format: int,
        backing_format: int,
        packed: int,
        **transport: Any,
    ) -> None:
        features = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | (F_MQ if queues > 1 else 0)
        if read_only:
            features |= F_RO
        else:
            features |= F_WRITE_ZEROES | (F_DISCARD if sparse else 0)
        plain = not (format or bps or iops)
        super().__init__(features=features, withheld=0 if packed else F_RING_PACKED, **transport)
        self._disk: Final = _image(disk, format, backing, backing_format, read_only=bool(read_only))
        self._plain: Final = disk if plain else None
        self._clock: Final = clock
        self._read_only: Final = bool(read_only)
        self._sparse: Final = bool(sparse)
        self._block_size: Final = block_size
        self._num_queues: Final = queues
        self._limit: Final = RateLimit(bps, iops)
        self._id: Final = id.ljust(ID_SIZE, b"\0")
        self._counts |= dict.fromkeys(_COUNTED, 0)

    # -- configuration

    def read_capacity(self) -> int:
        return self._disk.size // SECTOR

    def read_blk_size(self) -> int:
        return self._block_size

    def read_blk_num_queues(self) -> int:
        return self._num_queues

    def read_write_zeroes_may_unmap(self) -> int:
        return int(self._sparse)

    def set(self, _name: str, value: int) -> None:
        size = value * SECTOR
        before = self._disk.size
        if size == before:
            return
        try:
            if size < before:
                raise OSError(errno.EINVAL, "a disk does not become smaller")
            self._disk.extend(size)
        except OSError as e:
            self._log(f"it keeps its {before} bytes, not {size}: {e.strerror}")
            return
        self.config_changed()

    # -- queues

    def on_queue(self, index: int) -> None:
        left = _TURN
        while left > 0:
            if self._limit.ready_ns > self._clock():
                self.go_on(index, self._limit.ready_ns)
                break
            left = self._serve_plain(index, left)
            if left <= 0:
                continue
            chain = self.pop(index)
            if chain is None:
                break
            left -= max(self._serve(index, chain), _TURN // BATCH)
        else:
            self.go_on(index)
        self.notify(index)

    # -- requests

    def _serve_plain(self, index: int, left: int) -> int:
        """Have reads and writes served that need nothing but the image; what is left of the turn then."""
        queue = self.queues[index]
        if self._plain is None or not isinstance(queue, Ring) or not self.features & F_FLUSH:
            return left
        left, reads, writes = self._plain.serve(queue, left, _TURN // BATCH, writable=not self._read_only)
        self._counts["in"] += reads
        self._counts["out"] += writes
        return left

    def _serve(self, index: int, chain: Chain) -> int:
        """Carry out one request; how many bytes it moved."""
        if chain.read_size < HEADER.size or not chain.write_size:
            self.fail(f"queue {index}: a request without room for header and status")
            return 0
        size = 0
        try:
            request = self._parse(chain)
            if request.data:
                size = request.size
            self._carry_out(request)
            status = S_OK
            self._counts[_COUNTER[request.type]] += 1
        except _Refused as e:
            status = e.status
            self._counts["refused_requests"] += 1
        except OSError as e:
            status = S_IOERR
            self._counts["host_errors"] += 1
            if self._counts["host_errors"] <= _LOGGED_MAX:
                self._log(f"a request failed: {e.strerror}")
        last = chain.writable[-1]
        self.memory.write(last.gpa + last.size - 1, bytes((status,)))
        # 2.7.8.2: from the first byte on, so the status counts only when the data before it are there.
        self.push(index, chain, chain.write_size if status == S_OK or chain.write_size == 1 else 0)
        self._limit.take(self._clock(), size)
        return size

    def _parse(self, chain: Chain) -> Request:
        """Raises _Refused."""
        number, _, sector = HEADER.unpack(self.memory.copy_out(chain.readable, HEADER.size))
        kind = _TYPES.get(number)
        if kind is None or _NEEDS.get(kind, 0) & ~self.features:
            raise _Refused(S_UNSUPP)
        if self._read_only and kind is Type.OUT:
            raise _Refused(S_IOERR)
        sent, asked = chain.read_size - HEADER.size, chain.write_size - 1
        inward = kind is Type.IN or kind is Type.GET_ID
        if asked if not inward else sent:
            raise _Refused(S_IOERR)
        size = asked if inward else sent
        data = part(chain.writable, 0, size) if inward else part(chain.readable, HEADER.size, size)
        match kind:
            case Type.IN | Type.OUT if not size % SECTOR and size <= DATA_MAX:
                return Request(kind, self._place(sector, size), size, data)
            case Type.FLUSH if not size:
                return Request(kind, 0, 0, ())
            case Type.GET_ID if size <= ID_SIZE:
                return Request(kind, 0, size, data)
            case Type.DISCARD | Type.WRITE_ZEROES if size == RANGE.size:
                sector, sectors, flags = RANGE.unpack(self.memory.copy_out(data, size))
                if flags & ~(UNMAP if kind is Type.WRITE_ZEROES else 0):
                    raise _Refused(S_UNSUPP)
                size = sectors * SECTOR
                if size > (DISCARD_MAX if kind is Type.DISCARD else ZEROES_MAX):
                    raise _Refused(S_IOERR)
                return Request(kind, self._place(sector, size), size, (), unmap=bool(flags & UNMAP))
        raise _Refused(S_IOERR)

    def _place(self, sector: int, size: int) -> int:
        """The offset of `sector`, if `size` bytes from there on are on the disk; raises _Refused."""
        offset = sector * SECTOR
        if offset + size > self._disk.size:
            raise _Refused(S_IOERR)
        return offset

    def _carry_out(self, request: Request) -> None:
        """Raises OSError."""
        disk, offset, size = self._disk, request.offset, request.size
        kind = request.type
        if kind is Type.IN:
            disk.read(offset, self.memory.views(request.data))
        elif kind is Type.OUT:
            disk.write(offset, self.memory.views(request.data))
        elif kind is Type.GET_ID:
            self.memory.copy_in(request.data, self._id[:size])
        elif kind is Type.DISCARD:
            disk.discard(offset, size)
        elif kind is Type.WRITE_ZEROES:
            disk.zero(offset, size, unmap=request.unmap and self._sparse)
        if kind is Type.FLUSH or (kind in (Type.OUT, Type.WRITE_ZEROES) and not self.features & F_FLUSH):
            disk.flush()

    # -- the end

    def stop(self) -> None:
        try:
            self._disk.close()
        except OSError as e:
            self._log(f"cannot close the image: {e.strerror}")

    # -- state

    def save(self) -> bytes:
        return state.pack(BlkState(self.save_transport()))

    def restore(self, data: bytes) -> None:
        self.restore_transport(state.unpack(BlkState, data).transport)

    def counters(self) -> dict[str, int]:
        return {**super().counters(), "capacity": self.read_capacity()}
