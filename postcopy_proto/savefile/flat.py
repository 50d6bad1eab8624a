"""Raw RAM as a store: one file a block, as `pmemsave`, `cp /dev/shm/…` or a test writes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from postcopy_proto.ramblock import TARGET_PAGE_SIZE, RAMBlock
from postcopy_proto.savefile.pages import PageReader
from postcopy_proto.savefile.source import ReadOnlyFile, with_page_sizes


class FlatRam:
    """A `PageStore` over one file of raw memory a block; no device state, no configuration.

    `files` says which file is which block. ValueError for a file that is empty or does not end
    on a target page.
    """

    def __init__(
        self,
        files: Mapping[str, Path | str],
        *,
        page_sizes: Mapping[str, int] | None = None,
        target_page_size: int = TARGET_PAGE_SIZE,
    ) -> None:
        self._page_size = target_page_size
        self._files = {idstr: ReadOnlyFile(path) for idstr, path in files.items()}
        for file in self._files.values():
            if file.size == 0 or file.size % target_page_size:
                raise ValueError(
                    f"{file.path}: {file.size} bytes are no pages of {target_page_size}"
                )
        self._readers = {
            idstr: PageReader(file, -1, target_page_size) for idstr, file in self._files.items()
        }
        blocks = [RAMBlock(idstr, file.size) for idstr, file in self._files.items()]
        self.blocks = with_page_sizes(blocks, page_sizes or {}, target_page_size)

    def zero_pages(self, block: str, pages: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Which of these pages hold only zeros, shape (n,)."""
        rows = np.ascontiguousarray(self.read_pages(block, pages))
        zero: NDArray[np.bool_] = ~np.any(rows.view(np.uint64), axis=1)
        return zero

    def read_pages(self, block: str, pages: NDArray[np.intp]) -> NDArray[np.uint8]:
        """The pages' bytes, shape (n, target page size); good until the next call."""
        return self._readers[block].read(pages.astype(np.int64) * self._page_size)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
