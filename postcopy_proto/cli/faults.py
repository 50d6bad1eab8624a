"""What `receive` and `demo` say alike of faults that were waited for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from postcopy_proto.cli import output

if TYPE_CHECKING:
    from postcopy_proto.userfault.statistics import FaultStatistics

FEW_THREADS = 16
"""Threads told one by one."""


def print_waits(faults: FaultStatistics) -> None:
    """How long faulting threads waited, as a histogram, and which of them, where there are some."""
    counts = faults.histogram()
    first = next((number for number, count in enumerate(counts) if count), 0)
    rows = [(1 << number, count) for number, count in enumerate(counts) if number >= first]
    output.print_histogram("how long faulting threads waited", "faults", rows)
    threads = sorted(faults.by_thread.items())
    if 1 < len(threads) <= FEW_THREADS:
        output.print_table(
            "by thread",
            ("thread", "faults", "waited, us", "longest, us"),
            [
                (
                    thread_id,
                    f"{waits.faults:,}",
                    f"{waits.total_ns / 1000:,.0f}",
                    f"{waits.max_ns / 1000:,.0f}",
                )
                for thread_id, waits in threads
            ],
            right=(0, 1, 2, 3),
        )
