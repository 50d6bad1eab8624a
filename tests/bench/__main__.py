"""How we stand against C, against construct and against QEMU: every bar, in one run.

    python -m tests.bench               a table; exit 1 when a bar is missed
    python -m tests.bench --json        for machines
    python -m tests.bench wire faults   some parts only

Each part is a benchmark of its own (`python -m tests.bench.NAME`), which has more to say; what it
prints by --json is measured here against its bars. Parts that need a stock QEMU are left out
where there is none. It takes some four minutes, and means something only on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.interop.qemu import binaries


@dataclass(frozen=True)
class Figure:
    """One measured value and its bar."""

    what: str
    value: float
    bar: float
    at_most: bool = False
    """whether the bar is an upper one"""

    @property
    def met(self) -> bool:
        return self.value <= self.bar if self.at_most else self.value >= self.bar


Document = Any


def discard_figures(rows: Document) -> Iterator[Figure]:
    """Bytewise C's time / ours."""
    bars = {"clean": 1.0, "dirty": 1.0, "0.1 %": 0.9, "clustered": 0.9}
    for row in rows:
        bar = bars.get(row["shape"], 2.0)
        yield Figure(f"discards, {row['shape']}: C's time / ours", row["bytewise_ratio"], bar)
    peak = max(row["peak_bytes"] for row in rows) / (1 << 20)
    yield Figure("discards: memory beside bitmap and output, MiB", peak, 16, at_most=True)


def wire_figures(rows: Document) -> Iterator[Figure]:
    by_name = {row["what"]: row for row in rows}
    for name in ("decode_requests, the codec itself", "encode REQ_PAGES"):
        yield Figure(f"{name}: times construct", by_name[name]["times_construct"], 40)
    for name, bar in (("contiguous", 4.0), ("mix of 50 % zero", 1.5)):
        speed = by_name[f"decode pages, {name}, 1 MiB"]["gigabytes_per_second"]
        yield Figure(f"decode pages, {name}, GB/s", speed, bar)


def userfault_figures(document: Document) -> Iterator[Figure]:
    for row in document["placement"]:
        piece = row["piece"]
        if piece == 4096:
            yield Figure("COPY, 4 KiB, of C", row["each_ratio"], 0.7)
        elif piece >= 65536:
            best = max(row["copy_ratio"], row["each_ratio"])
            yield Figure(f"COPY, {piece >> 10} KiB, of C", best, 0.95)
    for row in document["faults"]:
        if row["cpus"] == "same CPU" and row["handler"] in ("descriptor", "backend"):
            for which in ("p50", "p99"):
                name = f"local fault, {row['handler']}, {which}, of C"
                yield Figure(name, row[f"{which}_ratio"], 1.3, at_most=True)


def latency_figures(document: Document) -> Iterator[Figure]:
    ratio = document["ratio"]
    yield Figure("fault under a push, p50, of idle", ratio["p50_us"], 2.5, at_most=True)
    yield Figure("fault under a push, p99, of idle", ratio["p99_us"], 4.0, at_most=True)
    yield Figure("the push meanwhile, GB/s", document["push"], 0.6)


def transfer_figures(document: Document) -> Iterator[Figure]:
    yield Figure("1 GiB end to end, of C as QEMU does it", document["ratio"]["throughput"], 1.5)


def receive_figures(document: Document) -> Iterator[Figure]:
    yield Figure("receive, of a stock destination", document["receive_to_stock"], 0.8)


def restore_figures(document: Document) -> Iterator[Figure]:
    for name, row in document.items():
        if name == "qemu":
            continue
        if name.startswith("first output"):
            yield Figure(f"restore, {name}, ms", row["lazy_ms"], 60, at_most=True)
            if "1024" in name:
                ratio = row["full_ms"] / row["lazy_ms"]
                yield Figure(f"restore, {name}, full load / lazy", ratio, 25)
            rss = row["rss_anon_mib"]
            yield Figure(f"restore, {name}: memory, MiB", rss, 150, at_most=True)
        elif name.startswith("drain"):
            yield Figure(f"restore, {name}, of a stock source", row["ratio"], 0.8)
        elif name.startswith("demand") and row["comparable"]:
            yield Figure(f"restore, {name}, of a stock source", row["ratio"], 2.0, at_most=True)


@dataclass(frozen=True)
class Part:
    """A benchmark, the options it is run with, and what its document says."""

    module: str
    figures: Callable[[Document], Iterator[Figure]]
    options: tuple[str, ...] = ("--json",)
    needs_qemu: bool = False


PARTS = {
    "discards": Part("discards", discard_figures),
    "wire": Part("wire", wire_figures),
    "faults": Part("userfault", userfault_figures),
    "latency": Part("fault_latency", latency_figures, ("--json", "--pin", "--rounds", "5")),
    "transfer": Part("end_to_end", transfer_figures, ("--json", "--pairs", "7")),
    "receive": Part("receive", receive_figures, needs_qemu=True),
    "restore": Part("restore", restore_figures, (), needs_qemu=True),
}


def measure(part: Part) -> list[Figure]:
    """Run it in a process of its own: nothing of the last one is left in memory."""
    command = [sys.executable, "-m", f"tests.bench.{part.module}", *part.options]
    found = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return list(part.figures(json.loads(found.stdout)))


def show(figures: list[Figure]) -> None:
    table = Table(title="bars")
    table.add_column("figure")
    for column in ("measured", "bar"):
        table.add_column(column, justify="right")
    table.add_column("")
    for figure in figures:
        sign = "≤" if figure.at_most else "≥"
        table.add_row(
            figure.what, f"{figure.value:.2f}", f"{sign} {figure.bar:g}", "" if figure.met else "no"
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all)")
    parser.add_argument("--json", action="store_true", help="one document on stdout")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part is called {', '.join(sorted(unknown))}")
    figures: list[Figure] = []
    for name in options.parts or PARTS:
        if PARTS[name].needs_qemu and not binaries():
            print(f"{name}: left out, it needs a stock QEMU and nasm", file=sys.stderr)
            continue
        print(f"{name} …", file=sys.stderr)
        figures += measure(PARTS[name])
    if options.json:
        told = [{**asdict(figure), "met": figure.met} for figure in figures]
        json.dump({"cpus": os.cpu_count(), "figures": told}, sys.stdout, indent=2)
    else:
        show(figures)
    return 0 if all(figure.met for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
