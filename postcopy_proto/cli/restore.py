"""`postcopy restore`: a saved VM runs at a stock QEMU at once, its RAM follows."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postcopy_proto.cli import output
from postcopy_proto.cli.arguments import block_page_size, size
from postcopy_proto.errors import ErrorKind, RemoteProtocolError

if TYPE_CHECKING:
    from types import FrameType

    from postcopy_proto.cli.main import Subparsers
    from postcopy_proto.net.incoming import IncomingQemu
    from postcopy_proto.net.source_loop import SourceStatistics
    from postcopy_proto.net.transport import Address
    from postcopy_proto.savefile import SavedVm


def add_parser(subparsers: Subparsers) -> None:
    """Add `restore`."""
    parser = subparsers.add_parser(
        "restore",
        help="run a saved VM in a stock QEMU at once and deliver its RAM on demand",
        description="FILE is what QEMU wrote (migrate exec:cat>FILE, file:FILE, mapped-ram too), "
        "what libvirt wrote (virsh save), or what postcopy receive wrote. The destination is a "
        "QEMU with the same machine type, devices and memory, started with -incoming defer, "
        "that has the capability postcopy-ram; with --qmp all that is done for you.",
    )
    add_arguments(parser)
    parser.add_argument("--to", metavar="ADDR", help="tcp:HOST:PORT or unix:PATH, where it waits")
    parser.add_argument(
        "--qmp", metavar="PATH", help="its QMP socket: it is told to wait for us, and watched"
    )
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `restore` and `run` have in common."""
    parser.add_argument("file", type=Path, metavar="FILE", help="the saved VM")
    parser.add_argument(
        "--page-size",
        type=block_page_size,
        action="append",
        default=[],
        metavar="BLOCK=SIZE",
        help="a block that is on huge pages at the destination, e.g. m0=2M; may be repeated",
    )
    parser.add_argument(
        "--background-bandwidth",
        type=size,
        metavar="RATE",
        help="bytes a second for pages that nobody asked for; 0: only those asked for, until "
        "interrupted (no limit)",
    )
    parser.add_argument(
        "--drain-after",
        type=float,
        metavar="SECONDS",
        help="with --background-bandwidth 0: send the rest after this time",
    )
    parser.add_argument(
        "--background-order",
        choices=("sequential", "after-request"),
        default="after-request",
        help="go on where it was, or behind the page last asked for (after-request)",
    )
    parser.add_argument(
        "--mode",
        choices=("latency", "throughput"),
        default="latency",
        help="what to favour: the page somebody waits for, or the rest (latency)",
    )
    parser.add_argument(
        "--preempt",
        action="store_true",
        help="a second connection for the pages that the VM waits for (QEMU 7.2 and later)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long the destination may keep us waiting; 0: no limit (60)",
    )
    parser.add_argument(
        "--no-index-cache", action="store_true", help="leave no index beside the save file"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")


def run(args: argparse.Namespace) -> int:
    """Restore one VM."""
    from postcopy_proto.net.incoming import IncomingQemu
    from postcopy_proto.net.qmp import TIMEOUT, Monitor
    from postcopy_proto.net.transport import parse_address

    if args.to is None and args.qmp is None:
        return usage("--to or --qmp is needed: where is the destination?")
    try:
        address = None if args.to is None else parse_address(args.to)
    except ValueError as error:
        return usage(error)
    if args.preempt and args.qmp is None:
        return usage(
            "--preempt needs --qmp, to set the capability postcopy-preempt: without it a "
            "destination may leave the second connection unread, and lose its pages in silence"
        )
    if args.preempt and address is not None and address.kind == "fd":
        return usage("--preempt needs an address that can be connected to twice")
    if (code := check(args)) is not None:
        return code
    with opened(args) as vm:
        if vm is None:
            return output.EXIT_USAGE
        if args.qmp is None:
            deliver(args, vm, address, None)
        else:
            with Monitor(args.qmp, timeout=min(args.timeout or TIMEOUT, TIMEOUT)) as monitor:
                deliver(args, vm, address, IncomingQemu(monitor))
    return output.EXIT_DONE


def usage(problem: object) -> int:
    """Say what is wrong with the arguments."""
    output.error(problem)
    return output.EXIT_USAGE


def check(args: argparse.Namespace) -> int | None:
    """The exit code for options that don't go together, or None."""
    if args.drain_after is not None and args.background_bandwidth != 0:
        return usage("--drain-after needs --background-bandwidth 0: the rest is sent anyway")
    return None


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[SavedVm | None]:
    """The saved VM, or None when --page-size does not fit it, which was said then."""
    from postcopy_proto.savefile import open_saved_vm

    size = args.file.stat().st_size if args.file.is_file() else None
    with output.progress(f"reading {args.file.name}", size) as advance:
        try:
            vm = open_saved_vm(
                args.file,
                page_sizes=dict(args.page_size),
                cache=not args.no_index_cache,
                progress=lambda _, done, total: advance(done),
            )
        except ValueError as error:
            output.error(error)
            vm = None
        except RemoteProtocolError as error:
            error.reason += _advice(error)
            raise
    try:
        yield vm
    finally:
        if vm is not None:
            vm.close()


def _advice(error: RemoteProtocolError) -> str:
    """What to do about a file that is refused, where the reason does not say it."""
    if error.kind is ErrorKind.UNSUPPORTED:
        return ""
    if error.offset == 0:
        return "; QEMU's `migrate exec:cat>FILE` makes a save file, libvirt's `virsh save` another"
    return "; the file is cut short or damaged: copy it again or save the VM again"


def deliver(
    args: argparse.Namespace, vm: SavedVm, address: Address | None, qemu: IncomingQemu | None
) -> None:
    """Restore, with a bar, and print the figures."""
    from postcopy_proto.net.restore import RestoreOptions, restore
    from postcopy_proto.net.transport import TransferMode
    from postcopy_proto.source import BackgroundOrder

    options = RestoreOptions(
        bandwidth=args.background_bandwidth,
        drain_after=args.drain_after,
        order=BackgroundOrder(args.background_order),
        mode=TransferMode[args.mode.upper()],
        preempt=args.preempt,
        silence=args.timeout or None,
    )
    with _bar(vm, not args.json) as show, _first_interrupt(options.bandwidth == 0) as interrupted:
        statistics = restore(
            vm, address, qemu, options=options, on_progress=show, may_drain=interrupted
        )
    if args.json:
        output.print_json(document(statistics))
    else:
        _print(statistics)
    sys.stdout.flush()  # `run` has a VM to wait for before it ends


def document(statistics: SourceStatistics) -> dict[str, Any]:
    """The figures as `--json` prints them."""
    started = statistics.started_at

    def since(moment: float | None) -> float | None:
        return None if moment is None else round(moment - started, 6)

    return {
        "completed": True,
        "seconds_to_package": since(statistics.package_at),
        "seconds_to_first_request": since(statistics.first_request_at),
        "seconds": round(statistics.seconds, 6),
        "pages": statistics.pages,
        "zero_pages": statistics.zero_pages,
        "requests": statistics.requests,
        "request_latency_us": _latency(statistics),
        "bytes": statistics.bytes,
    }


def _latency(statistics: SourceStatistics) -> dict[str, float | None]:
    """From reading a request to handing its page to the kernel."""
    import numpy as np

    if not statistics.request_latency_ns:
        return {"p50": None, "p99": None, "max": None}
    values = np.percentile(np.array(statistics.request_latency_ns), (50, 99, 100)) / 1000
    return {
        name: round(float(value), 1)
        for name, value in zip(("p50", "p99", "max"), values, strict=True)
    }


def _print(statistics: SourceStatistics) -> None:
    figures = document(statistics)
    latency = figures["request_latency_us"]
    first = figures["seconds_to_first_request"]
    rows = [
        ("VM running after", f"{figures['seconds_to_package'] * 1000:,.1f} ms, its state sent"),
        ("first page asked for", "none was" if first is None else f"after {first * 1000:,.1f} ms"),
        ("all of RAM after", f"{figures['seconds']:,.2f} s"),
        (
            "pages",
            f"{figures['pages']:,} with content, {figures['zero_pages']:,} zero pages, "
            f"{figures['requests']:,} requests",
        ),
        ("sent", f"{figures['bytes']:,} bytes"),
    ]
    if latency["p50"] is not None:
        rows.append(
            (
                "request latency",
                "p50 {p50:,.0f} µs, p99 {p99:,.0f} µs, max {max:,.0f} µs (from reading the "
                "request to handing its page to the kernel)".format(**latency),
            )
        )
    output.print_table("postcopy restore", ("", ""), rows)


@contextmanager
def _bar(vm: SavedVm, enabled: bool) -> Iterator[Callable[[SourceStatistics], None] | None]:
    """A bar on stderr, on a terminal: what was asked for, what came in background, what is left."""
    if not (enabled and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("restoring"),
        BarColumn(),
        TextColumn(
            "{task.fields[asked]:,} asked for, {task.fields[background]:,} in background, "
            "{task.fields[left]:,} pages left"
        ),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    total = sum(block.page_count(vm.target_page_size) for block in vm.blocks)
    with bar:
        task = bar.add_task("", total=total, asked=0, background=0, left=total)

        def show(statistics: SourceStatistics) -> None:
            done, asked = statistics.pages + statistics.zero_pages, statistics.requested_pages
            bar.update(
                task, completed=done, asked=asked, background=done - asked, left=total - done
            )

        yield show


@contextmanager
def _first_interrupt(enabled: bool) -> Iterator[Callable[[], bool] | None]:
    """While only requests are answered, Ctrl-C sends the rest; a second one gives up."""
    if not enabled:
        yield None
        return
    seen = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen = True
        signal.signal(signal.SIGINT, before)
        output.note("sending the rest; interrupt again to give up and lose the VM")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, before)
