"""The benchmark runs, and measures what it says: every byte placed, every fault served."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.bench import userfault as bench
from tests.userfault.support import MIB

pytestmark = [
    pytest.mark.userfault,
    pytest.mark.skipif(
        shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler for the reference"
    ),
]


def test_placement_of_every_size() -> None:
    before = os.sched_getaffinity(0)
    results = bench.measure_placement(rounds=1, total=2 * MIB)
    assert [row.piece for row in results] == list(bench.PIECES)
    assert all(row.copy_ratio > 0 and row.backend_ratio > 0 for row in results)
    assert os.sched_getaffinity(0) == before


def test_every_handler_serves_all_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "FAULTS", 512)
    results = bench.measure_faults(rounds=1)
    assert {service.handler for service in results} == {"C", *bench.HANDLERS}
    for service in results:
        assert 0 < service.p50_us <= service.p99_us
