"""SourceConnection: what to send next, and who asked for what. Sans-I/O.

The counterpart of the source half of QEMU's migration/ram.c and migration/migration.c: it opens
the stream, sends precopy pages, discards what is dirty at the switchover, sends the package, and
then delivers every page that is still owed, requested ones first, each exactly once.

A source of one's own brings a `PageStore` (its blocks and their pages), the dirty bitmaps at the
moment of the switchover, and the device state. The order of calls:

    start()              header, configuration, commands, block list
    precopy(...)         any number of times, while the VM runs
    switchover(...)      discards, package; the VM must be stopped by now
    next_batch(...)      until it returns None and nothing is owed; feed the return path meanwhile
    finish()             END, EOF
    receive_data(...)    until the SHUT arrives
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from bitarray import bitarray
from numpy.typing import NDArray

from postcopy_proto import messages as m
from postcopy_proto.dirty import DirtyBitmap, plan_discards
from postcopy_proto.errors import (
    Channel,
    ErrorKind,
    LocalProtocolError,
    RemoteProtocolError,
)
from postcopy_proto.ramblock import (
    TARGET_PAGE_SIZE,
    PageStore,
    RAMBlock,
    SinglePageStore,
    encode_idstr,
)
from postcopy_proto.states import (
    FORWARD,
    RETURN_PATH,
    RETURN_PATH_TRIGGERS,
    ForwardState,
    ReturnPathState,
    expected,
    next_forward_state,
    next_return_path_state,
)
from postcopy_proto.wire import Limits, ReturnPathDecoder, encode
from postcopy_proto.wire.forward import RAM_IDSTR, RAM_VERSION
from postcopy_proto.wire.pages import WORD_SIZE, ZERO_RECORD, encode_page, encode_pages

RAM_SECTION_ID = 2
"""The section id that RAM has in stock streams of 5.2 and 7.2. Never 0: a destination's search
for a section may then end at another handler (wire: SECTION_PART)."""

PING_LOADED = 3
"""The ping behind the device state in the package: its answer says that all of it was loaded."""

REQUEST_QUEUE_LIMIT = 65536
"""Requests that may wait at once: far more than any VM has vCPUs to fault with, and few enough to
bound what a peer can make us hold. QEMU has no limit."""


class BackgroundOrder(StrEnum):
    """Where the background goes on after a page was asked for."""

    SEQUENTIAL = "sequential"
    """where it was"""
    AFTER_REQUEST = "after-request"
    """behind the page asked for, as QEMU does: neighbours are likely next"""


class PageBatch(NamedTuple):
    """One piece of output of the postcopy phase."""

    data: memoryview
    """bytes to send whole, good until the next batch but one of its channel"""
    block: str
    pages: int
    """target pages in it, zero pages included"""
    zero_pages: int
    requests: range
    """numbers of the requests that it answers, counted from 0 in order of arrival; empty for
    background pages"""
    channel: Channel
    """FORWARD, or PREEMPT when the pages were asked for and that channel is in use"""

    @property
    def urgent(self) -> bool:
        """Whether these pages were asked for."""
        return len(self.requests) > 0


@dataclass(slots=True)
class _Request:
    number: int
    block: str
    first_page: int
    page_count: int


class SourceConnection:
    """The source's end of one migration.

    `store` gives the blocks, whose `page_size` must be the destination's host page size, and
    their pages. `configuration` names the machine; the destination's must be the same.
    `preempt` sends requested pages on a channel of their own: QEMU's postcopy-preempt of 8.0 and
    later. Calls out of order raise `LocalProtocolError`; what a peer does wrong raises
    `RemoteProtocolError`, then and at every later call of `next_event`.
    """

    def __init__(
        self,
        store: PageStore,
        configuration: m.Configuration,
        *,
        target_page_size: int = TARGET_PAGE_SIZE,
        section_id: int = RAM_SECTION_ID,
        preempt: bool = False,
        order: BackgroundOrder = BackgroundOrder.AFTER_REQUEST,
        limits: Limits | None = None,
    ) -> None:
        if section_id == 0:
            raise ValueError("section id 0 belongs to another handler at every stock destination")
        self._store = store
        self._read_page = store.read_page if isinstance(store, SinglePageStore) else self._read_one
        self._configuration = configuration
        self._target_page_size = target_page_size
        self._section_id = section_id
        self._buffers = dict.fromkeys(
            (Channel.FORWARD, Channel.PREEMPT), (memoryview(b""), memoryview(b""))
        )
        self._part_head = encode(m.SectionPart(section_id))
        self._part_tail = encode(m.RamEos()) + encode(m.SectionFooter(section_id))
        self._request_channel = Channel.PREEMPT if preempt else Channel.FORWARD
        self._order = order
        self._decoder = ReturnPathDecoder(limits=limits or Limits())
        self._error: RemoteProtocolError | None = None
        self.blocks: dict[str, RAMBlock] = {block.idstr: block for block in store.blocks}
        self._names = list(self.blocks)
        self.state = ForwardState.HEADER
        self.return_path_state = ReturnPathState.CLOSED
        self._last_block: dict[Channel, str | None] = {Channel.FORWARD: None, Channel.PREEMPT: None}
        self._owed: dict[str, bitarray] = {}
        self._owed_count = 0
        self._cursor = (0, 0)
        self._queue: deque[_Request] = deque()
        self._requested_block: str | None = None
        self.requests = 0
        """requests received"""
        self.discard_commands = 0
        self.discard_ranges = 0
        self.shut_status: int | None = None
        """the destination's verdict, once it has come"""

    # ---- up to the switchover

    def start(self) -> bytes:
        """Header to block list: OPEN_RETURN_PATH, PING 1, POSTCOPY_ADVISE, RAM's START section."""
        summary = 0
        for block in self.blocks.values():
            summary |= block.page_size
        return self._send(
            m.StreamHeader(),
            self._configuration,
            m.OpenReturnPath(),
            m.Ping(1),
            m.PostcopyAdvise(summary, self._target_page_size),
            m.SectionStart(self._section_id, RAM_IDSTR, 0, RAM_VERSION),
            m.RamBlockList(
                tuple(
                    m.RamBlockEntry(
                        block.idstr,
                        block.used_length,
                        None if block.page_size == self._target_page_size else block.page_size,
                    )
                    for block in self.blocks.values()
                )
            ),
            m.RamEos(),
            m.SectionFooter(self._section_id),
        )

    def precopy(self, block: str, pages: NDArray[np.intp]) -> memoryview:
        """One PART section with these target pages as they are now; good until the next call."""
        self._require(ForwardState.ADVISE, "precopy pages")
        return self._section(block, pages)[0]

    def switchover(
        self, dirty: Mapping[str, DirtyBitmap] | None, device_state: bytes
    ) -> Iterator[bytes | memoryview]:
        """Discards, PING 2, the package with the device state, PING 4; each piece for one send.

        `dirty` has a bitmap by target page for every block: what must still be sent. None means
        everything. Partly dirty host pages become wholly dirty. `device_state` is a sequence of
        SECTION_FULL items with their footers, verbatim; empty for none. The caller stops its VM
        before, and must not start it again once a byte of the package has left.
        """
        self._require(ForwardState.ADVISE, "the switchover")
        if dirty is None:
            dirty = {
                name: _all_dirty(block.page_count(self._target_page_size))
                for name, block in self.blocks.items()
            }
        plan = plan_discards(list(self.blocks.values()), dirty, page_size=self._target_page_size)
        yield from plan
        self._owed = {name: bitmap.bits for name, bitmap in plan.dirty.items()}
        self._owed_count = sum(bits.count() for bits in self._owed.values())
        self.discard_commands, self.discard_ranges = plan.command_count, plan.range_count
        self.state = ForwardState.DISCARD
        # A destination forgets the last block's name when pages are discarded.
        self._last_block = dict.fromkeys(self._last_block)
        content = (
            m.PostcopyListen(),
            *([m.DeviceState(device_state)] if device_state else []),
            m.Ping(PING_LOADED),
            m.PostcopyRun(),
        )
        package = m.Packaged(b"".join(encode(item) for item in content))
        yield self._send(m.Ping(2))
        yield self._send(package)
        for item in content:
            self._follow(item)
        yield self._send(m.Ping(4))

    # ---- the postcopy phase

    @property
    def owed(self) -> int:
        """Target pages that have not been sent since the switchover."""
        return self._owed_count

    @property
    def has_requests(self) -> bool:
        """Whether pages are asked for that have not been sent."""
        return bool(self._queue)

    def next_batch(self, page_limit: int = 64, *, background: bool = True) -> PageBatch | None:
        """The next pages to send: requested ones first, then up to `page_limit` in background.

        None when nothing is to be sent: nothing owed, or nothing asked for and `background` is
        False. A host page is never torn apart, so a batch may exceed the limit by one of them.
        """
        self._require(ForwardState.RUNNING, "postcopy pages")
        while self._queue:
            request = self._queue[0]
            if request.page_count == 1:
                batch = self._answer_page(request)
            else:
                batch = self._answer_pages(request, page_limit)
            if batch is not None:
                return batch
        if background and self._owed_count:
            block, pages = self._take_background(page_limit)
            return self._batch(block, pages, range(0), Channel.FORWARD)
        return None

    def finish(self) -> bytes:
        """RAM's END section and EOF. LocalProtocolError while pages are owed."""
        self._require(ForwardState.RUNNING, "the end")
        if self._owed_count:
            raise self._local(f"{self._owed_count} pages have not been sent", m.Eof.NAME)
        return self._send(
            m.SectionEnd(self._section_id),
            m.RamEos(),
            m.SectionFooter(self._section_id),
            m.Eof(),
        )

    def finish_preempt(self) -> bytes:
        """What ends the preempt channel: 7.1 and 7.2 wait for it before SHUT, later ones take it
        without."""
        return encode(m.RamEos())

    def _answer_page(self, request: _Request) -> PageBatch | None:
        """The page of the request that is first in the queue; None when it has left by now.

        What a vCPU waits for is mostly one page: as `_answer_pages`, but without arrays.
        """
        self._queue.popleft()
        block, page, channel = request.block, request.first_page, self._request_channel
        if self._order is BackgroundOrder.AFTER_REQUEST:
            self._cursor = (self._names.index(block), page + 1)
        owed = self._owed[block]
        if not owed[page]:
            return None
        owed[page] = 0
        self._owed_count -= 1
        named = self._last_block[channel] != block
        self._last_block[channel] = block
        content = self._read_page(block, page)
        data = encode_page(block, page * self._target_page_size, content, named)
        if channel is Channel.FORWARD:
            data = b"".join((self._part_head, data, self._part_tail))
        answered = range(request.number, request.number + 1)
        return PageBatch(memoryview(data), block, 1, content is None, answered, channel)

    def _read_one(self, block: str, page: int) -> memoryview | None:
        """As `SinglePageStore.read_page`, from a store that has only the two questions."""
        pages = np.array([page], np.intp)
        if self._store.zero_pages(block, pages)[0]:
            return None
        content: memoryview = self._store.read_pages(block, pages)[0].data
        return content

    def _answer_pages(self, request: _Request, page_limit: int) -> PageBatch | None:
        """The next pages of the request that is first in the queue, as far as they are owed."""
        count = min(request.page_count, self._whole_host_pages(request.block, page_limit))
        pages = self._take(request.block, request.first_page, count)
        request.first_page += count
        request.page_count -= count
        if request.page_count == 0:
            self._queue.popleft()
        if self._order is BackgroundOrder.AFTER_REQUEST:
            self._cursor = (self._names.index(request.block), request.first_page)
        if not len(pages):
            return None
        answered = range(request.number, request.number + 1)
        return self._batch(request.block, pages, answered, self._request_channel)

    def _batch(
        self, block: str, pages: NDArray[np.intp], requests: range, channel: Channel
    ) -> PageBatch:
        if channel is Channel.PREEMPT:
            data, zeros = self._records(channel, block, pages)
        else:
            data, zeros = self._section(block, pages)
        return PageBatch(data, block, len(pages), zeros, requests, channel)

    def _section(self, block: str, pages: NDArray[np.intp]) -> tuple[memoryview, int]:
        """A PART section with these pages, and how many of them are zero pages."""
        return self._records(Channel.FORWARD, block, pages, self._part_head, self._part_tail)

    def _records(
        self,
        channel: Channel,
        block: str,
        pages: NDArray[np.intp],
        head: bytes = b"",
        tail: bytes = b"",
    ) -> tuple[memoryview, int]:
        """Page records between `head` and `tail`, and how many of them are zero pages."""
        named = self._last_block[channel] != block
        self._last_block[channel] = block
        zero = self._store.zero_pages(block, pages)
        rows = self._store.read_pages(block, pages[~zero])
        zeros = len(pages) - len(rows)
        size = zeros * ZERO_RECORD + len(rows) * (WORD_SIZE + self._target_page_size)
        if named:
            size += 1 + len(encode_idstr(block))
        end = len(head) + size
        out = self._buffer(channel, end + len(tail))
        out[: len(head)], out[end:] = head, tail
        offsets = pages * self._target_page_size
        encode_pages(block, offsets, zero, rows, named=named, out=out[len(head) : end])
        return out, zeros

    def _buffer(self, channel: Channel, size: int) -> memoryview:
        """A buffer for a channel's next batch: of two, the one that was used longer ago."""
        free, last = self._buffers[channel]
        if len(free) < size:
            free = memoryview(bytearray(size))
        self._buffers[channel] = (last, free)
        return free[:size]

    def _take(self, block: str, first: int, count: int) -> NDArray[np.intp]:
        """The pages of a range that are owed; they are owed no longer."""
        bits = self._owed[block][first : first + count]
        pages = first + np.flatnonzero(np.frombuffer(bits.unpack(), np.bool_))
        self._owed[block][first : first + count] = False
        self._owed_count -= len(pages)
        return pages

    def _take_background(self, page_limit: int) -> tuple[str, NDArray[np.intp]]:
        """The next owed pages of one block from the cursor on, going round the blocks."""
        index, page = self._cursor
        while True:
            name = self._names[index]
            found = self._owed[name].find(1, page)
            if found >= 0:
                break
            index, page = (index + 1) % len(self._names), 0
        count = self._whole_host_pages(name, page_limit)
        first = found - found % self._whole_host_pages(name, 1)
        self._cursor = (index, first + count)
        return name, self._take(name, first, count)

    def _whole_host_pages(self, block: str, page_limit: int) -> int:
        """Target pages of the fewest whole host pages of a block that reach the limit."""
        host_page = self.blocks[block].page_size // self._target_page_size
        return -(-max(page_limit, 1) // host_page) * host_page

    # ---- return path

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes of the return path; b"" is its end."""
        self._decoder.receive_data(data)

    def next_event(self) -> m.Message | m.NeedData:
        """The next message of the return path, or NEED_DATA. Requests are queued by themselves."""
        if self._error is not None:
            raise self._error
        try:
            event = self._decoder.next_event()
            if isinstance(event, m.NeedData):
                return event
            self._accept(event)
        except RemoteProtocolError as error:
            if error.channel is None:
                error.channel = Channel.RETURN
            if error.offset is None:
                error.offset = self._decoder.event_offset
            if error.state is None:
                error.state = str(self.return_path_state)
            self._error = error
            raise
        return event

    def _accept(self, event: m.Message) -> None:
        if type(event) is m.ReqPages and self.return_path_state is ReturnPathState.NAMED:
            # The message that a vCPU waits behind; the state stays what it is.
            assert self._requested_block is not None
            self._enqueue(event.NAME, self._requested_block, event.start, event.length)
            return
        if isinstance(event, m.EndOfStream):
            if self.return_path_state is not ReturnPathState.SHUT:
                raise RemoteProtocolError(
                    "the destination closed the connection without SHUT"
                    + (f", inside {event.detail}" if event.detail else ""),
                    kind=ErrorKind.TRUNCATED,
                )
            return
        after = next_return_path_state(self.return_path_state, event)
        if after is None:
            allowed = expected(RETURN_PATH[self.return_path_state])
            raise RemoteProtocolError(
                f"not allowed here; expected one of: {allowed}",
                kind=ErrorKind.STATE,
                message=event.NAME,
            )
        match event:
            case m.ReqPagesId(start, length, block):
                self._requested_block = block
                self._enqueue(event.NAME, block, start, length)
            case m.Shut(status):
                self.shut_status = status
            case _:
                pass
        self.return_path_state = after

    def _enqueue(self, name: str, idstr: str, start: int, length: int) -> None:
        block = self.blocks.get(idstr)
        if block is None:
            raise RemoteProtocolError(
                f"pages of unknown RAMBlock {idstr!r}", kind=ErrorKind.UNKNOWN, message=name
            )
        if length == 0 or start % block.page_size or length % block.page_size:
            raise RemoteProtocolError(
                f"{start:#x}+{length:#x} of {idstr} is not a whole number of the block's host "
                f"pages of {block.page_size:#x} bytes",
                kind=ErrorKind.RANGE,
                message=name,
            )
        # The last host page of a block may reach beyond its used length.
        if start + length > -(-block.used_length // block.page_size) * block.page_size:
            raise RemoteProtocolError(
                f"{start:#x}+{length:#x} of {idstr} ends beyond its length {block.used_length:#x}",
                kind=ErrorKind.RANGE,
                message=name,
            )
        size = self._target_page_size
        first, count = start // size, length // size
        number = self.requests
        self.requests += 1
        if self._owed[idstr].find(1, first, first + count) < 0:
            return  # on its way already, which a destination can't know
        if len(self._queue) >= REQUEST_QUEUE_LIMIT:
            raise RemoteProtocolError(
                f"more than {REQUEST_QUEUE_LIMIT} requests wait to be answered",
                kind=ErrorKind.LIMIT,
                message=name,
            )
        self._queue.append(_Request(number, idstr, first, count))

    # ---- states

    def _send(self, *messages: m.Message) -> bytes:
        for message in messages:
            self._follow(message)
        return b"".join(encode(message) for message in messages)

    def _follow(self, message: m.Message) -> None:
        after = next_forward_state(self.state, message)
        if after is None:
            raise self._local(
                f"not allowed here; allowed: {expected(FORWARD[self.state])}", message.NAME
            )
        self.state = after
        if type(message) in RETURN_PATH_TRIGGERS:
            moved = next_return_path_state(self.return_path_state, message)
            self.return_path_state = moved or self.return_path_state

    def _require(self, state: ForwardState, what: str) -> None:
        if self.state is not state:
            raise self._local(f"{what} belong to state {state}", None)

    def _local(self, reason: str, message: str | None) -> LocalProtocolError:
        return LocalProtocolError(
            reason,
            kind=ErrorKind.STATE,
            channel=Channel.FORWARD,
            state=str(self.state),
            message=message,
        )


def _all_dirty(page_count: int) -> DirtyBitmap:
    bitmap = DirtyBitmap(page_count)
    bitmap.bits.setall(1)
    return bitmap
