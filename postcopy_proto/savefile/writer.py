"""SaveFileSink: pages as they arrive become a save file that stock QEMU loads.

A postcopy destination receives pages in any order, some of them twice (sent before the
switchover, discarded, sent again). A save file is a stream, but its loader takes pages in any
order too, so every page only needs a place of its own:

    file header, configuration        as the source sent them
    START ram: block list, EOS, footer
    END ram
      groups of 64 PAGE records       in the order in which their first page arrived
      ZERO records                    for every page without a place in a group
      EOS, footer
    device sections                   as the source sent them
    EOF

A group is the PAGE records of 64 consecutive pages of one block, the first one naming the block.
It is set aside when the first page with content arrives that belongs to it; a page that arrives
again overwrites its record. What is left open in a group at the end becomes pages of zeros.
There is no VMDESCRIPTION, which postcopy streams do not carry either; QEMU does not ask for it.

The file grows under the name FILE.partial and gets its own name when it is whole.
Memory: two bits a page and eight bytes a group, 96 MiB for a guest of 1 TiB.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from bitarray import bitarray
from bitarray.util import intervals, zeros
from numpy.typing import NDArray

from postcopy_proto import messages as m
from postcopy_proto.ramblock import IDSTR_MAX, TARGET_PAGE_SIZE, encode_idstr
from postcopy_proto.wire import encode
from postcopy_proto.wire.forward import RAM_IDSTR, RAM_VERSION
from postcopy_proto.wire.pages import CONTINUE, PAGE, WORD_SIZE, encode_pages

GROUP_PAGES = 64
"""Pages that get their place in the file together: 256 KiB at a time when they come in order."""

ZERO_BATCH = 1 << 16
"""ZERO records built at once: 576 KiB."""


@dataclass(slots=True)
class _Block:
    """The state of one RAMBlock: what has arrived, and where its groups are."""

    idstr: str
    page_count: int
    page_size: int
    received: bitarray = field(init=False, repr=False)
    written: bitarray = field(init=False, repr=False)
    """pages whose record holds their content"""
    groups: NDArray[np.int64] = field(init=False, repr=False)
    """file offset of each group, -1 while it has none"""
    counted_name: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.received = zeros(self.page_count, "little")
        self.written = zeros(self.page_count, "little")
        self.groups = np.full(-(-self.page_count // GROUP_PAGES), -1, np.int64)
        name = encode_idstr(self.idstr)
        self.counted_name = bytes([len(name)]) + name

    def pages_of(self, group: int) -> tuple[int, int]:
        """The pages [first, end) of a group; the block's last group may be a short one."""
        first = group * GROUP_PAGES
        return first, min(first + GROUP_PAGES, self.page_count)

    def group_size(self, group: int) -> int:
        """Bytes of a group's records."""
        first, end = self.pages_of(group)
        return len(self.counted_name) + (end - first) * (WORD_SIZE + self.page_size)

    def record_at(self, page: int) -> int:
        """File offset of a page's record; its group must have a place."""
        group, slot = divmod(page, GROUP_PAGES)
        name = len(self.counted_name) if slot else 0
        return int(self.groups[group]) + name + slot * (WORD_SIZE + self.page_size)

    def content_at(self, page: int) -> int:
        """File offset of a page's bytes; its group must have a place."""
        name = 0 if page % GROUP_PAGES else len(self.counted_name)
        return self.record_at(page) + WORD_SIZE + name

    def are_records(
        self, page: int, data: memoryview, position: int, stride: int, count: int
    ) -> bool:
        """Whether consecutive pages lie in `data` as the records that the file wants.

        The first one's head does not matter. Pages of a stream mostly do: they came as records.
        """
        if count == 1:
            return True
        if stride != WORD_SIZE + self.page_size:
            return False
        heads = np.ndarray(count - 1, ">u8", data, position + self.page_size, (stride,))
        offsets = np.arange(page + 1, page + count, dtype=np.uint64) * np.uint64(self.page_size)
        return bool((heads == offsets | np.uint64(PAGE | CONTINUE)).all())

    def head(self, page: int) -> bytes:
        """What precedes a page's bytes in its record; a group's first record is named."""
        named = page % GROUP_PAGES == 0
        word = page * self.page_size | PAGE | (0 if named else CONTINUE)
        return word.to_bytes(WORD_SIZE, "big") + (self.counted_name if named else b"")


class SaveFileSink:
    """A PageSink that writes a save file of stock QEMU's own format.

    `head` is the file header and the configuration, as messages or as the bytes they came in;
    `block_list` and `section_id` are the source's, `section_id` because device sections have ids
    of their own that must not clash with it. OSError when the file can't be written;
    BlockingIOError when another process is writing it.
    """

    def __init__(
        self,
        path: Path | str,
        head: m.Configuration | bytes,
        block_list: m.RamBlockList,
        *,
        section_id: int,
        target_page_size: int = TARGET_PAGE_SIZE,
    ) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._section_id = section_id
        self._blocks = {
            entry.idstr: _Block(
                entry.idstr, -(-entry.used_length // target_page_size), target_page_size
            )
            for entry in block_list.blocks
        }
        self._file = _open_exclusively(self.partial)
        self._end = 0
        self._finished = self._closed = False
        self._records = bytearray(GROUP_PAGES * (WORD_SIZE + target_page_size) + 1 + IDSTR_MAX)
        try:
            self._append(_preamble(head, block_list, section_id))
        except BaseException:
            self.close()
            raise

    @property
    def pages(self) -> dict[str, int]:
        """Pages with content that the file holds, by block."""
        return {name: block.written.count() for name, block in self._blocks.items()}

    @property
    def zero_pages(self) -> dict[str, int]:
        """Pages that arrived as zero pages, by block."""
        return {
            name: (block.received & ~block.written).count() for name, block in self._blocks.items()
        }

    def place(self, pages: m.Pages) -> None:
        """Write every page of the batch to its place; ValueError for one outside its block."""
        block = self._block(pages.block)
        size, data = block.page_size, pages.data
        for first, count in pages.runs():
            page = int(pages.offsets[first]) // size
            self._check(block, page, count)
            position = int(pages.positions[first])
            if position >= 0:
                stride = int(pages.positions[first + 1]) - position if count > 1 else size
                if block.are_records(page, data, position, stride, count):
                    self._write_records(block, page, data, position, count)
                else:
                    rows: NDArray[np.uint8] = np.ndarray(
                        (count, size), np.uint8, data, position, (stride, 1)
                    )
                    self._write(block, page, rows)
            block.received[page : page + count] = True
            block.written[page : page + count] = position >= 0

    def discard(self, block: str, start: int, length: int) -> None:
        """Forget a range of bytes: zeros, unless its pages come again. ValueError outside."""
        state = self._block(block)
        page, count = start // state.page_size, length // state.page_size
        self._check(state, page, count)
        state.received[page : page + count] = False
        state.written[page : page + count] = False

    def read(self, block: str, offset: int, length: int) -> bytes:
        """The content of [offset, offset + length), whole pages, as the file would have it now."""
        state = self._block(block)
        page, count = offset // state.page_size, length // state.page_size
        self._check(state, page, count)
        content = np.zeros((count, state.page_size), np.uint8)
        for written, start, end in intervals(state.written[page : page + count]):
            for first, last in _within_groups(page + start, page + end) if written else ():
                content[first - page : last - page] = self._read(state, first, last - first)
        return content.tobytes()

    def finish(self, device_state: bytes) -> None:
        """Complete the file and give it its name; `close` brings it to disk.

        `device_state` is the package's device sections, verbatim, without LISTEN, PINGs and RUN.
        """
        for block in self._blocks.values():
            self._fill_gaps(block)
            for records in _zero_records(block):
                self._append(records)
        self._append(encode(m.RamEos()) + encode(m.SectionFooter(self._section_id)))
        self._append(device_state + encode(m.Eof()))
        self.partial.rename(self.path)
        self._finished = True

    def close(self) -> None:
        """Bring a finished file to disk; of one that was not finished nothing is left.

        Doing it again is fine. OSError when the disk fails.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self._finished:
                try:
                    os.fsync(self._file)
                except OSError as error:
                    raise self._named(error) from None
                _sync_directory(self.path.parent)
            else:
                self.partial.unlink(missing_ok=True)
        finally:
            os.close(self._file)

    # ---- writing

    def _write(self, block: _Block, page: int, rows: NDArray[np.uint8]) -> None:
        """Write the records of consecutive pages, shape (n, page size), each group's in one go."""
        for first, end in _within_groups(page, page + len(rows)):
            group, slot = divmod(first, GROUP_PAGES)
            self._place_group(block, group)
            records = encode_pages(
                block.idstr,
                np.arange(first, end, dtype=np.uint64) * np.uint64(block.page_size),
                np.zeros(end - first, np.bool_),
                rows[first - page : end - page],
                named=slot == 0,
                out=self._records,
            )
            self._write_at(records, block.record_at(first))

    def _write_records(
        self, block: _Block, page: int, data: memoryview, position: int, count: int
    ) -> None:
        """Write consecutive pages that lie in `data` as records: as they are, but for the heads
        of the first and of those that begin a group. One call for all groups that follow each
        other in the file too."""
        stride = WORD_SIZE + block.page_size
        pieces: list[bytes | memoryview] = []
        start = end = -1
        for first, last in _within_groups(page, page + count):
            self._place_group(block, first // GROUP_PAGES)
            at = block.record_at(first)
            if at != end:
                self._write_pieces(pieces, start)
                pieces, start, end = [], at, at
            head = block.head(first)
            content = position + (first - page) * stride
            length = (last - first) * stride - WORD_SIZE
            pieces += [head, data[content : content + length]]
            end += len(head) + length
        self._write_pieces(pieces, start)

    def _place_group(self, block: _Block, group: int) -> None:
        """Set the group's place aside, if it has none yet."""
        if block.groups[group] < 0:
            block.groups[group] = self._end
            self._end += block.group_size(group)

    def _read(self, block: _Block, page: int, count: int) -> NDArray[np.uint8]:
        """The content of consecutive pages of one group, shape (count, page size)."""
        stride = WORD_SIZE + block.page_size
        raw = os.pread(self._file, count * stride - WORD_SIZE, block.content_at(page))
        return np.ndarray((count, block.page_size), np.uint8, raw, 0, (stride, 1))

    def _fill_gaps(self, block: _Block) -> None:
        """Pages of zeros for what has no content in the groups that have a place."""
        nothing = np.zeros((1, block.page_size), np.uint8)
        for group in np.flatnonzero(block.groups >= 0).tolist():
            first, end = block.pages_of(group)
            for written, gap, gap_end in intervals(block.written[first:end]):
                if not written:
                    rows = np.broadcast_to(nothing, (gap_end - gap, block.page_size))
                    self._write(block, first + gap, rows)

    def _append(self, data: bytes | memoryview) -> None:
        self._write_at(memoryview(data), self._end)
        self._end += len(data)

    def _write_pieces(self, pieces: list[bytes | memoryview], offset: int) -> None:
        size = sum(map(len, pieces))
        if not pieces:
            return
        try:
            written = os.pwritev(self._file, pieces, offset)
        except OSError as error:
            raise self._named(error) from None
        if written < size:
            self._write_at(memoryview(b"".join(pieces)), offset)

    def _write_at(self, data: memoryview, offset: int) -> None:
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(self._file, data[written:], offset + written)
        except OSError as error:
            raise self._named(error) from None

    def _named(self, error: OSError) -> OSError:
        """The error with the name of the file that can't be written: a full disk, mostly."""
        error.filename = os.fspath(self.path if self._finished else self.partial)
        return error

    def _block(self, idstr: str) -> _Block:
        try:
            return self._blocks[idstr]
        except KeyError:
            raise ValueError(f"no RAMBlock {idstr!r} in the block list") from None

    @staticmethod
    def _check(block: _Block, page: int, count: int) -> None:
        if not 0 <= page <= page + count <= block.page_count:
            raise ValueError(
                f"pages {page} to {page + count} of {block.idstr}, which has {block.page_count}"
            )


def _preamble(head: m.Configuration | bytes, block_list: m.RamBlockList, section_id: int) -> bytes:
    """Everything before the first page. Page sizes are left out of the block list: a loader
    without postcopy does not expect them."""
    opening = head if isinstance(head, bytes) else encode(m.StreamHeader()) + encode(head)
    entries = tuple(m.RamBlockEntry(e.idstr, e.used_length) for e in block_list.blocks)
    items = (
        m.SectionStart(section_id, RAM_IDSTR, 0, RAM_VERSION),
        m.RamBlockList(entries),
        m.RamEos(),
        m.SectionFooter(section_id),
        m.SectionEnd(section_id),
    )
    return opening + b"".join(encode(item) for item in items)


def _zero_records(block: _Block) -> Iterator[memoryview]:
    """ZERO records of all pages outside the groups; the first of each batch is named."""
    nothing = np.empty((0, block.page_size), np.uint8)
    for first in range(0, block.page_count, ZERO_BATCH):
        end = min(first + ZERO_BATCH, block.page_count)
        groups = block.groups[first // GROUP_PAGES : -(-end // GROUP_PAGES)]
        absent = np.repeat(groups < 0, GROUP_PAGES)[: end - first]
        pages = first + np.flatnonzero(absent)
        if len(pages):
            offsets = pages.astype(np.uint64) * np.uint64(block.page_size)
            zero = np.ones(len(pages), np.bool_)
            yield encode_pages(block.idstr, offsets, zero, nothing, named=True)


def _open_exclusively(path: Path) -> int:
    """Create or take over a file that nobody else holds, and empty it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _within_groups(first: int, end: int) -> Iterator[tuple[int, int]]:
    """The pages [first, end), cut where groups begin."""
    while first < end:
        until = min((first // GROUP_PAGES + 1) * GROUP_PAGES, end)
        yield first, until
        first = until


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
