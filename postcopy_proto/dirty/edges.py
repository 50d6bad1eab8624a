"""The places where runs of dirty pages begin and end, many at a time.

An edge is a page whose bit differs from the bit before it; before the first page all is clean. So
edges take turns: the first page of a run, then the first page behind it.

    uniform  words all of whose bits are equal have no edge but perhaps the first bit: most of a
             large guest, and skipped at the speed of memory
    few      most words are 0, or most are all ones: only the others are compared with their
             neighbours
    sparse   all words are compared, but few of them have edges
    dense    a byte for every bit, and the numbers of those that are edges

In the middle two, the edges are taken out of their words one by one, of all words at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from postcopy_proto.dirty.words import BITS, CHUNK_WORDS, Words, Words64, widen_words

Pages64 = NDArray[np.int64]
Indices = NDArray[np.intp]

PART_WORDS = 1 << 16
"""Words whose bits are compared with their neighbours at once: 512 KiB, half a megabyte of second
level cache. A clustered bitmap takes 7.7 ms in such parts, 9.7 in halves, 10.7 in quarters, for
the calls cost more than the misses."""

DENSE_WORDS = 1 << 12
"""Words that get a byte for every bit at once: 256 KiB of them, and up to 2 MiB of edges. Twice as
many fall out of the cache (alternating pages: 108 ms instead of 83), half as many gain nothing."""

REST_WORDS = 1 << 9
"""When so few words still have edges, unpacking them (some 20 us) is cheaper than another round
of a dozen numpy calls; at 4 times as many it begins to cost."""

EXTRACTION_ROUNDS = 3
"""Rounds of the sparse way. A round costs 10 ns a word, unpacking a word 38: where more than a few
words have more edges than this, the dense way would have been the faster one."""

MAX_EDGES = (EXTRACTION_ROUNDS + 1) * PART_WORDS + DENSE_WORDS * BITS
"""The most edges in one array: an edge a word in each round, and one at the border of each; then
the rest, unpacked."""

_PROBE = 1 << 12
"""Bytes that are looked at before all of them are: most chunks that are not uniform show it."""

_NONE = np.uint64(0)
_EVERY = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_NO_PAGES = np.zeros(0, np.int64)
_ONE = np.uint64(1)
_TOP = np.uint64(BITS - 1)
_MANTISSA_BITS = np.uint64(52)
_EXPONENT_BIAS = 1023


class EdgeFinder:
    """Finds edges, in working memory that is kept from one bitmap to the next."""

    def __init__(self) -> None:
        self._mask = np.empty(CHUNK_WORDS + CHUNK_WORDS // 8 + 1, np.bool_)
        self._differs = np.empty(PART_WORDS, np.uint64)
        self._work = np.empty((2, PART_WORDS), np.uint64)

    def edges(self, words: Words, pages: int = 1) -> Iterator[tuple[int, Pages64]]:
        """All edges: (page, at most MAX_EDGES pages counted from there), ascending.

        With `pages` > 1, the edges of the bitmap whose host pages of so many target pages are
        widened.
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
            for offset, edges in self._of_chunk(chunk, inside):
                yield start * BITS + offset, edges
            inside = bool(chunk[-1] >> _TOP)
        if inside:
            yield words.pages, np.zeros(1, np.int64)

    def _of_chunk(self, words: Words64, inside: bool) -> Iterator[tuple[int, Pages64]]:
        """The edges of a chunk, in the cheapest way; `inside`: the bit before it was set."""
        if _is_uniform(words):
            if bool(words[0]) != inside:
                yield 0, np.zeros(1, np.int64)
            return
        for uniform in (_NONE, _EVERY):
            others = self._unlike(uniform, words, at_most=min(len(words) // 4, PART_WORDS))
            if others is not None:
                edges = self._from_few(words, others, uniform, inside)
                if edges is not None:
                    yield 0, edges
                    return
        for start in range(0, len(words), PART_WORDS):
            part = words[start : start + PART_WORDS]
            for offset, edges in self._of_part(part, inside):
                yield start * BITS + offset, edges
            inside = bool(part[-1] >> _TOP)

    def _from_few(
        self, words: Words64, others: Indices, uniform: np.uint64, inside: bool
    ) -> Pages64 | None:
        """The edges where all words but `others` are `uniform`; None when there are too many."""
        here, before = words.take(others), words.take(others - 1, mode="clip")
        if others[0] == 0:
            before[0] = _EVERY if inside else _NONE
        differs = here << _ONE
        differs ^= here
        before >>= _TOP
        differs ^= before
        # The first bit of a uniform word is an edge if the last one before it is of the others.
        behind = others.take(np.flatnonzero((here ^ uniform) >> _TOP)) + 1
        behind = behind[behind < len(words)]
        borders = behind[words.take(behind) == uniform] * BITS
        if others[0] != 0 and inside != bool(uniform):
            borders = np.insert(borders, 0, 0)
        index = others * BITS
        if np.count_nonzero(differs) < len(differs):
            chosen = np.flatnonzero(differs != 0)
            differs, index = differs.take(chosen), index.take(chosen)
        return self._extract(differs, index, borders)

    def _of_part(self, words: Words64, inside: bool) -> Iterator[tuple[int, Pages64]]:
        """The edges of words that are all compared with their neighbours."""
        differs, carried = self._differs[: len(words)], self._work[0, : len(words)]
        np.left_shift(words, _ONE, out=differs)
        np.right_shift(words, _TOP, out=carried)
        differs ^= words
        differs[1:] ^= carried[:-1]
        differs[0] ^= np.uint64(inside)
        chosen = self._unlike(_NONE, differs, at_most=len(differs) * 3 // 4)
        edges = None if chosen is None else self._extract(differs.take(chosen), chosen * BITS)
        if edges is not None:
            yield 0, edges
            return
        for start in range(0, len(words), DENSE_WORDS):
            yield start * BITS, _bits(differs[start : start + DENSE_WORDS])

    def _extract(
        self, left: Words64, index: Pages64, more_edges: Pages64 = _NO_PAGES
    ) -> Pages64 | None:
        """The bits set in `left`, words whose first bits are `index`, and `more_edges`.

        One round takes the lowest bit of every word. None when too many words are left then.
        """
        found = [more_edges]
        index = index - _EXPONENT_BIAS
        for _ in range(EXTRACTION_ROUNDS):
            if len(left) <= REST_WORDS:
                break
            lowest, real = self._work[:, : len(left)]
            np.negative(left, out=lowest)
            lowest &= left
            left ^= lowest
            np.copyto(real.view(np.float64), lowest)  # its exponent is the bit
            real >>= _MANTISSA_BITS
            found.append(real.view(np.int64) + index)
            more = np.flatnonzero(left != 0)
            index, left = index.take(more), left.take(more)
        if len(left) > DENSE_WORDS:
            return None
        position = _bits(left)
        index += _EXPONENT_BIAS
        found.append(index.take(position >> 6) + (position & 63))
        edges = np.concatenate(found)
        # Each round's edges are ascending: a stable sort merges, in half the time of the default.
        edges.sort(kind="stable")
        return edges

    def _unlike(self, uniform: np.uint64, words: Words64, at_most: int) -> Indices | None:
        """The numbers of the words that are not `uniform`; None when they are more than that."""
        size = len(words)
        mask = self._mask[:size]
        np.not_equal(words, uniform, out=mask)
        count = np.count_nonzero(mask)
        if count > at_most:
            return None
        # numpy branches at every bit of a mask of which no more than a tenth is set. From some 4 %
        # on it is faster to pad the mask up to a tenth: at 6 %, 190 us instead of 283 for 2^18.
        missing = size // 10 - count
        padding = missing * 10 // 9 + 2 if 0 <= missing < size // 16 else 0
        self._mask[size : size + padding] = True
        return np.flatnonzero(self._mask[: size + padding])[:count]


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
