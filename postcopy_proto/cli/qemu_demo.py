"""`postcopy demo --qemu`: two time lines, of an ordinary load and of a lazy restore."""

from __future__ import annotations

import argparse
import shutil
from typing import TYPE_CHECKING, Any

from postcopy_proto.cli import output
from postcopy_proto.errors import HostUnsupportedError

if TYPE_CHECKING:
    from postcopy_proto.net.qemu_demo import Load, QemuDemoResult

WIDTH = 60
"""characters of the longer time line"""


def run(args: argparse.Namespace) -> int:
    """Run the demo and print what it found."""
    from postcopy_proto.net.qemu_demo import LARGEST, SMALLEST, QemuDemo

    qemu = shutil.which(args.qemu)
    if qemu is None:
        raise HostUnsupportedError([f"{args.qemu} is not installed; --qemu takes a path, too"])
    if not SMALLEST <= args.size <= LARGEST or args.size % (1 << 20):
        output.error(f"--size with --qemu: whole MiB from {SMALLEST >> 20}M to {LARGEST >> 30}G")
        return output.EXIT_USAGE
    result = QemuDemo(qemu, args.size, output.note).run()
    if args.json:
        output.print_json(document(result))
    else:
        _print(result)
    return output.EXIT_DONE


def document(result: QemuDemoResult) -> dict[str, Any]:
    """The figures as `--json` prints them."""
    return {
        "verified": True,
        "bytes": result.compared_bytes,
        "ram": result.ram,
        "file_bytes": result.file_size,
        "index_seconds": round(result.index_seconds, 6),
        "full": _load(result.full),
        "lazy": _load(result.lazy) | {"requests": result.statistics.requests},
        "ratio": round(result.ratio, 1),
    }


def _load(load: Load) -> dict[str, Any]:
    return {
        "seconds_to_first_output": round(load.first_output, 6),
        "seconds": round(load.complete, 6),
    }


def _print(result: QemuDemoResult) -> None:
    longest = max(result.full.complete, result.lazy.complete)
    rows = [
        (
            name,
            _line(load, longest),
            f"{load.first_output * 1000:,.0f} ms",
            f"{load.complete:,.2f} s",
        )
        for name, load in (("in full", result.full), ("lazily", result.lazy))
    ]
    output.print_table(
        f"A saved VM of {result.ram >> 20} MiB, brought back",
        ("", "░ waiting  █ running while RAM arrives", "first output", "all of RAM"),
        rows,
        right=(2, 3),
    )
    output.print_table(
        "What was checked and found",
        ("", ""),
        [
            ("sooner", f"{result.ratio:,.0f} times"),
            ("verified", f"{result.compared_bytes:,} bytes of memory; the output is unbroken"),
            ("asked for", f"{result.statistics.requests:,} times by the guest"),
            ("indexing", f"{result.index_seconds:.2f} s, once a file"),
        ],
    )


def _line(load: Load, longest: float) -> str:
    waiting = max(1, round(load.first_output / longest * WIDTH))
    running = round(max(0.0, load.complete - load.first_output) / longest * WIDTH)
    return "░" * waiting + "█" * running
