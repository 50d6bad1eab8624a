"""Pages read straight into place: `ScatterDecoder`, a forward decoder that foretells what comes.

A source that pushes RAM sends page after page of one block, so the bytes between the pages are
known before they arrive: the word of each record and, as long as sections keep their length, the
break in which one section ends and the next begins.

    pages     | page 0   | page 1   | page 2               | ...
    framing   | word     | word     | EOS footer PART word | ...

`expected_buffers` lays the coming bytes out as vectors (the iovec of recvmsg(2)), framing and
pages apart, so that pages end up side by side and one UFFDIO_COPY places them, with no copy on the
way. `receive_expected` says how many bytes have come. All framing is compared with what was
foretold; from the first difference on the bytes are put together again and go the ordinary way, as
does what came of a torn record. So the events are those of `ForwardDecoder`, but for where batches
of pages are cut.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from postcopy_proto.messages import (
    Message,
    NeedData,
    Pages,
    RamEos,
    SectionEnd,
    SectionFooter,
    SectionPart,
)
from postcopy_proto.wire.forward import ForwardDecoder
from postcopy_proto.wire.pages import CONTINUE, PAGE, WORD_SIZE, encode_eos
from postcopy_proto.wire.stream import FOOTER, SECTION_ID_SIZE, SECTION_PART

STAGING = 1 << 20
"""Bytes of pages that are laid out at once: what a processor's second-level cache holds, so that
placing finds them there."""

VECTORS = 1024
"""Vectors of one call at most: Linux's IOV_MAX. Two of them are one page. One costs some 30 ns even
if nothing is written to it; a call, and the batch that comes of it, cost more."""

STREAK = 32
"""Pages in a row after which the next ones are foretold: a wrong guess costs a copy of what was
read, about what a right one saves."""

SHORTEST = 4
"""Pages left in a block below which it is not worth while."""

_CONTINUED = PAGE | CONTINUE


class ScatterDecoder(ForwardDecoder):
    """`ForwardDecoder` whose caller may read runs of pages into buffers that it is given.

        if buffers := decoder.expected_buffers(1 << 20):
            decoder.receive_expected(sock.recvmsg_into(buffers)[0])
        else:
            decoder.receive_data(sock.recv(65536))

    Both ways may take turns at any byte. Events are good until either is used again.
    """

    _run: _Run | None = None  # made when it is first used: most streams have no need of it
    _filled = 0  # bytes received as foretold and not compared yet
    _block = ""
    _following = 0  # byte offset in the block of the page that would go on with the row
    _streak = 0  # pages in a row up to the read position
    _records = 0  # page records so far in the open section
    _period = 0  # page records in the last section that has ended

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """As `ForwardDecoder`, behind what `receive_expected` has brought."""
        self._settle()
        super().receive_data(data)

    def expected_buffers(self, size: int) -> list[memoryview]:
        """Where to put the next bytes, in this order: about `size` of them are laid out.

        Empty when nothing is foretold: then they go to `receive_data`. After `receive_expected`
        and before `next_event` there are those behind what has come, until nothing is left of
        what was laid out; `size` does not matter then.
        """
        if not self._filled and not self._foretell(size):
            return []
        assert self._run is not None
        return self._run.vectors(self._filled)

    def receive_expected(self, count: int) -> None:
        """The first `count` bytes of the `expected_buffers` have been written."""
        self._filled += count

    def next_event(self) -> Message | NeedData:
        """As `ForwardDecoder`."""
        if self._filled:
            self._settle()
        return super().next_event()

    # ---- foretelling

    def _read(self) -> Message:
        message = super()._read()
        if isinstance(message, Pages):
            self._note_pages(message)
        elif isinstance(message, SectionPart | SectionEnd):
            self._records = 0
        elif isinstance(message, RamEos):
            self._period = self._records
        elif not isinstance(message, SectionFooter):
            self._streak = 0
        return message

    def _note_pages(self, pages: Pages) -> None:
        """Count the row on. For a guess, both ends of a batch tell enough."""
        count, size = len(pages), pages.page_size
        first, last = int(pages.offsets[0]), int(pages.offsets[-1])
        start, end = int(pages.positions[0]), int(pages.positions[-1])
        if start < 0 or last - first != (count - 1) * size or end - start < (count - 1) * size:
            self._streak = 0
        elif first == self._following and not pages.named:
            self._streak += count
        else:
            self._streak = count
        self._block, self._following = pages.block, last + size
        self._records += count

    def _foretell(self, size: int) -> bool:
        """Lay out what comes next; False when there is no telling."""
        if self._streak < STREAK or self._next != self._read_ram:
            return False
        block, page_size = self._blocks.get(self._block), self._target_page_size
        if block is None or self._ready or self._error is not None or self._buffer.eof:
            return False
        left = block.page_count(page_size) - self._following // page_size
        if left < SHORTEST:
            return False
        if self._run is None:
            self._run = _Run(page_size)
        count = min(left, -(-size // (WORD_SIZE + page_size)))
        assert self._ram_id is not None
        period = self._period if self._period >= self._records else 0
        self._run.lay_out(self._following, count, self._ram_id, period - self._records, period)
        torn = self._buffer.take_back()
        self._filled = self._run.take(torn)
        if self._filled < len(torn):
            self._filled = self._streak = 0
            super().receive_data(torn)
            return False
        return True

    def _settle(self) -> None:
        """Compare what has come with what was foretold: events for what is right."""
        run, filled, self._filled = self._run, self._filled, 0
        if not filled:
            return
        assert run is not None
        whole = run.whole(filled)
        right = run.right(whole)
        offset = self._buffer.offset
        for size, message in run.messages(self._block, right):
            self._ready.append((offset, message))
            offset += size
        self._buffer.pass_over(run.start_of(right))
        self._following += right * self._target_page_size
        self._records = run.records_after(self._records, right)
        self._streak = self._streak + right if right == whole else 0
        rest = run.joined(right, filled)
        if rest:
            super().receive_data(rest)


class _Run:
    """Staging memory, and the run of page records that is laid out in it.

    Slot n is the n-th record with the break before it, if there is one: at slot `first_break` and
    every `period` slots from there. Its framing has a place of its own, its page follows slot
    n - 1's page.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._record = WORD_SIZE + page_size
        self._slots = STAGING // page_size
        memory = np.zeros(STAGING + page_size, np.uint8)
        aligned = -memory.__array_interface__["data"][0] % page_size
        self._pages = memory.data[aligned : aligned + STAGING]
        self._break = self._break_of(0)
        self._word_at = len(self._break)
        room = self._word_at + WORD_SIZE
        self._framing = memoryview(bytearray(self._slots * room))
        self._words = np.ndarray(self._slots, ">u8", self._framing, self._word_at, (room,))
        self._framings = [self._framing[n * room : (n + 1) * room] for n in range(self._slots)]
        self._vectors: list[memoryview] = []
        for n, framing in enumerate(self._framings):
            page = self._pages[n * page_size : (n + 1) * page_size]
            self._vectors += [framing[self._word_at :], page]
        self._positions = np.arange(self._slots, dtype=np.int64) * page_size
        self._positions.flags.writeable = False
        self._steps = self._positions.astype(np.uint64)
        self._offset = self._count = self._section_id = 0
        self._first_break = self._period = self._slots

    @staticmethod
    def _break_of(section_id: int) -> bytes:
        """What stands between two sections of RAM."""
        footer, part = FOOTER.encode(SectionFooter(section_id)), SectionPart(section_id)
        return encode_eos(RamEos()) + footer + SECTION_PART.encode(part)

    def lay_out(
        self, offset: int, count: int, section_id: int, first_break: int, period: int
    ) -> None:
        """About `count` pages from byte `offset` of their block on; `period` 0 for no break.

        They end with a section where one ends among them: later ones are then whole sections,
        and batches are fewer.
        """
        if section_id != self._section_id:
            self._section_id, self._break = section_id, self._break_of(section_id)
        self._period = period or self._slots
        self._first_break = first_break if period else self._slots
        self._offset, self._count = offset, min(count, self._slots)
        breaks = self._breaks(1, self._count)
        if breaks:
            self._count = breaks[-1]

    def _breaks_before(self, slot: int) -> int:
        """How many of the slots [0, slot) have a break before them."""
        behind = slot - self._first_break
        return 0 if behind <= 0 else -(-behind // self._period)

    def _breaks(self, first: int, end: int) -> range:
        """The slots of [first, end) that have a break before them."""
        start = self._first_break + self._breaks_before(first) * self._period
        return range(start, end, self._period)

    def start_of(self, slot: int) -> int:
        """Bytes before a slot."""
        return slot * self._record + self._breaks_before(slot) * self._word_at

    def whole(self, filled: int) -> int:
        """How many slots are filled by the first `filled` bytes."""
        slot = filled // self._record
        while self.start_of(slot) > filled:
            slot -= 1
        return slot

    def vectors(self, filled: int, most: int = VECTORS) -> list[memoryview]:
        """Up to `most` vectors of what is laid out behind the first `filled` bytes."""
        first = self.whole(filled)
        end = min(self._count, first + most // 2)
        if first >= end:
            return []
        vectors = self._vectors[2 * first : 2 * end]
        for slot in self._breaks(first, end):
            vectors[2 * (slot - first)] = self._framings[slot]
        torn = filled - self.start_of(first)
        if torn:
            head = len(vectors[0])
            if torn < head:
                vectors[0] = vectors[0][torn:]
            else:
                vectors[:2] = (vectors[1][torn - head :],)
        return vectors

    def take(self, data: bytes) -> int:
        """Fill in bytes that have come already; how many of them are as foretold."""
        if not data:
            return 0
        framing = self._expected_framing(0)
        head = min(len(data), len(framing))
        if len(data) >= len(framing) + self._page_size or data[:head] != framing[:head]:
            return 0
        vectors = self.vectors(0, 2)
        vectors[0][:head] = data[:head]
        vectors[1][: len(data) - head] = data[head:]
        return len(data)

    def _expected_framing(self, slot: int) -> bytes:
        word = self._offset + slot * self._page_size | _CONTINUED
        before = self._break if slot in self._breaks(slot, slot + 1) else b""
        return before + word.to_bytes(WORD_SIZE, "big")

    def right(self, whole: int) -> int:
        """How many of the first `whole` slots have the framing that was foretold."""
        words = (self._steps[:whole] + np.uint64(self._offset | _CONTINUED)).astype(">u8")
        right = whole
        # As bytes first: that is a few times as fast as comparing arrays of this length.
        if words.tobytes() != self._words[:whole].tobytes():
            right = int((self._words[:whole] == words).argmin())
        for slot in self._breaks(0, right):
            if self._framings[slot][: self._word_at] != self._break:
                return slot
        return right

    def messages(self, block: str, count: int) -> Iterator[tuple[int, Message]]:
        """What the first `count` slots say, each message with its bytes in the stream."""
        first = 0
        for slot in (*self._breaks(0, count), count):
            if slot > first:
                yield (slot - first) * self._record, self._batch(block, first, slot)
            if slot < count:
                yield WORD_SIZE, RamEos()
                yield SECTION_ID_SIZE, SectionFooter(self._section_id)
                yield SECTION_ID_SIZE, SectionPart(self._section_id)
            first = slot

    def _batch(self, block: str, first: int, end: int) -> Pages:
        return Pages(
            block=block,
            offsets=self._steps[first:end] + np.uint64(self._offset),
            positions=self._positions[first:end],
            data=self._pages,
            page_size=self._page_size,
            named=False,
        )

    def records_after(self, records: int, count: int) -> int:
        """Page records in the open section, `records` before slot 0, after `count` slots."""
        breaks = self._breaks(0, count)
        return count - breaks[-1] if breaks else records + count

    def joined(self, first: int, filled: int) -> bytes:
        """The bytes from slot `first` on, in the order of the stream."""
        length = filled - self.start_of(first)
        pieces = []
        for piece in self.vectors(self.start_of(first), 2 * self._slots):
            if length <= 0:
                break
            pieces.append(piece[:length])
            length -= len(piece)
        return b"".join(pieces)
