"""Lazy restore against destinations that misbehave; the well-behaved ones are stock QEMUs."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from postcopy_proto import messages as m
from postcopy_proto.errors import Channel, RemoteProtocolError
from postcopy_proto.net.incoming import IncomingQemu
from postcopy_proto.net.qmp import QmpError
from postcopy_proto.net.restore import Restore, RestoreError, RestoreOptions, restore
from postcopy_proto.net.source_loop import SourceStatistics
from postcopy_proto.net.transport import Address, Listener, TransportError
from postcopy_proto.savefile import SavedVm, open_saved_vm
from postcopy_proto.wire import ForwardDecoder, PreemptDecoder, encode, parse_package
from tests.savefile.streams import PAGE, SaveStreamBuilder

PAGES = 600


@pytest.fixture
def stream() -> SaveStreamBuilder:
    content = np.random.default_rng(0).integers(256, size=(PAGES, PAGE), dtype=np.uint8)
    content[::5] = 0
    return SaveStreamBuilder({"pc.ram": PAGES}).pages("pc.ram", list(range(PAGES)), content)


@pytest.fixture
def vm(tmp_path: Path, stream: SaveStreamBuilder) -> Iterator[SavedVm]:
    (tmp_path / "vm").write_bytes(stream.data)
    opened = open_saved_vm(tmp_path / "vm")
    yield opened
    opened.close()


class Destination:
    """Reads what comes until the package, does `then`, and reads on to the end."""

    def __init__(self, then: Callable[[socket.socket], None]) -> None:
        self.ours, self._theirs = socket.socketpair()
        self.events: list[m.Message] = []
        self.memory = np.full((PAGES, PAGE), 0xEE, np.uint8)
        self.arrivals = np.zeros(PAGES, int)
        self.ended = threading.Event()
        self._then = then
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # The other side may hang up on us at any time: that is what most tests are about.
        with contextlib.suppress(ConnectionError):
            self._receive()

    def _receive(self) -> None:
        decoder = ForwardDecoder()
        while data := self._theirs.recv(1 << 16):
            decoder.receive_data(data)
            while not isinstance(event := decoder.next_event(), m.NeedData):
                if isinstance(event, m.Pages):
                    self.place(event)
                    continue
                self.events.append(event)
                if isinstance(event, m.Packaged):
                    self._then(self._theirs)
                if isinstance(event, m.Eof):
                    self.ended.set()
                    self._theirs.sendall(encode(m.Shut(0)))
                    self._theirs.shutdown(socket.SHUT_WR)

    def place(self, batch: m.Pages) -> None:
        for index, offset in enumerate(batch.offsets.tolist()):
            page = batch.page(index)
            self.arrivals[offset // PAGE] += 1
            self.memory[offset // PAGE] = 0 if page is None else np.frombuffer(page, np.uint8)

    def close(self) -> None:
        self.ours.close()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._theirs.close()


def run(
    vm: SavedVm, then: Callable[[socket.socket], None], **options: float
) -> tuple[Destination, SourceStatistics]:
    destination = Destination(then)
    try:
        settings = RestoreOptions(**{"silence": 5.0, **options})  # type: ignore[arg-type]
        statistics = Restore(vm, destination.ours, settings).run()
    finally:
        destination.close()
    return destination, statistics


def says(*items: m.Message) -> Callable[[socket.socket], None]:
    return lambda sock: sock.sendall(b"".join(map(encode, items)))


def test_every_page_comes_once_and_right(vm: SavedVm, stream: SaveStreamBuilder) -> None:
    asked = [m.ReqPagesId(400 * PAGE, PAGE, "pc.ram"), m.ReqPages(3 * PAGE, PAGE)]
    asked += [m.ReqPages(400 * PAGE, PAGE), m.ReqPages(599 * PAGE, PAGE)]
    destination, statistics = run(vm, says(m.Pong(2), *asked, m.Pong(3)))
    assert (destination.arrivals == 1).all()
    np.testing.assert_array_equal(destination.memory, stream.memory["pc.ram"])
    assert statistics.requests == 4
    assert statistics.pages + statistics.zero_pages == PAGES
    [package] = [event for event in destination.events if isinstance(event, m.Packaged)]
    assert m.DeviceState(stream.device_state) in parse_package(package.payload)


def test_pages_that_are_asked_for_take_the_second_connection(
    vm: SavedVm, stream: SaveStreamBuilder
) -> None:
    asked = [m.ReqPagesId(400 * PAGE, PAGE, "pc.ram"), m.ReqPages(5 * PAGE, PAGE)]
    asked += [m.ReqPages(7 * PAGE, 2 * PAGE)]
    destination = Destination(says(m.Pong(2), *asked, m.Pong(3)))
    urgent, theirs = socket.socketpair()
    settings = RestoreOptions(silence=5.0, bandwidth=0, drain_after=0.3)
    try:
        restoring = Restore(vm, destination.ours, settings, connect_preempt=lambda: urgent)
        statistics = restoring.run()
        urgent.close()
        decoder = PreemptDecoder()
        while data := theirs.recv(1 << 16):
            decoder.receive_data(data)
        decoder.receive_data(b"")
        batches = [event for event in decoder if isinstance(event, m.Pages)]
    finally:
        destination.close()
        theirs.close()
    assert statistics.requested_pages == 4
    assert [int(o) // PAGE for batch in batches for o in batch.offsets] == [400, 5, 7, 8]
    for batch in batches:
        destination.place(batch)
    assert (destination.arrivals == 1).all()
    np.testing.assert_array_equal(destination.memory, stream.memory["pc.ram"])


def test_a_second_connection_that_breaks(vm: SavedVm) -> None:
    destination = Destination(says(m.ReqPagesId(0, PAGE, "pc.ram")))
    urgent, theirs = socket.socketpair()
    theirs.close()
    settings = RestoreOptions(silence=5.0, bandwidth=0)
    try:
        with pytest.raises(RestoreError, match="went away: preempt channel"):
            Restore(vm, destination.ours, settings, connect_preempt=lambda: urgent).run()
    finally:
        destination.close()
        urgent.close()


def test_only_requests_then_the_rest(vm: SavedVm) -> None:
    started = time.monotonic()
    asked = m.ReqPagesId(7 * PAGE, PAGE, "pc.ram")
    destination, statistics = run(vm, says(asked, m.Pong(3)), bandwidth=0, drain_after=0.3)
    assert time.monotonic() - started >= 0.3
    assert (destination.arrivals == 1).all()
    assert statistics.requested_pages == 1
    assert len(statistics.request_latency_ns) == 1


def test_requests_without_end_do_not_hold_up_all_else(vm: SavedVm) -> None:
    flood = encode(m.ReqPages(0, PAGE)) * 500

    def then(sock: socket.socket) -> None:
        sock.sendall(encode(m.ReqPagesId(0, PAGE, "pc.ram")))
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            sock.sendall(flood)
        sock.sendall(encode(m.Pong(3)))

    asked: list[float] = []

    def may_drain() -> bool:
        asked.append(time.monotonic())
        return False

    destination = Destination(then)
    try:
        settings = RestoreOptions(silence=5.0, bandwidth=0, drain_after=2)
        Restore(vm, destination.ours, settings, may_drain=may_drain).run()
    finally:
        destination.close()
    assert len(asked) > 3
    assert max(np.diff(asked)) < 1


def test_bandwidth_holds_the_background_back(vm: SavedVm) -> None:
    _, statistics = run(vm, says(m.Pong(3)), bandwidth=8e6)
    assert 0.15 < statistics.seconds < 2  # 2 MB, of which a tenth of a second's worth is free


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (m.ReqPagesId(PAGES * PAGE, PAGE, "pc.ram"), "beyond its length"),
        (m.ReqPagesId(0, (PAGES + 1) * PAGE, "pc.ram"), "beyond its length"),
        (m.ReqPagesId(100, PAGE, "pc.ram"), "host pages"),
        (m.ReqPagesId(0, 0, "pc.ram"), "host pages"),
        (m.ReqPagesId(0, PAGE, "nobody"), "unknown RAMBlock 'nobody'"),
        (m.ReqPages(0, PAGE), "REQ_PAGES"),
        (m.Shut(1), "ended with status 1"),
        (m.Shut(0), r"ended with status 0, [1-9]\d* pages before the end"),
        (m.ResumeAck(), "RESUME_ACK"),
    ],
)
def test_bad_messages(vm: SavedVm, request_: m.Message, words: str) -> None:
    with pytest.raises(RestoreError, match=words):
        run(vm, says(request_), bandwidth=1e5)


def test_garbage_on_the_return_path(vm: SavedVm) -> None:
    with pytest.raises(RestoreError, match="it has not run the VM"):
        run(vm, lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), bandwidth=1e5)


def test_a_destination_that_goes_away_before_and_after_it_ran_the_vm(vm: SavedVm) -> None:
    with pytest.raises(RestoreError, match="has not run the VM"):
        run(vm, lambda sock: sock.shutdown(socket.SHUT_RDWR), bandwidth=1e5)

    def dies_later(sock: socket.socket) -> None:
        sock.sendall(encode(m.Pong(3)))
        time.sleep(0.1)
        sock.shutdown(socket.SHUT_RDWR)

    with pytest.raises(RestoreError, match="can be restored again"):
        run(vm, dies_later, bandwidth=1e5)


def test_one_that_reads_nothing(vm: SavedVm) -> None:
    ours, theirs = socket.socketpair()
    started = time.monotonic()
    with pytest.raises(RestoreError, match=r"waited 0\.3 s for (our bytes to be read|SHUT)"):
        Restore(vm, ours, RestoreOptions(silence=0.3)).run()
    assert time.monotonic() - started < 5
    ours.close()
    theirs.close()


def test_one_that_never_says_the_end(vm: SavedVm) -> None:
    ours, theirs = socket.socketpair()

    def swallow() -> None:
        while theirs.recv(1 << 20):
            pass

    reader = threading.Thread(target=swallow, daemon=True)
    reader.start()
    with pytest.raises(RestoreError, match=r"waited 0\.3 s for SHUT"):
        Restore(vm, ours, RestoreOptions(silence=0.3)).run()
    ours.close()
    reader.join(5)
    theirs.close()


@pytest.mark.parametrize(
    "said", [m.ReqPages(0, PAGE), m.Pong(3), m.Pong(4)], ids=["requests", "loaded", "pongs"]
)
def test_one_that_talks_on_and_on_and_never_says_the_end(vm: SavedVm, said: m.Message) -> None:
    def then(sock: socket.socket) -> None:
        sock.sendall(encode(m.ReqPagesId(0, PAGE, "pc.ram")))

        def flood() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock.sendall(encode(said) * 100)

        threading.Thread(target=flood, daemon=True).start()
        while sock.recv(1 << 16):
            pass

    started = time.monotonic()
    with pytest.raises(RestoreError, match=r"waited 0\.5 s for SHUT"):
        run(vm, then, silence=0.5)
    assert time.monotonic() - started < 10


def test_a_qemu_that_dies_behind_its_last_page(vm: SavedVm, tmp_path: Path) -> None:
    """After SHUT only QMP is left to say so."""

    class Dying(IncomingQemu):
        def __init__(self) -> None: ...

        def listen(self, address: Address, *, preempt: bool = False) -> None: ...

        def wait(self, timeout: float | None) -> None:
            raise QmpError("QEMU went away during query-migrate")

        def failure(self) -> str:
            return "QEMU answers no more"

    with Listener(Address("unix", path=str(tmp_path / "in"))) as listener:
        destination = Destination(says(m.Pong(3)))

        def relay() -> None:
            theirs = listener.accept(5)
            theirs.setblocking(True)
            while data := theirs.recv(1 << 16):
                destination.ours.sendall(data)
                if data.endswith(encode(m.Eof())) and destination.ended.wait(0.2):
                    theirs.sendall(encode(m.Shut(0)))
            theirs.close()

        thread = threading.Thread(target=relay, daemon=True)
        thread.start()
        with pytest.raises(RestoreError) as caught:
            restore(vm, listener.address, Dying(), options=RestoreOptions(silence=5.0))
        thread.join(10)
        destination.close()
    text = str(caught.value)
    assert "went away during query-migrate. It had taken every page" in text
    assert "can be restored again" in text
    assert "QEMU answers no more" in text


def test_a_save_file_that_shrinks(vm: SavedVm, tmp_path: Path) -> None:
    with open(tmp_path / "vm", "r+b") as file:
        file.truncate(20 * PAGE)
    with pytest.raises(RemoteProtocolError) as caught:
        run(vm, says(m.Pong(3)))
    assert caught.value.channel is Channel.FILE


def test_nobody_listens(vm: SavedVm, tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="can't connect"):
        restore(vm, Address("unix", path=str(tmp_path / "none")))
