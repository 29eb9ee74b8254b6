"""vhost-user's messages: any bytes give a payload or MessageError, and every payload survives the trip."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devproc.vhost import message
from devproc.vhost.message import (
    HEADER_SIZE,
    PAYLOAD_MAX,
    REGIONS_MAX,
    ConfigSpace,
    Header,
    MemoryRegion,
    MessageError,
    Payload,
    Request,
    VringAddr,
    VringFile,
    VringState,
)

u64 = st.integers(0, (1 << 64) - 1)
u32 = st.integers(0, (1 << 32) - 1)
index = st.integers(0, 255)
none = st.none()
vring_state = st.builds(VringState, index, u32)
vring_file = st.builds(VringFile, index, st.booleans())
regions = st.lists(st.builds(MemoryRegion, u64, u64, u64, u64), min_size=1, max_size=REGIONS_MAX).map(tuple)
config = st.integers(0, message.CONFIG_MAX).flatmap(
    lambda offset: st.builds(
        ConfigSpace, st.just(offset), st.binary(max_size=message.CONFIG_MAX - offset), u32
    )
)
ASKS: dict[Request, st.SearchStrategy[Any]] = {
    Request.GET_FEATURES: none,
    Request.SET_FEATURES: u64,
    Request.SET_OWNER: none,
    Request.RESET_OWNER: none,
    Request.SET_MEM_TABLE: regions,
    Request.SET_VRING_NUM: vring_state,
    Request.SET_VRING_ADDR: st.builds(VringAddr, index, u32, u64, u64, u64, u64),
    Request.SET_VRING_BASE: vring_state,
    Request.GET_VRING_BASE: vring_state,
    Request.SET_VRING_KICK: vring_file,
    Request.SET_VRING_CALL: vring_file,
    Request.SET_VRING_ERR: vring_file,
    Request.GET_PROTOCOL_FEATURES: none,
    Request.SET_PROTOCOL_FEATURES: u64,
    Request.GET_QUEUE_NUM: none,
    Request.SET_VRING_ENABLE: vring_state,
    Request.GET_CONFIG: config,
    Request.SET_CONFIG: config,
}
OWN_ANSWERS: dict[Request, st.SearchStrategy[Any]] = {
    Request.GET_FEATURES: u64,
    Request.GET_PROTOCOL_FEATURES: u64,
    Request.GET_QUEUE_NUM: u64,
    Request.GET_VRING_BASE: vring_state,
    Request.GET_CONFIG: config,
}


def split(frame: bytes) -> tuple[Header, bytes]:
    header = message.parse_header(frame[:HEADER_SIZE])
    assert header.size == len(frame) - HEADER_SIZE
    return header, frame[HEADER_SIZE:]


def fds_of(request: Request, payload: Any) -> int:
    match request:
        case Request.SET_MEM_TABLE:
            return len(payload)
        case Request.SET_VRING_KICK | Request.SET_VRING_CALL | Request.SET_VRING_ERR:
            return int(payload.has_fd)
    return 0


@given(st.data(), st.sampled_from(Request), st.booleans())
def test_every_request_survives_the_trip(data: st.DataObject, request: Request, need_reply: bool) -> None:
    payload = data.draw(ASKS[request])
    header, body = split(message.pack(request, payload, need_reply=need_reply))
    assert (header.reply, header.need_reply) == (False, need_reply)
    fds = fds_of(request, payload)
    assert message.parse(header, body, fds) == (request, payload)
    with pytest.raises(MessageError, match=f"{request.name}: .* descriptors"):
        message.parse(header, body, fds + 1)
    if fds:
        with pytest.raises(MessageError, match="descriptors"):
            message.parse(header, body, fds - 1)


@given(st.data(), st.sampled_from(Request))
def test_every_answer_survives_the_trip(data: st.DataObject, request: Request) -> None:
    payload = data.draw(OWN_ANSWERS.get(request, u64))
    header, body = split(message.pack_reply(request, payload))
    assert message.parse_reply(request, header, body) == payload
    assert message.answered(request) == (request in OWN_ANSWERS)


@given(st.binary(max_size=HEADER_SIZE + 40), st.integers(0, 9))
def test_any_bytes_give_a_payload_or_an_error(data: bytes, fds: int) -> None:
    try:
        header = message.parse_header(data[:HEADER_SIZE])
    except MessageError:
        return
    body = data[HEADER_SIZE:]
    try:
        request, payload = message.parse(header, body, fds)
    except MessageError:
        return
    assert split(message.pack(request, payload))[0].size == len(body)


@given(st.sampled_from(Request), st.binary(max_size=PAYLOAD_MAX), st.integers(0, 9))
def test_any_body_gives_a_payload_or_an_error(request: Request, body: bytes, fds: int) -> None:
    results: list[Payload] = []
    for reply in (False, True):
        header = Header(request, reply, False, len(body))
        try:
            if reply:
                results.append(message.parse_reply(request, header, body))
            else:
                results.append(message.parse(header, body, fds)[1])
        except MessageError as e:
            assert request.name in str(e)


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ((1, 0, 0), "flags 0x0, expected version 1"),
        ((1, 2, 0), "flags 0x2"),
        ((1, 0x11, 0), "flags 0x11"),
        ((1, 1, PAYLOAD_MAX + 1), "a payload of 269 bytes"),
    ],
)
def test_a_header_that_no_message_has_is_refused(header: tuple[int, int, int], why: str) -> None:
    with pytest.raises(MessageError, match=why):
        message.parse_header(struct.pack("<III", *header))


@pytest.mark.parametrize(
    ("request_", "body", "fds", "why"),
    [
        (Request.SET_FEATURES, bytes(7), 0, "SET_FEATURES: a payload of 7 bytes, expected 8"),
        (Request.GET_FEATURES, bytes(8), 0, "a payload of 8 bytes, expected none"),
        (Request.SET_VRING_NUM, struct.pack("<II", 256, 1), 0, "vring 256"),
        (Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", 1 << 31, 0, 0, 0, 0, 0), 0, "vring 2147483648"),
        (Request.SET_VRING_KICK, struct.pack("<Q", 0x200), 0, "unknown bits"),
        (Request.SET_VRING_KICK, struct.pack("<Q", 0x100), 1, "1 descriptors, expected 0"),
        (Request.SET_MEM_TABLE, bytes(8), 0, "0 memory regions"),
        (Request.SET_MEM_TABLE, struct.pack("<II", 9, 0) + bytes(9 * 32), 9, "9 memory regions, expected"),
        (Request.SET_MEM_TABLE, struct.pack("<II", 2, 0) + bytes(32), 2, "2 memory regions in 40 bytes"),
        (Request.SET_CONFIG, struct.pack("<III", 0, 9, 0) + bytes(8), 0, r"\[0, 9\) in 8 bytes"),
        (Request.SET_CONFIG, struct.pack("<III", 250, 8, 0) + bytes(8), 0, r"\[250, 258\)"),
        (Request.GET_CONFIG, b"", 0, "a payload of 0 bytes, expected 12"),
        (6, bytes(16), 1, "unknown request 6"),
    ],
)
def test_a_malformed_request_says_what_is_wrong(
    request_: Request | int, body: bytes, fds: int, why: str
) -> None:
    with pytest.raises(MessageError, match=why):
        message.parse(Header(request_, False, False, len(body)), body, fds)


def test_an_answer_is_no_request_and_another_requests_answer_no_answer() -> None:
    answer, body = split(message.pack_reply(Request.GET_FEATURES, 1))
    with pytest.raises(MessageError, match="an answer to what was not asked"):
        message.parse(answer, body, 0)
    with pytest.raises(MessageError, match="where an answer to GET_QUEUE_NUM is due"):
        message.parse_reply(Request.GET_QUEUE_NUM, answer, body)
    question, body = split(message.pack(Request.GET_FEATURES))
    with pytest.raises(MessageError, match="where an answer to GET_FEATURES is due"):
        message.parse_reply(Request.GET_FEATURES, question, body)


def test_a_refused_get_config_is_not_taken_for_a_configuration() -> None:
    header, body = split(message.pack_reply(Request.GET_CONFIG, None))
    assert header.size == 0
    with pytest.raises(MessageError, match="GET_CONFIG"):
        message.parse_reply(Request.GET_CONFIG, header, body)


def test_the_wire_is_qemus() -> None:
    """Byte for byte as docs/interop/vhost-user.rst has it."""
    assert message.pack(Request.SET_VRING_KICK, VringFile(3, False)).hex(" ", 4) == (
        "0c000000 01000000 08000000 03010000 00000000"
    )
    assert message.pack(Request.SET_VRING_ADDR, VringAddr(1, 2, 3, 4, 5, 6), need_reply=True) == struct.pack(
        "<IIIIIQQQQ", 9, 9, 40, 1, 2, 3, 4, 5, 6
    )
    assert message.pack_reply(Request.SET_MEM_TABLE, 0) == struct.pack("<IIIQ", 5, 5, 8, 0)
    assert message.pack(Request.SET_MEM_TABLE, (MemoryRegion(1, 2, 3, 4),)) == struct.pack(
        "<IIIIIQQQQ", 5, 1, 40, 1, 0, 1, 2, 3, 4
    )
    assert (
        message.pack(Request.SET_CONFIG, ConfigSpace(8, b"abc"))
        == struct.pack("<6I", 25, 1, 15, 8, 3, 0) + b"abc"
    )
