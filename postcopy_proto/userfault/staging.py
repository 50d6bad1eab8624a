"""Staging memory: where pages are brought together before one ioctl places them.

`Staging` is one reused buffer of this process; `HostPage` collects the target pages of one host
page in one. (QEMU's postcopy_get_tmp_page and its PostcopyTmpPage)
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
from numpy.typing import NDArray

from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.ramblock import RAMBlock


def address_of(view: memoryview) -> int:
    """Where the first byte of a contiguous view stands in memory."""
    if not view.readonly:
        return ctypes.addressof(ctypes.c_char.from_buffer(view))
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address


class Staging:
    """Page-aligned memory that stays mapped; untouched pages of it cost nothing and are zero."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._memory, np.uint8)
        self.address: int = self.bytes.__array_interface__["data"][0]

    def close(self) -> None:
        """Gives the memory back."""
        self.bytes = np.empty(0, np.uint8)
        self._memory.close()

    def gather(self, data: memoryview, position: int, stride: int, rows: int, width: int) -> None:
        """Copies `rows` pieces of `width` bytes, `stride` apart in `data`, to the start."""
        source: NDArray[np.uint8] = np.ndarray(
            (rows, width), np.uint8, buffer=data, offset=position, strides=(stride, 1)
        )
        np.copyto(self.bytes[: rows * width].reshape(rows, width), source)


class HostPage:
    """The host page that is being collected on one channel.

    Its target pages must come one after another, each once, none of another host page in
    between: RemoteProtocolError otherwise, as in QEMU.
    """

    def __init__(self, largest: int, page_size: int, channel: Channel) -> None:
        self._staging = Staging(largest)
        self._page_size = page_size
        self._channel = channel
        self._arrived = np.zeros(0, np.bool_)
        self._key: tuple[str, int] | None = None
        self.all_zero = True

    @property
    def address(self) -> int:
        """Of the collected bytes in this process."""
        return self._staging.address

    @property
    def pending(self) -> tuple[str, int] | None:
        """(idstr, byte offset) of the host page begun and not complete, or None."""
        return self._key

    def add(
        self,
        block: RAMBlock,
        host_page: int,
        first: int,
        count: int,
        data: memoryview | None,
        position: int,
        stride: int,
    ) -> bool:
        """Adds target pages [first, first + count) of the host page; True when it is complete.

        `first` counts from the host page's start; `data` None means zero pages.
        """
        key = (block.idstr, host_page)
        if self._key is None:
            self._key = key
            self._arrived = np.zeros(block.page_size // self._page_size, np.bool_)
            self.all_zero = True
        elif self._key != key:
            self._refuse(
                f"a page of host page {host_page:#x} of {block.idstr} came while host page "
                f"{self._key[1]:#x} of {self._key[0]} was incomplete"
            )
        if self._arrived[first : first + count].any():
            self._refuse(f"a target page of host page {host_page:#x} of {block.idstr} came twice")
        self._arrived[first : first + count] = True
        start, end = first * self._page_size, (first + count) * self._page_size
        target = self._staging.bytes[start:end]
        if data is None:
            target[:] = 0
        else:
            self.all_zero = False
            source: NDArray[np.uint8] = np.ndarray(
                (count, self._page_size), np.uint8, data, position, (stride, 1)
            )
            np.copyto(target.reshape(count, self._page_size), source)
        if not self._arrived.all():
            return False
        self._key = None
        return True

    def _refuse(self, reason: str) -> None:
        raise RemoteProtocolError(
            reason, kind=ErrorKind.MALFORMED, channel=self._channel, message="PAGE"
        )
