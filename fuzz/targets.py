"""The fuzzers' targets: one function a parser surface, each checking the same invariant.

    Any bytes, cut up in any way, give messages or RemoteProtocolError: nothing else is raised.
    How they were cut up changes neither the messages nor the error; encoding the messages
    gives the bytes back. What is held is bounded by the limits, never by what a length says.

The first byte of an input says how the rest is cut up and which options the reader has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from postcopy_proto import messages as m
from postcopy_proto.destination import DestinationConnection
from postcopy_proto.errors import LocalProtocolError, RemoteProtocolError
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.savefile.description import split_device_state
from postcopy_proto.wire import (
    ForwardDecoder,
    Limits,
    PreemptDecoder,
    ReturnPathDecoder,
    encode,
    parse_package,
    scatter,
)
from postcopy_proto.wire.pages import CONTINUE, PAGE, ZERO, join_pages
from postcopy_proto.wire.scatter import ScatterDecoder

LIMITS = Limits(
    blocks=16,
    package_bytes=4096,
    device_state_bytes=4096,
    description_bytes=4096,
    bitmap_bytes=4096,
)
"""small, so that an input that is believed too much shows by the memory it takes"""

SMALL_PAGE = 1024
PIECES = 24
"""an input is cut into about so many pieces at most: one a byte would be all that is done"""

STRICT, SMALL_PAGES, KNOWN_BLOCKS = 0x80, 0x40, 0x20
"""bits of an input's first byte; the others say how it is cut up"""

BLOCKS = (RAMBlock("pc.ram", 0x200000), RAMBlock("m0", 0x400000, 0x200000))


class Reader(Protocol):
    """What decoders and connections have in common."""

    def receive_data(self, data: bytes) -> None: ...
    def next_event(self) -> m.Message | m.NeedData: ...


@dataclass(frozen=True)
class Outcome:
    """Everything that an input led to."""

    events: list[m.Message]
    error: tuple[object, ...] | None


def drain(reader: Reader, chunks: Iterable[bytes]) -> Outcome:
    """What a reader makes of these chunks, and of the end of the stream."""
    events: list[m.Message] = []
    try:
        for chunk in (*chunks, b""):
            reader.receive_data(chunk)
            while not isinstance(event := reader.next_event(), m.NeedData):
                events.append(event)
                if isinstance(event, m.EndOfStream):
                    break
    except RemoteProtocolError as error:
        check_error(reader, error)
        return Outcome(join_pages(events), (error.kind, error.channel, error.message, error.reason))
    assert isinstance(events[-1], m.EndOfStream), "no word about the end of the stream"
    return Outcome(join_pages(events), None)


def check_error(reader: Reader, error: RemoteProtocolError) -> None:
    """An error says where it was, and stays."""
    assert error.channel is not None
    assert error.offset is not None
    assert str(error)
    try:
        again = reader.next_event()
    except RemoteProtocolError as repeated:
        assert repeated is error
    else:
        raise AssertionError(f"{again} after {error}")


def pieces(data: bytes, seed: int) -> Iterator[bytes]:
    """`data` cut up: the same size everywhere but for the first piece."""
    step = max(len(data) // PIECES, 1 + seed % 16)
    first = min(seed % step, len(data))
    if first:
        yield data[:first]
    for start in range(first, len(data), step):
        yield data[start : start + step]


def same_either_way(make: Callable[[], Reader], data: bytes, seed: int) -> Outcome:
    """What comes of `data`, after a look that it does not depend on how it is cut up."""
    whole = drain(make(), [data] if data else [])
    cut = drain(make(), pieces(data, seed))
    assert whole == cut, f"whole: {whole}\nin pieces: {cut}"
    return whole


def check_encoding(outcome: Outcome, data: bytes, *, page_size: int) -> None:
    """The messages' bytes are those that they were read from."""
    messages = [event for event in outcome.events if not isinstance(event, m.EndOfStream)]
    if page_size != SMALL_PAGE:  # encode() of XBZRLE and of the block list has the usual page
        encoded = stream_of(*messages)
        assert data.startswith(encoded), f"{messages}\n{encoded.hex()}"


def split(data: bytes) -> tuple[int, bytes]:
    """The byte that says how, and the bytes proper."""
    return (data[0], data[1:]) if data else (0, b"")


# ---- the targets


def return_path(data: bytes) -> None:
    """What a destination could send."""
    how, stream = split(data)
    outcome = same_either_way(
        lambda: ReturnPathDecoder(limits=LIMITS, strict=bool(how & STRICT)), stream, how
    )
    check_encoding(outcome, stream, page_size=0)


def forward(data: bytes) -> None:
    """What a source could send, header or not."""
    how, stream = split(data)
    page_size = SMALL_PAGE if how & SMALL_PAGES else 4096
    outcome = same_either_way(
        lambda: ForwardDecoder(
            header=None,
            blocks=BLOCKS if how & KNOWN_BLOCKS else None,
            target_page_size=page_size,
            limits=LIMITS,
            strict=bool(how & STRICT),
        ),
        stream,
        how,
    )
    check_encoding(outcome, stream, page_size=page_size)


def preempt(data: bytes) -> None:
    """What a source could send on the second connection."""
    how, stream = split(data)
    page_size = SMALL_PAGE if how & SMALL_PAGES else 4096
    outcome = same_either_way(
        lambda: PreemptDecoder(
            blocks=BLOCKS if how & KNOWN_BLOCKS else None,
            target_page_size=page_size,
            limits=LIMITS,
        ),
        stream,
        how,
    )
    check_encoding(outcome, stream, page_size=page_size)


def package(data: bytes) -> None:
    """The content of a package: read from both ends."""
    _, payload = split(data)
    try:
        items = parse_package(payload, limits=LIMITS)
    except RemoteProtocolError as error:
        assert error.offset is not None
        assert 0 <= error.offset <= len(payload)
        return
    assert isinstance(items[0], m.PostcopyListen)
    assert isinstance(items[-1], m.PostcopyRun)
    assert stream_of(*items) == payload


def stream_of(*messages: m.Message) -> bytes:
    """Their bytes, one message behind the other."""
    return b"".join(map(encode, messages))


_HEAD = stream_of(
    m.StreamHeader(),
    m.Configuration("pc"),
    m.SectionStart(2, "ram", 0, 4),
    m.RamBlockList((m.RamBlockEntry("pc.ram", 0x1000),)),
    m.RamEos(),
    m.SectionFooter(2),
)


def save_file(data: bytes) -> None:
    """The tail of a save file: device sections, EOF, and the JSON that describes them."""
    how, tail = split(data)
    outcome = same_either_way(
        lambda: ForwardDecoder(limits=LIMITS, strict=bool(how & STRICT)), _HEAD + tail, how
    )
    check_encoding(outcome, _HEAD + tail, page_size=0)
    states = [event.data for event in outcome.events if isinstance(event, m.DeviceState)]
    texts = [event.text for event in outcome.events if isinstance(event, m.VmDescription)]
    if states and texts:
        check_sections(states[0], texts[0])
    state, _, text = tail.partition(b"\0\x06")  # and as if whoever wrote it had meant it
    check_sections(state, text[4:])


def check_sections(state: bytes, text: bytes) -> None:
    """Device sections lie one behind the other and fill the state, or are refused."""
    try:
        sections = split_device_state(state, text)
    except RemoteProtocolError as error:
        assert error.channel is not None
        return
    at = 0
    for section in sections:
        assert section.offset == at
        assert section.length > 0
        at += section.length
    assert at == len(state)


_PUSH = stream_of(
    m.StreamHeader(),
    m.Configuration("pc"),
    m.SectionStart(2, "ram", 0, 4),
    m.RamBlockList((m.RamBlockEntry("m0", 0x8000),)),
    m.RamEos(),
    m.SectionFooter(2),
    m.SectionPart(2),
)
_BREAK = stream_of(m.RamEos(), m.SectionFooter(2), m.SectionPart(2))
_EAGER = 3
"""pages in a row after which the next ones are foretold here: inputs are short"""
_LONGEST = 0xA000
"""bytes of a push after which nothing is added: some more than the block has room for"""


def push_of(program: bytes) -> bytes:
    """A push of pages, and what may stand in its way: each byte says what comes next.

    Most are the next page or the break between two sections; the others are a page or a zero page
    elsewhere, a page with the block's name, and bytes as they stand in the program.
    """
    stream, page = bytearray(_PUSH), 0
    at = 0
    while at < len(program) and len(stream) < _LONGEST:
        op, at = program[at], at + 1
        if op < 0x90:
            for _ in range(1 + op % 8):
                flags = PAGE | CONTINUE if len(stream) > len(_PUSH) else PAGE
                stream += (page * SMALL_PAGE | flags).to_bytes(8, "big")
                stream += b"\2m0" if flags == PAGE else b""
                stream += bytes([page & 0xFF]) * SMALL_PAGE
                page += 1
        elif op < 0xC0:
            stream += _BREAK
        elif op < 0xD0:
            page += op & 7
        elif op < 0xE0:
            stream += (page * SMALL_PAGE | ZERO | CONTINUE).to_bytes(8, "big") + b"\0"
            page += 1
        elif op < 0xE8:
            stream += (page * SMALL_PAGE | PAGE).to_bytes(8, "big") + b"\2m0" + bytes(SMALL_PAGE)
            page += 1
        else:
            count = op & 0x17
            stream += program[at : at + count]
            at += count
    return bytes(stream)


def push(data: bytes) -> None:
    """Pages that are read straight into place come as they do in the ordinary way."""
    how, program = split(data)
    stream = push_of(program)
    scatter.STREAK = _EAGER
    ordinary = drain(ForwardDecoder(target_page_size=SMALL_PAGE, limits=LIMITS), [stream])
    decoder = ScatterDecoder(target_page_size=SMALL_PAGE, limits=LIMITS)
    foretold = drain_foretold(decoder, stream, 509 + how * 61)
    assert ordinary == foretold, f"ordinary: {ordinary}\nforetold: {foretold}"


def drain_foretold(decoder: ScatterDecoder, stream: bytes, step: int) -> Outcome:
    """What a decoder makes of a stream read in steps, into its buffers where it has some."""
    events: list[m.Message] = []
    at = 0
    try:
        while not events or not isinstance(events[-1], m.EndOfStream):
            piece = stream[at : at + step]
            buffers = decoder.expected_buffers(1 << 14) if piece else []
            taken = 0
            for buffer in buffers:
                part = piece[taken : taken + len(buffer)]
                buffer[: len(part)] = part
                taken += len(part)
            if buffers:
                decoder.receive_expected(taken)
            else:
                decoder.receive_data(piece)
            at += taken or len(piece)
            while not isinstance(event := decoder.next_event(), m.NeedData):
                events += join_pages([event])  # copied: the next read writes over the pages
                if isinstance(event, m.EndOfStream):
                    break
    except RemoteProtocolError as error:
        check_error(decoder, error)
        return Outcome(join_pages(events), (error.kind, error.channel, error.message, error.reason))
    return Outcome(join_pages(events), None)


class Destination:
    """A whole destination that answers and asks as it reads, as its event loop does."""

    def __init__(self, how: int) -> None:
        self._connection = DestinationConnection(
            limits=LIMITS,
            strict=bool(how & STRICT),
            target_page_size=SMALL_PAGE if how & SMALL_PAGES else 4096,
        )
        self._placed: set[tuple[str, int]] = set()

    def receive_data(self, data: bytes) -> None:
        self._connection.receive_data(data)

    def next_event(self) -> m.Message | m.NeedData:
        connection = self._connection
        event = connection.next_event()
        if isinstance(event, m.Ping):
            self._try(m.Pong(event.value))
        if isinstance(event, m.PostcopyRun):
            for block in connection.blocks.values():
                answer, count = connection.request_pages([(block.idstr, 0)])
                assert bool(answer) == bool(count)
        if isinstance(event, m.Eof):
            self._try(m.Shut(0))
        if isinstance(event, m.PostcopyRamDiscard):
            self._placed.clear()
        if isinstance(event, m.Pages) and connection.running:
            new = {(event.block, offset) for offset in event.offsets.tolist()}
            assert len(new) == len(event), "a page twice in one batch"
            assert not new & self._placed, "a page placed twice"
            self._placed |= new
        return event

    def _try(self, answer: m.Message) -> None:
        with suppress(LocalProtocolError):
            assert self._connection.send(answer) == encode(answer)


def destination(data: bytes) -> None:
    """A destination's whole session."""
    how, stream = split(data)
    same_either_way(lambda: Destination(how), stream, how)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "return_path": return_path,
    "forward": forward,
    "preempt": preempt,
    "package": package,
    "save_file": save_file,
    "push": push,
    "destination": destination,
}
