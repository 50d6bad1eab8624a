"""RAM records: the data plane. Their layout, building them in batches, joining batches.

QEMU: migration/ram.c `save_page_header`, `save_zero_page`, `save_normal_page`, `ram_load_precopy`,
`ram_load_postcopy`, `ram_block_from_stream`; flags RAM_SAVE_FLAG_*. All integers big-endian; P is
the target page size, n bytes of name.

    0    8  word: byte offset in the block, with flags in the bits below P
    8    1  n             only without CONTINUE, and only with a flag that names a page
    9    n  idstr
    .    .  body

    flag                body
    0x001 FULL          obsolete, never sent
    0x002 ZERO          u8 fill, 0
    0x004 MEM_SIZE      the block list, see block_list.py
    0x008 PAGE          P bytes
    0x010 EOS           nothing; the whole word is 0x10
    0x020 CONTINUE      modifier: the block of the page before, on this channel
    0x040 XBZRLE        u8 0x01 (ENCODING_FLAG_XBZRLE), u16 len, len bytes; len <= P
    0x080 HOOK          RDMA only
    0x100 COMPRESS_PAGE u32 len, len bytes of zlib; len <= compressBound(P)
    0x200 MULTIFD_FLUSH nothing; the whole word is 0x200

CONTINUE reaches across sections. QEMU matches `flags & ~CONTINUE` exactly, so no two of the others
ever stand together. QEMU ignores the offset bits of EOS and MULTIFD_FLUSH; here they must be 0.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntFlag

import numpy as np
from construct import (
    Bytes,
    Const,
    Construct,
    GreedyBytes,
    If,
    Int8ub,
    Int16ub,
    Int32ub,
    Int64ub,
    Prefixed,
    Struct,
    Switch,
    this,
)
from numpy.typing import ArrayLike, NDArray

from postcopy_proto.messages import (
    CompressedPage,
    Message,
    MultifdFlush,
    Pages,
    RamEos,
    XbzrlePage,
)
from postcopy_proto.ramblock import TARGET_PAGE_SIZE, encode_idstr
from postcopy_proto.wire.fields import Idstr


class RamSaveFlag(IntFlag):
    """RAM_SAVE_FLAG_*, in the low bits of a record's word."""

    FULL = 0x001
    ZERO = 0x002
    MEM_SIZE = 0x004
    PAGE = 0x008
    EOS = 0x010
    CONTINUE = 0x020
    XBZRLE = 0x040
    HOOK = 0x080
    COMPRESS_PAGE = 0x100
    MULTIFD_FLUSH = 0x200


# As plain integers: arithmetic with IntFlag is slow.
FULL, ZERO, MEM_SIZE, PAGE, EOS, CONTINUE, XBZRLE, HOOK, COMPRESS_PAGE, MULTIFD_FLUSH = map(
    int, RamSaveFlag
)

WORD_SIZE = 8
"""bytes of the word that opens every record"""
ZERO_RECORD = WORD_SIZE + 1
"""bytes of a ZERO record with CONTINUE"""
ENCODING_FLAG_XBZRLE = 0x01
SMALLEST_PAGE_SIZE = 1024
"""flags need the low 10 bits of the word"""

_WORD = struct.Struct(">Q")
_PAGE_FLAGS = np.array([PAGE | CONTINUE, ZERO | CONTINUE], np.uint64)  # by "is a zero page"
_LONG_RUN = 8  # records: as long as a run's numpy calls take for them one by one

NAMING = PAGE | ZERO | XBZRLE | COMPRESS_PAGE
"""the flags with which a name follows unless CONTINUE is set"""


def compress_bound(page_size: int) -> int:
    """zlib's compressBound: the most bytes that deflating a page can give."""
    return page_size + (page_size >> 12) + (page_size >> 14) + (page_size >> 25) + 13


def ram_record(page_size: int = TARGET_PAGE_SIZE) -> Construct:
    """The schema of one record, whatever its flags, but for MEM_SIZE's list."""
    low = page_size - 1
    return Struct(
        "word" / Int64ub,
        "idstr" / If(this.word & CONTINUE == 0, If(this.word & NAMING != 0, Idstr)),
        "body"
        / Switch(
            this.word & (low & ~CONTINUE),
            {
                ZERO: Struct("fill" / Const(0, Int8ub)),
                PAGE: Struct("page" / Bytes(page_size)),
                XBZRLE: Struct(
                    "encoding" / Const(ENCODING_FLAG_XBZRLE, Int8ub),
                    "encoded" / Prefixed(Int16ub, GreedyBytes),
                ),
                COMPRESS_PAGE: Struct("compressed" / Prefixed(Int32ub, GreedyBytes)),
            },
        ),
    )


def check_page_size(page_size: int) -> int:
    """`page_size` itself; ValueError unless it is a power of two of at least 1024 bytes."""
    if page_size < SMALLEST_PAGE_SIZE or page_size & (page_size - 1):
        raise ValueError(
            f"target page size {page_size}; a power of two of at least {SMALLEST_PAGE_SIZE}"
        )
    return page_size


# ---- building


def encode_pages(
    block: str,
    offsets: ArrayLike,
    zero: ArrayLike,
    rows: NDArray[np.uint8],
    *,
    named: bool,
    out: bytearray | memoryview | NDArray[np.uint8] | None = None,
) -> memoryview:
    """The records of a batch of pages of one block, built without a loop over pages in Python.

    `offsets`: byte offsets in the block, shape (n,). `zero`: which of them are zero pages, bool,
    shape (n,). `rows`: the bytes of the others in order, uint8, one row a page, shape (count of
    pages that are not zero, page size); rows may be any strided view. The first record carries
    the block's name if `named`, all others CONTINUE. `out`, if given, is written to from its
    first byte; the result is a view of what was used of it.

    ValueError when shapes don't agree, an offset is not on a page, the name is no name, or `out`
    is too small. Mirrors QEMU's `save_page_header`, `save_zero_page`, `save_normal_page`.
    """
    places = np.asarray(offsets)
    is_zero = np.asarray(zero, np.bool_)
    page_size = _check_batch(places, is_zero, rows)
    name = encode_idstr(block)
    prefix = bytes((len(name),)) + name if named and len(places) else b""

    total = len(prefix) + len(places) * ZERO_RECORD + len(rows) * (page_size - 1)
    target = np.empty(total, np.uint8) if out is None else np.frombuffer(out, np.uint8)
    if len(target) < total:
        raise ValueError(f"out has {len(target)} bytes; the records need {total}")
    words = places.astype(np.uint64)
    words |= _PAGE_FLAGS.take(is_zero)
    if not prefix:
        _put_records(target, words, is_zero, rows)
        return target.data[:total]

    size = WORD_SIZE + len(prefix) + (1 if is_zero[0] else page_size)
    row = 0 if is_zero[0] else 1
    _put_named(target[:size], int(words[0]) & ~CONTINUE, prefix, rows[:row])
    _put_records(target[size:], words[1:], is_zero[1:], rows[row:])
    return target.data[:total]


def _check_batch(
    places: NDArray[np.integer], is_zero: NDArray[np.bool_], rows: NDArray[np.uint8]
) -> int:
    """The page size of a batch whose parts agree; ValueError otherwise."""
    if places.ndim != 1 or places.dtype.kind not in "iu" or is_zero.shape != places.shape:
        raise ValueError(
            f"offsets of {places.dtype} and shape {places.shape}, zero of shape {is_zero.shape}; "
            "integers and bools of the same length are needed"
        )
    pages = len(places) - int(np.count_nonzero(is_zero))
    if rows.ndim != 2 or rows.dtype != np.uint8 or len(rows) != pages:
        raise ValueError(
            f"rows of {rows.dtype} and shape {rows.shape}; uint8 and {pages} rows are needed"
        )
    page_size = check_page_size(rows.shape[1])
    merged = int(np.bitwise_or.reduce(places)) if len(places) else 0
    if merged < 0 or merged & (page_size - 1):
        wrong = next(at for at in places.tolist() if at < 0 or at % page_size)
        raise ValueError(f"offset {wrong} is not on a page of {page_size} bytes")
    return page_size


def _put_named(target: NDArray[np.uint8], word: int, prefix: bytes, row: NDArray[np.uint8]) -> None:
    """The record that fills `target`, with a name; `row` is empty for a zero page."""
    head = word.to_bytes(WORD_SIZE, "big") + prefix
    target[: len(head)] = np.frombuffer(head, np.uint8)
    target[len(head) :] = row[0] if len(row) else 0


def _put_records(
    target: NDArray[np.uint8],
    words: NDArray[np.uint64],
    is_zero: NDArray[np.bool_],
    rows: NDArray[np.uint8],
) -> None:
    """Records with CONTINUE from the start of `target` on.

    A run of one kind has one stride and is written by numpy in two assignments. Where runs are
    short on average, that costs more than a loop over records.
    """
    ends = [*(np.flatnonzero(is_zero[1:] != is_zero[:-1]) + 1).tolist(), len(words)]
    if len(words) < _LONG_RUN * len(ends):
        _put_each(target.data, words.tolist(), rows)
        return
    position = first = row = 0
    for end in ends:
        count = end - first
        taken = 0 if is_zero[first] else count
        size = WORD_SIZE + (rows.shape[1] if taken else 1)
        records = target[position : position + count * size].reshape(count, size)
        heads = words[first:end].astype(">u8").view(np.uint8)
        records[:, :WORD_SIZE] = heads.reshape(count, WORD_SIZE)
        records[:, WORD_SIZE:] = rows[row : row + taken] if taken else 0
        first, row, position = end, row + taken, position + count * size


def _put_each(view: memoryview, words: list[int], rows: NDArray[np.uint8]) -> None:
    pack_into, page_size, bodies, position = _WORD.pack_into, rows.shape[1], iter(rows), 0
    for word in words:
        pack_into(view, position, word)
        position += WORD_SIZE
        if word & ZERO:
            view[position] = 0
            position += 1
        else:
            view[position : position + page_size] = next(bodies)
            position += page_size


def encode_page(block: str, offset: int, content: bytes | memoryview | None, named: bool) -> bytes:
    """The record of one page: what `encode_pages` gives for it, at a tenth of the cost.

    `content` is None for a zero page. Nothing is checked.
    """
    word = offset | (ZERO if content is None else PAGE)
    if named:
        name = encode_idstr(block)
        head = word.to_bytes(WORD_SIZE, "big") + bytes((len(name),)) + name
    else:
        head = (word | CONTINUE).to_bytes(WORD_SIZE, "big")
    return head + (b"\0" if content is None else content)


def encode_batch(message: Pages) -> bytes:
    """The records of a batch as it was decoded; ValueError as `encode_pages`."""
    return bytes(
        encode_pages(
            message.block, message.offsets, message.zero, payload_rows(message), named=message.named
        )
    )


def payload_rows(message: Pages) -> NDArray[np.uint8]:
    """The bytes of a batch's pages that are not zero: uint8, shape (count, page size).

    A view where they lie at one stride in the batch's data, a copy otherwise.
    """
    size = message.page_size
    positions = message.positions[message.positions >= 0]
    data = np.frombuffer(message.data, np.uint8)
    if not len(positions):
        return np.empty((0, size), np.uint8)
    if positions.max() + size > len(data):
        raise ValueError(f"{message.NAME}: a page at {positions.max()} of {len(data)} bytes")
    steps = np.diff(positions)
    if len(steps) and (steps[0] < size or (steps != steps[0]).any()):
        windows = np.lib.stride_tricks.sliding_window_view(data, size)
        return windows[positions]
    step = int(steps[0]) if len(steps) else size
    return np.ndarray((len(positions), size), np.uint8, data, int(positions[0]), (step, 1))


def encode_eos(message: RamEos) -> bytes:
    """The word that ends RAM's part of a section."""
    return EOS.to_bytes(WORD_SIZE, "big")


def encode_multifd_flush(message: MultifdFlush) -> bytes:
    """The word that asks for a multifd synchronisation."""
    return MULTIFD_FLUSH.to_bytes(WORD_SIZE, "big")


def encode_xbzrle(message: XbzrlePage, page_size: int = TARGET_PAGE_SIZE) -> bytes:
    """An XBZRLE record; ValueError when the encoding is longer than a page."""
    size = len(message.encoded)
    if size > page_size:
        raise ValueError(f"{message.NAME}: {size} bytes; at most a page of {page_size}")
    length = bytes((ENCODING_FLAG_XBZRLE,)) + size.to_bytes(2, "big")
    return _encode_special(message, XBZRLE, page_size) + length + bytes(message.encoded)


def encode_compressed(message: CompressedPage, page_size: int = TARGET_PAGE_SIZE) -> bytes:
    """A COMPRESS_PAGE record; ValueError when it is longer than deflating a page can give."""
    size, bound = len(message.compressed), compress_bound(page_size)
    if size > bound:
        raise ValueError(f"{message.NAME}: {size} bytes; at most {bound}")
    head = _encode_special(message, COMPRESS_PAGE, page_size)
    return head + size.to_bytes(4, "big") + bytes(message.compressed)


def _encode_special(message: XbzrlePage | CompressedPage, flag: int, page_size: int) -> bytes:
    if message.offset % page_size or not 0 <= message.offset < 1 << 64:
        raise ValueError(
            f"{message.NAME}: offset {message.offset} is not on a page of {page_size} bytes "
            "below 2^64"
        )
    name = encode_idstr(message.block)
    if not message.named:
        return (message.offset | flag | CONTINUE).to_bytes(WORD_SIZE, "big")
    return (message.offset | flag).to_bytes(WORD_SIZE, "big") + bytes((len(name),)) + name


# ---- comparing


def join_pages(events: Iterable[Message]) -> list[Message]:
    """The events with adjacent batches of one block merged, however the input was cut.

    Two decodings of the same bytes give equal lists. Payload is copied.
    """
    joined: list[Message] = []
    batches: list[Pages] = []
    for event in events:
        continues = (
            isinstance(event, Pages)
            and bool(batches)
            and not event.named
            and event.block == batches[0].block
            and event.page_size == batches[0].page_size
        )
        if batches and not continues:
            joined.append(_merge(batches))
            batches = []
        if isinstance(event, Pages):
            batches.append(event)
        else:
            joined.append(event)
    if batches:
        joined.append(_merge(batches))
    return joined


def _merge(batches: list[Pages]) -> Pages:
    size = batches[0].page_size
    zero = np.concatenate([batch.zero for batch in batches])
    positions = np.full(len(zero), -1, np.int64)
    positions[~zero] = np.arange(np.count_nonzero(~zero), dtype=np.int64) * size
    return Pages(
        block=batches[0].block,
        offsets=np.concatenate([batch.offsets for batch in batches]),
        positions=positions,
        data=memoryview(b"".join(payload_rows(batch).tobytes() for batch in batches)),
        page_size=size,
        named=batches[0].named,
    )
