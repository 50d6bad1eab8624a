"""Joining both directions: which page answered which request, and how long it took.

A request counts as answered when the last page record of its host page has passed. Times come
from an index of the capture, one JSON array a line: `[seconds, connection, "F" or "R", offset in
that direction's file, length]` for each piece that passed; connection 0 is the main one, 1 the
preempt channel. Lines of another form (connections opened or closed) are skipped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from postcopy_proto import messages as m
from postcopy_proto.cli import output
from postcopy_proto.cli.capture.listing import record_ends
from postcopy_proto.errors import Channel, RemoteProtocolError

_CONNECTIONS = {Channel.FORWARD: (0, "F"), Channel.RETURN: (0, "R"), Channel.PREEMPT: (1, "F")}
_NEVER = -1


class Index:
    """When the bytes of a capture passed. ValueError when a line is not JSON."""

    def __init__(self, lines: Iterable[str]) -> None:
        pieces: dict[tuple[int, str], list[tuple[int, float]]] = {}
        for line in lines:
            match json.loads(line):
                case [float() | int() as seconds, int() as connection, "F" | "R" as direction, *at]:
                    match at:
                        case [int() as offset, int() as length]:
                            ends = pieces.setdefault((connection, direction), [])
                            ends.append((offset + length, float(seconds)))
                        case _:
                            pass
                case _:
                    pass
        self._ends = {
            key: (np.array([end for end, _ in ends]), np.array([when for _, when in ends]))
            for key, ends in pieces.items()
        }

    def time_of(self, channel: Channel, end: int) -> float | None:
        """Seconds at which the byte before `end` had passed; None if the index doesn't say."""
        ends, times = self._ends.get(_CONNECTIONS[channel], (np.empty(0), np.empty(0)))
        piece = int(np.searchsorted(ends, end))
        return float(times[piece]) if piece < len(times) else None


@dataclass(slots=True)
class Request:
    """One request and what became of it."""

    block: str
    start: int
    """byte offset in the block"""
    length: int
    """bytes"""
    end: int
    """where its message ends on the return path"""
    channel: Channel | None = None
    """on which the page came; None when it never did"""
    answer_end: int = _NEVER
    """where its last record ends on that channel"""
    latency: float | None = None
    """seconds between the two; None when the times aren't known or the page went before"""
    early: bool = False
    """whether the page had passed before the request did"""


class Requests:
    """Collects the requests of a return path, in order."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._block: str | None = None
        self._last: m.Message | None = None

    def add(self, offset: int, message: m.Message) -> None:
        """Take one event of the return path."""
        match message:
            case m.ReqPagesId(start, length, block):
                self._block = block
                end = offset + 17 + len(block.encode("utf-8", "surrogateescape"))
                self.requests.append(Request(block, start, length, end))
            case m.ReqPages(start, length):
                if self._block is None:
                    raise RemoteProtocolError(
                        "no block was named before",
                        channel=Channel.RETURN,
                        offset=offset,
                        message=message.NAME,
                    )
                self.requests.append(Request(self._block, start, length, offset + 16))
            case _:
                pass


class _Wanted:
    """The ranges asked for in one block, and where the last record in each ended."""

    def __init__(self, requests: list[Request]) -> None:
        lengths: dict[int, int] = {}
        for request in requests:
            lengths[request.start] = max(lengths.get(request.start, 0), request.length)
        self.starts = np.array(sorted(lengths), np.uint64)
        self.lengths = np.array([lengths[int(start)] for start in self.starts], np.uint64)
        self.ends = np.full(len(self.starts), _NEVER, np.int64)
        self.channels: list[Channel | None] = [None] * len(self.starts)

    def see(self, channel: Channel, offset: int, pages: m.Pages) -> None:
        """Note the records of a batch that answer a request."""
        index = np.searchsorted(self.starts, pages.offsets, side="right") - 1
        inside = np.flatnonzero(
            (index >= 0) & (pages.offsets - self.starts[index] < self.lengths[index])
        )
        if len(inside):
            ends = offset + record_ends(pages)[1:][inside]
            self.ends[index[inside]] = ends  # in stream order: the last one stays
            for number in np.unique(index[inside]).tolist():
                self.channels[number] = channel


class Join:
    """Looks for the answers to requests in the forward and the preempt channel."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests
        by_block: dict[str, list[Request]] = {}
        for request in requests:
            by_block.setdefault(request.block, []).append(request)
        self._wanted = {block: _Wanted(wanted) for block, wanted in by_block.items()}
        self._postcopy = False
        self.channel = Channel.FORWARD

    def add(self, offset: int, message: m.Message) -> None:
        """Take one event of the channel that `channel` names."""
        if isinstance(message, m.Packaged | m.PostcopyResume):
            self._postcopy = True  # pages before were no answers
        elif isinstance(message, m.Pages) and self._postcopy:
            wanted = self._wanted.get(message.block)
            if wanted is not None:
                wanted.see(self.channel, offset, message)

    def finish(self, index: Index | None) -> None:
        """Fill in what was found, with latencies as far as the index goes."""
        for request in self.requests:
            wanted = self._wanted[request.block]
            number = int(np.searchsorted(wanted.starts, request.start))
            request.channel = wanted.channels[number]
            request.answer_end = int(wanted.ends[number])
            if index is None or request.channel is None:
                continue
            asked = index.time_of(Channel.RETURN, request.end)
            answered = index.time_of(request.channel, request.answer_end)
            if asked is not None and answered is not None:
                request.early = answered < asked
                request.latency = None if request.early else answered - asked


def report(requests: list[Request], slowest: int) -> dict[str, Any]:
    """What the join found, as a document; latencies in microseconds."""
    answered = [request for request in requests if request.channel is not None]
    timed = [request for request in requests if request.latency is not None]
    timed.sort(key=lambda request: request.latency or 0.0, reverse=True)
    micros = np.array([request.latency for request in timed], np.float64) * 1e6
    return {
        "requests": len(requests),
        "answered": len(answered),
        "before_the_request": sum(request.early for request in requests),
        "unanswered": len(requests) - len(answered),
        "channels": Counter(str(request.channel) for request in answered),
        "latency_us": _quantiles(micros),
        "histogram": _histogram(micros),
        "slowest": [_row(request) for request in timed[:slowest]],
    }


def _quantiles(micros: NDArray[np.float64]) -> dict[str, float] | None:
    if not len(micros):
        return None
    values = np.percentile(micros, [0, 50, 90, 99, 100])
    names = ("min", "p50", "p90", "p99", "max")
    figures = {name: round(float(value), 1) for name, value in zip(names, values, strict=True)}
    return figures | {"mean": round(float(micros.mean()), 1)}


def _histogram(micros: NDArray[np.float64]) -> list[dict[str, int]]:
    """Counts by powers of two of microseconds, without the empty ones at both ends."""
    if not len(micros):
        return []
    classes = np.ceil(np.log2(np.maximum(micros, 1))).astype(int)
    counts = np.bincount(classes - classes.min())
    first = int(classes.min())
    return [
        {"up_to_us": 1 << (first + number), "count": int(count)}
        for number, count in enumerate(counts)
    ]


def _row(request: Request) -> dict[str, Any]:
    return {
        "block": request.block,
        "start": request.start,
        "length": request.length,
        "latency_us": round((request.latency or 0.0) * 1e6, 1),
        "channel": str(request.channel),
        "request_end": request.end,
        "answer_end": request.answer_end,
    }


def show(document: dict[str, Any]) -> None:
    """The document as tables."""
    early = document["before_the_request"]
    output.print_line(
        f"{document['requests']:,} requests: {document['answered']:,} answered, "
        f"{document['unanswered']:,} never"
        + (f"; {early:,} answers were on their way before the request" if early else "")
    )
    if document["latency_us"] is None:
        output.print_line("no latencies: give the capture's times with --index")
        return
    figures = document["latency_us"]
    output.print_line("latency, us: " + ", ".join(f"{key} {figures[key]:,}" for key in figures))
    output.print_table(
        "Slowest",
        ("block", "page", "bytes", "latency, us", "channel", "request ends at", "answer ends at"),
        (
            (
                row["block"],
                f"{row['start']:#x}",
                f"{row['length']:,}",
                f"{row['latency_us']:,.0f}",
                row["channel"],
                f"{row['request_end']:#x}",
                f"{row['answer_end']:#x}",
            )
            for row in document["slowest"]
        ),
        right=(1, 2, 3, 5, 6),
    )
    rows = [(row["up_to_us"], row["count"]) for row in document["histogram"]]
    output.print_histogram("Histogram", "requests", rows)
