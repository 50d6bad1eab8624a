"""Stock QEMU to stock QEMU: the harness itself, and what later tests take for granted."""

from __future__ import annotations

import numpy as np
import pytest

from tests.interop.guest import Guest, assert_same_memory, assert_unbroken
from tests.interop.qemu import HUGEPAGE, Lab

pytestmark = pytest.mark.qemu


def test_save_and_full_load(lab: Lab, qemu_binary: str) -> None:
    source = lab.start(qemu_binary)
    source.wait_letters(3)
    file = lab.path("save")
    source.save(file)
    before = source.memory()
    guest = source.guest
    filled = before.reshape(-1)[guest.fill_start : guest.fill_end].view(np.uint32)
    np.testing.assert_array_equal(filled, guest.fill_pattern())

    paused = lab.start(qemu_binary, incoming=f"exec:cat {file}", paused=True)
    paused.wait_migration("completed")
    assert_same_memory(paused.memory(), before)

    running = lab.start(qemu_binary, incoming=f"exec:cat {file}")
    running.wait_letters(3)
    assert_unbroken(source.serial, running.serial)


def test_postcopy_between_stock(lab: Lab, qemu_binary: str) -> None:
    address = f"unix:{lab.path('mig')}"
    source = lab.start(qemu_binary)
    destination = lab.start(qemu_binary, incoming="defer")
    source.wait_letters(3)
    for end in (source, destination):
        end.capabilities(postcopy_ram=True)
    destination.incoming(address)
    source.parameters(max_bandwidth=100_000, downtime_limit=1)
    source.migrate(address)
    source.qmp.execute("migrate-start-postcopy")
    source.wait_migration("completed")
    destination.wait_migration("completed")
    destination.wait_letters(3)
    assert_unbroken(source.serial, destination.serial)


@pytest.mark.hugetlb
@pytest.mark.usefixtures("hugepages")
def test_hugepage_guest(lab: Lab, qemu_binary: str) -> None:
    source = lab.start(qemu_binary, Guest(dirty_end=HUGEPAGE), hugepages=True)
    source.wait_letters(2)
    assert_unbroken(source.serial)


def test_unbroken_letters_are_checked() -> None:
    assert_unbroken(b"xRab", b"cd")
    for logs in ([b"Rab", b"d"], [b"Rab", b"bc"], [b"Rab!0010"], [b"ab"]):
        with pytest.raises(AssertionError):
            assert_unbroken(*logs)
