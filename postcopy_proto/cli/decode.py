"""`postcopy decode`: a capture of any channel, or a save file, event by event or counted."""

from __future__ import annotations

import argparse
import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from postcopy_proto.cli import output
from postcopy_proto.cli.arguments import positive
from postcopy_proto.errors import Channel, RemoteProtocolError

if TYPE_CHECKING:
    from postcopy_proto.cli.capture.latency import Index
    from postcopy_proto.cli.capture.order import Consumer
    from postcopy_proto.cli.capture.reading import Capture
    from postcopy_proto.cli.main import Subparsers

AUTO = "auto"
CHANNELS = (Channel.FORWARD, Channel.RETURN, Channel.PREEMPT)


def add_parser(subparsers: Subparsers) -> None:
    """Add this subcommand."""
    parser = subparsers.add_parser(
        "decode",
        help="tell what a capture or a save file holds",
        description="Tell what a capture of a migration or a QEMU save file holds, event by event "
        "or counted. Files packed with xz, gzip, bzip2 or zstd are unpacked.",
    )
    parser.add_argument("file", metavar="FILE", help="capture or save file; - is standard input")
    parser.add_argument(
        "--channel",
        choices=(*map(str, CHANNELS), AUTO),
        default=AUTO,
        help="which channel FILE was recorded from (default: told by its first bytes)",
    )
    parser.add_argument("--pages", action="store_true", help="a line for each page, not each run")
    parser.add_argument("--json", action="store_true", help="JSON; an object a line for events")
    parser.add_argument(
        "--strict", action="store_true", help="refuse messages that are in no table or out of order"
    )
    parser.add_argument("--summary", action="store_true", help="counts instead of events")
    join = parser.add_argument_group(
        "faults", "read both directions and join each request with the page that answered it"
    )
    join.add_argument(
        "--return", dest="return_file", metavar="FILE2", help="the return path of FILE"
    )
    join.add_argument(
        "--preempt", dest="preempt_file", metavar="FILE", help="the preempt channel beside FILE"
    )
    join.add_argument(
        "--index",
        metavar="FILE3",
        help='when the bytes passed: lines [seconds, connection, "F" or "R", offset, length]',
    )
    join.add_argument(
        "--slowest", type=positive, default=10, metavar="N", help="how many to list (default: 10)"
    )
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Decode; 0 when the stream is sound, even if it was cut off."""
    if arguments.return_file is not None:
        return _run_join(arguments)
    if arguments.index is not None or arguments.preempt_file is not None:
        arguments.parser.error("--index and --preempt belong to --return")
    from postcopy_proto.cli.capture.reading import detect_channel, open_capture

    with open_capture(arguments.file, _start(arguments.file)) as capture:
        channel = _channel(arguments.channel) or detect_channel(capture.head)
        if arguments.summary:
            return _summarise(arguments, capture, channel)
        return _list(arguments, capture, channel)


def _start(path: str) -> int:
    """Where in the file QEMU's bytes begin: behind the header of a libvirt save image."""
    from postcopy_proto.cli.capture.saved import libvirt_stream_at

    found = libvirt_stream_at(path) if Path(path).is_file() else None
    if found is None:
        return 0
    start, packing = found
    output.note(f"a libvirt save image ({packing}); QEMU's bytes begin at {start:#x} of the file")
    return start


def _channel(name: str) -> Channel | None:
    return None if name == AUTO else Channel(name)


def _summarise(arguments: argparse.Namespace, capture: Capture, channel: Channel) -> int:
    from postcopy_proto.cli.capture.saved import is_mapped_ram, summarise_mapped_ram
    from postcopy_proto.cli.capture.summary import summary_of

    summary = summary_of(channel)
    total, failure = feed(capture, channel, summary, strict=arguments.strict)
    if is_mapped_ram(failure) and capture.total is not None:
        summary, total, failure = summarise_mapped_ram(arguments.file), capture.total, None
    if arguments.json:
        output.print_json(summary.document(total))
    else:
        summary.show(total)
    return _done(failure)


def _list(arguments: argparse.Namespace, capture: Capture, channel: Channel) -> int:
    from postcopy_proto.cli.capture.listing import JsonPrinter, Listing, TextPrinter
    from postcopy_proto.cli.capture.saved import is_mapped_ram

    printer = JsonPrinter() if arguments.json else TextPrinter()
    listing = Listing(printer, each_page=arguments.pages)
    # A bar would be torn apart by lines on the same terminal.
    bar = not sys.stdout.isatty()
    _, failure = feed(capture, channel, listing, strict=arguments.strict, bar=bar)
    listing.finish()
    if is_mapped_ram(failure) and capture.total is not None:
        output.note("a mapped-ram file: its pages have fixed places; --summary counts them")
        return output.EXIT_DONE
    return _done(failure)


def _run_join(arguments: argparse.Namespace) -> int:
    from postcopy_proto.cli.capture import latency
    from postcopy_proto.cli.capture.reading import open_capture

    index = _read_index(arguments.index)
    requests = latency.Requests()
    failures = []
    with open_capture(arguments.return_file) as capture:
        failures.append(feed(capture, Channel.RETURN, requests, strict=arguments.strict)[1])
    join = latency.Join(requests.requests)
    for path, channel in (
        (arguments.file, Channel.FORWARD),
        (arguments.preempt_file, Channel.PREEMPT),
    ):
        if path is not None:
            join.channel = channel
            with open_capture(path) as capture:
                failures.append(feed(capture, channel, join, strict=arguments.strict)[1])
    join.finish(index)
    document = latency.report(join.requests, arguments.slowest)
    if arguments.json:
        output.print_json(document)
    else:
        latency.show(document)
    return _done(next((failure for failure in failures if failure is not None), None))


def _read_index(path: str | None) -> Index | None:
    from postcopy_proto.cli.capture.latency import Index

    if path is None:
        return None
    with open(path, encoding="utf-8") as lines:
        try:
            return Index(lines)
        except (ValueError, RecursionError) as error:
            raise RemoteProtocolError(
                f"{path} is no index: {error}", channel=Channel.FILE
            ) from None


def _done(failure: RemoteProtocolError | None) -> int:
    """What was read is on stdout by now; what stopped it goes to stderr."""
    if failure is not None:
        raise failure
    return output.EXIT_DONE


def feed(
    capture: Capture, channel: Channel, consumer: Consumer, *, strict: bool, bar: bool = True
) -> tuple[int, RemoteProtocolError | None]:
    """Give every event to a consumer; how many bytes were read, and what was wrong, if anything.

    The consumer may raise RemoteProtocolError too: about what an event holds.
    """
    from postcopy_proto.cli.capture.order import InOrder
    from postcopy_proto.cli.capture.reading import decoder_for

    if strict and channel is Channel.FORWARD:
        consumer = InOrder(consumer)
    decoder = decoder_for(channel, strict=strict)
    total = 0
    with output.progress("decoding", capture.total, enabled=bar) as moved_to:
        try:
            for chunk in chain(capture.chunks(), (b"",)):
                total += len(chunk)
                decoder.receive_data(chunk)
                for event in decoder:
                    consumer.add(decoder.event_offset, event)
                moved_to(capture.position)
        except RemoteProtocolError as error:
            return total, error
    return total, None
