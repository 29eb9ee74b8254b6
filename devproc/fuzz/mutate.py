"""Makes inputs: a device's register tables are the grammar, and its constants the dictionary.

Everything it makes is canonical, so that what is run needs no check; that is why it works on whole records.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

from devproc.catalog import Entry
from devproc.fuzz.inputs import (
    CLOCK_MAX_NS,
    DRAINED,
    PORTS_MAX,
    QUEUE_SHIFT_MAX,
    RECORD,
    RECORDS_MAX,
    REPEAT_MAX,
    ROOM_MAX,
    START_CHOICES,
    TYPED,
    Op,
    Record,
    Twist,
    chunks,
    encode,
    packed,
)
from devproc.fuzz.shapes import FIRST_OF, SHAPES, SHAPES_OF, TEXTS_OF, Shape
from devproc.regs import INDEXED, Table
from devproc.wire import SIZES

LENGTH_MAX: Final = 32 * RECORD.size  # of what mutation adds: short inputs are quick, and are read by people
_SIZE: Final = RECORD.size
_SLOW: Final = 0.001  # how many of the operations are those that cost as much as a hundred others
_RESTART: Final = bytes([Op.RESTART])
_NS: Final = 10**9
_TIMES: Final = (0, 1, 1_000, 30_518, 122_071, 1_000_000, 20_000_000, _NS - 1, _NS, 61 * _NS, 86_400 * _NS)
_TEXTS: Final = (b"a", b"\r", b"\x03", b"\x00\xff", b"typed at once", bytes(range(40)))


class Mutator:
    """A source of inputs for one device; `random` gives it a number in [0, 1), and may be used by others.

    `freshness`: how many inputs should be new ones.

    Args:
        entry: its kind.
        tables: its registers.
        words: numbers and texts worth trying: constants of its code, a user's dictionary.
        seed: the same gives the same inputs.
    """

    def __init__(
        self, entry: Entry, tables: Sequence[Table], words: Sequence[int | bytes], seed: int
    ) -> None:
        self.random = random.Random(seed).random
        self._sizes = {int(r.space): r.size for r in entry.regions}
        numbers = sorted(
            {w for w in words if isinstance(w, int)} | {0, 1, 2, 0x7F, 0x80, 0xFF, (1 << 64) - 1}
        )
        texts = [*_TEXTS, *TEXTS_OF.get(entry.name, ()), *(w for w in words if isinstance(w, bytes) and w)]
        reads, writes = self._accesses(tables, numbers)
        kinds = {d.kind for d in entry.descriptors}
        weighted = [(5, reads), (7, writes)]
        if entry.sources:
            times = [t for t in (*_TIMES, *numbers) if t < CLOCK_MAX_NS]
            weighted.append((2, [encode([Record(Op.CLOCK, data=t)]) for t in times]))
        if entry.virtio is not None:
            weighted += self._virtio(entry)
        if entry.settings:
            values = [(n, v) for n, p in enumerate(entry.settings) for v in (p.low, p.low + 1, p.high)]
            some = [Record(Op.SET, aux=n, data=v) for n, v in values if v <= entry.settings[n].high]
            weighted.append((1, [encode([r]) for r in some]))
        if "wall" in entry.sources:
            jumps = [j for t in _TIMES for j in (t, -t)] + [400 * 365 * 86_400 * _NS]
            weighted.append((1, [encode([Record(Op.WALL, data=j & ((1 << 64) - 1))]) for j in jumps]))
        if kinds & TYPED:
            ports = range(PORTS_MAX if entry.virtio is not None else 1)
            inputs = [encode([*chunks(t), Record(Op.INPUT, p)]) for t in texts for p in ports]
            weighted.append((2, inputs))
        if kinds & DRAINED:
            weighted.append((1, [encode([Record(Op.ROOM, data=n)]) for n in (0, 0, 1, 15, ROOM_MAX)]))
        self._pools = [pool for weight, pool in weighted for _ in range(weight if pool else 0)]
        slow = [[Record(Op.SAVE)], *([Record(Op.REPEAT, data=n)] for n in (17, 100, 200))]
        for write in {w[:8]: w for w in writes}.values():  # each register once
            slow.append([Record(*RECORD.unpack(write)), Record(Op.REPEAT, data=3000)])
        self._starts: list[bytes] = []
        self._first = [list(map(_first, parts)) for parts in FIRST_OF.get(entry.name, ())]
        self._most = LENGTH_MAX + max([len(b"".join(parts)) for parts in self._first], default=0)
        self.freshness = 0.2 if self._first else 0.02
        if entry.virtio is not None:
            starts = [
                [Record(Op.RESTART, size=QUEUE_SHIFT_MAX, offset=choice)] for choice in range(START_CHOICES)
            ]
            self._starts = [encode(r) for r in starts]
            slow += starts
        self._slow = [encode(r) for r in slow]

    @property
    def snippets(self) -> list[bytes]:
        """What it makes inputs of."""
        return list(dict.fromkeys(snippet for pool in (*self._pools, self._slow) for snippet in pool))

    def _accesses(self, tables: Sequence[Table], numbers: list[int]) -> tuple[list[bytes], list[bytes]]:
        reads: list[Record] = []
        writes: list[Record] = []
        indices = [r.offset for t in tables if t.space == INDEXED for r in t.registers]
        for table in tables:
            if table.space not in self._sizes:
                continue
            for r in table.registers:
                whole = r.size if r.size in SIZES else 1
                if r.access != "WO":
                    reads += [Record(Op.READ, table.space, size, 0, r.offset) for size in {1, whole}]
                if r.access == "RO":
                    continue
                top = (1 << 8 * whole) - 1
                bits = [1 << b for b in range(8 * whole) if r.mask >> b & 1]
                values = {0, top, r.mask, r.reset, *bits, *(n & top for n in numbers), *indices} & set(
                    range(top + 1)
                    if whole == 1
                    else {0, top, r.mask, r.reset, *bits, *(n & top for n in numbers)}
                )
                writes += [Record(Op.WRITE, table.space, whole, 0, r.offset, v) for v in sorted(values)]
            for size in SIZES:
                if size <= self._sizes[table.space]:
                    at = self._sizes[table.space] - size
                    reads.append(Record(Op.READ, table.space, size, 0, at))
                    writes.append(Record(Op.WRITE, table.space, size, 0, at, (1 << 8 * size) - 1))
        return [RECORD.pack(*r) for r in reads], [RECORD.pack(*r) for r in writes]

    def _virtio(self, entry: Entry) -> list[tuple[int, list[bytes]]]:
        """Chains as the device's driver makes them, and wrong ones; kicks."""
        assert entry.virtio is not None
        queues = range(len(entry.virtio.queue_sizes))
        right: list[bytes] = []
        wrong: list[bytes] = []
        for shape in (*SHAPES, *SHAPES_OF.get(entry.name, ())):
            for queue in queues if shape.queue is None else [shape.queue]:
                if queue not in queues:
                    continue
                for twist in Twist:
                    made = _sent(shape, queue, twist)
                    (right if twist <= Twist.INDIRECT else wrong).append(made)
        kicks = [encode([Record(Op.KICK, q)]) for q in queues]
        return [(12, right), (2, wrong), (1, kicks)]

    def fresh(self) -> bytes:
        """A new input; that of a virtio device may begin with how its driver starts it, and what it needs."""
        start = b""
        if self._starts and self.random() < 0.5:
            start = self._starts[int(self.random() * len(self._starts))]
        if self._first:
            parts = self._first[int(self.random() * len(self._first))]
            start += b"".join(parts[: 1 + int(self.random() * len(parts))])
        return start + b"".join(self._snippet() for _ in range(1 + int(self.random() * 8)))

    def _snippet(self) -> bytes:
        rnd = self.random
        pool = self._pools[int(rnd() * len(self._pools))] if rnd() > _SLOW else self._slow
        return pool[int(rnd() * len(pool))]

    def mutate(self, data: bytes, other: bytes) -> bytes:
        """`data` changed in one to eight places; parts of `other` may be in it."""
        rnd = self.random
        start = b""
        if data[:1] == _RESTART and rnd() < 0.95:  # it costs most where it is not the first
            start, data = data[:_SIZE], data[_SIZE:]
        return (start + self._mutated(data, other))[: self._most]

    def tail(self, data: bytes, other: bytes) -> bytes:
        """`data`, the end of an input, changed in a place or two: what is run again and again is short."""
        return self._mutated(data, other[_SIZE:] if other[:1] == _RESTART else other, 0.85)[: self._most]

    def _mutated(self, data: bytes, other: bytes, enough: float = 0.45) -> bytes:
        rnd = self.random
        while True:
            count = len(data) // _SIZE
            at = int(rnd() * (count + 1)) * _SIZE
            choice = rnd()
            if not count or choice < 0.2:
                data = data[:at] + self._snippet() + data[at:]
            elif choice < 0.25:
                burst = b"".join(self._snippet() for _ in range(2 + int(rnd() * 4)))
                data = data[:at] + burst + data[at:]
            elif choice < 0.45:
                at = int(rnd() * count) * _SIZE
                data = data[:at] + self._snippet() + data[at + _SIZE :]
            elif choice < 0.62:
                data = data[:at] + data[at + (1 + int(rnd() * rnd() * count)) * _SIZE :]
            elif choice < 0.85:
                at = int(rnd() * count) * _SIZE
                data = data[:at] + self._changed(data[at : at + _SIZE]) + data[at + _SIZE :]
            elif choice < 0.92:
                end = at + (1 + int(rnd() * 8)) * _SIZE
                data = data[:end] + data[at:end] + data[end:]
            else:
                take = int(rnd() * (len(other) // _SIZE + 1)) * _SIZE
                data = data[:at] + other[take:]
            if rnd() < enough:
                return data

    def _changed(self, record: bytes) -> bytes:
        """One record with another value, size or place."""
        rnd = self.random
        op, space, size, aux, offset, value = RECORD.unpack(record)
        if op in (Op.READ, Op.WRITE):
            choice = rnd()
            if choice < 0.15:
                sizes = [s for s in SIZES if s <= self._sizes[space]]
                size = sizes[int(rnd() * len(sizes))]
            elif choice < 0.3:
                offset += int(rnd() * 9) - 4
            elif choice < 0.25:
                spaces = list(self._sizes)
                space = spaces[int(rnd() * len(spaces))]
                size = min(size, self._sizes[space])
            offset %= self._sizes[space] - size + 1
            if op == Op.READ:
                return RECORD.pack(op, space, size, 0, offset, 0)
            top = (1 << 8 * size) - 1
            return RECORD.pack(op, space, size, 0, offset, self._number(value, 8 * size) & top)
        if op == Op.RESTART:
            return RECORD.pack(op, 0, int(rnd() * (QUEUE_SHIFT_MAX + 1)), 0, int(rnd() * START_CHOICES), 0)
        limit = {Op.CLOCK: CLOCK_MAX_NS, Op.ROOM: ROOM_MAX + 1, Op.REPEAT: REPEAT_MAX}.get(op)
        if op in (Op.WALL, Op.DATA, Op.CHAIN):
            limit = 1 << (8 * size if op == Op.DATA else 64)
        if limit is None:
            return record
        value = self._number(value, limit.bit_length()) % limit
        return RECORD.pack(op, space, size, aux, offset, max(value, 1) if op == Op.REPEAT else value)

    def _number(self, value: int, bits: int) -> int:
        """A number near `value`, or any of so many bits."""
        rnd = self.random
        choice = rnd()
        if choice < 0.45:
            return value ^ (1 << int(rnd() * bits))
        if choice < 0.7:
            return (value + int(rnd() * 17) - 8) & ((1 << 64) - 1)
        return int(rnd() * (1 << int(rnd() * bits + 1)))


def _sent(shape: Shape, queue: int, twist: int = Twist.PLAIN) -> bytes:
    """A chain, and a kick."""
    chain = Record(Op.CHAIN, queue, aux=twist, data=packed(*shape.sizes))
    return encode([*chunks(shape.data), chain, Record(Op.KICK, queue)])


def _first(part: Shape | bytes | int) -> bytes:
    if isinstance(part, Shape):
        return _sent(part, part.queue or 0)
    if isinstance(part, bytes):
        return encode([*chunks(part), Record(Op.INPUT)])
    return encode([Record(Op.ROOM, data=part)])


assert LENGTH_MAX <= RECORDS_MAX * _SIZE
