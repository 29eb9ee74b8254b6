"""A device process that writes down all that happens to it: the program of `vmsup run --record`.

It is the process of `devproc.child`, but the model's clocks stand still during each operation, so that the
record says exactly what the model saw: accesses with their answers, bytes from the host, deadlines, edges,
bytes to the host.  That makes one difference to a guest: a deadline that has passed is run after each access,
and not only when no more accesses wait.  The record is in memory shared with the supervisor, mapped before
the jail is sealed.

Left out: devices with guest memory, whose conversation is mostly there; they run as ever.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Callable, Mapping
from struct import Struct
from typing import Any, Final, NoReturn

from devproc import child, jail
from devproc.catalog import Entry
from devproc.fuzz.inputs import RECORD, Op, Record, chunks
from devproc.ports import Device

EXTRA_FDS: Final = 1  # the record
SIZE: Final = 16 << 20  # a million operations; what comes later is not recorded
HEAD: Final = Struct("<Qqq?")  # bytes of records, clock and wall at the start, whether it was too small
RECORDS_AT: Final = 64
_JUMP_NS: Final = 1_000_000  # less is no jump of the wall clock, but the time between looking at two clocks
_I64: Final = (1 << 64) - 1
load = child.load


def main(ctx: jail.Context, model: type[Any], name: str) -> NoReturn:
    """As `child.main`, with the record as one more descriptor."""
    *fds, fd = ctx.fds
    record = mmap.mmap(fd, SIZE)
    ctx.fds = fds
    if ctx.entry.guest_memory:
        child.main(ctx, model, name)
    child.main(ctx, model, name, functools.partial(_serving, record))


def _serving(record: mmap.mmap, entry: Entry, model: type[Any], *rest: Any) -> child.Server:
    made: Any = functools.partial(Recorded, record, entry, model)
    return child.Server(entry, made, *rest)


class Recorded:
    """A model, and the record of what it is asked and what it does.

    Args:
        record: SIZE bytes.
        entry, model: its kind and its class.
        ports: the model's.
    """

    def __init__(self, record: mmap.mmap, entry: Entry, model: type[Any], **ports: Any) -> None:
        self._record = record
        self._end = 0
        self._full = False
        self._entry = entry
        self._clock: Callable[[], int] = ports.get("clock", child.SOURCES["clock"])
        self._wall: Callable[[], int] = ports.get("wall", child.SOURCES["wall"])
        self._now_ns, self._wall_ns = self._clock(), self._wall()
        self._started = self._now_ns, self._wall_ns
        self._raised: dict[int, int] = {}
        self._sent = bytearray()
        for name, frozen in (("clock", lambda: self._now_ns), ("wall", lambda: self._wall_ns)):
            if name in ports:
                ports[name] = frozen
        number = 0
        for d, fds in entry.own_slots():
            made = ports[d.name] if d.count is not None else (ports[d.name],)
            wrapped = tuple(self._port(d.kind, port, number + i) for i, port in enumerate(made))
            number += len(fds) if d.kind == "signal" else 0
            ports[d.name] = wrapped if d.count is not None else wrapped[0]
        self._device: Device = model(**ports)
        self._append()

    def _port(self, kind: str, port: Any, number: int) -> Any:
        if kind == "signal":
            return functools.partial(self._raise, port, number)
        return _Input(self, port) if kind == "input" else _Output(self, port)

    def _raise(self, signal: Callable[[], None], number: int) -> None:
        self._raised[number] = self._raised.get(number, 0) + 1
        signal()

    # -- ports.Device

    def read(self, space: int, offset: int, size: int) -> int:
        self.tick()
        value = self._device.read(space, offset, size)
        self.note(Record(Op.READ, space, size, 1, offset, value))
        return value

    def write(self, space: int, offset: int, size: int, data: int) -> None:
        self.tick()
        self._device.write(space, offset, size, data)
        self.note(Record(Op.WRITE, space, size, 0, offset, data & ((1 << 8 * size) - 1)))

    @property
    def shadows(self) -> Mapping[int, Callable[[], int | None]]:
        return {}  # every read is to be recorded

    @property
    def deadline_ns(self) -> int | None:
        return self._device.deadline_ns

    def on_deadline(self, now_ns: int) -> None:
        self.tick()

    def save(self) -> bytes:
        return self._device.save()

    def restore(self, state: bytes) -> None:
        self._device.restore(state)

    def set(self, name: str, value: int) -> None:
        self.tick()
        self._device.set(name, value)
        which = [p.name for p in self._entry.settings].index(name)
        self.note(Record(Op.SET, aux=which, data=value))

    def stop(self) -> None:
        self._device.stop()

    def counters(self) -> dict[str, int]:
        return self._device.counters()

    # -- the record

    def tick(self) -> None:
        """Time goes on: the clocks take the host's, and what was due is done."""
        passed = max(self._clock() - self._now_ns, 0)
        if passed and self._entry.sources:
            self._now_ns += passed
            self._wall_ns += passed
            self.note(Record(Op.CLOCK, data=passed))
        jump = self._wall() - self._wall_ns
        if abs(jump) >= _JUMP_NS and "wall" in self._entry.sources:
            self._wall_ns += jump
            self.note(Record(Op.WALL, data=jump & _I64))

    def note(self, *items: Record) -> None:
        """Write down an operation that was done, and what came of it."""
        while (due := self._device.deadline_ns) is not None and due <= self._now_ns:
            self._device.on_deadline(self._now_ns)
        self._append(*items)
        self._append(*(Record(Op.RAISED, aux=n, data=count) for n, count in sorted(self._raised.items())))
        if self._sent:
            self._append(*chunks(bytes(self._sent)), Record(Op.SENT))
        self._raised.clear()
        self._sent.clear()

    def _append(self, *items: Record) -> None:
        for item in items:
            at = RECORDS_AT + self._end
            self._full |= at + RECORD.size > SIZE
            if not self._full:
                RECORD.pack_into(self._record, at, *item)
                self._end += RECORD.size
        HEAD.pack_into(self._record, 0, self._end, *self._started, self._full)


class _Input:
    """`ports.Input` that is written down."""

    def __init__(self, recorded: Recorded, port: Any) -> None:
        self._recorded = recorded
        self._port = port
        self._got: list[Record] = []

    def listen(self, wanted: Callable[[], bool], on_input: Callable[[], None]) -> None:
        def on_ready() -> None:
            self._recorded.tick()
            on_input()
            if self._got:
                self._recorded.note(*self._got, Record(Op.INPUT))
                self._got = []

        self._port.listen(wanted, on_ready)

    def read(self, limit: int) -> bytes:
        data: bytes = self._port.read(limit)
        self._got += chunks(data)
        return data


class _Output:
    """`ports.Output` that is written down."""

    def __init__(self, recorded: Recorded, port: Any) -> None:
        self._recorded = recorded
        self._port = port

    @property
    def room(self) -> int:
        room: int = self._port.room
        return room

    def listen(self, on_room: Callable[[], None]) -> None:
        self._port.listen(on_room)

    def write(self, data: bytes) -> int:
        taken: int = self._port.write(data)
        self._recorded._sent += data[:taken]
        return taken


def create() -> int:
    """A memfd for a record, the caller's to close.  Raises OSError."""
    fd = os.memfd_create("record", os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE)
    return fd
