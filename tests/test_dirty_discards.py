"""The discard encoder: equal to the plain walk for bitmaps of all shapes, and strict."""

from __future__ import annotations

import numpy as np
import pytest
from bitarray import bitarray
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from postcopy_proto.dirty import (
    DirtyBitmap,
    DiscardEncoder,
    encode_discards,
    iter_discards,
    plan_discards,
)
from postcopy_proto.dirty import discards as discards_module
from postcopy_proto.dirty import edges as edges_module
from postcopy_proto.dirty import words as words_module
from postcopy_proto.dirty.edges import BATCH_WORDS, DENSE_WORDS, PART_WORDS, REST_WORDS
from postcopy_proto.dirty.words import CHUNK_WORDS
from postcopy_proto.messages import PostcopyRamDiscard
from postcopy_proto.ramblock import ByteRange, RAMBlock
from postcopy_proto.wire import encode
from postcopy_proto.wire.discard import MAX_RANGES, RANGE
from tests.bench import discards as bench

PAGE = 4096


def scalar(
    name: str, marked: bitarray, pages: int, *, first: int = 0, shift: int = 12, widened: int = 1
) -> bytes:
    """The walk in words, written once more: bit by bit, range by range, command by command."""
    if widened > 1:
        marked = marked.copy()
        for start in range(first, first + pages, widened):
            if marked[start : start + widened].any():
                marked[start : start + widened] = True
    commands, ranges, page, end = [], [], first, first + pages
    while (start := marked.find(1, page, end)) >= 0:
        page = marked.find(0, start, end)
        if page < 0:
            page = end
        ranges.append(ByteRange((start - first) << shift, (page - start) << shift))
        if len(ranges) == 12:
            commands.append(encode(PostcopyRamDiscard(name, tuple(ranges))))
            ranges.clear()
    if ranges:
        commands.append(encode(PostcopyRamDiscard(name, tuple(ranges))))
    return b"".join(commands)


def random_bits(seed: int, pages: int, density: float) -> bitarray:
    bits = bitarray(endian="little")
    bits.pack((np.random.default_rng(seed).random(pages) < density).tobytes())
    return bits


def encoded(bits: bitarray, name: str = "pc.ram") -> bytes:
    return encode_discards(RAMBlock(name, len(bits) * PAGE), DirtyBitmap.from_bits(bits))


# ---- equality


@given(
    pages=st.integers(1, 5000),
    seed=st.integers(0, 2**32),
    density=st.sampled_from([0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999]),
    name=st.text(st.characters(min_codepoint=1, codec="utf-8"), min_size=1, max_size=63),
)
@settings(max_examples=300, deadline=None)
def test_random_bitmaps(pages: int, seed: int, density: float, name: str) -> None:
    bits = random_bits(seed, pages, density)
    assert encoded(bits, name) == scalar(name, bits, pages)


@given(
    runs=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), max_size=40),
    tail=st.integers(0, 130),
)
@settings(max_examples=300, deadline=None)
def test_random_runs(runs: list[tuple[int, int]], tail: int) -> None:
    bits = bitarray(endian="little")
    for gap, run in runs:
        bits.extend("0" * gap + "1" * run)
    bits.extend("0" * tail)
    if bits:
        assert encoded(bits) == scalar("pc.ram", bits, len(bits))


@given(
    st.integers(0, 200), st.integers(0, 3000), st.integers(0, 70), st.floats(0, 1), st.integers(0)
)
@settings(max_examples=200, deadline=None)
def test_a_bitmap_that_covers_several_blocks(
    first: int, pages: int, behind: int, density: float, seed: int
) -> None:
    bits = random_bits(seed, first + pages + behind, density)
    block = RAMBlock("b", pages * PAGE)
    ours = encode_discards(block, DirtyBitmap.from_bits(bits), first_page=first)
    assert ours == scalar("b", bits, pages, first=first)


EDGE_SIZES = (1, 2, 63, 64, 65, 127, 128, 129, 64 * 1000 - 1)


@pytest.mark.parametrize("pages", EDGE_SIZES)
@pytest.mark.parametrize(
    "shape", ["clean", "dirty", "first", "last", "all but last", "even", "odd"]
)
def test_edges_of_words(pages: int, shape: str) -> None:
    bits = bitarray(pages, endian="little")
    bits.setall(shape in ("dirty", "all but last"))
    if shape == "first":
        bits[0] = True
    elif shape in ("last", "all but last"):
        bits[-1] ^= 1
    elif shape in ("even", "odd"):
        bits[shape == "odd" :: 2] = True
    assert encoded(bits) == scalar("pc.ram", bits, pages)


@pytest.mark.parametrize(
    "page", [0, 1, 62, 63, 64, 127, 128, 64 * CHUNK_WORDS - 1, 64 * CHUNK_WORDS]
)
@pytest.mark.parametrize("value", [0, 1])
def test_one_page_unlike_all_others(page: int, value: int) -> None:
    bits = bitarray(64 * CHUNK_WORDS + 100, endian="little")
    bits.setall(not value)
    bits[page] = value
    assert encoded(bits) == scalar("pc.ram", bits, len(bits))


def mixed(seed: int, words: int) -> bitarray:
    """Stretches of every kind of words, so that every way is taken and left again."""
    random = np.random.default_rng(seed)
    pieces: list[NDArray[np.uint8]] = []
    left = words
    while left > 0:
        count = min(left, int(random.integers(1, 2 * CHUNK_WORDS)))
        density = random.choice([0, 1, 0.0005, 0.02, 0.5, 0.9995])
        if random.random() < 0.3:  # few words, each of them torn
            piece = np.zeros(count, np.uint64)
            chosen = random.random(count) < random.choice([0.01, 0.1, 0.3, 0.7])
            piece[chosen] = 0x5555_5555_5555_5555
            if random.random() < 0.5:
                piece = ~piece
            pieces.append(piece.view(np.uint8))
        else:
            pieces.append(np.packbits(random.random(64 * count) < density))
        left -= count
    bits = bitarray(endian="little")
    bits.frombytes(b"".join(piece.tobytes() for piece in pieces))
    return bits


@pytest.mark.parametrize("seed", range(6))
def test_large_bitmaps_against_the_c_reference(seed: int) -> None:
    bits = mixed(seed, CHUNK_WORDS + CHUNK_WORDS // 2 + seed)
    expected = np.zeros(256 << 20, np.uint8)
    bitmap = np.frombuffer(memoryview(bits), np.uint8)
    pages = len(bits)
    size = bench.reference(bitmap, pages, swapped=seed % 2 == 0, output=expected)
    assert size <= len(expected)
    block = RAMBlock(bench.IDSTR, pages * PAGE)
    at = 0
    for piece in iter_discards(block, DirtyBitmap.from_bits(bits)):
        assert piece == memoryview(expected.data)[at : at + len(piece)]
        at += len(piece)
    assert at == size


ONES = (1 << 64) - 1
WORDS = st.one_of(
    st.sampled_from(
        [0, ONES, 1, 1 << 63, ONES >> 1, ONES ^ 1, 3 << 62, 1 << 63 | 1, 0x5555 << 48, ONES // 3]
    ),
    st.integers(0, 63).map(lambda bit: 1 << bit),
    st.integers(0, ONES),
)


@given(
    stretches=st.lists(
        st.tuples(st.sampled_from([0, ONES]), st.integers(0, 20), st.lists(WORDS, max_size=6)),
        max_size=12,
    ),
    host_pages=st.sampled_from([1, 1, 2, 64, 256]),
    chunk=st.sampled_from([4, 8, 16]),
    batch=st.sampled_from([1, 2, 4, 64]),
)
@settings(max_examples=1000, deadline=None)
def test_every_border_with_all_sizes_small(
    stretches: list[tuple[int, int, list[int]]], host_pages: int, chunk: int, batch: int
) -> None:
    """Chunks, batches, parts and packs of a few words: torn words meet all of their borders."""
    words = [word for uniform, count, torn in stretches for word in [*[uniform] * count, *torn]]
    words += [0] * (-len(words) % 4)
    if not words:
        return
    bits = bitarray(endian="little")
    bits.frombytes(np.array(words, np.uint64).tobytes())
    block = RAMBlock("pc.ram", len(bits) * PAGE, PAGE * host_pages)
    sizes = {
        "CHUNK_WORDS": chunk,
        "BATCH_WORDS": batch,
        "PART_WORDS": chunk // 2,
        "DENSE_WORDS": 1,
        "REST_WORDS": 1,
        "PACK_EDGES": 30,
        "MAX_EDGES": 65,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, size in sizes.items():
            patch.setattr(edges_module, name, size)
        patch.setattr(words_module, "CHUNK_WORDS", chunk)
        patch.setattr(discards_module, "_spare", [])
        ours = encode_discards(block, DirtyBitmap.from_bits(bits))
    assert ours == scalar("pc.ram", bits, len(bits), widened=host_pages)


def test_more_edges_in_a_batch_than_are_found_at_once() -> None:
    """Every eighth word torn, its last bit set and the next word clean."""
    words = np.zeros(8 * 3 * DENSE_WORDS, np.uint64)
    words[::8] = 0xAAAA_AAAA_AAAA_AAAA
    bits = bitarray(endian="little")
    bits.frombytes(words.tobytes())
    assert encoded(bits) == scalar("pc.ram", bits, len(bits))


@pytest.mark.parametrize("words", [CHUNK_WORDS + 1, 2 * CHUNK_WORDS + 6])
@pytest.mark.parametrize("density", [0.0005, 0.004, 0.012, 0.018, 0.04, 0.06])
@pytest.mark.parametrize("value", [False, True])
def test_densities_between_the_ways(words: int, density: float, value: bool) -> None:
    """Few words in batches, words of one, two and more edges, unpacked ones with padding."""
    bits = random_bits(7, 64 * words, density)
    if value:
        bits.invert()
    expected = np.zeros(64 << 20, np.uint8)
    bitmap = np.frombuffer(memoryview(bits), np.uint8)
    size = bench.reference(bitmap, len(bits), swapped=True, output=expected)
    assert size <= len(expected)
    assert encoded(bits, bench.IDSTR) == expected[:size].tobytes()


def test_the_reference_agrees_with_the_plain_walk() -> None:
    bits = random_bits(5, 1 << 16, 0.3)
    output = np.zeros(1 << 20, np.uint8)
    for swapped in (False, True):
        size = bench.reference(
            np.frombuffer(memoryview(bits), np.uint8), 1 << 16, swapped=swapped, output=output
        )
        assert output[:size].tobytes() == scalar(bench.IDSTR, bits, 1 << 16)


@pytest.mark.parametrize("name", ["a", "é" * 127, "x" * 255])
def test_names_of_every_length(name: str) -> None:
    bits = random_bits(3, 4000, 0.2)
    assert encoded(bits, name) == scalar(name, bits, 4000)


@pytest.mark.parametrize("pages", [1, 16, 512, 1 << 18])
@pytest.mark.parametrize("density", [1e-6, 0.0004, 0.3])
def test_host_pages(pages: int, density: float) -> None:
    count = max(pages * 5, 1 << 15)
    bits = random_bits(pages, count, density)
    bits[count // 2] = True
    before = bits.copy()
    bitmap = DirtyBitmap.from_bits(bits)
    block = RAMBlock("m0", count * PAGE, PAGE * pages)
    expected = scalar("m0", bits, count, widened=pages)
    assert encode_discards(block, bitmap) == expected
    small = RAMBlock("m0", count * PAGE)
    assert encode_discards(small, bitmap, host_page_size=PAGE * pages) == expected
    assert bits == before, "the caller's bitmap stays as it is"
    widened = bitmap.copy()
    widened.widen(PAGE, PAGE * pages)
    assert encode_discards(small, widened) == expected


def test_host_pages_of_a_block_that_begins_inside_a_word() -> None:
    bits = random_bits(9, 4096 + 200, 0.002)
    block = RAMBlock("b", 4096 * PAGE, 16 * PAGE)
    ours = encode_discards(block, DirtyBitmap.from_bits(bits), first_page=77)
    assert ours == scalar("b", bits, 4096, first=77, widened=16)


def test_borrowed_memory_at_an_odd_address() -> None:
    bits = random_bits(2, 1 << 17, 0.01)
    memory = b"\xff" + bits.tobytes() + b"\xff"
    bitmap = DirtyBitmap.from_buffer(memoryview(memory)[1:], 1 << 17)
    block = RAMBlock("pc.ram", (1 << 17) * PAGE)
    assert encode_discards(block, bitmap) == scalar("pc.ram", bits, 1 << 17)


def test_part_of_a_block() -> None:
    bits = random_bits(4, 1000, 0.5)
    block = RAMBlock("a", 1000 * PAGE)
    ours = encode_discards(block, DirtyBitmap.from_bits(bits), page_count=300)
    assert ours == scalar("a", bits, 300)


def test_other_page_sizes() -> None:
    bits = random_bits(4, 1000, 0.5)
    block = RAMBlock("a", 1000 << 16, 1 << 16)
    ours = encode_discards(block, DirtyBitmap.from_bits(bits), page_size=1 << 16)
    assert ours == scalar("a", bits, 1000, shift=16)


def test_pieces_are_whole_commands_in_memory_that_is_used_again() -> None:
    pages = 1 << 19
    bits = bitarray(endian="little")
    bits.frombytes(b"\x55" * (pages // 8))
    block = RAMBlock("pc.ram", pages * PAGE)
    pieces = iter_discards(block, DirtyBitmap.from_bits(bits))
    first = next(pieces)
    command = 5 + 3 + 6 + MAX_RANGES * RANGE.size
    assert len(first) % command == 0
    assert (1 << 20) - command < len(first) <= 1 << 20
    before = bytes(first)
    second = next(pieces)
    assert bytes(first[: len(second)]) == second != before[: len(second)]


def test_two_walks_at_a_time_do_not_mix() -> None:
    bits = random_bits(4, 1 << 18, 0.5)
    block = RAMBlock("a", len(bits) * PAGE)
    walks = [iter_discards(block, DirtyBitmap.from_bits(bits)) for _ in range(2)]
    pieces = [b"".join(parts) for parts in zip(*[map(bytes, walk) for walk in walks], strict=True)]
    assert sum(map(len, pieces)) == 2 * len(encoded(bits, "a"))
    halves = [piece[: len(piece) // 2] for piece in pieces]
    assert halves == [piece[len(piece) // 2 :] for piece in pieces]
    assert b"".join(halves) == encoded(bits, "a")


def test_a_walk_that_is_given_up_returns_its_memory() -> None:
    bits = random_bits(4, 1 << 18, 0.5)
    block = RAMBlock("a", len(bits) * PAGE)
    walk = iter_discards(block, DirtyBitmap.from_bits(bits))
    next(walk)
    walk.close()
    assert encoded(bits, "a") == encoded(bits, "a")


@pytest.mark.parametrize("density", [0, 0.001, 0.03, 0.5, 1])
def test_memory_does_not_grow_with_the_guest(density: float) -> None:
    pages = 1 << 23
    bitmap = bench.uniform(density, pages)
    assert bench.peak_of(lambda: bench.ours(bitmap, pages)) < 16 << 20


def test_the_ways_are_all_there_to_be_taken() -> None:
    """The bounds that the tests above are built around."""
    assert REST_WORDS < DENSE_WORDS < BATCH_WORDS < PART_WORDS < CHUNK_WORDS
    assert edges_module.MAX_EDGES >= DENSE_WORDS * 64


# ---- one run at a time


def test_commands_of_twelve() -> None:
    encoder = DiscardEncoder(RAMBlock("pc.ram", 100 * PAGE))
    outputs = [encoder.add(3 * index, 2) for index in range(13)]
    assert [bool(output) for output in outputs] == [False] * 11 + [True, False]
    assert outputs[11][:5] == bytes.fromhex("080006") + (3 + 6 + 12 * 16).to_bytes(2, "big")
    last = encoder.finish()
    assert last == bytes.fromhex(
        "0800060019000670632e72616d00" + f"{36 * PAGE:016x}" + f"{2 * PAGE:016x}"
    )
    assert encoder.finish() == b""
    assert (encoder.range_count, encoder.command_count) == (13, 2)


@given(st.integers(0, 2**32), st.integers(1, 700), st.integers(0, 100))
@settings(deadline=None)
def test_run_by_run_and_vectorised_are_equal(seed: int, pages: int, first: int) -> None:
    bitmap = DirtyBitmap.from_bits(random_bits(seed, first + pages, 0.4))
    block = RAMBlock("a", pages * PAGE)
    encoder = DiscardEncoder(block, PAGE, first)
    parts = [encoder.add(*run) for run in bitmap.runs(first, pages)]
    assert b"".join([*parts, encoder.finish()]) == encode_discards(block, bitmap, first_page=first)


def test_lengths_near_2_64_are_exact() -> None:
    block = RAMBlock("huge", (1 << 64) - PAGE)
    encoder = DiscardEncoder(block)
    pages = block.used_length // PAGE
    encoder.add(0, pages - 2)
    encoder.add(pages - 1, 1)
    assert (
        encoder.finish()
        .hex()
        .endswith("0000000000000000ffffffffffffd000ffffffffffffe0000000000000001000")
    )
    bits = bitarray("0111110", endian="little")
    wide = RAMBlock("huge", 7 << 61, 1 << 61)
    assert (
        encode_discards(wide, DirtyBitmap.from_bits(bits), page_size=1 << 61)
        .hex()
        .endswith("2000000000000000a000000000000000")
    )


# ---- bad input

BLOCK = RAMBlock("a", 10 * PAGE)
BITMAP = DirtyBitmap(10)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: DiscardEncoder(BLOCK).add(0, 0), "run of 0 pages"),
        (lambda: DiscardEncoder(BLOCK).add(8, 3), "3 pages at page 8 of 'a'; pages 0 to 10"),
        (lambda: DiscardEncoder(BLOCK, PAGE, 5).add(4, 1), "pages 5 to 15 are left"),
        (lambda: DiscardEncoder(BLOCK, 3000), "page size 3000 is no power of two"),
        (lambda: DiscardEncoder(RAMBlock("a", 5000)), "'a' has 5000 bytes; whole pages of 4096"),
        (lambda: DiscardEncoder(RAMBlock("a", 1 << 64)), "below 2\\^64"),
        (lambda: DiscardEncoder(BLOCK, PAGE, -1), "first page -1"),
        (lambda: iter_discards(BLOCK, BITMAP, page_size=0), "page size 0"),
        (lambda: iter_discards(BLOCK, BITMAP, host_page_size=2048), "host page of 2048 bytes"),
        (lambda: iter_discards(BLOCK, BITMAP, host_page_size=0), "host page size 0"),
        (lambda: iter_discards(BLOCK, BITMAP, host_page_size=4 * PAGE), "10 pages are no whole"),
        (
            lambda: iter_discards(BLOCK, DirtyBitmap(9)),
            "10 pages of 'a' from page 0 of a bitmap of 9",
        ),
        (lambda: iter_discards(BLOCK, BITMAP, first_page=1), "from page 1 of a bitmap of 10"),
        (lambda: iter_discards(BLOCK, BITMAP, first_page=-1, page_count=5), "from page -1"),
        (
            lambda: iter_discards(BLOCK, DirtyBitmap(20), page_count=11),
            "11 pages of 'a'; it has 10",
        ),
        (lambda: iter_discards(BLOCK, BITMAP, page_count=-1), "-1 pages of 'a'; it has 10"),
        (lambda: plan_discards([], {}), "no page in any block"),
        (lambda: plan_discards([RAMBlock("a", 0)], {"a": DirtyBitmap(0)}), "no page in any block"),
        (lambda: plan_discards([BLOCK], {}), "one for each is needed"),
        (lambda: plan_discards([BLOCK], {"a": BITMAP, "b": BITMAP}), "one for each is needed"),
        (lambda: plan_discards([BLOCK, BLOCK], {"a": BITMAP}), "one for each is needed"),
        (lambda: plan_discards([BLOCK], {"a": DirtyBitmap(11)}), "bitmap of 11 pages for 'a'"),
    ],
)
def test_bad_input_is_named_before_a_byte(call, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        call()


def test_runs_must_come_in_order() -> None:
    encoder = DiscardEncoder(BLOCK)
    encoder.add(3, 2)
    with pytest.raises(ValueError, match="pages 5 to 10 are left"):
        encoder.add(4, 1)
    encoder.add(5, 1)
    assert encoder.range_count == 2


# ---- a whole VM


def test_plan_keeps_the_order_and_skips_what_is_clean() -> None:
    blocks = [RAMBlock("b", 64 * PAGE), RAMBlock("clean", 5 * PAGE), RAMBlock("a", 40 * PAGE)]
    dirty = {"a": DirtyBitmap(40), "clean": DirtyBitmap(5), "b": DirtyBitmap(64)}
    dirty["a"].bits[::2] = True
    dirty["b"].set(1, 3)
    plan = plan_discards(blocks, dirty)
    output = b"".join(map(bytes, plan))
    assert output == encode_discards(blocks[0], dirty["b"]) + encode_discards(blocks[2], dirty["a"])
    assert (plan.range_count, plan.command_count) == (21, 3)
    assert plan.dirty == dirty
    plan.dirty["a"].clear(0, 40)
    assert dirty["a"].count() == 20, "the plan's bitmaps are its own"


def test_plan_widens_and_says_so() -> None:
    block = RAMBlock("m0", 4 << 21, 1 << 21)
    dirty = DirtyBitmap(4 * 512)
    dirty.set(700)
    plan = plan_discards([block], {"m0": dirty})
    output = b"".join(map(bytes, plan))
    assert output == encode(PostcopyRamDiscard("m0", (ByteRange(1 << 21, 1 << 21),)))
    assert list(plan.dirty["m0"].runs()) == [(512, 512)]
    assert dirty.count() == 1


def test_a_clean_vm_still_discards_one_page_and_sends_it() -> None:
    blocks = [RAMBlock("none", 0), RAMBlock("m0", 1 << 21, 1 << 21), RAMBlock("a", 4 * PAGE)]
    dirty = {block.idstr: DirtyBitmap(block.page_count()) for block in blocks}
    plan = plan_discards(blocks, dirty)
    output = b"".join(map(bytes, plan))
    assert output == encode(PostcopyRamDiscard("a", (ByteRange(0, PAGE),)))
    assert {name: bitmap.count() for name, bitmap in plan.dirty.items()} == {
        "none": 0,
        "m0": 0,
        "a": 1,
    }
    assert (plan.range_count, plan.command_count) == (1, 1)


# ---- traces


def test_traces_carry_the_names_of_qemu(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "postcopy_proto.trace")
    bitmap = DirtyBitmap(10)
    bitmap.set(2, 3)
    encoder = DiscardEncoder(BLOCK)
    output = encoder.add(2, 3) + encoder.finish()
    assert output == encode_discards(BLOCK, bitmap)
    assert caplog.messages == [
        "postcopy_discard_send_range block=a start=0x2000 length=0x3000",
        "postcopy_discard_send_finish block=a ranges=1 commands=1",
        "postcopy_discard_send_finish block=a ranges=1 commands=1",
    ]
