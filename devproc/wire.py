"""The wire between supervisor, zygote and device processes: msgpack arrays, no I/O (ARCHITECTURE.md).

Every frame is one msgpack array ``[tag, fields...]`` in one SOCK_SEQPACKET datagram.  No maps, no
extension types, no object hooks.  `decode` checks tag, arity, type, range and size before it builds
anything.  The invariant, fuzzed first of all: *any bytes give a message or PeerError*.

Left out on purpose: sequence numbers (each channel is strict request and reply over a reliable
datagram socket) and versions per message (`Hello` carries one for the whole protocol).
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, ClassVar, Final

import msgpack

from devproc.record import record

VERSION: Final = 1
ACCESS_FRAME_MAX: Final = 64  # the longest access message is 25 bytes
CONTROL_FRAME_MAX: Final = 65536
STATE_MAX: Final = 60000
TEXT_MAX: Final = 1024
NAME_MAX: Final = 32
PARAMS_MAX: Final = 32
COUNTERS_MAX: Final = 32
KINDS_MAX: Final = 64
SPAWNS_MAX: Final = 15  # whose reasons all fit a frame, if all fail
DIGEST_SIZE: Final = 32
U64_MAX: Final = (1 << 64) - 1


class PeerError(Exception):
    """The process on the other end broke the protocol: it is killed, by name."""


class WireError(Exception):
    """We were about to send what the protocol does not allow: our own bug."""


class Space(enum.IntEnum):
    """Which of a device's register spaces an access goes to; `offset` counts from that space's base."""

    PORT = 0  # the device's own port range
    PORT2 = 1  # its second port range (port 0x61 of the PIT)
    CONFIG = 2  # PCI configuration space of the function
    BAR0 = 3
    BAR1 = 4
    BAR2 = 5
    BAR3 = 6
    BAR4 = 7
    BAR5 = 8


SIZES: Final = frozenset((1, 2, 4, 8))

Scalar = int | str | bytes | bool
Check = Callable[[Any], bool]


def _uint(limit: int) -> Check:
    # type() and not isinstance(): a bool is an int, and True is not a size.
    return lambda v: type(v) is int and 0 <= v <= limit


def _text(limit: int) -> Check:
    return lambda v: type(v) is str and len(v) <= limit


def _blob(limit: int) -> Check:
    return lambda v: type(v) is bytes and len(v) <= limit


def _params(v: Any) -> bool:
    return (
        type(v) is tuple
        and len(v) <= PARAMS_MAX
        and all(type(x) in (int, bool) or (type(x) in (str, bytes) and len(x) <= TEXT_MAX) for x in v)
    )


def _kinds(v: Any) -> bool:
    return type(v) is tuple and len(v) <= KINDS_MAX and all(map(_name, v))


def _outcomes(v: Any) -> bool:
    return type(v) is tuple and len(v) <= SPAWNS_MAX and all(_u32(x) or _why(x) for x in v)


def _counters(v: Any) -> bool:
    return (
        type(v) is tuple
        and len(v) <= 2 * COUNTERS_MAX
        and len(v) % 2 == 0
        and all(map(_name, v[::2]))
        and all(map(_u64, v[1::2]))
    )


_space: Check = lambda v: type(v) in (int, Space) and 0 <= v <= Space.BAR5  # noqa: E731
_size: Check = lambda v: type(v) is int and v in SIZES  # noqa: E731
_u64 = _uint(U64_MAX)
_u32 = _uint((1 << 32) - 1)
_bool: Check = lambda v: type(v) is bool  # noqa: E731
_name = _text(NAME_MAX)
_why = _text(TEXT_MAX)


@record
class Message:
    """Base of every message; `tag` is its first array element and `checks` one predicate per field."""

    tag: ClassVar[int] = -1
    checks: ClassVar[tuple[Check, ...]] = ()


@record
class Read(Message):
    """Supervisor to device: read `size` bytes at `offset`; answered by `Value`."""

    tag = 1
    checks = (_space, _u64, _size)
    space: int
    offset: int
    size: int


@record
class Write(Message):
    """Supervisor to device: write; answered by `Done` unless `posted`."""

    tag = 2
    checks = (_space, _u64, _size, _u64, _bool)
    space: int
    offset: int
    size: int
    data: int
    posted: bool


@record
class Value(Message):
    """Device to supervisor: what the read gave; must fit the size that was asked for."""

    tag = 3
    checks = (_u64,)
    data: int


@record
class Done(Message):
    """Device to supervisor: the marked write, or the restore, has taken effect."""

    tag = 4
    checks = ()


@record
class Hello(Message):
    """Device to supervisor, first on the control channel: protocol version and catalogue name."""

    tag = 16
    checks = (_u32, _name)
    version: int
    device: str


@record
class Ready(Message):
    """Device to supervisor: sealed in its jail and serving; SHA-256 of its register table."""

    tag = 17
    checks = (_blob(DIGEST_SIZE),)
    digest: bytes


@record
class Ping(Message):
    """Supervisor to device: are you there?  Answered by `Pong` with the same token."""

    tag = 18
    checks = (_u32,)
    token: int


@record
class Pong(Message):
    tag = 19
    checks = (_u32,)
    token: int


@record
class Save(Message):
    """Supervisor to device: answer with `State`."""

    tag = 20
    checks = ()


@record
class State(Message):
    """A device's whole state, packed by the device and opaque to the supervisor."""

    tag = 21
    checks = (_blob(STATE_MAX),)
    state: bytes


@record
class Restore(Message):
    """Supervisor to device: take this state (validated by the device); answered by `Done` or `Failed`."""

    tag = 22
    checks = (_blob(STATE_MAX),)
    state: bytes


@record
class Stats(Message):
    """Supervisor to device: answer with `Counters`."""

    tag = 23
    checks = ()


@record
class Counters(Message):
    """Device to supervisor: (name, count, name, count...)."""

    tag = 24
    checks = (_counters,)
    items: tuple[Scalar, ...]


@record
class Stop(Message):
    """Supervisor to device: flush what you hold for the host and leave."""

    tag = 25
    checks = ()


@record
class Log(Message):
    """Device to supervisor: one line for the user, at a logging level (10, 20, 30, 40)."""

    tag = 26
    checks = (_u32, _text(TEXT_MAX))
    level: int
    text: str


@record
class Set(Message):
    """Supervisor to device: a setting of its catalogue entry has a new value; never answered."""

    tag = 28
    checks = (_name, _u64)
    name: str
    value: int


@record
class Failed(Message):
    """The sender cannot do what was asked, or cannot go on; `why` is one line."""

    tag = 27
    checks = (_text(TEXT_MAX),)
    why: str


@record
class Spawn(Message):
    """Supervisor to zygote, with the descriptors of the slots 2.. as SCM_RIGHTS: a process for the next `Go`.

    `device` is the catalogue name, `name` the instance ("serial1"), `host_id` the uid and gid on the
    host to run as (0: the caller's own), `jail` one of "full", "best-effort" and "none", `params` the
    values of the entry's parameters in catalogue order.
    """

    tag = 32
    checks = (_name, _name, _u32, _name, _params)
    device: str
    name: str
    host_id: int
    jail: str
    params: tuple[Scalar, ...]


@record
class Spawned(Message):
    """Zygote to supervisor: for each its pid, as the supervisor sees it, or one line why there is none."""

    tag = 33
    checks = (_outcomes,)
    outcomes: tuple[int | str, ...]


@record
class Go(Message):
    """Supervisor to zygote: make the processes asked for, at most SPAWNS_MAX; answered by `Spawned`."""

    tag = 35
    checks = ()


@record
class Prepare(Message):
    """Supervisor to zygote, first: the catalogue names to get ready for, the `nursery.Program` that device
    processes run, and the one jail mode that will be asked for, or "" for any."""

    tag = 36
    checks = (_kinds, _name, _name)
    kinds: tuple[str, ...]
    program: str
    jail: str


@record
class Listener(Message):
    """Device to supervisor, between `Hello` and `Ready`, with one descriptor: the seccomp listener.

    The only message of a device that carries a descriptor; a device without a filter never sends it.
    """

    tag = 34
    checks = ()


MESSAGES: Final[dict[int, type[Message]]] = {
    m.tag: m
    for m in (
        Read, Write, Value, Done,
        Hello, Ready, Ping, Pong, Save, State, Restore, Stats, Counters, Stop, Log, Set, Failed,
        Spawn, Spawned, Listener, Go, Prepare,
    )
}  # fmt: skip
_FIELDS: Final[dict[type[Message], tuple[str, ...]]] = {m: m.__match_args__ for m in MESSAGES.values()}


def require_c_extension() -> None:
    """Refuse to run on msgpack's pure-Python fallback: it costs ten times more per message.

    Raises:
        WireError: the C extension is not in use.
    """
    if msgpack.Packer.__module__ != "msgpack._cmsgpack":
        raise WireError("msgpack's C extension is missing: reinstall msgpack with a wheel or a C compiler")


def encode(message: Message, limit: int = CONTROL_FRAME_MAX) -> bytes:
    """The frame for `message`.

    Raises:
        WireError: a field is out of its range, or the frame is longer than `limit` bytes.
    """
    kind = type(message)
    values = [getattr(message, name) for name in _FIELDS[kind]]
    if not all(ok(v) for ok, v in zip(kind.checks, values, strict=True)):
        raise WireError(f"not sendable: {message!r:.200}")
    try:
        frame: bytes = msgpack.packb([kind.tag, *values], use_bin_type=True)
    except (ValueError, TypeError, OverflowError) as e:  # big int in a tuple, lone surrogate
        raise WireError(f"not sendable: {message!r:.200}: {e}") from None
    if len(frame) > limit:
        raise WireError(f"{kind.__name__} frame of {len(frame)} bytes, at most {limit}")
    return frame


def _no_ext(code: int, data: bytes) -> None:
    raise ValueError("extension type")


def decode(frame: bytes, limit: int = CONTROL_FRAME_MAX) -> Message:
    """The message in `frame`.

    Raises:
        PeerError: for any bytes that are not exactly one valid message of at most `limit` bytes.
    """
    if not 0 < len(frame) <= limit:
        raise PeerError(f"frame of {len(frame)} bytes, expected 1 to {limit}")
    try:
        items = msgpack.unpackb(
            frame,
            use_list=False,
            raw=False,
            strict_map_key=True,
            ext_hook=_no_ext,
            max_map_len=0,
            max_ext_len=0,
            max_array_len=2 * COUNTERS_MAX,  # the longest of all
            max_str_len=TEXT_MAX * 4,
            max_bin_len=STATE_MAX,
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as e:
        raise PeerError(f"not a frame: {type(e).__name__}") from None
    if type(items) is not tuple or not items or type(items[0]) is not int:
        raise PeerError("not an array that starts with a tag")
    kind = MESSAGES.get(items[0])
    if kind is None:
        raise PeerError(f"unknown tag {items[0]}")
    values = items[1:]
    if len(values) != len(kind.checks):
        raise PeerError(f"{kind.__name__} with {len(values)} fields, expected {len(kind.checks)}")
    for name, ok, value in zip(_FIELDS[kind], kind.checks, values, strict=True):
        if not ok(value):
            raise PeerError(f"{kind.__name__}.{name} out of range")
    return kind(*values)


_READ_TYPES: Final = [int, int, int, int]
_WRITE_TYPES: Final = [int, int, int, int, int, bool]
_pack = msgpack.Packer().pack

DONE_FRAME: Final = encode(Done())


def decode_access(frame: bytes) -> tuple[int, ...]:
    """`decode` for the device's end of an access channel, where every microsecond is the guest's.

    Returns:
        (space, offset, size) of a Read, or (space, offset, size, data, posted) of a Write.

    Raises:
        PeerError: for any other bytes.
    """
    if len(frame) > ACCESS_FRAME_MAX:
        raise PeerError(f"frame of more than {ACCESS_FRAME_MAX} bytes")
    try:
        items = msgpack.unpackb(frame, use_list=False)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as e:
        raise PeerError(f"not a frame: {type(e).__name__}") from None
    if type(items) is tuple:
        types = list(map(type, items))
        if types == _READ_TYPES:
            tag, space, offset, size = items
            if tag == 1 and 0 <= space <= 8 and offset >= 0 and size in SIZES:
                return space, offset, size
        elif types == _WRITE_TYPES:
            tag, space, offset, size, data, posted = items
            if tag == 2 and 0 <= space <= 8 and offset >= 0 and size in SIZES and data >= 0:
                return space, offset, size, data, posted
    raise PeerError("neither a Read nor a Write")


def encode_value(value: int, size: int) -> bytes:
    """The frame of `Value(value)` in answer to a read of `size` bytes.

    Raises:
        WireError: `value` does not fit.
    """
    if type(value) is not int or value >> (8 * size):  # a negative value never shifts down to 0
        raise WireError(f"a read of {size} bytes gave {value!r:.40}")
    frame: bytes = _pack((3, value))
    return frame


class Sender(enum.Enum):
    SUPERVISOR = "supervisor"
    DEVICE = "device"
    ZYGOTE = "zygote"


Table = dict[tuple[str, Sender, type[Message]], str]

_S, _D = Sender.SUPERVISOR, Sender.DEVICE

ACCESS_TABLE: Final[Table] = {
    ("idle", _S, Read): "reading",
    ("reading", _D, Value): "idle",
    ("idle", _S, Write): "idle",  # posted; a marked one goes to "writing", see Conversation.advance
    ("writing", _D, Done): "idle",
}

_SERVING: Final[Table] = {
    ("serving", _S, Ping): "pinged",
    ("pinged", _D, Pong): "serving",
    ("serving", _S, Save): "saving",
    ("saving", _D, State): "serving",
    ("serving", _S, Restore): "restoring",
    ("restoring", _D, Done): "serving",
    ("serving", _S, Stats): "counting",
    ("counting", _D, Counters): "serving",
}

_SPEAKING: Final = ("greeted", "sealed", "serving", "pinged", "saving", "restoring", "counting")

CONTROL_TABLE: Final[Table] = {
    ("start", _D, Hello): "greeted",
    ("greeted", _D, Listener): "sealed",
    ("sealed", _D, Ready): "serving",
    ("greeted", _D, Ready): "serving",  # without a filter: only where the jail mode is not "full"
    **_SERVING,
    **{(s, _S, Set): s for s, _, _ in _SERVING},
    **{(s, _D, Log): s for s in (*_SPEAKING, "stopping")},
    **{(s, _D, Failed): "failed" for s in ("start", *_SPEAKING, "stopping")},
    **{(s, _S, Stop): "stopping" for s in _SPEAKING},
    # answers already on their way when Stop was sent
    **{("stopping", _D, m): "stopping" for m in (Listener, Ready, Pong, State, Done, Counters)},
}

SPAWN_TABLE: Final[Table] = {
    ("start", _S, Prepare): "idle",
    ("idle", _S, Spawn): "asked",
    ("asked", _S, Spawn): "asked",
    ("asked", _S, Go): "spawning",
    ("spawning", Sender.ZYGOTE, Spawned): "idle",
}


class Conversation:
    """One channel's side of a transition table: which message may follow which.

    Args:
        table: ACCESS_TABLE, CONTROL_TABLE or SPAWN_TABLE.
        state: where it starts ("idle" or "start").
        me: who is holding this object; a wrong message of ours is a WireError, of theirs a PeerError.
    """

    def __init__(self, table: Table, state: str, me: Sender) -> None:
        self._table = table
        self.state = state
        self._me = me

    def advance(self, sender: Sender, message: Message) -> None:
        """Note that `sender` sent `message`.

        Raises:
            WireError: we may not send this now.
            PeerError: the peer may not send this now.
        """
        after = self._table.get((self.state, sender, type(message)))
        if after is None:
            what = f"{type(message).__name__} in state {self.state}"
            raise WireError(what) if sender is self._me else PeerError(f"unexpected {what}")
        if isinstance(message, Write) and not message.posted:
            after = "writing"
        self.state = after
