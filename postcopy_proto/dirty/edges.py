"""The places where runs of dirty pages begin and end, many at a time.

An edge is a page whose bit differs from the bit before it; before the first page all is clean. So
edges take turns: the first page of a run, then the first page behind it.

    uniform  words all of whose bits are equal have no edge but perhaps the first bit: most of a
             large guest, and skipped at the speed of memory
    sparse   few words have edges: take those, and from each its lowest edge, all words at once,
             until none is left
    dense    a byte for every bit, and the numbers of those that are edges
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from postcopy_proto.dirty.words import BITS, Words, Words64, widen_words

Pages64 = NDArray[np.int64]

PART_WORDS = 1 << 16
DENSE_WORDS = 1 << 12
SPARSE_SHARE = 0.8
EXTRACTION_ROUNDS = 4
REST_WORDS = 1 << 9
MAX_EDGES = EXTRACTION_ROUNDS * PART_WORDS + DENSE_WORDS * BITS
_PROBE = 1 << 12

_ONE = np.uint64(1)
_TOP = np.uint64(BITS - 1)
_MANTISSA_BITS = np.uint64(52)
_EXPONENT_BIAS = 1023


class EdgeFinder:
    """Finds edges, in working memory that is kept from one bitmap to the next."""

    def __init__(self) -> None:
        self._differs = np.empty(PART_WORDS, np.uint64)
        self._work = np.empty((4, PART_WORDS), np.uint64)
        self._chosen = np.empty(PART_WORDS + PART_WORDS // 8 + 1, np.bool_)
        self._found = np.empty(MAX_EDGES, np.int64)

    def edges(self, words: Words, pages: int = 1) -> Iterator[tuple[int, Pages64]]:
        """All edges: (page, at most MAX_EDGES pages counted from there), ascending.

        With `pages` > 1, the edges of the bitmap whose host pages of so many target pages are
        widened. An array is good until the next one is asked for.
        """
        inside = False
        step = words.step(pages)
        for start in range(0, words.count, step):
            stop = min(start + step, words.count)
            if pages == 1:
                chunk = words.chunk(start, stop)
            else:
                chunk = words.copy_of(start, stop)
                widen_words(chunk, pages)
            for first, part in _parts(chunk):
                base = (start + first) * BITS
                if _is_uniform(part):
                    if bool(part[0]) != inside:
                        yield base, np.zeros(1, np.int64)
                else:
                    for offset, edges in self._of_part(part, inside):
                        yield base + offset, edges
                inside = bool(part[-1] >> _TOP)
        if inside:
            yield words.pages, np.zeros(1, np.int64)

    def _of_part(self, words: Words64, inside: bool) -> Iterator[tuple[int, Pages64]]:
        differs, carried = self._differs[: len(words)], self._work[0, : len(words)]
        np.left_shift(words, _ONE, out=differs)
        np.right_shift(words, _TOP, out=carried)
        differs ^= words
        differs[1:] ^= carried[:-1]
        differs[0] ^= np.uint64(inside)
        edges = self._sparse(differs)
        if edges is not None:
            yield 0, edges
            return
        for start in range(0, len(words), DENSE_WORDS):
            yield start * BITS, _bits(differs[start : start + DENSE_WORDS])

    def _sparse(self, differs: Words64) -> Pages64 | None:
        """The edges, or None when there are too many for this way."""
        chosen = self._nonzero(differs)
        if len(chosen) > SPARSE_SHARE * len(differs):
            return None
        found = 0
        left, index = self._work[0, : len(chosen)], self._work[1, : len(chosen)].view(np.int64)
        differs.take(chosen, out=left, mode="clip")
        np.left_shift(chosen, 6, out=index)
        index -= _EXPONENT_BIAS
        for _ in range(EXTRACTION_ROUNDS):
            if len(left) <= REST_WORDS:
                break
            lowest, real = self._work[2:, : len(left)]
            np.negative(left, out=lowest)
            lowest &= left
            left ^= lowest
            np.copyto(real.view(np.float64), lowest)  # a power of two: its exponent is the bit
            real >>= _MANTISSA_BITS
            np.add(real.view(np.int64), index, out=self._found[found : found + len(left)])
            found += len(left)
            more = self._nonzero(left)
            index, left = index.take(more), left.take(more)
        else:
            return None
        position = _bits(left)
        index += _EXPONENT_BIAS
        rest = index.take(position >> 6) + (position & 63)
        self._found[found : found + len(rest)] = rest
        found += len(rest)
        edges = self._found[:found]
        edges.sort(kind="stable")
        return edges

    def _nonzero(self, words: Words64) -> NDArray[np.intp]:
        """The numbers of the words that are not 0."""
        size = len(words)
        padded = self._chosen[: size + size // 8 + 1]
        chosen = padded[:size]
        np.not_equal(words, 0, out=chosen)
        padded[size:] = True
        return np.flatnonzero(padded)[: np.count_nonzero(chosen)]


def _parts(chunk: Words64) -> Iterator[tuple[int, Words64]]:
    """The chunk whole if it is uniform, else in parts: (first word, words)."""
    if len(chunk) <= PART_WORDS or _is_uniform(chunk):
        yield 0, chunk
        return
    for first in range(0, len(chunk), PART_WORDS):
        yield first, chunk[first : first + PART_WORDS]


def _is_uniform(words: Words64) -> bool:
    """Whether all bits are equal: a look at the first words, then at all."""
    octets = words.view(np.uint8)
    if octets[0] == 0x00:
        return not octets[:_PROBE].max() and not octets.max()
    return bool(octets[0] == octets[:_PROBE].min() == 0xFF and octets.min() == 0xFF)


def _bits(words: Words64) -> Pages64:
    """The numbers of all bits that are set, ascending."""
    octets = words.astype("<u8", copy=False).view(np.uint8)
    return np.flatnonzero(np.unpackbits(octets, bitorder="little").view(np.bool_))
