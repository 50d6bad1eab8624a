"""What decoding and encoding cost, against plain construct and against copying memory.

    python -m tests.bench.wire                  the table
    python -m tests.bench.wire --json           for machines
    python -m tests.bench.wire --stream-gib 4   also: peak memory over a stream of 4 GiB

Every figure is the best of several rounds, and all of them come from one run, so that ratios hold
on a noisy machine. GB/s counts bytes on the wire; a zero page is 9 of them for 4096 of the guest.
Memory to memory: chunks are handed to the decoder, every event is taken out and counted.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from postcopy_proto import messages as m
from postcopy_proto.messages import NEED_DATA, Pages
from postcopy_proto.wire import ForwardDecoder, ReturnPathDecoder, encode
from postcopy_proto.wire.pages import encode_pages
from postcopy_proto.wire.return_path import REQ_PAGES, decode_requests

PAGE_SIZE = 4096
PAGES = 16384  # 64 MiB of guest: more than the caches hold
CHUNK = 1 << 20
REQUESTS = 4096
ROUNDS = 7
SEED = 1

KINDS = {"contiguous": 0.0, "mix of 50 % zero": 0.5, "all zero": 1.0}
"""share of zero pages, each page independent of all others"""


def best(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Seconds of the fastest round."""
    fastest = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - began)
    return fastest


def zero_pages(share: float) -> NDArray[np.bool_]:
    return np.random.default_rng(SEED).random(PAGES) < share


def page_stream(zero: NDArray[np.bool_]) -> memoryview:
    """Records of all pages in order, the first one named."""
    rows = np.random.default_rng(SEED).integers(
        0, 256, (int(np.count_nonzero(~zero)), PAGE_SIZE), np.uint8
    )
    return encode_pages("pc.ram", np.arange(PAGES) * PAGE_SIZE, zero, rows, named=True)


def decode_pages(stream: memoryview, chunk: int) -> int:
    """Pages decoded from a RAM section, fed in chunks."""
    decoder = ForwardDecoder(header=False)
    decoder.receive_data(encode(m.SectionPart(1)))
    pages = 0
    for at in range(0, len(stream), chunk):
        decoder.receive_data(stream[at : at + chunk])
        while (event := decoder.next_event()) is not NEED_DATA:
            if isinstance(event, Pages):
                pages += len(event)
    return pages


def page_figures() -> list[dict[str, object]]:
    figures: list[dict[str, object]] = []
    source = np.full(PAGES * PAGE_SIZE, 1, np.uint8)
    target = np.zeros_like(source)
    copying = source.nbytes / best(lambda: np.copyto(target, source)) / 1e9
    figures.append({"what": "copying memory", "gigabytes_per_second": copying})
    for name, share in KINDS.items():
        zero = zero_pages(share)
        stream = page_stream(zero)
        for chunk, said in ((len(stream), "in one piece"), (CHUNK, "1 MiB"), (1 << 16, "64 KiB")):
            assert decode_pages(stream, chunk) == PAGES
            seconds = best(lambda stream=stream, chunk=chunk: decode_pages(stream, chunk))
            figures.append(
                {
                    "what": f"decode pages, {name}, {said}",
                    "gigabytes_per_second": len(stream) / seconds / 1e9,
                    "guest_gigabytes_per_second": PAGES * PAGE_SIZE / seconds / 1e9,
                    "nanoseconds": seconds / PAGES * 1e9,
                }
            )
        figures.append(build_figure(name, zero))
    return figures


def build_figure(name: str, zero: NDArray[np.bool_]) -> dict[str, object]:
    """Building batches of 256 pages into one reused buffer."""
    batch = 256
    rows = np.random.default_rng(SEED).integers(0, 256, (batch, PAGE_SIZE), np.uint8)
    out = np.empty(batch * (PAGE_SIZE + 8) + 256, np.uint8)
    offsets = np.arange(batch) * PAGE_SIZE
    parts = [zero[at : at + batch] for at in range(0, 4096, batch)]
    counts = [int(np.count_nonzero(~part)) for part in parts]

    def build() -> int:
        return sum(
            len(encode_pages("pc.ram", offsets, part, rows[:count], named=False, out=out))
            for part, count in zip(parts, counts, strict=True)
        )

    size, seconds = build(), best(build)
    return {
        "what": f"build pages, {name}",
        "gigabytes_per_second": size / seconds / 1e9,
        "nanoseconds": seconds / (batch * len(parts)) * 1e9,
    }


def request_figures() -> list[dict[str, object]]:
    requests = [m.ReqPages(i * PAGE_SIZE, PAGE_SIZE) for i in range(REQUESTS)]
    data = b"".join(map(encode, requests))
    view, one = memoryview(data), data[:16]
    fields = {"start": 1 << 32, "length": PAGE_SIZE}

    def iterate() -> None:
        decoder = ReturnPathDecoder()
        decoder.receive_data(data)
        for _ in decoder:
            pass

    def next_event() -> None:
        decoder = ReturnPathDecoder()
        decoder.receive_data(data)
        while decoder.next_event() is not NEED_DATA:
            pass

    def one_by_one() -> None:
        decoder = ReturnPathDecoder()
        for at in range(0, len(data), 16):
            decoder.receive_data(data[at : at + 16])
            decoder.next_event()

    few = range(REQUESTS // 16)
    plain_decode = best(lambda: [REQ_PAGES.parse(one) for _ in few]) / len(few)
    plain_encode = best(lambda: [REQ_PAGES.build(fields) for _ in few]) / len(few)
    works: list[tuple[str, float, Callable[[], object]]] = [
        ("decode REQ_PAGES, many at once, iterating", plain_decode, iterate),
        ("decode REQ_PAGES, many at once, next_event", plain_decode, next_event),
        ("decode REQ_PAGES, one a chunk", plain_decode, one_by_one),
        (
            "decode_requests, the codec itself",
            plain_decode,
            lambda: [decode_requests(view, at, 512) for at in range(0, len(data), 512 * 16)],
        ),
        ("encode REQ_PAGES", plain_encode, lambda: [encode(request) for request in requests]),
    ]
    figures: list[dict[str, object]] = [
        {"what": "construct, parse REQ_PAGES", "nanoseconds": plain_decode * 1e9},
        {"what": "construct, build REQ_PAGES", "nanoseconds": plain_encode * 1e9},
    ]
    for what, plain, work in works:
        seconds = best(work, 3 * ROUNDS) / REQUESTS
        figures.append(
            {"what": what, "nanoseconds": seconds * 1e9, "times_construct": plain / seconds}
        )
    return figures


def memory_figure(gigabytes: int) -> dict[str, object]:
    """Peak of what decoding a long stream allocates, chunks of 1 MiB not counted."""
    stream = page_stream(zero_pages(0.5))[19:]
    cycle = bytes(page_stream(zero_pages(0.5))[: len(stream) + 19])
    decoder = ForwardDecoder(header=False)
    decoder.receive_data(encode(m.SectionPart(1)))
    seen = 0
    tracemalloc.start()
    began = time.perf_counter()
    while seen < gigabytes << 30:
        for at in range(0, len(cycle), CHUNK):
            decoder.receive_data(memoryview(cycle)[at : at + CHUNK])
            while decoder.next_event() is not NEED_DATA:
                pass
        seen += len(cycle)
    seconds = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "what": f"peak memory over {seen / (1 << 30):.1f} GiB of pages, traced",
        "bytes": peak,
        "gigabytes_per_second": seen / seconds / 1e9,
    }


def show(figures: list[dict[str, object]]) -> None:
    columns = {
        "gigabytes_per_second": "GB/s",
        "guest_gigabytes_per_second": "GB/s of guest",
        "nanoseconds": "ns each",
        "times_construct": "x construct",
        "bytes": "bytes",
    }
    table = Table("", *columns.values())
    for figure in figures:
        values = [figure.get(column) for column in columns]
        table.add_row(
            str(figure["what"]), *("" if value is None else f"{value:,.1f}" for value in values)
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one document on stdout")
    parser.add_argument("--stream-gib", type=int, metavar="N", help="also peak memory over N GiB")
    arguments = parser.parse_args()
    figures = page_figures() + request_figures()
    if arguments.stream_gib:
        figures.append(memory_figure(arguments.stream_gib))
    if arguments.json:
        print(json.dumps(figures, indent=2))
    else:
        show(figures)


if __name__ == "__main__":
    main()
