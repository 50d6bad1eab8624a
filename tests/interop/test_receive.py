"""A stock QEMU migrates into `postcopy receive`; what it wrote runs on in a stock QEMU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.interop.guest import MIB, Guest, assert_same_memory, assert_unbroken
from tests.interop.qemu import HUGEPAGE, Lab, Qemu, version_of
from tests.interop.receive import Receiver

pytestmark = pytest.mark.qemu

GUEST = Guest(fill_end=12 * MIB)


def postcopy(
    source: Qemu, address: str, *, precopy_first: bool = False, **capabilities: bool
) -> None:
    """What the operator does at the source: postcopy from the first page, or after one pass."""
    source.capabilities(postcopy_ram=True, **capabilities)
    # Slow, and with little downtime allowed, so that the source does not finish as precopy.
    source.parameters(max_bandwidth=5_000_000 if precopy_first else 100_000, downtime_limit=1)
    source.migrate(address)
    if precopy_first:
        deadline = time.monotonic() + 20
        while source.migration.get("ram", {}).get("dirty-sync-count", 0) < 2:
            assert time.monotonic() < deadline
    source.qmp.execute("migrate-start-postcopy")


def loads_and_goes_on(lab: Lab, source: Qemu, file: Path, **machine: Any) -> None:
    """The file loads in the same QEMU: memory is the source's, and the guest's count unbroken."""
    before = source.memory()
    paused = lab.start(
        source.binary, source.guest, incoming=f"exec:cat {file}", paused=True, **machine
    )
    paused.wait_migration("completed")
    assert_same_memory(paused.memory(), before)
    running = lab.start(source.binary, source.guest, incoming=f"exec:cat {file}", **machine)
    running.wait_letters(3)
    assert_unbroken(source.serial, running.serial)


@pytest.mark.userfault
@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_with_real_faults(lab: Lab, qemu_binary: str, transport: str, repeat: int) -> None:
    source = lab.start(qemu_binary, GUEST)
    source.wait_letters(2)
    file = lab.path("save")
    listen = "tcp:127.0.0.1:0" if transport == "tcp" else f"unix:{lab.path('s')}"
    receiver = Receiver.start(listen, file, "--touch", "200", "--seed", str(repeat))
    postcopy(source, receiver.address)
    result = receiver.result()
    assert source.wait_migration("completed") == "completed"
    assert result["completed"]
    assert result["machine"] == "pc-i440fx-5.2"
    assert result["requests"] > 0
    assert result["touched"] == 200
    assert sum(result["fault_latency_histogram"]) == result["faults"] > 0
    assert sum(thread["faults"] for thread in result["fault_threads"]) == result["faults"]
    assert result["discard_ranges"] > 0
    assert result["duplicates"] == 0
    assert result["blocks"]["pc.ram"]["length"] == 64 * MIB
    ram = result["blocks"]["pc.ram"]
    assert ram["pages"] + ram["zero_pages"] == 64 * MIB // 4096
    assert ram["pages"] >= 8 * MIB // 4096
    loads_and_goes_on(lab, source, file)


def test_into_a_file_alone(lab: Lab, qemu_binary: str, repeat: int) -> None:
    source = lab.start(qemu_binary, Guest(fill_end=6 * MIB))
    source.wait_letters(2)
    file = lab.path("save")
    receiver = Receiver.start(f"unix:{lab.path('s')}", file)
    postcopy(source, receiver.address, precopy_first=True)
    result = receiver.result()
    source.wait_migration("completed")
    assert result["switched_over"]
    loads_and_goes_on(lab, source, file)


@pytest.mark.userfault
@pytest.mark.qemu_versions((7, 1), (999,))
def test_a_source_with_a_preempt_channel(lab: Lab, qemu_binary: str, repeat: int) -> None:
    # Machine types up to 7.2 keep the protocol of that time: connect at once, EOS at the end.
    machine = "pc-i440fx-7.1" if version_of(qemu_binary)[0] == "7" else "pc-i440fx-8.0"
    source = lab.start(qemu_binary, GUEST, machine=machine)
    source.wait_letters(2)
    file = lab.path("save")
    receiver = Receiver.start(f"unix:{lab.path('s')}", file, "--touch", "100")
    postcopy(source, receiver.address, postcopy_preempt=True)
    result = receiver.result()
    source.wait_migration("completed")
    assert result["requests"] > 0
    assert result["duplicates"] == 0
    loads_and_goes_on(lab, source, file, machine=machine)


def test_a_source_that_never_switches(lab: Lab, qemu_binary: str, repeat: int) -> None:
    source = lab.start(qemu_binary, GUEST)
    source.wait_letters(2)
    file = lab.path("save")
    receiver = Receiver.start(f"unix:{lab.path('s')}", file)
    source.capabilities(postcopy_ram=bool(repeat % 2))
    source.parameters(max_bandwidth=1 << 30)
    source.migrate(receiver.address)
    result = receiver.result()
    source.wait_migration("completed")
    assert not result["switched_over"]
    loads_and_goes_on(lab, source, file)


@pytest.mark.hugetlb
@pytest.mark.usefixtures("hugepages")
def test_a_guest_on_huge_pages(lab: Lab, qemu_binary: str, repeat: int) -> None:
    source = lab.start(qemu_binary, GUEST, hugepages=True)
    source.wait_letters(2)
    file = lab.path("save")
    receiver = Receiver.start(f"unix:{lab.path('s')}", file, "--page-size", "m0=2M")
    postcopy(source, receiver.address)
    result = receiver.result()
    source.wait_migration("completed")
    assert result["blocks"]["m0"]["page_size"] == HUGEPAGE
    before = source.memory()
    source.kill()  # its huge pages are needed for the next one
    paused = lab.start(qemu_binary, GUEST, incoming=f"exec:cat {file}", paused=True, hugepages=True)
    paused.wait_migration("completed")
    assert_same_memory(paused.memory(), before)


def test_a_source_that_dies_leaves_no_file(lab: Lab, qemu_binary: str) -> None:
    source = lab.start(qemu_binary, GUEST)
    source.wait_letters(2)
    file = lab.path("save")
    receiver = Receiver.start(f"unix:{lab.path('s')}", file)
    source.parameters(max_bandwidth=100_000)
    source.migrate(receiver.address)
    time.sleep(0.5)
    source.kill()
    code, line = receiver.failure()
    assert code == 1
    assert line.startswith("postcopy: forward channel, offset 0x")
    assert "state" in line
    assert not file.exists()
    assert [path.name for path in lab.directory.iterdir() if "partial" in path.name] == []
