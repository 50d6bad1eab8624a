"""The places where runs of dirty pages begin and end.

An edge is a page whose bit differs from the bit before it; before the first page everything is
clean. Edges come in pairs: the first page of a run, and the first page behind it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from bitarray import bitarray
from numpy.typing import NDArray

from postcopy_proto.dirty.words import BITS, Words, Words64, widen_words

Pages64 = NDArray[np.int64]

DENSE_WORDS = 1 << 12
SPARSE_EDGES_PER_WORD = 2
EXTRACTION_ROUNDS = 4
MAX_EDGES = DENSE_WORDS * BITS
"""The most edges that come at once."""

_ONE = np.uint64(1)
_TOP = np.uint64(BITS - 1)
_EVERY = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


def iter_edges(words: Words, page_count: int, pages: int = 1) -> Iterator[Pages64]:
    """All edges, ascending page numbers, in arrays of at most MAX_EDGES; even in number.

    With `pages` > 1, those of the bitmap whose host pages of so many target pages are widened.
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
        if not _is_uniform(chunk):
            yield from _edges_of(chunk, start * BITS, inside)
        elif bool(chunk[0]) != inside:
            yield np.array([start * BITS])
        inside = bool(chunk[-1] >> _TOP)
    if inside:
        yield np.array([page_count])


def _is_uniform(words: Words64) -> bool:
    """Whether all bits are equal."""
    first = words[0]
    if first == 0:
        return not words.any()
    return first == _EVERY and bool(words.min() == _EVERY)


def _edges_of(words: Words64, base: int, inside: bool) -> Iterator[Pages64]:
    edges = words << _ONE
    edges[1:] |= words[:-1] >> _TOP
    edges[0] |= np.uint64(inside)
    edges ^= words
    if bitarray(buffer=edges).count() <= SPARSE_EDGES_PER_WORD * len(edges):
        yield _few(edges, base)
    else:
        for start in range(0, len(edges), DENSE_WORDS):
            yield _many(edges[start : start + DENSE_WORDS], base + start * BITS)


def _many(edges: Words64, base: int) -> Pages64:
    positions = np.flatnonzero(
        np.unpackbits(edges.astype("<u8", copy=False).view(np.uint8), bitorder="little")
    )
    positions += base
    return positions


def _few(edges: Words64, base: int) -> Pages64:
    index = np.flatnonzero(edges)
    left = edges[index]
    index <<= 6
    index += base
    found = []
    for _ in range(EXTRACTION_ROUNDS):
        lowest = left & -left
        found.append(index + _bit_number(lowest))
        left ^= lowest
        more = np.flatnonzero(left)
        if not len(more):
            break
        index, left = index[more], left[more]
    else:
        rest = _many(left, 0)
        found.append(index[rest >> 6] + (rest & 63))
    if len(found) == 1:
        return found[0]
    positions = np.concatenate(found)
    positions.sort()
    return positions


def _bit_number(powers: Words64) -> Pages64:
    """The exponents of powers of two."""
    exponent = powers.astype(np.float64).view(np.int64)
    exponent >>= 52
    exponent -= 1023
    return exponent
