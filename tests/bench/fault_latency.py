"""A fault over TCP loopback, on a quiet connection and while a push saturates it, in one run.

    python -m tests.bench.fault_latency [--ram MIB] [--touches N] [--rounds N] [--pin] [--json]

A guest process touches pages of one block in random order while the other block, of --ram MiB, is
pushed in the background, or is not. Every touch is a fault: requested, answered on the preempt
channel, placed, woken from; its time is the guest's own. Both loops are in latency mode. The push
is what arrived while the touches went on, in GB/s. With --pin the source has the first CPU, the
destination and its guest the last one; without, the scheduler decides.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np

from postcopy_proto import messages as m
from postcopy_proto.destination import DestinationConnection
from postcopy_proto.errors import Channel
from postcopy_proto.net.demo_source import LiveMemory
from postcopy_proto.net.destination_loop import DestinationLoop, DestinationStatistics
from postcopy_proto.net.guest import GuestProcess, Touch
from postcopy_proto.net.source_loop import SourceLoop
from postcopy_proto.net.target import GuestTarget
from postcopy_proto.net.transport import Listener, TransferMode, connect, parse_address
from postcopy_proto.ramblock import TARGET_PAGE_SIZE, RAMBlock
from postcopy_proto.source import BackgroundOrder, SourceConnection

MIB = 1 << 20
WARM_UP = 64
"""touches at the beginning that are left out"""


def send(address: str, size: int, touches: int, push: bool) -> None:
    """The source: pushes in block order, so that the touched block comes last."""
    blocks = [RAMBlock("pushed", size), RAMBlock("touched", touches * TARGET_PAGE_SIZE)]
    random = np.random.default_rng(1)
    store = LiveMemory(
        [
            (block, random.integers(1, 1 << 62, block.used_length // 8, np.uint64).view(np.uint8))
            for block in blocks
        ]
    )
    connection = SourceConnection(
        store, m.Configuration("bench"), preempt=True, order=BackgroundOrder.SEQUENTIAL
    )
    to = parse_address(address)
    with connect(to, timeout=60) as forward, connect(to, timeout=60) as preempt:
        loop = SourceLoop(connection, forward, preempt, mode=TransferMode.LATENCY)
        loop.send([connection.start()])
        loop.send(connection.switchover(None, b""))
        if not push:
            loop.deliver(until=lambda: connection.requests == touches, background=False)
        loop.deliver()
        loop.finish()


@dataclass
class Service:
    """One run's figures."""

    p50_us: float
    p99_us: float
    push_gb_per_s: float


class PushedTarget(GuestTarget):
    """Notes how much of the push arrives while the guest touches."""

    def __init__(self, touches: int) -> None:
        super().__init__(self._touch)
        self._touches = touches
        self._began = 0.0
        self._bytes = 0
        self.seconds = 0.0
        self.pushed = 0

    def _touch(self, guest: GuestProcess, _: DestinationConnection) -> Touch:
        pages = np.random.default_rng(2).permutation(self._touches) * TARGET_PAGE_SIZE
        self._began = time.monotonic()
        return guest.touch({"touched": pages})

    def place(self, pages: m.Pages, channel: Channel) -> None:
        super().place(pages, channel)
        if channel is Channel.FORWARD and self.touch is not None and not self.seconds:
            self._bytes += len(pages) * TARGET_PAGE_SIZE

    def tick(self) -> None:
        super().tick()
        if self.touch is not None and self.touch.done and not self.seconds:
            self.seconds, self.pushed = time.monotonic() - self._began, self._bytes


def measure(size: int, touches: int, *, push: bool, cpu: int | None) -> Service:
    """One migration in one of the two ways."""
    target = PushedTarget(touches)
    with Listener(parse_address("tcp:127.0.0.1:0")) as listener:
        command = [sys.executable, "-m", __spec__.name, "--send", str(listener.address)]
        command += [str(size), str(touches), str(int(push)), "" if cpu is None else str(cpu)]
        sender = subprocess.Popen(command)
        loop = DestinationLoop(
            listener,
            DestinationConnection(),
            target,
            mode=TransferMode.LATENCY,
            accept_timeout=120,
        )
        try:
            found: DestinationStatistics = loop.run()
            assert sender.wait(60) == 0
            assert target.touch is not None
            waits = target.touch.latencies_ns[WARM_UP:] / 1000
        finally:
            target.close()
    assert found.urgent_pages == touches, "the push was over before the touches were"
    p50, p99 = np.percentile(waits, (50, 99))
    pushed = target.pushed / target.seconds / 1e9 if push else 0.0
    return Service(float(p50), float(p99), pushed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ram", type=int, default=1024, help="MiB to push (1024)")
    parser.add_argument("--touches", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pin", action="store_true", help="each end to a CPU of its own")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--send", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.send:
        address, size, touches, push, cpu = args.send
        if cpu:
            os.sched_setaffinity(0, {int(cpu)})
        send(address, int(size), int(touches), push == "1")
        return 0
    cpus = sorted(os.sched_getaffinity(0))
    if args.pin:
        os.sched_setaffinity(0, {cpus[-1]})
    cpu = cpus[0] if args.pin else None
    rows = []
    for _ in range(args.rounds):
        idle = measure(args.ram * MIB, args.touches, push=False, cpu=cpu)
        loaded = measure(args.ram * MIB, args.touches, push=True, cpu=cpu)
        rows.append({"idle": idle, "pushed": loaded})
    ratio = {
        name: statistics.median(
            getattr(row["pushed"], name) / getattr(row["idle"], name) for row in rows
        )
        for name in ("p50_us", "p99_us")
    }
    push_speed = statistics.median(row["pushed"].push_gb_per_s for row in rows)
    if args.json:
        told = [{name: asdict(service) for name, service in row.items()} for row in rows]
        document = {"pinned": args.pin, "rounds": told, "ratio": ratio, "push": push_speed}
        json.dump(document, sys.stdout, indent=2)
        return 0
    print(f"{args.touches} faults over TCP loopback, {'' if args.pin else 'not '}pinned; µs")
    print(f"{'idle p50':>10}{'p99':>10}{'pushed p50':>12}{'p99':>10}{'push GB/s':>11}")
    for row in rows:
        quiet, busy = row["idle"], row["pushed"]
        print(
            f"{quiet.p50_us:10.0f}{quiet.p99_us:10.0f}{busy.p50_us:12.0f}{busy.p99_us:10.0f}"
            f"{busy.push_gb_per_s:11.2f}"
        )
    print(
        f"medians of rounds: p50 {ratio['p50_us']:.2f}x of idle, p99 {ratio['p99_us']:.2f}x, "
        f"push {push_speed:.2f} GB/s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
