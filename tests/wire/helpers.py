"""Feeding decoders: whole, byte by byte, at random cuts; and what every refusal must satisfy."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest

from postcopy_proto import messages as m
from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.messages import NEED_DATA, EndOfStream, Message, Pages
from postcopy_proto.ramblock import TARGET_PAGE_SIZE
from postcopy_proto.wire import ForwardDecoder, encode
from postcopy_proto.wire.decoder import Decoder
from postcopy_proto.wire.pages import join_pages

P = TARGET_PAGE_SIZE

Make = Callable[[], Decoder]

HEADER = encode(m.StreamHeader()) + encode(m.Configuration("pc-i440fx-7.2"))
"""file header and configuration: 8 + 18 bytes"""
ADVISE = encode(m.PostcopyAdvise(P, P))
RAM_ID = 2


def h(text: str) -> bytes:
    """Bytes from hex digits with any spaces."""
    return bytes.fromhex(text)


def join(*messages: Message) -> bytes:
    return b"".join(map(encode, messages))


def start(*entries: m.RamBlockEntry) -> bytes:
    """A START section of RAM up to its block list."""
    return join(m.SectionStart(RAM_ID, "ram", 0, 4), m.RamBlockList(entries))


def end_section() -> bytes:
    return join(m.RamEos(), m.SectionFooter(RAM_ID))


def one_block(length: int = 64 * P, name: str = "pc.ram") -> bytes:
    """A whole START section with one block."""
    return start(m.RamBlockEntry(name, length)) + end_section()


def batch(
    block: str,
    *pages: tuple[int, bytes | None],
    named: bool = True,
    page_size: int = P,
) -> Pages:
    """Pages by number: bytes, or None for a zero page."""
    data = b"".join(content for _, content in pages if content is not None)
    positions, position = [], 0
    for _, content in pages:
        positions.append(-1 if content is None else position)
        position += len(content or b"")
    return Pages(
        block,
        np.array([number * page_size for number, _ in pages], np.uint64),
        np.array(positions, np.int64),
        memoryview(data),
        page_size,
        named,
    )


@functools.cache
def page(seed: int, size: int = P) -> bytes:
    """A page's worth of bytes that tell pages apart."""
    return random.Random(seed).randbytes(size)


def every_byte(data: bytes) -> Iterator[bytes]:
    return (data[i : i + 1] for i in range(len(data)))


def random_cuts(data: bytes, seed: int, largest: int = 9000) -> Iterator[bytes]:
    rng, at = random.Random(seed), 0
    while at < len(data):
        size = rng.choice((1, 2, 3, 7, 8, 9, 40, 4104, rng.randrange(1, largest)))
        yield data[at : at + size]
        at += size


def events(decoder: Decoder, chunks: Iterable[bytes]) -> list[Message]:
    """All events of a stream that is fed chunk by chunk and then ends."""
    result: list[Message] = []
    for chunk in chunks:
        decoder.receive_data(chunk)
        result += decoder
    decoder.receive_data(b"")
    result += decoder
    return result


def decode(make: Make, data: bytes) -> list[Message]:
    """The events of `data`, page batches joined, which must not depend on how it is cut.

    The last one, which must be EndOfStream, says that the stream ended in order.
    """
    whole = cut(make, data)
    assert isinstance(whole[-1], EndOfStream)
    assert whole[-1] == EndOfStream(len(data), clean=True)
    return whole[:-1]


def cut(make: Make, data: bytes) -> list[Message]:
    """The events of `data`, page batches joined, EndOfStream last, however it is cut."""
    whole = join_pages(events(make(), [data] if data else []))
    assert join_pages(events(make(), every_byte(data))) == whole
    for seed in range(3):
        assert join_pages(events(make(), random_cuts(data, seed))) == whole
    return whole


def refuse(
    make: Make,
    data: bytes,
    kind: ErrorKind,
    offset: int,
    text: str,
    message: str | None = None,
) -> list[Message]:
    """Assert that `data` is refused like this, however it is cut; returns the events before."""
    outcomes = []
    for chunks in ([data], every_byte(data), random_cuts(data, 1)):
        decoder = make()
        before, error = events_until_error(decoder, chunks)
        assert error.kind is kind, error
        assert error.offset == offset, error
        assert text in error.reason, error
        assert error.message == message, error
        assert error.state is None
        with pytest.raises(RemoteProtocolError) as again:
            decoder.next_event()
        assert again.value is error, "the same error, for ever"
        outcomes.append((join_pages(before), error.channel, str(error)))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    return outcomes[0][0]


def events_until_error(
    decoder: Decoder, chunks: Iterable[bytes]
) -> tuple[list[Message], RemoteProtocolError]:
    seen: list[Message] = []
    try:
        for chunk in chunks:
            decoder.receive_data(chunk)
            while (event := decoder.next_event()) is not NEED_DATA:
                assert isinstance(event, Message)
                seen.append(event)
    except RemoteProtocolError as error:
        return seen, error
    raise AssertionError(f"not refused; events: {seen}")


def forward(**options: object) -> Make:
    return lambda: ForwardDecoder(**options)  # type: ignore[arg-type]


def channel_of(decoder: Decoder, data: bytes) -> Channel | None:
    return events_until_error(decoder, [data])[1].channel
