"""The whole protocol on one machine with no VM: source, destination and guest, three processes.

This process is the destination. It starts the source (`net.demo_source`), whose RAM lies in
memory files, and the guest, whose RAM is what arrives. In the end both are compared.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

from postcopy_proto.destination import DestinationConnection
from postcopy_proto.errors import HostUnsupportedError, PostcopyError
from postcopy_proto.net.demo_source import DemoPlan, plan_line
from postcopy_proto.net.destination_loop import DestinationLoop, DestinationStatistics
from postcopy_proto.net.target import GuestTarget, compare, every_page
from postcopy_proto.net.transport import Listener, TransferMode, parse_address
from postcopy_proto.ramblock import TARGET_PAGE_SIZE, RAMBlock
from postcopy_proto.userfault import syscalls
from postcopy_proto.userfault.probe import ProbeResult, probe
from postcopy_proto.userfault.statistics import FaultStatistics

SMALLEST = 1 << 20


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the demo is asked for; `size` in bytes, `dirty` a fraction of all pages."""

    size: int = 256 << 20
    dirty: float = 0.3
    seed: int = 0
    touch: str = "random"
    mode: TransferMode = TransferMode.LATENCY


@dataclass(slots=True)
class DemoProgress:
    """What the source last reported, and what the destination counts."""

    phase: str = "start"
    ram_pages: int = 0
    precopy_pages: int = 0
    dirty_pages: int = 0
    destination: DestinationStatistics | None = None


@dataclass(slots=True)
class DemoResult:
    """What there is to tell at the end."""

    compared_bytes: int
    probe: ProbeResult
    destination: DestinationStatistics
    faults: FaultStatistics
    source: dict[str, Any] = field(default_factory=dict)


def layout(size: int) -> list[RAMBlock]:
    """Three blocks that add up to `size` bytes: most of it RAM, a frame buffer, a small ROM."""
    pages = size // TARGET_PAGE_SIZE
    rom = min(33, pages // 8)
    vram = pages // 16
    return [
        RAMBlock("pc.ram", (pages - rom - vram) * TARGET_PAGE_SIZE),
        RAMBlock("vga.vram", vram * TARGET_PAGE_SIZE),
        RAMBlock("pc.rom", rom * TARGET_PAGE_SIZE),
    ]


class _Source:
    """The source process and the reports that it writes."""

    def __init__(self, plan: DemoPlan, progress: DemoProgress) -> None:
        self._progress = progress
        self.last: dict[str, Any] = {}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "postcopy_proto.net.demo_source"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[fd for _, _, fd in plan.blocks],
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(plan_line(plan))
        self.process.stdin.close()
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            self.last = json.loads(line)
            self._progress.phase = self.last["phase"]
            self._progress.precopy_pages = self.last.get(
                "precopy_pages", self._progress.precopy_pages
            )
            self._progress.dirty_pages = self.last.get("dirty", self._progress.dirty_pages)

    def join(self) -> dict[str, Any]:
        """Wait for its end; its last report. PostcopyError when it failed."""
        self.process.wait(30)
        self._reader.join(5)
        if self.process.returncode:
            raise PostcopyError(f"the source failed: {self.last.get('error', 'no reason given')}")
        return self.last

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def run_demo(
    options: DemoOptions, on_progress: Callable[[DemoProgress], None] | None = None
) -> DemoResult:
    """Migrate, compare, and tell. HostUnsupportedError when this host has no userfaultfd."""
    host = probe()
    if not host.supported:
        raise HostUnsupportedError(host.reasons)
    blocks = layout(options.size)
    progress = DemoProgress(ram_pages=sum(block.page_count() for block in blocks))

    def report(statistics: DestinationStatistics) -> None:
        progress.destination = statistics
        if on_progress is not None:
            on_progress(progress)

    files = {block.idstr: _memory_file(block) for block in blocks}
    target = GuestTarget(every_page(options.touch, options.seed))
    source: _Source | None = None
    try:
        with Listener(parse_address("tcp:127.0.0.1:0")) as listener:
            source = _Source(
                DemoPlan(
                    str(listener.address),
                    [(block.idstr, block.used_length, files[block.idstr]) for block in blocks],
                    options.dirty,
                    options.seed,
                    options.mode.name,
                ),
                progress,
            )
            loop = DestinationLoop(
                listener,
                DestinationConnection(),
                target,
                mode=options.mode,
                accept_timeout=60,
                on_progress=report,
            )
            statistics = loop.run()
            told = source.join()
        compared = _compare_with_source(target, blocks, files)
        return DemoResult(compared, host, statistics, target.statistics, told)
    finally:
        if source is not None:
            source.kill()
        target.close()
        for fd in files.values():
            os.close(fd)


def _die_with_parent() -> None:
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)


def _memory_file(block: RAMBlock) -> int:
    fd = os.memfd_create(f"postcopy-demo-{block.idstr}")
    os.ftruncate(fd, block.used_length)
    return fd


def _compare_with_source(target: GuestTarget, blocks: list[RAMBlock], files: dict[str, int]) -> int:
    maps = {
        block.idstr: mmap.mmap(files[block.idstr], block.used_length, prot=mmap.PROT_READ)
        for block in blocks
    }
    try:
        return compare(
            target.guest, blocks, lambda name, start, length: maps[name][start : start + length]
        )
    finally:
        for mapped in maps.values():
            mapped.close()
