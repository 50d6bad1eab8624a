"""The block list, above all its page_size field that nothing announces."""

from __future__ import annotations

from itertools import product

import pytest

from postcopy_proto import messages as m
from postcopy_proto.errors import ErrorKind
from postcopy_proto.messages import EndOfStream
from postcopy_proto.wire import ForwardDecoder, Limits, encode
from tests.wire.helpers import HEADER, P, batch, cut, decode, end_section, forward, h, join, refuse

MIB2, GIB = 1 << 21, 1 << 30
SUMMARY = P | MIB2 | GIB
START = encode(m.SectionStart(2, "ram", 0, 4))


def advise(summary: int = SUMMARY) -> bytes:
    return encode(m.PostcopyAdvise(summary, P))


def entry(name: bytes, length: int, *more: int) -> bytes:
    return bytes([len(name)]) + name + b"".join(v.to_bytes(8, "big") for v in (length, *more))


def total(value: int) -> bytes:
    return (value | 4).to_bytes(8, "big")


@pytest.mark.parametrize("sizes", list(product((None, MIB2, GIB), repeat=3)))
def test_any_blocks_may_carry_their_page_size(sizes: tuple[int | None, ...]) -> None:
    blocks = m.RamBlockList(
        tuple(m.RamBlockEntry(f"b{i}", (i + 1) * GIB, size) for i, size in enumerate(sizes))
    )
    data = join(m.SectionStart(2, "ram", 0, 4), blocks) + end_section()
    got = decode(forward(), HEADER + advise() + data + b"\0")
    assert got[4:6] == [blocks, m.RamEos()]


@pytest.mark.parametrize(
    "following",
    [
        m.MultifdFlush(),
        batch("b", (0, None)),
        batch("b", (1, None)),
        batch("b", (512, None)),
        batch("b", (1 << 18, None)),
    ],
    ids=str,
)
def test_what_follows_the_last_block_is_no_page_size(following: m.Message) -> None:
    blocks = m.RamBlockList((m.RamBlockEntry("b", 2 * GIB),))
    data = join(m.SectionStart(2, "ram", 0, 4), blocks, following) + end_section()
    got = decode(forward(), HEADER + advise() + data + b"\0")
    assert got[4:7] == [blocks, following, m.RamEos()]


def test_without_advise_nothing_is_guessed() -> None:
    """The word behind the last block is a page size of no summary, so it is a bad record."""
    data = START + total(P) + entry(b"b", P, MIB2)
    at = len(HEADER) + len(START) + 8 + 10
    for before in (b"", encode(m.PostcopyAdvise())):
        refuse(
            forward(), HEADER + before + data, ErrorKind.UNKNOWN, at + len(before),
            "unknown combination of flags 0x0 in word 0x200000", "RAM",
        )  # fmt: skip


def test_a_page_size_that_the_summary_has_not_is_no_page_size() -> None:
    data = START + total(P) + entry(b"b", P, MIB2) + end_section()
    at = len(HEADER) + len(advise()) + len(START) + 8 + 10
    refuse(
        forward(), HEADER + advise(P | GIB) + data, ErrorKind.UNKNOWN, at,
        "unknown combination of flags 0x0", "RAM",
    )  # fmt: skip


def test_no_base_page_size_is_ever_written() -> None:
    data = START + total(P) + entry(b"b", P, P) + end_section()
    at = len(HEADER) + len(advise()) + len(START) + 8 + 10
    refuse(
        forward(), HEADER + advise() + data, ErrorKind.UNKNOWN, at,
        "unknown combination of flags 0x0 in word 0x1000", "RAM",
    )  # fmt: skip


REFUSED = [
    (h("0000000000001008"), ErrorKind.MALFORMED, 0, "word 0x1008; a START section opens with"),
    (h("0000000000000010"), ErrorKind.MALFORMED, 0, "word 0x10; a START section opens with"),
    (h("0000000000001024"), ErrorKind.MALFORMED, 0, "its flag 0x4"),
    (total(2 * P) + entry(b"b", P) + entry(b"b", P), ErrorKind.MALFORMED, 18, "'b' is listed tw"),
    (total(P) + entry(b"b", 0), ErrorKind.RANGE, 8, "RAMBlock 'b' of 0 bytes"),
    (
        total(P) + entry(b"b", 2 * P),
        ErrorKind.MISMATCH,
        8,
        "RAMBlock 'b' of 0x2000 bytes; only 0x1000 are left of the total 0x1000",
    ),
    (
        total(3 * P) + entry(b"a", P) + entry(b"b", 4 * P),
        ErrorKind.MISMATCH,
        18,
        "RAMBlock 'b' of 0x4000 bytes; only 0x2000 are left of the total 0x3000",
    ),
    (
        total(P) + entry(b"b", 1 << 51),
        ErrorKind.LIMIT,
        8,
        "RAMBlock 'b' of 0x8000000000000 bytes; the limit is 0x4000000000000",
    ),
    (
        total(2 * P) + entry(b"b", P, 3 * P),
        ErrorKind.MALFORMED,
        8,
        "'b' with page size 0x3000; a power of two above 0x1000, or none",
    ),
    (total(2 * P) + entry(b"b", P, P), ErrorKind.MALFORMED, 8, "with page size 0x1000"),
    (total(2 * P) + entry(b"b", P, 0), ErrorKind.MALFORMED, 8, "with page size 0x0"),
    (total(2 * P) + entry(b"b", P, 2048), ErrorKind.MALFORMED, 8, "with page size 0x800"),
    (
        total(2 * P) + entry(b"b", P, 1 << 22),
        ErrorKind.MISMATCH,
        8,
        "'b' on pages of 0x400000 bytes, which POSTCOPY_ADVISE's summary 0x40201000 has not",
    ),
]


@pytest.mark.parametrize(("data", "kind", "at", "text"), REFUSED, ids=str)
def test_refused(data: bytes, kind: ErrorKind, at: int, text: str) -> None:
    before = HEADER + advise() + START
    got = refuse(forward(), before + data, kind, len(before) + at, text, "MEM_SIZE")
    assert got[-1] == m.SectionStart(2, "ram", 0, 4)


@pytest.mark.parametrize(
    ("name", "text"), [(b"", "a name of 0 bytes"), (b"a\0", "a NUL in the name b'a\\x00'")]
)
def test_names_are_names(name: bytes, text: str) -> None:
    before = HEADER + START + total(P)
    refuse(forward(), before + entry(name, P), ErrorKind.MALFORMED, len(before), text)


def test_an_empty_name_is_no_name_even_where_a_page_size_could_stand() -> None:
    """With a summary a zero byte means a page size, so the field is read and found wrong."""
    before = HEADER + advise() + START
    data = total(2 * P) + entry(b"b", P) + bytes(9)
    refuse(
        forward(), before + data, ErrorKind.MALFORMED, len(before) + 8, "page size 0x0", "MEM_SIZE"
    )


def test_the_base_page_must_be_in_the_summary() -> None:
    before = HEADER + advise(MIB2) + START
    data = total(P) + entry(b"b", P) + end_section()
    refuse(
        forward(), before + data, ErrorKind.MISMATCH, len(before) + 8,
        "'b' on pages of 0x1000 bytes, which POSTCOPY_ADVISE's summary 0x200000 has not",
        "MEM_SIZE",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("said", "known"), [(None, MIB2), (MIB2, P), (MIB2, GIB)], ids=["absent", "base", "other"]
)
def test_the_callers_page_sizes_must_agree(said: int | None, known: int) -> None:
    blocks = m.RamBlockList((m.RamBlockEntry("b", GIB, said),))
    before = HEADER + advise() + START
    refuse(
        forward(page_sizes={"b": known}), before + encode(blocks) + end_section(),
        ErrorKind.MISMATCH, len(before) + 8,
        f"'b' on pages of {said or P:#x} bytes; it has {known:#x} here", "MEM_SIZE",
    )  # fmt: skip


@pytest.mark.parametrize("said", [None, MIB2])
def test_page_sizes_that_agree(said: int | None) -> None:
    blocks = m.RamBlockList((m.RamBlockEntry("b", GIB, said),))
    data = HEADER + advise() + START + encode(blocks) + end_section() + b"\0"
    make = forward(page_sizes={"b": said or P, "not here": MIB2})
    assert decode(make, data)[4] == blocks


def test_limits_themselves_fit() -> None:
    blocks = m.RamBlockList(tuple(m.RamBlockEntry(f"b{i}", 2 * P) for i in range(3)))
    data = HEADER + START + encode(blocks) + end_section() + b"\0"
    assert decode(forward(limits=Limits(blocks=3, block_length=2 * P)), data)[3] == blocks
    at = len(HEADER) + len(START) + 8
    refuse(
        forward(limits=Limits(blocks=2)), data, ErrorKind.LIMIT, at + 2 * 11,
        "more than 2 RAMBlocks", "MEM_SIZE",
    )  # fmt: skip
    refuse(
        forward(limits=Limits(block_length=2 * P - 1)), data, ErrorKind.LIMIT, at,
        "of 0x2000 bytes; the limit is 0x1fff", "MEM_SIZE",
    )  # fmt: skip


def test_lengths_need_no_whole_pages_but_their_sum_does() -> None:
    blocks = m.RamBlockList((m.RamBlockEntry("a", P + 1), m.RamBlockEntry("b", P - 1)))
    data = HEADER + START + encode(blocks)
    data += join(batch("a", (1, None)), batch("b", (0, None))) + end_section() + b"\0"
    assert decode(forward(), data)[3:6] == [blocks, batch("a", (1, None)), batch("b", (0, None))]
    beyond = HEADER + START + encode(blocks) + encode(batch("b", (1, None)))
    at = len(beyond) - 11
    refuse(forward(), beyond, ErrorKind.RANGE, at, "which ends at 0x1000", "RAM")


def test_an_empty_list() -> None:
    data = HEADER + START + total(0) + end_section() + b"\0"
    decoder = ForwardDecoder()
    decoder.receive_data(data)
    assert list(decoder)[3] == m.RamBlockList(())
    assert decoder.blocks == {}


def test_many_blocks_byte_by_byte() -> None:
    """Entries are taken one by one: no entry is read again when the next one is waited for."""
    blocks = m.RamBlockList(tuple(m.RamBlockEntry(f"b{i}", P) for i in range(4096)))
    decoder = ForwardDecoder()
    decoder.receive_data(HEADER + START)
    list(decoder)
    data = encode(blocks)
    for at in range(len(data)):
        decoder.receive_data(data[at : at + 1])
        if event := list(decoder):
            assert event == [blocks]
            assert at == len(data) - 1
            assert decoder.event_offset == len(HEADER) + len(START)


def test_cut_inside_a_list() -> None:
    before = HEADER + advise() + START
    data = before + total(P) + entry(b"b", P)
    assert cut(forward(), data)[-1] == EndOfStream(
        len(data),
        clean=False,
        detail="inside the block list: at least 8 bytes more of a record at "
        f"{len(before) + 8:#x} expected",
    )
