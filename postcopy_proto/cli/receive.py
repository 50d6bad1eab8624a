"""`postcopy receive`: a postcopy destination for a stock QEMU, which writes a save file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postcopy_proto.cli import output
from postcopy_proto.cli.arguments import block_page_size
from postcopy_proto.cli.faults import print_waits

if TYPE_CHECKING:
    from postcopy_proto.cli.main import Subparsers
    from postcopy_proto.destination import DestinationConnection
    from postcopy_proto.net.destination_loop import DestinationStatistics
    from postcopy_proto.net.target import FileTarget, GuestTarget


def add_parser(subparsers: Subparsers) -> None:
    """Add `receive`."""
    parser = subparsers.add_parser(
        "receive",
        help="take a stock QEMU's migration into a save file that stock QEMU loads",
        description="At the source: migrate_set_capability postcopy-ram on, migrate -d ADDR, "
        "migrate_start_postcopy. Without the last one it is an ordinary migration, and is "
        "completed too. Load the file with -incoming 'exec:cat FILE'.",
    )
    parser.add_argument(
        "--listen",
        required=True,
        metavar="ADDR",
        help="tcp:HOST:PORT (port 0 picks one), unix:PATH or fd:N",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the save file")
    parser.add_argument(
        "--touch",
        type=_count,
        default=0,
        metavar="N",
        help="let a process own the RAM as well and touch N missing pages while the rest arrives",
    )
    parser.add_argument("--seed", type=int, help="which pages --touch picks (random)")
    parser.add_argument(
        "--page-size",
        type=block_page_size,
        action="append",
        default=[],
        metavar="BLOCK=SIZE",
        help="a block that is on huge pages at the source, e.g. m0=2M; may be repeated",
    )
    parser.add_argument(
        "--mode",
        choices=("latency", "throughput"),
        help="what to favour (latency with --touch, else throughput)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long the source may be silent once it has connected; 0: no limit (60)",
    )
    parser.add_argument(
        "--wait",
        type=float,
        metavar="SECONDS",
        help="how long to wait for the source to connect (no limit)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Receive one migration."""
    from postcopy_proto.destination import DestinationConnection
    from postcopy_proto.net.destination_loop import DestinationLoop
    from postcopy_proto.net.target import FileTarget, GuestTarget, random_missing_pages
    from postcopy_proto.net.transport import Listener, TransferMode, parse_address
    from postcopy_proto.userfault.descriptor import Userfaultfd

    try:
        address = parse_address(args.listen)
    except ValueError as error:
        output.error(error)
        return output.EXIT_USAGE
    guest = GuestTarget(random_missing_pages(args.touch, args.seed)) if args.touch else None
    target = FileTarget(args.output, guest)
    connection = DestinationConnection(page_sizes=dict(args.page_size))
    if guest is not None:
        # Before any source comes: one that has switched over can't take its VM back.
        Userfaultfd.open(user_mode_only=None).close()
    mode = TransferMode[(args.mode or ("latency" if args.touch else "throughput")).upper()]
    try:
        with Listener(address) as listener, _bar(connection) as show:
            output.note(f"listening on {listener.address}")
            statistics = DestinationLoop(
                listener,
                connection,
                target,
                mode=mode,
                silence=args.timeout or None,
                accept_timeout=args.wait,
                on_progress=show,
            ).run()
        target.verify()
    finally:
        target.close()
    if args.json:
        output.print_json(document(target, connection, statistics, guest))
    else:
        _print(target, connection, statistics, guest)
    return output.EXIT_DONE


def document(
    target: FileTarget,
    connection: DestinationConnection,
    statistics: DestinationStatistics,
    guest: GuestTarget | None,
) -> dict[str, Any]:
    """The figures as `--json` prints them."""
    figures: dict[str, Any] = {
        "completed": True,
        "machine": _machine(connection),
        "blocks": _blocks(target, connection),
        "discard_commands": statistics.discard_commands,
        "discard_ranges": statistics.discard_ranges,
        "switched_over": statistics.listen_at is not None,
        "requests": statistics.requests,
        "duplicates": connection.duplicates,
        "bytes": statistics.bytes,
        "seconds": round(statistics.seconds, 6),
    }
    if statistics.postcopy_seconds is not None:
        figures["postcopy"] = {
            "bytes": statistics.postcopy_bytes,
            "seconds": round(statistics.postcopy_seconds, 6),
        }
    if guest is not None and guest.touch is not None:
        figures["touched"] = len(guest.touch)
        figures["faults"] = guest.statistics.faults
        figures |= guest.statistics.document()
    return figures


def _machine(connection: DestinationConnection) -> str | None:
    return connection.configuration.machine if connection.configuration else None


def _blocks(target: FileTarget, connection: DestinationConnection) -> Mapping[str, dict[str, int]]:
    return {
        name: {
            "length": block.used_length,
            "page_size": block.page_size,
            "pages": target.sink.pages[name],
            "zero_pages": target.sink.zero_pages[name],
        }
        for name, block in connection.blocks.items()
    }


def _print(
    target: FileTarget,
    connection: DestinationConnection,
    statistics: DestinationStatistics,
    guest: GuestTarget | None,
) -> None:
    rows = [
        (name, f"{b['length']:,}", f"{b['page_size']:,}", f"{b['pages']:,}", f"{b['zero_pages']:,}")
        for name, b in _blocks(target, connection).items()
    ]
    columns = ("RAMBlock", "bytes", "host page", "pages", "zero pages")
    output.print_table(f"received: {_machine(connection)}", columns, rows, right=(1, 2, 3, 4))
    seconds = statistics.seconds
    lines = [f"{statistics.bytes:,} bytes in {seconds:.2f} s"]
    if statistics.postcopy_seconds is None:
        lines.append("the source never switched over: completed as precopy")
    else:
        lines.append(
            f"postcopy phase: {statistics.postcopy_bytes:,} bytes in "
            f"{statistics.postcopy_seconds:.3f} s; {statistics.discard_ranges:,} ranges discarded"
        )
    if guest is not None and guest.touch is not None:
        faults = guest.statistics
        lines.append(
            f"{len(guest.touch):,} pages touched, {faults.faults:,} faults, "
            f"{statistics.requests:,} requests; latency "
            + "p50 {p50:,.0f} µs, p99 {p99:,.0f} µs, max {max:,.0f} µs".format(
                **faults.latency_us()
            )
        )
        lines.append("what the process sees is what the file holds")
    sys.stdout.write("\n".join(lines) + "\n")
    if guest is not None and guest.touch is not None:
        print_waits(guest.statistics)


@contextmanager
def _bar(
    connection: DestinationConnection,
) -> Iterator[Callable[[DestinationStatistics], None] | None]:
    """Bytes received, on a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    with output.progress("receiving", None) as move:
        yield lambda statistics: move(statistics.bytes)


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("not a negative number")
    return value
