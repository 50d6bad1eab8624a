"""The backend over this process's own memory: placing, bookkeeping, refusals."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError, UserfaultError
from postcopy_proto.messages import Pages
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.userfault import placing, syscalls
from postcopy_proto.userfault.backend import Backend
from postcopy_proto.userfault.descriptor import AlreadyPresentError, NoMemoryLeftError
from postcopy_proto.userfault.loop import serve_faults
from postcopy_proto.userfault.mapping import Backing
from postcopy_proto.userfault.region import Region, ThisProcess
from tests.userfault.support import HUGE, PAGE, batch, content

pytestmark = pytest.mark.userfault

COUNT = 64


@pytest.fixture
def region() -> Iterator[Region]:
    made = Region.create(RAMBlock("ram", COUNT * PAGE))
    yield made
    made.close()


@pytest.fixture
def backend(region: Region) -> Iterator[Backend]:
    made = Backend([region], user_mode_only=True)
    made.incoming_init()
    yield made
    made.cleanup()


def listening(backend: Backend) -> Backend:
    backend.prepare_discard()
    backend.enable_notify()
    return backend


def touch(address: int) -> threading.Thread:
    word = ctypes.create_string_buffer(8)
    thread = threading.Thread(
        target=lambda: syscalls.memcpy(ctypes.addressof(word), address, 8), daemon=True
    )
    thread.start()
    return thread


def faults(backend: Backend, timeout: float = 10) -> list[tuple[str, int]]:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if found := backend.read_faults():
            return found
        time.sleep(0.001)
    raise AssertionError("no fault came")


# ---- placing


@pytest.mark.parametrize("stride", [PAGE, PAGE + 8], ids=["contiguous", "headers between"])
def test_batches_before_and_after_listen(
    backend: Backend, region: Region, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = content(region.block, 1), content(region.block, 2)
    backend.place(batch("ram", old, range(COUNT), stride))
    assert region.read(0, COUNT * PAGE) == old.tobytes()
    # Overwritten in precopy, zero pages over others included.
    backend.place(batch("ram", new, range(32), stride))
    assert region.read(0, 32 * PAGE) == new[:32].tobytes()
    backend.prepare_discard()
    backend.discard("ram", 16 * PAGE, 40 * PAGE)
    backend.enable_notify()
    backend.place(batch("ram", new, range(16, 56), stride))
    backend.cleanup()
    assert region.read(0, COUNT * PAGE) == np.concatenate([new[:56], old[56:]]).tobytes()


def test_a_contiguous_run_is_one_placement(backend: Backend, region: Region) -> None:
    pages = content(region.block, 3, zero_fraction=0)
    pages[32:48] = 0
    listening(backend).place(batch("ram", pages, range(COUNT)))
    assert backend.stats.placements == 3
    assert (backend.stats.pages, backend.stats.zero_pages) == (COUNT, 16)
    assert backend.received["ram"].all()


def test_runs_longer_than_the_staging_buffer() -> None:
    count = placing.STAGING_SIZE // PAGE * 2 + 5
    region = Region.create(RAMBlock("ram", count * PAGE))
    pages = content(region.block, 4, zero_fraction=0)
    backend = Backend([region], user_mode_only=True)
    backend.incoming_init()
    listening(backend).place(batch("ram", pages, range(count)))
    assert backend.stats.placements == 3
    backend.cleanup()
    assert region.read(0, count * PAGE) == pages.tobytes()
    region.close()


def test_pages_in_any_order_and_repeated(backend: Backend, region: Region) -> None:
    pages = content(region.block, 5)
    order = np.random.default_rng(5).integers(0, COUNT, 3 * COUNT).tolist()
    listening(backend).place(batch("ram", pages, order))
    assert backend.stats.duplicates == 3 * COUNT - len(set(order))
    assert [bool(bit) for bit in backend.received["ram"]] == [
        page in set(order) for page in range(COUNT)
    ]
    backend.cleanup()
    seen = np.frombuffer(region.read(0, COUNT * PAGE), np.uint8).reshape(-1, PAGE)
    assert (seen[order] == pages[order]).all()


def test_pages_that_are_there_already_are_counted_and_left(
    backend: Backend, region: Region
) -> None:
    """EEXIST: somebody else placed one; ours goes on behind it."""
    pages = content(region.block, 6, zero_fraction=0)
    listening(backend)
    libc_page = (ctypes.c_char * PAGE).from_buffer(bytearray(b"\x11" * PAGE))
    backend._descriptor().copy(region.address + 7 * PAGE, ctypes.addressof(libc_page), PAGE)
    backend.place(batch("ram", pages, range(COUNT)))
    assert backend.stats.already_present == 1
    assert backend.received["ram"].all()
    backend.cleanup()
    pages[7] = 0x11
    assert region.read(0, COUNT * PAGE) == pages.tobytes()


def test_scattered_pages_are_placed_by_themselves(backend: Backend, region: Region) -> None:
    """As they come after a precopy phase; also when some are there, and somebody waits for one."""
    pages = content(region.block, 61, zero_fraction=0)
    listening(backend)
    thread = touch(region.address + 6 * PAGE)
    assert faults(backend) == [("ram", 6 * PAGE)]
    backend.place(batch("ram", pages, range(0, COUNT, 2)))
    thread.join(10)
    assert not thread.is_alive()
    assert len(backend.stats.waits_ns) == 1
    assert (backend.stats.placements, backend.stats.pages) == (COUNT // 2, COUNT // 2)
    assert backend.received["ram"].to01() == "10" * (COUNT // 2)
    # One of these is there, though it was not placed by us; two have arrived before.
    byte = (ctypes.c_char * PAGE).from_buffer(bytearray(pages[9].tobytes()))
    backend._descriptor().copy(region.address + 9 * PAGE, ctypes.addressof(byte), PAGE)
    backend.place(batch("ram", pages, range(31, 0, -2)))
    assert backend.stats.already_present == 1
    backend.place(batch("ram", pages, [0, 31, *range(33, COUNT, 2)]))
    backend.place(batch("ram", pages, [*range(1, COUNT, 3)]))
    assert backend.stats.duplicates == 2 + len(range(1, COUNT, 3))
    assert backend.received["ram"].all()
    backend.cleanup()
    assert region.read(0, COUNT * PAGE) == pages.tobytes()


@pytest.mark.parametrize("seed", range(8))
def test_batches_of_any_shape_end_in_the_same_memory(region: Region, seed: int) -> None:
    """Scattered, contiguous and zero pages, some of them again, some there already."""
    rng = np.random.default_rng(seed)
    pages = content(region.block, seed, zero_fraction=[0, 0.1][seed % 2])
    address = pages.__array_interface__["data"][0]
    backend = Backend([region], user_mode_only=True)
    backend.incoming_init()
    listening(backend)
    sent = 0
    while not backend.received["ram"].all():
        count = int(rng.integers(1, 24))
        numbers = np.sort(rng.choice(COUNT, count, replace=False))
        if rng.random() < 0.5:
            rng.shuffle(numbers)
        if rng.random() < 0.3:
            number = int(rng.integers(COUNT))
            with contextlib.suppress(AlreadyPresentError):
                backend._descriptor().copy(
                    region.address + number * PAGE, address + number * PAGE, PAGE
                )
        backend.place(batch("ram", pages, numbers.tolist(), PAGE + 8 * int(rng.integers(3))))
        sent += count
    stats = backend.stats
    assert stats.pages == COUNT
    assert stats.pages + stats.duplicates == sent
    backend.cleanup()
    assert region.read(0, COUNT * PAGE) == pages.tobytes()


def test_single_pages(backend: Backend, region: Region) -> None:
    """`place_page`: content, zeros, a page that came before, one that the kernel has."""
    pages = content(region.block, 62, zero_fraction=0)
    address = pages.__array_interface__["data"][0]
    with pytest.raises(ValueError, match="enable_notify"):
        backend.place_page("ram", 0, address)
    listening(backend)
    thread = touch(region.address + 5 * PAGE)
    assert faults(backend) == [("ram", 5 * PAGE)]
    backend.place_page("ram", 5 * PAGE, address + 5 * PAGE)
    thread.join(10)
    assert not thread.is_alive()
    assert len(backend.stats.waits_ns) == 1
    backend.place_page("ram", 5 * PAGE, address)
    assert backend.stats.duplicates == 1
    backend._descriptor().copy(region.address + PAGE, address + PAGE, PAGE)
    backend.place_page("ram", PAGE, address)
    assert backend.stats.already_present == 1
    backend.place_page("ram", 2 * PAGE, None)
    assert (backend.stats.pages, backend.stats.zero_pages) == (3, 1)
    for offset in (1, -PAGE, COUNT * PAGE, 3 * PAGE + 8):
        with pytest.raises(RemoteProtocolError, match="no host page") as caught:
            backend.place_page("ram", offset, address)
        assert caught.value.kind is ErrorKind.RANGE
    with pytest.raises(RemoteProtocolError, match="no RAMBlock") as caught:
        backend.place_page("other", 0, address)
    assert caught.value.kind is ErrorKind.UNKNOWN
    backend.cleanup()
    expected = np.zeros_like(pages)
    expected[[1, 5]] = pages[[1, 5]]
    assert region.read(0, COUNT * PAGE) == expected.tobytes()


def test_batches_of_one(backend: Backend, region: Region) -> None:
    """Content, and a zero page that comes without any data."""
    pages = content(region.block, 69, zero_fraction=0)
    listening(backend)
    nothing = np.array([-1], np.int64)
    backend.place(Pages("ram", np.array([PAGE], np.uint64), nothing, memoryview(b"")))
    backend.place(batch("ram", pages, [2]))
    assert (backend.stats.pages, backend.stats.zero_pages, backend.stats.placements) == (2, 1, 2)
    torn = Pages("ram", np.array([0], np.uint64), np.zeros(1, np.int64), memoryview(bytes(9)))
    with pytest.raises(ValueError, match="after the batch's data"):
        backend.place(torn)
    backend.cleanup()
    assert region.read(0, 3 * PAGE) == bytes(2 * PAGE) + pages[2].tobytes()


def test_an_empty_batch_is_nothing(backend: Backend) -> None:
    none = np.zeros(0, np.uint64)
    backend.place(Pages("ram", none, none.astype(np.int64), memoryview(b"")))


# ---- faults


def test_a_fault_is_reported_once_and_ends_with_its_page(backend: Backend, region: Region) -> None:
    pages = content(region.block, 7, zero_fraction=0)
    listening(backend)
    threads = [touch(region.address + 3 * PAGE + 100)]
    assert faults(backend) == [("ram", 3 * PAGE)]
    threads.append(touch(region.address + 3 * PAGE + 200))
    deadline = time.monotonic() + 10
    while backend.stats.faults < 2 and time.monotonic() < deadline:
        assert backend.read_faults() == []
    backend.place(batch("ram", pages, [3]))
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert backend.stats.requested == 1
    assert len(backend.stats.waits_ns) == 2
    assert set(backend.stats.by_thread) == {thread.native_id for thread in threads}
    assert sum(backend.stats.histogram()) == 2
    latency = backend.stats.latency_us()
    assert 0 < latency["p50"] <= latency["p99"] <= latency["max"]


def test_a_zero_page_of_precopy_is_no_fault_to_ask_for(backend: Backend, region: Region) -> None:
    """It leaves empty memory empty, so that its touch faults; but it has been received."""
    pages = np.zeros((COUNT, PAGE), np.uint8)
    backend.place(batch("ram", pages, range(COUNT)))
    listening(backend)
    thread = touch(region.address + 5 * PAGE)
    while thread.is_alive():
        assert backend.read_faults() == []
    assert backend.stats.zero_filled == 1


def test_a_fault_outside_all_regions_is_an_error_that_names_it(backend: Backend) -> None:
    listening(backend)
    stray = syscalls.map_memory(PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    backend._descriptor().register(stray, PAGE)
    thread = touch(stray)
    with pytest.raises(UserfaultError, match=f"{stray:#x} is in no RAMBlock"):
        faults(backend)
    backend._descriptor().unregister(stray, PAGE)
    thread.join(10)
    syscalls.unmap_memory(stray, PAGE)


@pytest.mark.parametrize("backing", [Backing.ANONYMOUS, Backing.SHARED])
def test_pages_that_the_guest_drops_are_zero_from_then_on(backing: Backing) -> None:
    """REMOVE while serving: never the source's old bytes, and nobody is asked for them."""
    region = Region.create(RAMBlock("ram", COUNT * PAGE), backing)
    pages = content(region.block, 8, zero_fraction=0)
    backend = Backend([region], user_mode_only=True)
    backend.incoming_init()
    listening(backend)
    backend.place(batch("ram", pages, range(8)))
    dropper = threading.Thread(target=lambda: region.mapping.discard(4 * PAGE, 8 * PAGE))
    dropper.start()
    # The event waits: placing has to read it first (EAGAIN), and must not place over it.
    time.sleep(0.05)
    assert dropper.is_alive()
    backend.place(batch("ram", pages, range(8, 16)))
    dropper.join(10)
    assert backend.stats.removed == 8
    assert backend.stats.retries >= 1
    thread = touch(region.address + 5 * PAGE)
    while thread.is_alive():
        assert backend.read_faults() == []
    backend.cleanup()
    pages[4:12] = 0
    assert region.read(0, 16 * PAGE) == pages[:16].tobytes()
    region.close()


def test_a_waiting_thread_gets_zeros_when_its_page_is_dropped(
    backend: Backend, region: Region
) -> None:
    listening(backend)
    thread = touch(region.address)
    assert faults(backend) == [("ram", 0)]
    dropper = threading.Thread(target=lambda: region.mapping.discard(0, PAGE), daemon=True)
    dropper.start()
    while thread.is_alive() or dropper.is_alive():
        assert backend.read_faults() == []
    assert len(backend.stats.waits_ns) >= 1


def test_memory_that_the_guest_unmaps_is_asked_for_no_more(region: Region) -> None:
    gone = Region.create(RAMBlock("gone", 8 * PAGE))
    backend = Backend([region, gone], user_mode_only=True)
    backend.enable_notify()
    assert backend.want("gone", 0, PAGE) == 1
    assert backend.read_faults() == [("gone", 0)]
    unmapper = threading.Thread(target=gone.close, daemon=True)
    unmapper.start()
    while unmapper.is_alive():
        assert backend.read_faults() == []
    # Its pages may still be on their way; they are dropped.
    backend.place(batch("gone", content(RAMBlock("gone", 8 * PAGE), 1, 0), range(8)))
    assert backend.stats.pages == 0
    assert backend.stats.duplicates == 8
    backend.cleanup()
    assert region.read(0, PAGE) == bytes(PAGE)


def test_the_fault_loop_quits_before_it_serves(backend: Backend, region: Region) -> None:
    pages = content(region.block, 9, zero_fraction=0)
    listening(backend)
    quit_fd = os.eventfd(0)
    served: list[tuple[str, int]] = []

    def request(wanted: list[tuple[str, int]]) -> None:
        served.extend(wanted)
        for idstr, offset in wanted:
            backend.place(batch(idstr, pages, [offset // PAGE]))

    loop = threading.Thread(target=serve_faults, args=(backend, request, quit_fd))
    loop.start()
    touch(region.address + PAGE).join(10)
    assert served == [("ram", PAGE)]
    os.eventfd_write(quit_fd, 1)
    loop.join(10)
    assert not loop.is_alive()
    waits = touch(region.address)
    serve_faults(backend, request, quit_fd)
    assert len(served) == 1
    backend.cleanup()
    waits.join(10)
    os.close(quit_fd)


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
    with pytest.raises(UserfaultError, match="Bad file descriptor"):
        answer()  # not a read of whatever has that number by now


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


# ---- host pages bigger than target pages


@pytest.fixture
def huge_backend(huge_pages: int) -> Iterator[tuple[Backend, Region]]:
    region = Region.create(RAMBlock("huge", 4 * HUGE, HUGE), Backing.HUGETLB)
    backend = Backend([region], user_mode_only=True)
    backend.incoming_init()
    listening(backend)
    yield backend, region
    backend.cleanup()
    region.close()


@pytest.mark.hugetlb
def test_a_huge_page_is_placed_when_its_last_page_has_come(
    huge_backend: tuple[Backend, Region],
) -> None:
    backend, region = huge_backend
    pages = content(region.block, 10)
    pages[512:1024] = 0
    thread = touch(region.address + 5 * PAGE)
    assert faults(backend) == [("huge", 0)]
    backend.place(batch("huge", pages, range(100)))
    backend.place(batch("huge", pages, range(100, 511)))
    assert thread.is_alive()
    assert backend.stats.placements == 0
    assert not backend.received["huge"].any()
    backend.place(batch("huge", pages, [511]))
    thread.join(10)
    assert not thread.is_alive()
    # One batch that ends one huge page, holds an all-zero one and begins the next.
    backend.place(batch("huge", pages, range(512, 1600)))
    backend.place(batch("huge", pages, range(1600, 2048)))
    assert backend.stats.placements == 4
    assert backend.stats.zero_pages == 512
    assert backend.received["huge"].all()
    backend.cleanup()
    assert region.read(0, 4 * HUGE) == pages.tobytes()


@pytest.mark.hugetlb
def test_single_huge_pages(huge_backend: tuple[Backend, Region]) -> None:
    backend, region = huge_backend
    pages = content(region.block, 63, zero_fraction=0)
    address = pages.__array_interface__["data"][0]
    backend.place_page("huge", HUGE, address + HUGE)
    backend.place_page("huge", 0, None)
    with pytest.raises(RemoteProtocolError, match="no host page"):
        backend.place_page("huge", 2 * HUGE + PAGE, address)
    assert backend.received["huge"].count() == 2 * HUGE // PAGE
    assert region.read(0, 2 * HUGE) == bytes(HUGE) + pages[512:1024].tobytes()


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


@pytest.mark.hugetlb
def test_channels_collect_huge_pages_of_their_own(
    huge_backend: tuple[Backend, Region],
) -> None:
    backend, region = huge_backend
    pages = content(region.block, 11, zero_fraction=0)
    backend.place(batch("huge", pages, range(300)))
    backend.place(batch("huge", pages, range(512, 1024)), Channel.PREEMPT)
    backend.place(batch("huge", pages, range(300, 512)))
    assert backend.received["huge"].count() == 1024
    assert backend.received["huge"][:1024].all()


@pytest.mark.hugetlb
@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ([*range(10), 600], "was incomplete"),
        ([*range(10), 3], "came twice"),
    ],
)
def test_pages_of_a_huge_page_come_together_and_once(
    huge_backend: tuple[Backend, Region], numbers: list[int], reason: str
) -> None:
    backend, region = huge_backend
    pages = content(region.block, 12, zero_fraction=0)
    with pytest.raises(RemoteProtocolError, match=reason) as caught:
        backend.place(batch("huge", pages, numbers), Channel.PREEMPT)
    assert caught.value.kind is ErrorKind.MALFORMED
    assert caught.value.channel is Channel.PREEMPT
    assert caught.value.message == "PAGE"
    assert not backend.received["huge"].any()


def test_a_hole_punched_through_the_file_reads_as_zeros_too() -> None:
    """No event tells of it, but the next touch faults on a page that has been received."""
    region = Region.create(RAMBlock("ram", COUNT * PAGE), Backing.MEMFD)
    pages = content(region.block, 8, zero_fraction=0)
    backend = Backend([region], user_mode_only=True)
    backend.incoming_init()
    listening(backend).place(batch("ram", pages, range(COUNT)))
    region.mapping.discard(4 * PAGE, PAGE)
    thread = touch(region.address + 4 * PAGE)
    while thread.is_alive():
        assert backend.read_faults() == []
    assert backend.stats.zero_filled == 1
    backend.cleanup()
    pages[4] = 0
    assert region.read(0, COUNT * PAGE) == pages.tobytes()
    region.close()


def test_when_memory_runs_out_it_ends_with_advice(tmp_path: Path) -> None:
    """A tmpfs of 8 pages holds the memory of 16: the kernel says ENOSPC or ENOMEM."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "ram", tmp_path]).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        with open(tmp_path / "ram", "w+b") as file:
            file.truncate(16 * PAGE)
            region = Region.of_file(RAMBlock("ram", 16 * PAGE), file.fileno())
            pages = content(region.block, 13, zero_fraction=0)
            backend = Backend([region], user_mode_only=True)
            backend.incoming_init()
            listening(backend)
            with pytest.raises(NoMemoryLeftError, match=r"nr_hugepages or|memory cgroup") as caught:
                backend.place(batch("ram", pages, range(16)))
            assert caught.value.errno in (errno.ENOSPC, errno.ENOMEM)
            assert backend.received["ram"].count() < 16
            backend.cleanup()
            region.close()
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


# ---- bad input


def page_at(offset: int, block: str = "ram", size: int = PAGE) -> Pages:
    data = memoryview(bytes(size))
    return Pages(block, np.array([offset], np.uint64), np.array([0]), data, page_size=size)


@pytest.mark.parametrize("when", ["precopy", "postcopy"])
@pytest.mark.parametrize(
    ("pages", "kind"),
    [
        (page_at(0, "nobody"), ErrorKind.UNKNOWN),
        (page_at(COUNT * PAGE), ErrorKind.RANGE),
        (page_at(COUNT * PAGE - 1), ErrorKind.RANGE),
        (page_at(2**64 - PAGE), ErrorKind.RANGE),
        (page_at(8), ErrorKind.RANGE),
        (page_at(0, size=2 * PAGE), ErrorKind.RANGE),
        (
            Pages(
                "ram", np.array([0, 2**63], np.uint64), np.array([0, 0]), memoryview(bytes(PAGE))
            ),
            ErrorKind.RANGE,
        ),
    ],
    ids=["block", "past the end", "across the end", "far", "misaligned", "size", "one of two"],
)
def test_bad_pages_are_refused_and_nothing_is_placed(
    backend: Backend, region: Region, pages: Pages, kind: ErrorKind, when: str
) -> None:
    if when == "postcopy":
        listening(backend)
    with pytest.raises(RemoteProtocolError) as caught:
        backend.place(pages)
    assert caught.value.kind is kind
    assert caught.value.message == "PAGE"
    assert caught.value.channel is Channel.FORWARD
    assert not backend.received["ram"].any()


@pytest.mark.parametrize(
    ("start", "length"),
    [(8, PAGE), (0, 8), (COUNT * PAGE, PAGE), (0, (COUNT + 1) * PAGE), (2**64 - PAGE, 2 * PAGE)],
)
def test_bad_discards_are_refused_and_nothing_is_dropped(
    backend: Backend, region: Region, start: int, length: int
) -> None:
    pages = content(region.block, 14)
    backend.place(batch("ram", pages, range(COUNT)))
    with pytest.raises(RemoteProtocolError) as caught:
        backend.discard("ram", start, length)
    assert caught.value.kind is ErrorKind.RANGE
    assert backend.received["ram"].all()
    assert region.read(0, COUNT * PAGE) == pages.tobytes()


def test_discards_of_unknown_blocks_and_after_listen(backend: Backend) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        backend.discard("nobody", 0, PAGE)
    assert caught.value.kind is ErrorKind.UNKNOWN
    listening(backend)
    with pytest.raises(RemoteProtocolError, match="after LISTEN") as caught:
        backend.discard("ram", 0, PAGE)
    assert caught.value.kind is ErrorKind.STATE
    assert caught.value.message == "POSTCOPY_RAM_DISCARD"


def test_calls_out_of_order(region: Region) -> None:
    backend = Backend([region], user_mode_only=True)
    with pytest.raises(ValueError, match="enable_notify"):
        backend.fileno()
    with pytest.raises(ValueError, match="enable_notify"):
        backend.read_faults()
    backend.enable_notify()
    with pytest.raises(ValueError, match="already"):
        backend.enable_notify()
    backend.cleanup()
    backend.cleanup()
    with pytest.raises(ValueError, match="cleaned up"):
        backend.place(page_at(0))
    with pytest.raises(ValueError, match="cleaned up"):
        backend.enable_notify()
    with pytest.raises(ValueError, match="outside"):
        backend.missing("ram", 0, (COUNT + 1) * PAGE)


def test_regions_that_do_not_go_together(region: Region) -> None:
    with pytest.raises(ValueError, match="at least one"):
        Backend([])
    with pytest.raises(ValueError, match="one name"):
        Backend([region, region])
    other = Region(RAMBlock("other", PAGE), region.address, ThisProcess())
    with pytest.raises(ValueError, match="one owner"):
        Backend([region, other])
    with pytest.raises(ValueError, match="target pages"):
        Backend([region], target_page_size=2 * PAGE)


def test_what_was_opened_is_closed_when_a_block_cannot_be_registered(region: Region) -> None:
    gone = Region.create(RAMBlock("gone", PAGE))
    backend = Backend([region, gone], user_mode_only=True)
    gone.close()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(UserfaultError, match="UFFDIO_REGISTER"):
        backend.enable_notify()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert not backend.listening
    assert region.read(0, 1) == b"\0"


# ---- the rest of the model


def test_other_discarders_are_inhibited_while_listening(region: Region) -> None:
    calls: list[bool] = []
    backend = Backend([region], user_mode_only=True, inhibit_discards=calls.append)
    backend.incoming_init()
    assert calls == []
    backend.enable_notify()
    assert calls == [True]
    backend.cleanup()
    assert calls == [True, False]


def test_trace_points_have_qemus_names(region: Region, caplog: pytest.LogCaptureFixture) -> None:
    pages = content(region.block, 15, zero_fraction=0)
    pages[1] = 0
    with caplog.at_level(logging.DEBUG, logger="postcopy_proto.trace"):
        backend = Backend([region], user_mode_only=True)
        backend.incoming_init()
        backend.prepare_discard()
        backend.discard("ram", 0, PAGE)
        backend.enable_notify()
        thread = touch(region.address)
        faults(backend)
        backend.place(batch("ram", pages, [0, 1]))
        thread.join(10)
        quit_fd = os.eventfd(1)
        serve_faults(backend, lambda _: None, quit_fd)
        os.close(quit_fd)
        backend.cleanup()
    where = f"{region.address:#x}"
    assert [record.getMessage() for record in caplog.records] == [
        f"postcopy_init_range ram: {where} offset=0x0 length=0x40000",
        f"postcopy_nhp_range ram: {where} offset=0x0 length=0x40000",
        f"postcopy_ram_discard_range ram: start={where} length=0x1000",
        "postcopy_ram_enable_notify",
        f"postcopy_ram_fault_thread_request Request for HVA={where} rb=ram offset=0x0",
        f"postcopy_place_page host={where} pages=1",
        f"postcopy_place_page_zero host={region.address + PAGE:#x} pages=1",
        "postcopy_ram_fault_thread_entry",
        "postcopy_ram_fault_thread_quit",
        "postcopy_ram_fault_thread_exit",
        "postcopy_ram_incoming_cleanup_entry",
        f"postcopy_cleanup_range ram: {where} offset=0x0 length=0x40000",
        "postcopy_ram_incoming_cleanup_join",
        "postcopy_ram_incoming_cleanup_closeuf",
        "postcopy_ram_incoming_cleanup_exit",
    ]


def test_init_empties_memory_that_was_not(region: Region) -> None:
    ctypes.memset(region.address, 0x55, COUNT * PAGE)
    backend = Backend([region], user_mode_only=True)
    backend.incoming_init()
    backend.enable_notify()
    thread = touch(region.address)
    assert faults(backend) == [("ram", 0)]
    backend.cleanup()
    thread.join(10)
