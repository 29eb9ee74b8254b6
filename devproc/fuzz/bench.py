"""A device model on ports that are not the host's, put through an input, and what must hold meanwhile.

It drives the model as `devproc/child.py` does: after each operation a deadline that has passed, then input
that is wanted, until neither is left.  Python corrupts no memory, so each oracle says what it looks for; a
`Finding` names its kind:

    exception   anything raised out of the model, in whatever it was asked
    value       a read gave what does not fit its size
    busy        a deadline or an input that the model is called for and leaves as it is: the loop would spin
    storm       more edges in one operation than EDGES_MAX
    cause       edges that go on while a register is read again and again and nothing else happens
    growth      the model's containers hold more than they did, by GROWTH_MAX
    restore     what was saved is not what a restored model saves
    fresh       a model that was reset to its first state does not behave as a new one

The others need a process, and are the supervisor's: hang, died, violation, disagree
(supervisor/fuzzworker.py).
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from devproc import regs
from devproc.catalog import Entry, Params
from devproc.fuzz.inputs import CLOCK_START_NS, RECORD, ROOM_MAX, WALL_START_NS, Op, Rep
from devproc.ports import Device

EDGES_MAX: Final = 16
GROWTH_MAX: Final = 4096
REPEATS_MAX: Final = 8192  # in one input: more would take as long as what hangs
PENDING_MAX: Final = 1 << 16  # bytes of DATA that wait
_SETTLE: Final = 64  # reads after which reading alone must not interrupt any more
_I63: Final = 1 << 63
_REPEAT: Final = int(Op.REPEAT)


class Finding(Exception):
    """An oracle's word; `kind` is in this module's list, `why` one line."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind
        self.why = why


class Step(NamedTuple):
    """What one operation brought: the value of a read, edges by signal, bytes to the host."""

    value: int | None
    raised: dict[int, int]
    sent: bytes


class _Input:
    """`ports.Input`; `typed` is what the host has sent and the model has not taken."""

    def __init__(self) -> None:
        self.typed = bytearray()
        self.wanted: Callable[[], bool] = lambda: False
        self.on_input: Callable[[], None] = lambda: None

    def listen(self, wanted: Callable[[], bool], on_input: Callable[[], None]) -> None:
        self.wanted, self.on_input = wanted, on_input

    def read(self, limit: int) -> bytes:
        data = bytes(self.typed[: max(limit, 0)])
        del self.typed[: len(data)]
        return data


class _Output:
    """`ports.Output` to a host that takes `room` more bytes."""

    def __init__(self) -> None:
        self.room = ROOM_MAX
        self.sent = bytearray()
        self.on_room: Callable[[], None] = lambda: None

    def listen(self, on_room: Callable[[], None]) -> None:
        self.on_room = on_room

    def write(self, data: bytes) -> int:
        taken = min(self.room, len(data))
        self.sent += data[:taken]
        self.room -= taken
        return taken


class Bench:
    """One model and its ports.

    Args:
        entry: its kind.
        model: the class.
        params: the parameters by name.
        clock_ns, wall_ns: what the clocks start with.
    """

    def __init__(
        self,
        entry: Entry,
        model: type[Any],
        params: Params,
        clock_ns: int = CLOCK_START_NS,
        wall_ns: int = WALL_START_NS,
    ) -> None:
        self.entry = entry
        self._make = functools.partial(Bench, entry, model, params, clock_ns, wall_ns)
        self._start = (clock_ns, wall_ns)
        self.now_ns, self.wall_ns = self._start
        self._raised: list[int] = []
        self._input = _Input()
        self._output = _Output()
        self._pending = b""
        self._repeats = REPEATS_MAX
        self._saved = False
        self._others: dict[int, Callable[[int, int], None]] = {
            Op.CLOCK: self._clock,
            Op.WALL: self._wall,
            Op.DATA: self._data,
            Op.INPUT: self._type,
            Op.ROOM: self._room,
            Op.SAVE: self._save,
        }
        ports: dict[str, Any] = dict(params)
        number = 0
        for d, fds in entry.own_slots():
            match d.kind:
                case "signal":
                    edges = tuple(functools.partial(self._raised.append, number + i) for i in range(len(fds)))
                    number += len(fds)
                    ports[d.name] = edges[0] if d.count is None else edges
                case "input":
                    ports[d.name] = self._input
                case "output":
                    ports[d.name] = self._output
                case _:
                    raise ValueError(f"{entry.name}: cannot fuzz a {d.kind} descriptor yet")
        sources = {"clock": lambda: self.now_ns, "wall": lambda: self.wall_ns}
        self.model: Device = model(**ports, **{s: sources[s] for s in entry.sources})
        self._snapshot = _Snapshot(self.model)
        self._extent = self._snapshot.extent

    def reset(self) -> None:
        """Back to the state after construction; a small part of what constructing costs."""
        self._snapshot.restore()
        self.now_ns, self.wall_ns = self._start
        self._raised.clear()
        self._input.typed.clear()
        self._output.sent.clear()
        self._output.room = ROOM_MAX
        self._pending = b""
        self._repeats = REPEATS_MAX
        self._saved = False

    def run(self, data: bytes, seen: list[Step] | None = None) -> None:
        """Put the model through canonical records that are no recording; into `seen` goes what each brought.

        Raises:
            Finding: an oracle spoke.
            Exception: the model raised.
        """
        model = self.model
        read, write = model.read, model.write
        raised, typed, others = self._raised, self._input.typed, self._others
        last: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)
        for op, space, size, _, offset, value in RECORD.iter_unpack(data):
            got: int | None = None
            if op == 0:  # Op.READ, Op.WRITE: by number, because this is most of what is done
                got = read(space, offset, size)
                if type(got) is not int or got >> 8 * size:
                    raise Finding("value", f"a read of {size} bytes at {offset:#x} gave {got!r:.40}")
                last = (op, space, offset, size, 0)
            elif op == 1:
                write(space, offset, size, value)
                last = (op, space, offset, size, value)
            elif op == _REPEAT:
                if last[3]:
                    got = self._repeat(last, value)
            else:
                others[op](size, value)
            due = model.deadline_ns
            if typed or (due is not None and due <= self.now_ns):
                self._pump()
            if raised:
                if len(raised) > EDGES_MAX and op != _REPEAT:
                    raise Finding("storm", f"{len(raised)} edges in one operation")
                if seen is None:
                    raised.clear()
            if seen is not None:
                seen.append(self._step(got))

    def check(self, data: bytes) -> list[Step]:
        """The oracles that take longer; `data` has been run, and raised nothing.  Returns what it brings.

        Raises:
            Finding: an oracle spoke.
            Exception: the model raised.
        """
        extent = _Snapshot(self.model).extent
        if extent > self._extent + GROWTH_MAX:
            raise Finding("growth", f"the model holds {extent} items, {self._extent} when it was new")
        self.reset()
        again: list[Step] = []
        self.run(data, again)
        other = self._make()
        steps: list[Step] = []
        other.run(data, steps)
        if again != steps:
            where = next(i for i, (a, b) in enumerate(zip(again, steps, strict=True)) if a != b)
            raise Finding("fresh", f"operation {where}: {steps[where]} from a new model, not {again[where]}")
        other._check_restore(self._make())
        other._check_quiet()
        return steps

    def _check_restore(self, other: Bench) -> None:
        saved = self.model.save()
        other.now_ns, other.wall_ns = self.now_ns, self.wall_ns
        try:
            other.model.restore(saved)
        except ValueError as e:
            raise Finding("restore", f"a new model refuses what was saved: {e}") from None
        if other.model.save() != saved:
            raise Finding("restore", "a restored model saves something else")

    def _check_quiet(self) -> None:
        self._input.typed.clear()
        saved = self.model.save()
        for region in self.entry.regions:
            for offset in range(min(region.size, 16)):
                self.model.restore(saved)  # a read may take away what the next one would show
                for n in range(2 * _SETTLE):
                    if n == _SETTLE:
                        self._raised.clear()
                    self.model.read(region.space, offset, 1)
                    self._pump()
                if len(self._raised) > 1:
                    raise Finding(
                        "cause", f"{len(self._raised)} edges while {region.space.name} {offset:#x} is read"
                    )

    def _repeat(self, last: tuple[int, int, int, int, int], count: int) -> int | None:
        op, space, offset, size, value = last
        got: int | None = None
        edges = len(self._raised)
        count = min(count, self._repeats)
        self._repeats -= count
        for _ in range(count):
            if op == Op.READ:
                got = self.model.read(space, offset, size)
            else:
                self.model.write(space, offset, size, value)
            self._pump()
            if len(self._raised) > edges + EDGES_MAX:
                raise Finding("storm", f"{len(self._raised) - edges} edges in one access")
            edges = len(self._raised)
        return got

    def _clock(self, _size: int, ns: int) -> None:
        self.now_ns += ns
        self.wall_ns += ns

    def _wall(self, _size: int, ns: int) -> None:
        # A clock that is nanoseconds in 64 bits; the host's cannot show anything else.
        self.wall_ns = min(max(self.wall_ns + ns - (ns >> 63 << 64), -_I63), _I63 - 1)

    def _data(self, size: int, value: int) -> None:
        if len(self._pending) < PENDING_MAX:
            self._pending += value.to_bytes(8, "little")[:size]

    def _type(self, _size: int, _value: int) -> None:
        self._input.typed += self._pending
        self._pending = b""

    def _room(self, _size: int, room: int) -> None:
        full = not self._output.room
        self._output.room = room
        if full and room:
            self._output.on_room()

    def _save(self, _size: int, _value: int) -> None:
        if self._saved:
            return  # once in an input: it takes as long as a hundred accesses
        self._saved = True
        saved = self.model.save()
        try:
            self.model.restore(saved)
        except ValueError as e:
            raise Finding("restore", f"the model refuses what it saved: {e}") from None
        if self.model.save() != saved:
            raise Finding("restore", "a model restored to its own state saves something else")

    def _pump(self) -> None:
        model, source = self.model, self._input
        while True:
            due = model.deadline_ns
            if due is not None and due <= self.now_ns:
                model.on_deadline(self.now_ns)
                due = model.deadline_ns
                if due is not None and due <= self.now_ns:
                    raise Finding("busy", f"the deadline is {self.now_ns - due} ns ago after on_deadline")
            if not source.typed or not source.wanted():
                return
            left = len(source.typed)
            source.on_input()
            if len(source.typed) == left and source.wanted():
                raise Finding("busy", "input is wanted, there, and not read")

    def _step(self, got: int | None) -> Step:
        counts: dict[int, int] = {}
        for number in self._raised:
            counts[number] = counts.get(number, 0) + 1
        self._raised.clear()
        sent = bytes(self._output.sent)
        self._output.sent.clear()
        return Step(got, counts, sent)


def trace(entry: Entry, model: type[Any], rep: Rep) -> list[Step]:
    """What each operation of `rep` brings from a new model.

    Raises:
        Finding: an oracle spoke.
        Exception: the model raised.
    """
    steps: list[Step] = []
    bench = Bench(entry, model, entry.check_params(rep.params), rep.clock_ns, rep.wall_ns)
    bench.run(rep.data, steps)
    return steps


class _Snapshot:
    """The contents of everything that can change in a model, put back in place by `restore`.

    In place, because the dispatch of `regs.Model` is bound to the containers.  Ports, and that dispatch, do
    not change.
    """

    def __init__(self, root: object) -> None:
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._lists: list[tuple[Any, Any]] = []  # what takes a slice
        self._sets: list[tuple[set[Any], set[Any]]] = []
        self._slots: list[tuple[object, str, Any]] = []
        self.extent = 0
        known: set[int] = set()
        todo: deque[object] = deque([root])
        while todo:
            item = todo.popleft()
            if id(item) in known:
                continue
            known.add(id(item))
            todo.extend(self._take(item))

    def _take(self, item: object) -> Iterator[object]:
        kind = type(item)
        if isinstance(item, dict):
            self._dicts.append((item, dict(item)))
            yield from item.values()
        elif isinstance(item, list | deque):
            self._lists.append((item, list(item)))
            yield from item
        elif kind is bytearray:
            self._lists.append((item, bytes(item)))  # type: ignore[call-overload]
        elif isinstance(item, set):
            self._sets.append((item, set(item)))
        elif isinstance(item, tuple):
            yield from item
            return
        elif kind.__module__.startswith("devproc.fuzz.") or kind is regs._Bank:
            return
        elif isinstance(getattr(item, "__dict__", None), dict) and not callable(item):
            self._dicts.append((item.__dict__, dict(item.__dict__)))
            yield from item.__dict__.values()
            return
        else:
            for name in getattr(kind, "__slots__", ()):
                value = getattr(item, name, None)
                if not _frozen(kind):
                    self._slots.append((item, name, value))
                yield value
            return
        self.extent += len(item)  # type: ignore[arg-type]

    def restore(self) -> None:
        for now, then in self._dicts:
            now.clear()
            now.update(then)
        for sequence, then in self._lists:
            if isinstance(sequence, deque):
                sequence.clear()
                sequence.extend(then)
            else:
                sequence[:] = then
        for members, were in self._sets:
            members.clear()
            members.update(were)
        for item, name, value in self._slots:
            setattr(item, name, value)


def _frozen(kind: type[Any]) -> bool:
    params = getattr(kind, "__dataclass_params__", None)
    return params is not None and bool(params.frozen)
