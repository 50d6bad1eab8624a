"""POSTCOPY_RAM_DISCARD to the byte: schema, fast forms, every rule for what a peer sends."""

from __future__ import annotations

import pytest
from construct import ConstructError
from hypothesis import given
from hypothesis import strategies as st

from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.messages import PostcopyRamDiscard
from postcopy_proto.ramblock import ByteRange, RAMBlock, encode_idstr
from postcopy_proto.wire import encode
from postcopy_proto.wire.discard import (
    DISCARD_SCHEMA,
    command_head,
    decode_discard,
    encode_discard,
)

PAYLOAD = bytes.fromhex("0006" + b"pc.ram".hex() + "00" + "0000000000001000" + "0000000004000000")
BLOCKS = {"pc.ram": RAMBlock("pc.ram", 1 << 27), "m0": RAMBlock("m0", 8 << 21, 1 << 21)}

NAMES = st.text(st.characters(min_codepoint=1, codec="utf-8"), min_size=1, max_size=60)
RANGES = st.lists(
    st.integers(0, 1 << 64).flatmap(
        lambda end: st.integers(0, min(end, (1 << 64) - 1)).map(lambda s: ByteRange(s, end - s))
    ),
    min_size=1,
    max_size=30,
).filter(lambda ranges: all(length < 1 << 64 for _, length in ranges))


@given(NAMES, RANGES)
def test_fast_forms_and_schema_are_equal(name: str, ranges: list[ByteRange]) -> None:
    message = PostcopyRamDiscard(name, tuple(ranges))
    payload = encode_discard(message)
    assert decode_discard(payload) == message
    fields = [{"start": start, "length": length} for start, length in ranges]
    assert payload == DISCARD_SCHEMA.build({"idstr": encode_idstr(name), "ranges": fields})
    parsed = DISCARD_SCHEMA.parse(payload)
    assert [ByteRange(item.start, item.length) for item in parsed.ranges] == ranges
    head = command_head(name, len(ranges))
    assert encode(message) == head + payload[len(head) - 5 :]


@given(st.binary(max_size=80) | st.binary(max_size=40).map(lambda tail: PAYLOAD[:9] + tail))
def test_any_payload_is_a_message_or_refused(payload: bytes) -> None:
    try:
        message = decode_discard(payload)
    except RemoteProtocolError:
        return
    assert encode_discard(message) == payload
    assert DISCARD_SCHEMA.parse(payload)


def test_example() -> None:
    message = PostcopyRamDiscard("pc.ram", (ByteRange(0, 0x4000000),))
    assert (
        encode(message).hex() == "08000600190006" + b"pc.ram".hex() + "00" + "0" * 24 + "04000000"
    )


def changed(position: int, value: int) -> bytes:
    return PAYLOAD[:position] + bytes([value]) + PAYLOAD[position + 1 :]


def ranges_of(name: bytes, *fields: int) -> bytes:
    body = b"".join(field.to_bytes(8, "big") for field in fields)
    return bytes([0, len(name)]) + name + b"\0" + body


@pytest.mark.parametrize(
    ("payload", "offset", "kind", "reason"),
    [
        (b"", 0, "malformed", "0 bytes of payload"),
        (b"\0", 0, "malformed", "1 bytes of payload"),
        (changed(0, 1), 0, "mismatch", "version 1; only 0"),
        (changed(1, 0), 1, "malformed", "name of 0 bytes"),
        (changed(1, 255), 1, "malformed", "name of 255 bytes in 25 bytes"),
        (PAYLOAD[:8], 1, "malformed", "name of 6 bytes in 8 bytes"),
        (changed(8, 7), 8, "malformed", "0x07 after the RAMBlock name"),
        (changed(4, 0), 4, "malformed", "NUL inside"),
        (PAYLOAD[:9], 9, "malformed", "no range"),
        (ranges_of(b"x" * 17), 20, "malformed", "no range"),
        (PAYLOAD[:-1], 9, "malformed", "15 stray bytes"),
        (PAYLOAD + b"\0", 25, "malformed", "1 stray bytes"),
        (ranges_of(b"pc.rom", 0, 4096), 2, "unknown", "unknown RAMBlock 'pc.rom'"),
        (ranges_of(b"pc.ram", 0, 4096, 512, 4096), 25, "range", "range 1 .* host pages of 4096"),
        (ranges_of(b"pc.ram", 0, 100), 9, "range", "host pages of 4096"),
        (ranges_of(b"m0", 4096, 1 << 21), 5, "range", "host pages of 2097152"),
        (ranges_of(b"pc.ram", 1 << 27, 4096), 9, "range", "ends beyond 0x8000000"),
        (ranges_of(b"pc.ram", (1 << 64) - 4096, 8192), 9, "range", "ends beyond"),
    ],
)
def test_broken_payloads(payload: bytes, offset: int, kind: str, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason) as error:
        decode_discard(payload, offset=1000, blocks=BLOCKS)
    assert error.value.offset == 1000 + offset
    assert error.value.kind is ErrorKind(kind)
    assert error.value.channel is Channel.FORWARD
    assert error.value.message == "POSTCOPY_RAM_DISCARD"


def test_without_blocks_a_range_must_not_wrap_around() -> None:
    with pytest.raises(RemoteProtocolError, match="beyond 0x10000000000000000") as error:
        decode_discard(ranges_of(b"a", (1 << 64) - 1, 2))
    assert error.value.offset is None
    assert decode_discard(ranges_of(b"a", (1 << 64) - 1, 1)).ranges == (((1 << 64) - 1, 1),)


def test_what_stock_destinations_accept() -> None:
    """Empty ranges, overlaps, any order, more than twelve."""
    fields = (8192, 4096, 0, 16384, 4096, 0) * 30
    message = decode_discard(ranges_of(b"pc.ram", *fields), blocks=BLOCKS)
    assert len(message.ranges) == 90


def test_the_schema_refuses_what_is_left_of_a_range() -> None:
    with pytest.raises(ConstructError):
        DISCARD_SCHEMA.parse(PAYLOAD + b"\0")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: encode_discard(PostcopyRamDiscard("a", ())), "without ranges"),
        (lambda: encode_discard(PostcopyRamDiscard("", (ByteRange(0, 1),))), "has 0 bytes"),
        (lambda: encode_discard(PostcopyRamDiscard("a", (ByteRange(-1, 1),))), "range at -1"),
        (lambda: encode_discard(PostcopyRamDiscard("a", (ByteRange(0, -1),))), "of -1 bytes"),
        (lambda: encode_discard(PostcopyRamDiscard("a", (ByteRange(1 << 64, 0),))), "leaves"),
        (lambda: encode_discard(PostcopyRamDiscard("a", (ByteRange(0, 1 << 64),))), "leaves"),
        (lambda: encode_discard(PostcopyRamDiscard("a", (ByteRange(0, 1),) * 4096)), "4095 fit"),
        (lambda: command_head("a\0b", 1), "NUL"),
        (lambda: command_head("a", 0), "0 ranges in one command"),
        (lambda: command_head("x" * 255, 4090), "4090 ranges .* 1 to 4079 fit"),
    ],
)
def test_bad_input_is_named(call, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        call()
