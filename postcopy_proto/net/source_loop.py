"""The source's event loop: one thread that answers requests before it sends anything else.

Background pages leave in small batches, each only when the socket has taken the one before, so
that a request never waits behind more than one batch of ours and what the kernel has buffered.
How much that may be is the transfer mode's business.
"""

from __future__ import annotations

import array
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from postcopy_proto import messages as m
from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.net.transport import TransferMode, TransportError
from postcopy_proto.ramblock import TARGET_PAGE_SIZE
from postcopy_proto.source import PING_LOADED, PageBatch, SourceConnection

RECEIVE_BYTES = 65536
"""Most bytes read from the return path at once: some thousand requests."""

LARGEST_BATCH = 512 * 1024
"""Bytes of one background batch at most."""

QUIET_BUFFER = 1 << 20
"""Bytes that the kernel is asked to hold when it is quiet, so that the destination has something to
read while the next batch is made: with 208 KiB, Linux's default, it often had not."""

QUIET_SECONDS = 0.02
"""Time without a request after which LATENCY mode works like THROUGHPUT: the first request after a
quiet time may wait longer, the next ones do not."""


@dataclass(slots=True)
class SourceStatistics:
    """What went out of a source; times are on the monotonic clock."""

    bytes: int = 0
    pages: int = 0
    """target pages sent with content after the switchover"""
    zero_pages: int = 0
    """target pages sent as zero pages after the switchover"""
    requests: int = 0
    """requests that came, each for one or more host pages"""
    requested_pages: int = 0
    """target pages sent because they were asked for"""
    started_at: float = field(default_factory=time.monotonic)
    package_at: float | None = None
    loaded_at: float | None = None
    """when the destination had loaded the device state and was about to run the VM"""
    first_request_at: float | None = None
    ended_at: float | None = None
    request_latency_ns: array.array[int] = field(default_factory=lambda: array.array("q"))
    """for each request answered: from reading it to handing its page to the kernel"""

    @property
    def seconds(self) -> float:
        """From the start to the destination's SHUT."""
        return (self.ended_at or time.monotonic()) - self.started_at


class SourceLoop:
    """Sends what a `SourceConnection` gives, over `forward` and perhaps `preempt`.

    `silence` is how long the destination may take to accept or answer anything while we have to
    wait for it, in seconds (None: no limit). `bandwidth` bounds background pages, in bytes a
    second (None: no limit; 0: only what is asked for). Requests are never held back by it.
    """

    def __init__(
        self,
        connection: SourceConnection,
        forward: socket.socket,
        preempt: socket.socket | None = None,
        *,
        mode: TransferMode = TransferMode.THROUGHPUT,
        silence: float | None = 60.0,
        bandwidth: float | None = None,
        on_progress: Callable[[SourceStatistics], None] | None = None,
    ) -> None:
        self._connection = connection
        self._sockets = {Channel.FORWARD: forward}
        if preempt is not None:
            self._sockets[Channel.PREEMPT] = preempt
        for sock in self._sockets.values():
            sock.setblocking(False)
        self._pace = _Pace(forward, mode)
        self._moved = 0
        self._moved_at = time.monotonic()
        self._silence = silence
        self._bandwidth = bandwidth
        self._on_progress = on_progress
        self._pending: dict[Channel, deque[memoryview]] = {c: deque() for c in self._sockets}
        self._poll = select.poll()
        self._asked_at: dict[int, int] = {}
        self._numbered = 0
        self._ended = False
        self._budget_at = time.monotonic()
        self._budget = 0.0
        self.statistics = SourceStatistics()

    # ---- the phases

    def send(self, pieces: Iterable[bytes | memoryview]) -> None:
        """Send pieces of the forward channel in order, reading the return path meanwhile."""
        for piece in pieces:
            self._queue(Channel.FORWARD, memoryview(piece))
            self._drain()

    def deliver(self, *, until: Callable[[], bool] | None = None, background: bool = True) -> None:
        """The postcopy phase: answer requests and send the rest until nothing is owed.

        `until`, asked each time round, ends it earlier. With `background` False only requests are
        answered.
        """
        while self._connection.owed and not (until is not None and until()):
            self._receive()
            self._answer()
            self._pace.update(self.statistics.requests)
            if self._pace.has_room(self._pending[Channel.FORWARD]) and (
                background and self._may_send_background()
            ):
                batch = self._connection.next_batch(self._background_pages())
                if batch is not None:
                    self._queue_batch(batch)
            self._flush()
            idle = not any(self._pending.values())
            room = self._pace.has_room(self._pending[Channel.FORWARD])
            if not (room and background and self._may_send_background()):
                self._wait(self._milliseconds_to_budget() if idle else 200)
            self._check_moving()
            self._progress()
        self._drain()

    def finish(self) -> None:
        """END and EOF, then the wait for SHUT 0."""
        self.send([self._connection.finish()])
        heard = time.monotonic()
        while self._connection.shut_status is None:
            if self._receive():
                heard = time.monotonic()
            elif self._silence is not None and time.monotonic() - heard > self._silence:
                raise self._timeout("SHUT")
            if self._connection.shut_status is None:
                self._wait(200)
        self.statistics.ended_at = time.monotonic()
        self._progress()

    # ---- out

    def _answer(self) -> None:
        """Send every page asked for that can go now, before anything else."""
        while self._connection.has_requests and self._channel_for_requests_is_free():
            batch = self._connection.next_batch(self._pace.batch_pages, background=False)
            if batch is None:
                return
            self._queue_batch(batch)
            self._flush()
        if not self._connection.has_requests:
            self._asked_at.clear()  # what is left was asked for when it was on its way already

    def _channel_for_requests_is_free(self) -> bool:
        channel = Channel.PREEMPT if Channel.PREEMPT in self._sockets else Channel.FORWARD
        return not self._pending[channel]

    def _queue_batch(self, batch: PageBatch) -> None:
        self._queue(batch.channel, batch.data)
        self._flush()
        statistics = self.statistics
        statistics.pages += batch.pages - batch.zero_pages
        statistics.zero_pages += batch.zero_pages
        if batch.urgent:
            statistics.requested_pages += batch.pages
        else:
            self._budget -= len(batch.data)
        now = time.monotonic_ns()
        for number in batch.requests:
            asked_at = self._asked_at.pop(number, None)
            if asked_at is not None:
                statistics.request_latency_ns.append(now - asked_at)

    def _queue(self, channel: Channel, data: memoryview) -> None:
        self._pending[channel].append(data)

    def _flush(self) -> None:
        """Hand to the kernel what it takes now."""
        for channel, pending in self._pending.items():
            while pending:
                try:
                    sent = self._sockets[channel].send(pending[0])
                except (BlockingIOError, InterruptedError):
                    break
                except OSError as error:
                    raise self._broken(channel, error) from error
                self.statistics.bytes += sent
                if sent == len(pending[0]):
                    pending.popleft()
                else:
                    pending[0] = pending[0][sent:]

    def _drain(self) -> None:
        """Send all that is queued; the destination must go on reading."""
        self._flush()
        while any(self._pending.values()):
            self._receive()
            self._wait(200)
            self._flush()
            self._check_moving()
        self._progress()

    def _check_moving(self) -> None:
        """Give up on a destination that has read nothing for too long though something waits."""
        moved, now = self.statistics.bytes, time.monotonic()
        if moved != self._moved or not any(self._pending.values()):
            self._moved, self._moved_at = moved, now
        elif self._silence is not None and now - self._moved_at > self._silence:
            raise self._timeout("our bytes to be read")

    def _may_send_background(self) -> bool:
        if self._bandwidth is None:
            return True
        now = time.monotonic()
        # A tenth of a second's worth at most is saved up: QEMU's slice.
        self._budget = min(
            self._budget + (now - self._budget_at) * self._bandwidth, self._bandwidth / 10
        )
        self._budget_at = now
        return self._budget > 0

    def _background_pages(self) -> int:
        """Pages of the next background batch: no more than a slice's worth of the bandwidth."""
        if self._bandwidth is None:
            return self._pace.batch_pages
        return min(self._pace.batch_pages, max(1, int(self._bandwidth / 10) // TARGET_PAGE_SIZE))

    def _milliseconds_to_budget(self) -> int:
        if not self._bandwidth:
            return 200
        return max(1, min(200, int(-self._budget / self._bandwidth * 1000)))

    # ---- in

    def _receive(self) -> bool:
        """Read the return path as far as it goes; whether anything came."""
        if self._ended:
            return False
        try:
            data = self._sockets[Channel.FORWARD].recv(RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            raise self._broken(Channel.RETURN, error) from error
        self._ended = not data
        now = time.monotonic_ns()
        self._connection.receive_data(data)
        while not isinstance(event := self._connection.next_event(), m.NeedData | m.EndOfStream):
            if isinstance(event, m.Shut) and (event.status or self._connection.owed):
                raise RemoteProtocolError(
                    f"the destination ended with status {event.status}, "
                    f"{self._connection.owed} pages before the end",
                    kind=ErrorKind.REMOTE,
                    channel=Channel.RETURN,
                    message=m.Shut.NAME,
                )
            if event == m.Pong(PING_LOADED):
                self.statistics.loaded_at = now / 1e9
            if isinstance(event, m.ReqPages | m.ReqPagesId):
                self._asked_at[self._numbered] = now
                self._numbered += 1
                self.statistics.requests += 1
                if self.statistics.first_request_at is None:
                    self.statistics.first_request_at = now / 1e9
        return True

    def _wait(self, milliseconds: int) -> None:
        for channel, sock in self._sockets.items():
            wanted = select.POLLOUT if self._pending[channel] else 0
            if channel is Channel.FORWARD and not self._ended:
                wanted |= select.POLLIN
            self._poll.register(sock, wanted)
        self._poll.poll(milliseconds)

    def _progress(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self.statistics)

    # ---- errors

    def _timeout(self, what: str) -> RemoteProtocolError:
        return RemoteProtocolError(
            f"waited {self._silence:g} s for {what}",
            kind=ErrorKind.TIMEOUT,
            channel=Channel.RETURN,
            state=str(self._connection.return_path_state),
        )

    def _broken(self, channel: Channel, error: OSError) -> TransportError:
        return TransportError(
            f"the destination went away: {channel} channel: {error.strerror or error}"
        )


class _Pace:
    """How much is sent at once: little while pages are asked for, more while it is quiet."""

    def __init__(self, forward: socket.socket, mode: TransferMode) -> None:
        self._socket = forward
        self._favoured = mode
        self._requests = 0
        self._quiet_at = 0.0
        self._mode = TransferMode.THROUGHPUT
        forward.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, QUIET_BUFFER)

    @property
    def batch_pages(self) -> int:
        """Pages of one background batch."""
        return min(self._mode.value, LARGEST_BATCH) // TARGET_PAGE_SIZE

    def has_room(self, pending: deque[memoryview]) -> bool:
        """Whether a background batch may be made: a second one, when it is quiet, while the first
        waits for the kernel to take it, so that the destination need not wait for us."""
        return len(pending) < (1 if self._mode is TransferMode.LATENCY else 2)

    def update(self, requests: int) -> None:
        """Take note of how many requests have come so far."""
        now = time.monotonic()
        if requests != self._requests:
            self._requests, self._quiet_at = requests, now + QUIET_SECONDS
        mode = TransferMode.THROUGHPUT if now >= self._quiet_at else self._favoured
        if mode is not self._mode:
            self._mode = mode
            limited = mode is TransferMode.LATENCY
            buffer = mode.value if limited else QUIET_BUFFER
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
