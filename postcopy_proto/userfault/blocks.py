"""`GuestBlock`: what the backend knows of one region; and the lookup by name and by address."""

from __future__ import annotations

import errno
import mmap
import os
import sys
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bitarray import bitarray
from bitarray.util import intervals

from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError, UserfaultError
from postcopy_proto.userfault.region import Region
from postcopy_proto.userfault.statistics import FaultStatistics


class GuestBlock:
    """One region, which of its pages have arrived, and who waits for which.

    `page_size` is the target page. Offsets are bytes in the block.
    """

    def __init__(self, region: Region, page_size: int) -> None:
        self.region = region
        self.idstr = region.block.idstr
        self.address = region.address
        self.length = region.block.used_length
        self.end = self.address + self.length
        self.page_size = page_size
        self.host_page_size = region.block.page_size
        self.received = bitarray(self.length // page_size, endian="little")
        """one bit a target page"""
        self.received.setall(False)
        self.waiting: dict[int, list[tuple[int, int]]] = {}
        """host page → (thread id, time of the event in ns) of each thread that waits for it"""
        self.dropped = bitarray(self.received)
        """one bit a target page: discarded since huge pages are off, and so really empty"""
        self.unmapped: list[tuple[int, int]] = []
        """offsets [start, end) that the guest unmapped: nothing is registered there any more"""
        self.can_zeropage = True
        """whether UFFDIO_ZEROPAGE was offered for it: not for hugetlb"""

    def has_received(self, host_page: int) -> bool:
        """Whether that host page is there."""
        return bool(self.received[host_page // self.page_size])

    def missing(self, start: int, length: int) -> list[int]:
        """The host pages of a range that have not arrived; ValueError outside the block."""
        if not self.region.block.contains(start, length):
            raise ValueError(f"{start:#x} + {length:#x} is outside {self.idstr}")
        if length == 0:
            return []
        first = start & -self.host_page_size
        pages = range(first, start + length, self.host_page_size)
        return [page for page in pages if not self.has_received(page)]

    def mapped_ranges(self) -> list[tuple[int, int]]:
        """Offsets [start, end) of what the guest has not unmapped."""
        ranges, start = [], 0
        for low, high in [*sorted(self.unmapped), (self.length, self.length)]:
            if start < low:
                ranges.append((start, low))
            start = max(start, high)
        return ranges

    def stale_runs(self) -> Iterator[tuple[int, int]]:
        """Offsets [start, end) of pages that have not come and may be there all the same.

        A page written before LISTEN can be a huge one, which brings its neighbours with it. None
        where nothing was written; and where host pages are bigger than target pages, they come
        whole.
        """
        if self.host_page_size == self.page_size and self.received.any():
            for wanted, start, end in intervals(~(self.received | self.dropped)):
                if wanted:
                    yield start * self.page_size, end * self.page_size

    def pool_is_empty(self, host_page: int) -> bool:
        """Whether the kernel says EEXIST of a hugetlb page because it has none left.

        That is its answer too where a page table is there and the pool has run dry. The page
        itself is looked up where its owner lets us (proc_pid_pagemap(5)).
        """
        if self.host_page_size == mmap.PAGESIZE:
            return False
        kib = self.host_page_size >> 10
        pool = Path(f"/sys/kernel/mm/hugepages/hugepages-{kib}kB/free_hugepages")
        try:
            if int(pool.read_text()) > 0:
                return False
        except OSError:
            return False  # not hugetlb
        try:
            with open(f"/proc/{self.region.owner.pid}/pagemap", "rb", buffering=0) as file:
                file.seek((self.address + host_page) // mmap.PAGESIZE * 8)
                return not int.from_bytes(file.read(8), sys.byteorder) >> 63
        except OSError:
            return True

    def resolved(self, start: int, length: int, statistics: FaultStatistics) -> None:
        """Ends the waits for host pages in [start, start + length)."""
        now = time.perf_counter_ns()
        waiting, host = self.waiting, self.host_page_size
        if length == host:
            for thread_id, since in waiting.pop(start, ()):
                statistics.add_wait(thread_id, now - since)
            return
        pages: Iterable[int]
        if len(waiting) * host < length:
            pages = [page for page in waiting if start <= page < start + length]
        else:
            pages = [page for page in range(start, start + length, host) if page in waiting]
        for page in pages:
            for thread_id, since in waiting.pop(page):
                statistics.add_wait(thread_id, now - since)


class GuestBlocks:
    """All blocks of a backend. ValueError when two have one name."""

    def __init__(self, regions: Sequence[Region], page_size: int) -> None:
        self.by_name = {r.block.idstr: GuestBlock(r, page_size) for r in regions}
        if len(self.by_name) != len(regions):
            raise ValueError("two regions have one name")
        self._by_address = sorted(self.by_name.values(), key=lambda block: block.address)
        self._addresses = [block.address for block in self._by_address]
        self._last_found = self._by_address[0]

    def __iter__(self) -> Iterator[GuestBlock]:
        return iter(self.by_name.values())

    def named(self, name: str, message: str, channel: Channel | None = None) -> GuestBlock:
        """The block of that name; RemoteProtocolError about `message` when there is none."""
        block = self.by_name.get(name)
        if block is None:
            raise RemoteProtocolError(
                f"no RAMBlock is named {name!r}",
                kind=ErrorKind.UNKNOWN,
                channel=channel,
                message=message,
            )
        return block

    def at(self, address: int) -> tuple[GuestBlock, int]:
        """Block and offset of an address of the owner; UserfaultError when it is in none.

        (qemu_ram_block_from_host)
        """
        block = self._last_found  # mostly it is the one where the last fault was
        if block.address <= address < block.end:
            return block, address - block.address
        index = bisect_right(self._addresses, address) - 1
        if index >= 0:
            block = self._by_address[index]
            if address < block.end:
                self._last_found = block
                return block, address - block.address
        detail = f"address {address:#x} is in no RAMBlock"
        raise UserfaultError("page fault", errno.EFAULT, os.strerror(errno.EFAULT), detail)

    def overlapping(self, start: int, end: int) -> Iterator[tuple[GuestBlock, int, int]]:
        """(block, first offset, end offset) of every block that addresses [start, end) touch."""
        for block in self._by_address:
            low = max(start, block.address) - block.address
            high = min(end, block.address + block.length) - block.address
            if low < high:
                yield block, low, high
