from __future__ import annotations

import random

import numpy as np
import pytest

from postcopy_proto.wire.buffer import NeedMoreError, ReceiveBuffer


def test_what_came_in_one_piece_is_not_copied() -> None:
    buffer, chunk = ReceiveBuffer(), bytearray(b"abcdef")
    buffer.feed(chunk)
    view = buffer.peek(6)
    chunk[0] = ord("x")
    assert bytes(view) == b"xbcdef"


def test_what_is_held_after_need_more_is_a_copy() -> None:
    buffer, chunk = ReceiveBuffer(), bytearray(b"abc")
    buffer.feed(chunk)
    with pytest.raises(NeedMoreError):
        buffer.peek(4)
    chunk[:] = b"xxx"
    buffer.feed(b"d")
    assert bytes(buffer.peek(4)) == b"abcd"


def test_only_the_torn_record_is_stitched() -> None:
    buffer, second = ReceiveBuffer(), bytearray(b"cdefgh")
    buffer.feed(b"ab")
    buffer.feed(second)
    assert bytes(buffer.peek(4)) == b"abcd"
    buffer.skip(4)
    second[2:] = b"EFGH"
    assert bytes(buffer.peek(4)) == b"EFGH"
    assert buffer.offset == 4


def test_peek_leaves_bytes_unread_and_skip_reads_them() -> None:
    buffer = ReceiveBuffer()
    buffer.feed(b"abc")
    assert bytes(buffer.peek(2)) == bytes(buffer.peek(2)) == b"ab"
    assert (buffer.offset, buffer.pending, buffer.total) == (0, 3, 3)
    buffer.skip(2)
    assert (buffer.offset, buffer.pending, buffer.total) == (2, 1, 3)
    assert bytes(buffer.peek(1)) == b"c"


def test_missing_counts_down_while_a_record_arrives() -> None:
    buffer = ReceiveBuffer()
    with pytest.raises(NeedMoreError):
        buffer.peek(5)
    assert buffer.missing == 5
    buffer.feed(b"ab")
    assert buffer.missing == 0, "nothing was torn: reading may be tried"
    with pytest.raises(NeedMoreError):
        buffer.peek(5)
    assert buffer.missing == 3
    buffer.feed(b"c")
    assert buffer.missing == 2
    buffer.feed(b"defg")
    assert buffer.missing == 0
    assert bytes(buffer.peek(5)) == b"abcde"
    assert buffer.pending == 7


def test_a_smaller_peek_after_a_failed_one() -> None:
    buffer = ReceiveBuffer()
    buffer.feed(b"abc")
    with pytest.raises(NeedMoreError):
        buffer.peek(9)
    assert bytes(buffer.peek(2)) == b"ab"
    buffer.skip(2)
    assert (buffer.offset, buffer.pending) == (2, 1)
    assert bytes(buffer.peek(1)) == b"c"


def test_a_peek_over_many_chunks() -> None:
    buffer = ReceiveBuffer()
    for chunk in (b"a", b"bc", b"def", b"ghij"):
        buffer.feed(chunk)
    assert bytes(buffer.peek(7)) == b"abcdefg"
    buffer.skip(7)
    assert bytes(buffer.peek(3)) == b"hij"


def test_other_formats_and_shapes_are_taken_as_bytes() -> None:
    buffer = ReceiveBuffer()
    buffer.feed(memoryview(np.array([[1, 2], [3, 4]], ">u2")).cast("B"))
    buffer.feed(memoryview(np.array([5], np.uint32)))
    buffer.feed(memoryview(np.array([[6, 7]], np.uint8)))
    assert bytes(buffer.peek(14)) == bytes([0, 1, 0, 2, 0, 3, 0, 4, 5, 0, 0, 0, 6, 7])
    assert buffer.total == 14


def test_what_is_unread_can_be_taken_back_and_read_elsewhere() -> None:
    """A window half read, then a torn record and a chunk behind it; offsets stay right."""
    buffer = ReceiveBuffer()
    buffer.feed(b"abc")
    buffer.feed(b"def")
    assert bytes(buffer.peek(1)) == b"a"
    buffer.skip(1)
    assert buffer.take_back() == b"bcdef"
    assert (buffer.offset, buffer.total, buffer.pending) == (1, 1, 0)
    buffer.pass_over(5)
    assert (buffer.offset, buffer.total, buffer.pending) == (6, 6, 0)
    buffer.feed(b"gh")
    with pytest.raises(NeedMoreError):
        buffer.peek(4)
    assert buffer.missing == 2
    assert buffer.take_back() == b"gh"
    assert (buffer.offset, buffer.total, buffer.missing) == (6, 6, 0)
    assert buffer.take_back() == b""
    buffer.feed(b"ij")
    assert bytes(buffer.peek(1)) == b"i"
    assert bytes(buffer.peek(2)) == b"ij"
    assert (buffer.offset, buffer.pending) == (6, 2)


def test_the_end() -> None:
    buffer = ReceiveBuffer()
    buffer.feed(b"ab")
    assert not buffer.eof
    assert not buffer.ends_after(1)
    with pytest.raises(NeedMoreError):
        buffer.ends_after(2)
    buffer.feed(b"")
    assert buffer.eof
    assert not buffer.ends_after(1)
    assert buffer.ends_after(2)
    assert bytes(buffer.peek(2)) == b"ab"
    with pytest.raises(NeedMoreError):
        buffer.ends_after(3)


def test_pass_to_hands_on_everything_in_order() -> None:
    buffer, got = ReceiveBuffer(), bytearray()

    def sink(piece: memoryview) -> int:
        got.extend(piece)
        return len(piece)

    buffer.feed(b"abc")
    with pytest.raises(NeedMoreError):
        buffer.peek(5)
    buffer.feed(b"defg")
    buffer.feed(b"hi")
    buffer.pass_to(sink)
    assert bytes(got) == b"abcdefghi"
    assert (buffer.offset, buffer.pending) == (9, 0)


def test_pass_to_stops_where_the_sink_does() -> None:
    buffer, got = ReceiveBuffer(), bytearray()

    def sink(piece: memoryview) -> int:
        got.extend(piece[:2])
        return 2

    buffer.feed(b"abc")
    buffer.feed(b"de")
    buffer.pass_to(sink)
    assert bytes(got) == b"ab"
    assert (buffer.offset, buffer.pending) == (2, 3)
    assert bytes(buffer.peek(3)) == b"cde"


def test_any_cuts_and_any_peeks_give_the_bytes_in_order() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        data = rng.randbytes(300)
        buffer, fed, read = ReceiveBuffer(), 0, bytearray()
        while len(read) < len(data):
            if rng.random() < 0.5 and fed < len(data):
                size = rng.randrange(1, 40)
                buffer.feed(data[fed : fed + size])
                fed = min(fed + size, len(data))
            count = rng.randrange(1, 30)
            try:
                record = bytes(buffer.peek(count))
            except NeedMoreError:
                assert fed - len(read) < count
                continue
            assert fed - len(read) >= count
            taken = rng.randrange(0, count + 1)
            read += record[:taken]
            buffer.skip(taken)
            assert buffer.offset == len(read)
            assert buffer.pending == fed - len(read)
        assert bytes(read) == data


def test_a_byte_at_a_time_costs_linear_time() -> None:
    """Counted, not timed: bytes are added to the torn record, never moved again."""
    buffer = ReceiveBuffer()
    with pytest.raises(NeedMoreError):
        buffer.peek(100_000)
    buffer.feed(b"x")
    with pytest.raises(NeedMoreError):
        buffer.peek(100_000)
    torn = buffer._torn
    for _ in range(99_998):
        buffer.feed(b"x")
    assert buffer._torn is torn
    assert len(torn) == 99_999
    buffer.feed(b"x")
    assert bytes(buffer.peek(100_000)) == b"x" * 100_000
