"""Splitting a batch into runs: every page once, in order, in the longest runs."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from postcopy_proto.messages import Pages
from postcopy_proto.userfault.runs import split_runs
from tests.userfault.support import PAGE


def pages_of(numbers: list[int], zeros: list[bool], gaps: list[int]) -> Pages:
    """Positions ascend by one page and a gap for each page that has content."""
    positions, at = [], 0
    for zero, gap in zip(zeros, gaps, strict=True):
        if not zero:
            at += gap
        positions.append(-1 if zero else at)
        at += 0 if zero else PAGE
    offsets = np.array(numbers, np.uint64) * np.uint64(PAGE)
    return Pages("ram", offsets, np.array(positions, np.int64), memoryview(bytes(at)))


def random_batch(seed: int) -> Pages:
    """Few and many pages: mostly contiguous, some of them zero, at changing strides."""
    rng = np.random.default_rng(seed)
    pieces = [(rng.integers(0, 50), rng.integers(1, 12)) for _ in range(rng.integers(1, 12))]
    numbers = [int(first + page) for first, count in pieces for page in range(count)]
    zeros = (rng.random(len(numbers)) < 0.2).tolist()
    gaps = np.where(rng.random(len(numbers)) < 0.75, 8, 0).tolist()
    return pages_of(numbers, zeros, gaps)


@pytest.mark.parametrize("first_seed", range(0, 500, 100))
def test_runs_name_every_page_once_and_in_order(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 100):
        check(random_batch(seed))


def check(pages: Pages) -> None:
    named = []
    runs = split_runs(pages)
    for offset, count, position, stride in runs:
        for page in range(count):
            where = -1 if position < 0 else position + page * stride
            named.append((offset + page * PAGE, where))
    assert named == list(zip(pages.offsets.tolist(), pages.positions.tolist(), strict=True))
    for before, after in pairwise(runs):
        joins = after.offset == before.offset + before.pages * PAGE
        both_zero = before.position < 0 and after.position < 0
        assert not (joins and both_zero), "two runs of zero pages that are one"


def test_a_whole_batch_is_one_run() -> None:
    for count in (1, 2, 16, 17, 300):
        numbers = list(range(5, 5 + count))
        (run,) = split_runs(pages_of(numbers, [False] * count, [8] * count))
        stride = PAGE + 8 if count > 1 else PAGE
        assert run == (5 * PAGE, count, 8, stride)
        (run,) = split_runs(pages_of(numbers, [True] * count, [0] * count))
        assert (run.offset, run.pages, run.position) == (5 * PAGE, count, -1)
