"""`postcopy demo`: the whole protocol on one machine with no VM."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from postcopy_proto.cli import output
from postcopy_proto.cli.arguments import size
from postcopy_proto.cli.faults import print_waits

if TYPE_CHECKING:
    from postcopy_proto.cli.main import Subparsers
    from postcopy_proto.net.demo import DemoProgress, DemoResult


def add_parser(subparsers: Subparsers) -> None:
    """Add `demo`."""
    parser = subparsers.add_parser(
        "demo",
        help="migrate a process's memory on this machine, no VM needed",
        description="Three processes: a source with RAM that goes on being dirtied, a destination "
        "that serves page faults, and a guest that touches its memory while it arrives. "
        "At the end the guest's memory is compared with the source's, byte for byte.",
    )
    parser.add_argument("--size", type=_ram_size, default=256 << 20, help="RAM (256M)")
    parser.add_argument(
        "--dirty", type=_fraction, default=0.3, help="fraction dirty at the switchover (0.3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of contents, dirtying and touches (0)")
    parser.add_argument(
        "--touch", choices=("random", "sequential"), default="random", help="order of the guest"
    )
    parser.add_argument(
        "--mode",
        choices=("latency", "throughput"),
        default="latency",
        help="what to favour: the page somebody waits for, or the rest (latency)",
    )
    parser.add_argument(
        "--qemu",
        nargs="?",
        const="qemu-system-x86_64",
        metavar="QEMU",
        help="with a VM instead: load a saved one in full, restore it lazily, and compare",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo and print what it found."""
    if args.qemu is not None:
        from postcopy_proto.cli import qemu_demo

        return qemu_demo.run(args)
    from postcopy_proto.net.demo import DemoOptions, run_demo
    from postcopy_proto.net.transport import TransferMode

    options = DemoOptions(
        args.size, args.dirty, args.seed, args.touch, TransferMode[args.mode.upper()]
    )
    with _bars(not args.json) as show:
        result = run_demo(options, show)
    if args.json:
        output.print_json(document(result))
    else:
        _print(result)
    return output.EXIT_DONE


def document(result: DemoResult) -> dict[str, Any]:
    """The figures as `--json` prints them."""
    statistics = result.destination
    seconds = statistics.seconds
    return {
        "verified": True,
        "bytes": result.compared_bytes,
        "pages": statistics.pages,
        "zero_pages": statistics.zero_pages,
        "discard_commands": statistics.discard_commands,
        "discard_ranges": statistics.discard_ranges,
        "faults": result.faults.faults,
        "requests": statistics.requests,
        **result.faults.document(),
        "seconds": round(seconds, 6),
        "gigabytes_per_second": round(statistics.bytes / seconds / 1e9, 3),
    }


def _print(result: DemoResult) -> None:
    statistics, faults = result.destination, result.faults
    postcopy = statistics.postcopy_seconds or 0.0
    rows: list[tuple[str, str]] = [
        ("verified", f"{result.compared_bytes:,} bytes, equal to the source's"),
        ("pages", f"{statistics.pages:,} with content, {statistics.zero_pages:,} zero pages"),
        (
            "discards",
            f"{statistics.discard_commands:,} commands with {statistics.discard_ranges:,} ranges",
        ),
        ("faults", f"{faults.faults:,}, for which {statistics.requests:,} pages were requested"),
        (
            "fault latency",
            "p50 {p50:,.0f} µs, p99 {p99:,.0f} µs, max {max:,.0f} µs (from reading the fault to "
            "placing its page)".format(**faults.latency_us()),
        ),
        (
            "whole migration",
            f"{statistics.seconds:.2f} s, {statistics.bytes / statistics.seconds / 1e9:.2f} GB/s",
        ),
        (
            "postcopy phase",
            f"{postcopy * 1000:,.0f} ms, {statistics.postcopy_bytes / (postcopy or 1) / 1e9:.2f}"
            " GB/s",
        ),
        ("this host", f"userfaultfd: {result.probe.mode}"),
    ]
    output.print_table("postcopy demo", ("", ""), rows)
    print_waits(faults)


@contextmanager
def _bars(enabled: bool) -> Iterator[Callable[[DemoProgress], None] | None]:
    """Three bars on stderr, on a terminal: precopy, placed after the switchover, faults."""
    if not (enabled and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    bars = Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        console=Console(stderr=True),
        transient=True,
    )
    with bars:
        precopy = bars.add_task("precopy", unit="pages", total=None)
        background = bars.add_task("background", unit="pages", total=None)
        faults = bars.add_task("faults", unit="requested", total=None)
        placed = bars.add_task("placed", unit="pages", total=None)

        def show(progress: DemoProgress) -> None:
            statistics = progress.destination
            assert statistics is not None
            arrived = statistics.pages + statistics.zero_pages
            after = max(arrived - progress.ram_pages, 0)
            bars.update(precopy, completed=progress.precopy_pages, total=progress.ram_pages)
            bars.update(placed, completed=arrived)
            if progress.dirty_pages:
                bars.update(placed, total=progress.ram_pages + progress.dirty_pages)
                bars.update(faults, completed=statistics.requests, total=progress.dirty_pages)
                bars.update(
                    background,
                    completed=max(after - statistics.requests, 0),
                    total=progress.dirty_pages,
                )

        yield show


def _ram_size(text: str) -> int:
    from postcopy_proto.net.demo import SMALLEST

    value = size(text)
    if value < SMALLEST or value % 4096:
        raise argparse.ArgumentTypeError("at least 1M, a whole number of 4 KiB pages")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError("more than 0 and at most 1")
    return value
