"""Reading spec/vectors: bytes of any channel, and the messages or the error that they are."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from postcopy_proto import messages as m
from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.ramblock import TARGET_PAGE_SIZE, ByteRange, RAMBlock
from postcopy_proto.wire import (
    ForwardDecoder,
    PreemptDecoder,
    ReturnPathDecoder,
    parse_package,
)

DIRECTORY = Path(__file__).parent.parent / "spec" / "vectors"

_RETURN = {
    cls.NAME: cls
    for cls in (
        m.Shut,
        m.Pong,
        m.ReqPagesId,
        m.ReqPages,
        m.ReceivedBitmap,
        m.ResumeAck,
        m.SwitchoverAck,
        m.UnknownReturnPathMessage,
    )
}
_OTHERS = {
    cls.NAME: cls
    for cls in vars(m).values()
    if isinstance(cls, type)
    and issubclass(cls, m.Message)
    and cls not in (m.Message, m.EndOfStream, *_RETURN.values())
}
_BYTES = {"payload", "text", "data", "bitmap", "encoded", "compressed", "uuid"}


@dataclass(frozen=True)
class Vector:
    """One vector, as its file has it but for `data`, which is put together."""

    name: str
    channel: Channel
    data: bytes
    events: tuple[dict[str, Any], ...]
    error: ErrorKind | None
    ends: str | None
    options: dict[str, Any]


def load() -> list[Vector]:
    """All vectors of all channels."""
    return [vector for vector in _load_all() if "role" not in vector.options]


def load_sessions() -> list[Vector]:
    """The vectors that a whole connection reads."""
    return [vector for vector in _load_all() if "role" in vector.options]


def _load_all() -> list[Vector]:
    return [
        _vector(path.stem, raw)
        for path in sorted(DIRECTORY.glob("*.json"))
        for raw in json.loads(path.read_text())["vectors"]
    ]


def _vector(stem: str, raw: dict[str, Any]) -> Vector:
    known = {"name", "channel", "hex", "events", "error", "ends"}
    return Vector(
        name=f"{stem}/{raw['name']}",
        channel=Channel(raw["channel"]),
        data=assemble(raw["hex"]),
        events=tuple(raw.get("events", ())),
        error=ErrorKind(raw["error"]) if "error" in raw else None,
        ends=raw.get("ends"),
        options={key: value for key, value in raw.items() if key not in known},
    )


def assemble(parts: str | list[str | dict[str, Any]]) -> bytes:
    """Bytes of hex digits, or of a list of hex digits and repetitions."""
    if isinstance(parts, str):
        return bytes.fromhex(parts)
    return b"".join(
        bytes.fromhex(part)
        if isinstance(part, str)
        else bytes.fromhex(part["repeat"]) * part["count"]
        for part in parts
    )


def decode(vector: Vector, chunks: Iterable[bytes]) -> tuple[list[m.Message], m.EndOfStream | None]:
    """The messages of a vector that arrives in these chunks, and how its stream ended."""
    if vector.channel is Channel.PACKAGE:
        return parse_package(b"".join(chunks)), None
    decoder = decoder_for(vector)
    events: list[m.Message] = []
    try:
        for chunk in (*chunks, b""):
            decoder.receive_data(chunk)
            for event in decoder:
                events.append(keep(event))  # one by one: those before an error count
    except RemoteProtocolError as error:
        raise StoppedError(error, events) from error
    end = events.pop()
    assert isinstance(end, m.EndOfStream)
    return events, end


class StoppedError(Exception):
    """An error, and the messages that were decoded before it."""

    def __init__(self, error: RemoteProtocolError, events: list[m.Message]) -> None:
        super().__init__(str(error))
        self.error = error
        self.events = events


def decoder_for(vector: Vector) -> ForwardDecoder | ReturnPathDecoder | PreemptDecoder:
    """A decoder as the vector's options want it."""
    strict = vector.options.get("strict", True)
    blocks = [RAMBlock(**block) for block in vector.options.get("blocks", ())] or None
    if vector.channel is Channel.RETURN:
        return ReturnPathDecoder(strict=strict)
    if vector.channel is Channel.PREEMPT:
        return PreemptDecoder(blocks=blocks)
    return ForwardDecoder(
        header=vector.options["start"] == "header",
        page_sizes=vector.options.get("page_sizes"),
        strict=strict,
    )


def keep(event: m.Message) -> m.Message:
    """An event that outlives the chunk it refers to."""
    if not isinstance(event, m.Pages):
        return event
    return m.Pages(
        event.block,
        event.offsets,
        event.positions,
        memoryview(bytes(event.data)),
        event.page_size,
        event.named,
    )


def single_pages(events: Iterable[m.Message]) -> list[dict[str, Any]]:
    """Messages as the vectors write them: a batch of pages page by page, all else by its fields."""
    return [described for event in events for described in _describe(event)]


def _describe(event: m.Message) -> list[dict[str, Any]]:
    if isinstance(event, m.Pages):
        return [
            {
                "message": "ZERO" if page is None else "PAGE",
                "block": event.block,
                "offset": int(event.offsets[number]),
                **({} if page is None else {"data": bytes(page).hex()}),
                "named": event.named and number == 0,
            }
            for number, page in ((i, event.page(i)) for i in range(len(event)))
        ]
    values: dict[str, Any] = {"message": event.NAME}
    if isinstance(event, m.RamBlockList):
        values["blocks"] = [_plain(entry) for entry in event.blocks]
        return [values]
    return [values | _plain(event)]


def _plain(record: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if value is None:
            continue
        if isinstance(value, bytes):
            value = value.hex()
        elif field.name == "ranges":
            value = [list(one) for one in value]
        elif isinstance(value, tuple):
            value = list(value)
        plain[field.name] = value
    return plain


def expected(vector: Vector) -> list[dict[str, Any]]:
    """The vector's events, repetitions written out."""
    return [
        event | ({"data": assemble([event["data"]]).hex()} if event["message"] == "PAGE" else {})
        for event in vector.events
    ]


def message(vector: Vector, event: dict[str, Any]) -> m.Message:
    """The message that an event of a vector describes."""
    name, values = event["message"], {k: v for k, v in event.items() if k != "message"}
    if name in ("PAGE", "ZERO"):
        return _page(name == "ZERO", values)
    if name == "MEM_SIZE":
        return m.RamBlockList(tuple(m.RamBlockEntry(**entry) for entry in values["blocks"]))
    for key in values:
        if key in _BYTES:
            values[key] = bytes.fromhex(values[key])
        elif key == "ranges":
            values[key] = tuple(ByteRange(*one) for one in values[key])
        elif key == "capabilities":
            values[key] = tuple(values[key])
    table = _RETURN if vector.channel is Channel.RETURN else _OTHERS
    built: m.Message = table[name](**values)
    return built


def _page(zero: bool, values: dict[str, Any]) -> m.Pages:
    data = b"" if zero else assemble([values["data"]])
    return m.Pages(
        block=values["block"],
        offsets=np.array([values["offset"]], np.uint64),
        positions=np.array([-1 if zero else 0], np.int64),
        data=memoryview(data),
        page_size=TARGET_PAGE_SIZE,
        named=values["named"],
    )
