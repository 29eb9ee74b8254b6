"""`vmsup jail selftest`: the escape matrix of this host, each attempt made in several sets of layers.

A row is an attempt of `devproc.escapes`, a column a set of layers; each cell is a device process of its own,
forked by a real zygote and jailed as devices are, with the policy and descriptors of a shipped one.  An
attempt that fails without any jail too proves nothing, and is counted apart.  Left out: what a device can do
to the supervisor by the frames it may send (integration/hostile).
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from devproc import escapes, jail, syscalls, wire, zygote
from devproc.catalog import CATALOG, Entry
from devproc.channel import Channel, ChannelClosed
from devproc.escapes import Attempt, attempts
from devproc.violations import read_violation
from kvmcore import probe
from kvmcore.errors import VmsupError
from kvmcore.mailbox import Mailbox
from kvmcore.memory import GuestMemory
from policies.compile import compile_notify
from policies.parse import load
from policies.syscalls import NAMES
from supervisor.spawn import host_id

FULL: Final = "full"
NONE: Final = "none"
SUCCEEDED: Final = "succeeded"
KILLED: Final = "killed"
VICTIM: Final = "serial"  # its page grants the most

_SILENCE_S: Final = 10
_WARNING: Final = 30  # the logging levels of wire.Log
_NOT_HYGIENE: Final = frozenset(s.name for s in jail.STEPS if not s.always)


@dataclass(frozen=True)
class Column:
    """A set of layers: its name, and what it lacks."""

    name: str
    without: frozenset[str] = frozenset()

    @property
    def mode(self) -> jail.Mode:
        if self.without == _NOT_HYGIENE:
            return jail.Mode.NONE
        # A device that is ready without a filter is refused in mode "full".
        return jail.Mode.BEST_EFFORT if "seccomp" in self.without else jail.Mode.FULL


COLUMNS: Final = (
    Column(FULL),
    Column("seccomp alone", _NOT_HYGIENE - {"seccomp", "no-gain"}),  # without new privileges, as it must be
    Column("all but seccomp", frozenset({"seccomp"})),
    Column(NONE, _NOT_HYGIENE),
)


def single_layers() -> tuple[Column, ...]:
    """Each layer left out; seccomp is a column anyway, and a user cannot have it without "no-gain"."""
    # Nor, without namespaces, another identity, another root, or as an ordinary user a smaller bounding set.
    dependents = {"namespaces": {"identity", "root"} | ({"capabilities"} if os.geteuid() else set())}
    layers = [s.name for s in jail.STEPS if s.name in _NOT_HYGIENE - {"no-gain", "seccomp"}]
    return tuple(Column(f"no {layer}", frozenset({layer, *dependents.get(layer, ())})) for layer in layers)


@dataclass(frozen=True)
class Outcome:
    """What became of one attempt.

    `word`: SUCCEEDED, KILLED (by the policy), the errno's name or the signal's, or what went wrong instead.
    `call`: the system call the supervisor was told of.
    """

    word: str
    call: str | None = None

    @property
    def contained(self) -> bool:
        return self.word == KILLED or self.word in errno.errorcode.values() or self.word.startswith("SIG")


@dataclass(frozen=True)
class Row:
    """One attempt, and its outcome by column name."""

    attempt: Attempt
    outcomes: dict[str, Outcome]

    @property
    def vacuous(self) -> bool:
        """It does not succeed without a jail either."""
        return self.outcomes[NONE].word != SUCCEEDED


@dataclass(frozen=True)
class Matrix:
    """Every row, as user `uid`, in the jail of the device `victim`."""

    victim: str
    uid: int
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    def successes(self, column: str) -> int:
        return sum(row.outcomes[column].word == SUCCEEDED for row in self.rows)

    @property
    def escaped(self) -> list[Row]:
        """What the full jail did not contain."""
        return [row for row in self.rows if not row.outcomes[FULL].contained]

    @property
    def vacuous(self) -> int:
        return sum(row.vacuous for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        return {
            "device": self.victim,
            "uid": self.uid,
            "attempts": len(self.rows),
            "vacuous": self.vacuous,
            "successes": {c.name: self.successes(c.name) for c in self.columns},
            "without": {c.name: sorted(c.without) for c in self.columns},
            "rows": [
                {
                    "group": row.attempt.group,
                    "attempt": row.attempt.name,
                    "vacuous": row.vacuous,
                    "outcomes": {
                        name: {"outcome": o.word} | ({"call": o.call} if o.call else {})
                        for name, o in row.outcomes.items()
                    },
                }
                for row in self.rows
            ],
        }

    def text(self) -> str:
        """For people."""
        widths = [max(10, len(c.name)) for c in self.columns]
        names = " ".join(f"{c.name:{w}}" for c, w in zip(self.columns, widths, strict=True))
        lines = [f"{'':50} {names}".rstrip()]
        for row in self.rows:
            label = f"{row.attempt.group}: {row.attempt.name}"
            words = [row.outcomes[c.name].word for c in self.columns]
            cells = " ".join(f"{word:{w}}" for word, w in zip(words, widths, strict=True))
            lines.append(f"{label:50} {cells}{' (vacuous)' * row.vacuous}".rstrip())
        who = "root" if self.uid == 0 else f"uid {self.uid}"
        counts = ", ".join(f"{c.name} {self.successes(c.name)}" for c in self.columns)
        proven = len(self.rows) - self.vacuous
        lines += [
            f"{len(self.rows)} attempts in the jail of {self.victim}, as {who}; successes: {counts}",
            f"{self.vacuous} rows are vacuous: nothing here lets them succeed; {proven} prove something",
        ]
        for row in self.escaped:
            lines.append(f"ESCAPED: {row.attempt.group}: {row.attempt.name}: {row.outcomes[FULL].word}")
        return "\n".join(lines)


def run(victim: str = VICTIM, layers: bool = False) -> Matrix:
    """Make every attempt in every set of layers; takes some seconds.

    Args:
        victim: the catalogue name of the device whose jail is attacked.
        layers: also with each single layer left out.

    Raises:
        VmsupError: a device process could not be started.
    """
    columns = (*COLUMNS, *single_layers()) if layers else COLUMNS
    lines, failure = probe.bounded(lambda tell: _attack(victim, columns, tell), _SILENCE_S)
    if failure is not None:
        raise VmsupError(f"jail selftest: {failure}")
    rows = []
    for attempt, line in zip(attempts(CATALOG[victim]), lines, strict=True):
        outcomes = {name: Outcome(*told) for name, told in json.loads(line).items()}
        rows.append(Row(attempt, outcomes))
    return Matrix(victim, os.geteuid(), columns, tuple(rows))


def _attack(victim: str, columns: Sequence[Column], tell: Callable[[str], None]) -> None:
    """The supervisor of all attackers; tells one line of JSON per attempt."""
    if os.geteuid() == 0:  # whatever root's controls bring about stays here
        syscalls.unshare(syscalls.CLONE_NEWNS | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS)
        syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    entries = {c.name: escapes.attacker(f"attacker-{n}", victim, c.without) for n, c in enumerate(columns)}
    CATALOG.update({e.name: e for e in entries.values()})

    def filters(entry: Entry) -> zygote.Filters:
        return compile_notify(load(victim, entry.slots()), jail.SETUP_CALLS)

    nursery = zygote.start([e.name for e in entries.values()], filters, mode=None)
    memory = GuestMemory.create([(0, 1 << 20)])
    sizes = {"mem_below_4g": memory.size}
    harmless = [sizes.get(p.name, p.low) if p.type is int else bytes(p.low) for p in CATALOG[victim].params]
    params = (*harmless, os.getpid(), memory.host_address(0, memory.size), memory.fd)
    with tempfile.TemporaryDirectory() as path:
        shared = os.open(path, os.O_PATH | os.O_DIRECTORY)
        for n, attempt in enumerate(attempts(CATALOG[victim])):
            cells = [
                _Cell.spawn(nursery, entries[c.name], c, i, params, memory.fd, shared)
                for i, c in enumerate(columns, 1)
            ]
            told = {}
            for cell in cells:
                outcome = cell.attempt(n, attempt)
                told[cell.column.name] = (outcome.word, outcome.call)
                cell.close()
            tell(json.dumps(told))


@dataclass
class _Cell:
    """One attacker's process."""

    column: Column
    entry: Entry
    pid: int
    access: socket.socket
    control: Channel

    @classmethod
    def spawn(
        cls,
        nursery: zygote.Zygote,
        entry: Entry,
        column: Column,
        number: int,
        params: tuple[int | bytes, ...],
        memory: int,
        shared: int,
    ) -> Self:
        access, its_access = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control, its_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        null, event = os.open(os.devnull, os.O_RDWR), os.eventfd(0, os.EFD_NONBLOCK)
        mailbox = Mailbox.create()
        fds = [null, its_access.fileno(), its_control.fileno(), *mailbox.fds]
        given = {"signal": event, "kick": event, "memory": memory, "directory": shared}
        for d, numbers in entry.own_slots():
            fds += [given.get(d.kind, null)] * len(numbers)
        mode = column.mode
        own_id = host_id(number) if mode is not jail.Mode.NONE else 0
        try:
            pid = nursery.spawn(entry.name, entry.name, fds, host_id=own_id, mode=mode, params=params)
        except zygote.SpawnError as e:
            raise VmsupError(f"{column.name}: {e}") from None
        finally:
            os.close(null)
            os.close(event)
            mailbox.close()
            its_access.close()
            its_control.close()
        for sock in (access, control):
            sock.settimeout(_SILENCE_S / 2)
        return cls(column, entry, pid, access, zygote.control_channel(control))

    def attempt(self, number: int, attempt: Attempt) -> Outcome:
        """Let it make attempt `number` once it is sealed in its jail."""
        try:
            greeting = zygote.await_ready(self.control, self.entry.name, self.column.mode, _SILENCE_S / 2)
        except (zygote.SpawnError, wire.PeerError, ChannelClosed, TimeoutError) as e:
            raise VmsupError(f"{self.column.name}: {e or type(e).__name__}") from None
        for level, text in greeting.notes:
            if level >= _WARNING:
                raise VmsupError(f"{self.column.name}: {text}")
        listener = greeting.listener
        try:
            self.access.send(wire.encode(wire.Read(wire.Space.PORT, number, 8)))
            return self._outcome(attempt, listener)
        finally:
            if listener is not None:
                os.close(listener)

    def _outcome(self, attempt: Attempt, listener: int | None) -> Outcome:
        access = self.access.fileno()
        waiting = [access] if listener is None else [access, listener]
        ready = select.select(waiting, [], [], _SILENCE_S / 2)[0]
        if not ready:
            return Outcome("silence")
        if access not in ready:
            assert listener is not None
            violation = read_violation(listener)
            if violation is not None:
                return Outcome(KILLED, NAMES.get(violation.nr, f"system call {violation.nr}"))
        elif frame := self.access.recv(wire.ACCESS_FRAME_MAX):
            value = wire.decode(frame)
            assert isinstance(value, wire.Value)
            return Outcome(errno.errorcode.get(value.data, str(value.data)) if value.data else SUCCEEDED)
        return self._end(attempt)

    def _end(self, attempt: Attempt) -> Outcome:
        """How the process ended by itself."""
        result = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert result is not None
        if result.si_code == os.CLD_EXITED:
            done = attempt.exits and result.si_status == 0
            return Outcome(SUCCEEDED if done else f"exit {result.si_status}")
        name = signal.Signals(result.si_status).name
        return Outcome(KILLED if name == "SIGSYS" else name)

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.access.close()
        self.control.close()
