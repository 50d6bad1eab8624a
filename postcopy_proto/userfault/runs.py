"""How a batch of pages falls into runs: what one ioctl or one copy can take at once."""

from __future__ import annotations

from typing import Final, NamedTuple

from postcopy_proto.messages import Pages

_FEW: Final = 16
"""Up to so many pages a loop beats numpy; a page that somebody waits for comes alone."""


class Run(NamedTuple):
    """Pages that follow each other in the block, and in the batch's data at one stride."""

    offset: int
    """of the first page in the block, bytes"""
    pages: int
    """how many"""
    position: int
    """of the first page's bytes in the data, or -1 for zero pages"""
    stride: int
    """bytes from page to page in the data"""


def split_runs(pages: Pages) -> list[Run]:
    """The runs of a batch that is not empty, in its order."""
    count = len(pages.offsets)
    if count == 1:
        return [Run(int(pages.offsets[0]), 1, int(pages.positions[0]), pages.page_size)]
    return _whole(pages) or (_split_few(pages) if count <= _FEW else _split_many(pages))


def _split_few(pages: Pages) -> list[Run]:
    size = pages.page_size
    offsets, positions = pages.offsets.tolist(), pages.positions.tolist()
    count = len(offsets)
    runs = []
    first = 0
    while first < count:
        offset, position = offsets[first], positions[first]
        stride = 0 if position < 0 else size
        end = first + 1
        if end < count and position >= 0:
            stride = max(positions[end] - position, 0) or size
        while (
            end < count
            and offsets[end] == offset + (end - first) * size
            and positions[end] == position + (end - first) * stride
        ):
            end += 1
        runs.append(Run(offset, end - first, position, stride if end - first > 1 else size))
        first = end
    return runs


def _whole(pages: Pages) -> list[Run] | None:
    """The batch as one run, as it mostly is; None when it isn't."""
    if not pages.is_one_run():
        return None
    position = int(pages.positions[0])
    stride = int(pages.positions[1]) - position
    return [Run(int(pages.offsets[0]), len(pages), position, stride)]


def _split_many(pages: Pages) -> list[Run]:
    offsets, positions = pages.offsets, pages.positions
    runs = []
    for first, count in pages.runs():
        position = int(positions[first])
        stride = int(positions[first + 1]) - position if count > 1 else pages.page_size
        runs.append(Run(int(offsets[first]), count, position, stride))
    return runs
