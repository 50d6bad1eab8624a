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

LARGEST_BATCH = 1 << 20
"""Bytes of one background batch at most. One of 512 KiB made a transfer of 1 GiB over loopback take
a quarter longer."""

QUIET_BUFFER = 1 << 20
"""Bytes that the kernel is asked to hold when it is quiet, so that the destination has something to
read while the next batch is made: with 208 KiB, Linux's default, it often had not."""

QUIET_SECONDS = 0.02
"""Time without a request after which LATENCY mode works like THROUGHPUT: the first request after a
quiet time may wait longer, the next ones do not."""

HOUSEKEEPING_MILLISECONDS = 200
"""How long we may wait, or only answer requests, before everything else is looked after."""

AWAKE_NANOSECONDS = 100_000
"""How long we look for the next request after an answer before we sleep: a VM that faults mostly
faults again at once, and waking us costs as much as the answer. Measured at a stock destination on
two CPUs, mean fault: 95 us without, 85 with 50 us, 65 with 100 or 200 us."""


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


@dataclass(slots=True)
class _Out:
    """A socket that we write to, and what the kernel has not taken of it yet."""

    channel: Channel
    sock: socket.socket
    pending: deque[memoryview] = field(default_factory=deque)
    watched: int = 0
    """the events that poll looks for"""


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
        self._poll = select.poll()
        self._outs: list[_Out] = []
        self._forward = self._urgent = self._open(Channel.FORWARD, forward)
        if preempt is not None:
            self.open_preempt(preempt)
        self._pace = _Pace(forward, mode)
        self._moved = 0
        self._moved_at = time.monotonic()
        self._silence = silence
        self._bandwidth = bandwidth
        self._on_progress = on_progress
        self._asked_at: dict[int, int] = {}
        self._numbered = 0
        self._answered_ns = 0
        self._ended = False
        self._budget_at = time.monotonic()
        self._budget = 0.0
        self.statistics = SourceStatistics()

    def open_preempt(self, sock: socket.socket) -> None:
        """The second connection, for pages that are asked for; before any is."""
        self._urgent = self._open(Channel.PREEMPT, sock)

    def _open(self, channel: Channel, sock: socket.socket) -> _Out:
        sock.setblocking(False)
        out = _Out(channel, sock)
        self._outs.append(out)
        return out

    # ---- the phases

    def send(self, pieces: Iterable[bytes | memoryview]) -> None:
        """Send pieces of the forward channel in order, reading the return path meanwhile."""
        for piece in pieces:
            self._push(self._forward, memoryview(piece))
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
            if background and self._has_room() and self._may_send_background():
                batch = self._connection.next_batch(self._background_pages())
                if batch is not None:
                    self._push_batch(batch)
            self._flush()
            if not (background and self._has_room() and self._may_send_background()):
                if self._is_stalled():
                    self._wait(HOUSEKEEPING_MILLISECONDS)
                else:
                    self._serve(self._milliseconds_to_budget())
            self._check_moving()
            self._progress()
        self._drain()

    def _serve(self, milliseconds: int) -> None:
        """Answer requests as they come, for that long, and see to nothing else.

        A vCPU waits for every step from its request to its page, and with the VM on the same CPUs
        each runs from cold caches: pace, progress and patience can wait.
        """
        deadline = time.monotonic_ns() + milliseconds * 1_000_000
        while self._connection.owed and not self._is_stalled() and self._is_asked(deadline):
            self._receive()
            self._answer()
            if time.monotonic_ns() > deadline:
                return  # however much more is asked for

    def _is_asked(self, deadline: int) -> bool:
        """Whether anything comes on the return path until then, in monotonic nanoseconds."""
        self._watch()
        poll = self._poll.poll
        while (now := time.monotonic_ns()) - self._answered_ns < AWAKE_NANOSECONDS:
            if poll(0):
                return True
        return bool(poll(max(0, -(-(deadline - now) // 1_000_000))))

    def finish(self) -> None:
        """END and EOF, then the wait for SHUT 0.

        Only the word that it has loaded the VM prolongs it. Requests don't: every page has been
        sent, and who asks on and on would keep us for ever.
        """
        if self._urgent is not self._forward:
            # At first: with its EOF and all its pages a destination may hang up at once.
            self._push(self._urgent, memoryview(self._connection.finish_preempt()))
        self.send([self._connection.finish()])
        heard = time.monotonic()
        while self._connection.shut_status is None:
            loaded_at = self.statistics.loaded_at
            received = self._receive()
            if self.statistics.loaded_at != loaded_at:
                heard = time.monotonic()
            elif self._silence is not None and time.monotonic() - heard > self._silence:
                raise self._timeout("SHUT")
            if not received and self._connection.shut_status is None:
                self._wait(HOUSEKEEPING_MILLISECONDS)
        self.statistics.ended_at = time.monotonic()
        self._progress()

    # ---- out

    def _answer(self) -> None:
        """Send every page asked for that can go now, before anything else."""
        connection, urgent = self._connection, self._urgent
        while connection.has_requests and not urgent.pending:
            batch = connection.next_batch(self._pace.batch_pages, background=False)
            if batch is None:
                break
            self._push_batch(batch)
        if not connection.has_requests:
            self._asked_at.clear()  # what is left was asked for when it was on its way already

    def _push_batch(self, batch: PageBatch) -> None:
        self._push(self._forward if batch.channel is Channel.FORWARD else self._urgent, batch.data)
        statistics = self.statistics
        statistics.pages += batch.pages - batch.zero_pages
        statistics.zero_pages += batch.zero_pages
        if not batch.requests:
            self._budget -= len(batch.data)
            return
        statistics.requested_pages += batch.pages
        self._answered_ns = now = time.monotonic_ns()
        for number in batch.requests:
            asked_at = self._asked_at.pop(number, None)
            if asked_at is not None:
                statistics.request_latency_ns.append(now - asked_at)

    def _push(self, out: _Out, data: memoryview) -> None:
        """Hand to the kernel what it takes, and keep the rest."""
        if not out.pending:
            sent = self._try_to_send(out, data)
            if sent == len(data):
                return
            data = data[sent:]
        out.pending.append(data)

    def _flush(self) -> None:
        """Hand to the kernel what it takes now."""
        for out in self._outs:
            pending = out.pending
            while pending:
                sent = self._try_to_send(out, pending[0])
                if sent < len(pending[0]):
                    pending[0] = pending[0][sent:]
                    break
                pending.popleft()

    def _try_to_send(self, out: _Out, data: memoryview) -> int:
        try:
            sent = out.sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise self._broken(out.channel, error) from error
        self.statistics.bytes += sent
        return sent

    def _is_stalled(self) -> bool:
        """Whether the kernel has not taken all that was to be sent."""
        return bool(self._forward.pending or self._urgent.pending)

    def _has_room(self) -> bool:
        return self._pace.has_room(self._forward.pending)

    def _drain(self) -> None:
        """Send all that is queued; the destination must go on reading."""
        self._flush()
        while self._is_stalled():
            self._receive()
            self._wait(HOUSEKEEPING_MILLISECONDS)
            self._flush()
            self._check_moving()
        self._progress()

    def _check_moving(self) -> None:
        """Give up on a destination that has read nothing for too long though something waits."""
        moved, now = self.statistics.bytes, time.monotonic()
        if moved != self._moved or not self._is_stalled():
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
            return HOUSEKEEPING_MILLISECONDS
        milliseconds = int(-self._budget / self._bandwidth * 1000)
        return max(1, min(HOUSEKEEPING_MILLISECONDS, milliseconds))

    # ---- in

    def _receive(self) -> bool:
        """Read the return path as far as it goes; whether anything came."""
        if self._ended:
            return False
        try:
            data = self._forward.sock.recv(RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            raise self._broken(Channel.RETURN, error) from error
        self._ended = not data
        now = time.monotonic_ns()
        connection = self._connection
        connection.receive_data(data)
        while (event := connection.next_event()) is not m.NEED_DATA:
            if isinstance(event, (m.ReqPages, m.ReqPagesId)):
                self._asked_at[self._numbered] = now
                self._numbered += 1
            elif isinstance(event, m.EndOfStream):
                break
            else:
                self._take_note(event, now)
        if self._numbered != self.statistics.requests:
            if not self.statistics.requests:
                self.statistics.first_request_at = now / 1e9
            self.statistics.requests = self._numbered
        return True

    def _take_note(self, event: m.Message | m.NeedData, now: int) -> None:
        """What else than a request came, at that monotonic time in nanoseconds."""
        if isinstance(event, m.Shut) and (event.status or self._connection.owed):
            raise RemoteProtocolError(
                f"the destination ended with status {event.status}, "
                f"{self._connection.owed} pages before the end",
                kind=ErrorKind.REMOTE,
                channel=Channel.RETURN,
                message=m.Shut.NAME,
            )
        if event == m.Pong(PING_LOADED) and self.statistics.loaded_at is None:
            self.statistics.loaded_at = now / 1e9

    def _wait(self, milliseconds: int) -> None:
        """Until a socket that we wait for is ready, or that time is over."""
        self._watch()
        self._poll.poll(milliseconds)

    def _watch(self) -> None:
        """Tell poll what we wait for, where that has changed."""
        for out in self._outs:
            events = select.POLLOUT if out.pending else 0
            if out is self._forward and not self._ended:
                events |= select.POLLIN
            if events == out.watched:
                continue
            out.watched = events
            if events:
                self._poll.register(out.sock, events)
            else:  # or it would wake us when the peer hangs up, again and again
                self._poll.unregister(out.sock)

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
