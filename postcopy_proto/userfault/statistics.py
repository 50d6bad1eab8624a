"""What a backend did, and how long faulting threads waited: QEMU's blocktime, per fault.

A wait begins when the fault's event is read (the kernel keeps no time of its own) and ends when
its page has been placed; where guest and handler share a CPU, the guest may run before the clock
is read. Times are nanoseconds inside, microseconds where they are shown.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

HISTOGRAM_BUCKETS = 32


@dataclass(slots=True)
class ThreadWaits:
    """The waits of one thread."""

    faults: int = 0
    total_ns: int = 0
    max_ns: int = 0


@dataclass(slots=True)
class FaultStatistics:
    """Counters of one backend from `enable_notify` to `cleanup`."""

    faults: int = 0
    """page fault events read"""
    requested: int = 0
    """host pages reported to the caller: asked for the first time"""
    woken: int = 0
    """faults on pages that had arrived meanwhile"""
    pages: int = 0
    """target pages that are there by placing, those that the kernel had already included"""
    zero_pages: int = 0
    """of these, placed as zero pages"""
    placements: int = 0
    """COPY and ZEROPAGE ioctls that placed something"""
    duplicates: int = 0
    """target pages that came again after they had been placed, and were dropped"""
    already_present: int = 0
    """host pages that the kernel had already (EEXIST)"""
    retries: int = 0
    """ioctls repeated after EAGAIN"""
    removed: int = 0
    """host pages that the guest itself dropped while being served"""
    zero_filled: int = 0
    """faults answered with zeros here: the guest dropped the page, or it came as a zero page in
    precopy, which leaves empty memory empty"""
    minor: int = 0
    """faults on pages that the owner's file has already (MINOR), let through"""
    write_protected: int = 0
    """faults on pages that the owner protected (WP), lifted"""
    unanswered: int = 0
    """faults whose page had not come by `cleanup`"""
    forks: int = 0
    """times that the guest's process forked"""
    unknown_events: int = 0
    """events of later kernels, skipped"""
    waits_ns: array[int] = field(default_factory=lambda: array("Q"))
    """every finished wait, in the order of its end"""
    waited_threads: array[int] = field(default_factory=lambda: array("L"))
    """for each of them the thread id, 0 where the kernel does not tell it"""

    def add_wait(self, thread_id: int, nanoseconds: int) -> None:
        """One fault was resolved."""
        self.waits_ns.append(nanoseconds)
        self.waited_threads.append(thread_id)

    @property
    def by_thread(self) -> dict[int, ThreadWaits]:
        """By thread id of the guest process, where the kernel tells it; counted when asked for."""
        threads: dict[int, ThreadWaits] = {}
        for thread_id, nanoseconds in zip(self.waited_threads, self.waits_ns, strict=True):
            if thread_id:
                thread = threads.setdefault(thread_id, ThreadWaits())
                thread.faults += 1
                thread.total_ns += nanoseconds
                thread.max_ns = max(thread.max_ns, nanoseconds)
        return threads

    def percentile_us(self, percent: float) -> float:
        """The wait that `percent` of all did not exceed, in µs; 0 when there was none."""
        if not self.waits_ns:
            return 0.0
        ordered = sorted(self.waits_ns)
        index = min(len(ordered) - 1, int(len(ordered) * percent / 100))
        return ordered[index] / 1000

    @property
    def max_us(self) -> float:
        """The longest wait in µs."""
        return max(self.waits_ns, default=0) / 1000

    def latency_us(self) -> dict[str, float]:
        """`p50`, `p99` and `max` in µs, to one decimal."""
        return {
            "p50": round(self.percentile_us(50), 1),
            "p99": round(self.percentile_us(99), 1),
            "max": round(self.max_us, 1),
        }

    def histogram(self) -> list[int]:
        """Waits by power of two: entry n counts those of [2**(n-1), 2**n) µs, entry 0 below 1.

        As long as its last entry that is not 0; the 32nd takes all that is longer. (The shape
        of QEMU's `postcopy-latency-dist`)
        """
        buckets = [0] * HISTOGRAM_BUCKETS
        for nanoseconds in self.waits_ns:
            buckets[min((nanoseconds // 1000).bit_length(), HISTOGRAM_BUCKETS - 1)] += 1
        while buckets and buckets[-1] == 0:
            buckets.pop()
        return buckets

    def document(self) -> dict[str, Any]:
        """The waits as `--json` prints them: `fault_latency_us`, `fault_latency_histogram` and
        `fault_threads`, the latter with what QEMU calls a vCPU's blocktime as `total_us`."""
        return {
            "fault_latency_us": self.latency_us(),
            "fault_latency_histogram": self.histogram(),
            "fault_threads": [
                {
                    "thread_id": thread_id,
                    "faults": waits.faults,
                    "total_us": round(waits.total_ns / 1000, 1),
                    "max_us": round(waits.max_ns / 1000, 1),
                }
                for thread_id, waits in sorted(self.by_thread.items())
            ],
        }
