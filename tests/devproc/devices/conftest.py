"""A bench on which any catalogue entry's model runs: fake clocks, signals, input and output."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import pytest

from devproc.catalog import CATALOG
from devproc.wire import Space

PARAMS = {"mem_below_4g": 1 << 30, "mem_above_4g": 2 << 30}


class Bench:
    """The host's side of one device model, and its guest's: all ports, built from the catalogue entry."""

    def __init__(self, name: str, **params: int) -> None:
        entry = CATALOG[name]
        self.name = name
        self.now_ns = 5_000_000_000_000
        self.wall_ns = 1_700_000_000_000_000_000  # 2023-11-14 22:13:20 UTC, a Tuesday
        self.edges: Counter[str] = Counter()
        self.typed = bytearray()
        self.sent = bytearray()
        self.room = 1 << 30
        ports: dict[str, Any] = {}
        for d in entry.descriptors:
            ports[d.name] = self if d.kind != "signal" else self.signal(d.name)
        for p in entry.params:
            ports[p.name] = params.get(p.name, PARAMS[p.name])
        for source in entry.sources:
            ports[source] = getattr(self, source)
        self.model = getattr(importlib.import_module(entry.module), entry.model)(**ports)

    # the ports

    def signal(self, name: str) -> Any:
        def edge() -> None:
            self.edges[name] += 1

        return edge

    def clock(self) -> int:
        return self.now_ns

    def wall(self) -> int:
        return self.wall_ns

    def listen(self, *_handlers: Any) -> None:
        """Called for input and for output; `pump` and `drain` go to the model itself."""

    def write(self, data: bytes) -> int:
        taken = data[: self.room]
        self.sent += taken
        self.room -= len(taken)
        return len(taken)

    def read(self, limit: int) -> bytes:
        assert limit > 0
        data = bytes(self.typed[:limit])
        del self.typed[:limit]
        return data

    # the guest

    def inb(self, offset: int, space: int = Space.PORT) -> int:
        return self.model.read(space, offset, 1)

    def outb(self, offset: int, data: int, space: int = Space.PORT) -> None:
        self.model.write(space, offset, 1, data)

    # the child's loop

    def pump(self) -> None:
        """Deliver input while the model wants it, then the deadlines that have passed."""
        while self.typed and self.model.wants_input:
            left = len(self.typed)
            self.model.on_input()
            assert len(self.typed) < left, "watched, readable and not read: a busy loop"
        due = self.model.deadline_ns
        if due is not None and due <= self.now_ns:
            self.model.on_deadline(self.now_ns)
            due = self.model.deadline_ns
            assert due is None or due > self.now_ns, "a deadline that does not move: a busy loop"

    def type(self, data: bytes) -> None:
        self.typed += data
        self.pump()

    def drain(self, room: int) -> None:
        self.room = room
        self.model.on_output()

    def advance(self, ns: int) -> None:
        """Let time pass, stopping at every deadline."""
        end = self.now_ns + ns
        self.pump()
        while (due := self.model.deadline_ns) is not None and due <= end:
            self._pass(max(0, due - self.now_ns))
            self.pump()
        self._pass(end - self.now_ns)

    def sleep(self, ns: int) -> None:
        """Let time pass without running the device process, then run it."""
        self._pass(ns)
        self.pump()

    def _pass(self, ns: int) -> None:
        self.now_ns += ns
        self.wall_ns += ns

    def fork(self) -> Bench:
        """Another bench in the same state, its model a fresh one that was given the saved state."""
        other = Bench(self.name)
        other.now_ns, other.wall_ns = self.now_ns, self.wall_ns
        other.typed, other.sent, other.room = bytearray(self.typed), bytearray(self.sent), self.room
        other.edges = Counter(self.edges)
        other.model.restore(self.model.save())
        return other


@pytest.fixture
def bench() -> type[Bench]:
    return Bench
