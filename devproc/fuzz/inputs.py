"""What a device is put through: a list of operations, as records of 16 bytes and as text (`.vmrep`).

The byte form is for mutators: canonical() makes an input of any bytes.  The text form is for people and for
version control: one operation per line, each value in one spelling.  Text and records hold the same, so each
gives the other back.  A recording also says what the device answered, in records that fuzzing leaves out.

    vmrep 1 serial clock=5000000000000 wall=1700000000000000000
    write PORT 0x1 1 0x5            # space, offset, size, data
    read PORT 0x2 1 = 0xc1          # with the answer, in a recording
    clock 1000000                   # nanoseconds pass
    wall -5                         # the wall clock alone jumps
    input 6869                      # bytes from the host
    room 16                         # the host takes that many bytes of output, and no more
    repeat 100                      # the last access, again; its last answer, and the edges of all, count
    save                            # save, then restore what was saved; once in an input
    raised irq 1                    # recorded: edges since the last operation but these
    sent 6f6b                       # recorded: bytes to the host
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Final, NamedTuple

from devproc.catalog import CATALOG, Entry
from devproc.wire import SIZES, Scalar, Space

RECORD: Final = Struct("<BBBBIQ")
RECORDS_MAX: Final = 512  # of an input for fuzzing; a recording is as long as it is
CLOCK_MAX_NS: Final = 1 << 50  # 13 days
ROOM_MAX: Final = 1 << 16
REPEAT_MAX: Final = 8192
CHUNK: Final = 8  # bytes that one DATA record holds
CLOCK_START_NS: Final = 5_000_000_000_000
WALL_START_NS: Final = 1_700_000_000_000_000_000  # 2023-11-14 22:13:20 UTC
PARAMS: Final = {"mem_below_4g": 256 << 20, "mem_above_4g": 0}
"""Values of parameters for fuzzing; others have their lowest."""


class InputError(ValueError):
    """A text, or records, that are no input; one line."""


class Op(enum.IntEnum):
    """The first byte of a record; the rest is for each as `_Line` in this module says."""

    READ = 0  # space, offset, size; in a recording aux is 1 and data what was read
    WRITE = 1  # space, offset, size, data
    CLOCK = 2  # data: nanoseconds by which both clocks go on
    WALL = 3  # data: nanoseconds, signed, by which the wall clock jumps
    DATA = 4  # size bytes of data, for the next INPUT or SENT
    INPUT = 5  # the bytes come from the host
    ROOM = 6  # data: bytes of output the host takes from now on
    REPEAT = 7  # data: how often the last access is made again
    SAVE = 8
    RAISED = 0x40  # aux: which signal, data: how often
    SENT = 0x41  # the bytes went to the host


STIMULI: Final = tuple(op for op in Op if op < Op.RAISED)


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


def records(data: bytes) -> Iterator[Record]:
    """The records in `data`; what is left over at its end is no record."""
    return map(Record._make, RECORD.iter_unpack(data[: len(data) - len(data) % RECORD.size]))


def encode(items: Iterable[Record]) -> bytes:
    """The byte form."""
    return b"".join(RECORD.pack(*r) for r in items)


def chunks(data: bytes) -> Iterator[Record]:
    """DATA records that hold `data`."""
    for at in range(0, len(data), CHUNK):
        part = data[at : at + CHUNK]
        yield Record(Op.DATA, size=len(part), data=int.from_bytes(part, "little"))


def signals(entry: Entry) -> list[str]:
    """The names of an entry's signals; RAISED counts them from 0.  Of an array: irq.0, irq.1..."""
    return [
        d.name if d.count is None else f"{d.name}.{i}"
        for d, fds in entry.own_slots()
        if d.kind == "signal"
        for i in range(len(fds))
    ]


def default_params(entry: Entry) -> tuple[Scalar, ...]:
    """The values that a device is fuzzed with."""
    return tuple(bytes(p.low) if p.type is bytes else PARAMS.get(p.name, p.low) for p in entry.params)


def canonical(entry: Entry, data: bytes, *, recorded: bool = False) -> bytes:
    """The input that any bytes are: every field in its range, and nothing that `entry` has no use for.

    Args:
        recorded: keep what says how the device answered, and any length; otherwise RECORDS_MAX at most.
    """
    found: list[Record] = []
    pending = b""
    for r in records(data):
        if r.op == Op.DATA:
            pending += (r.data).to_bytes(8, "little")[: 1 + (r.size - 1) % CHUNK]
            continue
        kept = _canonical(entry, r, recorded)
        if kept is not None:
            if kept.op in (Op.INPUT, Op.SENT):
                found += chunks(pending)
                pending = b""
            found.append(kept)
    return encode(found if recorded else found[:RECORDS_MAX])


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
        case Op.CLOCK if "clock" in entry.sources or "wall" in entry.sources:
            return Record(op, data=r.data % CLOCK_MAX_NS)
        case Op.WALL if "wall" in entry.sources:
            return Record(op, data=r.data)
        case Op.INPUT if "input" in kinds:
            return Record(op)
        case Op.ROOM if "output" in kinds:
            return Record(op, data=r.data % (ROOM_MAX + 1))
        case Op.REPEAT:
            return Record(op, data=1 + (r.data - 1) % REPEAT_MAX)
        case Op.SAVE:
            return Record(op)
        case Op.RAISED if r.aux < len(signals(entry)):
            return Record(op, aux=r.aux, data=r.data)
        case Op.SENT if "output" in kinds:
            return Record(op)
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
    for r in records(rep.data):
        if r.op == Op.DATA:
            pending += r.data.to_bytes(8, "little")[: r.size]
            continue
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
                words += [pending.hex()] if pending else []
                pending = b""
            case Op.RAISED:
                words += [names[r.aux], str(r.data)]
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
    op, values = Op[words[0].upper()], words[1:]
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
            record = Record(op)
        case Op.RAISED:
            name, number = values
            record = Record(op, aux=signals(entry).index(name), data=int(number))
        case Op.SAVE if not values:
            record = Record(op)
        case _:
            raise InputError(f"cannot read {' '.join(words)!r:.80}")
    if not 0 <= record.data < 1 << 64 or _canonical(entry, record, True) != record:
        raise InputError(f"{entry.name} cannot be given {' '.join(words)!r:.80}")
    return [*found, record]
