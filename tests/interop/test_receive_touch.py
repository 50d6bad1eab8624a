"""`postcopy receive --touch` of a guest on huge pages, and where the process is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.interop.guest import MIB, Guest, assert_same_memory
from tests.interop.qemu import HUGEPAGE, Lab, wait_until
from tests.interop.receive import Receiver

pytestmark = [pytest.mark.qemu, pytest.mark.userfault]

GUEST = Guest(fill_end=24 * MIB)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.hugetlb
@pytest.mark.usefixtures("hugepages")
@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_real_faults_on_huge_pages(lab: Lab, qemu_binary: str, transport: str, repeat: int) -> None:
    source = lab.start(qemu_binary, GUEST, hugepages=True)
    source.wait_letters(2)
    file = lab.path("save")
    listen = "tcp:127.0.0.1:0" if transport == "tcp" else f"unix:{lab.path('s')}"
    options = ["--touch", "200", "--seed", str(repeat), "--page-size", "m0=2M"]
    receiver = Receiver.start(listen, file, *options)
    source.capabilities(postcopy_ram=True)
    # Slow up to the switchover, so that most pages are still at the source by then.
    source.parameters(max_bandwidth=100_000, downtime_limit=1)
    source.migrate(receiver.address)
    source.qmp.execute("migrate-start-postcopy")
    result = receiver.result()
    source.wait_migration("completed")
    assert result["blocks"]["m0"]["page_size"] == HUGEPAGE
    assert result["touched"] == 200
    assert result["requests"] > 0
    assert result["duplicates"] == 0
    before = source.memory()
    source.kill()  # its huge pages are needed for the next one
    paused = lab.start(qemu_binary, GUEST, incoming=f"exec:cat {file}", paused=True, hugepages=True)
    paused.wait_migration("completed")
    assert_same_memory(paused.memory(), before)


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_the_guest_process_is_killed(lab: Lab, qemu_binary: str, seconds: float) -> None:
    source = lab.start(qemu_binary, GUEST)
    source.wait_letters(1)
    file = lab.path("save")
    receiver = Receiver.start(f"unix:{lab.path('s')}", file, "--touch", "200")
    source.capabilities(postcopy_ram=True)
    # 24 MiB at this rate take longer than we wait before the signal.
    source.parameters(max_bandwidth=100_000, downtime_limit=1, max_postcopy_bandwidth=4_000_000)
    source.migrate(receiver.address)
    source.qmp.execute("migrate-start-postcopy")
    (guest,) = wait_until(lambda: children(receiver.process.pid), 20, "the guest process")
    if seconds:
        source.wait_migration("postcopy-active")
        with pytest.raises(AssertionError, match="waited"):
            wait_until(lambda: receiver.process.poll() is not None, seconds, "an early end")
    os.kill(guest, signal.SIGKILL)
    code, line = receiver.failure(timeout=30)
    assert code == 1
    assert "killed by SIGKILL" in line
    assert [path.name for path in lab.directory.iterdir() if path.name.startswith("save.p")] == []
    assert not file.exists()
