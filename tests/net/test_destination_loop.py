"""The destination's loop over real sockets and real faults, fed by runs of pages.

POSTCOPY_SOAK=N repeats every combination N times.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from postcopy_proto import messages as m
from postcopy_proto.destination import DestinationConnection
from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.net.demo_source import LiveMemory
from postcopy_proto.net.destination_loop import DestinationLoop, DestinationStatistics
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


def receive(
    address: str,
    memory: dict[str, NDArray[np.uint8]],
    target: GuestTarget,
    mode: TransferMode,
    *,
    preempt: bool,
) -> DestinationStatistics:
    """One migration of that memory, which is what the guest sees in the end."""
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
    return found


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
    found = receive(address, memory, target, mode, preempt=preempt)
    assert target.side_by_side, "runs were foretold"
    assert found.requests > 0
    assert found.pages + found.zero_pages == sum(map(len, memory.values()))
    assert preempt or not found.urgent_pages


# ---- faults that no poll shows


class Interrupted(GuestTarget):
    """Its guest touches a page and drops another just when a third is placed.

    COPY stops until the event is read, and with it the fault that waits: the userfaultfd is not
    readable for its sake any more.
    """

    def __init__(self) -> None:
        super().__init__(lambda guest, connection: None)
        self.was_pending = False

    def place(self, pages: m.Pages, channel: Channel) -> None:
        if self.touch is not None:
            super().place(pages, channel)
            return
        self.touch = self.guest.touch({"pc.ram": np.array([24 * MIB - 4096])})
        poll = select.poll()
        poll.register(self.backend.fileno(), select.POLLIN)
        assert poll.poll(10_000), "the guest touches a page"
        region = self.guest.regions[0]
        self.guest.discard(region, 24 * MIB - 8192, 4096)
        self.guest.advise_huge_pages(region, False)
        until(lambda: state(self.guest.pid) == "D", "the guest waits for the event to be read")
        super().place(pages, channel)
        self.was_pending = self.pending


def until(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


def state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0]


def test_a_fault_read_in_the_middle_of_a_placement_is_asked_for() -> None:
    memory = contents(5)
    memory["pc.ram"][-2] = 0
    target = Interrupted()
    found = receive("tcp:127.0.0.1:0", memory, target, TransferMode.LATENCY, preempt=False)
    assert target.was_pending
    assert found.faults == found.requests == 1


# ---- the forward channel has ended, and a page is still on its way


def send_the_page_asked_for_late(address: str, silent: float, *, send_it: bool) -> None:
    """All but that page, the end, a closed forward channel; the page after `silent` seconds."""
    block = RAMBlock("pc.ram", MIB)
    store = LiveMemory([(block, np.full((256, 4096), 7, np.uint8))])
    source = SourceConnection(store, m.Configuration("test"), preempt=True)
    with (
        connect(parse_address(address), timeout=30) as forward,
        connect(parse_address(address), timeout=30) as preempt,
    ):
        forward.sendall(source.start())
        for piece in source.switchover(None, b""):
            forward.sendall(piece)
        while not source.has_requests:
            source.receive_data(forward.recv(4096))
            while not isinstance(source.next_event(), m.NeedData):
                pass
        urgent = source.next_batch(background=False)
        assert urgent is not None
        while (batch := source.next_batch()) is not None:
            forward.sendall(batch.data)
        forward.sendall(source.finish())
        forward.shutdown(socket.SHUT_WR)
        time.sleep(silent)
        if send_it:
            preempt.sendall(bytes(urgent.data) + source.finish_preempt())
        with suppress(ConnectionError):
            while forward.recv(4096):
                pass


@pytest.mark.parametrize("send_it", [True, False], ids=["it comes", "it never comes"])
def test_a_loop_that_waits_for_a_requested_page_does_not_spin(send_it: bool) -> None:
    target = GuestTarget(lambda guest, _: guest.touch({"pc.ram": np.array([0])}))
    silent = 1.5
    with Listener(parse_address("tcp:127.0.0.1:0")) as listener:
        source = threading.Thread(
            target=send_the_page_asked_for_late,
            args=(str(listener.address), silent if send_it else 0),
            kwargs={"send_it": send_it},
        )
        source.start()
        loop = DestinationLoop(
            listener, DestinationConnection(), target, silence=10 if send_it else silent
        )
        begin = time.thread_time()
        try:
            if send_it:
                assert loop.run().urgent_pages == 1
                assert target.touch is not None
                assert target.touch.words.tolist() == [0x0707070707070707]
            else:
                with pytest.raises(RemoteProtocolError, match="silent for") as caught:
                    loop.run()
                assert caught.value.kind is ErrorKind.TIMEOUT
        finally:
            target.close()
        assert time.thread_time() - begin < silent / 2
        source.join(30)
    assert not source.is_alive()
