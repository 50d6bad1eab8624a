"""POSTCOPY_RAM_DISCARD: ranges of one block that the destination is to forget.

Sent after the VM has stopped and before the package, because every page named here is sent again
later. QEMU: migration/savevm.c `qemu_savevm_send_postcopy_ram_discard` builds it,
`loadvm_postcopy_ram_handle_discard` reads it, migration/postcopy-ram.c batches the ranges.

The command, an item of the main stream (all integers big-endian, n bytes of name, k ranges):

    offset      bytes  field
    0           1      0x08, QEMU_VM_COMMAND
    1           2      0x0006, MIG_CMD_POSTCOPY_RAM_DISCARD
    3           2      length of the payload: 3 + n + 16 k
    -- payload --
    5           1      version, 0
    6           1      n, 1 to 255
    7           n      RAMBlock idstr, without a NUL
    7+n         1      0x00
    8+n+16i     8      start of range i, a byte offset inside the block
    16+n+16i    8      length of range i in bytes

A sender puts 1 to 12 ranges into a command, ascending and apart; a receiver takes as many as the
16 bits of the length allow (4095), in any order, also empty ones.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from functools import reduce
from itertools import chain
from operator import add, or_

from construct import Const, GreedyBytes, GreedyRange, Int8ub, Int64ub, Prefixed, Struct, Terminated

from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.messages import PostcopyRamDiscard
from postcopy_proto.ramblock import ByteRange, RAMBlock, decode_idstr, encode_idstr
from postcopy_proto.wire.fields import fixed_struct

COMMAND_SECTION = 0x08
"""QEMU_VM_COMMAND, the item type that announces any command"""

COMMAND = 6
"""MIG_CMD_POSTCOPY_RAM_DISCARD"""

VERSION = 0
"""postcopy_ram_discard_version of every QEMU so far"""

MAX_RANGES = 12
"""Ranges that a sender puts into one command (MAX_DISCARDS_PER_COMMAND): about 200 bytes."""

RANGE_SCHEMA = Struct("start" / Int64ub, "length" / Int64ub)
"""One range, both fields in bytes."""

DISCARD_SCHEMA = Struct(
    "version" / Const(VERSION, Int8ub),
    "idstr" / Prefixed(Int8ub, GreedyBytes),
    Const(b"\0"),
    "ranges" / GreedyRange(RANGE_SCHEMA),
    Terminated,
)
"""The payload. `Terminated` turns what GreedyRange leaves of a broken range into an error."""

RANGE = fixed_struct(RANGE_SCHEMA)
"""The fast form of RANGE_SCHEMA, derived from it."""

_ENVELOPE = struct.Struct(">BHH")
_PREFIX_BYTES = 2  # version and n, before the name
_MAX_PAYLOAD = 0xFFFF  # the envelope counts it in 16 bits
_U64_BYTES = 8
_END_OF_OFFSETS = 1 << 64


def encode_discard(message: PostcopyRamDiscard) -> bytes:
    """The payload of one command, without its envelope.

    ValueError for a name that is not 1 to 255 bytes without NUL, for no range at all, for a range
    that does not fit 64 bits or ends beyond 2^64, and for more ranges than 16 bits can count.
    """
    if not message.ranges:
        raise ValueError(f"a discard of {message.block!r} without ranges: at least 1 is needed")
    for start, length in message.ranges:
        fits = 0 <= start < _END_OF_OFFSETS and 0 <= length < _END_OF_OFFSETS
        if not fits or start + length > _END_OF_OFFSETS:
            raise ValueError(
                f"range at {start} of {length} bytes of {message.block!r} leaves 0 to 2^64"
            )
    prefix = _prefix(message.block)
    if len(prefix) + RANGE.size * len(message.ranges) > _MAX_PAYLOAD:
        most = (_MAX_PAYLOAD - len(prefix)) // RANGE.size
        raise ValueError(
            f"{len(message.ranges)} ranges of {message.block!r} in one command; {most} fit"
        )
    fields = chain.from_iterable(message.ranges)
    return prefix + struct.pack(f">{2 * len(message.ranges)}Q", *fields)


def command_head(block: str, range_count: int) -> bytes:
    """All of a command that precedes its ranges: the envelope and the payload up to the NUL.

    With the `range_count` * 16 bytes of the ranges behind it, it is a whole command, ready to be
    sent. ValueError as for `encode_discard`.
    """
    prefix = _prefix(block)
    length = len(prefix) + RANGE.size * range_count
    if range_count < 1 or length > _MAX_PAYLOAD:
        most = (_MAX_PAYLOAD - len(prefix)) // RANGE.size
        raise ValueError(f"{range_count} ranges in one command of {block!r}; 1 to {most} fit")
    return _ENVELOPE.pack(COMMAND_SECTION, COMMAND, length) + prefix


def _prefix(block: str) -> bytes:
    idstr = encode_idstr(block)
    return bytes((VERSION, len(idstr))) + idstr + b"\0"


def decode_discard(
    payload: bytes | bytearray | memoryview,
    *,
    offset: int | None = None,
    blocks: Mapping[str, RAMBlock] | None = None,
) -> PostcopyRamDiscard:
    """The message in one command's payload, which must end exactly with a range.

    `offset` is the stream offset of the payload's first byte, for errors. With `blocks` each range
    must lie inside its block and on its host pages; without, it must end at 2^64 or before.
    RemoteProtocolError otherwise, at the offending byte.

    Stricter than QEMU in what could not be meant: no range at all, a NUL inside the name, a name
    that runs past the payload (QEMU subtracts in 16 bits), a range that wraps around 2^64.
    """
    size = len(payload)
    if size < _PREFIX_BYTES:
        raise _refused(f"{size} bytes of payload; at least 20 are needed", offset)
    version, name_size = payload[0], payload[1]
    if version != VERSION:
        raise _refused(f"version {version}; only {VERSION} is known", offset, 0, ErrorKind.MISMATCH)
    if name_size == 0:
        raise _refused("RAMBlock name of 0 bytes; 1 to 255 are allowed", offset, 1)
    nul = _PREFIX_BYTES + name_size
    first_range = nul + 1
    if first_range > size:
        raise _refused(f"RAMBlock name of {name_size} bytes in {size} bytes of payload", offset, 1)
    if payload[nul] != 0:
        raise _refused(f"{payload[nul]:#04x} after the RAMBlock name; 0x00 ends it", offset, nul)
    name = bytes(payload[_PREFIX_BYTES:nul])
    if 0 in name:
        raise _refused("NUL inside the RAMBlock name", offset, _PREFIX_BYTES + name.index(0))
    if size == first_range:
        raise _refused("no range; at least 1 is needed", offset, first_range)
    stray = (size - first_range) % RANGE.size
    if stray:
        raise _refused(
            f"{stray} stray bytes after the last whole range of {RANGE.size}", offset, size - stray
        )

    idstr = decode_idstr(name)
    block = None
    if blocks is not None:
        block = blocks.get(idstr)
        if block is None:
            raise _refused(f"unknown RAMBlock {idstr!r}", offset, _PREFIX_BYTES, ErrorKind.UNKNOWN)
    fields = struct.unpack(f">{(size - first_range) // _U64_BYTES}Q", payload[first_range:])
    ranges = tuple(map(ByteRange, fields[0::2], fields[1::2]))
    alignment = 1 if block is None else block.page_size
    end = _END_OF_OFFSETS if block is None else block.used_length
    # All ranges at once: asking each costs ten times as much, and nearly all are right.
    if reduce(or_, fields) & (alignment - 1) or max(map(add, fields[0::2], fields[1::2])) > end:
        index, reason = _first_misplaced(ranges, alignment, end)
        where = first_range + index * RANGE.size
        raise _refused(f"range {index} of {idstr!r} {reason}", offset, where, ErrorKind.RANGE)
    return PostcopyRamDiscard(idstr, ranges)


def _first_misplaced(ranges: Iterable[ByteRange], alignment: int, end: int) -> tuple[int, str]:
    """Index of the first range that is not aligned or ends too late, and what is wrong with it."""
    return next(
        (index, f"({start:#x}, {length:#x}) {reason}")
        for index, (start, length) in enumerate(ranges)
        for wrong, reason in (
            ((start | length) & (alignment - 1), f"is not on host pages of {alignment} bytes"),
            (start + length > end, f"ends beyond {end:#x} bytes"),
        )
        if wrong
    )


def _refused(
    reason: str,
    offset: int | None,
    position: int = 0,
    kind: ErrorKind = ErrorKind.MALFORMED,
) -> RemoteProtocolError:
    return RemoteProtocolError(
        reason,
        kind=kind,
        channel=Channel.FORWARD,
        offset=None if offset is None else offset + position,
        message=PostcopyRamDiscard.NAME,
    )
