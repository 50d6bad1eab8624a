"""What all decoders share: bytes in, events out, errors that stay, and an end that says where."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator

from postcopy_proto.errors import Channel, RemoteProtocolError
from postcopy_proto.messages import NEED_DATA, EndOfStream, Message, NeedData
from postcopy_proto.wire.buffer import NeedMoreError, ReceiveBuffer
from postcopy_proto.wire.limits import Limits


class Decoder(ABC):
    """One channel's bytes -> messages; the base of the decoders proper.

    `receive_data` only stores; `next_event` parses. How the bytes were cut into chunks changes
    nothing but where batches of pages are cut. A chunk is not copied: don't change its memory
    until `next_event` has returned `NEED_DATA`, after which nothing refers to it but events that
    were returned.

    A peer's bytes raise RemoteProtocolError and nothing else; once it was raised, every further
    call raises it again. Time is linear in the bytes received, memory bounded by `limits`.
    """

    def __init__(self, channel: Channel, limits: Limits) -> None:
        self._channel = channel
        self._limits = limits
        self._buffer = ReceiveBuffer()
        self._ready: deque[tuple[int, Message]] = deque()  # events read ahead, with their offsets
        self._error: RemoteProtocolError | None = None
        self._end: EndOfStream | None = None
        self._start = 0  # where the event being read began; a reader that resumes one says so
        self._event_offset = 0

    @property
    def offset(self) -> int:
        """Stream offset in bytes of what the next event will be read from."""
        return self._ready[0][0] if self._ready else self._buffer.offset

    @property
    def event_offset(self) -> int:
        """Stream offset in bytes at which the event returned last began."""
        return self._event_offset

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Store a chunk; an empty one is the end of the stream, after which nothing may follow.

        ValueError for data after the end.
        """
        if self._buffer.eof and len(data):
            raise ValueError(f"{len(data)} bytes received after the end of the stream")
        self._buffer.feed(data)

    def next_event(self) -> Message | NeedData:
        """The next message, or NEED_DATA; after the end of the stream `EndOfStream`, for ever.

        RemoteProtocolError when the bytes follow no rule.
        """
        if self._ready:
            self._event_offset, event = self._ready.popleft()
            return event
        if self._error is not None:
            raise self._error
        buffer = self._buffer
        if buffer.missing and not buffer.eof:
            return NEED_DATA
        self._start = buffer.offset
        try:
            event = self._read()
        except NeedMoreError:
            return self._stopped() if buffer.eof else NEED_DATA
        except RemoteProtocolError as error:
            error.channel = self._channel
            if error.offset is None:
                error.offset = buffer.offset
            self._error = error
            raise
        self._event_offset = self._start
        return event

    def __iter__(self) -> Iterator[Message]:
        """The events up to NEED_DATA or, included, EndOfStream."""
        while not isinstance(event := self.next_event(), NeedData):
            yield event
            if isinstance(event, EndOfStream):
                return

    def _stopped(self) -> Message:
        """What to say when the stream has ended and there is no whole record left."""
        if self._end is None:
            self._end = self._at_end()
        self._event_offset = self._end.offset
        return self._end

    def _broke_off(self, inside: str) -> EndOfStream:
        """The end of a stream inside a record, or where one was due."""
        buffer = self._buffer
        if buffer.pending:
            lacking = f"at least {buffer.missing} bytes more of a record at {buffer.offset:#x}"
        else:
            lacking = "more"
        return EndOfStream(buffer.total, clean=False, detail=f"inside {inside}: {lacking} expected")

    @abstractmethod
    def _read(self) -> Message:
        """Take one event from the buffer; NeedMoreError leaves everything as it was."""

    @abstractmethod
    def _at_end(self) -> EndOfStream:
        """The last event, for a stream that ended at the read position."""
