"""The return path: what a destination says to its source, on the same connection.

QEMU: migration/migration.c `enum mig_rp_message_type`, `rp_cmd_args`, `migrate_send_rp_message`
and its callers, `source_return_path_thread`. All integers big-endian, n bytes of name.

    0    2  type
    2    2  len, at most 512
    4    len  payload

    type                 len   payload                                    function
    1  SHUT              4     u32 value, 0 = no error        migrate_send_rp_shut
    2  PONG              4     u32 value of the PING          migrate_send_rp_pong
    3  REQ_PAGES_ID      13+n  u64 start, u32 len,            migrate_send_rp_req_pages
                               u8 n, n bytes of idstr
    4  REQ_PAGES         12    u64 start, u32 len: of the     migrate_send_rp_req_pages
                               block that was named last
    5  RECV_BITMAP       1+n   u8 n, n bytes of idstr; the    migrate_send_rp_recv_bitmap
                               bitmap follows outside len:
                               see bitmap.py
    6  RESUME_ACK        4     u32 value, 1                   migrate_send_rp_resume_ack
    7  SWITCHOVER_ACK    0     since 8.1                      migrate_send_rp_switchover_ack
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator, Mapping
from enum import IntEnum
from itertools import repeat, starmap
from typing import Any

import numpy as np
from construct import (
    Bytes,
    Const,
    ConstructError,
    Int16ub,
    Int32ub,
    Int64ub,
    Struct,
    Terminated,
    this,
)

from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.messages import (
    NEED_DATA,
    EndOfStream,
    Message,
    NeedData,
    Pong,
    ReceivedBitmap,
    ReqPages,
    ReqPagesId,
    ResumeAck,
    Shut,
    SwitchoverAck,
    UnknownReturnPathMessage,
)
from postcopy_proto.ramblock import encode_idstr
from postcopy_proto.wire.bitmap import BITMAP_SCHEMA, UNIT, encode_bitmap
from postcopy_proto.wire.decoder import Decoder
from postcopy_proto.wire.fields import Codec, Idstr, checked_idstr, fixed_struct, malformed
from postcopy_proto.wire.limits import Limits


class MigRpMsg(IntEnum):
    """MIG_RP_MSG_*: the type of a return path message."""

    INVALID = 0
    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7


MESSAGE = Struct("type" / Int16ub, "len" / Int16ub, "payload" / Bytes(this.len), Terminated)
"""The frame."""

FRAME_SIZE = 4
"""bytes of the frame before the payload"""

REQ_PAGES = Struct(
    "type" / Const(MigRpMsg.REQ_PAGES, Int16ub),
    "len" / Const(12, Int16ub),
    "start" / Int64ub,
    "length" / Int32ub,
)
"""A whole REQ_PAGES, frame and payload."""

REQ_PAGES_ID = Struct("start" / Int64ub, "length" / Int32ub, "block" / Idstr, Terminated)
"""The payload of REQ_PAGES_ID."""

REQUEST = fixed_struct(REQ_PAGES)
"""The fast form of REQ_PAGES, derived from it: type, len, start, length."""

_REQUEST_DTYPE = np.dtype([(f.name, f">u{f.sizeof()}") for f in REQ_PAGES.subcons])
_REQUEST_HEAD = (MigRpMsg.REQ_PAGES << 16 | 12).to_bytes(FRAME_SIZE, "big")
_REQUEST_HEAD_WORD = int.from_bytes(_REQUEST_HEAD, "big")
_REQUEST_ID_HEAD = struct.Struct(
    ">HH" + "".join(field.subcon.fmtstr[1:] for field in REQ_PAGES_ID.subcons[:2]) + "B"
)
_REQUEST_ID_LEN = 13  # len of REQ_PAGES_ID without its name

_SHUT = Codec(Shut, Struct("status" / Int32ub, Terminated))
_PONG = Codec(Pong, Struct("value" / Int32ub, Terminated))
_RESUME_ACK = Codec(ResumeAck, Struct("value" / Int32ub, Terminated))
_CODECS: dict[int, Codec[Any]] = {
    MigRpMsg.SHUT: _SHUT,
    MigRpMsg.PONG: _PONG,
    MigRpMsg.REQ_PAGES_ID: Codec(ReqPagesId, REQ_PAGES_ID),
    MigRpMsg.RESUME_ACK: _RESUME_ACK,
    MigRpMsg.SWITCHOVER_ACK: Codec(SwitchoverAck, Struct(Terminated)),
}
_TYPE_OF = {codec.message: MigRpMsg(number) for number, codec in _CODECS.items()}
_KNOWN = frozenset(MigRpMsg)

RP_CMD_ARGS: Mapping[int, int] = {
    MigRpMsg.SHUT: 4,
    MigRpMsg.PONG: 4,
    MigRpMsg.REQ_PAGES: 12,
    MigRpMsg.RESUME_ACK: 4,
    MigRpMsg.SWITCHOVER_ACK: 0,
}
"""The length of each message's payload; messages of variable length are not listed."""

RESUME_ACK_VALUE = 1
"""MIGRATION_RESUME_ACK_VALUE"""

BITMAP_SIZE_BYTES = 8
BITMAP_END_BYTES = 8


# ---- encoding


def encode_simple(message: Message) -> bytes:
    """A message whose payload is its fields, or nothing; ValueError for a value that misfits."""
    number = _TYPE_OF[type(message)]
    return _frame(number, _CODECS[number].encode(message))


def encode_req_pages(message: ReqPages) -> bytes:
    """REQ_PAGES: one `struct` call, because it stands between a fault and its page."""
    try:
        return REQUEST.pack(4, 12, message.start, message.length)
    except struct.error:
        raise Codec(ReqPages, REQ_PAGES).misfit(message) from None


def encode_req_pages_id(message: ReqPagesId) -> bytes:
    """REQ_PAGES_ID, as `encode_req_pages`."""
    idstr = encode_idstr(message.block)
    size = len(idstr)
    try:
        head = _REQUEST_ID_HEAD.pack(3, _REQUEST_ID_LEN + size, message.start, message.length, size)
    except struct.error:
        raise _CODECS[MigRpMsg.REQ_PAGES_ID].misfit(message) from None
    return head + idstr


def encode_resume_ack(message: ResumeAck) -> bytes:
    """RESUME_ACK; ValueError for any value but 1."""
    if message.value != RESUME_ACK_VALUE:
        raise ValueError(f"{message.NAME}: value is {message.value!r}; it must be 1")
    return encode_simple(message)


def encode_recv_bitmap(message: ReceivedBitmap) -> bytes:
    """RECV_BITMAP and the bitmap behind it; ValueError as `bitmap.encode_bitmap`."""
    idstr = encode_idstr(message.block)
    head = _frame(MigRpMsg.RECV_BITMAP, bytes((len(idstr),)) + idstr)
    return head + encode_bitmap(message)


def encode_unknown(message: UnknownReturnPathMessage) -> bytes:
    """A message that is in no table; ValueError for a type that is."""
    if message.type in _KNOWN:
        raise ValueError(f"{message.NAME}: type {message.type} is {MigRpMsg(message.type).name}")
    if not 0 <= message.type <= 0xFFFF:
        raise ValueError(f"{message.NAME}: type {message.type}; 0 to 0xffff fits")
    if len(message.payload) > 0xFFFF:
        raise ValueError(f"{message.NAME}: {len(message.payload)} bytes; {0xFFFF} fit")
    return _frame(message.type, message.payload)


def _frame(number: int, payload: bytes) -> bytes:
    encoded: bytes = MESSAGE.build({"type": number, "len": len(payload), "payload": payload})
    return encoded


# ---- decoding

_set_start = ReqPages.__dict__["start"].__set__
_set_length = ReqPages.__dict__["length"].__set__


def decode_requests(view: memoryview, offset: int, count: int) -> list[ReqPages]:
    """As many of the `count` messages at `view[offset:]` as are REQ_PAGES, in order.

    The messages are built field by field, without a call of Python code for each; `starmap` hands
    its tuples on as they are, where `map` would make one for each call.
    """
    records = np.frombuffer(view, _REQUEST_DTYPE, count, offset)
    heads = np.ndarray(count, ">u4", view, offset, (REQUEST.size,))
    others = np.flatnonzero(heads != _REQUEST_HEAD_WORD)
    if len(others):
        count = int(others[0])
        records = records[:count]
    requests: list[ReqPages] = list(starmap(object.__new__, repeat((ReqPages,), count)))
    deque(starmap(_set_start, zip(requests, records["start"].tolist(), strict=True)), maxlen=0)
    deque(starmap(_set_length, zip(requests, records["length"].tolist(), strict=True)), maxlen=0)
    return requests


def decode_req_pages_id(record: memoryview, limit: int) -> ReqPagesId:
    """One whole REQ_PAGES_ID, frame included; its name may have `limit` bytes."""
    if len(record) < _REQUEST_ID_HEAD.size:
        raise malformed(
            f"{len(record) - FRAME_SIZE} bytes of payload; at least {_REQUEST_ID_LEN + 1} are "
            "expected",
            ReqPagesId.NAME,
        )
    _, length, start, size, name_size = _REQUEST_ID_HEAD.unpack_from(record)
    if length != _REQUEST_ID_LEN + name_size:
        raise malformed(
            f"{length} bytes of payload with a name of {name_size}; "
            f"{_REQUEST_ID_LEN + name_size} are expected",
            ReqPagesId.NAME,
        )
    return ReqPagesId(start, size, checked_idstr(record[_REQUEST_ID_HEAD.size :], limit))


class ReturnPathDecoder(Decoder):
    """The return path -> messages: what a source reads.

    With `strict=False` a type that is in no table comes as `UnknownReturnPathMessage`. A stream
    may end between any two messages: whether a SHUT was due is for the connection to say.
    """

    _BATCH = 512  # requests decoded at once: bounds what is read ahead
    _FEW = 8  # below so many, one by one is faster than vectors

    def __init__(self, *, limits: Limits | None = None, strict: bool = True) -> None:
        super().__init__(Channel.RETURN, limits or Limits())
        self._strict = strict
        self._requests: list[ReqPages] = []  # decoded ahead, the next one last
        self._in_requests = False  # whether the last event was one of them

    @property
    def offset(self) -> int:
        """Stream offset in bytes of what the next event will be read from."""
        return self._buffer.offset - REQUEST.size * len(self._requests)

    @property
    def event_offset(self) -> int:
        """Stream offset in bytes at which the event returned last began."""
        return self.offset - REQUEST.size if self._in_requests else self._event_offset

    def next_event(self) -> Message | NeedData:
        """As `Decoder.next_event`; requests that arrived together were decoded together."""
        if self._requests:
            return self._requests.pop()
        if self._in_requests:
            self._event_offset, self._in_requests = self.event_offset, False
        buffer = self._buffer
        if buffer.pos == buffer.end and self._error is None and not (buffer.pending or buffer.eof):
            return NEED_DATA  # as found out below, but not by an exception
        return super().next_event()

    def __iter__(self) -> Iterator[Message]:
        """As `Decoder`; the faster way through many requests."""
        while True:
            while self._requests:
                yield self._requests.pop()
            event = self.next_event()
            if isinstance(event, NeedData):
                return
            yield event
            if isinstance(event, EndOfStream):
                return

    def _read(self) -> Message:
        buffer = self._buffer
        if buffer.end - buffer.pos >= REQUEST.size:
            # The message that counts, without a detour.
            kind, length, start, size = REQUEST.unpack_from(buffer.view, buffer.pos)
            if kind == 4 and length == 12:
                return self._read_requests(start, size)
        head = buffer.peek(FRAME_SIZE)
        if head == _REQUEST_HEAD:
            _, _, start, size = REQUEST.unpack(buffer.peek(REQUEST.size))
            return self._read_requests(start, size)
        number, length = int.from_bytes(head[:2], "big"), int.from_bytes(head[2:], "big")
        self._check(number, length)
        if number == MigRpMsg.RECV_BITMAP:
            return self._read_bitmap(length)
        record = buffer.peek(FRAME_SIZE + length)
        if number == MigRpMsg.REQ_PAGES_ID:
            message: Message = decode_req_pages_id(record, self._limits.idstr)
        else:
            message = self._decode(number, record[FRAME_SIZE:])
        buffer.skip(len(record))
        return message

    def _read_requests(self, start: int, length: int) -> ReqPages:
        """The REQ_PAGES at the read position, whose fields these are, and those behind it."""
        buffer = self._buffer
        count = (buffer.end - buffer.pos) // REQUEST.size
        if count < self._FEW:
            buffer.skip(REQUEST.size)
            return ReqPages(start, length)
        requests = decode_requests(buffer.view, buffer.pos, min(count, self._BATCH))
        buffer.skip(REQUEST.size * len(requests))
        requests.reverse()
        self._requests, self._in_requests = requests, True
        return requests.pop()

    def _check(self, number: int, length: int) -> None:
        if number == MigRpMsg.INVALID or (self._strict and number not in _KNOWN):
            raise RemoteProtocolError(
                f"message type {number:#x} is unknown; 1 to {max(MigRpMsg).value} are in the table",
                kind=ErrorKind.UNKNOWN,
                message="MIG_RP_MSG",
            )
        name = MigRpMsg(number).name if number in _KNOWN else UnknownReturnPathMessage.NAME
        if length > self._limits.return_path_bytes:
            raise RemoteProtocolError(
                f"{length} bytes of payload; the limit is {self._limits.return_path_bytes}",
                kind=ErrorKind.LIMIT,
                message=name,
            )
        expected = RP_CMD_ARGS.get(number, length)
        if length != expected:
            raise malformed(f"{length} bytes of payload; {expected} are expected", name)

    def _decode(self, number: int, payload: memoryview) -> Message:
        codec = _CODECS.get(number)
        if codec is None:
            return UnknownReturnPathMessage(number, bytes(payload))
        message: Message = codec.decode(payload)
        if isinstance(message, ResumeAck) and message.value != RESUME_ACK_VALUE:
            raise RemoteProtocolError(
                f"value {message.value:#x}; it must be {RESUME_ACK_VALUE}",
                kind=ErrorKind.MISMATCH,
                message=message.NAME,
            )
        return message

    def _read_bitmap(self, length: int) -> ReceivedBitmap:
        buffer = self._buffer
        payload = buffer.peek(FRAME_SIZE + length)[FRAME_SIZE:]
        if not length or length != 1 + payload[0]:
            raise malformed(
                f"{length} bytes of payload; the name and its length byte fill them",
                ReceivedBitmap.NAME,
            )
        block = checked_idstr(payload[1:], self._limits.idstr)
        body = FRAME_SIZE + length + BITMAP_SIZE_BYTES
        size = int.from_bytes(buffer.peek(body)[-BITMAP_SIZE_BYTES:], "big")
        self._check_bitmap_size(size)
        record = buffer.peek(body + size + BITMAP_END_BYTES)
        try:
            tail = BITMAP_SCHEMA.parse(record[body - BITMAP_SIZE_BYTES :])
        except ConstructError:
            raise malformed(
                f"{bytes(record[-BITMAP_END_BYTES:]).hex()} behind the bitmap; its end mark is due",
                ReceivedBitmap.NAME,
            ) from None
        buffer.skip(len(record))
        return ReceivedBitmap(block, tail.bitmap)

    def _check_bitmap_size(self, size: int) -> None:
        if size > self._limits.bitmap_bytes:
            raise RemoteProtocolError(
                f"bitmap of {size} bytes; the limit is {self._limits.bitmap_bytes}",
                kind=ErrorKind.LIMIT,
                message=ReceivedBitmap.NAME,
            )
        if size == 0 or size % UNIT:
            raise malformed(
                f"bitmap of {size} bytes; a multiple of {UNIT} above 0 is expected",
                ReceivedBitmap.NAME,
            )

    def _at_end(self) -> EndOfStream:
        if self._buffer.pending:
            return self._broke_off("a return path message")
        return EndOfStream(self._buffer.total, clean=True)
