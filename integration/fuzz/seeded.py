"""Copies of real device models with one thing wrong, for tests of what should find it."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from devproc.catalog import CATALOG, Entry

Changes = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Bug:
    """Changes to the text of a device's model, the kind of finding they are, and an input that shows them."""

    device: str
    kind: str
    changes: Changes
    shown_by: str


BUGS: Final = {
    "fifo-one-too-deep": Bug(
        "serial",
        "exception",
        (("if len(self._tx) < self._depth():", "if len(self._tx) <= self._depth():"),),
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
}


def plant(device: str, changes: Changes, module: str, where: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """The entry of `device`, in the catalogue for the length of a test, its model changed; in `module`."""
    entry = CATALOG[device]
    spec: Any = importlib.util.find_spec(entry.module)
    text = Path(spec.origin).read_text()
    for right, wrong in changes:
        assert text.count(right) == 1, f"{device}: {right!r} is there {text.count(right)} times"
        text = text.replace(right, wrong)
    (where / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(str(where))
    changed = dataclasses.replace(entry, module=module)
    monkeypatch.setitem(CATALOG, device, changed)
    return changed
