"""DestinationConnection: what arrived, what to answer, what to ask for. Sans-I/O.

The counterpart of QEMU's migration/savevm.c (the incoming side of the commands) and of the
bookkeeping half of migration/postcopy-ram.c. Bytes go in through `receive_data`, messages come
out of `next_event` in stream order, a package's content included; bytes for the return path come
out of `send` and `request_pages`. Placing pages is the caller's business.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from postcopy_proto import messages as m
from postcopy_proto.dirty import DirtyBitmap
from postcopy_proto.errors import (
    Channel,
    ErrorKind,
    LocalProtocolError,
    RemoteProtocolError,
)
from postcopy_proto.ramblock import TARGET_PAGE_SIZE, RAMBlock, ascends, set_bits, test_bits
from postcopy_proto.states import (
    FORWARD,
    PLACED_ONCE,
    RETURN_PATH,
    RETURN_PATH_TRIGGERS,
    ForwardState,
    ReturnPathState,
    expected,
    next_forward_state,
    next_return_path_state,
)
from postcopy_proto.wire import Limits, PreemptDecoder, encode, parse_package
from postcopy_proto.wire.scatter import ScatterDecoder


class DestinationConnection:
    """The destination's end of one migration.

    `page_sizes` names the blocks whose memory is on other than base pages here; the source's
    block list must agree. `target_page_size` is the guest's page in bytes. `limits` bounds what
    a peer can make us hold.

    Every error of the peer is a `RemoteProtocolError` naming channel, offset, state and message;
    after one, the connection raises it again for ever. `send` and `request_pages` raise
    `LocalProtocolError` when the return path's state has no place for the message.
    """

    def __init__(
        self,
        *,
        page_sizes: Mapping[str, int] | None = None,
        target_page_size: int = TARGET_PAGE_SIZE,
        limits: Limits | None = None,
        strict: bool = True,
    ) -> None:
        self._limits = limits or Limits()
        self._strict = strict
        self._target_page_size = target_page_size
        self._decoder = ScatterDecoder(
            header=True,
            page_sizes=page_sizes,
            target_page_size=target_page_size,
            limits=self._limits,
            strict=strict,
        )
        self._preempt: PreemptDecoder | None = None
        self._package: list[m.Message] = []
        self._error: RemoteProtocolError | None = None
        self._last_requested_block: str | None = None
        self._requested: dict[str, set[int]] = {}
        self.state = ForwardState.HEADER
        self.return_path_state = ReturnPathState.CLOSED
        self.configuration: m.Configuration | None = None
        """the source's machine, once it was read"""
        self.ram_section_id: int | None = None
        """the id that the source gave to RAM's section"""
        self.blocks: dict[str, RAMBlock] = {}
        """the block list, in the source's order"""
        self.received: dict[str, DirtyBitmap] = {}
        """per block, which target pages have arrived since they were last discarded"""
        self.duplicates = 0
        """target pages that arrived again after LISTEN and were left out of the events"""

    @property
    def offset(self) -> int:
        """Bytes of the forward channel consumed so far."""
        return self._decoder.offset

    @property
    def running(self) -> bool:
        """Whether the source has handed the VM over: it may never be started there again."""
        return self.state in (ForwardState.RUNNING, ForwardState.END)

    @property
    def ended(self) -> bool:
        """Whether the stream's EOF has been read, after a switchover or without one."""
        return self.state in (ForwardState.END, ForwardState.PRECOPY_END)

    @property
    def outstanding(self) -> int:
        """Host pages that were asked for and have not arrived."""
        self._forget_answered()
        return sum(len(starts) for starts in self._requested.values())

    def _forget_answered(self) -> None:
        for idstr, starts in self._requested.items():
            if starts:
                starts -= {start for start in starts if self.has_page(idstr, start)}

    # ---- forward channel

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes of the forward channel; b"" is its end."""
        self._decoder.receive_data(data)

    def expected_buffers(self, size: int) -> list[memoryview]:
        """Buffers for about the next `size` bytes of the forward channel, in this order.

        For recvmsg(2): the pages of a run that is foretold come to lie side by side. Empty when
        nothing is foretold, then there is `receive_data`. What was written to them is announced
        by `receive_expected`; see `wire.scatter`.
        """
        return self._decoder.expected_buffers(size)

    def receive_expected(self, count: int) -> None:
        """`count` bytes of the forward channel are in the `expected_buffers`."""
        self._decoder.receive_expected(count)

    def next_event(self) -> m.Message | m.NeedData:
        """The next message of the forward channel, or NEED_DATA.

        A `Packaged` is followed by the messages that it holds. `Pages` that have already arrived
        since LISTEN are dropped from their batch, for by then they belong to the guest.
        """
        return self._next(self._decoder, Channel.FORWARD)

    def receive_preempt_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes of the preempt channel, the second connection; b"" is its end."""
        if self._preempt is None:
            self._preempt = PreemptDecoder(
                blocks=self.blocks.values() if self.blocks else None,
                target_page_size=self._target_page_size,
                limits=self._limits,
            )
        self._preempt.receive_data(data)

    def next_preempt_event(self) -> m.Message | m.NeedData:
        """The next message of the preempt channel, or NEED_DATA."""
        if self._preempt is None:
            return m.NEED_DATA
        return self._next(self._preempt, Channel.PREEMPT)

    def _next(
        self, decoder: ScatterDecoder | PreemptDecoder, channel: Channel
    ) -> m.Message | m.NeedData:
        if self._error is not None:
            raise self._error
        before = self.state
        try:
            while True:
                before = self.state
                event = self._pull(decoder)
                if isinstance(event, m.NeedData):
                    return event
                accepted = self._accept(event, channel)
                if accepted is not None:
                    return accepted
        except RemoteProtocolError as error:
            self._error = _located(error, channel, decoder.event_offset, before)
            raise self._error from error.__cause__

    def _pull(self, decoder: ScatterDecoder | PreemptDecoder) -> m.Message | m.NeedData:
        if self._package and decoder is self._decoder:
            return self._package.pop(0)
        return decoder.next_event()

    def _accept(self, event: m.Message, channel: Channel) -> m.Message | None:
        """Check one message against the state, follow it, and say what the caller sees of it."""
        if isinstance(event, m.EndOfStream):
            self._check_end(event, channel)
            return event
        if channel is Channel.FORWARD:
            self._follow(event)
        elif self.state not in PLACED_ONCE:
            raise RemoteProtocolError(
                "an urgent page before LISTEN: none can have been asked for",
                kind=ErrorKind.STATE,
                message=event.NAME,
            )
        match event:
            case m.Pages():
                return self._accept_pages(event)
            case m.Configuration():
                self.configuration = event
            case m.SectionStart(section_id):
                self.ram_section_id = section_id
            case m.RamBlockList():
                self._accept_blocks()
            case m.PostcopyAdvise():
                self._check_advise(event)
            case m.PostcopyRamDiscard():
                self._accept_discard(event)
            case m.Packaged():
                self._open_package(event)
            case m.CompressedPage():
                return self._accept_pages(_inflate(event, self._target_page_size))
            case m.XbzrlePage():
                raise RemoteProtocolError(
                    "XBZRLE pages need the copy sent before, which is not kept here; "
                    "switch the source's capability xbzrle off",
                    kind=ErrorKind.UNSUPPORTED,
                    message=event.NAME,
                )
            case _:
                pass
        return event

    def _follow(self, event: m.Message) -> None:
        after = next_forward_state(self.state, event)
        if after is None:
            raise RemoteProtocolError(
                f"not allowed here; expected one of: {expected(FORWARD[self.state])}",
                kind=ErrorKind.STATE,
                message=event.NAME,
            )
        self.state = after
        if type(event) in RETURN_PATH_TRIGGERS:
            self._follow_return_path(event)

    def _follow_return_path(self, event: m.Message) -> None:
        after = next_return_path_state(self.return_path_state, event)
        if after is not None:
            self.return_path_state = after
        elif isinstance(event, m.PostcopyListen):
            raise RemoteProtocolError(
                "LISTEN without OPEN_RETURN_PATH: pages could never be asked for",
                kind=ErrorKind.STATE,
                message=event.NAME,
            )

    def _check_end(self, event: m.EndOfStream, channel: Channel) -> None:
        if channel is Channel.FORWARD and not self.ended:
            raise RemoteProtocolError(
                f"the connection ended before the stream did: {event.detail or 'EOF not seen'}; "
                f"expected one of: {expected(FORWARD[self.state])}",
                kind=ErrorKind.TRUNCATED,
                offset=event.offset,
            )
        if channel is Channel.PREEMPT and not event.clean:
            raise RemoteProtocolError(
                f"the connection ended inside a record: {event.detail}",
                kind=ErrorKind.TRUNCATED,
                offset=event.offset,
            )

    def _check_advise(self, event: m.PostcopyAdvise) -> None:
        if event.target_page_size is None:
            raise RemoteProtocolError(
                "POSTCOPY_ADVISE without page sizes: the source postcopies dirty bitmaps only; "
                "set its capability postcopy-ram",
                kind=ErrorKind.UNSUPPORTED,
                message=event.NAME,
            )
        if event.target_page_size != self._target_page_size:
            raise RemoteProtocolError(
                f"target page size {event.target_page_size}, ours is {self._target_page_size}",
                kind=ErrorKind.MISMATCH,
                message=event.NAME,
            )

    def _accept_blocks(self) -> None:
        self.blocks = dict(self._decoder.blocks)
        self.received = {
            name: DirtyBitmap(block.page_count(self._target_page_size))
            for name, block in self.blocks.items()
        }
        self._requested = {name: set() for name in self.blocks}

    def _accept_discard(self, event: m.PostcopyRamDiscard) -> None:
        block = self.blocks.get(event.block)
        if block is None:
            raise RemoteProtocolError(
                f"unknown RAMBlock {event.block!r}", kind=ErrorKind.UNKNOWN, message=event.NAME
            )
        for start, length in event.ranges:
            if start % block.page_size or length % block.page_size:
                raise RemoteProtocolError(
                    f"range {start:#x}+{length:#x} of {event.block} is not aligned to the block's "
                    f"page size {block.page_size:#x}",
                    kind=ErrorKind.RANGE,
                    message=event.NAME,
                )
            if not block.contains(start, length):
                raise RemoteProtocolError(
                    f"range {start:#x}+{length:#x} of {event.block} ends beyond its length "
                    f"{block.used_length:#x}",
                    kind=ErrorKind.RANGE,
                    message=event.NAME,
                )
        # QEMU clears the bits before it has validated the range; here nothing changes unless
        # the whole command is sound.
        bits = self.received[event.block].bits
        size = self._target_page_size
        for start, length in event.ranges:
            bits[start // size : (start + length) // size] = False

    def _open_package(self, event: m.Packaged) -> None:
        if not self.blocks:
            raise RemoteProtocolError(
                "a package before RAM's block list", kind=ErrorKind.STATE, message=event.NAME
            )
        self._package = list(parse_package(event.payload, limits=self._limits))

    def _accept_pages(self, pages: m.Pages) -> m.Pages | None:
        if pages.block not in self.received:
            raise RemoteProtocolError(
                f"page of unknown RAMBlock {pages.block!r}",
                kind=ErrorKind.UNKNOWN,
                message=pages.NAME,
            )
        bits = self.received[pages.block].bits
        size = self._target_page_size
        if ascends(pages.offsets, size):
            first, end = int(pages.offsets[0]) // size, int(pages.offsets[-1]) // size + 1
            if self.state not in PLACED_ONCE or bits.find(1, first, end) < 0:
                bits[first:end] = True
                return pages
        numbers = (pages.offsets // np.uint64(size)).astype(np.intp)
        if self.state in PLACED_ONCE:
            fresh = ~test_bits(bits, numbers)
            count = int(np.count_nonzero(fresh))
            self.duplicates += len(pages) - count
            if count == 0:
                return None
            if count < len(pages):
                numbers = numbers[fresh]
                pages = replace(
                    pages, offsets=pages.offsets[fresh], positions=pages.positions[fresh]
                )
        set_bits(bits, numbers)
        return pages

    # ---- return path

    def send(self, message: m.Message) -> bytes:
        """Bytes of a return path message, after a look at the return path's state."""
        after = next_return_path_state(self.return_path_state, message)
        if after is None or type(message) in RETURN_PATH_TRIGGERS:
            raise LocalProtocolError(
                f"not allowed here; allowed: {expected(RETURN_PATH[self.return_path_state])}",
                kind=ErrorKind.STATE,
                channel=Channel.RETURN,
                state=str(self.return_path_state),
                message=message.NAME,
            )
        data = encode(message)
        self.return_path_state = after
        if isinstance(message, m.ReqPagesId):
            self._last_requested_block = message.block
        return data

    def request_pages(self, faults: Iterable[tuple[str, int]]) -> tuple[bytes, int]:
        """Ask for the host pages that hold these (block, byte offset); bytes and how many.

        Pages that have arrived or have been asked for since they were last discarded are left
        out. The name goes out only when the block changes (migrate_send_rp_req_pages).
        LocalProtocolError for an unknown block or an offset outside it, and before LISTEN.
        """
        out: list[bytes] = []
        for idstr, offset in faults:
            block = self.blocks.get(idstr)
            if block is None or not 0 <= offset < block.used_length:
                raise LocalProtocolError(
                    f"no page at offset {offset:#x} of RAMBlock {idstr!r}",
                    kind=ErrorKind.RANGE,
                    channel=Channel.RETURN,
                    state=str(self.return_path_state),
                    message=m.ReqPages.NAME,
                )
            start = block.host_page_of(offset)
            if start in self._requested[idstr] or self.has_page(idstr, start):
                continue
            request: m.Message = m.ReqPages(start, block.page_size)
            if idstr != self._last_requested_block:
                request = m.ReqPagesId(start, block.page_size, idstr)
            out.append(self.send(request))
            self._requested[idstr].add(start)
        return b"".join(out), len(out)

    def has_page(self, idstr: str, offset: int) -> bool:
        """Whether the whole host page that holds byte `offset` of a block has arrived."""
        block = self.blocks[idstr]
        start = block.host_page_of(offset)
        end = min(start + block.page_size, block.used_length)
        size = self._target_page_size
        return self.received[idstr].bits.find(0, start // size, -(-end // size)) < 0


def _located(
    error: RemoteProtocolError, channel: Channel, offset: int, state: ForwardState
) -> RemoteProtocolError:
    """The error with what the one who raised it did not know."""
    if error.channel is None:
        error.channel = channel
    if error.offset is None:
        error.offset = offset
    if error.state is None:
        error.state = str(state)
    return error


def _inflate(page: m.CompressedPage, page_size: int) -> m.Pages:
    """The page behind a COMPRESS_PAGE record (migration/ram-compress.c, qemu_uncompress_data)."""
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(page.compressed, page_size)
    except zlib.error as error:
        raise RemoteProtocolError(f"not a zlib stream: {error}", message=page.NAME) from error
    if len(raw) != page_size or inflater.unconsumed_tail:
        raise RemoteProtocolError(
            f"inflates to other than a page of {page_size} bytes", message=page.NAME
        )
    return m.Pages(
        page.block,
        np.array([page.offset], np.uint64),
        np.zeros(1, np.int64),
        memoryview(raw),
        page_size,
        page.named,
    )
