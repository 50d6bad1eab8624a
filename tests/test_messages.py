"""Batches of pages: their runs against a plain walk, and when two are equal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy_proto.messages import NEED_DATA, Pages, PostcopyListen, RamBlockEntry, RamBlockList
from postcopy_proto.ramblock import RAMBlock, decode_idstr, encode_idstr

PAGE = 8
"""small pages do as well"""


def batch(pages: list[int], positions: list[int], data: bytes = b"", **fields: object) -> Pages:
    return Pages(
        "a",
        np.array(pages, np.uint64) * np.uint64(PAGE),
        np.array(positions, np.int64),
        memoryview(data),
        PAGE,
        **fields,  # type: ignore[arg-type]
    )


@st.composite
def batches(draw: st.DrawFn) -> Pages:
    """Pages that often follow each other, in the block and in the data."""
    pages, positions = [draw(st.integers(0, 3))], [draw(st.sampled_from([-1, 0, 3]))]
    for _ in range(draw(st.integers(0, 12))):
        pages.append(pages[-1] + draw(st.sampled_from([1, 1, 1, 2])))
        step = draw(st.sampled_from([PAGE, PAGE, PAGE + 8, PAGE + 11]))
        positions.append(draw(st.sampled_from([-1, max(positions[-1], 0) + step])))
    return batch(pages, positions)


@given(batches())
def test_runs_cover_all_and_each_is_one_thing(pages: Pages) -> None:
    runs = list(pages.runs())
    assert [i for first, count in runs for i in range(first, first + count)] == list(
        range(len(pages))
    )
    for first, count in runs:
        part = slice(first, first + count)
        assert (np.diff(pages.offsets[part].astype(np.int64)) == PAGE).all()
        positions = pages.positions[part]
        assert (positions < 0).all() or (positions >= 0).all()
        assert len(set(np.diff(positions).tolist())) <= 1


def test_runs_are_as_long_as_they_can_be() -> None:
    assert list(batch([0, 1, 2, 5, 6], [8, 24, 40, 56, 72]).runs()) == [(0, 3), (3, 2)]
    assert list(batch([0, 1, 2, 3], [-1, -1, 0, 8]).runs()) == [(0, 2), (2, 2)]
    assert list(batch([0, 1, 2, 3], [0, 8, 16, 32]).runs()) == [(0, 3), (3, 1)]
    assert list(batch([4], [0]).runs()) == [(0, 1)]
    assert list(batch([], []).runs()) == []


def test_equality_is_of_contents_not_of_places() -> None:
    here = batch([1, 2], [0, -1], b"abcdefgh")
    there = batch([1, 2], [3, -1], b"###abcdefgh")
    assert here == there
    assert here != batch([1, 2], [0, -1], b"abcdefgX")
    assert here != batch([1, 3], [0, -1], b"abcdefgh")
    assert here != batch([1, 2], [-1, 0], b"abcdefgh")
    assert here != batch([1, 2], [0, -1], b"abcdefgh", named=False)
    assert here != "abcdefgh"
    assert here.page(1) is None
    with pytest.raises(TypeError):
        hash(here)


def test_small_things() -> None:
    assert repr(NEED_DATA) == "NEED_DATA"
    assert PostcopyListen() == PostcopyListen()
    assert RamBlockList((RamBlockEntry("a", 4096), RamBlockEntry("b", 8192))).total == 12288


def test_names_and_blocks() -> None:
    for raw in (b"pc.ram", b"\xff\xfe", "größe".encode()):
        assert encode_idstr(decode_idstr(raw)) == raw
    for name in ("", "x" * 256, "a\0b"):
        with pytest.raises(ValueError, match="RAMBlock name"):
            RAMBlock(name, 4096)
    with pytest.raises(ValueError, match="negative"):
        RAMBlock("a", -1)
    with pytest.raises(ValueError, match="power of 2"):
        RAMBlock("a", 4096, 3000)
    block = RAMBlock("m0", 3 << 21, 2 << 20)
    assert block.page_count() == 1536
    assert block.page_count(2 << 20) == 3
    assert block.host_page_of((2 << 20) + 5) == 2 << 20
    assert block.contains(0, 3 << 21)
    assert not block.contains(1, 3 << 21)
    assert not block.contains(-1, 1)
