"""How the cost of the discard phase grows with the guest: 2^20 to 2^32 pages, 4 GiB to 16 TiB.

    python -m tests.bench.discard_growth                    the table, as Markdown
    python -m tests.bench.discard_growth --svg FILE         and a plot
    python -m tests.bench.discard_growth --powers 20 24     a smaller range

Times are the shortest of some runs, of one up from 2^30 pages. Large bitmaps repeat one of 2^24
pages.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.bench.discards import SHAPES, ours, peak_of, reference

TILE_PAGES = 1 << 24
DRAWN = ("clean", "0.1 %", "10 %", "50 %")
COLOURS = ("#888888", "#1b7837", "#2166ac", "#b2182b")
WIDTH, HEIGHT, MARGIN = 640, 400, 60


@dataclass(frozen=True)
class Point:
    shape: str
    power: int
    ours_ms: float
    swapped_ms: float
    peak_bytes: int


def shortest_ms(call: Callable[[], int], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def measure(shape: str, power: int) -> Point:
    pages = 1 << power
    bitmap = SHAPES[shape](min(pages, TILE_PAGES))
    bitmap = np.tile(bitmap, max(1, pages // TILE_PAGES))
    rounds = 1 if power >= 30 else 3
    peak = peak_of(lambda: ours(bitmap, pages)) if power <= 28 else 0
    return Point(
        shape,
        power,
        shortest_ms(lambda: ours(bitmap, pages), rounds),
        shortest_ms(lambda: reference(bitmap, pages, swapped=True), rounds),
        peak,
    )


def markdown(points: list[Point]) -> str:
    lines = [
        "| pages | guest | " + " | ".join(f"{s}: ours / C swapped, ms" for s in DRAWN) + " |",
        "|---|---|" + "---|" * len(DRAWN),
    ]
    for power in sorted({point.power for point in points}):
        row = {point.shape: point for point in points if point.power == power}
        cells = [f"{row[shape].ours_ms:,.2f} / {row[shape].swapped_ms:,.2f}" for shape in DRAWN]
        size = 1 << (power + 12 - 30)
        guest = f"{size} GiB" if size < 1024 else f"{size // 1024} TiB"
        lines.append(f"| 2^{power} | {guest} | {' | '.join(cells)} |")
    peak = max(point.peak_bytes for point in points)
    lines += [
        "",
        f"Most memory besides the bitmap, up to 2^28 pages: {peak / 2**20:.1f} MiB.",
    ]
    return "\n".join(lines)


def svg(points: list[Point]) -> str:
    """Both axes logarithmic; full lines are ours, dashed ones C's."""
    powers = [point.power for point in points]
    low, high = min(powers), max(powers)
    exponents = range(-3, 6)

    def x(power: int) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * (power - low) / max(1, high - low)

    def y(milliseconds: float) -> float:
        share = (np.log10(milliseconds) - exponents[0]) / (exponents[-1] - exponents[0])
        return HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * float(share)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{WIDTH / 2}" y="20" text-anchor="middle" font-size="14">'
        "Discard phase: time by pages of the guest (dashed: C, byte-swapped stores)</text>",
    ]
    for exponent in exponents:
        height = y(10.0**exponent)
        parts.append(
            f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{height:.1f}" y2="{height:.1f}" '
            f'stroke="#dddddd"/><text x="{MARGIN - 6}" y="{height + 4:.1f}" '
            f'text-anchor="end">{10.0**exponent:g} ms</text>'
        )
    for power in sorted(set(powers)):
        parts.append(
            f'<text x="{x(power):.1f}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">'
            f"2^{power}</text>"
        )
    for shape, colour in zip(DRAWN, COLOURS, strict=True):
        line = sorted((p for p in points if p.shape == shape), key=lambda point: point.power)
        for attribute, dash in (("ours_ms", ""), ("swapped_ms", ' stroke-dasharray="4 3"')):
            path = " ".join(f"{x(p.power):.1f},{y(getattr(p, attribute)):.1f}" for p in line)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" '
                f'stroke-width="1.5"{dash}/>'
            )
        parts.append(
            f'<text x="{WIDTH - MARGIN + 4}" y="{y(line[-1].ours_ms) + 4:.1f}" '
            f'fill="{colour}">{shape}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--powers", type=int, nargs=2, default=(20, 32), metavar="POWER")
    parser.add_argument("--svg", type=Path, help="also draw the plot into this file")
    options = parser.parse_args()
    first, last = options.powers
    points = [measure(shape, power) for power in range(first, last + 1, 2) for shape in DRAWN]
    print(markdown(points))
    if options.svg:
        options.svg.write_text(svg(points))


if __name__ == "__main__":
    main()
