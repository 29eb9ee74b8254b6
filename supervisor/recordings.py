"""`vmsup run --record DIR` and `vmsup replay DIR`: the conversation of each device, kept and held again.

The device processes write their own record (devproc/fuzz/recording.py) into memory that is shared with the
supervisor, which puts it into DIR/NAME.vmrep when the guest has ended.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from devproc import jail, zygote
from devproc.catalog import CATALOG, Entry
from devproc.fuzz import recording
from devproc.fuzz.inputs import (
    Gave,
    InputError,
    Op,
    Record,
    Rep,
    canonical,
    chunks,
    encode,
    joined,
    parse,
    to_text,
)
from devproc.wire import Scalar
from kvmcore.errors import EXIT_CRASH, ConfigError
from supervisor.rehearse import Rehearsal

_FEEDS: Final = (Op.EVENT, Op.MEMORY, Op.GAVE, Op.WROTE)

Say = Callable[[str], None]


class Recordings:
    """The records of one VM's devices.

    Args:
        where: the directory; files in it that are named after a device are replaced.

    Raises:
        ConfigError: it cannot be made.
    """

    def __init__(self, where: str) -> None:
        self._where = Path(where)
        self._left_out: list[str] = []
        self._kept: list[tuple[int, mmap.mmap, Entry, tuple[Scalar, ...]]] = []
        try:
            self._where.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"--record {where}: {e.strerror}") from None

    def extra(self, name: str, entry: Entry, params: tuple[Scalar, ...]) -> int:
        """What the process of the instance `name` is handed besides; the caller's to close.

        Raises:
            ConfigError: its file cannot be written.
        """
        memfd = recording.create(entry)
        if recording.recorded(entry):
            path = self._where / f"{name}.vmrep"
            try:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            except OSError as e:
                os.close(memfd)
                raise ConfigError(f"--record {path}: {e.strerror}") from None
            size = recording.size_of(entry)
            self._kept.append((fd, mmap.mmap(memfd, size, prot=mmap.PROT_READ), entry, params))
        else:
            self._left_out.append(name)
        return memfd

    def write(self, say: Say) -> None:
        """Write the files; opens nothing, for the supervisor is sealed by now."""
        for fd, record, entry, params in self._kept:
            size, clock_ns, wall_ns, full = recording.HEAD.unpack_from(record, 0)
            start = recording.RECORDS_AT
            data = record[start : start + min(size, len(record) - start)]
            data = canonical(entry, data, recorded=True)  # the process that wrote it is not trusted
            if full:
                say(f"the record of a {entry.name} ends early: more than {len(record) >> 20} MiB")
            text = to_text(Rep(entry.name, data, params, clock_ns, wall_ns)).encode()
            while text:
                text = text[os.write(fd, text) :]
        for name in self._left_out:
            say(f"{name} is not recorded: what it shares with the host cannot be held again")


def expected(rep: Rep) -> tuple[Rep, list[list[Any]]]:
    """What is to be done of a recording, and for each of it what came of it (see `Rehearsal.differs`)."""
    done: list[Record] = []
    steps: list[list[Any]] = []
    for pending, r in joined(rep.data):
        match r.op:
            case Op.RAISED if steps:
                steps[-1][1].append([r.aux, r.data])
            case Op.SENT if steps:
                steps[-1][2] += pending.hex()
            case _ if r.op in _FEEDS and steps and (r.op != Op.EVENT or r.space):
                _feed(steps[-1], r, pending)
            case _:
                for chunk in chunks(pending):
                    done.append(chunk)
                    steps.append(_step(None))
                done.append(r._replace(aux=0, data=0) if r.op == Op.READ else r)
                steps.append(_step(r.data if r.op == Op.READ and r.aux else None))
                if r.op == Op.EVENT:
                    steps[-1][3]["event"] = [r.aux, r.offset]
    if steps:
        steps[0][3]["fences"] = any(fence for step in steps for fence, _, _ in step[3]["memory"])
    return Rep(rep.device, encode(done), rep.params, rep.clock_ns, rep.wall_ns), steps


def _step(value: int | None) -> list[Any]:
    return [value, [], "", {"event": None, "gave": [], "memory": []}, []]


def _feed(step: list[Any], r: Record, data: bytes) -> None:
    """Add what a record says of the operation before it."""
    fed, changes = step[3:]
    if r.op == Op.EVENT:
        fed["gave"].append([r.aux, None, r.offset, None])
    elif r.op == Op.GAVE:
        fed["gave"].append([r.aux, r.size, r.offset, data.hex() if r.size == Gave.BYTES else r.data])
    else:
        changes.append([r.data, data.hex()])
        if r.op == Op.MEMORY:
            fed["memory"].append([r.offset, *changes[-1]])


def replay(where: str, *, jailed: bool = True) -> tuple[str, int]:
    """(text, exit code): every recording in a directory, or one file, held again with a new device process.

    Raises:
        ConfigError: there is none, or one cannot be read.
        VmsupError: a process could not be started.
    """
    mode = jail.Mode.FULL if jailed else jail.Mode.NONE
    path = Path(where)
    paths = sorted(path.glob("*.vmrep")) if path.is_dir() else [path]
    if not paths:
        raise ConfigError(f"{where}: there is no .vmrep file")
    reps = [(p, _read(p)) for p in paths]
    lines = []
    wrong = 0
    with contextlib.ExitStack() as undo:
        kinds = sorted({rep.device for _, rep in reps})
        nursery = zygote.start(kinds, program="devproc.fuzz.rehearsal", mode=mode)
        undo.callback(os.waitpid, nursery.pid, 0)
        undo.callback(nursery.close)
        for p, rep in reps:
            what, steps = expected(rep)
            why = Rehearsal(nursery, CATALOG[rep.device], mode, 0).differs(what, steps)
            lines.append(f"{p}: {why or f'{len(steps):,} operations, each as recorded'}")
            wrong += why is not None
    return "\n".join(lines), EXIT_CRASH if wrong else 0


def _read(path: Path) -> Rep:
    try:
        return parse(path.read_text())
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}") from None
    except (InputError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: {e}") from None
