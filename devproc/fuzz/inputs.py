"""What a device is put through: a list of operations, as records of 16 bytes and as text (`.vmrep`).

The byte form is for mutators: canonical() makes an input of any bytes.  The text form is for people and for
version control: one operation per line, each value in one spelling.  Text and records hold the same, so each
gives the other back.  A recording also says what the device answered, in records that fuzzing leaves out.

    vmrep 1 serial clock=5000000000000 wall=1700000000000000000
    write PORT 0x1 1 0x5            # space, offset, size, data
    read PORT 0x2 1 = 0xc1          # with the answer, in a recording
    clock 1000000                   # nanoseconds pass
    wall -5                         # the wall clock alone jumps
    input 6869                      # bytes from the host; input.1 for the second port
    room 16                         # the host takes that many bytes of output, and no more
    repeat 100                      # the last access, again; its last answer, and the edges of all, count
    chain 0 16 0 512 1 plain 0001   # queue, bytes to read, twice, and to write, twice; how; what is read
    kick 0                          # the driver notifies a queue
    restart 0x0 4                   # reset the device and start it again: see guest.py
    set target_mib 3                # a setting changes
    save                            # save, then restore what was saved; once in an input
    raised irq 1                    # recorded: edges since the last operation but these
    sent 6f6b                       # recorded: bytes to the host

A recording of a device with guest memory has these besides.  What follows an operation belongs to it:

    event kick.0 0                  # a port to the host calls the device: which of the functions it was told
    memory 0x1000 0100              # what the guest has written by now, where the device looks
    memory.2 0x1000 0200            # and by the second time that the device orders its stores and loads
    gave disk 0x8a3f12c5 00ff       # a port of the host was asked (a checksum of what) and gave bytes,
    gave output.0 0x8a3f12c5 = 5    # or a number, or =yes, =no, =none; or failed: ! 5 is errno
    wrote 0x2000 0100               # what the device has written that was not there
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from struct import Struct
from typing import Final, NamedTuple

from devproc.catalog import CATALOG, Entry
from devproc.virtio.spec import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED, F_VERSION_1
from devproc.wire import SIZES, Scalar, Space

RECORD: Final = Struct("<BBBBIQ")
RECORDS_MAX: Final = 512  # of an input for fuzzing; a recording is as long as it is
CLOCK_MAX_NS: Final = 1 << 50  # 13 days
ROOM_MAX: Final = 1 << 16
REPEAT_MAX: Final = 4096
REPEATS_MAX: Final = 4096  # bytes of repeated accesses in one input: more would take as long as what hangs
PORTS_MAX: Final = 4  # of one kind: INPUT of a virtio device says which
QUEUE_SHIFT_MAX: Final = 4
"""log2 of the largest queue: small ones wrap around sooner."""
START_CHOICES: Final = 32  # how a RESTART may start the device: bits that guest.py explains
_EVENTS_MAX: Final = 4  # functions that a port is told
CHUNK: Final = 8  # bytes that one DATA record holds
CLOCK_START_NS: Final = 5_000_000_000_000
WALL_START_NS: Final = 1_700_000_000_000_000_000  # 2023-11-14 22:13:20 UTC
TYPED: Final = frozenset({"input", "tap", "stream", "line", "exchange", "back-end"})
DRAINED: Final = frozenset({"output", "tap", "stream", "line"})
"""Kinds of ports from which something comes, and which take only so much."""
PARAMS: Final = {
    "mem_below_4g": 256 << 20,
    "mem_above_4g": 0,
    "sparse": 1,
    "packed": 1,
    "features": F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | F_RING_PACKED,  # of a vhost-user back end
    "rings": 2,
}
"""Values of parameters for fuzzing; others have their lowest."""
GUEST_SIZE: Final = 1 << 18
"""Bytes of guest memory, for a device that has any."""


class InputError(ValueError):
    """A text, or records, that are no input; one line."""


class Op(enum.IntEnum):
    """The first byte of a record; the rest is for each as `_Line` in this module says."""

    READ = 0  # space, offset, size; in a recording aux is 1 and data what was read
    WRITE = 1  # space, offset, size, data
    CLOCK = 2  # data: nanoseconds by which both clocks go on
    WALL = 3  # data: nanoseconds, signed, by which the wall clock jumps
    DATA = 4  # size bytes of data, for the next INPUT, CHAIN or SENT
    INPUT = 5  # space: which port; the bytes come from the host
    ROOM = 6  # data: bytes of output the host takes from now on
    REPEAT = 7  # data: how often the last access is made again
    SAVE = 8
    CHAIN = 9  # space: queue, aux: how (guest.Twist), data: four sizes; the bytes are what is to be read
    KICK = 10  # space: queue
    RESTART = 11  # offset: what not to accept and not to enable, size: log2 of the queues' size
    SET = 12  # aux: which setting, data: its value
    RAISED = 0x40  # aux: which signal, data: how often
    SENT = 0x41  # the bytes went to the host
    EVENT = 0x42  # aux: which port, offset: which of its functions is called
    MEMORY = 0x43  # the bytes are in guest memory at `data`; offset: at first (0), or from which fence on
    GAVE = 0x44  # aux: which port, size: a Gave, offset: what it was asked, data: what it gave if not bytes
    WROTE = 0x45  # the bytes were written to `data`


_WITH_BYTES: Final = (Op.INPUT, Op.CHAIN, Op.SENT, Op.MEMORY, Op.GAVE, Op.WROTE)
STIMULI: Final = tuple(op for op in Op if op < Op.RAISED)


class Twist(enum.IntEnum):
    """How a driver makes a chain: as it should, or wrong in one way."""

    PLAIN = 0
    INDIRECT = 1
    LOOP = 2  # the last descriptor goes on with the first
    OUTSIDE = 3  # an address that is not RAM
    OVERFLOW = 4  # address + length does not fit 64 bits
    EMPTY = 5  # a length of 0
    BACKWARDS = 6  # what is written comes before what is read
    NESTED = 7  # an indirect table in an indirect table
    AHEAD = 8  # more made available than there is room for
    HEAD = 9  # a first descriptor that does not exist
    HUGE = 10  # a length of 4 GiB - 1
    RING = 11  # the buffer is the ring


class Gave(enum.IntEnum):
    """What sort of answer a port of the host gave."""

    BYTES = 0
    NUMBER = 1
    ERROR = 2
    NO = 3
    YES = 4
    NONE = 5


class Record(NamedTuple):
    """One operation; what it does not use is 0."""

    op: int
    space: int = 0
    size: int = 0
    aux: int = 0
    offset: int = 0
    data: int = 0


@dataclass(frozen=True)
class Rep:
    """A whole input: the device, what it starts with, and the records.

    `params` in the order of the catalogue entry; the clocks in nanoseconds.
    """

    device: str
    data: bytes
    params: tuple[Scalar, ...] = ()
    clock_ns: int = CLOCK_START_NS
    wall_ns: int = WALL_START_NS


_WHOLE: Final = int.from_bytes(RECORD.pack(Op.DATA, 0, CHUNK, 0, 0, 0)[:8], "little")
"""The first word of DATA that holds as much as it can."""


def records(data: bytes) -> Iterator[Record]:
    """The records in `data`; what is left over at its end is no record."""
    return map(Record._make, RECORD.iter_unpack(data[: len(data) - len(data) % RECORD.size]))


def encode(items: Iterable[Record]) -> bytes:
    """The byte form."""
    return b"".join(RECORD.pack(*r) for r in items)


def pack_chunks(data: bytes) -> bytes:
    """The byte form of DATA records that hold `data`."""
    whole = len(data) // CHUNK
    words = array("Q", [_WHOLE, 0]) * whole
    words[1::2] = array("Q", data[: whole * CHUNK])
    rest = data[whole * CHUNK :]
    last = RECORD.pack(Op.DATA, 0, len(rest), 0, 0, int.from_bytes(rest, "little")) if rest else b""
    return words.tobytes() + last


def chunks(data: bytes) -> Iterator[Record]:
    """DATA records that hold `data`."""
    return records(pack_chunks(data))


def joined(data: bytes) -> Iterator[tuple[bytes, Record]]:
    """The records in `data` but for DATA, each with what those before it hold."""
    whole = memoryview(data)[: len(data) - len(data) % RECORD.size]
    words = array("Q", bytes(whole))
    values = words[1::2]
    held = b""
    at = 0
    for is_data, run in groupby(words[::2], _WHOLE.__eq__):
        end = at + len(list(run))
        if is_data:
            held += values[at:end].tobytes()
        else:
            for record in map(Record._make, RECORD.iter_unpack(whole[at * RECORD.size : end * RECORD.size])):
                if record.op == Op.DATA:
                    held += record.data.to_bytes(CHUNK, "little")[: 1 + (record.size - 1) % CHUNK]
                else:
                    yield held, record
                    held = b""
        at = end


def sizes(data: int) -> tuple[int, ...]:
    """The four sizes of a CHAIN: two that are read, two that are written; 0: there is none."""
    return data & 0xFFFF, data >> 16 & 0xFFFF, data >> 32 & 0xFFFF, data >> 48


def packed(*four: int) -> int:
    """`sizes` the other way round.

    Raises:
        ValueError: one of them does not fit.
    """
    if len(four) != 4 or not all(0 <= n <= 0xFFFF for n in four):
        raise ValueError(four)
    return sum(n << 16 * i for i, n in enumerate(four))


def signals(entry: Entry) -> list[str]:
    """The names of an entry's signals; RAISED counts them from 0.  Of an array: irq.0, irq.1..."""
    return [
        d.name if d.count is None else f"{d.name}.{i}"
        for d, fds in entry.own_slots()
        if d.kind == "signal"
        for i in range(len(fds))
    ]


def ports(entry: Entry) -> list[str]:
    """The names of an entry's ports to the host, as of `signals`; EVENT and GAVE count them from 0."""
    own = [
        d.name if d.count is None else f"{d.name}.{i}"
        for d, fds in entry.own_slots()
        if d.kind not in ("signal", "memory")
        for i in range(len(fds))
    ]
    return [*own, *(s for s in entry.sources if s == "entropy")]


def default_params(entry: Entry) -> tuple[Scalar, ...]:
    """The values that a device is fuzzed with."""
    given = {**PARAMS, "mem_below_4g": GUEST_SIZE} if entry.guest_memory else PARAMS
    return tuple(bytes(p.low) if p.type is bytes else given.get(p.name, p.low) for p in entry.params)


def canonical(entry: Entry, data: bytes, *, recorded: bool = False) -> bytes:
    """The input that any bytes are: every field in its range, and nothing that `entry` has no use for.

    Args:
        recorded: keep what says how the device answered, and any length; otherwise RECORDS_MAX at most.
    """
    found: list[bytes] = []
    pending = b""
    for held, r in joined(data):
        pending += held
        kept = _canonical(entry, r, recorded)
        if kept is not None:
            if kept.op in _WITH_BYTES:
                if kept.op != Op.GAVE or kept.size == Gave.BYTES:
                    found.append(pack_chunks(pending))
                pending = b""
            found.append(RECORD.pack(*kept))
    packed = b"".join(found)
    return packed if recorded else packed[: RECORDS_MAX * RECORD.size]


def stimuli(entry: Entry, data: bytes) -> bytes:
    """What a recording's canonical records have for an input: no answers, and for a kick's event the kick."""
    found: list[Record] = []
    pending: list[Record] = []
    for r in records(data):
        if r.op == Op.DATA:
            pending.append(r)
            continue
        if r.op < Op.RAISED:
            found += [*pending, r]
        elif r.op == Op.EVENT:
            name, _, number = ports(entry)[r.aux].partition(".")
            found += [Record(Op.KICK, int(number))] if name == "kick" else []
        pending = []
    return encode(found)


def _canonical(entry: Entry, r: Record, recorded: bool) -> Record | None:
    kinds = {d.kind for d in entry.descriptors}
    op = r.op if recorded and r.op >= Op.RAISED else STIMULI[r.op % len(STIMULI)]
    match op:
        case Op.READ | Op.WRITE:
            spaces = {int(g.space): g.size for g in entry.regions}
            space = r.space if r.space in spaces else list(spaces)[r.space % len(spaces)]
            size = r.size if r.size in SIZES else sorted(SIZES)[r.size % len(SIZES)]
            while size > spaces[space]:
                size //= 2
            offset = r.offset % (spaces[space] - size + 1)
            value = r.data & ((1 << 8 * size) - 1)
            if op == Op.WRITE:
                return Record(op, space, size, 0, offset, value)
            known = recorded and r.aux == 1
            return Record(op, space, size, int(known), offset, value if known else 0)
        case Op.CLOCK if recorded or "clock" in entry.sources or "wall" in entry.sources:
            return Record(op, data=r.data % CLOCK_MAX_NS)
        case Op.WALL if "wall" in entry.sources:
            return Record(op, data=r.data)
        case Op.INPUT if kinds & TYPED:
            return Record(op, r.space % PORTS_MAX if entry.virtio is not None else 0)
        case Op.ROOM if kinds & DRAINED:
            return Record(op, data=r.data % (ROOM_MAX + 1))
        case Op.REPEAT:
            return Record(op, data=1 + (r.data - 1) % REPEAT_MAX)
        case Op.SAVE:
            return Record(op)
        case Op.CHAIN | Op.KICK if entry.virtio is not None:
            queue = r.space % len(entry.virtio.queue_sizes)
            if op == Op.KICK:
                return Record(op, queue)
            return Record(op, queue, aux=r.aux % len(Twist), data=r.data)
        case Op.RESTART if entry.virtio is not None:
            return Record(op, size=r.size % (QUEUE_SHIFT_MAX + 1), offset=r.offset)
        case Op.SET if entry.settings:
            which = r.aux % len(entry.settings)
            p = entry.settings[which]
            return Record(op, aux=which, data=p.low + (r.data - p.low) % (p.high - p.low + 1))
        case Op.RAISED if r.aux < len(signals(entry)):
            return Record(op, aux=r.aux, data=r.data)
        case Op.SENT if "output" in kinds:
            return Record(op)
        case Op.EVENT if entry.guest_memory and r.aux < len(ports(entry)) and r.offset < _EVENTS_MAX:
            return Record(op, space=r.space & 1, aux=r.aux, offset=r.offset)
        case Op.MEMORY | Op.WROTE if entry.guest_memory:
            return Record(op, offset=r.offset if op == Op.MEMORY else 0, data=r.data)
        case Op.GAVE if entry.guest_memory and r.aux < len(ports(entry)) and r.size < len(Gave):
            value = r.data if r.size in (Gave.NUMBER, Gave.ERROR) else 0
            return Record(op, size=r.size, aux=r.aux, offset=r.offset, data=value)
    return None


def to_text(rep: Rep) -> str:
    """The text of `rep`, whose records are canonical.

    Raises:
        KeyError: there is no such device.
    """
    entry = CATALOG[rep.device]
    head = [f"clock={rep.clock_ns}", f"wall={rep.wall_ns}"]
    for p, v in zip(entry.params, rep.params, strict=True):
        head.append(f"{p.name}={f'x{v.hex()}' if isinstance(v, bytes) else v}")
    lines = [" ".join(["vmrep 1", rep.device, *head])]
    pending = b""
    names = signals(entry)
    for held, r in joined(rep.data):
        pending += held
        words = [Op(r.op).name.lower()]
        match r.op:
            case Op.READ | Op.WRITE:
                words += [Space(r.space).name, f"{r.offset:#x}", str(r.size)]
                if r.op == Op.WRITE:
                    words.append(f"{r.data:#x}")
                elif r.aux:
                    words.append(f"= {r.data:#x}")
            case Op.CLOCK | Op.ROOM | Op.REPEAT:
                words.append(str(r.data))
            case Op.WALL:
                words.append(str(r.data - (r.data >> 63 << 64)))
            case Op.INPUT | Op.SENT:
                words[0] += f".{r.space}" if r.space else ""
                words += [pending.hex()] if pending else []
                pending = b""
            case Op.CHAIN:
                words += [str(r.space), *map(str, sizes(r.data)), Twist(r.aux).name.lower()]
                words += [pending.hex()] if pending else []
                pending = b""
            case Op.KICK:
                words.append(str(r.space))
            case Op.RESTART:
                words += [f"{r.offset:#x}", str(r.size)]
            case Op.SET:
                words += [entry.settings[r.aux].name, str(r.data)]
            case Op.RAISED:
                words += [names[r.aux], str(r.data)]
            case Op.EVENT:
                words[0] += ".1" if r.space else ""
                words += [ports(entry)[r.aux], str(r.offset)]
            case Op.MEMORY | Op.WROTE:
                words[0] += f".{r.offset}" if r.offset else ""
                words += [f"{r.data:#x}", pending.hex()]
                pending = b""
            case Op.GAVE:
                words += [ports(entry)[r.aux], f"{r.offset:#x}"]
                match r.size:
                    case Gave.BYTES:
                        words += [pending.hex()] if pending else []
                    case Gave.NUMBER | Gave.ERROR:
                        words += ["=" if r.size == Gave.NUMBER else "!", str(r.data)]
                    case _:
                        words.append(f"={Gave(r.size).name.lower()}")
                pending = b""
        lines.append(" ".join(words))
    return "\n".join(lines) + "\n"


def parse(text: str) -> Rep:
    """What `to_text` wrote; from "#" to the end of a line is a comment, empty lines are nothing.

    Raises:
        InputError: names the line and what was expected there.
    """
    rep: Rep | None = None
    entry: Entry | None = None
    found: list[Record] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            if entry is None:
                rep, entry = _header(words)
            else:
                found += _parsed(entry, words)
        except (ValueError, KeyError, IndexError) as e:
            why = str(e) if isinstance(e, InputError) else f"cannot read {' '.join(words)!r:.80}"
            raise InputError(f"line {number}: {why}") from None
    if rep is None or entry is None:
        raise InputError("line 1: expected: vmrep 1 DEVICE clock=NS wall=NS")
    return Rep(rep.device, encode(found), rep.params, rep.clock_ns, rep.wall_ns)


def _header(words: list[str]) -> tuple[Rep, Entry]:
    if words[:2] != ["vmrep", "1"] or len(words) < 3:
        raise InputError("expected: vmrep 1 DEVICE clock=NS wall=NS")
    if words[2] not in CATALOG:
        raise InputError(f"device {words[2]!r} is unknown, expected one of {', '.join(CATALOG)}")
    entry = CATALOG[words[2]]
    values = dict(w.split("=", 1) for w in words[3:])
    expected = ["clock", "wall", *(p.name for p in entry.params)]
    if list(values) != expected:
        raise InputError(f"expected exactly the values {', '.join(expected)}")
    clock, wall, *params = (bytes.fromhex(v[1:]) if v[:1] == "x" else int(v) for v in values.values())
    if not isinstance(clock, int) or not isinstance(wall, int):
        raise InputError("expected clock=NS wall=NS")
    try:
        entry.check_params(tuple(params))
    except ValueError as e:
        raise InputError(str(e)) from None
    return Rep(entry.name, b"", tuple(params), clock, wall), entry


def _parsed(entry: Entry, words: list[str]) -> list[Record]:
    name, _, port = words[0].partition(".")
    op, values = Op[name.upper()], words[1:]
    found: list[Record] = []
    match op:
        case Op.READ:
            space, offset, size, *answer = values
            if answer and (len(answer) != 2 or answer[0] != "="):
                raise InputError("expected: read SPACE OFFSET SIZE [= VALUE]")
            value = int(answer[1], 16) if answer else 0
            record = Record(op, Space[space], int(size), len(answer) // 2, int(offset, 16), value)
        case Op.WRITE:
            space, offset, size, data = values
            record = Record(op, Space[space], int(size), 0, int(offset, 16), int(data, 16))
        case Op.CLOCK | Op.ROOM | Op.REPEAT:
            (number,) = values
            record = Record(op, data=int(number))
        case Op.WALL:
            (number,) = values
            record = Record(op, data=int(number) & ((1 << 64) - 1))
        case Op.INPUT | Op.SENT:
            found += chunks(bytes.fromhex("".join(values)))
            record = Record(op, int(port or "0"))
        case Op.CHAIN:
            queue, *four, twist = values[:6]
            found += chunks(bytes.fromhex("".join(values[6:])))
            record = Record(op, int(queue), aux=Twist[twist.upper()], data=packed(*map(int, four)))
        case Op.KICK:
            (queue,) = values
            record = Record(op, int(queue))
        case Op.RESTART:
            masked, shift = values
            record = Record(op, size=int(shift), offset=int(masked, 16))
        case Op.SET:
            name, number = values
            which = [p.name for p in entry.settings].index(name)
            record = Record(op, aux=which, data=int(number))
        case Op.RAISED:
            name, number = values
            record = Record(op, aux=signals(entry).index(name), data=int(number))
        case Op.EVENT:
            name, number = values
            record = Record(op, int(port or "0"), aux=ports(entry).index(name), offset=int(number))
        case Op.MEMORY | Op.WROTE:
            gpa, *parts = values
            found += chunks(bytes.fromhex("".join(parts)))
            record = Record(op, offset=int(port or "0"), data=int(gpa, 16))
        case Op.GAVE:
            name, asked, *answer = values
            record = Record(op, aux=ports(entry).index(name), offset=int(asked, 16))
            match answer:
                case ["=" | "!" as sign, number]:
                    kind = Gave.NUMBER if sign == "=" else Gave.ERROR
                    record = record._replace(size=kind, data=int(number))
                case ["=yes" | "=no" | "=none" as word]:
                    record = record._replace(size=Gave[word[1:].upper()])
                case _:
                    found += chunks(bytes.fromhex("".join(answer)))
        case Op.SAVE if not values:
            record = Record(op)
        case _:
            raise InputError(f"cannot read {' '.join(words)!r:.80}")
    if not 0 <= record.data < 1 << 64 or _canonical(entry, record, True) != record:
        raise InputError(f"{entry.name} cannot be given {' '.join(words)!r:.80}")
    return [*found, record]
