"""`Backend.answering`: faults answered from memory at hand."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.userfault import syscalls
from postcopy_proto.userfault.backend import Backend
from postcopy_proto.userfault.region import Region
from tests.userfault.support import COUNT, HUGE, PAGE, content, listening, touch

pytestmark = pytest.mark.userfault


def answer_until(answer: Callable[[], int], thread: threading.Thread) -> int:
    """Answers until that thread has its page; how many pages that took."""
    answered, deadline = 0, time.monotonic() + 10
    while thread.is_alive() and time.monotonic() < deadline:
        answered += answer()
    assert not thread.is_alive()
    return answered


def test_faults_answered_from_memory_at_hand(region: Region) -> None:
    """Two blocks, several threads, a page dropped by the guest, pages that were asked for."""
    other = Region.create(RAMBlock("other", COUNT * PAGE))
    pages = {name: content(region.block, seed, 0) for seed, name in ((64, "ram"), (65, "other"))}
    sources = {name: rows.__array_interface__["data"][0] for name, rows in pages.items()}
    backend = Backend([region, other], user_mode_only=True)
    backend.incoming_init()
    with pytest.raises(ValueError, match="enable_notify"):
        backend.answering(sources)
    listening(backend)
    with pytest.raises(ValueError, match="no source for other"):
        backend.answering({"ram": sources["ram"]})
    answer = backend.answering(sources)
    assert answer() == 0
    for number, owner in ((3, region), (40, other), (4, region)):
        assert answer_until(answer, touch(owner.address + number * PAGE + 8)) == 1
    assert len(backend.stats.waits_ns) == backend.stats.faults == 3
    assert backend.want("ram", 10 * PAGE, 2 * PAGE) == 2
    assert answer() == 2
    assert backend.want("ram", 0, 16 * PAGE) == 12, "3, 4, 10 and 11 are there"
    thread = touch(other.address + 41 * PAGE)
    assert answer_until(answer, thread) == 13
    assert region.read(0, 16 * PAGE) == pages["ram"][:16].tobytes()
    dropper = threading.Thread(target=lambda: region.mapping.discard(0, PAGE), daemon=True)
    dropper.start()
    answer_until(answer, dropper)
    answer_until(answer, touch(region.address))
    assert backend.stats.faults == 5, "a removal is no fault"
    assert backend.stats.removed == 1
    assert region.read(0, PAGE) == bytes(PAGE)
    # There already, though not through us: whoever waits is woken.
    address = sources["ram"]
    backend._descriptor().copy(region.address + 50 * PAGE, address, PAGE, wake=False)
    backend.want("ram", 50 * PAGE, PAGE)
    assert answer() == 1
    assert backend.stats.already_present == 1
    backend.cleanup()
    assert region.read(20 * PAGE, PAGE) == bytes(PAGE)
    other.close()
    with pytest.raises(ValueError, match="cleaned up"):
        answer()  # not a read of whatever has that number by now


def test_a_turn_ends_though_the_guest_goes_on_faulting() -> None:
    """On one CPU the guest is at its next fault by the time of the next read; others wait too."""
    count = 16 * COUNT
    region = Region.create(RAMBlock("ram", count * PAGE))
    pages = content(region.block, 70, 0)
    seen = np.zeros_like(pages)
    target = seen.__array_interface__["data"][0]
    backend = Backend([region], user_mode_only=True)
    answer = listening(backend).answering({"ram": pages.__array_interface__["data"][0]})
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        guest = threading.Thread(
            target=lambda: syscalls.memcpy(target, region.address, count * PAGE), daemon=True
        )
        guest.start()
        turns, deadline = [], time.monotonic() + 30
        while sum(turns) < count and time.monotonic() < deadline:
            turns.append(answer())
        guest.join(10)
    finally:
        os.sched_setaffinity(0, cpus)
    assert sum(turns) == count
    assert max(turns) <= 64, "a fault a read, and no more reads than that"
    backend.cleanup()
    assert (seen == pages).all()
    region.close()


def test_answers_are_traced(region: Region, caplog: pytest.LogCaptureFixture) -> None:
    pages = content(region.block, 68, 0)
    with caplog.at_level(logging.DEBUG, "postcopy_proto.trace"):
        backend = Backend([region], user_mode_only=True)
        listening(backend)
        answer = backend.answering({"ram": pages.__array_interface__["data"][0]})
        answer_until(answer, touch(region.address + 7 * PAGE))
        backend.place_page("ram", 8 * PAGE, pages.__array_interface__["data"][0])
    placed = [m for m in caplog.messages if m.startswith("postcopy_place_page ")]
    assert placed == [
        f"postcopy_place_page host={region.address + page * PAGE:#x} pages=1" for page in (7, 8)
    ]
    backend.cleanup()


def test_faults_kept_in_the_middle_of_a_placement_are_answered_too(
    backend: Backend, region: Region
) -> None:
    pages = content(region.block, 66, 0)
    listening(backend)
    answer = backend.answering({"ram": pages.__array_interface__["data"][0]})
    thread = touch(region.address + 9 * PAGE)
    deadline = time.monotonic() + 10
    while not backend._kept and time.monotonic() < deadline:
        backend._collect_events()
    assert thread.is_alive()
    assert answer_until(answer, thread) == 1
    assert backend.stats.faults == 1


@pytest.mark.hugetlb
def test_huge_pages_answered_from_memory_at_hand(
    huge_backend: tuple[Backend, Region],
) -> None:
    backend, region = huge_backend
    pages = content(region.block, 67, zero_fraction=0)
    answer = backend.answering({"huge": pages.__array_interface__["data"][0]})
    assert answer_until(answer, touch(region.address + HUGE + 5 * PAGE)) == 1
    assert backend.received["huge"].count() == HUGE // PAGE
    assert region.read(HUGE, HUGE) == pages[512:1024].tobytes()
