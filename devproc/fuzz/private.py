"""Guest memory that changes for a device only when it may notice: a copy of what it looks at.

A guest writes to its memory at any time, so what a device has seen there cannot be told afterwards.  Here it
sees each part as it was when an operation first looked, and the rings of its queues anew at each
`GuestMemory.fence`, which is where a queue orders its stores before its loads.  What the device writes
reaches the guest at these points and at the operation's end: an index, or in a packed ring the flags, after
all else.  Left out: two merged buffers around the end of a packed ring may come into sight one by one.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Final

from kvmcore.memory import MAP_NORESERVE, GuestMemory

_LINE: Final = 64  # bytes that are looked at together
_LOOKS_MAX: Final = 100
_ZEROS: Final = bytes(mmap.PAGESIZE)
_CHANGED: Final = re.compile(rb"[^\0]+")


class PrivateMemory(GuestMemory):
    """What a recorded device has in place of `shared`.

    Args:
        copy: as many zeros.
        queues: gives [start, end) of the descriptor, driver and device area of each of the device's queues,
            and whether it is a packed one.
        seen: told where in the file something has changed since the device last looked, by which fence of
            the operation (0: at first), and what is there.
        wrote: told where the device has changed something, and what is there.
    """

    def __init__(
        self,
        shared: GuestMemory,
        copy: mmap.mmap,
        queues: Callable[[], Iterable[tuple[Sequence[tuple[int, int]], bool]]],
        seen: Callable[[int, int, bytes], None],
        wrote: Callable[[int, bytes], None],
    ) -> None:
        self.regions, self.size = shared.regions, shared.size
        self._map = copy
        self._view = memoryview(self._map)
        self._shared = shared
        self._queues = queues
        self._seen = seen
        self._wrote = wrote
        self._lines: dict[int, bytes] = {}  # as they were, or as the guest has them by now
        self._fences = 0
        self._firsts = {r.offset // _LINE for r in self.regions}

    def begin(self) -> None:
        """An operation begins."""
        self._fences = 0
        self._look_at_rings()

    def end(self) -> None:
        """It is over; the guest sees what the device has written."""
        self._publish()
        self._lines.clear()

    def fence(self) -> None:
        self._fences += 1
        self.end()
        self._shared.fence()
        self._look_at_rings()

    def discard(self, gpa: int, size: int) -> None:
        self._shared.discard(gpa, size)
        at = super()._offset(gpa, size)
        for page in range(at, at + size, mmap.PAGESIZE):
            if self._map[page : page + mmap.PAGESIZE] != _ZEROS:
                self._wrote(page, _ZEROS)
        self._map.madvise(mmap.MADV_REMOVE, at, size)
        for line in self._lines.keys() & {*range(at // _LINE, (at + size) // _LINE)}:
            self._lines[line] = bytes(_LINE)

    def _offset(self, gpa: int, size: int) -> int:
        at = super()._offset(gpa, size)
        lines = _lines(at, at + size)
        if len(lines) > 1 and self._lines.keys().isdisjoint(lines):
            low, high = lines.start * _LINE, lines.stop * _LINE
            now = bytes(self._shared._view[low:high])
            if now == self._view[low:high]:  # most of what is only written
                self._lines.update(zip(lines, _cut(now), strict=True))
                return at
        for line in lines:
            if line not in self._lines:
                self._look(line)
        return at

    def _look(self, line: int) -> bool:
        """Take what the guest has there; whether it was something else."""
        at = line * _LINE
        now, ours = bytes(self._shared._view[at : at + _LINE]), self._view[at : at + _LINE]
        self._lines[line] = now
        if now == ours:
            return False
        for low, high in _changes(bytes(ours), now):
            self._seen(at + low, self._fences, now[low:high])
        ours[:] = now
        return True

    def _look_at_rings(self) -> None:
        """Until they stay the same, and so belong together: a driver writes to several places in turn."""
        lines = {n for areas, _ in self._rings() for low, high in areas for n in _lines(low, high)}
        for _ in range(_LOOKS_MAX):
            if not sum(map(self._look, lines)):
                break

    def _publish(self) -> None:
        theirs = self._shared._view
        words = [last for _, last in self._rings()]
        late: list[tuple[int, bytes]] = []
        for at, before in self._runs():
            now = bytes(self._view[at : at + len(before)])
            if now == before:
                continue
            close = [w for w in words if at <= w.stop and w.start < at + len(now)]
            for low, high in _changes(before, now):
                self._wrote(at + low, now[low:high])
                if not any(at + low <= w.stop and w.start < at + high for w in close):
                    theirs[at + low : at + high] = now[low:high]
                    continue
                for is_last, group in groupby(
                    range(at + low, at + high), lambda place: any(place in w or place - 1 in w for w in words)
                ):
                    first, *rest = group
                    end = first + 1 + len(rest)
                    if is_last:
                        late.append((first, now[first - at : end - at]))
                    else:
                        theirs[first:end] = now[first - at : end - at]
        for place, data in sorted(late, reverse=True):  # the driver goes in order
            theirs[place : place + len(data)] = data

    def _runs(self) -> Iterator[tuple[int, bytes]]:
        """Where the lines are in the file and what they were; in one those that follow in a region."""
        held: list[bytes] = []
        first = following = -1
        for line, before in self._lines.items():
            if line != following or line in self._firsts:
                if held:
                    yield first * _LINE, b"".join(held)
                first, held = line, []
            held.append(before)
            following = line + 1
        if held:
            yield first * _LINE, b"".join(held)

    def _rings(self) -> Iterator[tuple[list[tuple[int, int]], range]]:
        """Where in the file the areas of each queue are, and the words that tell a driver of the rest."""
        for ranges, packed in self._queues():
            areas = []
            for gpa, end in ranges:
                at = super()._offset(gpa, end - gpa)
                areas.append((at, at + end - gpa))
            (desc, end), _, (device, _) = areas
            yield areas, range(desc + 14, end, 16) if packed else range(device + 2, device + 4, 2)


def new_copy(size: int) -> mmap.mmap:
    """For a `PrivateMemory`; a private mapping would count for RLIMIT_DATA."""
    return mmap.mmap(-1, size, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_NORESERVE)


def _lines(low: int, high: int) -> range:
    return range(low // _LINE, -(-high // _LINE))


def _cut(data: bytes) -> Iterator[bytes]:
    return (data[at : at + _LINE] for at in range(0, len(data), _LINE))


def _changes(before: bytes, after: bytes) -> Iterator[tuple[int, int]]:
    """Where two texts of a length differ."""
    size = len(after)
    differ = int.from_bytes(before, "little") ^ int.from_bytes(after, "little")
    return (m.span() for m in _CHANGED.finditer(differ.to_bytes(size, "little")))
