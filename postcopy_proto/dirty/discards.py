"""From runs of dirty pages to POSTCOPY_RAM_DISCARD commands.

QEMU: migration/postcopy-ram.c `postcopy_discard_send_init`, `_range`, `_finish`, walked by
migration/ram.c `postcopy_send_discard_bm_ram`. A command holds up to 12 ranges of one block and is
sent when the twelfth is queued; what is left goes out at the end of the block.

`DiscardEncoder` takes the runs one by one; `iter_discards` takes a bitmap and does the same to
thousands of runs at once. The bytes are equal.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from postcopy_proto.dirty.bitmap import (
    DirtyBitmap,
    pages_per_host_page,
    require_whole_host_pages,
)
from postcopy_proto.dirty.edges import EdgeFinder, Pages64
from postcopy_proto.dirty.words import Words
from postcopy_proto.ramblock import TARGET_PAGE_SIZE, ByteRange, RAMBlock, is_power_of_two
from postcopy_proto.wire.discard import MAX_RANGES, RANGE, command_head

trace = logging.getLogger("postcopy_proto.trace")

PIECE_BYTES = 1 << 20
"""One send: large enough that its system call does not count, small enough for the cache."""

_KEPT_BYTES = 8 << 20
_LONGEST_COMMAND = 512
_EDGES_PER_COMMAND = 2 * MAX_RANGES
_END_OF_OFFSETS = 1 << 64
_NO_EDGES = np.zeros(0, np.int64)


class DiscardEncoder:
    """Turns runs into commands, one run at a time.

    Pages are counted as the bitmap counts them: `first_page` is the bit of the block's first page,
    for a bitmap that covers several blocks. ValueError when `page_size` is no power of two or the
    block is no whole number of pages.
    """

    def __init__(
        self, block: RAMBlock, page_size: int = TARGET_PAGE_SIZE, first_page: int = 0
    ) -> None:
        if first_page < 0:
            raise ValueError(f"first page {first_page} of {block.idstr!r}; 0 is the least")
        self._end = first_page + whole_pages(block, page_size)
        self._block = block.idstr
        self._page_size = page_size
        self._first_page = first_page
        self._next = first_page
        self._queue: list[ByteRange] = []
        self.range_count = 0
        """ranges queued so far"""
        self.command_count = 0
        """commands given out so far"""

    def add(self, start_page: int, page_count: int) -> bytes:
        """Queue one run: a whole command each time 12 are queued, else b"".

        ValueError for an empty run, one outside the block, and one that begins before the last one
        ended.
        """
        if page_count < 1 or start_page < self._next or start_page + page_count > self._end:
            raise ValueError(
                f"run of {page_count} pages at page {start_page} of {self._block!r}; "
                f"pages {self._next} to {self._end} are left"
            )
        self._next = start_page + page_count
        start = (start_page - self._first_page) * self._page_size
        length = page_count * self._page_size
        trace.debug(
            "postcopy_discard_send_range block=%s start=%#x length=%#x", self._block, start, length
        )
        self._queue.append(ByteRange(start, length))
        self.range_count += 1
        return self._command() if len(self._queue) == MAX_RANGES else b""

    def finish(self) -> bytes:
        """The command with the ranges that are still queued, or b"" when there are none."""
        last = self._command() if self._queue else b""
        _trace_finish(self._block, self.range_count, self.command_count)
        return last

    def _command(self) -> bytes:
        head = command_head(self._block, len(self._queue))
        ranges = b"".join(RANGE.pack(*byte_range) for byte_range in self._queue)
        self._queue.clear()
        self.command_count += 1
        return head + ranges


def _trace_finish(block: str, ranges: int, commands: int) -> None:
    trace.debug(
        "postcopy_discard_send_finish block=%s ranges=%d commands=%d", block, ranges, commands
    )


def whole_pages(block: RAMBlock, page_size: int) -> int:
    """Pages of the block; `page_size` in bytes.

    ValueError when the page size is no power of two, when the block is no whole number of pages,
    and when it has more bytes than 64 bits can count.
    """
    size = block.used_length
    if not is_power_of_two(page_size):
        raise ValueError(f"page size {page_size} is no power of two")
    if size % page_size or size >= _END_OF_OFFSETS:
        raise ValueError(
            f"{block.idstr!r} has {size} bytes; whole pages of {page_size} below 2^64 are needed"
        )
    return size // page_size


def iter_discards(
    block: RAMBlock,
    bitmap: DirtyBitmap,
    *,
    page_size: int = TARGET_PAGE_SIZE,
    host_page_size: int | None = None,
    first_page: int = 0,
    page_count: int | None = None,
) -> Iterator[memoryview]:
    """The commands that discard what is dirty in a block, whole ones, in pieces of about 1 MiB.

    Each piece is ready for one send, and good until the next one is asked for. Nothing comes of a
    block without dirty pages.

    `first_page` is the bit of the block's first page, for a bitmap that covers several blocks;
    `page_count` limits the walk to the block's first pages. `page_size` and `host_page_size` are
    in bytes; with host pages larger than pages, by default the block's own, partly dirty ones are
    discarded whole. The bitmap stays as it is: `DirtyBitmap.widen` gives the pages that must then
    be sent.

    Besides the bitmap this takes less than 16 MiB, whatever the guest's size.

    ValueError, before the first byte, for a page size that is no power of two, a host page smaller
    than a page, a block or `page_count` that is no whole number of host pages, and a bitmap that
    does not hold all of the pages.
    """
    return DiscardWriter(
        block,
        bitmap,
        page_size=page_size,
        host_page_size=host_page_size,
        first_page=first_page,
        page_count=page_count,
    ).pieces()


def encode_discards(
    block: RAMBlock,
    bitmap: DirtyBitmap,
    *,
    page_size: int = TARGET_PAGE_SIZE,
    host_page_size: int | None = None,
    first_page: int = 0,
    page_count: int | None = None,
) -> bytes:
    """The pieces of `iter_discards` joined: what `DiscardEncoder` gives for all runs."""
    return b"".join(
        bytes(piece)
        for piece in iter_discards(
            block,
            bitmap,
            page_size=page_size,
            host_page_size=host_page_size,
            first_page=first_page,
            page_count=page_count,
        )
    )


class DiscardWriter:
    """The commands of one block, and how many there are once they are written."""

    def __init__(
        self,
        block: RAMBlock,
        bitmap: DirtyBitmap,
        *,
        page_size: int,
        host_page_size: int | None,
        first_page: int,
        page_count: int | None,
    ) -> None:
        self._pages = pages_per_host_page(
            page_size, block.page_size if host_page_size is None else host_page_size
        )
        block_pages = whole_pages(block, page_size)
        self._page_count = block_pages if page_count is None else page_count
        if not 0 <= self._page_count <= block_pages:
            raise ValueError(f"{page_count} pages of {block.idstr!r}; it has {block_pages}")
        require_whole_host_pages(self._page_count, self._pages)
        if first_page < 0 or first_page + self._page_count > bitmap.page_count:
            raise ValueError(
                f"{self._page_count} pages of {block.idstr!r} from page {first_page} of a bitmap "
                f"of {bitmap.page_count} pages"
            )
        self._block = block.idstr
        self._page_shift = page_size.bit_length() - 1
        self._words = Words(bitmap.bits, first_page, self._page_count)
        self.range_count = 0
        self.command_count = 0

    def pieces(self) -> Iterator[memoryview]:
        """See `iter_discards`."""
        memory = _spare.pop() if _spare else _Memory()
        try:
            yield from self._pieces(memory)
        finally:
            _spare.append(memory)

    def _pieces(self, memory: _Memory) -> Iterator[memoryview]:
        output = _Output(memory.output, command_head(self._block, MAX_RANGES))
        left = _NO_EDGES
        for edges in memory.finder.edges(self._words, self._pages, _EDGES_PER_COMMAND):
            whole = len(edges) - len(edges) % _EDGES_PER_COMMAND
            yield from output.add(self._ranges(edges[:whole]))
            left = edges[whole:]
        last = b""
        if len(left):
            last = command_head(self._block, len(left) // 2) + self._ranges(left).tobytes()
        self.range_count = output.row_count * MAX_RANGES + len(left) // 2
        self.command_count = output.row_count + bool(last)
        _trace_finish(self._block, self.range_count, self.command_count)
        yield from output.finish(last)

    def _ranges(self, edges: Pages64) -> Pages64:
        """The edges of whole runs as ranges in the wire's form, in place."""
        runs = edges.reshape(-1, 2)
        runs[:, 1] -= runs[:, 0]
        edges <<= self._page_shift
        return edges.byteswap(inplace=True)


class _Output:
    """Rows of one whole command each, in memory that is used again for every piece.

    Commands of 12 ranges differ in their ranges only: a head is written when its row is first
    used. Ranges are stored as one item of 192 bytes, which takes numpy two thirds of the time that
    24 integers or 192 bytes take.
    """

    def __init__(self, memory: NDArray[np.uint8], head: bytes) -> None:
        self._head = np.void(head)
        row = np.dtype([("head", f"V{len(head)}"), ("ranges", f"V{MAX_RANGES * RANGE.size}")])
        rows = memory[: PIECE_BYTES // row.itemsize * row.itemsize].view(row)
        self._heads, self._ranges = rows["head"], rows["ranges"]
        self._row_bytes = row.itemsize
        self._bytes = memoryview(memory.data)
        self._used = 0
        self._with_head = 0
        self.row_count = 0

    def add(self, ranges: Pages64) -> Iterator[memoryview]:
        """Append whole commands; gives every piece that becomes full."""
        commands = ranges.view(self._ranges.dtype)
        while len(commands):
            fit = commands[: len(self._ranges) - self._used]
            self._append(fit)
            commands = commands[len(fit) :]
            if self._used == len(self._ranges):
                yield self._bytes[: self._used * self._row_bytes]
                self._used = 0

    def _append(self, commands: NDArray[np.void]) -> None:
        end = self._used + len(commands)
        if end > self._with_head:
            self._heads[self._with_head : end] = self._head
            self._with_head = end
        self._ranges[self._used : end] = commands
        self._used = end
        self.row_count += len(commands)

    def finish(self, last: bytes) -> Iterator[memoryview]:
        """The last piece, with a shorter command at its end, unless there is nothing in it."""
        end = self._used * self._row_bytes
        self._bytes[end : end + len(last)] = last
        if end + len(last):
            yield self._bytes[: end + len(last)]


class _Memory:
    """Working memory of one walk, kept for the next."""

    def __init__(self) -> None:
        # glibc gives memory back to the kernel when more than twice the largest mapped block ever
        # freed is free at the heap's end. Temporaries would go back and come again, page fault by
        # page fault, a thousand times a bitmap; once this block is freed they stay.
        np.empty(_KEPT_BYTES, np.uint8)
        self.finder = EdgeFinder()
        self.output = np.empty(PIECE_BYTES + _LONGEST_COMMAND, np.uint8)


_spare: list[_Memory] = []
"""Working memory that no walk is using: as many as there ever were walks at one time."""
