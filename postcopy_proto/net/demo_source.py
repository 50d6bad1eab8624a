"""The demo's source: a process that owns RAM, dirties it while it sends it, and switches over.

Started by `net.demo` with its RAM in memory files, so that the demo can compare at the end.
Reports to its standard output, one JSON object a line.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from postcopy_proto import messages as m
from postcopy_proto.dirty import DirtyBitmap
from postcopy_proto.errors import PostcopyError
from postcopy_proto.net.source_loop import SourceLoop, SourceStatistics
from postcopy_proto.net.transport import TransferMode, connect, parse_address
from postcopy_proto.ramblock import TARGET_PAGE_SIZE, RAMBlock
from postcopy_proto.source import SourceConnection
from postcopy_proto.wire import encode

MACHINE = "postcopy-demo-1"
DEVICE_STATE = b"".join(
    (
        encode(m.SectionFull(40, "counter", 0, 1)),
        b"\x00\x00\x00\x2a",
        encode(m.SectionFooter(40)),
    )
)
"""The demo's machine has one device with one register."""
PRECOPY_BATCH = 256
"""pages in one precopy section, 1 MiB"""


@dataclass(slots=True)
class DemoPlan:
    """What the source process is told: blocks as (idstr, bytes, descriptor of the memory file)."""

    address: str
    blocks: list[tuple[str, int, int]]
    dirty: float
    """fraction of all pages that are dirty at the switchover"""
    seed: int
    mode: str = TransferMode.THROUGHPUT.name


class LiveMemory:
    """A `PageStore` over memory of this process: one writable array a block.

    Pages are asked for in ascending order, as `SourceConnection` does.
    """

    def __init__(self, blocks: Sequence[tuple[RAMBlock, NDArray[np.uint8]]]) -> None:
        self.blocks = [block for block, _ in blocks]
        self.pages = {block.idstr: memory.reshape(-1, TARGET_PAGE_SIZE) for block, memory in blocks}

    def zero_pages(self, block: str, pages: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Which of these pages hold only zeros, shape (n,)."""
        words = self._rows(block, pages).view(np.uint64)
        zero: NDArray[np.bool_] = words[:, 0] == 0
        # Only a page that begins with zeros is looked at whole.
        zero[zero] = np.logical_not(words[zero].any(axis=1))
        return zero

    def read_pages(self, block: str, pages: NDArray[np.intp]) -> NDArray[np.uint8]:
        """The pages' bytes, shape (n, 4096)."""
        return self._rows(block, pages)

    def _rows(self, block: str, pages: NDArray[np.intp]) -> NDArray[np.uint8]:
        """Those rows of the block; without a copy where they follow each other."""
        rows, count = self.pages[block], len(pages)
        if count and int(pages[-1]) - int(pages[0]) == count - 1:
            return rows[int(pages[0]) : int(pages[-1]) + 1]
        return rows[pages]


def fill(memory: NDArray[np.uint8], random: np.random.Generator) -> None:
    """Pages of three kinds, mixed: random (half of them), zero, and one byte repeated."""
    pages = memory.reshape(-1, TARGET_PAGE_SIZE)
    kind = random.choice(3, len(pages), p=[0.5, 0.3, 0.2])
    for first in range(0, len(pages), 4096):
        rows = pages[first : first + 4096]
        rows[:] = random.integers(0, 1 << 63, (len(rows), 512), np.uint64).view(np.uint8)
        kinds = kind[first : first + 4096]
        rows[kinds == 1] = 0
        repeated = np.flatnonzero(kinds == 2)
        rows[repeated] = random.integers(1, 256, (len(repeated), 1), np.uint8)


class _Dirtier:
    """Stands for the guest at the source: writes to random pages and marks them dirty."""

    def __init__(
        self, store: LiveMemory, dirty: dict[str, DirtyBitmap], random: np.random.Generator
    ) -> None:
        self._store = store
        self._dirty = dirty
        self._random = random
        self._weights = np.array([len(pages) for pages in store.pages.values()], float)
        self._weights /= self._weights.sum()

    def write(self, count: int) -> None:
        """Write to `count` random pages; one in eight becomes a zero page."""
        shares = self._random.multinomial(count, self._weights)
        for (name, pages), share in zip(self._store.pages.items(), shares, strict=True):
            chosen = self._random.integers(0, len(pages), int(share))
            pages[chosen, :8] = self._random.integers(1, 256, (len(chosen), 8), np.uint8)
            pages[chosen[::8]] = 0
            bits = self._dirty[name].bits
            for page in chosen.tolist():
                bits[page] = True

    def write_until(self, fraction: float) -> None:
        """Go on until this fraction of all pages is dirty."""
        total = sum(len(pages) for pages in self._store.pages.values())
        while (missing := int(total * fraction) - self.count()) > 0:
            self.write(missing)

    def count(self) -> int:
        """Dirty pages."""
        return sum(bitmap.count() for bitmap in self._dirty.values())


def _report(phase: str, statistics: SourceStatistics, **more: object) -> None:
    line = {"phase": phase, "bytes": statistics.bytes, "pages": statistics.pages, **more}
    print(json.dumps(line), flush=True)


def run(plan: DemoPlan) -> None:
    """The whole migration, from the filling of RAM to SHUT."""
    random = np.random.default_rng(plan.seed)
    memory = []
    for name, length, fd in plan.blocks:
        array = np.frombuffer(mmap.mmap(fd, length), np.uint8)
        fill(array, random)
        memory.append((RAMBlock(name, length), array))
    store = LiveMemory(memory)
    dirty = {block.idstr: DirtyBitmap(block.page_count()) for block in store.blocks}
    dirtier = _Dirtier(store, dirty, random)

    mode, address = TransferMode[plan.mode], parse_address(plan.address)
    with ExitStack() as sockets:
        forward = sockets.enter_context(connect(address, timeout=30))
        # Where latency counts, pages asked for get a connection of their own.
        preempt = None
        if mode is TransferMode.LATENCY:
            preempt = sockets.enter_context(connect(address, timeout=30))
        connection = SourceConnection(store, m.Configuration(MACHINE), preempt=preempt is not None)
        loop = SourceLoop(connection, forward, preempt, mode=mode)
        loop.send([connection.start()])
        sent = _precopy(loop, connection, store, dirty, dirtier, plan.dirty, random)
        dirtier.write_until(plan.dirty)
        _report("switchover", loop.statistics, dirty=dirtier.count(), precopy_pages=sent)
        loop.send(connection.switchover(dirty, DEVICE_STATE))
        loop.deliver()
        loop.finish()
    _report(
        "done",
        loop.statistics,
        requests=connection.requests,
        discard_commands=connection.discard_commands,
        discard_ranges=connection.discard_ranges,
    )


def _precopy(
    loop: SourceLoop,
    connection: SourceConnection,
    store: LiveMemory,
    dirty: dict[str, DirtyBitmap],
    dirtier: _Dirtier,
    fraction: float,
    random: np.random.Generator,
) -> int:
    """One pass over all of RAM while some of what was sent is written again."""
    sent = 0
    for block in store.blocks:
        count = block.page_count()
        for first in range(0, count, PRECOPY_BATCH):
            pages = np.arange(first, min(first + PRECOPY_BATCH, count))
            dirty[block.idstr].bits[first : first + len(pages)] = False
            loop.send([connection.precopy(block.idstr, pages)])
            sent += len(pages)
            dirtier.write(int(random.poisson(len(pages) * fraction / 2)))
            if first % (32 * PRECOPY_BATCH) == 0:
                _report("precopy", loop.statistics, precopy_pages=sent)
    return sent


def main() -> int:
    """Read a plan as JSON from standard input and carry it out."""
    plan = DemoPlan(**json.loads(sys.stdin.readline()))
    try:
        run(plan)
    except PostcopyError as error:
        print(json.dumps({"phase": "failed", "error": str(error)}), flush=True)
        return 1
    return 0


def plan_line(plan: DemoPlan) -> str:
    """The line that `main` reads."""
    return json.dumps(asdict(plan)) + os.linesep


if __name__ == "__main__":
    sys.exit(main())
