"""The opaque tail: found wherever it ends, never found where it doesn't, at bounded cost."""

from __future__ import annotations

import json
import random
import time

import pytest

from postcopy_proto import messages as m
from postcopy_proto.errors import ErrorKind
from postcopy_proto.messages import NEED_DATA, EndOfStream
from postcopy_proto.wire import ForwardDecoder, Limits, encode
from tests.wire.helpers import HEADER, cut, decode, events, forward, h, join, one_block, refuse

TEXT = json.dumps({"page_size": 4096, "devices": [{"name": "timer", "nested": {"a": []}}]}).encode()
BEFORE = HEADER + one_block()
HEAD = decode(forward(), BEFORE + b"\0")[:-1]


def section(body: bytes, section_id: int = 3, name: str = "timer") -> bytes:
    return join(m.SectionFull(section_id, name, 0, 2)) + body + encode(m.SectionFooter(section_id))


DEVICES = section(bytes(100)) + section(b"{}" * 9 + h("00 06 00000002 7b7d"), 4, "cpu")


def tail(text: bytes = TEXT) -> bytes:
    return b"\0" + encode(m.VmDescription(text))


def test_a_save_file() -> None:
    got = decode(forward(), BEFORE + DEVICES + tail())
    assert got == [*HEAD, m.DeviceState(DEVICES), m.Eof(), m.VmDescription(TEXT)]


def test_the_last_byte_is_enough() -> None:
    """A live source keeps the connection open behind the description."""
    decoder = ForwardDecoder()
    data = BEFORE + DEVICES + tail()
    decoder.receive_data(data[:-1])
    list(decoder)
    assert decoder.next_event() is NEED_DATA
    decoder.receive_data(data[-1:])
    assert list(decoder) == [m.DeviceState(DEVICES), m.Eof(), m.VmDescription(TEXT)]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_offsets_of_the_parts(size: int) -> None:
    data = BEFORE + DEVICES + tail()
    decoder, seen = ForwardDecoder(), []
    for at in range(0, len(data), size):
        decoder.receive_data(data[at : at + size])
        while (event := decoder.next_event()) is not NEED_DATA:
            seen.append((type(event), decoder.event_offset, decoder.offset))
    eof = len(BEFORE) + len(DEVICES)
    assert seen[-3:] == [
        (m.DeviceState, len(BEFORE), eof),
        (m.Eof, eof, eof + 1),
        (m.VmDescription, eof + 1, len(data)),
    ]


def test_a_stream_without_a_description_ends_with_footer_and_eof() -> None:
    got = decode(forward(), BEFORE + DEVICES + b"\0")
    assert got == [*HEAD, m.DeviceState(DEVICES), m.Eof()]


def test_devices_before_ram_make_all_of_it_opaque() -> None:
    data = DEVICES + one_block()
    got = decode(forward(), HEADER + data + tail())
    assert got[2:] == [m.DeviceState(data), m.Eof(), m.VmDescription(TEXT)]


CUTS = [
    (DEVICES, "inside device sections: more expected"),
    (DEVICES[:40], "inside device sections: more expected"),
    (DEVICES[:-1], "inside device sections: more expected"),
    (section(b"")[:11], "inside the stream before its EOF: at least 8 bytes more of a record"),
    (DEVICES + tail()[:7], "inside VMDESCRIPTION: more expected"),
    (DEVICES + tail()[:-1], "inside VMDESCRIPTION: more expected"),
    *((DEVICES + tail()[:size], "inside VMDESCRIPTION: more expected") for size in range(2, 7)),
    (DEVICES + tail()[1:6], "inside device sections: more expected"),
    (DEVICES + b"\0" + tail()[1:3] + bytes(5), "inside device sections: more expected"),
    (DEVICES + b"\1" + tail()[1:6], "inside device sections: more expected"),
    (DEVICES + b"\0\7" + tail()[2:6], "inside device sections: more expected"),
    (DEVICES[:-5] + b"\x7f" + DEVICES[-4:] + tail()[:6], "inside device sections: more expected"),
]


@pytest.mark.parametrize(("data", "detail"), CUTS, ids=str)
def test_where_a_cut_stream_broke_off(data: bytes, detail: str) -> None:
    end = cut(forward(), BEFORE + data)[-1]
    assert isinstance(end, EndOfStream)
    assert not end.clean
    assert end.offset == len(BEFORE) + len(data)
    assert end.detail.startswith(detail)


@pytest.mark.parametrize("size", range(22, 27))
def test_no_eof_in_too_few_bytes(size: int) -> None:
    """A lone header whose end looks like a footer and EOF is no whole section."""
    head = encode(m.SectionFull(0x7E000000, "x", 0, 0x7E000000))
    assert len(head) == 15
    got = cut(forward(), HEADER + head + bytes(size - 15))
    assert isinstance(got[-1], EndOfStream)


NO_TAILS = [
    tail(b"{}"),
    tail(b"[]"),
    tail(b'{"devices": 1'),
    tail(b'{"devices": \n1,}'),
    tail(b'{"devices": "\x01"}'),
    tail(b'{"devices": "\xff"}'),
    tail(b'{"page_size": 4096}'),
    b"\0" + h("06 00000005") + b'{"devices": []}',
    b"\0" + h("06 00000000") + b"{",
    b"\0\6" + h("ffffffff") + b"{",
    b"\1\6" + h("0000000f") + b'{"devices": []}',
    b"\0\7" + h("0000000f") + b'{"devices": []}',
    tail(b'{"devices": "\0"}'),
    tail(b"{" + b'"a":{' * 20_000),
    tail(b'{"devices": ' + b"9" * 5000 + b"}"),
]


@pytest.mark.parametrize("wrong", NO_TAILS, ids=lambda value: str(value[:30]))
def test_what_only_looks_like_a_tail_is_device_state(wrong: bytes) -> None:
    whole = DEVICES + wrong + DEVICES
    data = BEFORE + whole + tail()
    expected = [*HEAD, m.DeviceState(whole), m.Eof(), m.VmDescription(TEXT)]
    assert events(ForwardDecoder(), [data])[:-1] == expected
    pieces = (data[at : at + 11] for at in range(0, len(data), 11))
    assert events(ForwardDecoder(), pieces)[:-1] == expected
    # Nor does it keep a stream without a description from ending.
    assert events(ForwardDecoder(), [BEFORE + whole + b"\0"])[:-1] == expected[:-1]


def test_a_description_only_behind_a_footer() -> None:
    """Its bytes inside a device's body, without footer and EOF before them, mean nothing."""
    body = b"\x7f\0\0\0\0" + tail()
    whole = section(body)
    got = decode(forward(), BEFORE + whole + tail())
    assert got[-3:] == [m.DeviceState(whole), m.Eof(), m.VmDescription(TEXT)]


@pytest.mark.parametrize("between", range(1, 14))
def test_heads_that_overlap(between: int) -> None:
    """A head's bytes may begin inside another one's: none is missed."""
    false = (h("7e 00000000 00 06 0000000f") + b'{"dev')[:between]
    whole = DEVICES + false + section(b"")
    data = BEFORE + whole + tail()
    got = decode(forward(), data)
    assert got[-3:] == [m.DeviceState(whole), m.Eof(), m.VmDescription(TEXT)]


def test_the_first_tail_is_the_end() -> None:
    data = BEFORE + DEVICES + tail()
    for more in (b"x", b"\0", tail(), b"}"):
        at = len(data)
        text = f"byte {more[0]:#04x} behind the end of the stream"
        got = refuse(forward(), data + more, ErrorKind.MALFORMED, at, text, "EOF")
        assert got[-3:] == [m.DeviceState(DEVICES), m.Eof(), m.VmDescription(TEXT)]


def test_limits_themselves_fit() -> None:
    data = BEFORE + DEVICES + tail()
    fits = Limits(device_state_bytes=len(DEVICES), description_bytes=len(TEXT))
    assert len(decode(forward(limits=fits), data)) == len(HEAD) + 3
    text = f"more than {len(DEVICES) - 1} bytes of device sections without an end"
    refuse(
        forward(limits=Limits(device_state_bytes=len(DEVICES) - 1, description_bytes=len(TEXT))),
        data, ErrorKind.LIMIT, len(BEFORE), text, "DEVICE_STATE",
    )  # fmt: skip


def test_a_description_beyond_its_limit_is_none() -> None:
    limits = Limits(device_state_bytes=len(DEVICES), description_bytes=len(TEXT) - 1)
    decoder = ForwardDecoder(limits=limits)
    with pytest.raises(Exception, match="bytes of device sections without an end"):
        events(decoder, [BEFORE + DEVICES + tail() + bytes(100)])


def test_endless_device_state_is_refused() -> None:
    limits = Limits(device_state_bytes=1000, description_bytes=100)
    longest = 1000 + 100 + 11
    data = BEFORE + section(bytes(5000))
    refuse(
        forward(limits=limits), data[: len(BEFORE) + longest + 1], ErrorKind.LIMIT,
        len(BEFORE), "more than 1000 bytes of device sections", "DEVICE_STATE",
    )  # fmt: skip
    cut(forward(limits=limits), data[: len(BEFORE) + longest])


PATHOLOGICAL = [
    b"\0\6" * 400_000,
    h("7e 00000000 00 06 007fffff 7b") * 60_000,
    h("7e 00000000 00 06 00001000") + b"{" + b"[" * 800_000,
    h("7e 7e7e7e7e 00 06 00000002 7b7d") * 40_000,
    (h("7e 00000000 00 06 00000bb8") + b"{" + b" " * 2998 + b"}") * 300,
    b"\x7e" * 800_000,
    bytes(800_000),
    b"}" * 800_000,
]


@pytest.mark.parametrize("data", PATHOLOGICAL, ids=lambda value: str(value[:12]))
def test_linear_time_on_hostile_input(data: bytes) -> None:
    """Twice the input costs about twice the time, whole or in small chunks."""

    def seconds(body: bytes, size: int) -> float:
        decoder = ForwardDecoder()
        decoder.receive_data(BEFORE + encode(m.SectionFull(1, "x", 0, 1)))
        list(decoder)
        began = time.process_time()
        for at in range(0, len(body), size):
            decoder.receive_data(body[at : at + size])
            assert decoder.next_event() is NEED_DATA
        return time.process_time() - began

    for size in (len(data), 4096):
        half = min(seconds(data[: len(data) // 2], size) for _ in range(2))
        assert seconds(data, size) < 4 * half + 0.2
        assert half < 10


def test_random_bytes_around_a_tail() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        alphabet = b'\0\6\x7e{}"[]:,x' + bytes(range(4))
        noise = bytes(rng.choice(alphabet) for _ in range(rng.randrange(400)))
        whole = section(noise)
        got = decode(forward(), BEFORE + whole + tail())
        assert got[-3:] == [m.DeviceState(whole), m.Eof(), m.VmDescription(TEXT)]
