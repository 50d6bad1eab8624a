"""Reading RAM records out of a buffer, in batches.

QEMU: migration/ram.c `ram_load_precopy`, `ram_load_postcopy`, `ram_block_from_stream`; the layout
stands in pages.py. Page payload is never copied: a batch points into the received chunk.

A mix of pages and zero pages is read by a loop over records; once a run of one kind has gone on
for a while, the headers that follow at its stride are checked together by numpy, in steps that
grow fourfold as long as all of them belong to the run.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from postcopy_proto.errors import ErrorKind, RemoteProtocolError
from postcopy_proto.messages import (
    CompressedPage,
    Message,
    MultifdFlush,
    Pages,
    RamEos,
    XbzrlePage,
)
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.wire.buffer import ReceiveBuffer
from postcopy_proto.wire.fields import checked_idstr, malformed
from postcopy_proto.wire.limits import Limits
from postcopy_proto.wire.pages import (
    COMPRESS_PAGE,
    CONTINUE,
    ENCODING_FLAG_XBZRLE,
    EOS,
    FULL,
    HOOK,
    MEM_SIZE,
    MULTIFD_FLUSH,
    PAGE,
    WORD_SIZE,
    XBZRLE,
    ZERO,
    ZERO_RECORD,
    RamSaveFlag,
    check_page_size,
    compress_bound,
)

BATCH = 4096
"""Records in one batch at most: bounds the arrays of an event, whatever the chunk's size."""

RUN = 16
"""Records of one kind in a row after which the next ones are looked at by numpy."""

_WORD = struct.Struct(">Q")


@functools.cache
def _records_of(count: int, page_size: int) -> struct.Struct:
    """The words of so many PAGE records with CONTINUE, one behind the other."""
    return struct.Struct(">" + f"Q{page_size}x" * count)


class RamReader:
    """The records of one channel; remembers the block that CONTINUE refers to.

    `blocks` bounds names and offsets; None where no block list is known (recovery, a preempt
    channel by itself): then any name goes, and offsets end at `limits.block_length`.
    """

    def __init__(
        self,
        buffer: ReceiveBuffer,
        blocks: Mapping[str, RAMBlock] | None,
        target_page_size: int,
        limits: Limits,
    ) -> None:
        self.blocks = blocks
        self._buffer = buffer
        self._limits = limits
        self._page_size = check_page_size(target_page_size)
        self._low = target_page_size - 1
        self._block: str | None = None
        self._end = 0  # where the offsets of self._block end, in bytes

    def peek_word(self) -> int:
        """The word of the next record."""
        word: int = _WORD.unpack(self._buffer.peek(WORD_SIZE))[0]
        return word

    def read(self, word: int) -> Message:
        """Take the record that opens with `word`, or the batch of page records from it on.

        NeedMoreError when not even the first record is whole.

        RemoteProtocolError for what QEMU refuses, and for MEM_SIZE: a block list opens a START
        section and stands nowhere else.
        """
        flags = word & self._low
        kind = flags & ~CONTINUE
        if kind in (PAGE, ZERO):
            return self._read_pages(word - flags, flags)
        if kind in (XBZRLE, COMPRESS_PAGE):
            return self._read_encoded(word - flags, flags)
        if word == EOS:
            self._buffer.skip(WORD_SIZE)
            return RamEos()
        if word == MULTIFD_FLUSH:
            self._buffer.skip(WORD_SIZE)
            return MultifdFlush()
        raise self._refused(word, flags)

    def _refused(self, word: int, flags: int) -> RemoteProtocolError:
        if flags in (EOS, MULTIFD_FLUSH):
            return malformed(
                f"{RamSaveFlag(flags).name} with offset {word - flags:#x}; it has none", "RAM"
            )
        unsupported = {
            FULL: "RAM_SAVE_FLAG_FULL is obsolete since 2009",
            HOOK: "RAM_SAVE_FLAG_HOOK belongs to RDMA, which has no stream to read",
        }
        if flags & ~CONTINUE in unsupported:
            return RemoteProtocolError(
                unsupported[flags & ~CONTINUE], kind=ErrorKind.UNSUPPORTED, message="RAM"
            )
        if flags == MEM_SIZE:
            return RemoteProtocolError(
                "a block list, which only opens a START section",
                kind=ErrorKind.STATE,
                message="MEM_SIZE",
            )
        return RemoteProtocolError(
            f"unknown combination of flags {flags:#x} in word {word:#x}",
            kind=ErrorKind.UNKNOWN,
            message="RAM",
        )

    # ---- names and bounds

    def _head_size(self, flags: int) -> int:
        """Bytes of the record before its body; settles which block it belongs to."""
        if flags & CONTINUE:
            if self._block is None:
                raise malformed("CONTINUE without a block named before on this channel", "RAM")
            return WORD_SIZE
        size = WORD_SIZE + 1 + self._buffer.peek(WORD_SIZE + 1)[WORD_SIZE]
        name = checked_idstr(self._buffer.peek(size)[WORD_SIZE + 1 :], self._limits.idstr)
        self._block, self._end = name, self._end_of(name)
        return size

    def _end_of(self, name: str) -> int:
        if self.blocks is None:
            return self._limits.block_length
        block = self.blocks.get(name)
        if block is None:
            raise RemoteProtocolError(
                f"RAMBlock {name!r} is not in the block list",
                kind=ErrorKind.UNKNOWN,
                message="RAM",
            )
        return -(-block.used_length // self._page_size) * self._page_size

    def _check_offset(self, offset: int) -> None:
        if offset >= self._end:
            raise RemoteProtocolError(
                f"page at {offset:#x} of RAMBlock {self._block!r}, which ends at {self._end:#x}",
                kind=ErrorKind.RANGE,
                message="RAM",
            )

    # ---- XBZRLE and COMPRESS_PAGE

    def _read_encoded(self, offset: int, flags: int) -> Message:
        buffer = self._buffer
        head = self._head_size(flags)
        self._check_offset(offset)
        assert self._block is not None
        if flags & XBZRLE:
            body, bound, name = head + 3, self._page_size, XbzrlePage.NAME
            if buffer.peek(head + 1)[head] != ENCODING_FLAG_XBZRLE:
                raise malformed(
                    f"encoding {buffer.peek(head + 1)[head]:#04x}; "
                    f"{ENCODING_FLAG_XBZRLE:#04x} is known",
                    name,
                )
            length = int.from_bytes(buffer.peek(body)[head + 1 :], "big")
        else:
            body, bound, name = head + 4, compress_bound(self._page_size), CompressedPage.NAME
            length = int.from_bytes(buffer.peek(body)[head:], "big")
        if length > bound:
            raise malformed(f"{length} bytes for a page; at most {bound} are possible", name)
        data = bytes(buffer.peek(body + length)[body:])
        buffer.skip(body + length)
        named = not flags & CONTINUE
        if flags & XBZRLE:
            return XbzrlePage(self._block, offset, data, named)
        return CompressedPage(self._block, offset, data, named)

    # ---- PAGE and ZERO

    def _read_pages(self, offset: int, flags: int) -> Pages:
        """A batch: one record, which may carry the name, and those behind it that have CONTINUE.

        The first record is waited for; what follows it is taken as far as it is whole and right,
        and what is wrong is refused when it is the first of its own batch.
        """
        buffer = self._buffer
        head = self._head_size(flags)
        self._check_offset(offset)
        assert self._block is not None
        is_zero = flags & ZERO
        record = buffer.peek(head + (1 if is_zero else self._page_size))
        if is_zero and record[head]:
            raise malformed(f"a zero page with fill byte {record[head]:#04x}; it must be 0", "ZERO")
        start, size, body = buffer.pos, len(record), -1 if is_zero else head
        if start + size == buffer.end:
            # Alone, as pages on the preempt channel are, and records torn by the end of a chunk.
            offsets, positions = np.array((offset,), np.uint64), np.array((body,), np.int64)
        else:
            batch = _Batch(buffer.view[start : buffer.end], self._page_size, self._end)
            batch.add(offset, body, size)
            batch.extend()
            offsets, positions, size = batch.offsets(), batch.positions(), batch.size
        buffer.skip(size)
        data = buffer.view[start : start + size]
        return Pages(self._block, offsets, positions, data, self._page_size, not flags & CONTINUE)


class _Batch:
    """Records of one block, collected from the start of `view` on.

    `size` is how many bytes they are. A record that is torn, wrong or of another sort is not
    taken, and ends the batch: it will be the first of the next one.
    """

    def __init__(self, view: memoryview, page_size: int, block_end: int) -> None:
        self.size = 0
        self._view = view
        self._low = page_size - 1
        self._high = np.uint64((1 << 64) - page_size)
        self._page_record = WORD_SIZE + page_size
        self._block_end = block_end
        self._words: list[int] = []  # what the loop takes, flags still in it
        self._positions: list[int] = []
        self._runs: list[tuple[NDArray[np.uint64], NDArray[np.int64]]] = []  # what was vectorised
        self._room = BATCH

    def add(self, word: int, position: int, size: int) -> None:
        """Take the first record, which is known to be right, and its size."""
        self._words.append(word)
        self._positions.append(position)
        self.size = size

    def extend(self) -> None:
        """Take the records behind that have CONTINUE."""
        view, end, unpack = self._view, len(self._view), _WORD.unpack_from
        low, page_record, block_end = self._low, self._page_record, self._block_end
        words, positions = self._words, self._positions
        run, run_flags = self._extend_foretold(), PAGE | CONTINUE
        pos = self.size
        while len(words) < self._room and pos + WORD_SIZE <= end:
            (word,) = unpack(view, pos)
            flags = word & low
            if flags == PAGE | CONTINUE:
                body, after = pos + WORD_SIZE, pos + page_record
            elif flags == ZERO | CONTINUE:
                body, after = -1, pos + ZERO_RECORD
            else:
                break
            if after > end or word >= block_end or (body < 0 and view[pos + WORD_SIZE]):
                break
            words.append(word)
            positions.append(body)
            pos = after
            if flags != run_flags:
                run, run_flags = 1, flags
                continue
            run += 1
            if run == RUN:
                self._end_run()
                pos = self._extend_run(pos, flags)
                words, positions, run = self._words, self._positions, 0
        self.size = pos

    def _extend_foretold(self) -> int:
        """Take pages that go on where the first one ends, as most do; returns how many.

        Their words are known beforehand and compared all at once. From RUN on that is no gain.
        """
        page_size, size = self._low + 1, self._page_record
        count = min(RUN - 1, (len(self._view) - self.size) // size)
        word = (self._words[0] | PAGE | CONTINUE) + page_size
        words = tuple(range(word, word + count * page_size, page_size))
        if not words or words[-1] >= self._block_end:
            return 0
        if _records_of(count, page_size).unpack_from(self._view, self.size) != words:
            return 0
        self._words += words
        self._positions += range(self.size + WORD_SIZE, self.size + count * size, size)
        self.size += count * size
        return count

    def _extend_run(self, pos: int, flags: int) -> int:
        """Take records of one kind from `pos` on, many at a time; returns where they end."""
        size = self._page_record if flags & PAGE else ZERO_RECORD
        step = 4 * RUN
        while count := min(step, self._room, (len(self._view) - pos) // size):
            words = np.ndarray(count, ">u8", self._view, pos, (size,)).astype(np.uint64)
            good = (words & np.uint64(self._low) == flags) & (words < self._block_end)
            if flags & ZERO:
                good &= np.ndarray(count, np.uint8, self._view, pos + WORD_SIZE, (size,)) == 0
            taken = count if good.all() else int(good.argmin())
            bodies = np.full(taken, -1, np.int64)
            if flags & PAGE:
                bodies = np.arange(taken, dtype=np.int64) * size + (pos + WORD_SIZE)
            self._keep(words[:taken], bodies)
            pos += taken * size
            if taken < step:
                break
            step *= 4
        return pos

    def _end_run(self) -> None:
        """Put what the loop took behind what was vectorised."""
        self._keep(np.array(self._words, np.uint64), np.array(self._positions, np.int64))
        self._words, self._positions = [], []

    def _keep(self, words: NDArray[np.uint64], positions: NDArray[np.int64]) -> None:
        self._runs.append((words, positions))
        self._room -= len(words)

    def offsets(self) -> NDArray[np.uint64]:
        """The byte offset in the block of each record's page."""
        words = _joined([words for words, _ in self._runs], self._words, np.uint64)
        words &= self._high
        return words

    def positions(self) -> NDArray[np.int64]:
        """Where each record's page starts in the view; -1 for a zero page."""
        return _joined([positions for _, positions in self._runs], self._positions, np.int64)


def _joined(runs: list[NDArray[Any]], rest: list[int], dtype: type[np.generic]) -> NDArray[Any]:
    last: NDArray[Any] = np.array(rest, dtype)
    return np.concatenate([*runs, last]) if runs else last
