"""Both connections, joined in memory and each against a peer that breaks the rules."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from postcopy_proto import messages as m
from postcopy_proto.destination import DestinationConnection
from postcopy_proto.dirty import DirtyBitmap
from postcopy_proto.errors import (
    Channel,
    ErrorKind,
    LocalProtocolError,
    RemoteProtocolError,
)
from postcopy_proto.examples.source import ToyVm
from postcopy_proto.ramblock import ByteRange
from postcopy_proto.source import BackgroundOrder, SourceConnection
from postcopy_proto.states import ForwardState, ReturnPathState
from postcopy_proto.wire import encode

PAGE = 4096
MACHINE = m.Configuration("toy-1")
DEVICES = ToyVm.device_state


class Pair:
    """A source and a destination joined in memory, and the destination's memory."""

    def __init__(self, sizes: dict[str, int] | None = None, **options) -> None:
        self.vm = ToyVm(sizes or {"a": 64 * PAGE, "b": 5 * PAGE}, seed=1)
        self.source = SourceConnection(self.vm, MACHINE, **options)
        self.destination = DestinationConnection()
        self.memory: dict[str, bytearray] = {}
        self.placed: list[tuple[str, int]] = []
        self.events: list[m.Message] = []

    def forward(self, *pieces: bytes | memoryview, channel: Channel = Channel.FORWARD) -> None:
        for piece in pieces:
            if channel is Channel.PREEMPT:
                self.destination.receive_preempt_data(piece)
                self._drain(self.destination.next_preempt_event)
            else:
                self.destination.receive_data(piece)
                self._drain(self.destination.next_event)

    def _drain(self, next_event) -> None:
        while not isinstance(event := next_event(), m.NeedData | m.EndOfStream):
            self.events.append(event)
            if isinstance(event, m.RamBlockList):
                self.memory = {b.idstr: bytearray(b.used_length) for b in event.blocks}
            elif isinstance(event, m.Ping):
                self.back(self.destination.send(m.Pong(event.value)))
            elif isinstance(event, m.Pages):
                for index, offset in enumerate(event.offsets.tolist()):
                    content = event.page(index)
                    self.memory[event.block][offset : offset + PAGE] = content or bytes(PAGE)
                    self.placed.append((event.block, offset))

    def back(self, data: bytes) -> list[m.Message]:
        self.source.receive_data(data)
        events = []
        while not isinstance(event := self.source.next_event(), m.NeedData | m.EndOfStream):
            events.append(event)
        return events

    def switch(self) -> Pair:
        self.forward(self.source.start())
        self.switch_over(None)
        return self

    def switch_over(self, dirty: dict[str, DirtyBitmap] | None) -> None:
        # Each piece is good until the next one is asked for.
        for piece in self.source.switchover(dirty, DEVICES):
            self.forward(piece)

    def ask(self, *faults: tuple[str, int]) -> int:
        data, count = self.destination.request_pages(faults)
        if data:
            self.back(data)
        return count

    def deliver(self, limit: int = 16) -> None:
        while (batch := self.source.next_batch(limit)) is not None:
            self.forward(batch.data, channel=batch.channel)

    def end(self) -> None:
        self.forward(self.source.finish())
        assert self.destination.ended
        self.back(self.destination.send(m.Shut(0)))


def test_everything_arrives_once() -> None:
    pair = Pair().switch()
    assert pair.destination.state is ForwardState.RUNNING
    assert DEVICES in [e.data for e in pair.events if isinstance(e, m.DeviceState)]
    assert pair.ask(("b", 4 * PAGE), ("b", 4 * PAGE + 7), ("a", 9 * PAGE), ("b", 0)) == 3
    pair.deliver()
    pair.end()
    assert pair.placed[:3] == [("b", 4 * PAGE), ("a", 9 * PAGE), ("b", 0)]
    assert len(pair.placed) == len(set(pair.placed)) == 69
    assert pair.memory == {name: bytes(ram) for name, ram in pair.vm.ram.items()}
    assert pair.source.shut_status == 0
    assert pair.source.requests == 3


def test_precopy_then_only_what_is_dirty() -> None:
    pair = Pair()
    pair.forward(pair.source.start())
    for block in pair.vm.blocks:
        pair.forward(pair.source.precopy(block.idstr, np.arange(block.page_count())))
    pair.vm.write("a", 3, 7)
    pair.vm.write("a", 5, 0)
    pair.switch_over(pair.vm.dirty)
    assert not pair.destination.has_page("a", 3 * PAGE)
    assert pair.destination.has_page("a", 4 * PAGE)
    before = len(pair.placed)
    pair.deliver()
    assert pair.placed[before:] == [("a", 3 * PAGE), ("a", 5 * PAGE)]
    pair.end()
    assert pair.memory["a"] == bytes(pair.vm.ram["a"])


def test_nothing_dirty_still_discards_once() -> None:
    """A stock destination fails on a package that no discard went before."""
    pair = Pair()
    pair.forward(pair.source.start())
    for block in pair.vm.blocks:
        pair.forward(pair.source.precopy(block.idstr, np.arange(block.page_count())))
    clean = {b.idstr: DirtyBitmap(b.page_count()) for b in pair.vm.blocks}
    pair.switch_over(clean)
    assert [e for e in pair.events if isinstance(e, m.PostcopyRamDiscard)]
    pair.deliver()
    pair.end()
    assert pair.memory == {name: bytes(ram) for name, ram in pair.vm.ram.items()}


def test_requested_pages_on_a_preempt_channel() -> None:
    pair = Pair(preempt=True).switch()
    pair.ask(("a", 8 * PAGE), ("a", 9 * PAGE), ("b", 0))
    batches = [pair.source.next_batch(background=False) for _ in range(3)]
    assert [batch.channel for batch in batches] == [Channel.PREEMPT] * 3
    assert [list(batch.requests) for batch in batches] == [[0], [1], [2]]
    assert pair.source.next_batch(background=False) is None
    sizes = [len(batch.data) for batch in batches]
    named, continued = 8 + 2 + PAGE, 8 + PAGE
    assert sizes == [named, continued, named]
    for batch in batches:
        pair.forward(batch.data, channel=Channel.PREEMPT)
    assert pair.destination.outstanding == 0
    pair.deliver()
    pair.end()


@pytest.mark.parametrize(
    ("order", "then"), [(BackgroundOrder.AFTER_REQUEST, 41), (BackgroundOrder.SEQUENTIAL, 0)]
)
def test_where_the_background_goes_on(order: BackgroundOrder, then: int) -> None:
    pair = Pair(order=order).switch()
    pair.ask(("a", 40 * PAGE))
    pair.forward(pair.source.next_batch(4).data)
    pair.forward(pair.source.next_batch(4).data)
    assert pair.placed[:2] == [("a", 40 * PAGE), ("a", then * PAGE)]


def test_a_page_asked_for_twice_or_on_its_way_is_sent_once() -> None:
    pair = Pair().switch()
    first = pair.source.next_batch(8)
    # The destination does not know yet what is on its way.
    pair.back(pair.destination.request_pages([("a", 0)])[0])
    assert not pair.source.has_requests
    pair.forward(first.data)
    assert pair.ask(("a", 0)) == 0
    pair.deliver()
    assert len(pair.placed) == 69


def test_huge_host_pages_travel_whole() -> None:
    huge = 2 << 20
    vm = ToyVm({"m0": 3 * huge, "rom": PAGE}, seed=2)
    vm.blocks[0] = type(vm.blocks[0])("m0", 3 * huge, huge)
    pair = Pair()
    pair.vm, pair.source = vm, SourceConnection(vm, MACHINE)
    pair.forward(pair.source.start())
    assert pair.destination.blocks["m0"].page_size == huge
    vm.dirty["m0"].bits[700] = True
    pair.switch_over(vm.dirty)
    discards = [e for e in pair.events if isinstance(e, m.PostcopyRamDiscard)]
    assert discards == [m.PostcopyRamDiscard("m0", (ByteRange(huge, huge),))]
    pair.ask(("m0", huge + 5))
    batch = pair.source.next_batch(1)
    assert batch.pages == 512
    pair.forward(batch.data)
    pair.end()


# ---- the source refuses


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (m.ReqPagesId(0, PAGE, "nowhere"), ErrorKind.UNKNOWN),
        (m.ReqPagesId(0, PAGE + 1, "a"), ErrorKind.RANGE),
        (m.ReqPagesId(8, PAGE, "a"), ErrorKind.RANGE),
        (m.ReqPagesId(0, 0, "a"), ErrorKind.RANGE),
        (m.ReqPagesId(64 * PAGE, PAGE, "a"), ErrorKind.RANGE),
        (m.ReqPagesId(0xFFFFFFFFFFFFF000, PAGE, "a"), ErrorKind.RANGE),
        (m.ReqPages(0, PAGE), ErrorKind.STATE),
        (m.ReceivedBitmap("a", bytes(8)), ErrorKind.STATE),
        (m.ResumeAck(), ErrorKind.STATE),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_source_refuses(message: m.Message, kind: ErrorKind) -> None:
    pair = Pair().switch()
    with pytest.raises(RemoteProtocolError) as caught:
        pair.back(encode(message))
    error = caught.value
    assert error.kind is kind
    assert error.channel is Channel.RETURN
    assert error.offset is not None
    assert error.state == "FAULTS"
    assert error.message is not None
    assert error.message in str(error)
    with pytest.raises(RemoteProtocolError):
        pair.source.next_event()


def test_the_source_refuses_requests_before_listen() -> None:
    pair = Pair()
    pair.forward(pair.source.start())
    with pytest.raises(RemoteProtocolError, match="not allowed here"):
        pair.back(encode(m.ReqPagesId(0, PAGE, "a")))


def test_the_source_refuses_a_close_without_shut() -> None:
    pair = Pair().switch()
    with pytest.raises(RemoteProtocolError, match="without SHUT"):
        pair.back(b"")


def test_a_request_for_everything_is_served_in_pieces() -> None:
    pair = Pair().switch()
    pair.back(encode(m.ReqPagesId(0, 64 * PAGE, "a")))
    batch = pair.source.next_batch(8)
    assert batch.urgent
    assert batch.pages == 8
    assert pair.source.has_requests


def test_calls_out_of_order() -> None:
    vm = ToyVm({"a": 4 * PAGE})
    source = SourceConnection(vm, MACHINE)
    with pytest.raises(LocalProtocolError, match="state ADVISE"):
        source.precopy("a", np.arange(1))
    with pytest.raises(LocalProtocolError):
        source.next_batch()
    source.start()
    with pytest.raises(LocalProtocolError, match="not allowed"):
        source.start()
    list(source.switchover(None, b""))
    with pytest.raises(LocalProtocolError, match="4 pages"):
        source.finish()
    with pytest.raises(ValueError, match="section id 0"):
        SourceConnection(vm, MACHINE, section_id=0)


# ---- the destination refuses


def opened(*more: m.Message) -> DestinationConnection:
    connection = DestinationConnection()
    vm = ToyVm({"a": 64 * PAGE, "b": 5 * PAGE})
    feed(connection, SourceConnection(vm, MACHINE).start(), *map(encode, more))
    return connection


def feed(connection: DestinationConnection, *pieces: bytes) -> list[m.Message]:
    events = []
    for piece in pieces:
        connection.receive_data(piece)
        while not isinstance(event := connection.next_event(), m.NeedData | m.EndOfStream):
            events.append(event)
    return events


def package(*content: m.Message) -> m.Packaged:
    return m.Packaged(b"".join(map(encode, content)))


RUN = package(m.PostcopyListen(), m.Ping(3), m.PostcopyRun())


def bad_forward() -> Iterator[tuple[str, list[m.Message], ErrorKind]]:
    whole = m.PostcopyRamDiscard("a", (ByteRange(0, PAGE),))
    yield (
        "block",
        [m.PostcopyRamDiscard("nowhere but long", (ByteRange(0, PAGE),))],
        ErrorKind.UNKNOWN,
    )
    yield (
        "aligned",
        [m.PostcopyRamDiscard("a", (ByteRange(1, PAGE), ByteRange(0, PAGE)))],
        ErrorKind.RANGE,
    )
    yield "outside", [m.PostcopyRamDiscard("b", (ByteRange(0, 6 * PAGE),))], ErrorKind.RANGE
    yield "high", [m.PostcopyRamDiscard("b", (ByteRange(2**63, PAGE),))], ErrorKind.RANGE
    yield "discard after LISTEN", [whole, RUN, whole], ErrorKind.STATE
    yield "LISTEN inline", [whole, m.PostcopyListen()], ErrorKind.STATE
    yield "RUN inline", [whole, m.PostcopyRun()], ErrorKind.STATE
    yield "advise twice", [m.PostcopyAdvise(PAGE, PAGE)], ErrorKind.STATE
    yield "two packages", [whole, RUN, RUN], ErrorKind.STATE
    yield "EOF in DISCARD", [whole, m.Eof()], ErrorKind.STATE
    yield "COLO", [m.EnableColo()], ErrorKind.STATE
    yield "RESUME", [whole, RUN, m.PostcopyResume()], ErrorKind.STATE


@pytest.mark.parametrize(
    ("messages", "kind"), [(e[1], e[2]) for e in bad_forward()], ids=[e[0] for e in bad_forward()]
)
def test_the_destination_refuses(messages: list[m.Message], kind: ErrorKind) -> None:
    connection = opened()
    with pytest.raises(RemoteProtocolError) as caught:
        feed(connection, *map(encode, messages))
    error = caught.value
    assert error.kind is kind, error
    assert error.channel is Channel.FORWARD
    assert error.offset is not None
    assert error.state is not None
    with pytest.raises(RemoteProtocolError):
        connection.next_event()


def test_a_bad_discard_changes_nothing() -> None:
    """QEMU clears the bits before it looks at the range."""
    connection = opened()
    vm = ToyVm({"a": 64 * PAGE})
    source = SourceConnection(vm, MACHINE)
    source.start()
    feed(connection, bytes(source.precopy("a", np.arange(64))))
    bad = m.PostcopyRamDiscard("a", (ByteRange(0, PAGE), ByteRange(0, 65 * PAGE)))
    with pytest.raises(RemoteProtocolError):
        feed(connection, encode(bad))
    assert connection.received["a"].count() == 64


@pytest.mark.parametrize("cut", [0, 3, 40, 200])
def test_a_stream_that_breaks_off(cut: int) -> None:
    vm = ToyVm({"a": 64 * PAGE})
    data = SourceConnection(vm, MACHINE).start()[: cut or None]
    connection = DestinationConnection()
    with pytest.raises(RemoteProtocolError) as caught:
        feed(connection, data, b"")
    assert caught.value.kind is ErrorKind.TRUNCATED
    assert caught.value.offset == len(data)


def test_listen_needs_a_return_path() -> None:
    head = [m.StreamHeader(), MACHINE, m.PostcopyAdvise(PAGE, PAGE), m.SectionStart(2, "ram", 0, 4)]
    blocks = m.RamBlockList((m.RamBlockEntry("a", PAGE),))
    connection = DestinationConnection()
    feed(connection, *map(encode, [*head, blocks, m.RamEos(), m.SectionFooter(2)]))
    assert connection.return_path_state is ReturnPathState.CLOSED
    with pytest.raises(RemoteProtocolError, match="OPEN_RETURN_PATH"):
        feed(connection, encode(RUN))


def test_an_urgent_page_before_listen() -> None:
    connection = opened()
    pages = Pair(preempt=True).switch()
    pages.ask(("a", 0))
    connection.receive_preempt_data(pages.source.next_batch().data)
    with pytest.raises(RemoteProtocolError, match="before LISTEN") as caught:
        connection.next_preempt_event()
    assert caught.value.channel is Channel.PREEMPT


def test_a_second_copy_after_listen_is_dropped_and_counted() -> None:
    pair = Pair().switch()
    batch = pair.source.next_batch(8)
    copy = bytes(batch.data)
    pair.forward(copy, copy)
    assert pair.destination.duplicates == 8
    assert len(pair.placed) == 8


def test_requests_only_after_listen_and_only_for_what_exists() -> None:
    connection = opened()
    with pytest.raises(LocalProtocolError):
        connection.request_pages([("a", 0)])
    feed(connection, encode(RUN))
    for fault in (("nowhere", 0), ("a", 64 * PAGE), ("a", -1)):
        with pytest.raises(LocalProtocolError):
            connection.request_pages([fault])
    data, count = connection.request_pages([("a", 0), ("a", PAGE), ("b", 0)])
    assert count == 3
    assert data == b"".join(
        map(
            encode, [m.ReqPagesId(0, PAGE, "a"), m.ReqPages(PAGE, PAGE), m.ReqPagesId(0, PAGE, "b")]
        )
    )
    assert connection.outstanding == 3


def test_advise_must_fit() -> None:
    for advise, kind in (
        (m.PostcopyAdvise(8192, 8192), ErrorKind.MISMATCH),
        (m.PostcopyAdvise(), ErrorKind.UNSUPPORTED),
    ):
        connection = DestinationConnection()
        with pytest.raises(RemoteProtocolError) as caught:
            feed(connection, *map(encode, [m.StreamHeader(), MACHINE, advise]))
        assert caught.value.kind is kind
