"""One message as a line for people and as a JSON object for programs."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from postcopy_proto import messages as m

MEANINGS: dict[type[m.Message], str] = {
    m.StreamHeader: "opens every stream but a recovery",
    m.Configuration: "both ends must be of this machine type",
    m.SectionStart: "first section of an iterable device",
    m.SectionPart: "one more section of it",
    m.SectionEnd: "its last section",
    m.SectionFooter: "closes the section",
    m.SectionFull: "a device's whole state",
    m.Eof: "nothing follows but the description of a precopy stream",
    m.VmDescription: "JSON that describes the device sections",
    m.OpenReturnPath: "the destination may answer on this connection",
    m.Ping: "asks for a PONG with this value",
    m.PostcopyAdvise: "postcopy may follow; the destination empties its RAM",
    m.PostcopyListen: "faults are served from here",
    m.PostcopyRun: "the VM runs at the destination from here",
    m.PostcopyRamDiscard: "stale or never sent; will come again",
    m.Packaged: "received whole before it is loaded",
    m.EnableColo: "the stream belongs to COLO",
    m.PostcopyResume: "recovery: the source goes on",
    m.RecvBitmap: "recovery: asks which pages of the block have arrived",
    m.SwitchoverStart: "the VM has stopped at the source",
    m.RamBlockList: "the source's RAM",
    m.XbzrlePage: "a page as a difference to its last copy",
    m.CompressedPage: "a page packed with zlib",
    m.MultifdFlush: "wait for the multifd channels",
    m.RamEos: "end of RAM's part of the section",
    m.DeviceState: "device sections, not taken apart",
    m.Shut: "the destination is done; 0 is well",
    m.Pong: "answers a PING",
    m.ReqPagesId: "a fault: wanted now",
    m.ReqPages: "a fault: wanted now",
    m.ReceivedBitmap: "recovery: what has arrived",
    m.ResumeAck: "recovery: the destination is ready",
    m.SwitchoverAck: "the devices agree to the switchover",
    m.UnknownCommand: "in no table",
    m.UnknownReturnPathMessage: "in no table",
}

_COUNTED = {"payload", "data", "text", "encoded", "compressed", "bitmap"}
"""fields of bytes that are told by their length"""


def json_fields(message: m.Message) -> dict[str, Any]:
    """The fields of a message as JSON can hold them; long bytes are told by their length."""
    if isinstance(message, m.RamBlockList):
        return {"blocks": [_without_none(entry) for entry in message.blocks]}
    values = _without_none(message)
    if isinstance(message, m.EndOfStream):
        del values["offset"]  # it is where the event stands
    elif isinstance(message, m.ReceivedBitmap):
        values["received_pages"] = received_pages(message)
    return values


def _without_none(record: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if value is None:
            continue
        if field.name in _COUNTED:
            values[f"{field.name}_bytes"] = len(value)
        elif isinstance(value, bytes):
            values[field.name] = value.hex()
        else:
            values[field.name] = value
    return values


def text_fields(message: m.Message) -> str:
    """The fields of a message for people."""
    match message:
        case m.RamBlockList():
            blocks = "; ".join(_block(entry) for entry in message.blocks)
            return f"{size_text(message.total)} in {len(message.blocks)} blocks: {blocks}"
        case m.PostcopyRamDiscard(block, ranges):
            shown = ", ".join(f"[{r.start:#x}, {r.end:#x})" for r in ranges)
            total = sum(r.length for r in ranges)
            return f"{block} {plural(len(ranges), 'range')}, {size_text(total)}: {shown}"
        case m.PostcopyAdvise(summary, page) if summary is not None:
            return f"page size summary {summary:#x}, target page {page}"
        case m.PostcopyAdvise():
            return "without RAM: dirty bitmaps only"
        case m.ReqPagesId(start, length, block):
            return f"{block} [{start:#x}, {start + length:#x})"
        case m.ReqPages(start, length):
            return f"[{start:#x}, {start + length:#x})"
        case m.ReceivedBitmap(block, bitmap):
            return f"{block} {received_pages(message):,} pages received, {len(bitmap)} bytes"
        case m.Ping(value) | m.Pong(value) if value > 9:
            return f"{value:#x}"
        case m.Shut(value) | m.Ping(value) | m.Pong(value) | m.ResumeAck(value):
            return str(value)
        case m.RecvBitmap(block):
            return block
        case m.XbzrlePage(block, offset) | m.CompressedPage(block, offset):
            return f"{block} {offset:#x}, {_generic(message, skip=2)}"
        case _:
            return _generic(message)


def received_pages(message: m.ReceivedBitmap) -> int:
    """How many pages a received bitmap says have arrived."""
    return int.from_bytes(message.bitmap, "little").bit_count()


def meaning(message: m.Message) -> str:
    """What a message is for."""
    return MEANINGS.get(type(message), "")


def _generic(message: m.Message, skip: int = 0) -> str:
    parts = []
    for name, value in list(_without_none(message).items())[skip:]:
        if name.endswith("_bytes"):
            parts.append(plural(value, "byte"))
        elif name != "named":
            shown = ", ".join(value) if isinstance(value, tuple) else value
            parts.append(f"{name} {shown}")
    return ", ".join(parts)


def _block(entry: m.RamBlockEntry) -> str:
    text = f"{entry.idstr} {size_text(entry.used_length)}"
    if entry.page_size is not None:
        text += f" on {size_text(entry.page_size)} pages"
    if entry.gpa is not None:
        text += f" at {entry.gpa:#x}"
    return text


def size_text(count: int) -> str:
    """Bytes in the largest binary unit that divides them."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count and count % (1 << shift) == 0:
            return f"{count >> shift:,} {unit}"
    return plural(count, "byte")


def plural(count: int, noun: str) -> str:
    """`1 range`, `2 ranges`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
