"""The destination's loop over real sockets and real faults, fed by runs of pages.

POSTCOPY_SOAK=N repeats every combination N times.
"""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from postcopy_proto import messages as m
from postcopy_proto.destination import DestinationConnection
from postcopy_proto.errors import Channel
from postcopy_proto.net.demo_source import LiveMemory
from postcopy_proto.net.destination_loop import DestinationLoop
from postcopy_proto.net.guest import GuestProcess, Touch
from postcopy_proto.net.source_loop import SourceLoop
from postcopy_proto.net.target import GuestTarget, compare
from postcopy_proto.net.transport import Listener, TransferMode, connect, parse_address
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.source import SourceConnection

pytestmark = pytest.mark.userfault

SOAK = int(os.environ.get("POSTCOPY_SOAK", "1"))
MIB = 1 << 20
BLOCKS = (RAMBlock("pc.ram", 24 * MIB), RAMBlock("vga.vram", 2 * MIB), RAMBlock("rom", 3 * 4096))


def contents(seed: int) -> dict[str, NDArray[np.uint8]]:
    """Random pages in long runs, with some runs of zero pages between."""
    random = np.random.default_rng(seed)
    memory = {}
    for block in BLOCKS:
        words = random.integers(1, 1 << 62, block.used_length // 8, np.uint64)
        pages = words.view(np.uint8).reshape(-1, 4096)
        for first in random.integers(0, len(pages), 4).tolist():
            pages[first : first + int(random.integers(1, 9))] = 0
        memory[block.idstr] = pages
    return memory


class Pushed(GuestTarget):
    """Every page is touched at random; counts the batches whose pages came side by side."""

    def __init__(self, seed: int, touched: int) -> None:
        super().__init__(self._touch)
        self._random = np.random.default_rng(seed)
        self._touched = touched
        self.side_by_side = 0

    def _touch(self, guest: GuestProcess, _: DestinationConnection) -> Touch:
        pages = {
            block.idstr: self._random.permutation(block.page_count())[: self._touched] * 4096
            for block in BLOCKS
        }
        return guest.touch(pages, threads=3)

    def place(self, pages: m.Pages, channel: Channel) -> None:
        positions = pages.positions
        self.side_by_side += len(pages) > 1 and int(positions[1] - positions[0]) == 4096
        super().place(pages, channel)


def send(
    address: str, memory: dict[str, NDArray[np.uint8]], mode: TransferMode, preempt: bool
) -> None:
    store = LiveMemory([(block, memory[block.idstr]) for block in BLOCKS])
    connection = SourceConnection(store, m.Configuration("test"), preempt=preempt)
    with ExitStack() as sockets:
        forward = sockets.enter_context(connect(parse_address(address), timeout=30))
        urgent = None
        if preempt:
            urgent = sockets.enter_context(connect(parse_address(address), timeout=30))
        loop = SourceLoop(connection, forward, urgent, mode=mode)
        loop.send([connection.start()])
        loop.send(connection.switchover(None, b""))
        loop.deliver()
        loop.finish()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("mode", list(TransferMode), ids=lambda mode: mode.name)
@pytest.mark.parametrize("preempt", [False, True], ids=["one channel", "preempt"])
def test_memory_is_what_was_sent(
    kind: str, mode: TransferMode, preempt: bool, tmp_path: Path
) -> None:
    address = "tcp:127.0.0.1:0" if kind == "tcp" else f"unix:{tmp_path}/s"
    for seed in range(SOAK):
        migrate(address, seed, mode, preempt=preempt)


def migrate(address: str, seed: int, mode: TransferMode, *, preempt: bool) -> None:
    memory = contents(seed)
    target = Pushed(seed, touched=300)
    with Listener(parse_address(address)) as listener:
        source = threading.Thread(target=send, args=(str(listener.address), memory, mode, preempt))
        source.start()
        loop = DestinationLoop(
            listener, DestinationConnection(), target, mode=mode, accept_timeout=30
        )
        try:
            found = loop.run()
            compare(
                target.guest,
                BLOCKS,
                lambda name, at, size: memory[name].reshape(-1)[at : at + size].tobytes(),
            )
        finally:
            target.close()
        source.join(30)
    assert not source.is_alive()
    assert target.side_by_side, "runs were foretold"
    assert found.requests > 0
    assert found.pages + found.zero_pages == sum(map(len, memory.values()))
    assert preempt or not found.urgent_pages
