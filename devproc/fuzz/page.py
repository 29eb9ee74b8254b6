"""The memory that the fuzzer and a device process share: coverage, the current input, requests, replies.

It is a memfd of its own, sealed against a change of its size, mapped by the process before its jail is sealed
and then closed, so that no policy has to allow it anything.  The process is not trusted: what the other end
reads is copied once, and bounded here.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
from struct import Struct
from typing import Any, Final

from devproc.fuzz.inputs import RECORD, RECORDS_MAX
from devproc.fuzz.instrument import BLOCKS_MAX
from devproc.wire import PeerError

INPUT_MAX: Final = RECORDS_MAX * RECORD.size
_HEAD: Final = Struct("<QI")  # inputs begun, length of the last one
_CLOCKS: Final = Struct("<qqQ")  # monotonic, wall, which operation
_BEAT: Final = Struct("<Q")
_HEAD_AT: Final = BLOCKS_MAX
_BEAT_AT: Final = _HEAD_AT + 16
_CLOCKS_AT: Final = _HEAD_AT + 32
_INPUT_AT: Final = _HEAD_AT + 64
_REQUEST_AT: Final = _INPUT_AT + INPUT_MAX
_REQUEST_MAX: Final = 64 << 20  # what a disk gives in one operation; only what is used takes memory
_REPLY_AT: Final = _REQUEST_AT + _REQUEST_MAX
_TEXT_MAX: Final = 4 << 20
_LENGTH: Final = Struct("<I")
SIZE: Final = -(-(_REPLY_AT + _TEXT_MAX) // mmap.PAGESIZE) * mmap.PAGESIZE


class Page:
    """One end; `map` holds the coverage at its start, a byte for each block of `instrument.blocks`.

    Args:
        fd: the memfd; the caller's to close, the mapping stays.
    """

    def __init__(self, fd: int) -> None:
        self.map = mmap.mmap(fd, SIZE)

    # -- the device's end

    def begin(self, number: int, data: bytes) -> None:
        """Note which input is run, for whoever finds this process dead."""
        _HEAD.pack_into(self.map, _HEAD_AT, number, len(data))
        self.map[_INPUT_AT : _INPUT_AT + len(data)] = data

    def beat(self, number: int) -> None:
        """Note that the input goes on."""
        _BEAT.pack_into(self.map, _BEAT_AT, number)

    def request(self) -> Any:
        """What was asked."""
        return self._get(_REQUEST_AT, _REQUEST_MAX)

    def reply(self, answer: object) -> None:
        """Answer; see `fits`."""
        self._put(_REPLY_AT, _TEXT_MAX, answer)

    def clock(self) -> int:
        """The monotonic clock of a rehearsal, in nanoseconds."""
        now: int = _CLOCKS.unpack_from(self.map, _CLOCKS_AT)[0]
        return now

    def wall(self) -> int:
        """The wall clock of a rehearsal, in nanoseconds."""
        now: int = _CLOCKS.unpack_from(self.map, _CLOCKS_AT)[1]
        return now

    def operation(self) -> int:
        """The number of a rehearsal's operation, for which a request stands there."""
        number: int = _CLOCKS.unpack_from(self.map, _CLOCKS_AT)[2]
        return number

    # -- the fuzzer's end

    def pulse(self) -> tuple[int, int]:
        """What changes as long as the process gets on: inputs begun, and parts of them."""
        return _HEAD.unpack_from(self.map, _HEAD_AT)[0], _BEAT.unpack_from(self.map, _BEAT_AT)[0]

    def ask(self, what: object) -> None:
        """Put a request there."""
        self._put(_REQUEST_AT, _REQUEST_MAX, what)

    def answer(self) -> dict[str, Any]:
        """The reply.

        Raises:
            PeerError: it is not one.
        """
        try:
            answer = self._get(_REPLY_AT, _TEXT_MAX)
        except (ValueError, RecursionError) as e:
            raise PeerError(f"a reply that is none: {type(e).__name__}") from None
        if type(answer) is not dict:
            raise PeerError("a reply that is no object")
        return answer

    def current(self) -> tuple[int, bytes]:
        """How many inputs were begun, and the last of them."""
        number, size = _HEAD.unpack_from(self.map, _HEAD_AT)
        return number, self.map[_INPUT_AT : _INPUT_AT + min(size, INPUT_MAX)]

    def set_clocks(self, clock_ns: int, wall_ns: int, operation: int = 0) -> None:
        """Set what the clocks of a rehearsal show, and which operation it is in."""
        _CLOCKS.pack_into(self.map, _CLOCKS_AT, clock_ns, wall_ns, operation)

    def close(self) -> None:
        """Unmap it."""
        self.map.close()

    def _put(self, at: int, limit: int, what: object) -> None:
        text = json.dumps(what, separators=(",", ":")).encode()
        if len(text) > limit - _LENGTH.size:
            raise ValueError(f"{len(text)} bytes for a page of the fuzzer, at most {limit}")
        _LENGTH.pack_into(self.map, at, len(text))
        self.map[at + _LENGTH.size : at + _LENGTH.size + len(text)] = text

    def _get(self, at: int, limit: int) -> Any:
        (size,) = _LENGTH.unpack_from(self.map, at)
        start = at + _LENGTH.size
        return json.loads(self.map[start : start + min(size, limit - _LENGTH.size)])


def create() -> int:
    """A memfd for a page, the caller's to close.  Raises OSError."""
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, SIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd
