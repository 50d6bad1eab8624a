"""`Placer`: how a batch of pages gets into guest memory.

Before LISTEN pages are written over whatever is there; afterwards they are placed by COPY and
ZEROPAGE, atomically, in runs as long as the batch allows. (QEMU's ram_load_postcopy,
postcopy_place_page, postcopy_place_page_zero)
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.messages import Pages
from postcopy_proto.ramblock import set_bits, test_bits
from postcopy_proto.userfault.blocks import GuestBlock, GuestBlocks
from postcopy_proto.userfault.descriptor import (
    AgainError,
    AlreadyPresentError,
    NoMemoryLeftError,
    NotRegisteredError,
    ResolveError,
    Userfaultfd,
)
from postcopy_proto.userfault.runs import Run, split_runs
from postcopy_proto.userfault.staging import HostPage, Staging, address_of
from postcopy_proto.userfault.statistics import FaultStatistics

trace = logging.getLogger("postcopy_proto.trace")

STAGING_SIZE: Final = 1 << 20
"""Bytes compacted and placed by one ioctl at most, where headers stand between the pages."""
SCATTERED: Final = 8
"""Pages in a batch from which on it is worth while to see whether they are single ones."""
RETRY_SECONDS: Final = 10.0
"""How long a placement is retried that makes no progress (EAGAIN: the owner is changing its
mappings; it ends when the owner does)."""


class Placer:
    """Places batches; `drain` reads the events that hold up a placement."""

    def __init__(
        self,
        blocks: GuestBlocks,
        page_size: int,
        statistics: FaultStatistics,
        drain: Callable[[], None],
    ) -> None:
        self._blocks = blocks
        self._page_size = page_size
        self._statistics = statistics
        self._drain = drain
        self.tracing = False
        """whether placements are traced; asking the logger each time takes its part of a fault"""
        self._largest = max(block.host_page_size for block in blocks)
        self._staging = Staging(max(STAGING_SIZE, self._largest))
        self._zeros = Staging(max(STAGING_SIZE, self._largest))
        self._host_pages: dict[Channel, HostPage] = {}

    def check(self, pages: Pages, channel: Channel) -> tuple[GuestBlock, list[Run]]:
        """The batch's block and runs, with every page known to be one of it.

        RemoteProtocolError when one is not.
        """
        block = self._blocks.named(pages.block, "PAGE", channel)
        size, length = self._page_size, block.length
        runs = split_runs(pages)
        wrong = pages.page_size != size
        for run in runs:
            if wrong or run.offset % size or run.offset + run.pages * size > length:
                raise RemoteProtocolError(
                    f"{run.pages} pages of {pages.page_size} bytes at {run.offset:#x} are no "
                    f"pages of {size} bytes inside {block.idstr} of {length:#x} bytes",
                    kind=ErrorKind.RANGE,
                    channel=channel,
                    message="PAGE",
                )
        return block, runs

    def write(self, block: GuestBlock, pages: Pages) -> None:
        """Precopy. Zero pages are written only where something else was."""
        last = int(pages.positions.max())
        if last >= 0 and last + self._page_size > len(pages.data):
            raise ValueError("a page of the batch ends after the batch's data")
        offsets = pages.offsets.astype(np.intp)
        # Within a part no page comes twice, so that the order of its writes does not matter.
        breaks = np.flatnonzero(np.diff(offsets) <= 0) + 1
        base = _address_of(pages)
        for part in np.split(np.arange(len(offsets)), breaks):
            self._write_ascending(block, offsets[part], pages.positions[part], base)

    def _write_ascending(
        self,
        block: GuestBlock,
        offsets: NDArray[np.intp],
        positions: NDArray[np.int64],
        base: int,
    ) -> None:
        numbers = offsets // self._page_size
        content = positions >= 0
        written = content | test_bits(block.received, numbers)
        sources = np.where(content, positions + base, self._zeros.address)[written]
        if len(sources):
            block.region.write(offsets[written], sources, self._page_size)
        set_bits(block.received, numbers)

    def place_scattered(self, uffd: Userfaultfd, pages: Pages) -> Pages:
        """Postcopy: single pages all over a block, as after a precopy phase; what is left to do.

        All of the batch, when it is something else: runs, zero pages, a page that came before or
        twice, one that is none. Nothing is refused here.
        """
        block, size = self._blocks.by_name.get(pages.block), self._page_size
        offsets, positions = pages.offsets, pages.positions
        if len(pages) < SCATTERED or int(offsets[1]) - int(offsets[0]) == size:
            return pages
        if block is None or not block.host_page_size == pages.page_size == size:
            return pages
        numbers = (offsets // np.uint64(size)).astype(np.intp)
        ordered = np.sort(numbers)
        steps = np.diff(ordered)
        if (
            ordered[-1] >= len(block.received)
            or (offsets % np.uint64(size)).any()
            or steps.min() == 0
            or np.count_nonzero(np.diff(numbers) == 1) * 4 > len(numbers)
            or positions.min() < 0
            or int(positions.max()) + size > len(pages.data)
            or test_bits(block.received, numbers).any()
        ):
            return pages
        destinations = (numbers * size + block.address).tolist()
        try:
            uffd.copy_each(destinations, (positions + _address_of(pages)).tolist(), size)
            placed = len(destinations)
        except ResolveError as error:
            placed = error.done // size
        if placed:
            set_bits(block.received, numbers[:placed])
            statistics = self._statistics
            statistics.placements += placed
            statistics.pages += placed
            if block.waiting:
                for page in block.waiting.keys() & set((numbers[:placed] * size).tolist()):
                    block.resolved(page, size, statistics)
            if self.tracing:
                trace.debug("postcopy_place_page host=%#x pages=%d", destinations[0], placed)
        return replace(pages, offsets=offsets[placed:], positions=positions[placed:], named=False)

    def place(
        self, uffd: Userfaultfd, block: GuestBlock, pages: Pages, runs: list[Run], channel: Channel
    ) -> None:
        """Postcopy."""
        if block.host_page_size == self._page_size:
            self._place_pages(uffd, block, pages.data, runs)
        else:
            self._place_host_pages(uffd, block, pages.data, runs, channel)

    def _place_pages(
        self, uffd: Userfaultfd, block: GuestBlock, data: memoryview, runs: list[Run]
    ) -> None:
        """A host page is a target page."""
        size = self._page_size
        base = address_of(data) if len(data) else 0
        for offset, count, position, stride in runs:
            page = offset // size
            if position < 0:
                self.fill(uffd, block, page, count, None)
            elif stride == size or count == 1:
                if position + count * size > len(data):
                    raise ValueError("a page of the batch ends after the batch's data")
                self.fill(uffd, block, page, count, base + position)
            else:
                self._place_strided(uffd, block, page, count, data, position, stride)

    def _place_strided(
        self,
        uffd: Userfaultfd,
        block: GuestBlock,
        page: int,
        count: int,
        data: memoryview,
        position: int,
        stride: int,
    ) -> None:
        """Contiguous in the block, `stride` apart in `data`: compacted, then one COPY."""
        size = self._page_size
        most = self._staging.size // size
        for done in range(0, count, most):
            rows = min(most, count - done)
            self._staging.gather(data, position + done * stride, stride, rows, size)
            self.fill(uffd, block, page + done, rows, self._staging.address)

    def _place_host_pages(
        self,
        uffd: Userfaultfd,
        block: GuestBlock,
        data: memoryview,
        runs: list[Run],
        channel: Channel,
    ) -> None:
        """Host pages of many target pages: collected per channel, placed when complete."""
        collector = self._host_pages.get(channel)
        if collector is None:
            collector = HostPage(self._largest, self._page_size, channel)
            self._host_pages[channel] = collector
        size, host, ram = self._page_size, block.host_page_size, block.region.block
        for offset, count, position, stride in runs:
            content = None if position < 0 else data
            done = 0
            while done < count:
                at = offset + done * size
                host_page = at & -host
                within = (at - host_page) // size
                part = min(count - done, host // size - within)
                where = position + done * stride
                if collector.add(ram, host_page, within, part, content, where, stride):
                    source = None if collector.all_zero else collector.address
                    self.fill(uffd, block, host_page // size, host // size, source)
                done += part

    def fill(
        self, uffd: Userfaultfd, block: GuestBlock, page: int, count: int, source: int | None
    ) -> None:
        """Makes target pages [page, page + count) present: bytes at `source`, or zeros.

        Each turn of the loop takes the next run that has not been received, so whatever the
        kernel did or refused, the bitmap says where to go on.
        """
        size, received, statistics = self._page_size, block.received, self._statistics
        at, end = page, page + count
        deadline = 0.0
        while at < end:
            if received[at]:
                following = received.find(0, at, end)
                following = end if following < 0 else following
                statistics.duplicates += following - at
                at = following
                continue
            stop = received.find(1, at, end)
            stop = end if stop < 0 else stop
            address, length = block.address + at * size, (stop - at) * size
            try:
                if source is None:
                    done = self.zero(uffd, block, address, length)
                else:
                    done = uffd.copy(address, source + (at - page) * size, length)
                statistics.placements += 1
            except AgainError as error:
                statistics.retries += 1
                done = error.done
                if done == 0:
                    deadline = deadline or time.monotonic() + RETRY_SECONDS
                    if time.monotonic() > deadline:
                        raise
                    self._drain()
            except AlreadyPresentError as error:
                refuse_empty_pool(block, at * size, error)
                done = block.host_page_size
                statistics.already_present += 1
                uffd.wake(address, done)
            except NotRegisteredError:
                # The owner may have unmapped it: then the event says so, and it is received.
                done = 0
                self._drain()
                if not received[at]:
                    raise
            if done:
                deadline = 0.0
                self._placed(block, at, done // size, source is None)
                at += done // size

    def place_host_page(
        self, uffd: Userfaultfd, block: GuestBlock, offset: int, source: int | None
    ) -> None:
        """`fill` for the host page at byte `offset`, without its loop: a vCPU waits for it."""
        size, host = self._page_size, block.host_page_size
        page, count = offset // size, host // size
        if source is not None and not block.received[page]:
            try:
                uffd.copy(block.address + offset, source, host)
            except ResolveError:
                pass  # `fill` knows what to do about each
            else:
                # As `_placed`, without the call.
                if count == 1:
                    block.received[page] = True
                else:
                    block.received[page : page + count] = True
                statistics = self._statistics
                statistics.placements += 1
                statistics.pages += count
                if block.waiting:
                    block.resolved(offset, host, statistics)
                if self.tracing:
                    self._trace(block, page, count, False)
                return
        self.fill(uffd, block, page, count, source)

    def zero(self, uffd: Userfaultfd, block: GuestBlock, address: int, length: int) -> int:
        """Zeros by ZEROPAGE, or from a buffer of them where that is not offered; returns bytes."""
        if block.can_zeropage:
            return uffd.zeropage(address, length)
        return uffd.copy(address, self._zeros.address, min(length, self._zeros.size))

    def _placed(self, block: GuestBlock, page: int, count: int, zero: bool) -> None:
        """`count` target pages from `page` are there."""
        block.received[page : page + count] = True
        statistics = self._statistics
        statistics.pages += count
        if zero:
            statistics.zero_pages += count
        if block.waiting:
            size = self._page_size
            block.resolved(page * size, count * size, statistics)
        if self.tracing:
            self._trace(block, page, count, zero)

    def _trace(self, block: GuestBlock, page: int, count: int, zero: bool) -> None:
        name = "postcopy_place_page_zero" if zero else "postcopy_place_page"
        trace.debug("%s host=%#x pages=%d", name, block.address + page * self._page_size, count)

    def close(self) -> None:
        """Frees the staging memory."""
        self._host_pages.clear()
        self._staging.close()
        self._zeros.close()


def refuse_empty_pool(block: GuestBlock, host_page: int, error: AlreadyPresentError) -> None:
    """NoMemoryLeftError instead of an EEXIST that only means that no huge page is free."""
    if block.pool_is_empty(host_page):
        raise NoMemoryLeftError(
            error.operation,
            errno.ENOMEM,
            os.strerror(errno.ENOMEM),
            f"{block.idstr} at {host_page:#x}: no free huge page of {block.host_page_size} bytes",
            "raise vm.nr_hugepages",
        ) from error


def _address_of(pages: Pages) -> int:
    return address_of(pages.data) if len(pages.data) else 0
