"""The qcow2 image format, versions 2 and 3 (QEMU, docs/interop/qcow2.txt), over a `ports.File`.

Metadata are written through, in an order that survives the death of this process and of the host: a cluster
counts as taken on stable storage before a table points to it, and as free only after no table does.  What a
crash leaves are leaked clusters, which `qemu-img check -r leaks` gives back.  Left out: encryption, external
data files, extended L2 entries, zstd, persistent bitmaps (dropped, as the specification has it, when the
image is written), making snapshots, moving a table that has no room for a larger disk, and writing to images
that need repair, whose reference counts are narrower than a byte, or whose reference count table is too small
for the whole disk.
"""

from __future__ import annotations

import errno
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from struct import Struct
from typing import Final, NamedTuple, NoReturn

from devproc.backends.disk import SECTOR, Cut
from devproc.ports import Disk, File, HostError

MAGIC: Final = 0x514649FB
# magic, version, backing_file_offset, backing_file_size, cluster_bits, size, crypt_method, l1_size,
# l1_table_offset, refcount_table_offset, refcount_table_clusters, nb_snapshots, snapshots_offset
_HEADER: Final = Struct(">IIQIIQIIQQIIQ")
# incompatible_features, compatible_features, autoclear_features, refcount_order, header_length
_HEADER_3: Final = Struct(">QQQII")
_AUTOCLEAR: Final = 88
_SIZE: Final = 24  # size, crypt_method, l1_size: in one sector, so all of it is new or none
_SIZES: Final = Struct(">QII")
_ENTRY: Final = Struct(">Q")

_DIRTY: Final = 1 << 0  # the one incompatible feature that may be there, to read
_COPIED: Final = 1 << 63
_COMPRESSED: Final = 1 << 62
_ZERO: Final = 1 << 0
_OFFSET: Final = ((1 << 56) - 1) & ~0x1FF
_L1_MAX: Final = 4 << 20  # bytes: 256 TiB in clusters of 64 KiB
_REFTABLE_MAX: Final = 8 << 20
_CACHE_MAX: Final = 8 << 20  # bytes of L2 tables, and of reference count blocks
_RESERVE: Final = 1 << 22  # bytes of clusters that are taken at once, for one flush
_DOOMED_MAX: Final = 1024  # clusters


class Qcow2Error(HostError):
    """The image cannot be used."""


class _Run(NamedTuple):
    """[offset, offset + size) of the disk, within clusters of one kind.

    `kind`: "data" at `host` in the file, "compressed" with the entry in `host`, "zero", or "none" of ours.
    """

    offset: int
    size: int
    kind: str
    host: int


class Qcow2:
    """The port `ports.Disk` on an image in `file`.

    Args:
        backing: what the image shows where it holds nothing itself.
        read_only: nothing is ever written to `file`.

    Raises:
        Qcow2Error: not an image that can be used.

    Threats:
        1. A table entry points outside the file, into the header or a top-level table, or between clusters
           → EIO, nothing is read or written.
        2. Sizes and offsets in the header that need memory or files without measure → refused.
        3. A compressed cluster that unpacks to more or less than a cluster → EIO, bounded.
        4. Reference counts that do not agree with the tables → at worst other data in the same image.
    """

    def __init__(self, file: File, backing: Disk | None = None, *, read_only: bool = False) -> None:
        self._file: Final = file
        self._backing: Final = backing
        self._read_only: Final = read_only
        (
            magic, version, _, _, bits, size, crypt, l1_size,
            l1_offset, reftable_offset, reftable_clusters, snapshots, _,
        ) = _HEADER.unpack(self._load(0, _HEADER.size))  # fmt: skip
        if magic != MAGIC or version not in (2, 3):
            raise Qcow2Error("not a qcow2 image of version 2 or 3")
        incompatible, autoclear, order = 0, 0, 4
        if version == 3:
            incompatible, _, autoclear, order, _ = _HEADER_3.unpack(self._load(_HEADER.size, _HEADER_3.size))
        if not 9 <= bits <= 21 or order > 6 or size >> 62:
            raise Qcow2Error(f"a qcow2 image with clusters of 2^{bits} bytes, a disk of {size} bytes")
        if crypt or incompatible & ~_DIRTY:
            raise Qcow2Error(f"a qcow2 image with features that are not here: {incompatible:#x}")
        self._version: Final = version
        self._bits: Final = bits
        self._cluster: Final = 1 << bits
        self._l2_bits: Final = bits - 3
        self._width: Final = max(1, 1 << order >> 3)  # bytes of a reference count
        self._per_block: Final = self._cluster // self._width
        self.size = size // SECTOR * SECTOR
        self._snapshots: Final = snapshots
        self._l1 = self._table("L1 table", l1_offset, l1_size * 8, _L1_MAX)
        self._l1_offset: Final = l1_offset
        if len(self._l1) * self._cluster << self._l2_bits < size * 8:
            raise Qcow2Error(f"a qcow2 image with an L1 table of {l1_size} entries for {size} bytes")
        self._l2: Final[OrderedDict[int, bytearray]] = OrderedDict()
        self._blocks: Final[OrderedDict[int, bytearray]] = OrderedDict()
        self._reftable = bytearray()
        self._reftable_offset: Final = reftable_offset
        self._end = -(-file.length // self._cluster)  # the first cluster after the file's
        self._free: list[range] | None = None  # what nobody has of the file, once it is looked for
        self._reserved: list[range] = []  # taken on stable storage, and not used yet
        self._doomed: list[int] = []  # to lose a reference, once what pointed there is not on stable storage
        if not read_only:
            self._prepare_writing(incompatible, autoclear, order, reftable_clusters, size)
        self._forbidden: Final = (  # never data
            (0, self._cluster),
            (l1_offset, l1_offset + len(self._l1)),
            (reftable_offset, reftable_offset + (reftable_clusters << bits)),
        )

    def _prepare_writing(
        self, incompatible: int, autoclear: int, order: int, clusters: int, size: int
    ) -> None:
        if incompatible:
            raise Qcow2Error("a qcow2 image that was not closed: qemu-img check -r all")
        if order < 3:
            raise Qcow2Error(f"a qcow2 image with reference counts of {1 << order} bits: read-only")
        self._reftable = self._table(
            "refcount table", self._reftable_offset, clusters << self._bits, _REFTABLE_MAX
        )
        if not self._counts_reach(size):
            raise Qcow2Error("a qcow2 image with a refcount table too small for its disk: read-only")
        if autoclear:
            self._store(_AUTOCLEAR, bytes(8))
            self._file.flush()

    def _counts_reach(self, size: int) -> bool:
        """Whether there can be reference counts of all that a disk of `size` bytes may need."""
        # Data, their L2 tables, these counts themselves, and what is there now.
        most = self._end + (size >> self._bits) * 9 // 8 + (_RESERVE >> self._bits) + _DOOMED_MAX
        return bool(most // self._per_block < len(self._reftable) // 8)

    # -- ports.Disk

    def read(self, offset: int, into: Sequence[memoryview]) -> None:
        cut = Cut(into)
        for run in self._runs(offset, sum(map(len, into))):
            views = cut.take(run.size)
            match run.kind:
                case "data":
                    self._read_file(run.host, views)
                case "compressed":
                    start = run.offset & (self._cluster - 1)
                    _fill(views, self._unpack(run.host)[start:])
                case "none" if self._backing is not None:
                    self._read_backing(self._backing, run.offset, views)
                case _:
                    _fill(views, b"")

    def write(self, offset: int, data: Sequence[memoryview]) -> None:
        self._check_writable()
        cut = Cut(data)
        for run in self._runs(offset, sum(map(len, data)), exclusive=True):
            if run.kind == "data":
                self._write_file(run.host, cut.take(run.size))
            else:
                self._write_anew(run.offset, run.size, cut)

    def flush(self) -> None:
        self._file.flush()
        doomed, self._doomed = sorted(self._doomed), []
        free = [cluster for cluster in doomed if self._drop_reference(cluster)]
        for found in _neighbours(free, self._per_block):
            self._file.discard(found.start << self._bits, len(found) << self._bits)
            if self._free is not None and not self._is_forbidden(found):
                self._free.append(found)

    def discard(self, offset: int, size: int) -> None:
        self._check_writable()
        if self._backing is None or self._version == 3:
            self._drop(offset, size)

    def zero(self, offset: int, size: int, *, unmap: bool) -> None:
        self._check_writable()
        first, last = self._whole(offset, size)
        if self._version == 3 or (unmap and self._backing is None):
            end = offset + size
            for at, count in (offset, min(first, end) - offset), (max(last, first), end - max(last, first)):
                if count > 0:
                    self._write_zeros(at, count)
            self._drop(offset, size, keep=not unmap)
        else:
            self._write_zeros(offset, size)

    def extend(self, length: int) -> None:
        self._check_writable()
        if self._snapshots:
            raise OSError(errno.EOPNOTSUPP, "a qcow2 image with snapshots keeps its size")
        if self._backing is not None and self._backing.size > self.size:
            raise OSError(errno.EOPNOTSUPP, "a qcow2 image that hides a part of its backing keeps its size")
        had = len(self._l1)
        needs = -(-length // (self._cluster << self._l2_bits)) * 8
        if needs > min(-(-had // self._cluster) * self._cluster, _L1_MAX) or not self._counts_reach(length):
            raise OSError(errno.EFBIG, "a qcow2 image without room in its tables: qemu-img resize")
        if needs > had:
            more = bytes(needs - had)
            self._write_file(self._l1_offset + had, [memoryview(more)])
            self._l1 += more
        old, self.size = self.size, length
        try:
            self._write_zeros(old, min(-old % self._cluster, length - old))
            self.flush()
            self._store(_SIZE, _SIZES.pack(length, 0, len(self._l1) // 8))
            self._file.flush()
        except OSError:
            self.size = old
            raise

    def close(self) -> None:
        """Give back what was reserved; the image is as `qemu-img check` wants it."""
        if not self._read_only:
            for found in self._reserved:
                self._doomed += found
            self._reserved = []
            self.flush()
            self._file.flush()

    # -- where things are

    def _runs(self, offset: int, size: int, *, exclusive: bool = False) -> Iterator[_Run]:
        """The disk's bytes by where they are, neighbours together.

        `exclusive`: clusters that somebody else may have too, or that read as zeros, are "none".
        """
        end = offset + size
        run: _Run | None = None
        while offset < end:
            step = min(end - offset, self._cluster - (offset & (self._cluster - 1)))
            entry = self._entry(offset)
            host = entry & _OFFSET
            if entry & _COMPRESSED:
                found = _Run(offset, step, "compressed", entry)
            elif entry & _ZERO and self._version == 3:
                found = _Run(offset, step, "zero", 0)
            elif host:
                found = _Run(offset, step, "data", self._place(host) + (offset & (self._cluster - 1)))
            else:
                found = _Run(offset, step, "none", 0)
            if exclusive and not (found.kind == "data" and entry & _COPIED):
                found = found._replace(kind="none", host=0)
            if run is not None and _follows(run, found):
                run = run._replace(size=run.size + step)
            else:
                if run is not None:
                    yield run
                run = found
            offset += step
        if run is not None:
            yield run

    def _entry(self, offset: int) -> int:
        """The L2 entry of the cluster at `offset` of the disk."""
        table = self._l2_table(offset >> self._bits + self._l2_bits)
        at = (offset >> self._bits & (1 << self._l2_bits) - 1) * 8
        return 0 if table is None else int(_ENTRY.unpack_from(table, at)[0])

    def _l2_table(self, index: int) -> bytearray | None:
        """The L2 table of an L1 entry; None if there is none."""
        (entry,) = _ENTRY.unpack_from(self._l1, index * 8)
        host = entry & _OFFSET
        if not host:
            return None
        return self._cached(self._l2, index, host)

    def _place(self, host: int) -> int:
        """`host`, if a cluster of data may be there."""
        if host & (self._cluster - 1) or host >= self._file.length:
            _corrupt(f"a cluster at {host:#x}")
        if self._is_forbidden(range(host >> self._bits, (host >> self._bits) + 1)):
            _corrupt(f"a cluster at {host:#x}, where its tables are")
        return host

    def _cached(self, cache: OrderedDict[int, bytearray], key: int, host: int) -> bytearray:
        found = cache.get(key)
        if found is None:
            return self._keep(cache, key, self._load(self._place(host), self._cluster))
        cache.move_to_end(key)
        return found

    def _keep(self, cache: OrderedDict[int, bytearray], key: int, data: bytearray) -> bytearray:
        if len(cache) + 1 << self._bits > _CACHE_MAX:
            cache.popitem(last=False)
        cache[key] = data
        return data

    # -- reading

    def _load(self, host: int, size: int) -> bytearray:
        data = bytearray(size)
        self._read_file(host, [memoryview(data)])
        return data

    def _table(self, what: str, host: int, size: int, most: int) -> bytearray:
        """Raises Qcow2Error."""
        if size > most or host & (self._cluster - 1) or host + size > self._file.length:
            raise Qcow2Error(f"a qcow2 image with a {what} of {size} bytes at {host:#x}")
        return self._load(host, size)

    def _read_file(self, host: int, views: Sequence[memoryview]) -> None:
        """What lies past the file's end are zeros: the last cluster may be there in part."""
        size = sum(map(len, views))
        there = min(size, max(0, self._file.length - host))
        cut = Cut(views)
        if there:
            self._file.read(host, cut.take(there))
        _fill(cut.take(size - there), b"")

    def _read_backing(self, backing: Disk, offset: int, views: Sequence[memoryview]) -> None:
        size = sum(map(len, views))
        there = min(size, max(0, backing.size - offset))
        cut = Cut(views)
        if there:
            backing.read(offset, cut.take(there))
        _fill(cut.take(size - there), b"")

    def _compressed_place(self, entry: int) -> tuple[int, int]:
        """Where the bytes of a compressed cluster are, and at most how many."""
        shift = 62 - (self._bits - 8)
        host = entry & (1 << shift) - 1
        sectors = (entry >> shift & (1 << 62 - shift) - 1) + 1
        size = sectors * SECTOR - host % SECTOR
        if not self._cluster <= host < self._file.length:
            _corrupt(f"a compressed cluster at {host:#x}")
        return host, size

    def _unpack(self, entry: int) -> bytes:
        host, size = self._compressed_place(entry)
        packed = self._load(host, size)
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, self._cluster)
        except zlib.error:
            data = b""
        if len(data) != self._cluster:
            _corrupt(f"a compressed cluster at {host:#x}")
        return data

    # -- writing

    def _check_writable(self) -> None:
        if self._read_only:
            raise OSError(errno.EROFS, "the image is read-only")

    def _store(self, host: int, data: bytes | bytearray | memoryview) -> None:
        self._file.write(host, [memoryview(data)])

    def _write_file(self, host: int, views: Sequence[memoryview]) -> None:
        end = host + sum(map(len, views))
        if end > self._file.length:  # the last cluster is there in part
            self._file.extend(-(-end // self._cluster) * self._cluster)
        self._file.write(host, views)

    def _write_anew(self, offset: int, size: int, cut: Cut) -> None:
        """Write into new clusters, with what was around the new bytes in the first and in the last."""
        mask = self._cluster - 1
        end = offset + size
        while offset < end:
            base = offset & ~mask
            # One L2 table at a time; no more than can be reserved at once.
            stop = min(end, (base >> self._bits + self._l2_bits) + 1 << self._bits + self._l2_bits)
            taken = self._take(-(-(stop - base) // self._cluster))
            stop = min(stop, base + (len(taken) << self._bits))
            after = min(self.size, -(-stop // self._cluster) * self._cluster) if stop & mask else stop
            head, tail = bytearray(offset - base), bytearray(after - stop)
            self.read(base, [memoryview(head)])
            self.read(stop, [memoryview(tail)])
            rest = bytes(-after % self._cluster)  # past the disk's end
            views = [memoryview(head), *cut.take(stop - offset), memoryview(tail), memoryview(rest)]
            try:
                self._write_file(taken.start << self._bits, [v for v in views if v])
            except OSError:
                self._doomed += taken
                raise
            self._point(base, [(c << self._bits) | _COPIED for c in taken])
            offset = stop

    def _write_zeros(self, offset: int, size: int) -> None:
        """Write zeros where there are none yet."""
        for run in list(self._runs(offset, size)):
            if run.kind != "zero" and (run.kind != "none" or self._backing is not None):
                for at in range(run.offset, run.offset + run.size, self._cluster):
                    self.write(at, [memoryview(bytes(min(self._cluster, run.offset + run.size - at)))])

    def _whole(self, offset: int, size: int) -> tuple[int, int]:
        """The range's whole clusters; the last one of the disk may be short."""
        mask = self._cluster - 1
        end = offset + size
        return (offset + mask) & ~mask, end if end == self.size else end & ~mask

    def _drop(self, offset: int, size: int, *, keep: bool = False) -> None:
        """Make the whole clusters of a range read as zeros; `keep` those that are ours alone."""
        at, end = self._whole(offset, size)
        gone = _ZERO if self._version == 3 and (self._backing is not None or keep) else 0
        while at < end:
            stop = min(end, (at >> self._bits + self._l2_bits) + 1 << self._bits + self._l2_bits)
            clusters = range(at, stop, self._cluster)
            old = [self._entry(c) for c in clusters]
            new = [e | _ZERO if keep and e & _COPIED and not e & _COMPRESSED else gone for e in old]
            if new != old:
                self._point(at, new)
            at = stop

    def _point(self, offset: int, entries: Sequence[int]) -> None:
        """Set the L2 entries from the one of the cluster at `offset` on, all in one table."""
        index = offset >> self._bits + self._l2_bits
        table = self._own_l2_table(index)
        at = (offset >> self._bits & (1 << self._l2_bits) - 1) * 8
        old = [e for (e,) in _ENTRY.iter_unpack(table[at : at + 8 * len(entries)])]
        data = b"".join(map(_ENTRY.pack, entries))
        (l1_entry,) = _ENTRY.unpack_from(self._l1, index * 8)
        self._store((l1_entry & _OFFSET) + at, data)
        table[at : at + len(data)] = data
        for before, now in zip(old, entries, strict=True):
            if before & _COMPRESSED:
                host, size = self._compressed_place(before)
                last = min(host + size, self._file.length) - 1
                self._doomed += range(host >> self._bits, (last >> self._bits) + 1)
            elif before & _OFFSET and before & _OFFSET != now & _OFFSET:
                self._doomed.append(self._place(before & _OFFSET) >> self._bits)
        if len(self._doomed) > _DOOMED_MAX:
            self.flush()

    def _own_l2_table(self, index: int) -> bytearray:
        """The L2 table of an L1 entry, ours alone."""
        (entry,) = _ENTRY.unpack_from(self._l1, index * 8)
        table = self._l2_table(index)
        if table is not None and entry & _COPIED:
            return table
        (cluster,) = self._take(1)
        host = cluster << self._bits
        if table is None:
            table = self._keep(self._l2, index, bytearray(self._cluster))
        self._write_file(host, [memoryview(table)])
        self._file.flush()
        _ENTRY.pack_into(self._l1, index * 8, host | _COPIED)
        self._store(self._l1_offset + index * 8, self._l1[index * 8 : index * 8 + 8])
        if entry & _OFFSET:
            self._doomed.append((entry & _OFFSET) >> self._bits)
        return table

    # -- clusters

    def _take(self, count: int) -> range:
        """Up to `count` free clusters, neighbours, at least one; on stable storage they count as taken."""
        if not self._reserved:
            self._reserve(max(1, _RESERVE >> self._bits))
        found = self._reserved.pop()
        if rest := found[count:]:
            self._reserved.append(rest)
        return found[:count]

    def _reserve(self, count: int) -> None:
        """Take about `count` clusters, for one flush: free ones of the file, or new ones at its end."""
        if self._free is None:
            self._free = [found for found in self._find_free() if not self._is_forbidden(found)]
        reserved = []
        while self._free and count > 0:
            found = self._free.pop()
            if rest := found[count:]:
                self._free.append(rest)
            reserved.append(found[:count])
            count -= len(reserved[-1])
        if not reserved:
            reserved.append(self._grow(count))
        for found in reserved:
            self._set_counts(found, 1)
        self._file.flush()
        self._reserved = reserved

    def _grow(self, count: int) -> range:
        """Up to `count` clusters after the last, whose counts are all in one block."""
        start, index = self._end, self._end // self._per_block
        if index >= len(self._reftable) // 8:
            raise OSError(errno.ENOSPC, "the image's refcount table is full")
        missing = not self._block_place(index)
        stop = min(start + missing + count, (index + 1) * self._per_block)
        self._file.extend(max(self._file.length, stop << self._bits))
        if missing:
            self._add_block(index, start)
        self._end = stop
        # Where a block has room for itself alone, there is the next.
        return range(start + missing, stop) or self._grow(count)

    def _add_block(self, index: int, cluster: int) -> None:
        """A block of reference counts in `cluster`, whose own count is in it."""
        block = bytearray(self._cluster)
        at = cluster % self._per_block * self._width
        block[at : at + self._width] = (1).to_bytes(self._width, "big")
        self._store(cluster << self._bits, block)
        self._file.flush()
        _ENTRY.pack_into(self._reftable, index * 8, cluster << self._bits)
        self._store(self._reftable_offset + index * 8, self._reftable[index * 8 : index * 8 + 8])
        self._keep(self._blocks, index, block)

    def _find_free(self) -> Iterator[range]:
        zero = bytes(self._width)
        for index in range(min(len(self._reftable) // 8, self._end // self._per_block + 1)):
            host = self._block_place(index)
            if not host:
                continue
            block = self._cached(self._blocks, index, host)
            base = index * self._per_block
            end = min(self._per_block, self._end - base) * self._width
            at = 0
            while (at := block.find(zero, at, end)) >= 0:
                if misaligned := at % self._width:
                    at += self._width - misaligned
                    continue
                first = at
                while at < end and block[at : at + self._width] == zero:
                    at += self._width
                yield range(base + first // self._width, base + at // self._width)

    def _block_place(self, index: int) -> int:
        """Where the block `index` of reference counts is; 0: there is none."""
        (entry,) = _ENTRY.unpack_from(self._reftable, index * 8)
        return int(entry) & ~0x1FF

    def _set_counts(self, clusters: range, count: int) -> None:
        """Set the reference counts of neighbours whose counts are in one block."""
        index, first = divmod(clusters.start, self._per_block)
        host = self._block_place(index)
        block = self._cached(self._blocks, index, host)
        at, data = first * self._width, count.to_bytes(self._width, "big") * len(clusters)
        self._store(host + at, data)
        block[at : at + len(data)] = data

    def _drop_reference(self, cluster: int) -> bool:
        """Count one reference less; whether it was the last."""
        index, nth = divmod(cluster, self._per_block)
        if index >= len(self._reftable) // 8 or not (host := self._block_place(index)):
            return False
        block = self._cached(self._blocks, index, host)
        count = int.from_bytes(block[nth * self._width : (nth + 1) * self._width], "big")
        if count:  # what is counted too low already is never given to somebody else
            self._set_counts(range(cluster, cluster + 1), count - 1)
        return count == 1

    def _is_forbidden(self, clusters: range) -> bool:
        start, stop = clusters.start << self._bits, clusters.stop << self._bits
        return any(low < stop and start < high for low, high in self._forbidden)


def _follows(run: _Run, found: _Run) -> bool:
    if run.kind != found.kind or run.kind == "compressed":
        return False
    return run.kind != "data" or run.host + run.size == found.host


def _neighbours(clusters: Sequence[int], per_block: int) -> Iterator[range]:
    """Sorted clusters as ranges, each with its counts in one block."""
    found = range(0)
    for cluster in clusters:
        if cluster == found.stop and cluster % per_block:
            found = range(found.start, cluster + 1)
            continue
        if found:
            yield found
        found = range(cluster, cluster + 1)
    if found:
        yield found


def _fill(views: Sequence[memoryview], data: bytes | bytearray | memoryview) -> None:
    """`data` into `views`, and zeros after it."""
    left = memoryview(data)
    for view in views:
        piece = left[: len(view)]
        view[: len(piece)] = piece
        view[len(piece) :] = bytes(len(view) - len(piece))
        left = left[len(piece) :]


def _corrupt(what: str) -> NoReturn:
    raise OSError(errno.EIO, f"a corrupt qcow2 image: {what}")
