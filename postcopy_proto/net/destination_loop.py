"""The destination's event loop: one thread, one poll over every descriptor of a migration.

Forward channel, preempt channel, return path and userfaultfd are served by the same thread: a
second thread would wait for the interpreter's lock just when a vCPU waits for its page. Faults
are drained in batches before anything else, their requests leave in one send, urgent pages are
placed before those of the background.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from postcopy_proto import messages as m
from postcopy_proto.destination import DestinationConnection
from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.net.transport import (
    Listener,
    TransferMode,
    TransportError,
    limit_buffer,
    tune,
)
from postcopy_proto.states import ReturnPathState

CLOSE_TIMEOUT = 10.0
"""Seconds that a source gets to close after our SHUT before we close on it. Closing first, with
bytes unread, could reset the connection and take the SHUT with it."""

TICK_SECONDS = 0.1
"""How often progress is shown, and a silent source or a dead guest is noticed."""

PATIENCE_MILLISECONDS = 1
"""How long a part of a bufferful of background pages waits for the rest."""


class Target(Protocol):
    """What a destination's memory does at each step of a migration; see `net.target`."""

    @property
    def wants_runs(self) -> bool:
        """Whether pages had better lie side by side than as the records that they came in."""

    def open(self, connection: DestinationConnection) -> None:
        """RAM's block list has arrived: `connection.blocks`. No page has."""

    def place(self, pages: m.Pages, channel: Channel) -> None:
        """Place a batch that arrived on that channel."""

    def prepare_discard(self) -> None:
        """The first discard is about to come."""

    def discard(self, block: str, start: int, length: int) -> None:
        """Drop a range that will be sent again."""

    def listen(self) -> None:
        """LISTEN: from here on pages are placed while somebody may wait for them."""

    def run(self) -> None:
        """RUN: the VM may run."""

    def device_state(self, data: bytes) -> None:
        """The device sections, verbatim."""

    def fileno(self) -> int | None:
        """The userfaultfd to poll, or None when no faults can come."""

    def read_faults(self) -> list[tuple[str, int]]:
        """(idstr, byte offset) of every host page that somebody waits for."""

    @property
    def pending(self) -> bool:
        """Whether `read_faults` has something to report though the userfaultfd is not readable.

        Asked from `listen` on.
        """

    def tick(self) -> None:
        """Called a few times a second."""

    def finish(self) -> None:
        """The stream has ended and every page has arrived."""


@dataclass(slots=True)
class DestinationStatistics:
    """What went through a destination, for people and machines."""

    bytes: int = 0
    pages: int = 0
    """target pages that came with content"""
    zero_pages: int = 0
    """target pages that came as zero pages"""
    urgent_pages: int = 0
    """pages that came on the preempt channel"""
    discard_commands: int = 0
    discard_ranges: int = 0
    faults: int = 0
    requests: int = 0
    package_bytes: int = 0
    connected_at: float = 0.0
    listen_at: float | None = None
    """when LISTEN was read, on the monotonic clock as all times here"""
    ended_at: float | None = None
    bytes_at_listen: int = 0

    @property
    def seconds(self) -> float:
        """From the connection to the end of the stream."""
        return (self.ended_at or time.monotonic()) - self.connected_at

    @property
    def postcopy_seconds(self) -> float | None:
        """From LISTEN to the end of the stream; None when it never came."""
        if self.listen_at is None:
            return None
        return (self.ended_at or time.monotonic()) - self.listen_at

    @property
    def postcopy_bytes(self) -> int:
        """Bytes that arrived after LISTEN."""
        return self.bytes - self.bytes_at_listen if self.listen_at is not None else 0


class DestinationLoop:
    """Runs one migration from a source that connects to `listener` into `target`.

    `silence` is how many seconds the source may send nothing before it is given up (None: no
    limit); waiting for it to connect has a limit of its own, `accept_timeout`.
    """

    def __init__(
        self,
        listener: Listener,
        connection: DestinationConnection,
        target: Target,
        *,
        mode: TransferMode = TransferMode.THROUGHPUT,
        silence: float | None = 60.0,
        accept_timeout: float | None = None,
        on_progress: Callable[[DestinationStatistics], None] | None = None,
    ) -> None:
        self._listener = listener
        self._connection = connection
        self._target = target
        self._mode = mode
        self._silence = silence
        self._accept_timeout = accept_timeout
        self._on_progress = on_progress
        self._forward: socket.socket | None = None
        self._preempt: socket.socket | None = None
        self._buffers = {
            Channel.FORWARD: memoryview(bytearray(TransferMode.THROUGHPUT.value)),
            Channel.PREEMPT: memoryview(bytearray(TransferMode.LATENCY.value)),
        }
        self._out = bytearray()
        self._forward_events = 0
        self._discarding = False
        self._poll = select.poll()
        self._urgent_poll = select.poll()
        self._listening = False
        self._faults_fd: int | None = None
        self._last_heard = 0.0
        self._ticked = 0.0
        self.statistics = DestinationStatistics()

    def run(self) -> DestinationStatistics:
        """The whole migration. RemoteProtocolError, TransportError or UserfaultError end it.

        Whatever happens, the connections are closed; SHUT is sent only after a proper end, for
        a source reads anything else after the switchover as leave to start its VM again.
        """
        try:
            self._accept_forward()
            while not self._done():
                self._turn()
            self.statistics.ended_at = time.monotonic()
            self._target.finish()
            self._say_goodbye()
        finally:
            for sock in (self._forward, self._preempt):
                if sock is not None:
                    sock.close()
        return self.statistics

    def _accept_forward(self) -> None:
        # Before the connection is made: a TCP window does not shrink afterwards.
        limit_buffer(self._listener.socket, socket.SO_RCVBUF, self._mode)
        self._forward = self._listener.accept(self._accept_timeout)
        self._forward.setblocking(False)
        self._watch_forward()
        self._poll.register(self._listener, select.POLLIN)
        self._last_heard = self.statistics.connected_at = time.monotonic()

    def _done(self) -> bool:
        """With a preempt channel, requested pages may still be on their way behind the EOF."""
        if not self._connection.ended:
            return False
        return self._preempt is None or self._connection.outstanding == 0

    def _turn(self) -> None:
        """Once round: wait, then faults, urgent pages, background, in this order."""
        ready = dict(self._poll.poll(0 if self._faults_pending() else TICK_SECONDS * 1000))
        self._attend(ready)
        if self._listener.fileno() in ready:
            self._accept_preempt()
        assert self._forward is not None
        happened = ready.get(self._forward.fileno(), 0)
        if happened & select.POLLOUT:
            self._flush()
        if happened & ~select.POLLOUT and not self._connection.ended:
            self._read(self._forward, Channel.FORWARD)
        now = time.monotonic()
        if not ready or now - self._ticked >= TICK_SECONDS:
            self._ticked = now
            self._tick()

    def _attend(self, ready: Container[int]) -> None:
        """Faults, and pages that somebody waits for."""
        if self._faults_fd in ready or self._faults_pending():
            self._serve_faults()
        if self._preempt is not None and self._preempt.fileno() in ready:
            self._read(self._preempt, Channel.PREEMPT)

    def _faults_pending(self) -> bool:
        """Whether faults wait that no poll shows: read in the middle of a placement."""
        return self._listening and self._target.pending

    def _tick(self) -> None:
        """What is looked at now and then only."""
        self._target.tick()
        self._check_silence()
        if self._on_progress is not None:
            self._on_progress(self.statistics)

    def _check_silence(self) -> None:
        quiet = time.monotonic() - self._last_heard
        if self._silence is not None and quiet > self._silence:
            raise RemoteProtocolError(
                f"the source has been silent for {self._silence:g} s",
                kind=ErrorKind.TIMEOUT,
                channel=Channel.FORWARD,
                offset=self._connection.offset,
                state=str(self._connection.state),
            )

    def _accept_preempt(self) -> None:
        """The second connection is the preempt channel: it has no magic, only its order."""
        second, _ = self._listener.socket.accept()
        if self._preempt is not None:
            second.close()
            return
        tune(second)
        second.setblocking(False)
        self._preempt = second
        if self._listening:
            self._watch(second.fileno())

    # ---- bytes in

    def _read(self, sock: socket.socket, channel: Channel) -> None:
        """Take what is there, up to a bufferful, and act on it.

        A buffer is used again and again: the decoders keep nothing of it once they need more.
        """
        patient = channel is Channel.FORWARD and not self._awaited()
        size = len(self._buffers[channel]) if patient else self._mode.value
        filled, ended = 0, False
        if channel is Channel.FORWARD and self._listening and self._target.wants_runs:
            filled, ended = self._read_expected(sock, size, patient=patient)
        if not filled and not ended:
            filled, ended = self._read_plain(sock, channel, size, patient=patient)
        self._last_heard = time.monotonic()
        self.statistics.bytes += filled
        if filled:
            self._handle_events(channel)
        if ended:
            if channel is Channel.PREEMPT:
                self._poll.unregister(sock)
                self._urgent_poll.unregister(sock)
                self._connection.receive_preempt_data(b"")
            else:
                self._connection.receive_data(b"")
            self._handle_events(channel)

    def _awaited(self) -> bool:
        """Whether somebody waits for a page."""
        return self._faults_pending() or (self._listening and self._connection.outstanding > 0)

    def _read_plain(
        self, sock: socket.socket, channel: Channel, size: int, *, patient: bool
    ) -> tuple[int, bool]:
        """Up to `size` bytes into our buffer: how many, and whether the channel ended there."""
        buffer = self._buffers[channel][:size]

        def take(done: int) -> tuple[int, bool]:
            count = sock.recv_into(buffer[done:])
            return count, done + count == size

        filled, ended = self._fill(take, size, sock, channel, patient=patient)
        if filled and channel is Channel.PREEMPT:
            self._connection.receive_preempt_data(buffer[:filled])
        elif filled:
            self._connection.receive_data(buffer[:filled])
        return filled, ended

    def _read_expected(self, sock: socket.socket, size: int, *, patient: bool) -> tuple[int, bool]:
        """The same for pages that are foretold, straight to where they are placed from.

        Nothing is read when nothing is foretold.
        """
        connection = self._connection

        def take(done: int) -> tuple[int, bool] | None:
            buffers = connection.expected_buffers(size - done)
            if not buffers:
                return None
            count = sock.recvmsg_into(buffers)[0]
            connection.receive_expected(count)
            return count, not patient and count == sum(map(len, buffers))

        return self._fill(take, size, sock, Channel.FORWARD, patient=patient)

    def _fill(
        self,
        take: Callable[[int], tuple[int, bool] | None],
        size: int,
        sock: socket.socket,
        channel: Channel,
        *,
        patient: bool,
    ) -> tuple[int, bool]:
        """Bytes read, and whether the channel has ended behind them.

        `take` reads behind what has been read: how many bytes, and whether these were all there
        was room for; None when there is no room. With patience a part of `size` waits a moment
        for the rest: a Unix socket hands over some 200 KiB at a time, and much of a batch's cost
        does not depend on its size.
        """
        filled = 0
        while filled < size:
            try:
                taken = take(filled)
            except (BlockingIOError, InterruptedError):
                return filled, False
            except OSError as error:
                raise TransportError(f"{channel} channel: {error.strerror or error}") from error
            if taken is None:
                return filled, False
            count, all_room = taken
            if count == 0:
                return filled, True
            filled += count
            if not (self._more_soon(sock) if patient else all_room):
                return filled, False
        return filled, False

    def _more_soon(self, sock: socket.socket) -> bool:
        """Wait for more of this channel, but not when anything else happens."""
        ready = [fd for fd, _ in self._poll.poll(PATIENCE_MILLISECONDS)]
        return ready == [sock.fileno()]

    def _handle_events(self, channel: Channel) -> None:
        preempt = channel is Channel.PREEMPT
        next_event = self._connection.next_preempt_event if preempt else self._connection.next_event
        while True:
            event = next_event()
            if isinstance(event, m.NeedData | m.EndOfStream):
                break
            # Reading a bufferful takes about as long as placing it: a look between the two.
            if self._listening and not preempt and isinstance(event, m.Pages):
                self._attend(dict(self._urgent_poll.poll(0)))
            self._handle(event, channel)
        self._flush()

    def _handle(self, event: m.Message, channel: Channel) -> None:
        statistics = self.statistics
        match event:
            case m.Pages():
                zeros = int(np.count_nonzero(event.zero))
                statistics.zero_pages += zeros
                statistics.pages += len(event) - zeros
                if channel is Channel.PREEMPT:
                    statistics.urgent_pages += len(event)
                self._target.place(event, channel)
            case m.RamBlockList():
                self._target.open(self._connection)
            case m.Ping(value):
                if self._connection.return_path_state is not ReturnPathState.CLOSED:
                    self._out += self._connection.send(m.Pong(value))
            case m.PostcopyRamDiscard(block, ranges):
                if not self._discarding:
                    self._discarding = True
                    self._target.prepare_discard()
                statistics.discard_commands += 1
                statistics.discard_ranges += len(ranges)
                for start, length in ranges:
                    self._target.discard(block, start, length)
            case m.Packaged(payload):
                statistics.package_bytes = len(payload)
            case m.PostcopyListen():
                self._listen()
            case m.DeviceState(data):
                self._target.device_state(data)
            case m.PostcopyRun():
                self._target.run()
            case _:
                pass

    def _listen(self) -> None:
        self.statistics.listen_at = time.monotonic()
        self.statistics.bytes_at_listen = self.statistics.bytes
        self._target.listen()
        self._listening = True
        self._faults_fd = self._target.fileno()
        # What was asked for may arrive before the package that let it be asked for was read.
        if self._preempt is not None:
            self._watch(self._preempt.fileno())
        if self._faults_fd is not None:
            self._watch(self._faults_fd)

    def _watch(self, fd: int) -> None:
        """Look at an urgent descriptor whenever there is a choice."""
        self._poll.register(fd, select.POLLIN)
        self._urgent_poll.register(fd, select.POLLIN)

    # ---- bytes out

    def _serve_faults(self) -> None:
        faults = self._target.read_faults()
        self.statistics.faults += len(faults)
        data, count = self._connection.request_pages(faults)
        self.statistics.requests += count
        self._out += data
        self._flush()

    def _flush(self) -> None:
        assert self._forward is not None
        if self._out:
            try:
                sent = self._forward.send(self._out)
                del self._out[:sent]
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as error:
                raise TransportError(f"return path: {error.strerror or error}") from error
        self._watch_forward()

    def _watch_forward(self) -> None:
        """Look at the first connection for what it can still bring, and take.

        Nothing more is read once the stream has ended. If it were still watched while requested
        pages are on their way, a source that has closed it would end every wait at once.
        """
        assert self._forward is not None
        wanted = 0 if self._connection.ended else select.POLLIN
        wanted |= select.POLLOUT if self._out else 0
        if wanted and wanted != self._forward_events:
            self._poll.register(self._forward, wanted)
        elif self._forward_events and not wanted:
            self._poll.unregister(self._forward)
        self._forward_events = wanted

    def _say_goodbye(self) -> None:
        """SHUT 0, then let the source close first."""
        assert self._forward is not None
        if self._connection.return_path_state in (ReturnPathState.CLOSED, ReturnPathState.SHUT):
            return
        self._out += self._connection.send(m.Shut(0))
        self._forward.settimeout(CLOSE_TIMEOUT)
        try:
            self._forward.sendall(self._out)
        except OSError as error:
            raise TransportError(f"return path, sending SHUT: {error.strerror or error}") from error
        deadline = time.monotonic() + CLOSE_TIMEOUT
        try:
            self._forward.shutdown(socket.SHUT_WR)
            while time.monotonic() < deadline and self._forward.recv(65536):
                pass
        except OSError:
            pass  # the source has its SHUT; how it hangs up is its own affair
