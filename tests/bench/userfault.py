"""Placement and local fault service against C, pair by pair in one run.

    python -m tests.bench.userfault            both tables
    python -m tests.bench.userfault --json     for machines

Placement: GB/s of UFFDIO_COPY by bytes per ioctl into memory of this process that was dropped
before each round. Faults: a guest program in C touches pages in random order and takes the time;
the handler, here, is a loop in C or one of ours, with the page's content at hand, on the guest's
CPU or on another. C and ours take turns; a ratio is the median over pairs, of speed for placement
(above 1 ours is the faster) and of latency for faults (below 1 ours is the faster).
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import logging
import mmap
import os
import select
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from postcopy_proto.messages import Pages
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.userfault.abi import Features
from postcopy_proto.userfault.backend import Backend
from postcopy_proto.userfault.descriptor import PageFault, Userfaultfd
from postcopy_proto.userfault.region import Owner, Region

PAGE = 4096
PIECES = (4096, 16384, 65536, 262144, 1 << 20)
PLACED_BYTES = 64 << 20
FAULTS = 4096
WARM_UP = 256
"""faults at the beginning that are left out: caches, and the CPU's frequency"""

SOURCE = Path(__file__).with_name("userfault_reference.c")


@functools.cache
def compiled() -> tuple[ctypes.CDLL, Path]:
    """The library, and the path of the guest program."""
    folder = Path(tempfile.mkdtemp(prefix="userfault-bench-"))
    compiler = os.environ.get("CC", "cc")
    library, guest = folder / "reference.so", folder / "guest"
    for arguments in (["-shared", "-fPIC", "-o", library], ["-DGUEST", "-o", guest]):
        subprocess.run([compiler, "-O2", *arguments, SOURCE], check=True)
    reference = ctypes.CDLL(str(library))
    number = ctypes.c_uint64
    reference.place_copies.argtypes = (ctypes.c_int, number, number, number, number)
    reference.serve_faults.argtypes = (ctypes.c_int, number, number, number, ctypes.c_int)
    return reference, guest


@contextmanager
def pinned(cpu: int) -> Iterator[None]:
    """This process on one CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# ---- placement


@dataclass
class Placement:
    piece: int
    c_gb_per_s: float
    copy_gb_per_s: float
    each_gb_per_s: float
    backend_gb_per_s: float
    copy_ratio: float
    each_ratio: float
    backend_ratio: float


class PlacementBench:
    """Memory of this process, filled again and again."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.source = mmap.mmap(-1, total, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.data = np.frombuffer(self.source, np.uint8)
        self.data[:] = np.random.default_rng(1).integers(0, 256, total, np.uint8)
        self.address = self.data.ctypes.data
        self.region = Region.create(RAMBlock("ram", total))
        self.region.mapping.advise_huge_pages(False)

    def round(self, fill: Callable[[Userfaultfd], None]) -> float:
        """GB/s of one fill of empty memory."""
        self.region.mapping.discard(0, self.total)
        with Userfaultfd.open(user_mode_only=True) as uffd:
            uffd.register(self.region.address, self.total)
            begin = time.perf_counter()
            fill(uffd)
            return self.total / (time.perf_counter() - begin) / 1e9

    def c(self, piece: int) -> float:
        reference, _ = compiled()

        def fill(uffd: Userfaultfd) -> None:
            to, source = self.region.address, self.address
            assert not reference.place_copies(uffd.fileno(), to, source, self.total, piece)

        return self.round(fill)

    def copy(self, piece: int) -> float:
        def fill(uffd: Userfaultfd) -> None:
            copy, to, source = uffd.copy, self.region.address, self.address
            for done in range(0, self.total, piece):
                copy(to + done, source + done, piece)

        return self.round(fill)

    def each(self, piece: int) -> float:
        def fill(uffd: Userfaultfd) -> None:
            to, source = self.region.address, self.address
            for done in range(0, self.total, 256 * piece):  # a batch's worth of scattered pages
                end = min(done + 256 * piece, self.total)
                destinations = range(to + done, to + end, piece)
                uffd.copy_each(destinations, range(source + done, source + end, piece), piece)

        return self.round(fill)

    def backend(self, piece: int) -> float:
        """The whole way of a batch: checks, bitmap, statistics."""
        count = piece // PAGE
        positions = np.arange(count, dtype=np.int64) * PAGE
        view = memoryview(self.data)
        batches = [
            Pages("ram", (positions + at).astype(np.uint64), positions, view[at : at + piece])
            for at in range(0, self.total, piece)
        ]
        backend = Backend([self.region], user_mode_only=True)
        backend.incoming_init()
        backend.prepare_discard()
        backend.enable_notify()
        begin = time.perf_counter()
        for pages in batches:
            backend.place(pages)
        speed = self.total / (time.perf_counter() - begin) / 1e9
        backend.cleanup()
        self.region.mapping.advise_huge_pages(False)
        return speed


def measure_placement(rounds: int, total: int = PLACED_BYTES) -> list[Placement]:
    with pinned(min(os.sched_getaffinity(0))):
        return _measure_placement(PlacementBench(total), rounds)


def _measure_placement(bench: PlacementBench, rounds: int) -> list[Placement]:
    results = []
    ways = [bench.c, bench.copy, bench.each, bench.backend]
    for piece in PIECES:
        for warm_up in ways:
            warm_up(piece)
        # In another order each round: who follows whom has its effect on caches.
        speeds: dict[str, list[float]] = {way.__name__: [] for way in ways}
        for turn in range(rounds):
            for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
                speeds[way.__name__].append(way(piece))
        ratios = {
            name: statistics.median(
                ours / its for ours, its in zip(taken, speeds["c"], strict=True)
            )
            for name, taken in speeds.items()
        }
        medians = {name: statistics.median(taken) for name, taken in speeds.items()}
        results.append(
            Placement(
                piece,
                medians["c"],
                *(medians[name] for name in ("copy", "each", "backend")),
                *(ratios[name] for name in ("copy", "each", "backend")),
            )
        )
    bench.region.close()
    return results


# ---- faults


@dataclass
class Service:
    handler: str
    cpus: str
    p50_us: float
    p99_us: float
    p50_ratio: float
    p99_ratio: float


class GuestOwner(Owner):
    """The guest program, whose memory comes registered."""

    def __init__(self, pid: int, uffd: Userfaultfd) -> None:
        self._pid, self._uffd = pid, uffd

    @property
    def pid(self) -> int:
        return self._pid

    def open_userfaultfd(
        self, features: Features, user_mode_only: bool | None
    ) -> tuple[Userfaultfd, bool]:
        return Userfaultfd.from_fd(os.dup(self._uffd.fileno())), True

    def available_features(self) -> Features:
        return self._uffd.features

    def discard(self, region: Region, start: int, length: int) -> None: ...

    def advise_huge_pages(self, region: Region, on: bool) -> None: ...

    def lock_memory(self, on: bool) -> None: ...


Handler = Callable[[Userfaultfd, int, int, NDArray[np.uint8]], None]


def serve_in_c(
    uffd: Userfaultfd, pid: int, base: int, data: NDArray[np.uint8], read_on: bool = False
) -> None:
    """Poll, read and copy for each fault, as QEMU does it: what all others are measured by."""
    serve = compiled()[0].serve_faults
    assert not serve(uffd.fileno(), base, data.ctypes.data, FAULTS, read_on)


def serve_by_descriptor(uffd: Userfaultfd, pid: int, base: int, data: NDArray[np.uint8]) -> None:
    """As one writes it with the binding alone."""
    poll = select.poll()
    poll.register(uffd.fileno(), select.POLLIN)
    source, served = data.ctypes.data - base, 0
    while served < FAULTS:
        poll.poll()
        while events := uffd.read_events():
            for event in events:
                assert isinstance(event, PageFault)
                uffd.copy(event.address, source + event.address, PAGE)
                served += 1


def listening(uffd: Userfaultfd, pid: int, base: int) -> tuple[Backend, select.poll]:
    """A backend of the guest's memory, and a poll for its faults."""
    backend = Backend([Region(RAMBlock("ram", FAULTS * PAGE), base, GuestOwner(pid, uffd))])
    backend.enable_notify()
    poll = select.poll()
    poll.register(backend.fileno(), select.POLLIN)
    return backend, poll


def serve_by_backend(uffd: Userfaultfd, pid: int, base: int, data: NDArray[np.uint8]) -> None:
    """With received bits, statistics and everything else that a destination keeps."""
    backend, poll = listening(uffd, pid, base)
    answer, served = backend.answering({"ram": data.ctypes.data}), 0
    while served < FAULTS:
        poll.poll()
        served += answer()
    backend.cleanup()


def serve_by_requests(uffd: Userfaultfd, pid: int, base: int, data: NDArray[np.uint8]) -> None:
    """The same in two steps, as for pages that are elsewhere."""
    backend, poll = listening(uffd, pid, base)
    source = data.ctypes.data
    while backend.stats.pages < FAULTS:
        poll.poll()
        while requests := backend.read_faults():
            for name, offset in requests:
                backend.place_page(name, offset, source + offset)
    backend.cleanup()


def serve_by_batches(uffd: Userfaultfd, pid: int, base: int, data: NDArray[np.uint8]) -> None:
    """As the destination's loop does it: the page arrives as a batch of one."""
    backend, poll = listening(uffd, pid, base)
    view = memoryview(data)
    positions, offsets = np.zeros(1, np.int64), np.zeros(1, np.uint64)
    while backend.stats.pages < FAULTS:
        poll.poll()
        for name, offset in backend.read_faults():
            offsets[0] = offset
            backend.place(Pages(name, offsets, positions, view[offset : offset + PAGE]))
    backend.cleanup()


HANDLERS: dict[str, Handler] = {
    "C that reads on": functools.partial(serve_in_c, read_on=True),
    "descriptor": serve_by_descriptor,
    "backend": serve_by_backend,
    "requests": serve_by_requests,
    "batches of one": serve_by_batches,
}


def waits(
    handler: Handler, guest_cpu: int, data: NDArray[np.uint8], seed: int
) -> NDArray[np.uint64]:
    """Nanoseconds of every touch of a new guest."""
    ours, theirs = socket.socketpair()
    _, program = compiled()
    command = [program, str(theirs.fileno()), str(FAULTS), str(guest_cpu), str(seed)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[theirs.fileno()]) as guest,
        ours,
        theirs,
    ):
        message, fds, _, _ = socket.recv_fds(ours, 8, 1)
        with Userfaultfd.from_fd(fds[0]) as uffd:
            ours.send(b"g")
            handler(uffd, guest.pid, int.from_bytes(message, "little"), data)
        assert guest.stdout is not None
        return np.frombuffer(guest.stdout.read(), np.uint64)[WARM_UP:]


def measure_faults(rounds: int) -> list[Service]:
    cpus = sorted(os.sched_getaffinity(0))
    with pinned(cpus[0]):
        return _measure_faults(cpus, rounds)


def _measure_faults(cpus: list[int], rounds: int) -> list[Service]:
    data = np.random.default_rng(2).integers(0, 256, FAULTS * PAGE, np.uint8)
    results = []
    places = {"same CPU": cpus[0]}
    if len(cpus) > 1:
        places["two CPUs"] = cpus[1]
    for where, guest_cpu in places.items():
        handlers = {"C": serve_in_c, **HANDLERS}
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in handlers}
        for seed in range(rounds + 1):
            for name, handler in handlers.items():
                p50, p99 = np.percentile(waits(handler, guest_cpu, data, seed), (50, 99)) / 1000
                if seed:
                    figures[name].append((float(p50), float(p99)))
        for name, taken in figures.items():
            ratios = [
                (p50 / c50, p99 / c99)
                for (p50, p99), (c50, c99) in zip(taken, figures["C"], strict=True)
            ]
            results.append(
                Service(
                    name,
                    where,
                    *map(
                        statistics.median, (*zip(*taken, strict=True), *zip(*ratios, strict=True))
                    ),
                )
            )
    return results


# ---- telling


def show(placement: list[Placement], faults: list[Service]) -> None:
    console = Console()
    table = Table(title=f"placement of {PLACED_BYTES >> 20} MiB by UFFDIO_COPY, GB/s")
    for column in (
        "bytes an ioctl",
        "C",
        *("copy", "of C"),
        *("copy_each", "of C"),
        *("Backend.place", "of C"),
    ):
        table.add_column(column, justify="right")
    for row in placement:
        table.add_row(
            f"{row.piece:,}",
            f"{row.c_gb_per_s:.2f}",
            f"{row.copy_gb_per_s:.2f}",
            f"{row.copy_ratio:.2f}",
            f"{row.each_gb_per_s:.2f}",
            f"{row.each_ratio:.2f}",
            f"{row.backend_gb_per_s:.2f}",
            f"{row.backend_ratio:.2f}",
        )
    console.print(table)
    table = Table(title=f"service of {FAULTS} local faults, µs as the guest sees them")
    for column in ("CPUs", "handler", "p50", "p99", "p50 of C's", "p99 of C's"):
        table.add_column(column, justify="right")
    for service in faults:
        table.add_row(
            service.cpus,
            service.handler,
            f"{service.p50_us:.1f}",
            f"{service.p99_us:.1f}",
            f"{service.p50_ratio:.2f}",
            f"{service.p99_ratio:.2f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=24, help="pairs a ratio is the median of")
    parser.add_argument("--json", action="store_true", help="one document on stdout")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # a guest that has touched everything ends at once
    faults = measure_faults(options.rounds)
    placement = measure_placement(2 * options.rounds)  # 2 % decide there
    if options.json:
        document = {
            "placement": [asdict(row) for row in placement],
            "faults": [asdict(service) for service in faults],
        }
        print(json.dumps(document, indent=2))
    else:
        show(placement, faults)


if __name__ == "__main__":
    main()
