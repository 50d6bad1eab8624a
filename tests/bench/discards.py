"""The discard encoder against a scalar C reference, pair by pair in one run.

    python -m tests.bench.discards                  2^25 pages, the table of ratios
    python -m tests.bench.discards --pages 28       2^28 pages
    python -m tests.bench.discards --json           for machines

The reference is compiled by the system's cc (or $CC) with -O2 when it is first needed. A ratio is
the median over pairs (reference, then ours) of reference time / ours: above 1 ours is the faster;
"best" is that of the shortest times, for machines that have other things to do.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import resource
import statistics
import subprocess
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from postcopy_proto.dirty import DirtyBitmap, iter_discards
from postcopy_proto.dirty import discards as encoder
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.wire.discard import VERSION

PAGE_SIZE = 4096
IDSTR = "pc.ram"
OUTPUT_BYTES = 1 << 20
SEED = 1


# ---- bitmaps


def clean(pages: int) -> NDArray[np.uint8]:
    return np.zeros(pages // 8, np.uint8)


def dirty(pages: int) -> NDArray[np.uint8]:
    return np.full(pages // 8, 0xFF, np.uint8)


def alternating(pages: int) -> NDArray[np.uint8]:
    return np.full(pages // 8, 0x55, np.uint8)


def uniform(density: float, pages: int) -> NDArray[np.uint8]:
    """Every page dirty with this probability, independent of all others."""
    random = np.random.default_rng(SEED)
    bitmap = np.empty(pages // 8, np.uint8)
    for first in range(0, pages, 1 << 22):
        last = min(first + (1 << 22), pages)
        drawn = random.random(last - first, dtype=np.float32) < density
        bitmap[first // 8 : last // 8] = np.packbits(drawn, bitorder="little")
    return bitmap


def clustered(pages: int, mean_run: int = 64, mean_gap: int = 192) -> NDArray[np.uint8]:
    """Runs and gaps of geometric length: a quarter of the pages is dirty."""
    random = np.random.default_rng(SEED)
    bitmap = np.empty(pages // 8, np.uint8)
    value, left = False, 0
    for first in range(0, pages, 1 << 22):
        size = min(1 << 22, pages - first)
        drawn = np.empty(size, np.bool_)
        filled = 0
        while filled < size:
            if not left:
                value = not value
                left = int(random.geometric(1 / (mean_run if value else mean_gap)))
            count = min(left, size - filled)
            drawn[filled : filled + count] = value
            filled += count
            left -= count
        bitmap[first // 8 : (first + size) // 8] = np.packbits(drawn, bitorder="little")
    return bitmap


SHAPES: dict[str, Callable[[int], NDArray[np.uint8]]] = {
    "clean": clean,
    "dirty": dirty,
    "0.1 %": functools.partial(uniform, 0.001),
    "10 %": functools.partial(uniform, 0.1),
    "50 %": functools.partial(uniform, 0.5),
    "alternating": alternating,
    "clustered": clustered,
}


# ---- the two contestants


@functools.cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_name("discard_reference.c")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "discard_reference.so"
        compiler = os.environ.get("CC", "cc")
        subprocess.run(
            [compiler, "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", library, source],
            check=True,
        )
        loaded = ctypes.CDLL(str(library))
    loaded.encode_discards.restype = ctypes.c_size_t
    loaded.encode_discards.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_uint,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_size_t,
    ]
    return loaded


def reference(
    bitmap: NDArray[np.uint8],
    pages: int,
    *,
    swapped: bool,
    idstr: str = IDSTR,
    output: NDArray[np.uint8] | None = None,
) -> int:
    """The reference over one block's bitmap of whole words; how many bytes it made."""
    if output is None:
        output = _output()
    name = idstr.encode()
    prefix = bytes((VERSION, len(name))) + name + b"\0"
    size: int = _library().encode_discards(
        bitmap.ctypes.data,
        pages,
        PAGE_SIZE.bit_length() - 1,
        prefix,
        len(prefix),
        swapped,
        output.ctypes.data,
        len(output),
    )
    return size


@functools.cache
def _output() -> NDArray[np.uint8]:
    return np.zeros(OUTPUT_BYTES, np.uint8)


def ours(bitmap: NDArray[np.uint8], pages: int) -> int:
    """The vectorised encoder over the same; how many bytes it made."""
    block = RAMBlock(IDSTR, pages * PAGE_SIZE)
    return sum(map(len, iter_discards(block, DirtyBitmap.from_buffer(bitmap, pages))))


# ---- measuring


@dataclass(frozen=True)
class Result:
    """One row of the table; times are medians."""

    shape: str
    pages: int
    runs: int
    bytes: int
    ours_ms: float
    ours_ns_per_run: float | None
    bytewise_ratio: float
    """reference with byte-wise puts / ours, median of pairs"""
    bytewise_best: float
    """the same of the shortest times: what is left when other load is taken out"""
    swapped_ratio: float
    """reference with byte-swapped stores / ours, median of pairs"""
    swapped_best: float
    page_faults: int
    """minor faults of one run of ours"""
    peak_bytes: int
    """most memory that one run of ours held beyond the bitmap"""


def _seconds(call: Callable[[], int]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Pairs:
    """Alternating runs of a reference and of ours, in seconds."""

    reference: list[float]
    ours: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(a / b for a, b in zip(self.reference, self.ours, strict=True))

    @property
    def best(self) -> float:
        return min(self.reference) / min(self.ours)


def _pairs(reference: Callable[[], int], ours: Callable[[], int], rounds: int) -> Pairs:
    times = [(_seconds(reference), _seconds(ours)) for _ in range(rounds)]
    return Pairs([a for a, _ in times], [b for _, b in times])


def _faults(call: Callable[[], int]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def peak_of(call: Callable[[], int]) -> int:
    """Most bytes held at one time, with the working memory that is otherwise kept."""
    encoder._spare.clear()
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def run_count(bitmap: NDArray[np.uint8]) -> int:
    words = bitmap.view("<u8")
    carried = np.concatenate((np.zeros(1, np.uint64), words[:-1] >> np.uint64(63)))
    first_pages = words & ~((words << np.uint64(1)) | carried)
    return int.from_bytes(first_pages.tobytes()).bit_count()


def measure(shape: str, pages: int, rounds: int) -> Result:
    bitmap = SHAPES[shape](pages)
    runs = run_count(bitmap)

    def encode() -> int:
        return ours(bitmap, pages)

    def bytewise() -> int:
        return reference(bitmap, pages, swapped=False)

    def swapped() -> int:
        return reference(bitmap, pages, swapped=True)

    size = encode()
    assert size == bytewise() == swapped(), "the contestants disagree"
    against_bytewise = _pairs(bytewise, encode, rounds)
    against_swapped = _pairs(swapped, encode, rounds)
    seconds = statistics.median(against_bytewise.ours + against_swapped.ours)
    return Result(
        shape=shape,
        pages=pages,
        runs=runs,
        bytes=size,
        ours_ms=seconds * 1e3,
        ours_ns_per_run=seconds * 1e9 / runs if runs > 1 else None,
        bytewise_ratio=against_bytewise.ratio,
        bytewise_best=against_bytewise.best,
        swapped_ratio=against_swapped.ratio,
        swapped_best=against_swapped.best,
        page_faults=_faults(encode),
        peak_bytes=peak_of(encode),
    )


# ---- showing


def show(results: list[Result]) -> None:
    table = Table(title=f"discards of {results[0].pages:,} pages")
    for column in (
        "bitmap",
        "runs",
        "ours ms",
        "ns a run",
        "bytewise / ours",
        "best",
        "swapped / ours",
        "best",
        "faults",
        "peak KiB",
    ):
        table.add_column(column, justify="left" if column == "bitmap" else "right")
    for result in results:
        table.add_row(
            result.shape,
            f"{result.runs:,}",
            f"{result.ours_ms:.2f}",
            "-" if result.ours_ns_per_run is None else f"{result.ours_ns_per_run:.1f}",
            f"{result.bytewise_ratio:.2f}",
            f"{result.bytewise_best:.2f}",
            f"{result.swapped_ratio:.2f}",
            f"{result.swapped_best:.2f}",
            f"{result.page_faults}",
            f"{result.peak_bytes // 1024:,}",
        )
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", type=int, default=25, metavar="POWER", help="2^POWER pages")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=15, help="pairs a ratio is the median of")
    parser.add_argument("--json", action="store_true", help="one document on stdout")
    options = parser.parse_args()
    results = [measure(shape, 1 << options.pages, options.rounds) for shape in options.shapes]
    if options.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    else:
        show(results)


if __name__ == "__main__":
    main()
