"""The wire is fast enough: goals with room for a noisy machine; `bench.wire` prints the figures."""

from __future__ import annotations

from tests.bench import wire


def figures_by_name(figures: list[dict[str, object]], figure: str) -> dict[str, float]:
    return {str(entry["what"]): float(str(entry[figure])) for entry in figures if figure in entry}


def test_pages_at_memory_speed() -> None:
    speed = figures_by_name(wire.page_figures(), "gigabytes_per_second")
    assert speed["decode pages, contiguous, 1 MiB"] > 2
    assert speed["decode pages, mix of 50 % zero, 1 MiB"] > 1


def test_requests_against_construct() -> None:
    times = figures_by_name(wire.request_figures(), "times_construct")
    assert times["decode_requests, the codec itself"] > 30
    assert times["decode REQ_PAGES, many at once, iterating"] > 25
    assert times["encode REQ_PAGES"] > 30
