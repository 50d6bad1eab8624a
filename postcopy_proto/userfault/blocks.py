"""`GuestBlock`: what the backend knows of one region; and the lookup by name and by address."""

from __future__ import annotations

import errno
import os
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

from bitarray import bitarray

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
        self.unmapped = False
        """whether the guest unmapped some of it: then there is nothing to unregister"""
        self.can_zeropage = True
        """whether UFFDIO_ZEROPAGE was offered for it: not for hugetlb"""

    def has_received(self, host_page: int) -> bool:
        """Whether that host page is there."""
        return bool(self.received[host_page // self.page_size])

    def missing(self, start: int, length: int) -> list[int]:
        """The host pages of a range that have not arrived; ValueError outside the block."""
        if not self.region.block.contains(start, length):
            raise ValueError(f"{start:#x} + {length:#x} is outside {self.idstr}")
        first = start & -self.host_page_size
        pages = range(first, start + length, self.host_page_size)
        return [page for page in pages if not self.has_received(page)]

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
