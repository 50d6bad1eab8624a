"""What every kind of saved VM has in common, and the file under it."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from postcopy_proto import messages as m
from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.ramblock import RAMBlock, is_power_of_two

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with what is being done, bytes done, and bytes in all."""

_SAMPLES = 16
_SAMPLE_BYTES = 4096


class SavedVm(Protocol):
    """A saved VM: a `PageStore` with all else that a source needs to start it elsewhere."""

    @property
    def configuration(self) -> m.Configuration:
        """The machine, as saved."""

    @property
    def device_state(self) -> bytes:
        """All device sections, verbatim."""

    @property
    def section_id(self) -> int:
        """RAM's section id in the file: no device section has the same."""

    @property
    def target_page_size(self) -> int:
        """Bytes of the guest's page."""

    @property
    def blocks(self) -> Sequence[RAMBlock]:
        """The blocks in the order in which they were saved."""

    def zero_pages(self, block: str, pages: NDArray[np.intp]) -> NDArray[np.bool_]:
        """As `PageStore.zero_pages`."""

    def read_pages(self, block: str, pages: NDArray[np.intp]) -> NDArray[np.uint8]:
        """As `PageStore.read_pages`."""

    def close(self) -> None:
        """Close the file."""


class ReadOnlyFile:
    """A regular file that is read by offset; OSError when it can't be opened.

    RemoteProtocolError (UNSUPPORTED) when it is something else: pages are read in any order, which
    no pipe allows.

    Read with pread and never mapped: a file that shrinks or a disk that fails must be an error,
    not a signal.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        # Without O_NONBLOCK a named pipe would keep us waiting for somebody who writes to it.
        self.descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self.descriptor)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise broken(
                f"{self.path} is no regular file; copy the saved VM into one, since its pages are "
                "read in any order",
                kind=ErrorKind.UNSUPPORTED,
            )
        self.size = status.st_size
        self.mtime_ns = status.st_mtime_ns

    def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes; RemoteProtocolError where the file ends before."""
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer; RemoteProtocolError where the file ends before."""
        while (count := os.preadv(self.descriptor, [buffer], offset)) < len(buffer):
            if count == 0:
                raise broken(f"{self.path} ends here", offset, kind=ErrorKind.TRUNCATED)
            buffer, offset = buffer[count:], offset + count

    def fingerprint(self) -> str:
        """A digest of samples spread over the file: cheap, and enough to tell two VMs apart."""
        digest = hashlib.blake2b(str(self.size).encode(), digest_size=16)
        last = max(0, self.size - _SAMPLE_BYTES)
        for index in range(_SAMPLES + 1):
            digest.update(os.pread(self.descriptor, _SAMPLE_BYTES, last * index // _SAMPLES))
        return digest.hexdigest()

    def close(self) -> None:
        """Close the descriptor; twice does no harm."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def broken(
    reason: str, offset: int | None = None, *, kind: ErrorKind = ErrorKind.MALFORMED
) -> RemoteProtocolError:
    """The error for a file that is not what it should be."""
    return RemoteProtocolError(reason, kind=kind, channel=Channel.FILE, offset=offset)


def relocated(error: RemoteProtocolError, start: int) -> RemoteProtocolError:
    """The error of a stream that begins at file offset `start`, as one of the file."""
    return broken(error.reason, start + (error.offset or 0), kind=error.kind)


def with_page_sizes(
    blocks: Sequence[RAMBlock], page_sizes: Mapping[str, int], target_page_size: int
) -> list[RAMBlock]:
    """The blocks with the host pages that they have at the destination.

    A file does not say them: they are base pages, unless `page_sizes` names the block. ValueError
    for a name that is no block, or a size that is no power of two of at least a target page.
    """
    names = [block.idstr for block in blocks]
    for name, size in page_sizes.items():
        if name not in names:
            raise ValueError(f"no RAMBlock {name!r} in the file; it has {', '.join(names)}")
        if not is_power_of_two(size) or size < target_page_size:
            raise ValueError(
                f"RAMBlock {name}: page size {size} is no power of two of at least "
                f"{target_page_size}"
            )
    return [
        RAMBlock(block.idstr, block.used_length, page_sizes.get(block.idstr, target_page_size))
        for block in blocks
    ]
