"""The return path: requests decoded together, bitmaps behind their message, and every refusal."""

from __future__ import annotations

import random

import pytest

from postcopy_proto import messages as m
from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.messages import NEED_DATA, EndOfStream
from postcopy_proto.wire import Limits, ReturnPathDecoder, encode
from postcopy_proto.wire.return_path import (
    REQ_PAGES,
    REQUEST,
    RP_CMD_ARGS,
    MigRpMsg,
    decode_requests,
)
from tests.wire.helpers import P, channel_of, cut, decode, every_byte, h, join, refuse

MALFORMED, UNKNOWN, LIMIT = ErrorKind.MALFORMED, ErrorKind.UNKNOWN, ErrorKind.LIMIT


def requests(count: int, seed: int = 0) -> list[m.ReqPages]:
    rng = random.Random(seed)
    return [m.ReqPages(rng.getrandbits(64), rng.getrandbits(32)) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 511, 512, 513, 2000])
def test_requests_that_arrive_together(count: int) -> None:
    messages: list[m.Message] = [m.ReqPagesId(0, P, "b"), *requests(count), m.Pong(1)]
    messages += [*requests(count, 1), m.Shut()]
    assert decode(ReturnPathDecoder, join(*messages)) == messages


def test_offsets_within_requests_that_arrive_together() -> None:
    messages = [m.Pong(1), *requests(600), m.ReqPagesId(0, P, "b"), *requests(9), m.Pong(2)]
    decoder = ReturnPathDecoder()
    decoder.receive_data(join(*messages))
    at = 0
    for message in messages:
        assert decoder.offset == at
        assert decoder.next_event() == message
        assert decoder.event_offset == at
        at += len(encode(message))
    assert decoder.offset == at
    assert decoder.next_event() is NEED_DATA


def test_need_data_leaves_the_last_events_offset_alone() -> None:
    decoder = ReturnPathDecoder()
    decoder.receive_data(encode(m.Pong(1)) + join(*requests(20)))
    assert len(list(decoder)) == 21
    assert decoder.event_offset == 8 + 19 * 16
    assert decoder.next_event() is NEED_DATA
    assert decoder.event_offset == 8 + 19 * 16
    decoder.receive_data(encode(m.Pong(2)))
    list(decoder)
    assert decoder.event_offset == 8 + 20 * 16


def test_requests_are_messages_like_any_other() -> None:
    decoder = ReturnPathDecoder()
    decoder.receive_data(join(*requests(20)))
    request = next(iter(decoder))
    assert type(request) is m.ReqPages
    assert hash(request) == hash(requests(1)[0])
    with pytest.raises(AttributeError):
        request.start = 1  # type: ignore[misc]


def test_decode_requests_stops_at_another_message() -> None:
    good = requests(5)
    data = b"x" + join(*good, m.Pong(1), *good)
    assert decode_requests(memoryview(data), 1, 5) == good
    assert decode_requests(memoryview(data), 1, 8) == good
    assert decode_requests(memoryview(data), 81, 1) == []


def test_the_fast_form_has_the_schemas_layout() -> None:
    assert REQUEST.format == ">HHQL"
    assert REQUEST.size == REQ_PAGES.sizeof() == 16


def test_the_table_of_lengths() -> None:
    assert {MigRpMsg(number).name: length for number, length in RP_CMD_ARGS.items()} == {
        "SHUT": 4,
        "PONG": 4,
        "REQ_PAGES": 12,
        "RESUME_ACK": 4,
        "SWITCHOVER_ACK": 0,
    }


BITMAP = h("0005 0002 01 62")
MARK = h("0123456789abcdef")

REFUSED = [
    (h("0000 0000"), UNKNOWN, "message type 0x0 is unknown; 1 to 7 are in the table", "MIG_RP_MSG"),
    (h("0008 0000"), UNKNOWN, "message type 0x8 is unknown", "MIG_RP_MSG"),
    (h("ffff ffff"), UNKNOWN, "message type 0xffff is unknown", "MIG_RP_MSG"),
    (h("0001 0003"), MALFORMED, "3 bytes of payload; 4 are expected", "SHUT"),
    (h("0002 0005"), MALFORMED, "5 bytes of payload; 4 are expected", "PONG"),
    (h("0004 000d"), MALFORMED, "13 bytes of payload; 12 are expected", "REQ_PAGES"),
    (h("0004 000b"), MALFORMED, "11 bytes of payload; 12 are expected", "REQ_PAGES"),
    (h("0006 0000"), MALFORMED, "0 bytes of payload; 4 are expected", "RESUME_ACK"),
    (h("0007 0001"), MALFORMED, "1 bytes of payload; 0 are expected", "SWITCHOVER_ACK"),
    (h("0001 0201"), LIMIT, "513 bytes of payload; the limit is 512", "SHUT"),
    (h("0003 0201"), LIMIT, "513 bytes of payload; the limit is 512", "REQ_PAGES_ID"),
    (h("0006 0004 00000000"), ErrorKind.MISMATCH, "value 0x0; it must be 1", "RESUME_ACK"),
    (h("0006 0004 00000002"), ErrorKind.MISMATCH, "value 0x2; it must be 1", "RESUME_ACK"),
    (h("0003 0000"), MALFORMED, "0 bytes of payload; at least 14", "REQ_PAGES_ID"),
    (h("0003 000c") + bytes(12), MALFORMED, "12 bytes of payload; at least 14", "REQ_PAGES_ID"),
    (
        h("0003 000e") + bytes(12) + h("02 61"),
        MALFORMED,
        "14 bytes of payload with a name of 2; 15 are expected",
        "REQ_PAGES_ID",
    ),
    (
        h("0003 000f") + bytes(12) + h("01 61 62"),
        MALFORMED,
        "15 bytes of payload with a name of 1; 14 are expected",
        "REQ_PAGES_ID",
    ),
    (h("0003 000d") + bytes(13), MALFORMED, "a name of 0 bytes; 1 to 255 are allowed", None),
    (h("0003 000e") + bytes(12) + h("01 00"), MALFORMED, "a NUL in the name", None),
    (h("0005 0000"), MALFORMED, "0 bytes of payload; the name and its length", "RECV_BITMAP"),
    (h("0005 0002 02 61"), MALFORMED, "2 bytes of payload; the name and", "RECV_BITMAP"),
    (h("0005 0003 01 61 62"), MALFORMED, "3 bytes of payload; the name and", "RECV_BITMAP"),
    (h("0005 0001 00"), MALFORMED, "a name of 0 bytes", None),
    (h("0005 0003 02 6100"), MALFORMED, "a NUL in the name", None),
    (BITMAP + bytes(8), MALFORMED, "bitmap of 0 bytes; a multiple of 8 above 0", "RECV_BITMAP"),
    (BITMAP + h("0000000000000007"), MALFORMED, "bitmap of 7 bytes; a multiple", "RECV_BITMAP"),
    (
        BITMAP + h("0000000004000008"),
        LIMIT,
        "bitmap of 67108872 bytes; the limit is 67108864",
        "RECV_BITMAP",
    ),
    (
        BITMAP + h("0000000000000008") + bytes(8) + h("0123456789abcdee"),
        MALFORMED,
        "0123456789abcdee behind the bitmap; its end mark is due",
        "RECV_BITMAP",
    ),
]


@pytest.mark.parametrize(("data", "kind", "text", "message"), REFUSED, ids=str)
def test_refused(data: bytes, kind: ErrorKind, text: str, message: str | None) -> None:
    pong = m.Pong(1)
    assert refuse(ReturnPathDecoder, encode(pong) + data, kind, 8, text, message) == [pong]


def test_bitmaps_of_recovery() -> None:
    messages = [m.ReceivedBitmap("b" * 255, random.Random(1).randbytes(4096)), m.ResumeAck()]
    assert decode(ReturnPathDecoder, join(*messages)) == messages


def test_limits_themselves_fit() -> None:
    limits = Limits(return_path_bytes=14, bitmap_bytes=16, idstr=1)

    def make() -> ReturnPathDecoder:
        return ReturnPathDecoder(limits=limits)

    good: list[m.Message] = [m.ReqPagesId(0, P, "b"), m.ReceivedBitmap("b", bytes(16))]
    assert decode(make, join(*good)) == good
    refuse(make, encode(m.ReqPagesId(0, P, "bb")), LIMIT, 0, "15 bytes of payload", "REQ_PAGES_ID")
    refuse(make, encode(m.ReceivedBitmap("bb", bytes(8))), LIMIT, 0, "a name of 2 bytes")
    refuse(make, encode(m.ReceivedBitmap("b", bytes(24))), LIMIT, 0, "24 bytes", "RECV_BITMAP")
    wider = Limits(idstr=1)
    refuse(
        lambda: ReturnPathDecoder(limits=wider), encode(m.ReqPagesId(0, P, "bb")), LIMIT, 0,
        "a name of 2 bytes; the limit is 1",
    )  # fmt: skip


def test_unknown_types_pass_when_not_strict() -> None:
    def make() -> ReturnPathDecoder:
        return ReturnPathDecoder(strict=False)

    messages = [m.UnknownReturnPathMessage(8, b"abc"), m.UnknownReturnPathMessage(0xFFFF, b"")]
    assert decode(make, join(*messages)) == messages
    refuse(make, h("0000 0000"), UNKNOWN, 0, "0x0 is unknown", "MIG_RP_MSG")
    refuse(make, h("0008 0201"), LIMIT, 0, "513 bytes", "UNKNOWN_RP_MSG")
    refuse(make, h("0001 0003"), MALFORMED, 0, "3 bytes", "SHUT")


def test_the_channel_in_errors() -> None:
    assert channel_of(ReturnPathDecoder(), h("0000 0000")) is Channel.RETURN


def test_where_a_cut_stream_broke_off() -> None:
    pong = encode(m.Pong(1))
    assert cut(ReturnPathDecoder, b"") == [EndOfStream(0, clean=True)]
    for data, lacking in ((pong[:1], 3), (pong[:4], 4), (pong[:7], 1)):
        assert cut(ReturnPathDecoder, pong + data) == [
            m.Pong(1),
            EndOfStream(
                8 + len(data),
                clean=False,
                detail="inside a return path message: "
                f"at least {lacking} bytes more of a record at 0x8 expected",
            ),
        ]


def test_an_error_behind_requests_comes_after_them() -> None:
    good = requests(30)
    data = join(*good) + h("0009 0000")
    assert refuse(ReturnPathDecoder, data, UNKNOWN, 480, "0x9 is unknown", "MIG_RP_MSG") == good


def test_a_torn_request_among_many() -> None:
    good = requests(30)
    data = join(*good)
    decoder = ReturnPathDecoder()
    decoder.receive_data(data[:-1])
    assert list(decoder) == good[:-1]
    decoder.receive_data(data[-1:])
    assert list(decoder) == good[-1:]


def test_iteration_ends_with_the_error() -> None:
    decoder = ReturnPathDecoder()
    decoder.receive_data(encode(m.Pong(3)) + h("0009 0000"))
    iterator = iter(decoder)
    assert next(iterator) == m.Pong(3)
    with pytest.raises(RemoteProtocolError):
        next(iterator)


def test_byte_by_byte_nothing_is_decoded_early() -> None:
    decoder = ReturnPathDecoder()
    for byte in list(every_byte(encode(m.ReqPages(1, 2))))[:-1]:
        decoder.receive_data(byte)
        assert decoder.next_event() is NEED_DATA
