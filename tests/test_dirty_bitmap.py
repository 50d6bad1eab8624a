"""DirtyBitmap against plain Python, over memory of its own and of others."""

from __future__ import annotations

import itertools
import mmap

import numpy as np
import pytest
from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st

from postcopy_proto.dirty import DirtyBitmap
from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.messages import ReceivedBitmap

MARKED = st.lists(st.booleans(), max_size=300)


def bitmap_of(marked: list[bool]) -> DirtyBitmap:
    return DirtyBitmap.from_bits(bitarray(marked, endian="little"))


def pages_of(bitmap: DirtyBitmap) -> list[bool]:
    return [bitmap[page] for page in range(len(bitmap))]


def test_a_new_bitmap_is_clean() -> None:
    bitmap = DirtyBitmap(13)
    assert len(bitmap) == bitmap.page_count == 13
    assert bitmap.count() == 0
    assert list(bitmap.runs()) == []
    assert repr(bitmap) == "<DirtyBitmap 0 of 13 pages>"


def test_set_and_clear_ranges() -> None:
    bitmap = DirtyBitmap(100)
    bitmap.set(3)
    bitmap.set(60, 40)
    bitmap.clear(70, 10)
    bitmap.clear(99)
    assert list(bitmap.runs()) == [(3, 1), (60, 10), (80, 19)]
    assert bitmap.count() == 30
    assert bitmap.count(65, 10) == 5
    assert bitmap[3]
    assert not bitmap[99]


@given(MARKED, st.data())
def test_runs_are_maximal_and_cut_to_the_range(marked: list[bool], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(marked)))
    count = data.draw(st.integers(0, len(marked) - first))
    runs = list(bitmap_of(marked).runs(first, count))
    pages = [page for start, length in runs for page in range(start, start + length)]
    assert pages == [page for page in range(first, first + count) if marked[page]]
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(runs))


@given(MARKED, st.data())
def test_union_and_complement(marked: list[bool], data: st.DataObject) -> None:
    other = data.draw(st.lists(st.booleans(), min_size=len(marked), max_size=len(marked)))
    a, b = bitmap_of(marked), bitmap_of(other)
    assert pages_of(a | b) == [x or y for x, y in zip(marked, other, strict=True)]
    assert pages_of(~a) == [not x for x in marked]
    assert pages_of(a) == marked, "operands stay as they are"
    a |= b
    assert a == a | b
    assert (a == b) == (pages_of(a) == other)


def test_equality_is_of_pages_and_sizes() -> None:
    assert DirtyBitmap(8) != DirtyBitmap(9)
    assert DirtyBitmap.from_buffer(b"\xf8", 3) == DirtyBitmap(3)
    assert DirtyBitmap(3) != 3
    with pytest.raises(TypeError, match="unhashable"):
        hash(DirtyBitmap(3))


def test_borrowed_memory_is_shared_both_ways() -> None:
    memory = bytearray(16)
    bitmap = DirtyBitmap.from_buffer(memory, 100)
    bitmap.set(8, 4)
    assert memory[1] == 0x0F
    memory[2] = 0x80
    assert list(bitmap.runs()) == [(8, 4), (23, 1)]
    copy = bitmap.copy()
    copy.clear(0, 100)
    assert bitmap.count() == 5


def test_any_buffer_can_be_borrowed() -> None:
    words = np.array([1 << 63, 1], "<u8")
    assert list(DirtyBitmap.from_buffer(words, 128).runs()) == [(63, 2)]
    assert list(DirtyBitmap.from_buffer(words.tobytes(), 64).runs()) == [(63, 1)]
    with mmap.mmap(-1, 4096) as mapped:
        mapped[0] = 6
        bitmap = DirtyBitmap.from_buffer(mapped, 9)
        assert list(bitmap.runs()) == [(1, 2)]
        del bitmap


def test_read_only_memory_can_not_be_marked() -> None:
    with pytest.raises(TypeError):
        DirtyBitmap.from_buffer(b"\0" * 8, 64).set(3)


def test_what_lies_behind_the_last_page_has_no_meaning() -> None:
    bitmap = DirtyBitmap.from_buffer(b"\xff\xff", 11)
    assert bitmap.count() == 11
    assert list(bitmap.runs()) == [(0, 11)]
    assert (~bitmap).count() == 0
    assert bitmap.to_received("a").bitmap == b"\xff\x07" + bytes(6)
    union = DirtyBitmap.from_buffer(bytearray(2), 11)
    union |= DirtyBitmap.from_bits(bitarray("1" * 11, endian="little"))
    assert union.count() == 11


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: DirtyBitmap(-1), "bitmap of -1 pages"),
        (lambda: DirtyBitmap.from_buffer(b"\0", 9), "9 pages in 1 bytes; 2 are needed"),
        (lambda: DirtyBitmap.from_buffer(b"\0", -1), "-1 pages"),
        (lambda: DirtyBitmap.from_bits(bitarray("1", endian="big")), "bit order big"),
        (lambda: DirtyBitmap(9).set(9), "pages 9 to 10 of a bitmap of 9 pages"),
        (lambda: DirtyBitmap(9).clear(-1), "pages -1 to 0"),
        (lambda: DirtyBitmap(9).set(0, -1), "pages 0 to -1"),
        (lambda: DirtyBitmap(9)[9], "pages 9 to 10"),
        (lambda: DirtyBitmap(9).count(10), "pages 10 to 9"),
        (lambda: list(DirtyBitmap(9).runs(0, 10)), "pages 0 to 10"),
        (lambda: DirtyBitmap(9) | DirtyBitmap(8), "union of bitmaps of 9 and 8 pages"),
        (lambda: DirtyBitmap(9).widen(4096, 8192), "9 pages are no whole number"),
        (lambda: DirtyBitmap(8).widen(4096, 2048), "host page of 2048 bytes; 4096"),
        (lambda: DirtyBitmap(8).widen(4096, 12288), "host page size 12288 is no power of two"),
        (lambda: DirtyBitmap(8).widen(0, 4096), "page size 0 is no power of two"),
    ],
)
def test_bad_input_is_named(call, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        call()


# ---- host pages


@given(st.data(), st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 512]))
def test_partly_dirty_host_pages_become_dirty(data: st.DataObject, pages: int) -> None:
    host_pages = data.draw(st.integers(0, 12))
    bitmap = DirtyBitmap(host_pages * pages)
    for page in data.draw(st.sets(st.integers(0, max(0, len(bitmap) - 1)), max_size=6)):
        if len(bitmap):
            bitmap.set(page)
    expected = DirtyBitmap(len(bitmap))
    for start, count in bitmap.runs():
        for host_page in range(start // pages, (start + count - 1) // pages + 1):
            expected.set(host_page * pages, pages)
    bitmap.widen(4096, 4096 * pages)
    assert bitmap == expected


def test_a_gibibyte_page_is_wider_than_a_chunk_of_bits() -> None:
    pages = (1 << 30) // 4096
    bitmap = DirtyBitmap(3 * pages)
    bitmap.set(2 * pages - 1)
    bitmap.widen(4096, 1 << 30)
    assert list(bitmap.runs()) == [(pages, pages)]


# ---- recovery


@pytest.mark.parametrize(("pages", "size"), [(0, 0), (1, 8), (64, 8), (65, 16), (16384, 2048)])
def test_received_bitmaps_are_whole_units(pages: int, size: int) -> None:
    message = DirtyBitmap(pages).to_received("pc.ram")
    assert message == ReceivedBitmap("pc.ram", bytes(size))


@given(MARKED)
def test_received_bitmaps_come_back(marked: list[bool]) -> None:
    bitmap = bitmap_of(marked)
    assert DirtyBitmap.from_received(bitmap.to_received("a"), len(marked)) == bitmap


def test_padding_of_a_received_bitmap_is_ignored() -> None:
    received = DirtyBitmap.from_received(ReceivedBitmap("a", b"\xff" * 8), 3)
    assert received.count() == 3
    assert (~received).count() == 0


def test_a_received_bitmap_of_another_size_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="16 bytes for 'a'; 64 pages need 8") as error:
        DirtyBitmap.from_received(ReceivedBitmap("a", bytes(16)), 64)
    assert error.value.kind is ErrorKind.MISMATCH
    assert error.value.channel is Channel.RETURN
