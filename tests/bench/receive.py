"""`postcopy receive` against a stock QEMU destination, from the same source, pair by pair.

    python -m tests.bench.receive [--ram MIB] [--pairs N] [--json]

The source is a stock QEMU whose guest has filled its RAM with random words; postcopy starts at
once, so that nearly all of it travels in the postcopy phase. Time is the source's own
`total-time`, from `migrate` to SHUT.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.memory import warm
from tests.interop.guest import MIB, Guest
from tests.interop.qemu import Lab, Qemu, binaries, version_of
from tests.interop.receive import Receiver


def send(source: Qemu, address: str) -> dict[str, Any]:
    """Migrate away, postcopy from the first page; the source's account of it.

    What the destination takes, RAM or page cache, is warmed right before.
    """
    warm(source.memory_bytes)
    source.capabilities(postcopy_ram=True)
    source.parameters(max_bandwidth=100_000, downtime_limit=1)
    source.migrate(address)
    source.qmp.execute("migrate-start-postcopy")
    source.wait_migration("completed", timeout=300)
    return source.migration


def gigabytes_per_second(account: dict[str, Any]) -> float:
    return account["ram"]["transferred"] / account["total-time"] / 1e6


def to_stock(images: Path, binary: str, guest: Guest, memory_mib: int) -> float:
    with Lab(images) as lab:
        source = lab.start(binary, guest, memory_mib=memory_mib)
        destination = lab.start(binary, guest, memory_mib=memory_mib, incoming="defer", paused=True)
        source.wait_letters(1, timeout=120)
        destination.capabilities(postcopy_ram=True)
        address = f"unix:{lab.path('s')}"
        destination.incoming(address)
        return gigabytes_per_second(send(source, address))


def to_receive(images: Path, binary: str, guest: Guest, memory_mib: int, *options: str) -> float:
    with Lab(images) as lab:
        source = lab.start(binary, guest, memory_mib=memory_mib)
        source.wait_letters(1, timeout=120)
        receiver = Receiver.start(f"unix:{lab.path('s')}", lab.path("save"), *options)
        account = send(source, receiver.address)
        receiver.result()
        return gigabytes_per_second(account)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ram", type=int, default=1024, help="MiB of random words (1024)")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    binary = binaries()[0]
    guest, memory_mib = Guest(fill_end=(4 + args.ram) * MIB, verify=False), args.ram + 64
    rows = []
    with tempfile.TemporaryDirectory() as images:
        for _ in range(args.pairs):
            common = (Path(images), binary, guest, memory_mib)
            stock = to_stock(*common)
            file = to_receive(*common)
            touched = to_receive(*common, "--touch", "200")
            rows.append({"stock": stock, "file": file, "touch": touched})
    summary = {
        "qemu": version_of(binary),
        "ram_mib": args.ram,
        "pairs": rows,
        "receive_to_stock": statistics.median(row["file"] / row["stock"] for row in rows),
        "receive_touch_to_stock": statistics.median(row["touch"] / row["stock"] for row in rows),
    }
    if args.json:
        json.dump(summary, sys.stdout, indent=2)
        return 0
    print(f"GB/s from a stock QEMU {summary['qemu']} with {args.ram} MiB of random words")
    print(f"{'stock destination':>20}{'receive':>12}{'ratio':>8}{'--touch 200':>14}{'ratio':>8}")
    for row in rows:
        print(
            f"{row['stock']:20.2f}{row['file']:12.2f}{row['file'] / row['stock']:8.2f}"
            f"{row['touch']:14.2f}{row['touch'] / row['stock']:8.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
