"""The postcopy phase over TCP loopback, ours against a C pair that works as QEMU does.

    python -m tests.bench.end_to_end [--ram MIB] [--pairs N] [--json]

Both move the same amount of random pages from one process to another, whose memory is
registered with userfaultfd and that nobody touches meanwhile. Time is from the first page
record to the last placement. Memory is warmed first: a machine's first use of a page is slow.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from postcopy_proto import messages as m
from postcopy_proto.destination import DestinationConnection
from postcopy_proto.errors import Channel
from postcopy_proto.net.demo_source import LiveMemory
from postcopy_proto.net.destination_loop import DestinationLoop
from postcopy_proto.net.source_loop import SourceLoop
from postcopy_proto.net.transport import (
    Listener,
    TransferMode,
    connect,
    limit_buffer,
    parse_address,
)
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.source import SourceConnection
from postcopy_proto.userfault.backend import Backend
from postcopy_proto.userfault.region import Region
from tests.bench.memory import warm

MIB = 1 << 20
C_SOURCE = Path(__file__).with_name("postcopy_pair.c")


class RegionTarget:
    """Memory of this process, filled through the backend; nobody faults on it."""

    wants_runs = True

    def __init__(self) -> None:
        self.backend: Backend | None = None
        self.region: Region | None = None

    def open(self, connection: DestinationConnection) -> None:
        [block] = connection.blocks.values()
        self.region = Region.create(block)
        # Warm, as the C receiver: the pages that COPY will take were in use a moment ago.
        self.region.mapping.advise_huge_pages(False)
        ctypes.memset(self.region.address, 1, block.used_length)
        self.backend = Backend([self.region], user_mode_only=True)
        self.backend.incoming_init()

    def place(self, pages: m.Pages, channel: Channel) -> None:
        self.backend.place(pages, channel)

    def prepare_discard(self) -> None:
        self.backend.prepare_discard()

    def discard(self, block: str, start: int, length: int) -> None:
        self.backend.discard(block, start, length)

    def listen(self) -> None:
        self.backend.enable_notify()

    def fileno(self) -> int:
        return self.backend.fileno()

    @property
    def pending(self) -> bool:
        return self.backend.pending

    def read_faults(self) -> list[tuple[str, int]]:
        return self.backend.read_faults()

    def run(self) -> None: ...

    def device_state(self, data: bytes) -> None: ...

    def tick(self) -> None: ...

    def finish(self) -> None:
        self.backend.cleanup()
        self.region.close()


def ours_send(address: str, size: int, mode: TransferMode) -> None:
    memory = np.random.default_rng(1).integers(1, 1 << 62, size // 8, np.uint64).view(np.uint8)
    store = LiveMemory([(RAMBlock("pc.ram", size), memory)])
    connection = SourceConnection(store, m.Configuration("bench"))
    with connect(parse_address(address), timeout=60) as sock:
        loop = SourceLoop(connection, sock, mode=mode)
        loop.send([connection.start()])
        loop.send(connection.switchover(None, b""))
        loop.deliver()
        loop.finish()


def ours(size: int, mode: TransferMode) -> float:
    """GB/s of RAM in the postcopy phase."""
    with Listener(parse_address("tcp:127.0.0.1:0")) as listener:
        limit_buffer(listener.socket, socket.SO_RCVBUF, mode)
        sender = subprocess.Popen(
            [
                *(sys.executable, "-m", __spec__.name),
                *("--send", str(listener.address), str(size), mode.name),
            ]
        )
        loop = DestinationLoop(
            listener, DestinationConnection(), RegionTarget(), mode=mode, accept_timeout=120
        )
        found = loop.run()
        assert sender.wait(60) == 0
    return size / found.postcopy_seconds / 1e9


def reference(program: Path, size: int) -> float:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        receiver = subprocess.Popen(
            [program, "receive", str(listening.fileno()), str(size)],
            pass_fds=[listening.fileno()],
            stdout=subprocess.PIPE,
            text=True,
        )
        subprocess.run([program, "send", str(port), str(size)], check=True)
        out, _ = receiver.communicate(timeout=120)
    return size / float(out) / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ram", type=int, default=1024, help="MiB (1024)")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--send", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.send:
        address, size, mode = args.send
        ours_send(address, int(size), TransferMode[mode])
        return 0
    size = args.ram * MIB
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "pair"
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-O2", "-o", program, C_SOURCE], check=True)
        warm(4 * size)
        for _ in range(args.pairs):
            rows.append(
                {
                    "c": reference(program, size),
                    "throughput": ours(size, TransferMode.THROUGHPUT),
                    "latency": ours(size, TransferMode.LATENCY),
                }
            )
    ratio = {
        mode: statistics.median(row[mode] / row["c"] for row in rows)
        for mode in ("throughput", "latency")
    }
    if args.json:
        json.dump({"ram_mib": args.ram, "pairs": rows, "ratio": ratio}, sys.stdout, indent=2)
        return 0
    print(f"GB/s, {args.ram} MiB of random pages over TCP loopback")
    print(f"{'C as QEMU':>12}{'ours':>8}{'ratio':>8}{'latency mode':>14}{'ratio':>8}")
    for row in rows:
        print(
            f"{row['c']:12.2f}{row['throughput']:8.2f}{row['throughput'] / row['c']:8.2f}"
            f"{row['latency']:14.2f}{row['latency'] / row['c']:8.2f}"
        )
    print(f"median of pairs: {ratio['throughput']:.2f}, in latency mode {ratio['latency']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
