"""Capture files: plain or compressed, or standard input; and which channel they hold."""

from __future__ import annotations

import bz2
import contextlib
import fcntl
import gzip
import io
import lzma
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.wire import ForwardDecoder, PreemptDecoder, ReturnPathDecoder
from postcopy_proto.wire.limits import Limits
from postcopy_proto.wire.return_path import MigRpMsg

CHUNK = 1 << 20
"""bytes read at once: what bounds the memory of reading, beside the decoders' limits"""

STDIN = "-"
_MAGIC_BYTES = 6
_WORD_BYTES = 8


class Capture:
    """A file of one channel's bytes, decompressed as it is read.

    `total` is the file's size in bytes, None where it has none (a pipe); `position` is how far it
    has been read, so that the two make a progress bar.
    """

    def __init__(self, raw: io.FileIO) -> None:
        self._raw = raw
        mode = os.fstat(raw.fileno())
        self.total = mode.st_size if stat.S_ISREG(mode.st_mode) else None
        self.position = raw.tell() if raw.seekable() else 0
        _widen(raw)
        magic = _read_up_to(raw.read, _MAGIC_BYTES)
        self.position += len(magic)
        packed = io.BufferedReader(_Prefixed(magic, self._read_into), CHUNK)
        self._stream, self._damage = _decompressed(packed)
        self.head = b""
        """the first bytes of the content, at most 8: enough to tell the channel"""
        self._broken: RemoteProtocolError | None = None
        try:
            self.head = _read_up_to(self._read, _WORD_BYTES)
        except RemoteProtocolError as error:
            self._broken = error  # for whoever asks for the content

    def _read_into(self, buffer: memoryview) -> int:
        count = self._raw.readinto(buffer)
        self.position += count
        return count

    def chunks(self) -> Iterator[bytes]:
        """The content, once, in pieces of at most 1 MiB. RemoteProtocolError if it's damaged."""
        if self._broken is not None:
            raise self._broken
        if self.head:
            yield self.head
        while chunk := self._read(CHUNK):
            yield chunk

    def _read(self, size: int) -> bytes:
        try:
            data: bytes = self._stream.read1(size)
        except self._damage as error:
            raise RemoteProtocolError(
                f"the compressed file is damaged: {error}",
                kind=ErrorKind.TRUNCATED if isinstance(error, EOFError) else ErrorKind.MALFORMED,
                channel=Channel.FILE,
            ) from error
        return data


@contextlib.contextmanager
def open_capture(path: str, start: int = 0) -> Iterator[Capture]:
    """A capture by its path, `-` for standard input; OSError when it can't be opened.

    `start` is where in the file it begins, in bytes; standard input has no such place.
    """
    if path == STDIN:
        # Unbuffered, so that a live stream is decoded as it arrives.
        with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as raw:
            yield Capture(raw)
        return
    with open(path, "rb", buffering=0) as raw:
        if start:
            raw.seek(start)
        yield Capture(raw)


def detect_channel(head: bytes) -> Channel:
    """Which channel a stream with these first bytes belongs to.

    The forward channel opens with its magic, or in a recovery with a command. The others open
    with two zero bytes: a page's offset is far below 2^48; or with a message type and a length.
    An empty stream counts as forward.
    """
    if len(head) < 2 or head[0]:
        return Channel.FORWARD
    if head[1] == 0:
        return Channel.PREEMPT
    length = int.from_bytes(head[2:4], "big")
    if head[1] <= max(MigRpMsg) and length <= Limits().return_path_bytes:
        return Channel.RETURN
    return Channel.FORWARD


def decoder_for(
    channel: Channel, *, strict: bool
) -> ForwardDecoder | ReturnPathDecoder | PreemptDecoder:
    """The decoder of a channel; unless `strict`, it hands out unknown messages as such."""
    if channel is Channel.RETURN:
        return ReturnPathDecoder(strict=strict)
    if channel is Channel.PREEMPT:
        return PreemptDecoder()
    return ForwardDecoder(header=None, strict=strict)


class _Prefixed(io.RawIOBase):
    """Bytes that were read already, then what `read_into` gives."""

    def __init__(self, prefix: bytes, read_into: Callable[[memoryview], int]) -> None:
        self._prefix = prefix
        self._read_into = read_into

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._prefix:
            return self._read_into(buffer)
        data = self._prefix[: len(buffer)]
        self._prefix = self._prefix[len(data) :]
        buffer[: len(data)] = data
        return len(data)


def _widen(raw: io.FileIO) -> None:
    """Let a pipe hold a whole chunk: in pieces of 64 KiB most of the time would go to waiting."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(raw.fileno(), fcntl.F_SETPIPE_SZ, CHUNK)


def _read_up_to(read: Callable[[int], bytes], size: int) -> bytes:
    """`size` bytes, or fewer when the stream ends before; pipes give them piecemeal."""
    data = read(size)
    while data and len(data) < size and (more := read(size - len(data))):
        data += more
    return data


def _decompressed(stream: io.BufferedReader[Any]) -> tuple[Any, tuple[type[Exception], ...]]:
    """A reader of the content, as packed as its first bytes say, and what damage to it raises."""
    magic = stream.peek(_MAGIC_BYTES)[:_MAGIC_BYTES]
    if magic == b"\xfd7zXZ\0":
        return lzma.open(stream), (EOFError, lzma.LZMAError)
    if magic[:2] == b"\x1f\x8b":
        return gzip.open(stream), (EOFError, zlib.error, gzip.BadGzipFile)
    if magic[:3] == b"BZh":
        return bz2.open(stream), (EOFError, OSError)
    if magic[:4] == b"\x28\xb5\x2f\xfd":
        return _zstd(stream)
    return stream, ()


def _zstd(stream: io.BufferedReader[Any]) -> tuple[Any, tuple[type[Exception], ...]]:
    try:
        import zstandard
    except ImportError:
        raise RemoteProtocolError(
            "compressed with zstd, which needs the package's extra: "
            "pip install 'postcopy-proto[zstd]'",
            kind=ErrorKind.UNSUPPORTED,
            channel=Channel.FILE,
        ) from None
    decompressor = zstandard.ZstdDecompressor()
    return decompressor.stream_reader(stream, read_across_frames=True), (zstandard.ZstdError,)
