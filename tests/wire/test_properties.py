"""Round trips both ways, any cut, fast path against schema, and bytes at random."""

from __future__ import annotations

from itertools import pairwise

import pytest
from construct import ConstructError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postcopy_proto import messages as m
from postcopy_proto.errors import RemoteProtocolError
from postcopy_proto.messages import NEED_DATA
from postcopy_proto.wire import (
    ForwardDecoder,
    Limits,
    PreemptDecoder,
    ReturnPathDecoder,
    encode,
    parse_package,
    stream,
)
from postcopy_proto.wire.decoder import Decoder
from postcopy_proto.wire.fields import Codec
from postcopy_proto.wire.pages import (
    CONTINUE,
    PAGE,
    ZERO,
    encode_page,
    join_pages,
    ram_record,
)
from postcopy_proto.wire.return_path import (
    MESSAGE,
    REQ_PAGES,
    REQ_PAGES_ID,
    encode_req_pages,
    encode_req_pages_id,
)
from tests.wire import strategies as s
from tests.wire.helpers import HEADER, events, join, random_cuts

few = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
many = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


def cut_at(data: bytes, cuts: list[int]) -> list[bytes]:
    marks = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(marks)]


cuts = st.lists(st.integers(0, 1 << 30), max_size=12)


@given(st.lists(st.one_of(s.commands, s.unknown_commands), max_size=6), cuts)
@many
def test_commands(messages: list[m.Message], at: list[int]) -> None:
    data = HEADER + join(*messages) + b"\0"
    got = events(ForwardDecoder(strict=False), cut_at(data, at))
    assert got[2:-2] == messages
    assert join(*got[:-1]) == data


@given(st.lists(st.one_of(s.return_path, s.unknown_return_path), max_size=20), cuts)
@many
def test_return_path(messages: list[m.Message], at: list[int]) -> None:
    data = join(*messages)
    got = events(ReturnPathDecoder(strict=False), cut_at(data, at))
    assert got[:-1] == messages


@given(s.configurations, cuts)
@many
def test_configuration(message: m.Configuration, at: list[int]) -> None:
    data = join(m.StreamHeader(), message) + b"\0"
    assert events(ForwardDecoder(), cut_at(data, at))[1] == message


@given(s.block_lists(page_sizes=True), cuts)
@many
def test_block_list(blocks: m.RamBlockList, at: list[int]) -> None:
    advise = m.PostcopyAdvise(4096 | 1 << 21 | 1 << 30, 4096)
    tail = join(m.RamEos(), m.SectionFooter(1)) + b"\0"
    data = HEADER + join(advise, m.SectionStart(1, "ram", 0, 4), blocks) + tail
    decoder = ForwardDecoder()
    assert events(decoder, cut_at(data, at))[4] == blocks
    assert [(b.idstr, b.used_length) for b in decoder.blocks.values()] == [
        (entry.idstr, entry.used_length) for entry in blocks.blocks
    ]


@given(st.lists(s.batches(named=True), min_size=1, max_size=3), cuts)
@few
def test_pages(batches: list[m.Pages], at: list[int]) -> None:
    data = join(*batches)
    got = join_pages(events(PreemptDecoder(), cut_at(data, at)))[:-1]
    assert got == join_pages(batches)
    assert join(*got) == data


@given(s.forward_streams(), cuts)
@few
def test_whole_streams(messages: list[m.Message], at: list[int]) -> None:
    data = join(*messages)
    got = join_pages(events(ForwardDecoder(), cut_at(data, at)))
    assert got[:-1] == join_pages(messages)
    assert join(*got[:-1]) == data


@given(s.u64, s.u32)
@many
def test_requests_against_their_schema(start: int, length: int) -> None:
    message = m.ReqPages(start, length)
    assert encode_req_pages(message) == REQ_PAGES.build({"start": start, "length": length})
    decoder = ReturnPathDecoder()
    decoder.receive_data(REQ_PAGES.build({"start": start, "length": length}) * 9)
    assert list(decoder) == [message] * 9


@given(s.u64, s.u32, s.names)
@many
def test_named_requests_against_their_schema(start: int, length: int, block: str) -> None:
    message = m.ReqPagesId(start, length, block)
    payload = REQ_PAGES_ID.build({"start": start, "length": length, "block": block})
    data = MESSAGE.build({"type": 3, "len": len(payload), "payload": payload})
    assert encode_req_pages_id(message) == data
    decoder = ReturnPathDecoder()
    decoder.receive_data(data)
    assert list(decoder) == [message]


@pytest.mark.parametrize("page_size", [1024, 4096, 65536])
@given(
    number=st.integers(0, (1 << 48) - 1),
    block=s.names,
    named=st.booleans(),
    seed=st.none() | st.binary(min_size=1, max_size=9),
)
@few
def test_one_page_against_its_schema(
    page_size: int, number: int, block: str, named: bool, seed: bytes | None
) -> None:
    """`encode_page`, the way from a request to its page, writes what the schema builds."""
    offset = number * page_size
    content = None if seed is None else (seed * page_size)[:page_size]
    flags = (ZERO if content is None else PAGE) | (0 if named else CONTINUE)
    fields = {
        "word": offset | flags,
        "idstr": block if named else None,
        "body": {"fill": 0} if content is None else {"page": content},
    }
    schema = ram_record(page_size)
    record = encode_page(block, offset, content, named)
    assert record == schema.build(fields)
    parsed = schema.parse(record)
    assert (parsed.word, parsed.idstr) == (fields["word"], fields["idstr"])
    assert {key: parsed.body[key] for key in fields["body"]} == fields["body"]


FIXED = [stream.SECTION_PART, stream.SECTION_END, stream.FOOTER, stream.EOF, stream._HEADER]
"""layouts of a constant and integers, which are not read by their schema"""


@pytest.mark.parametrize("codec", FIXED, ids=lambda codec: codec.message.NAME)
@given(data=st.data())
@many
def test_fixed_layouts_against_their_schema(codec: Codec[m.Message], data: st.DataObject) -> None:
    assert codec._fixed is not None
    values = {name: data.draw(s.u32) for name in codec._fields}
    built = codec.schema.build(values)
    wrong = data.draw(st.binary(max_size=len(built) + 2))
    for candidate in (built, built + wrong, b"\xff" + built[1:], built[:-1], wrong):
        try:
            parsed = codec.schema.parse(candidate)
        except ConstructError:
            with pytest.raises(RemoteProtocolError, match="not as laid out"):
                codec.decode(candidate)
        else:
            expected = codec.message(**{name: parsed[name] for name in codec._fields})
            assert codec.decode(memoryview(candidate)) == expected


# ---- bytes at random: events or RemoteProtocolError, the same however they are cut

SEEDS = [
    HEADER,
    HEADER + join(m.PostcopyAdvise(4096, 4096), m.SectionStart(1, "ram", 0, 4)),
    join(m.RecvBitmap("pc.ram"), m.PostcopyResume(), m.SectionPart(1)),
    join(m.ReqPagesId(0, 4096, "pc.ram"), m.ReqPages(4096, 4096), m.Pong(1)),
    HEADER + join(m.SectionFull(1, "timer", 0, 2)),
    b"",
]

mutations = st.lists(
    st.tuples(st.sampled_from("isdr"), st.integers(0, 1 << 20), st.binary(min_size=1, max_size=9)),
    max_size=6,
)


def mutate(data: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    out = bytearray(data)
    for how, at, piece in changes:
        at %= len(out) + 1
        if how == "i":
            out[at:at] = piece
        elif how == "s":
            out[at : at + len(piece)] = piece
        elif how == "d":
            del out[at : at + len(piece)]
        else:
            out[at:at] = out[at : at + 40]
    return bytes(out)


def outcome(decoder: Decoder, chunks: list[bytes]) -> tuple[object, ...]:
    seen: list[m.Message] = []
    try:
        for chunk in [*chunks, b""]:
            decoder.receive_data(chunk)
            while (event := decoder.next_event()) is not NEED_DATA:
                assert isinstance(event, m.Message)
                seen.append(event)
                if isinstance(event, m.EndOfStream):
                    break
    except RemoteProtocolError as error:
        return join_pages(seen), error.kind, error.offset, str(error)
    return (join_pages(seen),)


LIMITS = Limits(package_bytes=300, bitmap_bytes=64, device_state_bytes=400, description_bytes=100)


@pytest.mark.parametrize("make", [ForwardDecoder, ReturnPathDecoder, PreemptDecoder])
@given(data=st.data())
@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
def test_hostile_bytes(make: type[Decoder], data: st.DataObject) -> None:
    stream = mutate(
        data.draw(st.sampled_from(SEEDS)) + data.draw(st.binary(max_size=60)), data.draw(mutations)
    )
    options = {"header": None} if make is ForwardDecoder else {}

    def decoder() -> Decoder:
        return make(limits=LIMITS, **options)  # type: ignore[call-arg]

    expected = outcome(decoder(), [stream] if stream else [])
    assert outcome(decoder(), cut_at(stream, data.draw(cuts))) == expected
    assert outcome(decoder(), [stream[i : i + 1] for i in range(len(stream))]) == expected


@given(s.forward_streams(), mutations, st.integers(0, 9))
@few
def test_hostile_streams(
    messages: list[m.Message], changes: list[tuple[str, int, bytes]], seed: int
) -> None:
    stream = mutate(join(*messages), changes)
    expected = outcome(ForwardDecoder(limits=LIMITS), [stream] if stream else [])
    assert outcome(ForwardDecoder(limits=LIMITS), list(random_cuts(stream, seed))) == expected


PACKAGE = join(
    m.PostcopyListen(), m.SectionFull(1, "timer", 0, 1), m.SectionFooter(1), m.Ping(3),
    m.PostcopyRun(),
)  # fmt: skip


@given(mutations, st.binary(max_size=30))
@many
def test_hostile_packages(changes: list[tuple[str, int, bytes]], noise: bytes) -> None:
    payload = mutate(PACKAGE[:20] + noise + PACKAGE[20:], changes)
    try:
        items = parse_package(payload)
    except RemoteProtocolError:
        return
    assert b"".join(map(encode, items)) == payload
