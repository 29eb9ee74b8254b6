"""What holds for any frame: a message or PeerError, the same by both ways in, and fit to be sent again."""

from __future__ import annotations

import contextlib

from devproc.wire import (
    ACCESS_FRAME_MAX,
    ACCESS_TABLE,
    CONTROL_TABLE,
    SIZES,
    Conversation,
    Message,
    PeerError,
    Read,
    Sender,
    Value,
    Write,
    decode,
    decode_access,
    encode,
    encode_value,
)

_TABLES = [(t, state) for t in (ACCESS_TABLE, CONTROL_TABLE) for state in sorted({key[0] for key in t})]


def _decoded(frame: bytes, limit: int) -> Message | None:
    try:
        return decode(frame, limit)
    except PeerError:
        return None


def check(frame: bytes) -> None:
    """Raises AssertionError, or whatever got out that should not."""
    try:
        message: Message | None = decode(frame)
    except PeerError:
        message = None
    if message is not None:
        assert decode(encode(message)) == message
        for table, state in _TABLES:
            with contextlib.suppress(PeerError):
                Conversation(table, state, Sender.SUPERVISOR).advance(Sender.DEVICE, message)

    short = _decoded(frame, ACCESS_FRAME_MAX)
    assert short == (message if len(frame) <= ACCESS_FRAME_MAX else None)
    expected: tuple[int, ...] | None = None
    match short:
        case Read(space, offset, size):
            expected = (space, offset, size)
        case Write(space, offset, size, data, posted):
            expected = (space, offset, size, data, posted)
        case Value(data):
            for size in SIZES:
                if data < 1 << 8 * size:
                    assert decode(encode_value(data, size)) == short
    try:
        fast: tuple[int, ...] | None = decode_access(frame)
    except PeerError:
        fast = None
    assert fast == expected
