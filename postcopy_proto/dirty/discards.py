"""From runs of dirty pages to POSTCOPY_RAM_DISCARD commands.

QEMU: migration/postcopy-ram.c `postcopy_discard_send_init`, `_range`, `_finish`, walked by
migration/ram.c `postcopy_send_discard_bm_ram`. A command holds up to 12 ranges of one block and is
sent when the twelfth is queued; what is left goes out at the end of the block.

`DiscardEncoder` takes the runs one by one; `iter_discards` takes a bitmap and does the same to
thousands of runs at once. The bytes are equal.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from postcopy_proto.dirty.bitmap import (
    DirtyBitmap,
    pages_per_host_page,
    require_whole_host_pages,
)
from postcopy_proto.dirty.edges import MAX_EDGES, Pages64, iter_edges
from postcopy_proto.dirty.words import Words
from postcopy_proto.ramblock import TARGET_PAGE_SIZE, ByteRange, RAMBlock, is_power_of_two
from postcopy_proto.wire.discard import MAX_RANGES, RANGE, command_head

PIECE_BYTES = 1 << 20
_EDGES_PER_COMMAND = 2 * MAX_RANGES
_END_OF_OFFSETS = 1 << 64


class DiscardEncoder:
    """Turns runs into commands, one run at a time.

    Pages are counted as the bitmap counts them: `first_page` is the bit of the block's first page,
    for a bitmap that covers several blocks. ValueError when `page_size` is no power of two or the
    block is no whole number of pages.
    """

    def __init__(
        self, block: RAMBlock, page_size: int = TARGET_PAGE_SIZE, first_page: int = 0
    ) -> None:
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
        self._queue.append(ByteRange(start, page_count * self._page_size))
        self.range_count += 1
        return self._command() if len(self._queue) == MAX_RANGES else b""

    def finish(self) -> bytes:
        """The command with the ranges that are still queued, or b"" when there are none."""
        return self._command() if self._queue else b""

    def _command(self) -> bytes:
        head = command_head(self._block, len(self._queue))
        ranges = b"".join(RANGE.pack(*byte_range) for byte_range in self._queue)
        self._queue.clear()
        self.command_count += 1
        return head + ranges


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
    """The commands that discard what is dirty in a block, in pieces of about 1 MiB."""
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
    """The pieces of `iter_discards` joined."""
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
        self._pages = pages_per_host_page(page_size, host_page_size or block.page_size)
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
        head = command_head(self._block, MAX_RANGES)
        ranges_bytes = MAX_RANGES * RANGE.size
        row = np.dtype([("head", f"V{len(head)}"), ("ranges", f"V{ranges_bytes}")])
        capacity = max(1, PIECE_BYTES // row.itemsize)
        buffer = np.empty((capacity + 1) * row.itemsize, np.uint8)
        rows = buffer.view(row)
        rows["head"] = np.void(head)
        room = rows["ranges"]
        out = memoryview(buffer.data)
        queue = np.empty(MAX_EDGES + _EDGES_PER_COMMAND, np.int64)
        queued = filled = 0
        for edges in iter_edges(self._words, self._page_count, self._pages):
            queue[queued : queued + len(edges)] = edges
            queued += len(edges)
            done = 0
            while (commands := (queued - done) // _EDGES_PER_COMMAND) > 0:
                commands = min(commands, capacity - filled)
                stop = done + commands * _EDGES_PER_COMMAND
                room[filled : filled + commands] = self._ranges(queue[done:stop]).view(room.dtype)
                filled += commands
                done = stop
                self.command_count += commands
                if filled == capacity:
                    yield out[: filled * row.itemsize]
                    filled = 0
            queue[: queued - done] = queue[done:queued]
            queued -= done
        end = filled * row.itemsize
        self.range_count = self.command_count * MAX_RANGES + queued // 2
        if queued:
            last = command_head(self._block, queued // 2) + self._ranges(queue[:queued]).tobytes()
            out[end : end + len(last)] = last
            end += len(last)
            self.command_count += 1
        if end:
            yield out[:end]

    def _ranges(self, edges: Pages64) -> Pages64:
        """The edges of whole runs as ranges in the wire's form, in place."""
        runs = edges.reshape(-1, 2)
        runs[:, 1] -= runs[:, 0]
        edges <<= self._page_shift
        return edges.byteswap(inplace=True)
