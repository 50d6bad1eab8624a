"""pytest tests/bench/test_discards.py --benchmark-enable: ours and the reference, side by side."""

from __future__ import annotations

import pytest

from tests.bench import discards

PAGES = 1 << 22


@pytest.mark.parametrize("contestant", ["ours", "bytewise", "swapped"])
@pytest.mark.parametrize("shape", discards.SHAPES)
def test_encode(benchmark, shape: str, contestant: str) -> None:
    bitmap = discards.SHAPES[shape](PAGES)
    benchmark.group = shape
    if contestant == "ours":
        size = benchmark(discards.ours, bitmap, PAGES)
    else:
        size = benchmark(discards.reference, bitmap, PAGES, swapped=contestant == "swapped")
    runs = discards.run_count(bitmap)
    commands = -(-runs // 12)
    assert size == commands * (5 + 3 + len(discards.IDSTR)) + 16 * runs


def test_one_row_of_the_table() -> None:
    result = discards.measure("clustered", 1 << 18, rounds=2)
    assert result.peak_bytes < 16 << 20
    assert result.bytewise_ratio > 0
    discards.show([result])
