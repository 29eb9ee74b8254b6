"""The protocol: any bytes give a message or PeerError, and every message survives the trip."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devproc import wire
from devproc.wire import (
    ACCESS_FRAME_MAX,
    ACCESS_TABLE,
    CONTROL_FRAME_MAX,
    CONTROL_TABLE,
    COUNTERS_MAX,
    KINDS_MAX,
    MESSAGES,
    PARAMS_MAX,
    SPAWN_TABLE,
    SPAWNS_MAX,
    STATE_MAX,
    TEXT_MAX,
    U64_MAX,
    Conversation,
    Message,
    PeerError,
    Sender,
    WireError,
    decode,
    decode_access,
    encode,
    encode_value,
)

u64 = st.integers(0, U64_MAX)
u32 = st.integers(0, (1 << 32) - 1)
size = st.sampled_from([1, 2, 4, 8])
space = st.integers(0, 8) | st.sampled_from(wire.Space)
name = st.text(max_size=wire.NAME_MAX)
text = st.text(max_size=200)
params = st.lists(u64 | st.booleans() | text | st.binary(max_size=64), max_size=PARAMS_MAX).map(tuple)
counters = st.dictionaries(name, u64, max_size=COUNTERS_MAX).map(lambda c: sum(c.items(), ()))
state = st.binary(max_size=200) | st.just(bytes(STATE_MAX))

FIELDS: dict[type[Message], tuple[st.SearchStrategy[Any], ...]] = {
    wire.Read: (space, u64, size),
    wire.Write: (space, u64, size, u64, st.booleans()),
    wire.Value: (u64,),
    wire.Done: (),
    wire.Hello: (u32, name),
    wire.Ready: (st.binary(max_size=wire.DIGEST_SIZE),),
    wire.Ping: (u32,),
    wire.Pong: (u32,),
    wire.Save: (),
    wire.State: (state,),
    wire.Restore: (state,),
    wire.Stats: (),
    wire.Counters: (counters,),
    wire.Stop: (),
    wire.Set: (name, u64),
    wire.Log: (u32, text),
    wire.Failed: (text,),
    wire.Spawn: (name, name, u32, name, params),
    wire.Spawned: (st.lists(u32 | text, max_size=SPAWNS_MAX).map(tuple),),
    wire.Listener: (),
    wire.Go: (),
    wire.Prepare: (st.lists(name, max_size=KINDS_MAX).map(tuple), name, name),
}
messages = st.sampled_from(list(MESSAGES.values())).flatmap(lambda kind: st.builds(kind, *FIELDS[kind]))
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), U64_MAX) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(), inner, max_size=3),
)
packed = plain.map(msgpack.packb)
tagged = st.tuples(st.sampled_from(sorted(MESSAGES)), st.lists(plain, max_size=6)).map(
    lambda t: msgpack.packb([t[0], *t[1]])
)
mutated = st.tuples(messages.map(encode), st.integers(0, 64), st.binary(max_size=4)).map(
    lambda t: t[0][: t[1]] + t[2] + t[0][t[1] + len(t[2]) :]
)
frames = st.binary(max_size=128) | packed | tagged | mutated


def test_every_message_is_in_this_test() -> None:
    assert set(FIELDS) == set(MESSAGES.values())


@given(messages)
def test_every_message_survives_the_trip(message: Message) -> None:
    assert decode(encode(message)) == message


@given(frames)
def test_any_bytes_give_a_message_or_peer_error(frame: bytes) -> None:
    try:
        message = decode(frame)
    except PeerError:
        return
    # What was taken is valid by construction: it can be sent again and means the same.
    assert decode(encode(message)) == message


@given(frames | st.builds(wire.Read, *FIELDS[wire.Read]).map(encode))
def test_the_fast_path_takes_what_decode_takes_and_nothing_else(frame: bytes) -> None:
    try:
        slow = decode(frame, ACCESS_FRAME_MAX)
    except PeerError:
        slow = wire.Done()
    match slow:
        case wire.Read(space, offset, size):
            assert decode_access(frame) == (space, offset, size)
        case wire.Write(space, offset, size, data, posted):
            assert decode_access(frame) == (space, offset, size, data, posted)
        case _:
            with pytest.raises(PeerError):
                decode_access(frame)


@given(size.flatmap(lambda s: st.tuples(st.just(s), st.integers(0, (1 << 8 * s) - 1))))
def test_a_value_that_fits_is_sent_as_a_value(case: tuple[int, int]) -> None:
    size, value = case
    assert decode(encode_value(value, size)) == wire.Value(value)


@pytest.mark.parametrize(("value", "size"), [(256, 1), (-1, 1), (1 << 64, 8), (True, 1), (0.0, 4), (None, 4)])
def test_a_value_that_does_not_fit_is_our_bug(value: Any, size: int) -> None:
    with pytest.raises(WireError):
        encode_value(value, size)


@pytest.mark.parametrize(
    "message",
    [
        wire.Read(9, 0, 1),
        wire.Read(0, -1, 1),
        wire.Read(0, 0, 3),
        wire.Read(True, 0, 1),
        wire.Write(0, 0, 1, 1 << 64, True),
        wire.Write(0, 0, 1, 0, 1),  # type: ignore[arg-type]
        wire.Log(20, "x" * (TEXT_MAX + 1)),
        wire.Log(20, "\ud800"),
        wire.State(bytes(STATE_MAX + 1)),
        wire.Ready(bytes(33)),
        wire.Counters(("x", 1 << 64)),
        wire.Counters(("x",)),
        wire.Counters((1, 1)),
        wire.Counters(("x", 1) * (COUNTERS_MAX + 1)),
        wire.Hello(1, b"bytes"),  # type: ignore[arg-type]
    ],
    ids=repr,
)
def test_what_is_out_of_range_is_not_sent(message: Message) -> None:
    with pytest.raises(WireError):
        encode(message)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\x90",
        b"\x01",
        msgpack.packb({1: 2}),
        msgpack.packb([True, 0, 0, 1]),
        msgpack.packb([1, 0, 0]),
        msgpack.packb([1, 0, 0, 1, 0]),
        msgpack.packb([1, 0, 0, 1]) + b"\x00",
        msgpack.packb([1, 0, 0, 1.0]),
        msgpack.packb([99]),
        msgpack.packb([26, 20, msgpack.ExtType(1, b"x")]),
        msgpack.packb([26, 20, "x" * (TEXT_MAX + 1)]),
        b"\x93\x1a\x14\xa1\xff",  # text that is not UTF-8
        b"\x91" * 2000 + b"\x01",
        bytes(CONTROL_FRAME_MAX + 1),
    ],
    ids=lambda frame: frame[:12].hex() or "empty",
)
def test_what_is_not_a_message_is_a_peer_error(frame: bytes) -> None:
    with pytest.raises(PeerError):
        decode(frame)


def test_no_access_message_is_longer_than_its_limit() -> None:
    longest = wire.Write(8, U64_MAX, 8, U64_MAX, False)
    assert len(encode(longest)) <= 25 < ACCESS_FRAME_MAX
    with pytest.raises(PeerError, match="expected 1 to 8"):
        decode(encode(longest), 8)


def test_a_message_with_all_fields_at_their_limit_fits_its_frame() -> None:
    full = wire.Spawn("é" * 32, "é" * 32, (1 << 32) - 1, "é" * 32, ("x" * TEXT_MAX,) * PARAMS_MAX)
    assert decode(encode(full)) == full
    most = wire.Counters(("é" * 32, U64_MAX) * COUNTERS_MAX)
    assert decode(encode(most)) == most
    none = wire.Spawned(("\U0001f4a5" * TEXT_MAX,) * SPAWNS_MAX)
    assert decode(encode(none)) == none
    assert len(encode(wire.State(bytes(STATE_MAX)))) <= CONTROL_FRAME_MAX


def test_the_protocol_does_no_io() -> None:
    tree = ast.parse(inspect.getsource(wire))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names == {"__future__", "enum", "collections.abc", "typing", "msgpack", "devproc.record"}


S, D, Z = Sender.SUPERVISOR, Sender.DEVICE, Sender.ZYGOTE


def walk(table: wire.Table, start: str, *steps: tuple[Sender, Message]) -> str:
    talk = Conversation(table, start, S)
    for sender, message in steps:
        talk.advance(sender, message)
    return talk.state


def test_a_device_greets_seals_itself_and_serves() -> None:
    assert walk(
        CONTROL_TABLE, "start",
        (D, wire.Hello(1, "rtc")), (D, wire.Log(10, "")), (D, wire.Listener()), (D, wire.Ready(b"")),
        (S, wire.Ping(1)), (D, wire.Pong(1)), (S, wire.Save()), (D, wire.State(b"")), (S, wire.Stats()),
        (D, wire.Counters(())), (S, wire.Restore(b"")), (D, wire.Done()),
    ) == "serving"  # fmt: skip


def test_a_setting_may_come_between_a_question_and_its_answer() -> None:
    serving = (D, wire.Hello(1, "")), (D, wire.Ready(b""))
    setting = (S, wire.Set("gain", 1))
    assert walk(CONTROL_TABLE, "start", *serving, (S, wire.Ping(1)), setting, setting) == "pinged"
    with pytest.raises(WireError, match="Set in state greeted"):
        walk(CONTROL_TABLE, "start", serving[0], setting)


def test_answers_already_on_their_way_may_follow_stop() -> None:
    asked = (D, wire.Hello(1, "")), (D, wire.Ready(b"")), (S, wire.Ping(1))
    assert walk(CONTROL_TABLE, "start", *asked, (S, wire.Stop()), (D, wire.Pong(1))) == "stopping"


def test_a_marked_write_waits_for_done_and_a_posted_one_does_not() -> None:
    marked, posted = wire.Write(0, 0, 1, 0, False), wire.Write(0, 0, 1, 0, True)
    assert walk(ACCESS_TABLE, "idle", (S, posted), (S, posted), (S, marked)) == "writing"
    assert walk(ACCESS_TABLE, "idle", (S, marked), (D, wire.Done()), (S, wire.Read(0, 0, 1))) == "reading"


def test_out_of_turn_is_whose_fault_it_is() -> None:
    with pytest.raises(PeerError, match="unexpected Value in state idle"):
        walk(ACCESS_TABLE, "idle", (D, wire.Value(0)))
    with pytest.raises(WireError, match="Read in state reading"):
        walk(ACCESS_TABLE, "idle", (S, wire.Read(0, 0, 1)), (S, wire.Read(0, 0, 1)))


@pytest.mark.parametrize(
    "unasked", [wire.Pong(0), wire.State(b""), wire.Done(), wire.Counters(()), wire.Hello(1, "")], ids=repr
)
def test_an_unasked_answer_is_a_peer_error(unasked: Message) -> None:
    with pytest.raises(PeerError):
        walk(CONTROL_TABLE, "start", (D, wire.Hello(1, "")), (D, wire.Ready(b"")), (D, unasked))


def test_nothing_follows_failed() -> None:
    assert not [key for key in CONTROL_TABLE if key[0] == "failed"]


def test_nobody_asks_for_more_devices_while_those_asked_for_are_made() -> None:
    spawn, go = (S, wire.Spawn("rtc", "rtc", 0, "full", ())), (S, wire.Go())
    prepared = (S, wire.Prepare(("rtc",), "devproc.child", "full"))
    made = (Z, wire.Spawned((1, "no")))
    assert walk(SPAWN_TABLE, "start", prepared, spawn, spawn, go, made, spawn, go, made) == "idle"
    for wrong in ((spawn,), (prepared, go), (prepared, spawn, go, spawn), (prepared, prepared)):
        with pytest.raises(WireError):
            walk(SPAWN_TABLE, "start", *wrong)
    with pytest.raises(PeerError):
        walk(SPAWN_TABLE, "start", prepared, spawn, made)


def test_every_state_of_every_table_can_be_reached_and_only_failed_and_stopping_are_final() -> None:
    for table, start in ((ACCESS_TABLE, "idle"), (CONTROL_TABLE, "start"), (SPAWN_TABLE, "start")):
        reached, leaves = {start}, {key[0] for key in table}
        while more := {after for key, after in table.items() if key[0] in reached} - reached:
            reached |= more
        assert leaves <= reached | {"writing"}  # Conversation.advance enters "writing"
        assert reached - leaves <= {"failed"}
