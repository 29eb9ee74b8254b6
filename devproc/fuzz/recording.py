"""A device process that writes down all that happens to it: the program of `vmsup run --record`.

It is the process of `devproc.child`, but the model's clocks stand still during each operation, so that the
record says exactly what the model saw: accesses with their answers, bytes from the host, deadlines, edges,
bytes to the host.  That makes one difference to a guest: a deadline that has passed is run after each access,
and not only when no more accesses wait.  The record is in memory shared with the supervisor, mapped before
the jail is sealed.

Of a device with guest memory it also says what the device saw there (private.py), and each answer of a port
of the host.  Left out: a device that is handed descriptors or a directory (`recorded`), which runs as ever;
what is asked of it by `Save` and `Stats`.
"""

from __future__ import annotations

import functools
import importlib
import mmap
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from struct import Struct
from typing import Any, Final, NoReturn

from devproc import child, jail
from devproc.catalog import Entry
from devproc.fuzz.inputs import RECORD, Gave, Op, Record, pack_chunks
from devproc.fuzz.private import PrivateMemory, new_copy
from devproc.ports import Device
from devproc.virtio import spec

EXTRA_FDS: Final = 1  # the record
SIZE: Final = 16 << 20  # a million operations; what comes later is not recorded
SIZE_WITH_MEMORY: Final = 512 << 20  # of which only what is used takes memory
HEAD: Final = Struct("<Qqq?")  # bytes of records, clock and wall at the start, whether it was too small
RECORDS_AT: Final = 64
_JUMP_NS: Final = 1_000_000  # less is no jump of the wall clock, but the time between looking at two clocks
_I64: Final = (1 << 64) - 1
_KINDS: Final = {"signal", "memory", "kick", "input", "output", "disk", "tap", "stream"}
_STATES: Final = {"size", "length", "up", "offloads", "room"}
load = child.load


def recorded(entry: Entry) -> bool:
    """Whether there is a recording of such a device."""
    return all(d.kind in _KINDS for d in entry.descriptors)


def is_state(name: str) -> bool:
    """Whether it is asked of a port without a call; a record has it when it has changed."""
    return name in _STATES


def main(ctx: jail.Context, model: type[Any], name: str) -> NoReturn:
    """As `child.main`, with the record as one more descriptor."""
    *fds, fd = ctx.fds
    record = mmap.mmap(fd, size_of(ctx.entry))
    ctx.fds = fds
    if not recorded(ctx.entry):
        child.main(ctx, model, name)
    child.main(ctx, model, name, functools.partial(_serving, record))


def on_bench(record: bytearray, entry: Entry, model: type[Any], **rest: Any) -> Recorded:
    """A recorded model that has been through what `child.main` does with one before it serves."""
    made = Recorded(record, entry, model, **rest)
    made.restore(made.save())
    made.counters()
    return made


def _serving(record: mmap.mmap, entry: Entry, model: type[Any], *rest: Any) -> child.Server:
    made: Any = functools.partial(Recorded, record, entry, model)
    return child.Server(entry, made, *rest)


class Recorded:
    """A model, and the record of what it is asked and what it does.

    Args:
        record: `size_of` its kind.
        entry, model: its kind and its class.
        copy: zeros to be its guest memory [new ones].
        alive: called after each operation.
        ports: the model's.
    """

    def __init__(
        self,
        record: mmap.mmap | bytearray,
        entry: Entry,
        model: type[Any],
        copy: mmap.mmap | None = None,
        alive: Callable[[], None] = lambda: None,
        **ports: Any,
    ) -> None:
        self._record = record
        self._alive = alive
        self._end = 0
        self._full = False
        self._entry = entry
        self._clock: Callable[[], int] = ports.get("clock", child.SOURCES["clock"])
        self._wall: Callable[[], int] = ports.get("wall", child.SOURCES["wall"])
        self._now_ns, self._wall_ns = self._clock(), self._wall()
        self._started = self._now_ns, self._wall_ns
        self._raised: dict[int, int] = {}
        self._signals: list[Callable[[], None]] = []  # which the guest gets when it sees what was written
        self._sent = bytearray()
        self._said = bytearray()  # records, in the operation, of memory and ports
        self._inside = False  # an operation
        self._deaf = False  # to what is no operation
        self._memory: PrivateMemory | None = None
        for name, frozen in (("clock", lambda: self._now_ns), ("wall", lambda: self._wall_ns)):
            if name in ports:
                ports[name] = frozen
        signals = others = 0
        for d, fds in entry.own_slots():
            made = ports[d.name] if d.count is not None else (ports[d.name],)
            if d.kind == "signal":
                wrapped: tuple[Any, ...] = tuple(
                    functools.partial(self._raise, port, signals + i) for i, port in enumerate(made)
                )
                signals += len(fds)
            elif d.kind == "memory":
                self._memory = PrivateMemory(
                    made[0], copy or new_copy(made[0].size), self._queues, self._saw, self._wrote
                )
                wrapped = (self._memory,)
            elif entry.guest_memory:
                wrapped = tuple(_Port(self, others + i, port) for i, port in enumerate(made))
                others += len(fds)
            else:
                wrapped = tuple((_Input if d.kind == "input" else _Output)(self, port) for port in made)
            ports[d.name] = wrapped if d.count is not None else wrapped[0]
        if "entropy" in ports:
            ports["entropy"] = functools.partial(self.ask, others, "entropy", ports["entropy"])
        self._device: Device = model(**ports)
        if entry.virtio is not None:
            python_queues(self._device)
        self._append()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)  # what a driver on a bench looks at

    def _raise(self, signal: Callable[[], None], number: int) -> None:
        self._raised[number] = self._raised.get(number, 0) + 1
        if self._memory is None:
            signal()
        else:
            self._signals.append(signal)

    def _queues(self) -> Iterator[tuple[Sequence[tuple[int, int]], bool]]:
        device: Any = self._device
        packed = bool(device.features & spec.F_RING_PACKED)
        return ((queue._areas.ranges, packed) for queue in device.queues if queue is not None)

    def _saw(self, at: int, fence: int, data: bytes) -> None:
        self._said += pack_chunks(data) + RECORD.pack(Op.MEMORY, 0, 0, 0, fence, self._gpa(at))

    def _wrote(self, at: int, data: bytes) -> None:
        self._said += pack_chunks(data) + RECORD.pack(Op.WROTE, 0, 0, 0, 0, self._gpa(at))

    def _gpa(self, at: int) -> int:
        assert self._memory is not None
        return next(r.gpa + at - r.offset for r in self._memory.regions if r.offset <= at < r.offset + r.size)

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
        self._deaf = True
        self._device.stop()

    def counters(self) -> dict[str, int]:
        self._deaf = True
        try:
            return self._device.counters()
        finally:
            self._deaf = False

    # -- the record

    def tick(self) -> None:
        """Time goes on: the clocks take the host's, and what was due is done; an operation begins."""
        if self._said:  # while it was made
            self.note(Record(Op.CLOCK))
        passed = max(self._clock() - self._now_ns, 0)
        if passed and {"clock", "wall"} & {*self._entry.sources}:
            self._now_ns += passed
            self._wall_ns += passed
            self._begin()
            self.note(Record(Op.CLOCK, data=passed))
        jump = self._wall() - self._wall_ns
        if abs(jump) >= _JUMP_NS and "wall" in self._entry.sources:
            self._wall_ns += jump
            self.note(Record(Op.WALL, data=jump & _I64))
        self._begin()

    def _begin(self) -> None:
        self._inside = True
        if self._memory is not None:
            self._memory.begin()

    def note(self, item: Record, data: bytes = b"") -> None:
        """Write down an operation that was done, with `data`, and what came of it."""
        while (due := self._device.deadline_ns) is not None and due <= self._now_ns:
            self._device.on_deadline(self._now_ns)
        if self._memory is not None:
            self._memory.end()
        self._alive()
        self._append(pack_chunks(data), RECORD.pack(*item), self._said)
        self._inside = False
        self._said.clear()
        for signal in self._signals:
            signal()
        self._signals.clear()
        self._append(
            *(RECORD.pack(Op.RAISED, 0, 0, n, 0, count) for n, count in sorted(self._raised.items()))
        )
        if self._sent:
            self._append(pack_chunks(bytes(self._sent)), RECORD.pack(*Record(Op.SENT)))
        self._raised.clear()
        self._sent.clear()

    def event(self, port: int, which: int, function: Callable[[], None]) -> None:
        """A port of the host calls the device, in an operation of its own or by what it is asked in one."""
        record = Record(Op.EVENT, space=self._inside, aux=port, offset=which)
        if self._inside:
            self._said += RECORD.pack(*record)
            function()
        else:
            self.tick()
            function()
            self.note(record)

    def ask(self, port: int, name: str, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Ask a port of the host, and write down what it gives."""
        asked = checksum(name, args, named)
        try:
            given = function(*args, **named)
        except OSError as e:
            self._gave(port, Gave.ERROR, asked, number=e.errno or 0)
            raise
        buffers = filled(name, args)
        if buffers is not None:
            data = b"".join(bytes(b) for b in buffers)
            self._gave(port, Gave.BYTES, asked, data if given is None else data[:given])
        elif isinstance(given, bytes):
            self._gave(port, Gave.BYTES, asked, given)
        elif given is None or isinstance(given, bool):
            self._gave(port, {None: Gave.NONE, True: Gave.YES, False: Gave.NO}[given], asked)
        else:
            self._gave(port, Gave.NUMBER, asked, number=given)
        return given

    def state(self, port: int, name: str, given: int, before: int | None) -> None:
        """A port of the host is seen to be in another state than before."""
        if given != before:
            self._gave(port, Gave.NUMBER, checksum(name, (), {}), number=given)

    def _gave(self, port: int, kind: Gave, asked: int, data: bytes = b"", number: int = 0) -> None:
        if not self._deaf:
            self._said += pack_chunks(data) + RECORD.pack(Op.GAVE, 0, kind, port, asked, number)

    def _append(self, *items: bytes | bytearray) -> None:
        """Whole records, the first of which is an operation's or what came of one."""
        for item in items:
            at = RECORDS_AT + self._end
            self._full |= at + len(item) > len(self._record)
            if not self._full:
                self._record[at : at + len(item)] = item
                self._end += len(item)
        HEAD.pack_into(self._record, 0, self._end, *self._started, self._full)


class _Port:
    """Any port to the host of a device with guest memory, written down."""

    def __init__(self, recorded: Recorded, number: int, port: Any) -> None:
        self._recorded = recorded
        self._number = number
        self._port = port
        self._states: dict[str, int] = {}

    def listen(self, *functions: Callable[..., Any]) -> None:
        asks = functions[: len(functions) > 1]  # whether it is to be watched
        told = [functools.partial(self._recorded.event, self._number, n, f) for n, f in enumerate(functions)]
        self._port.listen(*asks, *told[len(asks) :])

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._port, name)
        if not is_state(name):
            return functools.partial(self._recorded.ask, self._number, name, value)
        if not self._recorded._deaf:
            self._recorded.state(self._number, name, value, self._states.get(name))
            self._states[name] = value
        return value


def filled(name: str, args: tuple[Any, ...]) -> Sequence[Any] | None:
    """The buffers that what is asked of a port fills."""
    buffers = args[-1] if args and name in ("read", "receive") else None
    return None if isinstance(buffers, int) else buffers


def checksum(name: str, args: tuple[Any, ...], named: dict[str, Any]) -> int:
    """32 bits that tell one thing that is asked of a port from another."""
    into = filled(name, args)
    parts = [name.encode(), repr(sorted(named.items())).encode()]
    for arg in args:
        if into is not None and arg is into:
            parts.append(str(sum(len(b) for b in into)).encode())
        elif isinstance(arg, list | tuple):
            parts += [bytes(part) for part in arg]
        else:
            parts.append(arg if isinstance(arg, bytes) else repr(arg).encode())
    return zlib.crc32(b"".join(parts))


class _Input:
    """`ports.Input` that is written down."""

    def __init__(self, recorded: Recorded, port: Any) -> None:
        self._recorded = recorded
        self._port = port
        self._got = b""

    def listen(self, wanted: Callable[[], bool], on_input: Callable[[], None]) -> None:
        def on_ready() -> None:
            self._recorded.tick()
            on_input()
            if self._got:
                self._recorded.note(Record(Op.INPUT), self._got)
                self._got = b""

        self._port.listen(wanted, on_ready)

    def read(self, limit: int) -> bytes:
        data: bytes = self._port.read(limit)
        self._got += data
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


def python_queues(device: Any) -> None:
    """Have its split queues in Python: the one in C goes to memory without `GuestMemory`."""
    split = importlib.import_module("devproc.virtio.split")  # of the modules now loaded: the child's
    device.make_split = split.SplitQueue


def size_of(entry: Entry) -> int:
    """Bytes of a record of such a device."""
    return SIZE_WITH_MEMORY if entry.guest_memory else SIZE


def create(entry: Entry) -> int:
    """A memfd for a record, the caller's to close.  Raises OSError."""
    fd = os.memfd_create("record", os.MFD_CLOEXEC)
    os.ftruncate(fd, size_of(entry))
    return fd
