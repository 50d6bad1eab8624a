"""QEMU's save stream as a store: `migrate exec:cat>FILE`, `savevm`-like files, our own receive."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from postcopy_proto import messages as m
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.savefile.index import open_index
from postcopy_proto.savefile.pages import ZERO, PageReader
from postcopy_proto.savefile.source import Progress, ReadOnlyFile, with_page_sizes


class SaveStream:
    """A `SavedVm` in a save stream that begins at `stream_at` of the file.

    The file is indexed unless its index is there already; see index.py. `page_sizes`: host page
    in bytes, by block, where the destination's is not a base page.
    """

    def __init__(
        self,
        file: ReadOnlyFile,
        configuration: m.Configuration,
        target_page_size: int,
        *,
        stream_at: int = 0,
        page_sizes: Mapping[str, int] | None = None,
        cache: bool = True,
        progress: Progress | None = None,
    ) -> None:
        self.configuration = configuration
        self.target_page_size = target_page_size
        self._file = file
        self._index = open_index(file, stream_at, target_page_size, cache=cache, progress=progress)
        text = self._index.text
        self.section_id = text.section_id
        blocks = [RAMBlock(idstr, length) for idstr, length in text.blocks]
        self.blocks = with_page_sizes(blocks, page_sizes or {}, target_page_size)
        self.device_state = file.read(*text.device_state)
        self._reader = PageReader(file, self._index.descriptor, target_page_size)

    def zero_pages(self, block: str, pages: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Which of these pages are zero pages, shape (n,)."""
        zero: NDArray[np.bool_] = self._index.arrays[block][pages] == ZERO
        return zero

    def read_pages(self, block: str, pages: NDArray[np.intp]) -> NDArray[np.uint8]:
        """The pages' bytes, shape (n, target page size); good until the next call."""
        return self._reader.read(self._index.arrays[block][pages])

    def read_page(self, block: str, page: int) -> memoryview | None:
        """One page's bytes, None for a zero page; good until the next call."""
        return self._reader.read_page(self._index.arrays[block].item(page))

    def close(self) -> None:
        """Close the file and its index."""
        self._index.close()
        self._file.close()
