"""The discard phase of a whole VM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from postcopy_proto.dirty.bitmap import DirtyBitmap
from postcopy_proto.dirty.discards import DiscardWriter, whole_pages
from postcopy_proto.ramblock import TARGET_PAGE_SIZE, RAMBlock


class DiscardPlan:
    """What to discard and what to send: made by `plan_discards`, iterated once or more.

    Iteration gives memoryviews of whole commands, each good until the next one is asked for.
    """

    def __init__(
        self, blocks: Sequence[RAMBlock], dirty: dict[str, DirtyBitmap], page_size: int
    ) -> None:
        self._blocks = blocks
        self._page_size = page_size
        self.dirty = dirty
        """the pages to be sent, by block: all that is discarded, a copy of its own"""
        self.range_count = 0
        """ranges of the last iteration, so far as its blocks are complete"""
        self.command_count = 0
        """commands, likewise"""

    def __iter__(self) -> Iterator[memoryview]:
        self.range_count = self.command_count = 0
        for block in self._blocks:
            writer = DiscardWriter(
                block,
                self.dirty[block.idstr],
                page_size=self._page_size,
                host_page_size=self._page_size,
                first_page=0,
                page_count=None,
            )
            yield from writer.pieces()
            self.range_count += writer.range_count
            self.command_count += writer.command_count


def plan_discards(
    blocks: Sequence[RAMBlock],
    dirty: Mapping[str, DirtyBitmap],
    *,
    page_size: int = TARGET_PAGE_SIZE,
) -> DiscardPlan:
    """The discard phase of a VM: `blocks` in the source's order, and a bitmap for each.

    Host pages that are partly dirty become wholly dirty. Stock destinations (5.2 to 11.1) refuse
    to run unless at least one discard came; so if nothing at all is dirty, the first host page of
    the first block with the smallest host pages is marked, to be discarded and sent again: no
    page is cheaper. (A range of length 0 happens to pass as well, but only happens to.)

    ValueError, before any byte: no block or only empty ones, a block without bitmap or a bitmap
    without block, two blocks of one name, a bitmap whose size is not its block's, a block that is
    no whole number of host pages, a host page smaller than `page_size`.
    """
    names = [block.idstr for block in blocks]
    if len(set(names)) != len(names) or set(names) != set(dirty):
        raise ValueError(f"bitmaps of {sorted(dirty)} for blocks {names}; one for each is needed")
    widened = {}
    for block in blocks:
        bitmap = dirty[block.idstr]
        if bitmap.page_count != whole_pages(block, page_size):
            raise ValueError(
                f"bitmap of {bitmap.page_count} pages for {block.idstr!r}; "
                f"it has {whole_pages(block, page_size)}"
            )
        widened[block.idstr] = bitmap.copy()
        widened[block.idstr].widen(page_size, block.page_size)
    if not any(bitmap.bits.any() for bitmap in widened.values()):
        _mark_one_host_page(blocks, widened, page_size)
    return DiscardPlan(blocks, widened, page_size)


def _mark_one_host_page(
    blocks: Sequence[RAMBlock], dirty: dict[str, DirtyBitmap], page_size: int
) -> None:
    candidates = [block for block in blocks if block.used_length]
    if not candidates:
        raise ValueError("no page in any block; a destination needs at least one discard")
    cheapest = min(candidates, key=lambda block: block.page_size)
    dirty[cheapest.idstr].set(0, cheapest.page_size // page_size)
