"""Pages read straight into place: the same events as the ordinary way, whatever comes."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postcopy_proto import messages as m
from postcopy_proto.errors import RemoteProtocolError
from postcopy_proto.wire import ForwardDecoder, encode, scatter
from postcopy_proto.wire.pages import encode_pages, join_pages
from postcopy_proto.wire.scatter import ScatterDecoder
from tests.wire.helpers import HEADER, RAM_ID, P, end_section, start
from tests.wire.test_properties import mutate, mutations

BLOCK_PAGES = 600
CONTENT = np.random.default_rng(1).integers(1, 256, (BLOCK_PAGES, P), np.uint8)
OPENING = HEADER + start(
    m.RamBlockEntry("pc.ram", BLOCK_PAGES * P), m.RamBlockEntry("b", BLOCK_PAGES * P)
)
OPENING += end_section()


def records(block: str, numbers: list[int], named: bool, zero: bool = False) -> bytes:
    rows = CONTENT[:0] if zero else CONTENT[numbers]
    offsets = np.array(numbers, np.uint64) * np.uint64(P)
    return bytes(encode_pages(block, offsets, np.full(len(numbers), zero), rows, named=named))


def section(*parts: bytes, kind: type[m.SectionPart | m.SectionEnd] = m.SectionPart) -> bytes:
    return encode(kind(RAM_ID)) + b"".join(parts) + end_section()


def pushed(sections: list[int], *, first: int = 0) -> bytes:
    """Sections of so many pages in block order, as a source pushes them."""
    data = b""
    for number, count in enumerate(sections):
        numbers = list(range(first, first + count))
        data += section(records("pc.ram", numbers, named=number == 0))
        first += count
    return data


Chooser = Callable[[int], int]


def take(decoder: ForwardDecoder, data: bytes, amount: Chooser) -> tuple[list[m.Message], int]:
    """All events, and how many bytes went into expected buffers.

    A batch is copied before the decoder is fed again, when its memory is written anew.
    """
    seen: list[m.Message] = []
    at = scattered = 0
    while at <= len(data):
        buffers = decoder.expected_buffers(1 << 16) if isinstance(decoder, ScatterDecoder) else []
        # Twice in a row without events between, now and then.
        left = min(len(data) - at, amount(1 << 16))
        if buffers and at < len(data):
            assert isinstance(decoder, ScatterDecoder)
            done = 0
            for buffer in buffers:
                part = data[at + done : at + min(done + len(buffer), left)]
                buffer[: len(part)] = part
                done += len(part)
            decoder.receive_expected(done)
            at, scattered = at + done, scattered + done
            if amount(3) == 0:
                continue
        else:
            decoder.receive_data(bytes(data[at : at + left]))
            at += left
            if left == 0:
                at += 1  # the end of the stream was said
        while not isinstance(event := decoder.next_event(), m.NeedData):
            seen += join_pages([event])
            if isinstance(event, m.EndOfStream):
                break
    return join_pages(seen), scattered


def outcome(decoder: ForwardDecoder, data: bytes, amount: Chooser) -> object:
    try:
        return take(decoder, data, amount)[0]
    except RemoteProtocolError as error:
        return error.kind, error.offset, str(error)


def at_once(most: int) -> int:
    return most


def chooser(seed: int) -> Chooser:
    rng = random.Random(seed)

    def choose(most: int) -> int:
        if most < 100:
            return rng.randrange(most)
        return rng.choice((1, 7, 8, 9, 18, 26, P, P + 8, 9 * P, most, rng.randrange(1, most)))

    return choose


def check(data: bytes, seed: int) -> int:
    """Both decoders agree; returns the bytes that came as foretold."""
    expected, _ = take(ForwardDecoder(), data, at_once)
    got, scattered = take(ScatterDecoder(), data, chooser(seed))
    assert got == expected
    assert isinstance(got[-1], m.EndOfStream)
    return scattered


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Foretell after few pages, in little memory, so that all of it happens often."""
    monkeypatch.setattr(scatter, "STREAK", 4)
    monkeypatch.setattr(scatter, "STAGING", 16 * P)


@pytest.mark.parametrize("sections", [[500], [64] * 8, [16] * 30, [33] * 15, [200, 16, 16, 200]])
@pytest.mark.parametrize("seed", range(6))
def test_a_push_comes_as_foretold(sections: list[int], seed: int) -> None:
    data = OPENING + pushed(sections) + encode(m.Eof())
    scattered = check(data, seed)
    if len(set(sections)) == 1 and seed:
        assert scattered > len(data) // 2


def test_pages_lie_side_by_side() -> None:
    decoder = ScatterDecoder()
    data = pushed([64, 64, 64])
    first = len(OPENING) + len(pushed([64])) + 2000
    decoder.receive_data((OPENING + data)[:first])
    assert [type(event) for event in decoder][-3:] == [m.RamEos, m.SectionFooter, m.SectionPart]
    rest, at = (OPENING + data)[first:], 0
    for buffer in decoder.expected_buffers(1 << 20):
        part = rest[at : at + len(buffer)]
        buffer[: len(part)] = part
        at += len(part)
    decoder.receive_expected(at)
    batches = [event for event in decoder if isinstance(event, m.Pages)]
    assert [len(batch) for batch in batches] == [64, 64]
    for batch in batches:
        number = int(batch.offsets[0]) // P
        assert np.array_equal(np.diff(batch.positions), [P] * 63)
        at = int(batch.positions[0])
        assert batch.data[at : at + 64 * P] == CONTENT[number : number + 64].tobytes()


def test_nothing_is_foretold_where_nothing_is_known() -> None:
    decoder = ScatterDecoder()
    assert decoder.expected_buffers(1 << 20) == []
    decoder.receive_data(OPENING)
    list(decoder)
    assert decoder.expected_buffers(1 << 20) == [], "outside a section"
    decoder.receive_data(section(records("pc.ram", list(range(scatter.STREAK - 1)), True))[:-13])
    list(decoder)
    assert decoder.expected_buffers(1 << 20) == [], "not enough pages in a row"
    decoder.receive_data(records("pc.ram", [scatter.STREAK - 1], False))
    assert decoder.expected_buffers(1 << 20) == [], "events are still to be taken"
    list(decoder)
    assert len(decoder.expected_buffers(1 << 20)) == 2 * scatter.STAGING // P
    assert sum(map(len, decoder.expected_buffers(8 * (P + 8)))) == 8 * (P + 8)
    assert sum(map(len, decoder.expected_buffers(8 * (P + 8) + 1))) == 9 * (P + 8)
    decoder.receive_data(records("b", list(range(40)), True))
    list(decoder)
    assert decoder.expected_buffers(P)
    decoder.receive_data(b"")
    assert decoder.expected_buffers(P) == [], "behind the end"


def test_nothing_is_foretold_at_the_end_of_a_block() -> None:
    decoder = ScatterDecoder()
    decoder.receive_data(OPENING + pushed([BLOCK_PAGES - 3])[:-13])
    list(decoder)
    assert decoder.expected_buffers(1 << 20) == []


PARTS = st.one_of(
    st.tuples(st.just("run"), st.integers(1, 40)),
    st.tuples(st.sampled_from(("zero", "hole")), st.integers(1, 6)),
    st.tuples(st.sampled_from(("break", "ping", "end", "block", "named")), st.just(0)),
)


def build(parts: list[tuple[str, int]]) -> bytes:
    """A stream of such parts; "named" names the block once more, "block" another one."""
    data = OPENING + encode(m.SectionPart(RAM_ID))
    block, named = "pc.ram", True
    place = {"pc.ram": 0, "b": 0}
    for kind, count in parts:
        if kind in ("run", "zero"):
            numbers = [number % BLOCK_PAGES for number in range(place[block], place[block] + count)]
            data += records(block, numbers, named, kind == "zero")
            named = False
        if kind in ("run", "zero", "hole"):
            place[block] = (place[block] + count) % BLOCK_PAGES
        elif kind == "block":
            block, named = "b" if block == "pc.ram" else "pc.ram", True
        elif kind == "named":
            named = True
        else:
            between = m.Ping(7) if kind == "ping" else None
            data += end_section() + (encode(between) if between else b"")
            data += encode((m.SectionEnd if kind == "end" else m.SectionPart)(RAM_ID))
    return data + end_section() + encode(m.Eof())


some = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@given(st.lists(PARTS, max_size=12), st.integers(0, 1 << 30))
@some
def test_any_stream(eager: None, parts: list[tuple[str, int]], seed: int) -> None:
    check(build(parts), seed)


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=6),
    st.integers(0, 1 << 30),
)
@some
def test_sections_of_changing_length(
    eager: None, lengths: list[tuple[int, int]], seed: int
) -> None:
    sections = [length for length, times in lengths for _ in range(times)]
    check(OPENING + pushed(sections) + encode(m.Eof()), seed)


@given(st.lists(PARTS, max_size=8), mutations, st.integers(0, 1 << 30), st.integers(0, 1 << 20))
@some
def test_damaged_streams(
    eager: None, parts: list[tuple[str, int]], changes: object, seed: int, end: int
) -> None:
    data = mutate(build(parts), changes)  # type: ignore[arg-type]
    data = data[: end % (len(data) + 1)] if end % 2 else data
    assert outcome(ScatterDecoder(), data, chooser(seed)) == outcome(
        ForwardDecoder(), data, at_once
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_break_of_another_sort_between_words_that_are_right(eager: None, seed: int) -> None:
    """END where PART was foretold: the pages on both sides are those that were expected."""
    numbers = [list(range(first, first + 12)) for first in range(0, 72, 12)]
    kinds = [m.SectionPart] * 4 + [m.SectionEnd, m.SectionPart]
    data = OPENING + b"".join(
        section(records("pc.ram", part, named=not part[0]), kind=kind)
        for part, kind in zip(numbers, kinds, strict=True)
    )
    assert check(data, seed) > 0
    expected, _ = take(ForwardDecoder(), data, at_once)
    assert take(ScatterDecoder(), data, at_once)[0] == expected


def test_offsets_count_what_came_either_way() -> None:
    """An error behind scattered bytes says where it is."""
    good = OPENING + pushed([64] * 4)
    data = good + b"\x99"
    for seed in range(5):
        assert outcome(ScatterDecoder(), data, chooser(seed)) == outcome(
            ForwardDecoder(), data, at_once
        )
    found = outcome(ForwardDecoder(), data, at_once)
    assert isinstance(found, tuple)
    assert found[1] == len(good)


def test_encoded_pages_end_the_row() -> None:
    """They may name another block, which CONTINUE then refers to."""
    decoder = ScatterDecoder()
    decoder.receive_data(OPENING + section(records("pc.ram", list(range(50)), True))[:-13])
    decoder.receive_data(encode(m.CompressedPage("b", 0, b"abc")))
    list(decoder)
    assert decoder.expected_buffers(1 << 20) == []
