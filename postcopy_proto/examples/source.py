"""A source of one's own: a toy VM that answers `PageStore`, and the calls of a migration.

The VM brings four things: its blocks, its pages, its dirty bitmaps and its device state.
Discards, queueing, requests, order and the end come from `SourceConnection` and `SourceLoop`.
"""

from __future__ import annotations

import socket
import sys

import numpy as np
from numpy.typing import NDArray

from postcopy_proto import (
    Configuration,
    DirtyBitmap,
    RAMBlock,
    SectionFooter,
    SectionFull,
    SourceConnection,
    encode,
)
from postcopy_proto.net.source_loop import SourceLoop

PAGE = 4096


class ToyVm:
    """RAM in numpy arrays, one row a page; every write marks its page dirty."""

    device_state = b"".join(  # one device section: its head, its content, its footer
        (encode(SectionFull(40, "toy", 0, 1)), b"\x00\x2a", encode(SectionFooter(40)))
    )

    def __init__(self, sizes: dict[str, int], seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.blocks = [RAMBlock(name, size) for name, size in sizes.items()]
        self.ram = {
            block.idstr: random.integers(0, 256, (block.page_count(), PAGE), np.uint8)
            for block in self.blocks
        }
        self.dirty = {block.idstr: DirtyBitmap(block.page_count()) for block in self.blocks}

    def write(self, block: str, page: int, value: int) -> None:
        """The guest fills a page with one value."""
        self.ram[block][page] = value
        self.dirty[block].bits[page] = True

    # the two questions of a PageStore

    def zero_pages(self, block: str, pages: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Which of these pages hold only zeros."""
        zero: NDArray[np.bool_] = np.logical_not(self.ram[block][pages].any(axis=1))
        return zero

    def read_pages(self, block: str, pages: NDArray[np.intp]) -> NDArray[np.uint8]:
        """Their bytes, one row a page."""
        return self.ram[block][pages]


def migrate(vm: ToyVm, sock: socket.socket) -> SourceLoop:
    """Send a running VM away; its pages must not change any more once this has returned."""
    connection = SourceConnection(vm, Configuration("toy-1"))
    loop = SourceLoop(connection, sock)
    loop.send([connection.start()])

    for block in vm.blocks:  # the VM runs on: what it writes now is dirty at the switchover
        pages = np.arange(block.page_count())
        loop.send([connection.precopy(block.idstr, pages)])
        vm.write(block.idstr, len(pages) // 2, 0xAB)
        vm.write(block.idstr, len(pages) - 1, 0)

    # Here a real VM stops, for good.
    loop.send(connection.switchover(vm.dirty, vm.device_state))
    loop.deliver()
    loop.finish()
    return loop


def main() -> int:
    """`python -m postcopy_proto.examples.source PATH`: to a destination on a Unix socket."""
    vm = ToyVm({"toy.ram": 8 << 20, "toy.rom": 64 << 10})
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(sys.argv[1])
        statistics = migrate(vm, sock).statistics
    sent = statistics.pages + statistics.zero_pages
    print(f"{sent} pages after the switchover, {statistics.requested_pages} asked for")
    return 0


if __name__ == "__main__":
    sys.exit(main())
