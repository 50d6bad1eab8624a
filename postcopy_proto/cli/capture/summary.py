"""Counting a capture: what `postcopy decode --summary` says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from postcopy_proto import messages as m
from postcopy_proto.cli import output
from postcopy_proto.cli.capture.describe import size_text
from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.ramblock import TARGET_PAGE_SIZE
from postcopy_proto.wire import Limits, parse_package
from postcopy_proto.wire.commands import MigCmd

Document = dict[str, Any]

_IN_DESCRIPTION = f"inside {m.VmDescription.NAME}"


class ForwardSummary:
    """Counts of a forward channel. Only records that arrived whole are counted."""

    def __init__(self) -> None:
        self._machine: str | None = None
        self._ended = "cut"
        self._advised = False
        self._blocks: dict[str, Document] = {}
        self._commands: Counter[str] = Counter()
        self._package: Document | None = None

    @classmethod
    def of_file(cls, machine: str, blocks: dict[str, Document]) -> ForwardSummary:
        """What is known of a whole save file without reading it as a stream."""
        summary = cls()
        summary._machine, summary._blocks, summary._ended = machine, blocks, "eof"
        return summary

    def add(self, offset: int, message: m.Message) -> None:
        """Count one event."""
        name = command_name(message)
        if name is not None:
            self._commands[name] += 1
        match message:
            case m.Configuration(machine):
                self._machine = machine
            case m.PostcopyAdvise(summary):
                self._advised = summary is not None
            case m.RamBlockList(blocks):
                for entry in blocks:
                    self._add_block(entry)
            case m.Pages():
                count_pages(self._block(message.block), message)
            case m.XbzrlePage(block) | m.CompressedPage(block):
                self._block(block)["pages"] += 1
            case m.PostcopyRamDiscard(block, ranges):
                counts = self._block(block)
                counts["discard_ranges"] += len(ranges)
                counts["discarded_bytes"] += sum(length for _, length in ranges)
            case m.Packaged(payload):
                self._add_package(payload)
            case m.Eof():
                self._ended = "eof"
            case m.EndOfStream(detail=detail) if detail.startswith(_IN_DESCRIPTION):
                self._ended = "eof"  # which precedes the description that broke off
            case _:
                pass

    def _block(self, name: str) -> Document:
        check_blocks(self._blocks, name)
        return self._blocks.setdefault(
            name, {"pages": 0, "zero_pages": 0, "discard_ranges": 0, "discarded_bytes": 0}
        )

    def _add_block(self, entry: m.RamBlockEntry) -> None:
        said: Document = {"length": entry.used_length}
        if entry.page_size is not None:
            said["page_size"] = entry.page_size
        elif self._advised:
            # With postcopy advised, a block without the field is on base pages.
            said["page_size"] = TARGET_PAGE_SIZE
        self._blocks[entry.idstr] = said | self._block(entry.idstr)

    def _add_package(self, payload: bytes) -> None:
        commands: Counter[str] = Counter()
        self._package = {"bytes": len(payload), "commands": commands}
        for item in parse_package(payload):
            if (name := command_name(item)) is not None:
                commands[name] += 1

    def document(self, total: int) -> Document:
        """The counts of a stream of `total` bytes."""
        return {
            "channel": str(Channel.FORWARD),
            "bytes": total,
            "ended": self._ended,
            "machine": self._machine,
            "blocks": self._blocks,
            "commands": self._commands,
            "package": self._package,
        }

    def show(self, total: int) -> None:
        """The same as tables."""
        ended = "ended by EOF" if self._ended == "eof" else "cut off before its EOF"
        machine = f", machine {self._machine}" if self._machine is not None else ""
        output.print_line(f"forward channel, {total:,} bytes, {ended}{machine}")
        output.print_table(
            "RAM",
            ("block", "length", "host page", "pages", "zero pages", "discards", "discarded"),
            (
                (
                    name,
                    size_text(b["length"]) if "length" in b else "",
                    size_text(b["page_size"]) if "page_size" in b else "",
                    f"{b['pages']:,}",
                    f"{b['zero_pages']:,}",
                    f"{b['discard_ranges']:,}",
                    size_text(b["discarded_bytes"]),
                )
                for name, b in self._blocks.items()
            ),
            right=range(1, 7),
        )
        rows = [(name, f"{count:,}") for name, count in self._commands.items()]
        if self._package is not None:
            inside = self._package["commands"].items()
            rows += [(f"  in the package: {name}", f"{count:,}") for name, count in inside]
        if rows:
            output.print_table("Commands", ("command", "count"), rows, right=(1,))
        if self._package is not None:
            output.print_line(f"package of {self._package['bytes']:,} bytes")


class ReturnSummary:
    """Counts of a return path."""

    def __init__(self) -> None:
        self._messages: Counter[str] = Counter()
        self._requests: Counter[str] = Counter()
        self._block: str | None = None
        self._shut_status: int | None = None

    def add(self, offset: int, message: m.Message) -> None:
        """Count one event."""
        if isinstance(message, m.EndOfStream):
            return
        self._messages[message.NAME] += 1
        match message:
            case m.ReqPagesId(block=block):
                check_blocks(self._requests, block)
                self._block = block
                self._requests[block] += 1
            case m.ReqPages() if self._block is not None:
                self._requests[self._block] += 1
            case m.Shut(status):
                self._shut_status = status
            case _:
                pass

    def document(self, total: int) -> Document:
        """The counts of a stream of `total` bytes."""
        return {
            "channel": str(Channel.RETURN),
            "bytes": total,
            "messages": self._messages,
            "requests": self._requests,
            "shut_status": self._shut_status,
        }

    def show(self, total: int) -> None:
        """The same as tables."""
        shut = "no SHUT" if self._shut_status is None else f"SHUT {self._shut_status}"
        output.print_line(f"return path, {total:,} bytes, {shut}")
        for title, column, counts in (
            ("Messages", "message", self._messages),
            ("Requests", "block", self._requests),
        ):
            rows = [(name, f"{count:,}") for name, count in counts.items()]
            if rows:
                output.print_table(title, (column, "count"), rows, right=(1,))


class PreemptSummary:
    """Counts of a preempt channel."""

    def __init__(self) -> None:
        self._blocks: dict[str, Document] = {}

    def add(self, offset: int, message: m.Message) -> None:
        """Count one event."""
        if isinstance(message, m.Pages):
            check_blocks(self._blocks, message.block)
            counts = self._blocks.setdefault(message.block, {"pages": 0, "zero_pages": 0})
            count_pages(counts, message)

    def document(self, total: int) -> Document:
        """The counts of a stream of `total` bytes."""
        return {"channel": str(Channel.PREEMPT), "bytes": total, "blocks": self._blocks}

    def show(self, total: int) -> None:
        """The same as a table."""
        output.print_line(f"preempt channel, {total:,} bytes")
        output.print_table(
            "RAM",
            ("block", "pages", "zero pages"),
            (
                (name, f"{counts['pages']:,}", f"{counts['zero_pages']:,}")
                for name, counts in self._blocks.items()
            ),
            right=(1, 2),
        )


Summary = ForwardSummary | ReturnSummary | PreemptSummary


def summary_of(channel: Channel) -> Summary:
    """An empty summary of a channel."""
    if channel is Channel.RETURN:
        return ReturnSummary()
    return PreemptSummary() if channel is Channel.PREEMPT else ForwardSummary()


def command_name(message: m.Message) -> str | None:
    """QEMU's name of a command without prefix, or an unknown one's number; None for others."""
    if isinstance(message, m.UnknownCommand):
        return f"{message.command:#x}"
    return message.NAME if message.NAME in MigCmd.__members__ else None


def check_blocks(blocks: Mapping[str, object], name: str) -> None:
    """RemoteProtocolError when one block more would be more than any VM has: names need memory."""
    if name not in blocks and len(blocks) >= Limits().blocks:
        raise RemoteProtocolError(
            f"more than {Limits().blocks} RAMBlocks are named", kind=ErrorKind.LIMIT
        )


def count_pages(counts: Document, pages: m.Pages) -> None:
    """Add a batch to a block's counts."""
    zero = int(pages.zero.sum())
    counts["zero_pages"] += zero
    counts["pages"] += len(pages) - zero
