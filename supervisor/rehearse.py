"""An input put to a device process as in a VM, over the real wire, and compared with what is expected of it.

The process is a rehearsal (devproc/fuzz/rehearsal.py): only its clocks are ours.  After each operation its
loop is let come to rest, by a `Ping` for each turn that it may need: a deadline, output, input.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any, Final

from devproc import jail, zygote
from devproc.catalog import Entry
from devproc.channel import ChannelClosed
from devproc.fuzz.inputs import REPEATS_MAX, Op, Record, Rep, records
from devproc.wire import Done, PeerError, Ping, Pong, Restore, Save, State
from supervisor.subject import Died, Subject

_TURNS: Final = 3  # of its loop after an operation: see above
_SENT_MAX: Final = 1 << 16


class Rehearsal:
    """Rehearses inputs of one kind of device, each with a new process.

    Args:
        nursery: a zygote of the program devproc.fuzz.rehearsal; the caller's to close.
        number: which host uid the processes get as root.
    """

    def __init__(self, nursery: zygote.Zygote, entry: Entry, mode: jail.Mode, number: int) -> None:
        self._nursery = nursery
        self._entry = entry
        self._mode = mode
        self._number = number

    def differs(self, rep: Rep, steps: Sequence[Any], *, mailbox: bool = False) -> str | None:
        """How the process differs from `steps`, each [value, [[signal, count]...], hex]; None: it does not.

        `mailbox`: accesses go through its mailbox, and not over its access channel.  Nothing is compared from
        the first operation on that only a bench can do (`room`).
        """
        clocks = (rep.clock_ns, rep.wall_ns)
        made = Subject(self._nursery, self._entry, self._mode, rep.params, self._number, clocks, mailbox)
        with made as subject:
            one = _Run(subject, rep)
            try:
                for number, record in enumerate(records(rep.data)):
                    if record.op == Op.ROOM:
                        return None
                    got = one.do(record)
                    expected = [
                        *steps[number][:1],
                        [list(pair) for pair in steps[number][1]],
                        steps[number][2],
                    ]
                    if got != expected:
                        what = f"{Op(record.op).name.lower()} {record.offset:#x}"
                        return f"operation {number}, {what}: {got} in its process, {expected} on the bench"
            except (ChannelClosed, TimeoutError):
                death = subject.autopsy()
                return f"{death.kind} in its process: {death.why}"
            except PeerError as e:
                return f"broke the protocol: {e}"
            except Died as death:
                return f"{death.kind} in its process: {death.why}"
        return None


class _Run:
    """One process, and where its clocks stand."""

    def __init__(self, subject: Subject, rep: Rep) -> None:
        self._subject = subject
        self._clock_ns, self._wall_ns = rep.clock_ns, rep.wall_ns
        self._pending = b""
        self._last: Record | None = None
        self._repeats = REPEATS_MAX

    def do(self, record: Record) -> list[Any]:
        """What the operation brought."""
        value: int | None = None
        subject = self._subject
        match record.op:
            case Op.READ | Op.WRITE:
                value = self._access(record)
                self._last = record
            case Op.REPEAT if self._last is not None:
                count = min(record.data, self._repeats // self._last.size)
                self._repeats -= count * self._last.size
                for _ in range(count):
                    value = self._access(self._last)
                    self._rest()
            case Op.CLOCK:
                self._clock_ns += record.data
                self._wall_ns += record.data
                subject.page.set_clocks(self._clock_ns, self._wall_ns)
            case Op.WALL:
                self._wall_ns += record.data - (record.data >> 63 << 64)
                self._wall_ns = min(max(self._wall_ns, -(1 << 63)), (1 << 63) - 1)
                subject.page.set_clocks(self._clock_ns, self._wall_ns)
            case Op.DATA:
                self._pending += record.data.to_bytes(8, "little")[: record.size]
            case Op.INPUT:
                os.write(subject.typed, self._pending)
                self._pending = b""
            case Op.SAVE:
                self._save()
        self._rest()
        raised = []
        for number, fd in enumerate(subject.signals):
            with contextlib.suppress(BlockingIOError):
                raised.append([number, int.from_bytes(os.read(fd, 8), "little")])
        sent = b""
        if subject.shown >= 0:
            with contextlib.suppress(BlockingIOError):
                sent = os.read(subject.shown, _SENT_MAX)
        return [value, raised, sent.hex()]

    def _access(self, r: Record) -> int | None:
        if r.op == Op.READ:
            return self._subject.read(r.space, r.offset, r.size)
        self._subject.write(r.space, r.offset, r.size, r.data)
        return None

    def _save(self) -> None:
        control = self._subject.control
        control.send(Save())
        saved = control.recv()
        assert isinstance(saved, State)
        control.send(Restore(saved.state))
        if not isinstance(control.recv(), Done):
            raise PeerError("it refuses what it has saved")

    def _rest(self) -> None:
        control = self._subject.control
        for token in range(_TURNS):
            control.send(Ping(token))
            if control.recv() != Pong(token):
                raise PeerError("another Pong than was asked for")
