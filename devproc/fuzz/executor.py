"""A device process that fuzzes itself: the program (`nursery.Program`) of `vmsup fuzz`.

It is the device process of a VM, with the same descriptors, jail and policy, up to the moment it would
serve.  Then it makes inputs, runs them on a `bench.Bench`, and keeps those that reach something new: a round
trip per input would cost more than the input.  Each `Ping` of the supervisor runs the request that is in the
page, its `Pong` says that the answer is there.  That the bench is no other device than the one behind the
wire is checked by the supervisor, which rehearses a sample (rehearsal.py).

What an input costs is mostly what its beginning costs, so inputs are made in families: one is run as a whole,
the bench is marked somewhere in it, and those that follow begin there and differ in what comes after.  Each
is an input like any other, which begins with a new device when it is run by itself.

Requests are objects with "mode":

    mutate  "inputs" join the corpus, "count" inputs are made and run: "new", "found", "sample", "runs"
    exact   "inputs" are run as they are: for each its "blocks", and its finding or none in "found"
    trace   "input" is run on a new model from "clock" and "wall": "steps", or with guest memory "record", the
            conversation with its driver (recording.py), or "found"
"""

from __future__ import annotations

import functools
import re
import socket
import sys
from collections.abc import Callable
from typing import Any, Final, NoReturn

from devproc import child, jail
from devproc.backends import memory
from devproc.catalog import MEMORY_PARAMS, Entry, Params
from devproc.channel import Channel
from devproc.digest import sha256
from devproc.fuzz import instrument
from devproc.fuzz.bench import Bench, Step
from devproc.fuzz.finding import Finding
from devproc.fuzz.inputs import RECORD, Op, canonical
from devproc.fuzz.mutate import Mutator
from devproc.fuzz.page import Page
from devproc.fuzz.private import new_copy
from devproc.fuzz.recording import HEAD, RECORDS_AT, on_bench
from devproc.ports import Device
from devproc.wire import PeerError, Ping, Pong, Stop
from kvmcore.memory import GuestMemory

EXTRA_FDS: Final = 1  # the page
_PATTERNS_MAX: Final = 1 << 15  # sets of blocks that are known to be nothing new
_REPLY_INPUTS: Final = 256  # in one answer
_CHECK_EVERY: Final = 1024  # inputs; what reaches something new is always checked
_RESTART: Final = bytes([Op.RESTART])
_STARTS_MAX: Final = 96  # marks of the bench, each a copy of the rings
_TAILS: Final = 128  # inputs that begin with the same operations, one after the other
_RECORD_MAX: Final = 1 << 20
_FRAMES: Final = 3  # of a traceback that tell findings apart


def load(entry: Entry) -> type[Any]:
    """The model, instrumented."""
    return instrument.load(entry)


def main(ctx: jail.Context, model: type[Any], name: str) -> NoReturn:
    """As `child.main`, with the page as one more descriptor."""
    *fds, fd = ctx.fds
    page = Page(fd)
    ctx.fds = fds
    child.main(ctx, model, name, functools.partial(Executor, page))


def describe(error: Exception) -> dict[str, Any]:
    """A finding as it is reported: kind, why, frames from the innermost, and what tells it from others."""
    frames = []
    at = error.__traceback__
    while at is not None:
        code = at.tb_frame.f_code
        place = "/".join(code.co_filename.split("/")[-2:])
        if not place.startswith("fuzz/"):
            frames.append(f"{place}:{at.tb_lineno} {code.co_name}")
        at = at.tb_next
    frames.reverse()
    kind = error.kind if isinstance(error, Finding) else "exception"
    # An oracle's words tell its findings apart, the numbers in them do not.
    what = re.sub(r"[0-9a-fx]*\d[0-9a-fx]*", "#", str(error)) if isinstance(error, Finding) else ""
    told = [kind, type(error).__name__, what, *frames[:_FRAMES]]
    return {
        "kind": kind,
        "why": str(error)[:1000] if isinstance(error, Finding) else f"{type(error).__name__}: {error}"[:1000],
        "frames": frames[:20],
        "key": sha256("\n".join(told).encode()).hex()[:16],
    }


class Executor:
    """In place of `child.Server`: takes its arguments, after the page."""

    def __init__(
        self,
        page: Page,
        entry: Entry,
        model: type[Any],
        params: Params,
        access: socket.socket,
        control: Channel,
    ) -> None:
        self._page = page
        self._entry = entry
        self._model = model
        self._params = params
        self._memory: GuestMemory | None = None
        for d, fds in entry.own_slots():
            if d.kind == "memory":
                below, above = (params[p.name] for p in MEMORY_PARAMS)
                assert isinstance(below, int) and isinstance(above, int)
                self._memory = memory.attach(fds[0], below, above)
                self._copy = new_copy(below + above)  # which nobody can make later
        self._control = control
        self._access = access  # held open as every device holds it
        loaded = [sys.modules[name] for name in instrument.modules(entry)]
        self._words = sorted({word for m in loaded for word in getattr(m, instrument.WORDS)})
        self._loading = instrument.attach(loaded, page.map)
        self._blocks = len(self._loading)
        self._mutator: Mutator | None = None
        self._corpus: list[bytes] = []
        self._seen = 0
        self._patterns: set[int] = set()  # hashes: all of them would be a third of what a device may have
        self._known: set[str] = set()  # keys of findings that were reported
        self._runs = 0
        self._beats = 0
        self._whole = b""  # what the inputs now made begin with, is marked up to here
        self._stem = b""
        self._tails = 0  # to be made of it
        self._tried: set[bytes] = set()
        self._bench = self._new_bench()
        self.device: Device = self._bench.model

    def serve(self) -> None:
        """Until `Stop`; raises PeerError for a message that is no business of a fuzzed device."""
        while True:
            message = self._control.recv()
            match message:
                case Stop():
                    return
                case Ping(token):
                    self._page.reply(self._answer(self._page.request()))
                    self._control.send(Pong(token))
                case _:
                    raise PeerError(f"{type(message).__name__} to a device that is fuzzed")

    def _answer(self, asked: Any) -> dict[str, Any]:
        match asked["mode"]:
            case "mutate":
                return self._mutate(asked)
            case "exact":
                return self._exact(asked)
            case "trace":
                return self._trace(asked)
        raise PeerError(f"mode {asked['mode']!r}")

    # -- requests

    def _mutate(self, asked: dict[str, Any]) -> dict[str, Any]:
        if self._mutator is None:
            words = [*self._words, *asked["numbers"], *map(bytes.fromhex, asked["texts"])]
            self._mutator = Mutator(self._entry, self._model.TABLES, words, asked["seed"])
            self._random = self._mutator.random
            self._begin(b"")
            self._bench.check(b"")  # what a device does in any input is nothing new
            self._note()
        new: list[dict[str, Any]] = []
        found: list[dict[str, Any]] = []
        began = self._runs
        for text in asked["inputs"]:
            self._try(canonical(self._entry, bytes.fromhex(text)), new, found, check=True)
        until = began + asked["count"]
        while self._runs < until and len(new) < _REPLY_INPUTS and len(found) < _REPLY_INPUTS:
            if self._tails:
                self._try_tail(self._mutator, new, found)
            else:
                self._whole = self._made(self._mutator)
                self._try(self._whole, new, found)
                self._plant(self._random)
        return {
            "runs": self._runs - began,
            "new": new,
            "found": found,
            "sample": self._whole.hex(),
            "covered": self._indices(self._seen),
        }

    def _made(self, mutator: Mutator) -> bytes:
        """A new input, or one of the corpus that is changed."""
        rnd, corpus = self._random, self._corpus
        if rnd() < mutator.freshness + 1 / (1 + len(corpus)):
            return mutator.fresh()
        # The later ones are the deeper ones.
        data = corpus[int(rnd() ** 0.5 * len(corpus))]
        other = corpus[int(rnd() * len(corpus))]
        if len(other) < len(data) and rnd() < 0.5:  # the shorter ones are the quicker ones
            data, other = other, data
        return mutator.mutate(data, other)

    def _plant(self, rnd: Callable[[], float]) -> None:
        """Mark where the bench is after a part of the last input, which the next ones begin with.

        So most inputs take no longer than what is new in them.
        """
        if self._stem and (len(self._stem) > RECORD.size or self._stem[:1] != _RESTART):
            self._bench.unmark(self._stem)
            self._started.pop(self._stem, None)
        count = len(self._whole) // RECORD.size
        if rnd() < 0.3:  # otherwise all of it: what is left is run each time
            count = int(rnd() * (count + 1))
        self._stem = stem = self._whole[: count * RECORD.size]
        self._tails = _TAILS
        self._tried.clear()
        if stem and stem not in self._started:
            try:
                self._run(stem)
                self._mark(stem)
            except Exception:  # which was found when all of it was run
                self._bench = self._new_bench()
                self._tails = 0

    def _try_tail(self, mutator: Mutator, new: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
        self._tails -= 1
        corpus = self._corpus
        other = corpus[int(self._random() * len(corpus))] if corpus else b""
        tail = mutator.tail(self._whole[len(self._stem) :], other)
        if tail not in self._tried:
            self._tried.add(tail)
            self._try(self._stem + tail, new, found, stem=self._stem)

    def _exact(self, asked: dict[str, Any]) -> dict[str, Any]:
        blocks: list[list[int]] = []
        found: list[dict[str, Any] | None] = []
        for text in asked["inputs"]:
            data = canonical(self._entry, bytes.fromhex(text))
            error = None
            try:
                self._run(data)
                self._bench.check(data)
            except Exception as e:
                error = describe(e)
                self._bench = self._new_bench()
            blocks.append(self._indices(int.from_bytes(self._page.map[: self._blocks], "little")))
            found.append(error)
        return {"blocks": blocks, "found": found}

    def _trace(self, asked: dict[str, Any]) -> dict[str, Any]:
        data = canonical(self._entry, bytes.fromhex(asked["input"]))
        self._begin(data)
        record = bytearray(_RECORD_MAX)
        model: Any = self._model
        if self._memory is not None:
            self._memory.write(0, bytes(self._memory.size))
            self._copy[:] = bytes(len(self._copy))
            model = functools.partial(
                on_bench, record, self._entry, model, copy=self._copy, alive=self._alive
            )
        steps: list[Step] = []
        try:
            start = asked["clock"], asked["wall"]
            bench = Bench(self._entry, model, self._params, *start, self._memory, self._alive)
            bench.run(data, steps)
        except Exception as e:
            return {"found": describe(e)}
        if self._memory is not None:
            size, *clocks, full = HEAD.unpack_from(record)
            return {} if full else {"record": record[RECORDS_AT : RECORDS_AT + size].hex(), "clocks": clocks}
        return {"steps": [[s.value, sorted(s.raised.items()), s.sent.hex()] for s in steps]}

    # -- one input

    def _try(
        self,
        data: bytes,
        new: list[dict[str, Any]],
        found: list[dict[str, Any]],
        check: bool = False,
        stem: bytes = b"",
    ) -> None:
        """Run it; what is new joins the corpus and `new`, a finding that was not reported joins `found`."""
        try:
            hit = self._run(data, stem)
            pattern = hash(hit)
            if pattern not in self._patterns:
                if len(self._patterns) >= _PATTERNS_MAX:
                    self._patterns.clear()
                self._patterns.add(pattern)
                bits = int.from_bytes(hit, "little") & ~self._seen
                if bits:
                    self._bench.check(data)
                    self._note()
                    data = self._trimmed(data, bits)
                    self._corpus.append(data)
                    new.append({"input": data.hex(), "blocks": self._indices(bits)})
                    return
            if check or not self._runs % _CHECK_EVERY:
                self._bench.check(data)
        except Exception as e:
            self._bench = self._new_bench()
            told = describe(e)
            if told["key"] not in self._known:
                self._known.add(told["key"])
                found.append({**told, "input": data.hex()})

    def _trimmed(self, data: bytes, bits: int) -> bytes:
        """`data` without operations, and with no more repetitions, than `bits`, blocks it reaches, need."""
        for at in range(len(data) - RECORD.size, -1, -RECORD.size):
            less = [b""]
            op, *rest, count = RECORD.unpack_from(data, at)
            if op == Op.REPEAT:  # every input made of this one would take as long
                less += [RECORD.pack(op, *rest, n) for n in (2, 17, 300) if n < count]
            for instead in less:
                shorter = data[:at] + instead + data[at + RECORD.size :]
                if shorter and int.from_bytes(self._run(shorter), "little") & bits == bits:
                    data = shorter
                    break
        return data

    def _run(self, data: bytes, stem: bytes = b"") -> bytes:
        """A byte for each block, 1 if `data` reached it; run from the mark of `stem` on, if there is one."""
        self._begin(data)
        bench, started = self._bench, self._started
        if not stem or stem not in started:
            stem = b""
            if data[:1] == _RESTART and (len(started) < _STARTS_MAX or data[: RECORD.size] in started):
                # What a new device does with it is the same each time, and would be most of what is done.
                stem = data[: RECORD.size]
                if stem not in started:
                    bench.reset()
                    bench.run(stem)
                    self._mark(stem)
        cov = self._page.map
        cov[: self._blocks] = started[stem]
        bench.reset(stem)
        bench.run(data[len(stem) :])
        return cov[: self._blocks]

    def _mark(self, name: bytes) -> None:
        """Have inputs begin here that begin with `name`, which was just run."""
        self._bench.mark(name)
        self._started[name] = self._page.map[: self._blocks]

    def _begin(self, data: bytes) -> None:
        self._runs += 1
        self._page.begin(self._runs, data)
        self._page.map[: self._blocks] = self._loading

    def _alive(self) -> None:
        """Tell who watches that this goes on, if not with another input."""
        self._beats += 1
        self._page.beat(self._beats)

    def _note(self) -> None:
        """What the blocks in the map are is known from now on."""
        self._seen |= int.from_bytes(self._page.map[: self._blocks], "little")

    def _new_bench(self) -> Bench:
        self._started = {
            b"": self._loading
        }  # blocks by the beginning of inputs that the bench has a mark for
        return Bench(self._entry, self._model, self._params, memory=self._memory, alive=self._alive)

    def _indices(self, bits: int) -> list[int]:
        return [i for i, byte in enumerate(bits.to_bytes(self._blocks, "little")) if byte]
