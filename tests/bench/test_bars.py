"""The table of bars: it reads what the benchmarks print, and tells a met bar from a missed one."""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec

import pytest

from tests.bench import __main__ as bars
from tests.bench import discards
from tests.bench.userfault import Placement, Service


def test_a_bar_is_a_lower_or_an_upper_one() -> None:
    assert bars.Figure("speed", 1.0, 1.0).met
    assert not bars.Figure("speed", 0.99, 1.0).met
    assert bars.Figure("time", 1.0, 1.0, at_most=True).met
    assert not bars.Figure("time", 1.01, 1.0, at_most=True).met


@pytest.mark.parametrize("name", bars.PARTS)
def test_every_part_is_a_benchmark(name: str) -> None:
    assert find_spec(f"tests.bench.{bars.PARTS[name].module}")


def test_what_the_benchmarks_print_is_understood(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [asdict(discards.measure("clustered", 1 << 16, rounds=1))]
    figures = list(bars.discard_figures(rows))
    assert [figure.bar for figure in figures] == [0.9, 16]
    placement = [Placement(piece, *[1.0] * 4, 0.5, 0.8, 0.9) for piece in (4096, 16384, 65536)]
    service = Service("backend", "same CPU", 11.0, 15.0, 1.2, 1.4)
    document = {"placement": map(asdict, placement), "faults": [asdict(service)]}
    figures += bars.userfault_figures(document)
    met = {figure.what: figure.met for figure in figures[2:]}
    assert met == {
        "COPY, 4 KiB, of C": True,
        "COPY, 64 KiB, of C": False,
        "local fault, backend, p50, of C": True,
        "local fault, backend, p99, of C": False,
    }
    restore = {
        "qemu": "7.2",
        "first output, 1024 MiB": {"lazy_ms": 10.0, "full_ms": 200.0, "rss_anon_mib": 30.0},
        "drain, 1024 MiB": {"ratio": 0.9},
        "demand, with preempt": {"ratio": 3.0, "comparable": 0.0},
    }
    found = list(bars.restore_figures(restore))
    assert [figure.met for figure in found] == [True, False, True, True]
    bars.show(figures + found)
    assert "no" in capsys.readouterr().out
