"""RAMBlock, page and byte ranges, and the two interfaces through which pages come and go.

The vocabulary of every other module. Everything on the wire is addressed as (idstr, byte offset);
a *target page* is the guest's page (4096 bytes on x86), the unit of dirty bitmaps and of page
records; a *host page* is what the block's memory is backed with, the unit of placement, requests
and discards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from bitarray import bitarray
from numpy.typing import NDArray

if TYPE_CHECKING:
    from postcopy_proto.messages import Pages

TARGET_PAGE_SIZE = 4096
"""Bytes of the guest's page on x86, and QEMU's base page unless said otherwise."""

_ARANGE_END = 1 << 62
"""well before the integers that `numpy.arange` counts with come to their end"""

IDSTR_MAX = 255
"""Longest RAMBlock name in bytes: the wire counts it in one byte."""


def is_power_of_two(value: int) -> bool:
    """Whether `value` is 1, 2, 4, ...; page sizes are."""
    return value > 0 and value & (value - 1) == 0


def encode_idstr(idstr: str) -> bytes:
    """The bytes of a block's name, 1 to 255 of them and no NUL; ValueError otherwise.

    Names are UTF-8; bytes that are not come and go as surrogates, so that any name a peer sends
    survives a round trip.
    """
    raw = idstr.encode("utf-8", "surrogateescape")
    if not 1 <= len(raw) <= IDSTR_MAX:
        raise ValueError(
            f"RAMBlock name {idstr!r} has {len(raw)} bytes; 1 to {IDSTR_MAX} are allowed"
        )
    if 0 in raw:
        raise ValueError(f"RAMBlock name {idstr!r} contains a NUL byte")
    return raw


def decode_idstr(raw: bytes | bytearray | memoryview) -> str:
    """The inverse of `encode_idstr`, for bytes that were already checked for length and NUL."""
    return bytes(raw).decode("utf-8", "surrogateescape")


class ByteRange(NamedTuple):
    """`length` bytes from `start`, inside one block: one range of a RAM discard."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """The first byte after the range."""
        return self.start + self.length


def test_bits(bits: bitarray, numbers: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Which of the bits with these numbers are set; `bits` in little-endian bit order."""
    in_bytes = np.frombuffer(memoryview(bits), np.uint8)
    shifted: NDArray[np.uint8] = in_bytes[numbers >> 3] >> (numbers & 7).astype(np.uint8)
    result: NDArray[np.bool_] = shifted & 1 != 0
    return result


def ascends(values: NDArray[np.integer[Any]], step: int) -> bool:
    """Whether each value is the one before it and `step` more; there is at least one."""
    first, last, count = int(values[0]), int(values[-1]), len(values)
    if last - first != (count - 1) * step:
        return False
    if step <= 0 or last >= _ARANGE_END:
        return count == 1 or bool((values[1:] - values[:-1] == step).all())
    # Bytes are compared several times as fast as two arrays of some hundred numbers.
    counted = np.arange(first, last + 1, step, dtype=values.dtype)
    return counted.tobytes() == values.tobytes()


def set_bits(bits: bitarray, numbers: NDArray[np.integer[Any]]) -> None:
    """Set the bits with these numbers, in any order; `bits` in little-endian bit order."""
    if ascends(numbers, 1):
        bits[int(numbers[0]) : int(numbers[-1]) + 1] = True
        return
    masks = np.left_shift(1, numbers & 7).astype(np.uint8)
    np.bitwise_or.at(np.frombuffer(memoryview(bits), np.uint8), numbers >> 3, masks)


@dataclass(frozen=True, slots=True)
class RAMBlock:
    """A named range of guest RAM.

    ValueError when the name is not 1 to 255 bytes without NUL, when the page size is no power of
    two, or when the length is negative. Mirrors the fields of QEMU's RAMBlock that the
    protocol uses.
    """

    idstr: str
    """QEMU's name of the block, e.g. `pc.ram`"""
    used_length: int
    """bytes"""
    page_size: int = TARGET_PAGE_SIZE
    """bytes of one host page of the backing: 4096, or 2 MiB, 1 GiB with hugetlb"""

    def __post_init__(self) -> None:
        encode_idstr(self.idstr)
        if self.used_length < 0:
            raise ValueError(f"RAMBlock {self.idstr}: used_length {self.used_length} is negative")
        if not is_power_of_two(self.page_size):
            raise ValueError(f"RAMBlock {self.idstr}: page size {self.page_size} is no power of 2")

    def page_count(self, page_size: int = TARGET_PAGE_SIZE) -> int:
        """Pages of `page_size` bytes that cover the block, the last one perhaps partly."""
        return -(-self.used_length // page_size)

    def host_page_of(self, offset: int) -> int:
        """Byte offset of the host page that holds byte `offset`."""
        return offset & -self.page_size

    def contains(self, start: int, length: int) -> bool:
        """Whether the bytes [start, start + length) lie inside the block."""
        return start >= 0 and length >= 0 and start + length <= self.used_length


class PageStore(Protocol):
    """Where a source's pages come from: live memory, a save file, anything.

    Pages are target pages, named by number within their block, in arrays of shape (n,).
    """

    @property
    def blocks(self) -> Sequence[RAMBlock]:
        """The blocks in the order in which a source lists them."""

    def zero_pages(self, block: str, pages: NDArray[np.intp]) -> NDArray[np.bool_]:
        """For each page, whether it is known to hold only zeros; shape (n,).

        True must be right; False may be a guess: such a page is read and sent as it is.
        """

    def read_pages(self, block: str, pages: NDArray[np.intp]) -> NDArray[np.uint8]:
        """The bytes of those pages, shape (n, target page size), C order within a row.

        A view of the store's own memory where it can be had without a copy; good until the
        next call.
        """


@runtime_checkable
class SinglePageStore(PageStore, Protocol):
    """A store that has a quicker way to one page than through arrays of one.

    A vCPU waits for one page: where the answer is made in microseconds, arrays are half of it.
    """

    def read_page(self, block: str, page: int) -> bytes | memoryview | None:
        """The bytes of that page, None for a zero page; good until the next call."""


class PageSink(Protocol):
    """Where a destination's pages go: a guest's memory, a save file, both.

    A batch holds any mix of pages with content and zero pages of one block, in stream order: a
    later entry for a page replaces an earlier one.
    """

    def place(self, pages: Pages) -> None:
        """Put every page of the batch in its place. Must not keep views of the batch."""

    def discard(self, block: str, start: int, length: int) -> None:
        """Forget the bytes [start, start + length) of a block: they will come again."""
