"""Placing: runs, scattered and single pages, repeats, host pages of many target pages."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from pathlib import Path

import numpy as np
import pytest

from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.messages import Pages
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.userfault import placing, syscalls
from postcopy_proto.userfault.backend import Backend
from postcopy_proto.userfault.descriptor import AlreadyPresentError, NoMemoryLeftError
from postcopy_proto.userfault.mapping import Backing, Mapping
from postcopy_proto.userfault.region import THIS_PROCESS, Region
from tests.userfault.support import COUNT, HUGE, PAGE, batch, content, faults, listening, touch

pytestmark = pytest.mark.userfault

MAP_HUGETLB, MAP_NORESERVE = 0x40000, 0x4000


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


def test_pages_behind_the_end_of_their_data(backend: Backend, region: Region) -> None:
    """Whatever lies behind it in this process is not the guest's to see."""
    short = memoryview(bytes(PAGE))
    for positions in ([1 << 20], [1], [0, 8]):
        offsets = np.arange(len(positions), dtype=np.uint64) * 3 * PAGE
        with pytest.raises(ValueError, match="after the batch's data"):
            backend.place(Pages("ram", offsets, np.array(positions, np.int64), short))
    assert not backend.received["ram"].any()


def test_an_empty_batch_is_nothing(backend: Backend) -> None:
    none = np.zeros(0, np.uint64)
    backend.place(Pages("ram", none, none.astype(np.int64), memoryview(b"")))


# ---- host pages bigger than target pages


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


@pytest.mark.hugetlb
def test_an_empty_pool_of_huge_pages_is_out_of_memory(huge_pages: int) -> None:
    """The kernel says EEXIST of a page that is not there: it must not count as received."""
    free = int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())
    size = (free + 2) * HUGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB | MAP_NORESERVE
    address = syscalls.map_memory(size, flags)
    mapping = Mapping(address, size, HUGE, Backing.HUGETLB, -1, 0)
    region = Region(RAMBlock("huge", size, HUGE), address, THIS_PROCESS, mapping)
    source = np.full(HUGE, 7, np.uint8)
    backend = listening(Backend([region], user_mode_only=True))
    page = source.__array_interface__["data"][0]
    for number in range(free):
        backend.place_page("huge", number * HUGE, page)
    with pytest.raises(NoMemoryLeftError, match=r"no free huge page.*nr_hugepages"):
        backend.place_page("huge", free * HUGE, page)
    assert backend.received["huge"].count() == free * HUGE // PAGE
    assert backend.stats.already_present == 0
    backend.cleanup()
    region.close()
