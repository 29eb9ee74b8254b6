"""Copies of real device models with one thing wrong, for tests of what should find it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from devproc.catalog import CATALOG, Entry
from devproc.fuzz import instrument
from devproc.record import replace

Changes = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Bug:
    """Changes to the text of a device's model, the kind of finding they are, and an input that shows them.

    `module`: whose text, if it is not the model's: one that virtio devices share.
    `or_kind`: another kind of finding that it is, which may be the first.
    """

    device: str
    kind: str
    changes: Changes
    shown_by: str
    module: str = ""
    or_kind: str = ""


BUGS: Final = {
    "fifo-one-too-deep": Bug(
        "serial",
        "exception",
        (("[: self._depth() - len(self._tx)]", "[: self._depth() + 1 - len(self._tx)]"),),
        "room 0; write PORT 0x0 1 0x41; repeat 2; save",
    ),
    "fifo-without-end": Bug(
        "i8042",
        "growth",
        (
            ("        self._refresh = False\n", "        self._refresh = False\n        self._queue = []\n"),
            (
                "(self, _data: int) -> None:\n",
                "(self, _data: int) -> None:\n        self._queue.append(_data)\n",
            ),
        ),
        "write PORT 0x0 1 0x1; repeat 4000",
    ),
    "interrupt-at-every-look": Bug(
        "serial",
        "cause",
        (("if self._line and (not before or before & ~self._line):", "if self._line:"),),
        "write PORT 0x4 1 0xa; write PORT 0x1 1 0x1; input 6162",
    ),
    "interrupt-storm": Bug(
        "acpi-pm",
        "storm",
        (("            self._irq()\n", "            for _ in range(100):\n                self._irq()\n"),),
        "write PORT 0x2 2 0x1; clock 700000000000",
    ),
    "timer-that-stays-due": Bug(
        "serial",
        "busy",
        (
            (
                "            self._cti_due_ns = None\n            self._cti = True\n",
                "            self._cti = True\n",
            ),
        ),
        "write PORT 0x2 1 0x41; write PORT 0x4 1 0xa; input 61; clock 1000000000",
    ),
    "state-not-restored": Bug(
        "serial",
        "restore",
        (("        self._overrun = s.overrun\n", ""),),
        "write PORT 0x4 1 0x10; write PORT 0x0 1 0x1; repeat 2",
    ),
    "value-not-checked": Bug(
        "rtc",
        "exception",
        (("        month = min(max(month, 1), 12)\n", ""),),
        "write PORT 0x0 1 0x8; write PORT 0x1 1 0x0",
    ),
    "value-too-wide": Bug(
        "i8042",
        "value",
        (("return self._control |", "return self._control << 8 |"),),
        "write PORT 0x1 1 0x3; read PORT 0x1 1",
    ),
    "state-shared-by-all": Bug(
        "serial",
        "fresh",
        (
            ("FIFO_SIZE: Final = 16\n", "FIFO_SIZE: Final = 16\nSEEN = []\n"),
            (
                "        self._ier = data & 0x0F\n",
                "        SEEN.append(data)\n        self._ier = len(SEEN) & 0x0F\n",
            ),
        ),
        "write PORT 0x1 1 0x1; read PORT 0x1 1",
    ),
    "used-twice": Bug(
        "virtio-rng",
        "exception",
        (
            (
                "            self.push(index, chain, len(data))\n",
                "            self.push(index, chain, len(data))\n" * 2,
            ),
        ),
        "chain 0 0 0 64 0 plain; kick 0",
    ),
    "used-index-runs-ahead": Bug(
        "virtio-rng",
        "used",
        (
            (
                "        self.notify(index)\n",
                "        at = self._setups[index].areas[2] + 2\n"
                "        used = self.memory.read(at, 1)[0]\n"
                "        self.memory.write(at, bytes([used + 1 & 255]))\n"
                "        self.notify(index)\n",
            ),
        ),
        "chain 0 0 0 64 0 plain; kick 0",
    ),
    "length-not-checked": Bug(
        "virtio-rng",
        "exception",
        (("            self.push(index, chain, len(data))\n", "            self.push(index, chain, 65)\n"),),
        "chain 0 0 0 64 0 plain; kick 0",
    ),
    "written-past-the-buffer": Bug(
        "virtio-rng",
        "memory",
        (
            (
                "self.memory.copy_in(chain.writable, data)",
                "self.memory.copy_in([(gpa, size + 8) for gpa, size in chain.writable], data * 2)",
            ),
        ),
        "chain 0 0 0 64 0 plain; kick 0",
    ),
    "interrupt-left-after-reset": Bug(
        "virtio-rng",
        "reset",
        (
            (
                "    def save(self)",
                "    def on_reset(self) -> None:\n        self._isr = 1\n\n    def save(self)",
            ),
        ),
        "restart 0x0 4",
    ),
    "sector-not-checked": Bug(
        "virtio-blk",
        "exception",
        (("        if offset + size > self._disk.size:\n", "        if offset < 0:\n"),),
        "chain 0 16 0 512 1 plain 0000000000000000ff00000000000000; kick 0",
    ),
    "loop-without-end": Bug(
        "pit",
        "hang",
        (
            (
                "        select = data >> 6\n",
                "        select = data >> 6\n        while data == 0x3A:\n            pass\n",
            ),
        ),
        "write PORT 0x3 1 0x3a",
    ),
    "timer-underflow": Bug(
        "pit",
        "exception",
        (("return max(count, 2) if self.mode in (2, 3) else count", "return count - 1"),),
        "write PORT 0x3 1 0x34; write PORT 0x0 1 0x1; write PORT 0x0 1 0x0; clock 1000000; read PORT 0x0 1",
    ),
    "length-field-trusted": Bug(
        "virtio-blk",
        "exception",
        (
            (
                "return Request(kind, self._place(sector, size), size, (), unmap",
                "return Request(kind, self._place(sector, 0), size, (), unmap",
            ),
        ),
        "chain 0 16 16 1 0 plain 0d0000000000000000000000000000007f000000000000000200000000000000; kick 0",
    ),
    "loop-in-a-chain": Bug(
        "virtio-rng",
        "hang",
        (
            (
                "            elements.append((addr, length, flags))\n"
                "            if not flags & DESC_F_NEXT:\n                break\n"
                "            if direct == limit:\n",
                # Without growing, or it may run out of memory before it is taken for a hang.
                "            elements[:] = [(addr, length, flags)]\n"
                "            if not flags & DESC_F_NEXT:\n                break\n"
                "            if direct < 0:\n",
            ),
        ),
        "chain 0 0 0 64 1 loop; kick 0",
        "devproc.virtio.split",
    ),
    "address-wraps-around": Bug(
        "virtio-rng",
        "exception",
        (("if not holds(gpa, size):\n", "if not holds(gpa + size & 0xFFFF_FFFF, 0):\n"),),
        "chain 0 0 0 64 0 overflow; kick 0",
        "devproc.virtio.chain",
    ),
    "size-changed-after-activation": Bug(
        "virtio-rng",
        "exception",
        (
            (
                "def write_queue_size(self, data: int) -> None:\n        setup = self._settable()\n",
                "def write_queue_size(self, data: int) -> None:\n        setup = self._selected\n",
            ),
            (
                "            setup.size = data\n",
                "            setup.size = data\n"
                "            if (queue := self.queues[self.stored['queue_select']]) is not None:\n"
                "                queue.size = data\n",
            ),
        ),
        "write BAR0 0x18 2 0x40; chain 0 0 0 64 0 head; kick 0",
        "devproc.virtio.device",
    ),
    "completed-twice": Bug(
        "virtio-rng",
        "used",
        (("        self._publish(1)\n", "        self._publish(2)\n"),),
        "chain 0 0 0 64 0 plain; kick 0",
        "devproc.virtio.split",
    ),
    "index-kept-over-a-reset": Bug(
        "virtio-rng",
        "reset",
        (
            (
                "        self.queues = [None] * len(self.queues)\n",
                "        stale = getattr(self, '_stale', self.queues)\n"
                "        self._stale = [s if q is None else q.position for q, s in zip(self.queues, stale)]\n"
                "        self.queues = [None] * len(self.queues)\n",
            ),
            (
                "self._make_queue(self.features, setup)\n",
                "self._make_queue(self.features, setup, getattr(self, '_stale', self.queues)[index])\n",
            ),
        ),
        "chain 0 0 0 64 0 plain; kick 0; restart 0x0 4",
        "devproc.virtio.device",
    ),
    "bar-of-size-zero": Bug(
        "virtio-rng",
        "bar",
        (("mask=-spec.BAR_SIZE & _LOW, stored", "mask=0, stored"),),
        "restart 0x0 4",
        "devproc.virtio.device",
    ),
    "register-past-the-end": Bug(
        "virtio-rng",
        "exception",
        (("if select < len(self._setups) else None", "if select <= len(self._setups) else None"),),
        "write BAR0 0x16 2 0x1; write BAR0 0x18 2 0x4",
        "devproc.virtio.device",
    ),
    "flags-not-checked": Bug(
        "virtio-fs",
        "exception",
        (("        if asked.flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):\n", "        if False:\n"),),
        "chain 1 40 16 16 144 plain 380000001a00000007000000000000000000000000000000000000000000000"
        "00000000000000000070000002600000000000200ffffffff; kick 1; chain 1 40 25 16 0 plain 410000"
        "002d00000007000000000000000100000000000000000000000000000000000000000000000100000000000000"
        "040000000000000066696c65006e657700; kick 1",
    ),
    "connection-closed-twice": Bug(
        "virtio-vsock",
        "exception",
        (
            (
                "            connection.line.close()\n            connection.line = None\n",
                "            connection.line.close()\n",
            ),
        ),
        "chain 1 44 0 0 0 plain 0300000000000000020000000000000001000000000000000000000001000100000"
        "000000000040000000000; kick 1; restart 0x0 4",
    ),
    "queue-not-enabled": Bug(
        "virtio-rng",
        "used",
        (("                if setup.enabled:\n", "                if setup.areas[0]:\n"),),
        "restart 0x10 4; chain 0 0 0 64 0 plain; kick 0",
        "devproc.virtio.device",
        or_kind="restore",  # a restored device has the queues that are enabled
    ),
}


def plant(device: str, changes: Changes, module: str, where: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """The entry of `device`, in the catalogue for the length of a test, its model changed; in `module`."""
    entry = CATALOG[device]
    (where / f"{module}.py").write_text(changed_text(entry.module, changes))
    monkeypatch.syspath_prepend(str(where))
    changed = replace(entry, module=module)
    monkeypatch.setitem(CATALOG, device, changed)
    return changed


def plant_bug(name: str, where: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """The entry of a device that has a bug, for processes that are started during a test."""
    bug = BUGS[name]
    module = f"seeded_{name.replace('-', '_')}"
    if not bug.module:
        return plant(bug.device, bug.changes, module, where, monkeypatch)
    text = where / f"{module}.py"
    text.write_text(changed_text(bug.module, bug.changes))
    source = instrument.source
    monkeypatch.setattr(instrument, "source", lambda m: str(text) if m == bug.module else source(m))
    return CATALOG[bug.device]


def changed_text(module: str, changes: Changes) -> str:
    """The source of a module with each of `changes`, whose first part it has once."""
    text = Path(instrument.source(module)).read_text()
    for right, wrong in changes:
        assert text.count(right) == 1, f"{module}: {right!r} is there {text.count(right)} times"
        text = text.replace(right, wrong)
    return text
