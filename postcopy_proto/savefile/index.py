"""The index of a save stream: where each page's bytes stand, and where all else does.

One pass over the file fills an array of one int64 a target page, block after block:

    -1          a zero page, or one that the file does not have: RAM starts as zeros
    0 .. 2^62   file offset of the page's bytes
    2^62 ..     2^62 + offset in the index file: a page that was put together from XBZRLE records
    .. -2       -2 - file offset of the length of a COMPRESS_PAGE record

and the last record of a page wins, as it does when QEMU loads the file. The index is a file:

    0     8   "PCINDEX1"
    8     8   file offset of a JSON text, big-endian
    16    16  digest of the text
    4096  .   the array, little-endian
    .     .   the pages that were put together
    .     .   the text, to the end: what the index is of, and what it says beside the array

It is a cache beside the save file, valid for that file's size, time and fingerprint only, and can
be deleted at any time. The text has a checksum of all between the head and itself: an index that
was damaged is made again, never believed. It is mapped, so that its size does not count: 2 GiB for
a guest of 1 TiB.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from postcopy_proto import messages as m
from postcopy_proto.errors import ErrorKind, RemoteProtocolError
from postcopy_proto.savefile import xbzrle
from postcopy_proto.savefile.pages import COMPRESSED, PATCHED, ZERO, PageReader
from postcopy_proto.savefile.source import Progress, ReadOnlyFile, broken, relocated
from postcopy_proto.wire import ForwardDecoder

SUFFIX = ".postcopy-index"
"""appended to the save file's name"""

MAGIC = b"PCINDEX1"
HEAD_SIZE = 32
ARRAY_AT = 4096

TEXT_LIMIT = 4 << 20
"""bytes of the longest text that is believed; thousands of blocks fit"""

CHUNK = 4 << 20
"""bytes of the save file read at once"""


@dataclass(frozen=True, slots=True)
class IndexText:
    """The JSON part of an index."""

    size: int
    mtime_ns: int
    fingerprint: str
    stream_at: int
    """file offset of the stream: behind libvirt's header, or 0"""
    target_page_size: int
    section_id: int
    """RAM's; device sections have other ids"""
    blocks: list[tuple[str, int]]
    """(idstr, used_length in bytes) in the stream's order"""
    device_state: tuple[int, int]
    """file offset and length"""
    patched_pages: int
    checksum: int
    """CRC-32 of the array and the pages that were put together. Of what Python has, the one that
    does not delay a restore: 2 ms for a guest of 4 GiB, against 5 with SHA-1 and 9 with BLAKE2."""

    @property
    def entries(self) -> int:
        """Length of the array."""
        return sum(-(-length // self.target_page_size) for _, length in self.blocks)

    @property
    def patched_at(self) -> int:
        """Where the pages that were put together begin in the index file."""
        return ARRAY_AT + 8 * self.entries

    @property
    def text_at(self) -> int:
        """Where the text begins in the index file."""
        return self.patched_at + self.patched_pages * self.target_page_size


class Index:
    """An index that is open: its text, and a mapped array a block."""

    def __init__(self, text: IndexText, descriptor: int) -> None:
        self.text = text
        self.descriptor = descriptor
        array = _map(descriptor, "r", text.entries)
        self.arrays = split(array, text.blocks, text.target_page_size)

    def close(self) -> None:
        """Unmap and close."""
        self.arrays = {}
        os.close(self.descriptor)


def split(
    array: NDArray[np.int64], blocks: list[tuple[str, int]], page_size: int
) -> dict[str, NDArray[np.int64]]:
    """The part of the array that belongs to each block."""
    parts, first = {}, 0
    for idstr, length in blocks:
        end = first + -(-length // page_size)
        parts[idstr] = array[first:end]
        first = end
    return parts


def open_index(
    file: ReadOnlyFile,
    stream_at: int,
    target_page_size: int,
    *,
    cache: bool = True,
    progress: Progress | None = None,
) -> Index:
    """The index of the stream at `stream_at`, from the cache or from a pass over the file.

    RemoteProtocolError when the file is no whole save stream, or has what can't be served.
    Without `cache`, and where none can be written, the index lives as long as it is open.
    """
    path = file.path.with_name(file.path.name + SUFFIX)
    fingerprint = file.fingerprint()
    if cache and (found := _load(path, file, fingerprint, stream_at)):
        return found
    builder = _Builder(file, fingerprint, stream_at, target_page_size, path if cache else None)
    try:
        return builder.build(progress or (lambda *_: None))
    except BaseException:
        builder.abort()
        raise


def _load(path: Path, file: ReadOnlyFile, fingerprint: str, stream_at: int) -> Index | None:
    """The cached index if there is one and it is this file's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        head = os.pread(descriptor, HEAD_SIZE, 0)
        text_at = int.from_bytes(head[len(MAGIC) : len(MAGIC) + 8], "big")
        encoded = os.pread(descriptor, TEXT_LIMIT, text_at)
        if head == _head(encoded, text_at):
            text = _parse(encoded)
            same = (text.size, text.mtime_ns, text.fingerprint, text.stream_at) == (
                file.size,
                file.mtime_ns,
                fingerprint,
                stream_at,
            )
            if same and text.text_at == text_at and text.checksum == _checksum(descriptor, text_at):
                return Index(text, descriptor)
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        pass  # not an index, or not a whole one: it is made again
    os.close(descriptor)
    return None


def _head(text: bytes, text_at: int) -> bytes:
    return MAGIC + text_at.to_bytes(8, "big") + hashlib.blake2b(text, digest_size=16).digest()


def _checksum(descriptor: int, end: int) -> int:
    """CRC-32 of an index file from its array to `end`; OSError when it ends before."""
    piece = memoryview(bytearray(CHUNK))
    checksum, at = 0, ARRAY_AT
    while at < end:
        count = os.preadv(descriptor, [piece[: end - at]], at)
        if count == 0:
            raise OSError(f"the index ends at {at}")
        checksum, at = zlib.crc32(piece[:count], checksum), at + count
    return checksum


def _parse(text: bytes) -> IndexText:
    fields: dict[str, Any] = json.loads(text)
    fields["blocks"] = [(str(name), int(length)) for name, length in fields["blocks"]]
    offset, length = fields["device_state"]
    fields["device_state"] = (int(offset), int(length))
    return IndexText(**fields)


class _Builder:
    """One pass over the file, into a file of its own that gets its name when it is whole."""

    def __init__(
        self,
        file: ReadOnlyFile,
        fingerprint: str,
        stream_at: int,
        target_page_size: int,
        path: Path | None,
    ) -> None:
        self._file = file
        self._fingerprint = fingerprint
        self._stream_at = stream_at
        self._page_size = target_page_size
        self._path = path
        self._descriptor, self._partial = _create(path)
        self._decoder = ForwardDecoder(target_page_size=target_page_size)
        self._section_id = 0
        self._blocks: list[tuple[str, int]] = []
        self._array: NDArray[np.int64] = np.empty(0, np.int64)
        self._arrays: Mapping[str, NDArray[np.int64]] = {}
        self._patched = 0
        self._ram_ended = False
        self._device_state: tuple[int, int] | None = None

    def build(self, progress: Progress) -> Index:
        """Do the pass; the index, open for reading."""
        chunk = memoryview(bytearray(CHUNK))
        at, end = self._stream_at, self._file.size
        os.posix_fadvise(self._file.descriptor, at, 0, os.POSIX_FADV_SEQUENTIAL)
        try:
            while at < end:
                part = chunk[: min(CHUNK, end - at)]
                self._file.read_into(part, at)
                at += len(part)
                self._decoder.receive_data(part)
                self._take_events()
                progress("indexing", at, end)
            self._decoder.receive_data(b"")
            self._take_events()
        except RemoteProtocolError as error:
            raise relocated(error, self._stream_at) from error
        return self._finish()

    def abort(self) -> None:
        """Leave nothing behind."""
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _take_events(self) -> None:
        decoder = self._decoder
        while not isinstance(event := decoder.next_event(), m.NeedData):
            match event:
                case m.Pages():
                    self._take_pages(event)
                case m.SectionStart(section_id):
                    self._section_id = section_id
                case m.RamBlockList(blocks):
                    self._open_array([(entry.idstr, entry.used_length) for entry in blocks])
                case m.CompressedPage(block, offset):
                    # The record ends with its bytes, which a u32 length precedes.
                    length_at = self._file_offset(decoder.offset) - len(event.compressed) - 4
                    self._arrays[block][offset // self._page_size] = COMPRESSED - length_at
                case m.XbzrlePage():
                    self._patch(event)
                case m.SectionEnd():
                    self._ram_ended = True
                case m.DeviceState(data):
                    self._device_state = (self._file_offset(decoder.event_offset), len(data))
                case m.MultifdFlush():
                    raise broken(
                        "saved with multifd: its pages went through other channels; save the VM "
                        "again without that capability",
                        decoder.event_offset,
                        kind=ErrorKind.UNSUPPORTED,
                    )
                case m.Packaged() | m.PostcopyRamDiscard():
                    raise broken(
                        "the recording of a postcopy migration, not a save file",
                        decoder.event_offset,
                        kind=ErrorKind.UNSUPPORTED,
                    )
                case m.EndOfStream(clean=clean, detail=detail):
                    self._check_end(clean, detail)
                    return

    def _take_pages(self, batch: m.Pages) -> None:
        base = self._file_offset(self._decoder.event_offset)
        pages = batch.offsets // np.uint64(self._page_size)
        # Of a page that comes twice in a batch, numpy keeps the last value.
        self._arrays[batch.block][pages] = np.where(
            batch.positions < 0, ZERO, batch.positions + base
        )

    def _open_array(self, blocks: list[tuple[str, int]]) -> None:
        self._blocks = blocks
        text = self._text()
        os.ftruncate(self._descriptor, text.patched_at)
        self._array = _map(self._descriptor, "r+", text.entries)
        self._array[:] = ZERO
        self._arrays = split(self._array, blocks, self._page_size)

    def _patch(self, event: m.XbzrlePage) -> None:
        """Apply the differences to the page as it is so far, and keep the result."""
        array, page = self._arrays[event.block], event.offset // self._page_size
        reader = PageReader(self._file, self._descriptor, self._page_size)
        content = bytearray(reader.read(array[page : page + 1]))
        xbzrle.apply(event.encoded, content)
        if array[page] < PATCHED:
            array[page] = PATCHED + self._text().text_at
            self._patched += 1
        os.pwrite(self._descriptor, content, int(array[page]) - PATCHED)

    def _check_end(self, clean: bool, detail: str) -> None:
        if not clean:
            raise broken(
                f"the save file is not whole: it ends {detail}",
                self._decoder.event_offset,
                kind=ErrorKind.TRUNCATED,
            )
        if not self._ram_ended or self._device_state is None:
            missing = "device state" if self._ram_ended else "end of RAM"
            raise broken(f"no save file of a VM: it has no {missing}", self._decoder.event_offset)

    def _finish(self) -> Index:
        text = self._text()
        text = replace(text, checksum=_checksum(self._descriptor, text.text_at))
        encoded = json.dumps(asdict(text)).encode()
        os.pwrite(self._descriptor, encoded, text.text_at)
        os.pwrite(self._descriptor, _head(encoded, text.text_at), 0)
        if self._partial is not None and self._path is not None:
            os.fsync(self._descriptor)
            self._partial.rename(self._path)
        return Index(text, self._descriptor)

    def _text(self) -> IndexText:
        """What is known so far."""
        return IndexText(
            size=self._file.size,
            mtime_ns=self._file.mtime_ns,
            fingerprint=self._fingerprint,
            stream_at=self._stream_at,
            target_page_size=self._page_size,
            section_id=self._section_id,
            blocks=self._blocks,
            device_state=self._device_state or (0, 0),
            patched_pages=self._patched,
            checksum=0,
        )

    def _file_offset(self, stream_offset: int) -> int:
        return self._stream_at + stream_offset


def _map(descriptor: int, mode: Literal["r", "r+"], entries: int) -> NDArray[np.int64]:
    with os.fdopen(os.dup(descriptor), "rb" if mode == "r" else "r+b") as file:
        # A plain array of the same memory: indexing a memmap costs several times as much.
        return np.asarray(np.memmap(file, "<i8", mode, ARRAY_AT, (entries,)))


def _create(path: Path | None) -> tuple[int, Path | None]:
    """A new file beside `path`, or one without a name where that can't be written."""
    if path is not None:
        with contextlib.suppress(OSError):
            descriptor, name = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)
            return descriptor, Path(name)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno()), None
