"""A source and a destination joined in memory, driven at random, against a model of RAM.

Bytes of the three channels wait in queues and are handed over in pieces of any size, in any
order between the channels. The model knows what every page must hold, and which pages may come
once only. At the end of each run everything is handed over and compared.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from postcopy_proto import messages as m
from postcopy_proto.destination import DestinationConnection
from postcopy_proto.errors import Channel
from postcopy_proto.examples.source import ToyVm
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.source import BackgroundOrder, SourceConnection
from postcopy_proto.states import ReturnPathState

PAGE = 4096
HUGE = 4 * PAGE
PAGES = {"pc.ram": 24, "m0": 16, "rom": 1}
"""pages of each block; m0 is on host pages of four"""

PLACES = [(block, page) for block, count in PAGES.items() for page in range(count)]


class Vm(ToyVm):
    """A toy VM some of whose RAM is on larger host pages, and some of it zero."""

    def __init__(self, seed: int) -> None:
        super().__init__({name: count * PAGE for name, count in PAGES.items()}, seed)
        self.blocks[1] = RAMBlock("m0", PAGES["m0"] * PAGE, HUGE)
        for ram in self.ram.values():
            ram[:: 1 + seed % 5] = 0


class Migration(RuleBasedStateMachine):
    """One migration from its first byte to SHUT."""

    @initialize(
        seed=st.integers(0, 1000), preempt=st.booleans(), order=st.sampled_from(BackgroundOrder)
    )
    def open(self, seed: int, preempt: bool, order: BackgroundOrder) -> None:
        self.vm = Vm(seed)
        self.source = SourceConnection(
            self.vm, m.Configuration("toy-1"), preempt=preempt, order=order
        )
        self.destination = DestinationConnection(page_sizes={"m0": HUGE})
        self.queues = {channel: bytearray() for channel in Channel}
        self.memory = {
            name: np.full((count, PAGE), 0xEE, np.uint8) for name, count in PAGES.items()
        }
        self.switched = False
        self.finished = False
        self.precopied: set[tuple[str, int]] = set()
        self.present: set[tuple[str, int]] = set()
        self.placed_after_listen: set[tuple[str, int]] = set()
        self.asked: set[tuple[str, int]] = set()
        self.pings: list[int] = []
        self.pongs: list[int] = []
        self.requests_sent = 0
        self._forward([self.source.start()])

    def _forward(self, pieces: Iterable[bytes | memoryview]) -> None:
        for piece in pieces:  # each is good only until the next is asked for
            self.queues[Channel.FORWARD] += piece

    # ---- what the source does

    @precondition(lambda self: not self.switched)
    @rule(block=st.sampled_from(list(PAGES)), data=st.data())
    def precopy(self, block, data) -> None:
        pages = data.draw(st.lists(st.integers(0, PAGES[block] - 1), min_size=1, unique=True))
        self._forward([self.source.precopy(block, np.array(sorted(pages), np.intp))])
        for page in pages:
            self.vm.dirty[block].bits[page] = False
            self.precopied.add((block, page))

    @precondition(lambda self: not self.switched)
    @rule(place=st.sampled_from(PLACES), value=st.sampled_from([0, 1, 0xFF]))
    def guest_writes(self, place, value) -> None:
        self.vm.write(*place, value)

    @precondition(lambda self: not self.switched)
    @rule(everything=st.booleans())
    def switch_over(self, everything) -> None:
        for block, page in set(PLACES) - self.precopied:
            self.vm.dirty[block].bits[page] = True  # never sent is dirty too
        dirty = None if everything else self.vm.dirty
        self._forward(self.source.switchover(dirty, self.vm.device_state))
        self.switched = True

    @precondition(lambda self: self.switched and not self.finished)
    @rule(limit=st.integers(1, 20), background=st.booleans())
    def send_pages(self, limit, background) -> None:
        batch = self.source.next_batch(limit, background=background)
        if batch is not None:
            self.queues[batch.channel] += batch.data
            assert batch.pages > 0
        else:
            assert not self.source.has_requests

    @precondition(lambda self: self.switched and not self.finished and self.source.owed == 0)
    @rule()
    def finish(self) -> None:
        self._forward([self.source.finish()])
        self.finished = True

    # ---- what the network does

    @rule(
        channel=st.sampled_from([Channel.FORWARD] * 3 + [Channel.PREEMPT, Channel.RETURN]),
        size=st.integers(1, 40_000),
    )
    def hand_over(self, channel, size) -> None:
        piece = bytes(self.queues[channel][:size])
        del self.queues[channel][:size]
        if not piece:
            return
        if channel is Channel.FORWARD:
            self.destination.receive_data(piece)
            self._drain(self.destination.next_event)
        elif channel is Channel.PREEMPT:
            self.destination.receive_preempt_data(piece)
            self._drain(self.destination.next_preempt_event)
        else:
            self.source.receive_data(piece)
            self._drain_return()

    # ---- what the destination does

    @precondition(lambda self: self.destination.return_path_state in _MAY_ASK)
    @rule(places=st.lists(st.sampled_from(PLACES), min_size=1, max_size=5))
    def guest_touches(self, places) -> None:
        data, count = self.destination.request_pages(
            [(block, page * PAGE + 7) for block, page in places]
        )
        assert bool(data) == bool(count)
        self.queues[Channel.RETURN] += data
        self.requests_sent += count
        self.asked.update(places)

    def _drain(self, next_event) -> None:
        while not isinstance(event := next_event(), m.NeedData | m.EndOfStream):
            match event:
                case m.Ping(value):
                    self.pings.append(value)
                    self.queues[Channel.RETURN] += self.destination.send(m.Pong(value))
                case m.PostcopyRamDiscard(block, ranges):
                    for start, length in ranges:
                        pages = range(start // PAGE, (start + length) // PAGE)
                        self.present -= {(block, page) for page in pages}
                        self.memory[block][list(pages)] = 0xEE
                case m.Pages():
                    self._place(event)

    def _place(self, event: m.Pages) -> None:
        for number, offset in enumerate(event.offsets.tolist()):
            place = (event.block, offset // PAGE)
            if self.destination.running:
                assert place not in self.placed_after_listen, "placed twice"
                assert place not in self.present, "placed over what was already there"
                self.placed_after_listen.add(place)
            content = event.page(number)
            self.memory[place[0]][place[1]] = 0 if content is None else np.frombuffer(content, "u1")
            self.present.add(place)

    def _drain_return(self) -> None:
        while not isinstance(event := self.source.next_event(), m.NeedData | m.EndOfStream):
            if isinstance(event, m.Pong):
                self.pongs.append(event.value)

    # ---- what must hold

    @invariant()
    def received_bitmaps_are_the_models(self) -> None:
        for block, bitmap in self.destination.received.items():
            assert {page for page in range(PAGES[block]) if bitmap.bits[page]} == {
                page for name, page in self.present if name == block
            }

    @invariant()
    def nothing_is_placed_twice(self) -> None:
        assert self.destination.duplicates == 0

    def teardown(self) -> None:
        if not hasattr(self, "vm"):
            return
        if not self.switched:
            self.switch_over(everything=False)
        while any(self.queues.values()) or not self.finished:
            for channel in (Channel.RETURN, Channel.PREEMPT, Channel.FORWARD):
                self.hand_over(channel, 1 << 20)
            if not self.finished:
                self.send_pages(64, background=True)
                if self.source.owed == 0 and not self.source.has_requests:
                    self.finish()
        assert self.destination.ended
        assert self.present == set(PLACES), "pages were lost"
        for block, ram in self.vm.ram.items():
            assert np.array_equal(self.memory[block], ram), block
        assert self.destination.outstanding == 0
        assert self.pings == self.pongs == [1, 2, 3, 4]
        assert self.source.requests == self.requests_sent
        self.source.receive_data(self.destination.send(m.Shut(0)))
        self._drain_return()
        assert self.source.shut_status == 0


_MAY_ASK = (ReturnPathState.FAULTS, ReturnPathState.NAMED)

Migration.TestCase.settings = settings(
    max_examples=60 * int(os.environ.get("POSTCOPY_SOAK", "1")),
    stateful_step_count=40,
    deadline=None,
)
TestMigration = Migration.TestCase
