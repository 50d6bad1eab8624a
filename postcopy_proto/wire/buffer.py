"""Received bytes, in order, without copying what arrived in one piece.

A chunk is held as a view of the caller's memory and read in place. Only a record that is torn
across chunks is stitched together, and only when its last byte has come: so input that trickles
in a byte at a time costs linear time, and what is held is bounded by the largest record.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

_NOTHING = memoryview(b"")


class NeedMoreError(Exception):
    """Not an error: the record at the read position has not arrived whole. Never leaves wire."""


class ReceiveBuffer:
    """A window of contiguous bytes, and the chunks behind it.

    `view[pos:end]` is the window: readers may parse there directly and advance `pos`. `peek`
    makes the window as long as asked for. All stream offsets count from the first byte fed.
    """

    __slots__ = ("_base", "_chunks", "_eof", "_missing", "_torn", "_total", "end", "pos", "view")

    def __init__(self) -> None:
        self.view = _NOTHING
        self.pos = 0
        self.end = 0
        self._base = 0  # stream offset of view[0]
        self._torn = bytearray()  # the start of a record that is still to arrive whole
        self._missing = 0  # bytes that the record at the read position lacks
        self._chunks: deque[memoryview] = deque()
        self._total = 0
        self._eof = False

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Append a chunk; an empty one marks the end of the stream."""
        chunk = memoryview(data)
        if chunk.format != "B" or chunk.ndim != 1:
            chunk = chunk.cast("B")
        if not chunk:
            self._eof = True
            return
        self._total += len(chunk)
        if self._torn:
            part = chunk[: self._missing]
            self._torn += part
            self._missing -= len(part)
            chunk = chunk[len(part) :]
        else:
            self._missing = 0
        if self.pos == self.end and not self._torn and not self._chunks:
            self._open(chunk)
        elif chunk:
            self._chunks.append(chunk)

    @property
    def offset(self) -> int:
        """Stream offset of the next byte to be read."""
        return self._base + self.pos

    @property
    def total(self) -> int:
        """Bytes fed so far."""
        return self._total

    @property
    def pending(self) -> int:
        """Bytes fed and not yet read."""
        return self._total - self.offset

    @property
    def eof(self) -> bool:
        """Whether the end of the stream was fed."""
        return self._eof

    @property
    def missing(self) -> int:
        """Bytes that the next record lacks at least; 0 when reading may go on."""
        return self._missing

    def peek(self, count: int) -> memoryview:
        """The next `count` bytes, left unread. NeedMoreError when they have not all arrived."""
        if self.end - self.pos < count:
            self._lengthen(count)
        return self.view[self.pos : self.pos + count]

    def skip(self, count: int) -> None:
        """Count `count` bytes, which were peeked at, as read."""
        self.pos += count

    def take_back(self) -> bytes:
        """Everything unread, which then counts as never fed."""
        rest = b"".join((self.view[self.pos : self.end], self._torn, *self._chunks))
        self._total -= len(rest)
        self._base += self.pos
        self.view, self.pos, self.end = _NOTHING, 0, 0
        self._torn, self._missing = bytearray(), 0
        self._chunks.clear()
        return rest

    def pass_over(self, count: int) -> None:
        """Count bytes as fed and read that were read elsewhere; nothing may be unread."""
        self._total += count
        self._base += count

    def ends_after(self, count: int) -> bool:
        """Whether the stream is known to end with the next `count` bytes.

        NeedMoreError as long as neither more bytes nor the end have arrived.
        """
        try:
            self.peek(count + 1)
        except NeedMoreError:
            if self._eof and self.pending == count:
                return True
            raise
        return False

    def pass_to(self, sink: Callable[[memoryview], int]) -> None:
        """Hand everything unread to `sink`, piece by piece.

        It returns how many bytes it took; nothing more is handed out when those were not all.
        """
        while self.pending:
            self.peek(1)
            piece = self.view[self.pos : self.end]
            taken = sink(piece)
            self.pos += taken
            if taken < len(piece):
                return

    def _lengthen(self, count: int) -> None:
        """Make the window at least `count` bytes long.

        The unread rest of the window goes to the front of the torn record, whose bytes precede
        those of all chunks.
        """
        rest = self.view[self.pos : self.end]
        chunks = self._chunks
        if not rest and not self._torn and chunks and len(chunks[0]) >= count:
            self._open(chunks.popleft())
            return
        if rest or not self._torn:
            # The window precedes everything else: a torn record only exists while it is empty.
            self._base += self.pos
            self._torn = bytearray(rest)
            self.view, self.pos, self.end = _NOTHING, 0, 0
        torn = self._torn
        while len(torn) < count and chunks:
            chunk = chunks.popleft()
            part = chunk[: count - len(torn)]
            torn += part
            if len(part) < len(chunk):
                chunks.appendleft(chunk[len(part) :])
        if len(torn) < count:
            self._missing = count - len(torn)
            raise NeedMoreError
        self._torn = bytearray()
        self._missing = 0
        self._open(memoryview(torn))

    def _open(self, view: memoryview) -> None:
        self._base += self.pos
        self.view, self.pos, self.end = view, 0, len(view)
