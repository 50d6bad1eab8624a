"""The places where runs of dirty pages begin and end, many at a time.

An edge is a page whose bit differs from the bit before it; before the first page all is clean. So
edges take turns: the first page of a run, then the first page behind it.

    few      most words are 0, or most are all ones: only the others are looked at, gathered from
             as many chunks as make a batch; a chunk that is uniform has none
    sparse   all words are compared with their neighbours, but few of them have edges
    dense    a byte for every bit, and the numbers of those that are edges

In the first two, bits are counted, of all words at once: the bits below the lowest one say where it
is, and the edges in the words before it say where in the result it goes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from postcopy_proto.dirty.words import BITS, CHUNK_WORDS, Words, Words64, widen_words

Pages64 = NDArray[np.int64]
Indices = NDArray[np.intp]
Counts = NDArray[np.uint8]

BATCH_WORDS = 1 << 15
"""Words that are gathered before their edges are taken out, some forty numpy calls that cost 1 us
each however many words there are. Twice or half as many make no difference to a page in a thousand;
bitmaps with fewer dirty pages make one batch of many chunks."""

PART_WORDS = 1 << 16
"""Words whose bits are compared with their neighbours at once: 512 KiB, half a megabyte of second
level cache. A clustered bitmap takes 4.2 ms in such parts and in larger ones, 4.7 in halves."""

DENSE_WORDS = 1 << 12
"""Words that get a byte for every bit at once: 256 KiB of them, and up to 2 MiB of edges. Twice as
many fall out of the cache (alternating pages: 108 ms instead of 83), half as many gain nothing."""

ROUNDS = 3
"""Edges that are taken out of words one at a time when they have more than two; words that have
still more are unpacked. With 15 pages in a thousand dirty 5.3 ms for 2^24 pages; two rounds leave
so many words that the dense way is taken, 8.9 ms; four gain nothing."""

REST_WORDS = 1 << 9
"""When so few words still have edges, unpacking them, some 40 ns each, is cheaper than another
round of a dozen numpy calls. From 64 to 2048 it makes no difference that can be measured."""

PACK_EDGES = 1 << 14
"""Edges that are given out at once. A quarter of it or four times as many change the time of a
clustered bitmap by 4 %, of others by less."""

MAX_EDGES = DENSE_WORDS * (BITS + 1)
"""The most edges that are found at once: every bit of a word, and the first one behind it."""

_PROBE = 1 << 12
"""Bytes that are looked at before all of them are: most chunks that are not uniform show it."""

_NONE = np.uint64(0)
_ONE = np.uint64(1)
_TOP = np.uint64(BITS - 1)
_NO_WORDS = np.zeros(0, np.intp)
_PADDING = np.full(DENSE_WORDS // 8, ~_NONE)


class EdgeFinder:
    """Finds edges, in working memory that is kept from one bitmap to the next."""

    def __init__(self) -> None:
        self._mask = np.empty(CHUNK_WORDS, np.bool_)
        self._differs = np.empty(PART_WORDS, np.uint64)
        self._carried = np.empty(PART_WORDS, np.uint64)
        self._few = _Few()
        self._queue = _Queue()

    def edges(self, words: Words, pages: int = 1, group: int = 1) -> Iterator[Pages64]:
        """All edges, ascending, in arrays that are good until the next one is asked for.

        Every array but the last has a multiple of `group` edges. With `pages` > 1, the edges of
        the bitmap whose host pages of so many target pages are widened.
        """
        few, queue = self._few, self._queue
        queue.begin(group)
        few.begin(0, _NONE, inside=False)
        inside = False
        for start, chunk in _chunks(words, pages):
            uniform, unlike = self._compare(chunk, few.uniform)
            mixed = unlike > len(chunk) // 4
            if mixed or uniform != few.uniform or few.count >= BATCH_WORDS:
                yield from self._of_few(start)
                few.begin(start, uniform, inside)
            if mixed:
                for first in range(0, len(chunk), PART_WORDS):
                    part = chunk[first : first + PART_WORDS]
                    yield from self._of_part(start + first, part, inside)
                    inside = _last_bit(part)
                few.begin(start + len(chunk), uniform, inside)
            elif unlike:
                few.add(start, chunk, self._marked(len(chunk), unlike))
            inside = _last_bit(chunk)
        yield from self._of_few(words.count)
        if inside:
            queue.room(1)[0] = words.pages
        yield queue.rest()

    def _of_few(self, stop: int) -> Iterator[Pages64]:
        """The edges of what was gathered, of a stretch that ends before word `stop`."""
        few = self._few
        if few.start == stop:
            return
        numbers, words, inside = few.gathered()
        if inside and not (few.count and numbers[0] == few.start):
            self._queue.room(1)[0] = few.start * BITS
            inside = False
        if not few.count:
            yield from self._queue.full()
            return
        differs = words << _ONE
        differs ^= words
        differs[0] ^= np.uint64(inside)
        # Where a word's last bit is set, the first bit behind it is an edge if that word is one of
        # the uniform ones; it is counted with this word's. If not, what it begins with changes.
        last_set = (words.view(np.int64) < 0).nonzero()[0]
        behind = numbers.take(last_set) + 1
        gathered = numbers.take(last_set + 1, mode="clip") == behind
        differs[last_set[gathered] + 1] ^= _ONE
        ends = last_set[~gathered & (behind < stop)]
        counts = np.bitwise_count(differs)
        counts[ends] += 1
        if np.count_nonzero(counts) < len(counts):
            kept = counts.nonzero()[0]
            numbers, differs, counts = numbers.take(kept), differs.take(kept), counts.take(kept)
            ends = kept.searchsorted(ends)
        yield from self._extract(numbers, differs, counts, ends)

    def _of_part(self, start: int, words: Words64, inside: bool) -> Iterator[Pages64]:
        """The edges of words that are all compared with their neighbours."""
        differs, carried = self._differs[: len(words)], self._carried[: len(words)]
        np.left_shift(words, _ONE, out=differs)
        np.right_shift(words, _TOP, out=carried)
        differs ^= words
        differs[1:] ^= carried[:-1]
        differs[0] ^= np.uint64(inside)
        unlike = self._mark(differs, _NONE)
        if unlike <= len(words) * 15 // 16:
            numbers = self._marked(len(words), unlike)
            torn = differs.take(numbers)
            counts = np.bitwise_count(torn)
            if np.count_nonzero(counts > 1 + ROUNDS) <= len(words) // 6:
                numbers += start
                yield from self._extract(numbers, torn, counts)
                return
        for first in range(0, len(words), DENSE_WORDS):
            found = _bits(differs[first : first + DENSE_WORDS])
            np.add(found, (start + first) * BITS, out=self._queue.room(len(found)))
            yield from self._queue.full()

    def _extract(
        self, numbers: Indices, differs: Words64, counts: Counts, ends: Indices = _NO_WORDS
    ) -> Iterator[Pages64]:
        """The bits set in `differs`, the words `numbers`, and the first ones behind `ends`.

        `counts`: how many each word has of both, one at least.
        """
        behind = np.zeros(len(counts) + 1, np.int64)
        counts.cumsum(out=behind[1:])
        if behind[-1] > MAX_EDGES:
            for first in range(0, len(counts), DENSE_WORDS):
                piece = slice(first, first + DENSE_WORDS)
                low, high = ends.searchsorted((piece.start, piece.stop))
                yield from self._extract(
                    numbers[piece], differs[piece], counts[piece], ends[low:high] - first
                )
            return
        edges, before = self._queue.room_with_one_before(int(behind[-1]))
        slots, last_slots = behind[:-1], behind[1:]
        pages = numbers << 6
        # Most words have one edge or two: the lowest bit, and what is left without it. With one
        # edge the second number is of no use, and the first one takes its place.
        below = np.empty((2, len(differs)), np.uint64)
        np.subtract(differs, _ONE, out=below[0])
        left = differs & below[0]
        below[0] ^= differs
        below[0] >>= _ONE
        np.subtract(left, _ONE, out=below[1])
        found = below.view(np.int64)
        np.add(pages, np.bitwise_count(below), out=found)
        before[last_slots] = found[1]
        edges[slots] = found[0]
        more = (counts > 2).nonzero()[0]
        _extract_more(edges, slots.take(more) + 1, pages.take(more), left.take(more))
        before[last_slots.take(ends)] = pages.take(ends) + BITS
        yield from self._queue.full()

    def _compare(self, words: Words64, likely: np.uint64) -> tuple[np.uint64, int]:
        """What most words are, 0 or all ones, and how many are not; these are marked."""
        if _is_uniform(words):
            return words[0], 0
        unlike = self._mark(words, likely)
        if unlike <= len(words) * 3 // 4:
            return likely, unlike
        return ~likely, self._mark(words, ~likely)

    def _mark(self, words: Words64, uniform: np.uint64) -> int:
        """Mark the words that are not `uniform`; how many there are."""
        mask = self._mask[: len(words)]
        np.not_equal(words, uniform, out=mask)
        return int(np.count_nonzero(mask))

    def _marked(self, size: int, count: int) -> Indices:
        """The numbers of the words that are marked, `count` of `size`."""
        mask = self._mask[:size]
        if count > size // 8 or size % 4:
            return mask.nonzero()[0]
        # numpy takes 0.4 ns for every byte of a mask: look at four of them at once. A page in a
        # thousand takes 1.16 ms, byte by byte 1.24 (2^25 pages).
        fours = mask.view(np.uint32)
        some = (fours != 0).nonzero()[0]
        places = fours.take(some).view(np.bool_).nonzero()[0]
        numbers: Indices = some.take(places >> 2)
        numbers <<= 2
        places &= 3
        numbers |= places
        return numbers


class _Few:
    """A stretch of words that are uniform but for a few, which are gathered here."""

    def __init__(self) -> None:
        room = BATCH_WORDS + CHUNK_WORDS // 4
        self._numbers = np.empty(room, np.intp)
        self._words = np.empty(room, np.uint64)
        self.begin(0, _NONE, inside=False)

    def begin(self, start: int, uniform: np.uint64, inside: bool) -> None:
        """A stretch that begins at word `start`; `inside`: the bit before it was set."""
        self.start = start
        self.uniform = uniform
        self.inside = inside
        self.count = 0

    def add(self, start: int, words: Words64, others: Indices) -> None:
        """Those of `words`, the first of which is `start`, that are not uniform."""
        place = slice(self.count, self.count + len(others))
        np.add(others, start, out=self._numbers[place])
        words.take(others, out=self._words[place], mode="clip")  # "raise" takes a copy of its own
        self.count += len(others)

    def gathered(self) -> tuple[Indices, Words64, bool]:
        """Numbers and words, and whether the bit before was set: as if all others were 0.

        Between clean pages and dirty ones the edges are the same whichever is which.
        """
        words = self._words[: self.count]
        if self.uniform:
            np.invert(words, out=words)
        return self._numbers[: self.count], words, self.inside != bool(self.uniform)


class _Queue:
    """Edges that are found and not yet given out."""

    def __init__(self) -> None:
        self._edges = np.empty(1 + PACK_EDGES + MAX_EDGES, np.int64)
        self.begin(1)

    def begin(self, group: int) -> None:
        """Empty, to be given out in multiples of `group`."""
        self._group = group
        self._stop = 1

    def room(self, count: int) -> Pages64:
        """Memory for `count` more edges."""
        self._stop += count
        return self._edges[self._stop - count : self._stop]

    def room_with_one_before(self, count: int) -> tuple[Pages64, Pages64]:
        """The same, and once more with the edge before it."""
        room = self.room(count)
        return room, self._edges[self._stop - count - 1 : self._stop]

    def full(self) -> Iterator[Pages64]:
        """All whole groups, if there are edges enough to make it worth while."""
        size = self._stop - 1
        if size >= PACK_EDGES:
            taken = 1 + size - size % self._group
            yield self._edges[1:taken]
            left = self._edges[taken : self._stop]
            self._edges[1 : 1 + len(left)] = left
            self._stop = 1 + len(left)

    def rest(self) -> Pages64:
        """All edges that are left."""
        return self._edges[1 : self._stop]


def _chunks(words: Words, pages: int) -> Iterator[tuple[int, Words64]]:
    """All words in chunks, with the number of the first; widened for `pages` > 1."""
    step = words.step(pages)
    for start in range(0, words.count, step):
        stop = min(start + step, words.count)
        if pages == 1:
            yield start, words.chunk(start, stop)
            continue
        chunk = words.copy_of(start, stop)
        widen_words(chunk, pages)
        for first in range(0, len(chunk), CHUNK_WORDS):
            yield start + first, chunk[first : first + CHUNK_WORDS]


def _extract_more(edges: Pages64, slots: Indices, pages: Pages64, left: Words64) -> None:
    """Write the bits set in `left`, words whose first bits are `pages`, from `slots` on."""
    for _ in range(ROUNDS):
        if len(left) <= REST_WORDS:
            break
        below = left - _ONE
        edges[slots] = pages + np.bitwise_count((left ^ below) >> _ONE)
        left &= below
        more = (left != 0).nonzero()[0]
        slots, pages, left = slots.take(more) + 1, pages.take(more), left.take(more)
    if not len(left):
        return
    counts = np.bitwise_count(left).astype(np.int64)
    places = _bits(left)
    # Both count on from word to word: take off what the words before have.
    slots -= counts.cumsum() - counts
    pages -= np.arange(0, BITS * len(left), BITS)
    edges[np.repeat(slots, counts) + np.arange(len(places))] = np.repeat(pages, counts) + places


def _is_uniform(words: Words64) -> bool:
    """Whether all bits are equal: a look at the first words, then at all."""
    octets = words.view(np.uint8)
    if octets[0] == 0x00:
        return not octets[:_PROBE].max() and not octets.max()
    return bool(octets[0] == octets[:_PROBE].min() == 0xFF and octets.min() == 0xFF)


def _last_bit(words: Words64) -> bool:
    return bool(words[-1] >> _TOP)


def _bits(words: Words64) -> Pages64:
    """The numbers of all bits that are set, ascending."""
    # numpy branches at every bit that is set when no more than a tenth are. From some 6 % on it is
    # faster to pad them up to a ninth: 13 ms instead of 18 for 2^24 pages, 5 % of them dirty. One
    # word in 16 tells well enough how many there are.
    missing = BITS * len(words) // 9 - 16 * int(np.bitwise_count(words[::16]).sum())
    padding = 0
    if 0 < missing < BITS * len(words) // 20:
        padding = min(missing // BITS + 1, len(_PADDING))
        words = np.concatenate((words, _PADDING[:padding]))
    octets = words.astype("<u8", copy=False).view(np.uint8)
    found: Pages64 = np.unpackbits(octets, bitorder="little").view(np.bool_).nonzero()[0]
    return found[: len(found) - BITS * padding]
