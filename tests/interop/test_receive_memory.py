"""What `receive` holds in memory does not grow with the guest."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import pytest

from tests.interop.guest import MIB, Guest
from tests.interop.qemu import Lab
from tests.interop.receive import Receiver
from tests.interop.test_receive import postcopy

pytestmark = pytest.mark.qemu


def peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def descendants(pid: int) -> list[int]:
    listed = subprocess.run(
        ["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False
    ).stdout
    children = [int(child) for child in listed.split()]
    return children + [d for child in children for d in descendants(child)]


def watch(receiver: Receiver) -> tuple[dict[int, float], dict]:
    """Peak resident memory by process, and the result."""
    peaks: dict[int, float] = {}
    done = threading.Event()

    def look() -> None:
        pid = receiver.process.pid
        while not done.wait(0.02):
            for each in [pid, *descendants(pid)]:
                try:
                    peaks[each] = max(peaks.get(each, 0), peak_mib(each))
                except (OSError, StopIteration):
                    continue

    thread = threading.Thread(target=look)
    thread.start()
    try:
        return peaks, receiver.result()
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("memory_mib", [128, 2048])
def test_without_a_guest(lab: Lab, qemu_binary: str, memory_mib: int) -> None:
    guest = Guest(fill_end=memory_mib * MIB // 4)
    source = lab.start(qemu_binary, guest, memory_mib=memory_mib)
    source.wait_letters(1)
    receiver = Receiver.start(f"unix:{lab.path('s')}", lab.path("save"))
    source.capabilities(postcopy_ram=True)
    source.parameters(max_bandwidth=100_000, downtime_limit=1)
    source.migrate(receiver.address)
    source.qmp.execute("migrate-start-postcopy")
    peaks, result = watch(receiver)
    assert result["switched_over"]
    assert len(peaks) == 1
    assert sum(peaks.values()) < 200, peaks
    print(f"{memory_mib} MiB: peak {peaks}, {result['postcopy']}")


@pytest.mark.userfault
def test_with_a_guest(lab: Lab, qemu_binary: str) -> None:
    memory_mib = 512
    source = lab.start(qemu_binary, Guest(fill_end=256 * MIB), memory_mib=memory_mib)
    source.wait_letters(1)
    receiver = Receiver.start(f"unix:{lab.path('s')}", lab.path("save"), "--touch", "200")
    postcopy(source, receiver.address)
    peaks, result = watch(receiver)
    assert result["requests"] > 0
    assert len(peaks) == 2
    assert sum(peaks.values()) < memory_mib + 150, peaks
    print(f"{memory_mib} MiB with a guest: peaks {peaks}, {result['postcopy']}")
