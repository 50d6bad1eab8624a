"""RAM records: batches, their bounds and their building; the preempt channel."""

from __future__ import annotations

import random
import tracemalloc

import numpy as np
import pytest

from postcopy_proto import messages as m
from postcopy_proto.errors import Channel, ErrorKind
from postcopy_proto.messages import NEED_DATA, EndOfStream, Pages
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.wire import ForwardDecoder, Limits, PreemptDecoder, encode
from postcopy_proto.wire.pages import (
    EOS,
    MULTIFD_FLUSH,
    RamSaveFlag,
    compress_bound,
    encode_page,
    encode_pages,
    join_pages,
    payload_rows,
    ram_record,
)
from postcopy_proto.wire.ram import BATCH, RUN
from tests.wire.helpers import (
    HEADER,
    P,
    batch,
    channel_of,
    cut,
    decode,
    events_until_error,
    forward,
    h,
    join,
    one_block,
    page,
    refuse,
)

ZERO_HEAD = h("0000000000000022 00")


def preempt(**options: object) -> object:
    return lambda: PreemptDecoder(**options)  # type: ignore[arg-type]


def records(kinds: str, *, named: bool = True, first: int = 0) -> bytes:
    """Page records of block b at consecutive pages, by letters z and p."""
    pages = [(first + i, None if kind == "z" else page(i % 7)) for i, kind in enumerate(kinds)]
    return encode(batch("b", *pages, named=named))


# ---- batches

EDGES = [1, 2, RUN - 1, RUN, RUN + 1, 4 * RUN, 5 * RUN, 5 * RUN + 1, 12 * RUN, 13 * RUN + 1]


@pytest.mark.parametrize("count", EDGES)
@pytest.mark.parametrize("kind", "zp")
@pytest.mark.parametrize("tail", ["", "z", "p", "zp", "pzz"])
def test_runs_of_every_length_and_what_follows(count: int, kind: str, tail: str) -> None:
    data = records(kind * count + tail)
    decoder = PreemptDecoder()
    decoder.receive_data(data)
    (event,) = decoder
    assert isinstance(event, Pages)
    assert event.named
    assert event.offsets.dtype == np.uint64
    assert event.positions.dtype == np.int64
    assert event.offsets.tolist() == [i * P for i in range(count + len(tail))]
    for i, letter in enumerate(kind * count + tail):
        assert event.page(i) == (None if letter == "z" else page(i % 7))
    assert encode(event) == data
    assert (decoder.event_offset, decoder.offset) == (0, len(data))


def test_payload_is_not_copied_and_data_ends_with_the_batch() -> None:
    data = bytearray(records("zppz") + h("0000000000000010"))
    decoder = PreemptDecoder()
    decoder.receive_data(data)
    event = decoder.next_event()
    assert isinstance(event, Pages)
    assert len(event.data) == len(data) - 8
    data[11 + 8 : 11 + 8 + P] = bytes(P)
    assert event.page(1) == bytes(P)
    assert event.page(2) == page(2)


@pytest.mark.parametrize("kind", "zp")
def test_a_batch_has_a_bounded_number_of_records(kind: str) -> None:
    decoder = PreemptDecoder()
    decoder.receive_data(records(kind * (2 * BATCH + 10)))
    sizes = []
    while (event := decoder.next_event()) is not NEED_DATA:
        assert isinstance(event, Pages)
        assert event.named == (not sizes)
        sizes.append(len(event))
    assert sizes == [BATCH, BATCH, 10]


def test_a_mixed_batch_has_a_bounded_number_of_records() -> None:
    decoder = PreemptDecoder()
    decoder.receive_data(records("zp" * BATCH))
    assert [len(event) for event in decoder] == [BATCH, BATCH]  # type: ignore[arg-type]


def test_a_name_opens_a_batch() -> None:
    data = records("zz") + records("zz", first=2) + records("z", named=False, first=4)
    decoder = PreemptDecoder()
    decoder.receive_data(data)
    assert list(decoder) == [
        batch("b", (0, None), (1, None)),
        batch("b", (2, None), (3, None), (4, None)),
    ]


def test_only_whole_records_are_taken() -> None:
    data = records("pzp")
    for size in range(1, len(data) + 1):
        decoder = PreemptDecoder()
        decoder.receive_data(data[:size])
        taken = list(decoder)
        expected = sum(size >= end for end in (8 + 2 + P, 10 + P + 9, 10 + P + 9 + 8 + P))
        assert sum(len(event) for event in taken) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("before", [1, 2, RUN, RUN + 1, 6 * RUN])
@pytest.mark.parametrize("kind", "zp")
def test_a_flag_too_many_ends_a_batch_and_is_refused(kind: str, before: int) -> None:
    """Wherever it stands among records that are right; bit by bit, CONTINUE but not the kind's."""
    good, more = records(kind * before), records(kind * 3, named=False, first=before)
    for bit in range(12):
        flag = 1 << bit
        word = int.from_bytes(more[:8], "big")
        if word & flag:
            continue
        wrong = (word | flag).to_bytes(8, "big") + more[8:]
        stream = encode(m.SectionPart(1)) + good + wrong
        events, error = events_until_error(ForwardDecoder(header=False), [stream])
        assert sum(len(event) for event in events if isinstance(event, Pages)) == before
        assert error.offset == 5 + len(good), f"flag {flag:#x}"


@pytest.mark.parametrize("word", [EOS, MULTIFD_FLUSH])
def test_the_schema_of_a_word_alone(word: int) -> None:
    schema, data = ram_record(P), word.to_bytes(8, "big")
    record = schema.parse(data)
    assert (record.word, record.idstr, record.body) == (word, None, None)
    assert schema.build({"word": word, "idstr": None, "body": None}) == data


def test_random_mixes_against_the_schema() -> None:
    """What the fast path reads is what the schema, one record after the other, reads."""
    schema = ram_record(P)
    for seed in range(60):
        rng = random.Random(seed)
        data = b""
        for first in range(rng.randrange(1, 4)):
            bias = rng.choice((0.02, 0.5, 0.98))
            kinds = "".join(
                "z" if rng.random() < bias else "p" for _ in range(rng.randrange(1, 90))
            )
            data += records(kinds, first=100 * first)
        expected, at = [], 0
        while at < len(data):
            record = schema.parse(data[at:])
            at += len(schema.build(record))
            content = record.body.page if "page" in record.body else None
            expected.append((record.word & -P, content, record.idstr))
        seen = []
        for event in join_pages(_all(PreemptDecoder(), data)):
            assert isinstance(event, Pages)
            for i in range(len(event)):
                name = event.block if i == 0 and event.named else None
                content = event.page(i)
                seen.append(
                    (int(event.offsets[i]), None if content is None else bytes(content), name)
                )
        assert seen == expected


def _all(decoder: PreemptDecoder, data: bytes) -> list[m.Message]:
    decoder.receive_data(data)
    return list(decoder)


# ---- refusals

SECTION = HEADER + one_block() + encode(m.SectionPart(2))
AT = len(SECTION)
NAMED = h("0000000000000002 06") + b"pc.ram" + b"\0"

MALFORMED, UNKNOWN, RANGE = ErrorKind.MALFORMED, ErrorKind.UNKNOWN, ErrorKind.RANGE

REFUSED = [
    (h("0000000000000000"), UNKNOWN, "unknown combination of flags 0x0 in word 0x0"),
    (h("0000000000001020"), UNKNOWN, "unknown combination of flags 0x20 in word 0x1020"),
    (h("000000000000000a"), UNKNOWN, "unknown combination of flags 0xa"),
    (h("0000000000000018"), UNKNOWN, "unknown combination of flags 0x18"),
    (h("0000000000000030"), UNKNOWN, "unknown combination of flags 0x30"),
    (h("0000000000000220"), UNKNOWN, "unknown combination of flags 0x220"),
    (h("0000000000000408"), UNKNOWN, "unknown combination of flags 0x408"),
    (h("0000000000000808"), UNKNOWN, "unknown combination of flags 0x808"),
    (h("0000000000000024"), UNKNOWN, "unknown combination of flags 0x24"),
    (h("0000000000000001"), ErrorKind.UNSUPPORTED, "RAM_SAVE_FLAG_FULL is obsolete since 2009"),
    (h("0000000000000021"), ErrorKind.UNSUPPORTED, "RAM_SAVE_FLAG_FULL is obsolete"),
    (h("0000000000000080"), ErrorKind.UNSUPPORTED, "RAM_SAVE_FLAG_HOOK belongs to RDMA"),
    (h("0000000000001010"), MALFORMED, "EOS with offset 0x1000; it has none"),
    (h("0000000000001200"), MALFORMED, "MULTIFD_FLUSH with offset 0x1000; it has none"),
    (h("0000000000000022"), MALFORMED, "CONTINUE without a block named before on this channel"),
    (h("0000000000000028"), MALFORMED, "CONTINUE without a block named before"),
    (h("0000000000000060"), MALFORMED, "CONTINUE without a block named before"),
    (h("0000000000000008 05") + b"other", UNKNOWN, "RAMBlock 'other' is not in the block list"),
    (h("0000000000000102 05") + b"other", UNKNOWN, "combination of flags 0x102"),
    (
        h("0000000000040002 06") + b"pc.ram",
        RANGE,
        "page at 0x40000 of RAMBlock 'pc.ram', which ends at 0x40000",
    ),
    (h("fffffffffffff002 06") + b"pc.ram", RANGE, "page at 0xfffffffffffff000 of RAMBlock"),
    (h("0000000000040040 06") + b"pc.ram", RANGE, "page at 0x40000 of RAMBlock 'pc.ram'"),
]


@pytest.mark.parametrize(("data", "kind", "text"), REFUSED, ids=str)
def test_refused(data: bytes, kind: ErrorKind, text: str) -> None:
    refuse(forward(), SECTION + data, kind, AT, text, "RAM")


OTHERS = [
    (h("0000000000001004"), ErrorKind.STATE, "a block list, which only opens a START", "MEM_SIZE"),
    (h("0000000000000002 00"), MALFORMED, "a name of 0 bytes; 1 to 255 are allowed", None),
    (h("0000000000000002 02 6100"), MALFORMED, "a NUL in the name", None),
    (
        h("0000000000000002 06") + b"pc.ram" + b"\1",
        MALFORMED,
        "a zero page with fill byte 0x01; it must be 0",
        "ZERO",
    ),
    (
        h("0000000000000040 06") + b"pc.ram" + b"\2",
        MALFORMED,
        "encoding 0x02; 0x01 is known",
        "XBZRLE",
    ),
    (
        h("0000000000000040 06") + b"pc.ram" + h("01 1001"),
        MALFORMED,
        "4097 bytes for a page; at most 4096 are possible",
        "XBZRLE",
    ),
    (
        h("0000000000000100 06") + b"pc.ram" + h("0000100f"),
        MALFORMED,
        "4111 bytes for a page; at most 4110 are possible",
        "COMPRESS_PAGE",
    ),
]


@pytest.mark.parametrize(("data", "kind", "text", "message"), OTHERS, ids=str)
def test_others_refused(data: bytes, kind: ErrorKind, text: str, message: str | None) -> None:
    refuse(forward(), SECTION + data, kind, AT, text, message)


@pytest.mark.parametrize("before", [0, 1, RUN - 2, RUN - 1, RUN, RUN + 5, 5 * RUN, 6 * RUN])
@pytest.mark.parametrize("kind", "zp")
def test_a_page_beyond_its_block_ends_the_batch_before(before: int, kind: str) -> None:
    make = preempt(blocks=[RAMBlock("b", (before + 1) * P)])
    good = records(kind * (before + 1))
    bad = records(kind * 3, named=False, first=before + 1)
    got = refuse(make, good + bad, RANGE, len(good), f"ends at {(before + 1) * P:#x}", "RAM")
    assert sum(len(event) for event in got) == before + 1  # type: ignore[arg-type]


@pytest.mark.parametrize("before", [1, RUN - 1, RUN, RUN + 5, 6 * RUN])
def test_a_fill_byte_ends_the_batch_before(before: int) -> None:
    good = records("z" * before)
    bad = h("0000000000000022 07") + records("zz", named=False)
    got = refuse(preempt(), good + bad, MALFORMED, len(good), "fill byte 0x07", "ZERO")
    assert sum(len(event) for event in got) == before  # type: ignore[arg-type]


@pytest.mark.parametrize("before", [1, RUN - 1, RUN, RUN + 5, 6 * RUN])
@pytest.mark.parametrize("kind", "zp")
def test_bad_flags_end_the_batch_before(before: int, kind: str) -> None:
    good = records(kind * before)
    bad = h("000000000000002a") + bytes(3 * P)
    got = refuse(preempt(), good + bad, UNKNOWN, len(good), "flags 0x2a", "PAGE")
    assert sum(len(event) for event in got) == before  # type: ignore[arg-type]


def test_the_last_page_of_a_block_with_a_ragged_end() -> None:
    make = preempt(blocks=[RAMBlock("b", 3 * P + 1)])
    assert decode(make, records("zzzz")) == [batch("b", *((i, None) for i in range(4)))]
    refuse(make, records("z", first=4), RANGE, 0, "ends at 0x4000", "RAM")


def test_continue_reaches_across_sections_and_other_records() -> None:
    data = join(
        batch("pc.ram", (1, None)),
        m.XbzrlePage("pc.ram", P, b"ab", False),
        m.MultifdFlush(),
        m.CompressedPage("pc.ram", P, b"cd", False),
        m.RamEos(),
        m.SectionFooter(2),
        m.Ping(1),
        m.SectionEnd(2),
        batch("pc.ram", (2, None), named=False),
        m.RamEos(),
        m.SectionFooter(2),
        m.Eof(),
    )
    got = decode(forward(), SECTION + data)
    assert join(*got) == SECTION + data
    assert got[-4] == batch("pc.ram", (2, None), named=False)


def test_encoded_pages_against_the_schema() -> None:
    schema = ram_record(P)
    record = schema.parse(encode(m.XbzrlePage("b", P, b"ab")))
    assert (record.word, record.idstr, record.body.encoded) == (P | 0x40, "b", b"ab")
    record = schema.parse(encode(m.CompressedPage("b", P, b"ab", False)))
    assert (record.word, record.idstr, record.body.compressed) == (P | 0x120, None, b"ab")


def test_encoded_pages_at_their_bounds() -> None:
    messages = [
        m.XbzrlePage("pc.ram", 63 * P, page(1)),
        m.CompressedPage("pc.ram", 63 * P, page(1) + bytes(14)),
        m.XbzrlePage("pc.ram", 0, b"", False),
        m.CompressedPage("pc.ram", 0, b"", False),
    ]
    data = join(*messages) + join(m.RamEos(), m.SectionFooter(2), m.Eof())
    assert decode(forward(), SECTION + data)[-7:-3] == messages


def test_names_have_a_limit() -> None:
    make = preempt(limits=Limits(idstr=1))
    assert decode(make, records("z")) == [batch("b", (0, None))]
    data = encode(batch("bb", (0, None)))
    refuse(make, data, ErrorKind.LIMIT, 0, "a name of 2 bytes; the limit is 1")


def test_compress_bound_is_zlibs() -> None:
    assert [compress_bound(size) for size in (1024, 4096, 65536, 1 << 25)] == [
        1037,
        4110,
        65569,
        (1 << 25) + (1 << 13) + (1 << 11) + 1 + 13,
    ]


def test_flags_have_qemus_values() -> None:
    assert {flag.name: flag.value for flag in RamSaveFlag} == {
        "FULL": 1,
        "ZERO": 2,
        "MEM_SIZE": 4,
        "PAGE": 8,
        "EOS": 16,
        "CONTINUE": 32,
        "XBZRLE": 64,
        "HOOK": 128,
        "COMPRESS_PAGE": 256,
        "MULTIFD_FLUSH": 512,
    }


# ---- the preempt channel


def test_preempt_ends_with_or_without_eos() -> None:
    pages = batch("pc.ram", (0x300, None), (0x3FF, None))
    assert decode(PreemptDecoder, encode(pages)) == [pages]
    assert decode(PreemptDecoder, encode(pages) + encode(m.RamEos())) == [pages, m.RamEos()]
    assert decode(PreemptDecoder, b"") == []


def test_nothing_follows_the_eos() -> None:
    data = encode(m.RamEos()) + b"\x01"
    refuse(PreemptDecoder, data, MALFORMED, 8, "byte 0x01 behind the channel's EOS", "EOS")


@pytest.mark.parametrize("word", [0x4, 0x44, 0x40, 0x60, 0x100, 0x120, 0x200, 0x1, 0x80, 0, 0xA])
def test_preempt_carries_pages_only(word: int) -> None:
    text = f"flags {word:#x}; only ZERO, PAGE and EOS occur on this channel"
    refuse(PreemptDecoder, word.to_bytes(8, "big"), UNKNOWN, 0, text, "PAGE")


def test_preempt_checks_names_against_its_blocks() -> None:
    make = preempt(blocks=[RAMBlock("b", P)])
    refuse(make, encode(batch("c", (0, None))), UNKNOWN, 0, "'c' is not in the block list", "RAM")
    refuse(make, h("0000000000001010"), MALFORMED, 0, "EOS with offset 0x1000", "RAM")
    assert channel_of(make(), encode(batch("c", (0, None)))) is Channel.PREEMPT  # type: ignore[operator]


def test_preempt_with_other_target_pages() -> None:
    pages = batch("b", (0, page(1, 8192)), (3, None), (1, page(2, 8192)), page_size=8192)
    assert decode(preempt(target_page_size=8192), encode(pages)) == [pages]


def test_where_a_cut_preempt_channel_broke_off() -> None:
    data = records("zp")
    assert cut(PreemptDecoder, data[:-1]) == [
        batch("b", (0, None)),
        EndOfStream(
            len(data) - 1,
            clean=False,
            detail="inside a page record: at least 1 bytes more of a record at 0xb expected",
        ),
    ]


# ---- building


def scalar(
    block: str, offsets: list[int], zero: list[bool], rows: list[bytes], named: bool
) -> bytes:
    """The records, one after the other, through the schema."""
    schema, bodies, out = ram_record(P), iter(rows), b""
    for i, (offset, is_zero) in enumerate(zip(offsets, zero, strict=True)):
        name = named and i == 0
        out += schema.build(
            {
                "word": offset | (2 if is_zero else 8) | (0 if name else 0x20),
                "idstr": block if name else None,
                "body": {} if is_zero else {"page": next(bodies)},
            }
        )
    return out


def test_build_against_the_schema() -> None:
    for seed in range(80):
        rng = random.Random(seed)
        count = rng.choice((0, 1, 2, 7, 8, 9, 40, 100))
        zero: list[bool] = []
        while len(zero) < count:
            zero += [rng.random() < 0.5] * rng.choice((1, 2, 9, 30))
        zero = zero[:count]
        offsets = [rng.randrange(1 << 30) * P for _ in range(count)]
        rows = np.frombuffer(rng.randbytes(P * zero.count(False)), np.uint8).reshape(-1, P)
        named = rng.random() < 0.5
        expected = scalar("pc.ram", offsets, zero, [row.tobytes() for row in rows], named)
        places = np.array(offsets, np.int64)
        built = encode_pages("pc.ram", places, zero, rows, named=named)
        assert bytes(built) == expected
        assert built.nbytes == len(expected)
        for out in (bytearray(len(expected)), bytearray(len(expected) + 99)):
            out[:] = b"\xff" * len(out)
            view = encode_pages("pc.ram", places, zero, rows, named=named, out=out)
            assert bytes(view) == bytes(out[: len(expected)]) == expected
            assert bytes(out[len(expected) :]) == b"\xff" * (len(out) - len(expected))


@pytest.mark.parametrize("count", [1, 3, 40])
def test_rows_may_be_strided(count: int) -> None:
    memory = np.frombuffer(random.Random(1).randbytes(2 * count * (P + 8)), np.uint8)
    offsets = np.arange(count) * P
    zero = np.zeros(count, np.bool_)
    for rows in (
        memory.reshape(-1, P + 8)[:count, 8:],
        memory.reshape(-1, P + 8)[::2, :P],
        memory.reshape(-1, P + 8)[count - 1 :: -1, :P],
    ):
        built = encode_pages("b", offsets, zero, rows, named=True)
        assert bytes(built) == bytes(
            encode_pages("b", offsets, zero, np.ascontiguousarray(rows), named=True)
        )


ROWS = np.zeros((2, P), np.uint8)
BUILD_REFUSED = [
    ({"offsets": [[0, P]], "zero": [[False, False]]}, "offsets of int64 and shape (1, 2)"),
    ({"offsets": [0.0, 4096.0]}, "offsets of float64"),
    ({"zero": [False]}, "zero of shape (1,)"),
    ({"zero": [False, True]}, "uint8 and 1 rows are needed"),
    ({"rows": ROWS[0]}, "rows of uint8 and shape (4096,)"),
    ({"rows": ROWS.astype(np.int8)}, "rows of int8"),
    ({"rows": ROWS[:1]}, "shape (1, 4096); uint8 and 2 rows are needed"),
    ({"rows": ROWS[:, :512]}, "target page size 512"),
    ({"rows": ROWS[:, :4095]}, "target page size 4095"),
    ({"offsets": [0, 100]}, "offset 100 is not on a page of 4096 bytes"),
    ({"offsets": [2048, 4096]}, "offset 2048 is not on a page"),
    ({"offsets": [0, -P]}, "offset -4096 is not on a page"),
    ({"block": ""}, "1 to 255 are allowed"),
    ({"block": "a\0"}, "contains a NUL byte"),
    ({"out": bytearray(2 * P + 16 + 6)}, "out has 8214 bytes; the records need 8215"),
]


@pytest.mark.parametrize(("change", "text"), BUILD_REFUSED, ids=str)
def test_build_refused(change: dict[str, object], text: str) -> None:
    arguments: dict[str, object] = {
        "block": "pc.ram",
        "offsets": [0, P],
        "zero": [False, False],
        "rows": ROWS,
        "named": True,
        **change,
    }
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        encode_pages(**arguments)  # type: ignore[arg-type]
    assert text in str(caught.value)


def test_the_highest_page_builds() -> None:
    built = encode_pages("b", [(1 << 64) - P], [True], ROWS[:0], named=False)
    assert bytes(built) == h("fffffffffffff022 00")


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("content", [None, page(3)], ids=["zero", "page"])
def test_one_page_at_a_tenth_of_the_cost(content: bytes | None, named: bool) -> None:
    expected = encode(batch("pc.ram", (77, content), named=named))
    assert encode_page("pc.ram", 77 * P, content, named) == expected


# ---- batches as they are: payload wherever it lies


def scattered(positions: list[int]) -> Pages:
    data = random.Random(5).randbytes(max(positions, default=0) + P)
    offsets = np.arange(len(positions), dtype=np.uint64) * np.uint64(P)
    return Pages("b", offsets, np.array(positions, np.int64), memoryview(data))


@pytest.mark.parametrize(
    "positions",
    [
        [],
        [-1],
        [7],
        [0, P, 2 * P],
        [10, 10 + P + 8, 10 + 2 * (P + 8)],
        [0, P, 3 * P],
        [2 * P, P, 0],
        [5, 5, 5],
        [0, 100],
        [-1, 3, -1, P + 3, -1],
        [0, -1, -1, 2 * P, 4 * P, 5 * P],
    ],
    ids=str,
)
def test_encode_takes_payload_from_anywhere(positions: list[int]) -> None:
    message = scattered(positions)
    rows = [bytes(message.data[at : at + P]) for at in positions if at >= 0]
    assert [row.tobytes() for row in payload_rows(message)] == rows
    offsets = [i * P for i in range(len(positions))]
    assert encode(message) == scalar("b", offsets, [at < 0 for at in positions], rows, True)


@pytest.mark.parametrize("positions", [[8, 8 + P + 8, 8 + 2 * (P + 8)], [0, P, 2 * P], [3]])
def test_payload_at_one_stride_is_not_copied(positions: list[int]) -> None:
    message = scattered(positions)
    assert np.shares_memory(payload_rows(message), np.frombuffer(message.data, np.uint8))


def test_payload_must_lie_in_data() -> None:
    message = scattered([0, P])
    short = Pages("b", message.offsets, message.positions, message.data[:-1])
    with pytest.raises(ValueError, match="PAGE: a page at 4096 of 8191 bytes"):
        encode(short)


# ---- joining


def test_join_merges_only_what_continues() -> None:
    first, more = batch("b", (0, page(1)), (1, None)), batch("b", (2, page(2)), named=False)
    other = batch("c", (0, None), named=False)
    (joined,) = join_pages([first, more, more])
    assert isinstance(joined, Pages)
    assert joined.positions.tolist() == [0, -1, P, 2 * P]
    assert join_pages([first, more, more]) == [
        batch("b", (0, page(1)), (1, None), (2, page(2)), (2, page(2)))
    ]
    assert join_pages([first, first]) == [first, first]
    assert join_pages([more, more]) == [batch("b", (2, page(2)), (2, page(2)), named=False)]
    assert join_pages([first, other]) == [first, other]
    wide = batch("b", (0, page(1, 8192)), named=False, page_size=8192)
    assert join_pages([first, wide]) == [first, wide]
    assert join_pages([first, m.RamEos(), more, m.RamEos()]) == [
        first, m.RamEos(), more, m.RamEos(),
    ]  # fmt: skip
    assert join_pages([m.RamEos()]) == [m.RamEos()]
    assert join_pages([]) == []


def test_constant_memory_over_a_long_stream() -> None:
    """256 MiB in chunks that cut records anywhere: what was read is let go."""
    cycle = memoryview(records("p" * 64, named=False) * 4)
    decoder = ForwardDecoder(header=False)
    decoder.receive_data(encode(m.SectionPart(1)) + records("p"))
    assert len(list(decoder)) == 2
    seen = 0
    tracemalloc.start()
    for _ in range(256):
        for at in range(0, len(cycle), 99_991):
            decoder.receive_data(cycle[at : at + 99_991])
            seen += sum(len(event) for event in decoder)  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == 256 * 256
    assert peak < 1 << 17
