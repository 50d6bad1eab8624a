"""DirtyBitmap: one bit for each target page of a block.

The layout is QEMU's own on little-endian hosts: page i is bit i mod 8 of byte i div 8
(include/qemu/bitmap.h, include/exec/ramblock.h `bmap` and `receivedmap`). The same class serves
for what is dirty and for what has been received.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bitarray import bitarray
from bitarray.util import zeros

from postcopy_proto.dirty.words import Words, widen_words
from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.messages import ReceivedBitmap
from postcopy_proto.ramblock import is_power_of_two
from postcopy_proto.wire.bitmap import bitmap_size

_LITTLE = "little"


class DirtyBitmap:
    """`page_count` bits, all clear. ValueError when `page_count` is negative.

    Page ranges are (first page, number of pages); a range that leaves the bitmap is a ValueError.
    """

    __slots__ = ("bits", "page_count")

    bits: bitarray
    """The bits, bit order little. Over borrowed memory they run on to the end of the last byte:
    what lies at `page_count` and beyond has no meaning."""

    page_count: int

    def __init__(self, page_count: int) -> None:
        if page_count < 0:
            raise ValueError(f"a bitmap of {page_count} pages; 0 is the least")
        self.bits = zeros(page_count, _LITTLE)
        self.page_count = page_count

    @classmethod
    def from_buffer(cls, buffer: Any, page_count: int) -> DirtyBitmap:
        """A bitmap that lies in someone else's memory, without a copy.

        `buffer` is any C-contiguous object with the buffer protocol: bytes, mmap, a numpy array, a
        dump of QEMU's bitmap. Changes go both ways; over read-only memory nothing can be set or
        cleared (TypeError). ValueError when it holds fewer than `page_count` bits.
        """
        memory = memoryview(buffer).cast("B")
        size = (page_count + 7) // 8
        if page_count < 0 or size > len(memory):
            raise ValueError(f"{page_count} pages in {len(memory)} bytes; {size} are needed")
        return cls._of(bitarray(buffer=memory[:size], endian=_LITTLE), page_count)

    @classmethod
    def from_bits(cls, bits: bitarray) -> DirtyBitmap:
        """A bitmap of `len(bits)` pages that shares `bits`; ValueError unless its order is little.

        Bits may change as long as their number does not.
        """
        if bits.endian != _LITTLE:
            raise ValueError(f"bit order {bits.endian}; {_LITTLE} is QEMU's")
        return cls._of(bits, len(bits))

    @classmethod
    def _of(cls, bits: bitarray, page_count: int) -> DirtyBitmap:
        bitmap = cls.__new__(cls)
        bitmap.bits = bits
        bitmap.page_count = page_count
        return bitmap

    def copy(self) -> DirtyBitmap:
        """An equal bitmap in memory of its own."""
        return self._of(bitarray(self.bits[: self.page_count]), self.page_count)

    # ---- single pages and ranges

    def __len__(self) -> int:
        return self.page_count

    def __getitem__(self, page: int) -> bool:
        self._require(page, 1)
        return bool(self.bits[page])

    def set(self, first: int, count: int = 1) -> None:
        """Mark the pages [first, first + count)."""
        self._require(first, count)
        self.bits[first : first + count] = True

    def clear(self, first: int, count: int = 1) -> None:
        """Unmark the pages [first, first + count)."""
        self._require(first, count)
        self.bits[first : first + count] = False

    def count(self, first: int = 0, count: int | None = None) -> int:
        """How many of the pages [first, first + count) are marked; by default of all."""
        return self.bits.count(1, first, self._end(first, count))

    def runs(self, first: int = 0, count: int | None = None) -> Iterator[tuple[int, int]]:
        """The maximal (start page, page count) of marked pages, ascending, cut to the range.

        The plain walk, about 0.3 us a run; `iter_discards` is for whole bitmaps.
        """
        end = self._end(first, count)
        start = self.bits.find(1, first, end)
        while start >= 0:
            stop = self.bits.find(0, start, end)
            if stop < 0:
                stop = end
            yield start, stop - start
            start = self.bits.find(1, stop, end)

    def _end(self, first: int, count: int | None) -> int:
        if count is None:
            count = self.page_count - first
        self._require(first, count)
        return first + count

    def _require(self, first: int, count: int) -> None:
        if first < 0 or count < 0 or first + count > self.page_count:
            raise ValueError(
                f"pages {first} to {first + count} of a bitmap of {self.page_count} pages"
            )

    # ---- whole bitmaps

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DirtyBitmap):
            return NotImplemented
        return self.page_count == other.page_count and self._exact() == other._exact()

    __hash__ = None  # type: ignore[assignment]

    def __or__(self, other: DirtyBitmap) -> DirtyBitmap:
        """The pages marked in either; ValueError when the sizes differ."""
        union = self.copy()
        union |= other
        return union

    def __ior__(self, other: DirtyBitmap) -> DirtyBitmap:
        if other.page_count != self.page_count:
            raise ValueError(f"union of bitmaps of {self.page_count} and {other.page_count} pages")
        if len(self.bits) == len(other.bits):
            self.bits |= other.bits
        else:
            self.bits[: self.page_count] |= other._exact()
        return self

    def __invert__(self) -> DirtyBitmap:
        """The pages that are not marked."""
        complement = self.copy()
        complement.bits.invert()
        return complement

    def _exact(self) -> bitarray:
        """The bits without what lies beyond the last page; a copy only if there is some."""
        return self.bits if len(self.bits) == self.page_count else self.bits[: self.page_count]

    def widen(self, page_size: int, host_page_size: int) -> None:
        """Mark all target pages of every host page that has one marked, in place.

        Sizes in bytes. A destination drops and places whole host pages only, so a source must
        discard and send them whole (migration/ram.c `postcopy_chunk_hostpages_pass`).
        ValueError when a size is no power of two, when the host page is the smaller one, and when
        the bitmap is not a whole number of host pages.
        """
        pages = pages_per_host_page(page_size, host_page_size)
        require_whole_host_pages(self.page_count, pages)
        if pages == 1:
            return
        words = Words(self.bits, 0, self.page_count)
        step = words.step(pages)
        for first in range(0, words.count, step):
            chunk = words.copy_of(first, min(first + step, words.count))
            widen_words(chunk, pages)
            words.store(first, chunk)

    def __repr__(self) -> str:
        return f"<DirtyBitmap {self.count()} of {self.page_count} pages>"

    # ---- recovery

    def to_received(self, block: str) -> ReceivedBitmap:
        """As the received bitmap of `block` that a destination answers RECV_BITMAP with."""
        data = self._exact().tobytes().ljust(bitmap_size(self.page_count), b"\0")
        return ReceivedBitmap(block, data)

    @classmethod
    def from_received(cls, message: ReceivedBitmap, page_count: int) -> DirtyBitmap:
        """The pages that a destination has; its complement is what a source must still send.

        Padding is ignored. RemoteProtocolError when the size is not that of `page_count` pages
        (migration/ram.c `ram_dirty_bitmap_reload`).
        """
        expected = bitmap_size(page_count)
        if len(message.bitmap) != expected:
            raise RemoteProtocolError(
                f"bitmap of {len(message.bitmap)} bytes for {message.block!r}; "
                f"{page_count} pages need {expected}",
                kind=ErrorKind.MISMATCH,
                channel=Channel.RETURN,
                message=message.NAME,
            )
        bits = bitarray(endian=_LITTLE)
        bits.frombytes(message.bitmap)
        del bits[page_count:]
        return cls._of(bits, page_count)


def pages_per_host_page(page_size: int, host_page_size: int) -> int:
    """How many target pages a host page has, a power of two; sizes in bytes.

    ValueError when a size is no power of two, or the host page is smaller than the target page.
    """
    for name, size in (("page size", page_size), ("host page size", host_page_size)):
        if not is_power_of_two(size):
            raise ValueError(f"{name} {size} is no power of two")
    if host_page_size < page_size:
        raise ValueError(f"host page of {host_page_size} bytes; {page_size}, a page, is the least")
    return host_page_size // page_size


def require_whole_host_pages(page_count: int, pages: int) -> None:
    """ValueError unless `page_count` is a multiple of `pages`, the target pages of a host page."""
    if page_count % pages:
        raise ValueError(f"{page_count} pages are no whole number of host pages of {pages} pages")
