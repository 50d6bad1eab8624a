"""Bitmaps as 64-bit words.

Everything here counts from the first page of a block: bit 0 of word 0 is that page, whatever bit
of the bitmap it is, and bits behind the block's last page are clear.
"""

from __future__ import annotations

import numpy as np
from bitarray import bitarray
from numpy.typing import NDArray

Words64 = NDArray[np.uint64]

BITS = 64
_LITTLE_WORD = np.dtype("<u8")
_EVERY = np.uint64(0xFFFF_FFFF_FFFF_FFFF)

CHUNK_WORDS = 1 << 18
"""Words that are looked at together: 2 MiB, 64 GiB of a guest with pages of 4 KiB. A page in a
thousand dirty takes 1.18 ms in chunks of 2^16, 1.15 of 2^17 and 1.08 of 2^18 and 2^19 (2^25 pages):
the numpy calls of a chunk cost the same however many words it has."""


class Words:
    """The pages [first, first + count) of `bits` as words, in pieces of any size.

    `bits` must hold them. Pieces are views wherever bit `first` begins an aligned byte
    and the piece has no end of the block inside; copies elsewhere.
    """

    def __init__(self, bits: bitarray, first: int, count: int) -> None:
        self.count = -(-count // BITS)
        """words"""
        self._bytes = np.frombuffer(memoryview(bits), np.uint8)[
            first // 8 : -(-(first + count) // 8)
        ]
        self._shift = first % 8
        self.pages = count

    @staticmethod
    def step(pages: int = 1) -> int:
        """Words of a chunk that is a whole number of host pages of `pages` target pages."""
        return max(CHUNK_WORDS, pages // BITS)

    def chunk(self, start: int, stop: int) -> Words64:
        """The words [start, stop), not to be written to."""
        if self._shift or stop * BITS > self.pages:
            return self.copy_of(start, stop)
        piece: Words64 = self._bytes[8 * start : 8 * stop].view(_LITTLE_WORD)
        return piece if piece.flags.aligned else piece.copy()

    def copy_of(self, start: int, stop: int) -> Words64:
        """The words [start, stop) in memory of their own."""
        raw = np.zeros(8 * (stop - start) + 1, np.uint8)  # one more: a shift borrows from it
        piece = self._bytes[8 * start : 8 * stop + 1]
        raw[: len(piece)] = piece
        words = raw[:-1].view(_LITTLE_WORD).copy()
        if self._shift:
            words >>= np.uint64(self._shift)
            words |= raw[8::8].astype(np.uint64) << np.uint64(BITS - self._shift)
        beyond = stop * BITS - self.pages
        if beyond > 0:
            words[-1] &= _EVERY >> np.uint64(beyond)
        return words

    def store(self, start: int, words: Words64) -> None:
        """Write `words` back from word `start` on, only for bitmaps that begin at bit 0."""
        target = self._bytes[8 * start : 8 * (start + len(words))]
        source = words.astype(_LITTLE_WORD, copy=False).view(np.uint8)
        target[:] = source[: len(target)]


def widen_words(words: Words64, pages: int) -> None:
    """Set all bits of every group of `pages` (a power of two) that has one set, in place.

    Groups of a word and more must fill `words` exactly.
    """
    if pages < BITS:
        _widen_within_words(words, pages)
    else:
        groups = words.reshape(-1, pages // BITS)
        groups[:] = np.where(groups.any(axis=1, keepdims=True), _EVERY, np.uint64(0))


def _widen_within_words(words: Words64, pages: int) -> None:
    # Gather each group's bits in its lowest one: what comes from the group above ends up higher.
    shift = 1
    while shift < pages:
        words |= words >> np.uint64(shift)
        shift *= 2
    group = (1 << pages) - 1
    words &= np.uint64(int(_EVERY) // group)  # the lowest bit of every group
    words *= np.uint64(group)  # spreads it; groups don't touch, so nothing carries
