"""An input put to a device process as in a VM, over the real wire, and compared with what is expected of it.

The process is a rehearsal (devproc/fuzz/rehearsal.py): only its clocks are ours.  After each operation its
loop is let come to rest, by a `Ping` for each turn that it may need: a deadline, output, input.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Any, Final

from devproc import jail, zygote
from devproc.catalog import Entry
from devproc.channel import ChannelClosed
from devproc.fuzz.inputs import REPEATS_MAX, Op, Record, Rep, ports, records
from devproc.wire import Done, Failed, Log, PeerError, Ping, Pong, Restore, Save, Set, State
from kvmcore.memory import GuestMemory
from supervisor.subject import Died, Subject

_LITTLE: Final = 1 << 20  # guest memory that is compared after each operation
_KICKS: Final = ("kick", "resample")
_TURNS: Final = 3  # of its loop after an operation, see above; with guest memory one `Ping` is enough
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

        With guest memory a step has two more: what is fed to it (devproc/fuzz/rehearsal.py), and in its order
        [address, bytes] of what the guest and it write to memory.
        `mailbox`: accesses go through its mailbox, and not over its access channel.  Nothing is compared from
        the first operation on that only a bench can do (`room`).
        """
        clocks = (rep.clock_ns, rep.wall_ns)
        fed = steps[0][3] if steps and self._entry.guest_memory else None
        made = Subject(self._nursery, self._entry, self._mode, rep.params, self._number, clocks, fed, mailbox)
        with made as subject:
            one = _Run(subject, self._entry, rep)
            what = "before the first operation"
            try:
                for number, record in enumerate(records(rep.data)):
                    if record.op == Op.ROOM:
                        return None
                    step = steps[number]
                    what = f"operation {number}, {_told(self._entry, record)}"
                    if self._entry.guest_memory:
                        one.feed(number, step[3])
                    got = one.do(record)
                    expected = [step[0], [list(pair) for pair in step[1]], step[2]]
                    if got != expected:
                        return f"{what}: {got} in its process, expected {expected}"
                    if self._entry.guest_memory and (wrong := one.differs(step[4])):
                        return f"{what}: {wrong}"
                if self._entry.guest_memory and (wrong := one.differs([], whole=True)):
                    return f"in the end {wrong}"
            except (ChannelClosed, TimeoutError):
                if (why := _last_words(subject)) is not None:
                    return f"{what}: {why}"
                death = subject.autopsy()
                return f"{death.kind} in its process: {death.why}"
            except _Failed as e:
                return f"{what}: {e}"
            except PeerError as e:
                return f"broke the protocol: {e}"
            except Died as death:
                return f"{death.kind} in its process: {death.why}"
        return None


class _Failed(Exception):
    """The process cannot go on, and says why."""


def _told(entry: Entry, record: Record) -> str:
    if record.op == Op.EVENT:
        return f"{ports(entry)[record.aux]} calls"
    return f"{Op(record.op).name.lower()} {record.offset:#x}"


def _written(memory: GuestMemory) -> Iterator[tuple[int, int]]:
    """The pages that are not holes of its file, each as (address, size)."""
    end = 0
    while True:
        try:
            start = os.lseek(memory.fd, end, os.SEEK_DATA)
        except OSError:  # ENXIO: there is no more
            return
        end = os.lseek(memory.fd, start, os.SEEK_HOLE)
        for region in memory.regions:
            low, high = max(start, region.offset), min(end, region.offset + region.size)
            for at in range(low, high, mmap.PAGESIZE):
                yield region.gpa + at - region.offset, min(mmap.PAGESIZE, high - at)


def _last_words(subject: Subject) -> str | None:
    """Why it ended, if it said so."""
    with contextlib.suppress(ChannelClosed, PeerError, TimeoutError):
        while True:
            if isinstance(message := subject.control.recv(), Failed):
                return message.why
    return None


class _Run:
    """One process, and where its clocks stand."""

    def __init__(self, subject: Subject, entry: Entry, rep: Rep) -> None:
        self._subject = subject
        self._clock_ns, self._wall_ns = rep.clock_ns, rep.wall_ns
        self._pending = b""
        self._last: Record | None = None
        self._repeats = REPEATS_MAX
        self._entry = entry
        self._kicks = [n for n, name in enumerate(ports(entry)) if name.partition(".")[0] in _KICKS]
        self._number = 0
        if entry.guest_memory:
            self._expected = GuestMemory.create([r[:2] for r in subject.memory.regions])

    def feed(self, number: int, fed: dict[str, Any]) -> None:
        """Before an operation of a device with guest memory: what the guest and the host have ready."""
        self._number = number
        for fence, gpa, data in fed["memory"]:
            if not fence:
                self._subject.memory.write(gpa, bytes.fromhex(data))
        if number:
            self._subject.page.ask(fed)
            self._set_clocks()

    def differs(self, changes: Sequence[Any], *, whole: bool = False) -> str | None:
        """How guest memory is not what it was and `changes`, which are made to `_expected`.

        Looked at are these places, or, if it is little or `whole`, all that is not a hole.
        """
        memory, expected = self._subject.memory, self._expected
        places = []
        for gpa, data in changes:
            expected.write(gpa, bytes.fromhex(data))
            places.append((gpa, len(data) // 2))
        if whole or memory.size <= _LITTLE:
            places = sorted({*_written(memory), *_written(expected)})
        for gpa, size in places:
            there, right = memory.read(gpa, size), expected.read(gpa, size)
            if there != right:
                at = next(n for n, pair in enumerate(zip(there, right, strict=True)) if len({*pair}) > 1)
                got, wanted = (b[at : at + 8].hex() for b in (there, right))
                return f"memory at {gpa + at:#x} is {got} in its process, expected {wanted}"
        return None

    def _set_clocks(self) -> None:
        self._subject.page.set_clocks(self._clock_ns, self._wall_ns, self._number)

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
                self._set_clocks()
            case Op.WALL:
                self._wall_ns += record.data - (record.data >> 63 << 64)
                self._wall_ns = min(max(self._wall_ns, -(1 << 63)), (1 << 63) - 1)
                self._set_clocks()
            case Op.DATA:
                self._pending += record.data.to_bytes(8, "little")[: record.size]
            case Op.INPUT:
                os.write(subject.typed, self._pending)
                self._pending = b""
            case Op.EVENT if record.aux in self._kicks:
                os.eventfd_write(subject.kicks[self._kicks.index(record.aux)], 1)
            case Op.SET:
                subject.control.send(Set(self._entry.settings[record.aux].name, record.data))
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
        for token in range(1 if self._entry.guest_memory else _TURNS):
            control.send(Ping(token))
            while isinstance(answer := control.recv(), Log):
                pass
            if isinstance(answer, Failed):
                raise _Failed(answer.why)
            if answer != Pong(token):
                raise PeerError("another Pong than was asked for")
