"""Reading pages by what an index says of them: see index.py for the values."""

from __future__ import annotations

import os
import zlib

import numpy as np
from numpy.typing import NDArray

from postcopy_proto.errors import ErrorKind
from postcopy_proto.savefile.source import ReadOnlyFile, broken
from postcopy_proto.wire.pages import compress_bound

ZERO = -1
"""a zero page, or one that the file does not have: RAM starts as zeros"""
COMPRESSED = -2
"""first of the values that stand for compressed pages"""
PATCHED = 1 << 62
"""added to offsets in the index file"""

WASTE = 2
"""How many times the bytes wanted may be read in one call to spare a call a page."""


class PageReader:
    """Reads target pages from a save file into one buffer that is used again and again."""

    def __init__(self, file: ReadOnlyFile, patches: int, page_size: int) -> None:
        self._file = file
        self._patches = patches
        self._page_size = page_size
        self._buffer = np.empty(0, np.uint8)
        self._rows = np.empty((0, page_size), np.uint8)
        self._page = memoryview(bytearray(page_size))

    def read_page(self, value: int) -> memoryview | None:
        """As `read`, for one value; None for a zero page."""
        if value == ZERO:
            return None
        if 0 <= value < PATCHED:
            self._file.read_into(self._page, value)
        else:
            self._page[:] = self._read_scattered(np.array([value]))[0].data
        return self._page

    def read(self, values: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The pages that these values of an index stand for, shape (n, page size).

        Good until the next call; a view of what was read where the pages lie at one distance
        from each other. RemoteProtocolError when the file has not what the index says.
        """
        if len(values) < 2:
            return self._read_scattered(values)
        first, last = int(values[0]), int(values[-1])
        steps = np.diff(values)
        wanted = len(values) * self._page_size
        extent = last - first + self._page_size
        plain = first >= 0 and last < PATCHED and not (steps < 0).any()
        if not plain or extent > WASTE * wanted:
            return self._read_scattered(values)
        data = self._read_extent(first, extent)
        step = int(steps[0])
        if step >= self._page_size and (steps == step).all():
            return np.ndarray((len(values), self._page_size), np.uint8, data, 0, (step, 1))
        windows = np.lib.stride_tricks.sliding_window_view(data, self._page_size)
        return windows[values - first]

    def _read_extent(self, offset: int, length: int) -> NDArray[np.uint8]:
        if len(self._buffer) < length:
            self._buffer = np.empty(length, np.uint8)
        data = self._buffer[:length]
        self._file.read_into(data.data, offset)
        return data

    def _read_scattered(self, values: NDArray[np.int64]) -> NDArray[np.uint8]:
        if len(self._rows) < len(values):
            self._rows = np.empty((len(values), self._page_size), np.uint8)
        rows = self._rows[: len(values)]
        for row, value in zip(rows, values.tolist(), strict=True):
            if value == ZERO:
                row[:] = 0
            elif value <= COMPRESSED:
                row[:] = np.frombuffer(self._inflate(COMPRESSED - value), np.uint8)
            elif value >= PATCHED:
                os.preadv(self._patches, [row.data], value - PATCHED)
            else:
                self._file.read_into(row.data, value)
        return rows

    def _inflate(self, length_at: int) -> bytes:
        """The page of the COMPRESS_PAGE record whose u32 length stands there."""
        length = int.from_bytes(self._file.read(length_at, 4), "big")
        if length > compress_bound(self._page_size):
            raise broken(f"a compressed page of {length} bytes", length_at)
        stream = zlib.decompressobj()
        try:
            page = stream.decompress(self._file.read(length_at + 4, length), self._page_size)
        except zlib.error as error:
            raise broken(f"a compressed page that can't be inflated: {error}", length_at) from error
        if len(page) != self._page_size:
            raise broken(
                f"a compressed page of {len(page)} bytes", length_at, kind=ErrorKind.MISMATCH
            )
        return page
