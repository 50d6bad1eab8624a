"""The resolvers on every sort of memory: whom they wake, and what they say when it runs out."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from postcopy_proto.errors import UserfaultError
from postcopy_proto.userfault import syscalls
from postcopy_proto.userfault.abi import Features, Ioctls, RegisterMode
from postcopy_proto.userfault.descriptor import (
    AlreadyPresentError,
    NoMemoryLeftError,
    PageFault,
    ResolveError,
    Userfaultfd,
    available_features,
)
from postcopy_proto.userfault.mapping import Backing, Mapping
from tests.userfault.support import HUGE, PAGE, ROOT
from tests.userfault.test_descriptor import Toucher, next_event, source

pytestmark = pytest.mark.userfault

PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
HUGETLB, NORESERVE = 0x40000, 0x4000
FREE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")


def needs(features: Features) -> None:
    if missing := features & ~available_features():
        pytest.skip(f"this kernel has no {missing.name}")


@pytest.fixture
def huge_source() -> Iterator[int]:
    """2 MiB full of sevens, present."""
    address = syscalls.map_memory(HUGE, PRIVATE)
    ctypes.memset(address, 7, HUGE)
    yield address
    syscalls.unmap_memory(address, HUGE)


def waits(toucher: Toucher) -> bool:
    toucher.join(0.05)
    return toucher.is_alive()


# ---- without a wake


def test_a_page_that_was_continued_without_wake() -> None:
    needs(Features.MINOR_SHMEM)
    first = Mapping.create(PAGE, PAGE, Backing.MEMFD)
    second = Mapping.of_file(first.fd, 0, PAGE, PAGE)
    syscalls.memcpy(first.address, source(3), PAGE)
    with Userfaultfd.open(Features.MINOR_SHMEM, user_mode_only=True) as uffd:
        uffd.register(second.address, PAGE, RegisterMode.MINOR)
        toucher = Toucher(second.address)
        next_event(uffd)
        assert uffd.continue_(second.address, PAGE, wake=False) == PAGE
        assert waits(toucher)
        uffd.wake(second.address, PAGE)
        assert toucher.finish() == b"\x03" * 8
    first.close()
    second.close()


def test_a_page_that_was_poisoned_without_wake() -> None:
    needs(Features.POISON)
    code = """
import time
from postcopy_proto.userfault import Features, Userfaultfd
from postcopy_proto.userfault.mapping import Mapping
from tests.userfault.test_descriptor import Toucher, next_event
mapping = Mapping.create(4096, 4096)
uffd = Userfaultfd.open(Features.POISON, user_mode_only=True)
uffd.register(mapping.address, 4096)
toucher = Toucher(mapping.address)
next_event(uffd)
assert uffd.poison(mapping.address, 4096, wake=False) == 4096
toucher.join(0.05)
print("waits" if toucher.is_alive() else "went on", flush=True)
uffd.wake(mapping.address, 4096)
toucher.join(10)
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    assert result.stdout == "waits\n", result.stderr
    assert result.returncode == -signal.SIGBUS


def test_pages_that_were_moved_without_wake() -> None:
    needs(Features.MOVE)
    memory = Mapping.create(2 * PAGE, PAGE)
    other = syscalls.map_memory(2 * PAGE, PRIVATE)
    syscalls.memcpy(other, source(5, 2), 2 * PAGE)
    with Userfaultfd.open(Features.MOVE, user_mode_only=True) as uffd:
        uffd.register(memory.address, memory.length)
        toucher = Toucher(memory.address)
        next_event(uffd)
        assert uffd.move(memory.address, other, 2 * PAGE, wake=False) == 2 * PAGE
        assert waits(toucher)
        uffd.wake(memory.address, 2 * PAGE)
        assert toucher.finish() == b"\x05" * 8
    syscalls.unmap_memory(other, 2 * PAGE)
    memory.close()


# ---- write protection and minor faults, where pages are shared or huge


def check_write_protection(memory: Mapping, page: int, from_: int) -> None:
    """Copied write-protected, written to, protected again."""
    wanted = Features.PAGEFAULT_FLAG_WP | Features.WP_HUGETLBFS_SHMEM
    needs(wanted)
    with Userfaultfd.open(wanted, user_mode_only=True) as uffd:
        modes = RegisterMode.MISSING | RegisterMode.WP
        assert uffd.register(memory.address, memory.length, modes) & Ioctls.WRITEPROTECT
        uffd.copy(memory.address, from_, page, write_protect=True)
        toucher = Toucher(memory.address + 64, write=True)
        event = next_event(uffd)
        assert isinstance(event, PageFault)
        assert event.flags == 3
        assert waits(toucher)
        uffd.write_protect(memory.address, page, protect=False)
        toucher.finish()
        assert ctypes.string_at(memory.address + 56, 24) == b"\x07" * 8 + bytes(8) + b"\x07" * 8
        uffd.write_protect(memory.address, page)
        toucher = Toucher(memory.address, write=True)
        event = next_event(uffd)
        assert isinstance(event, PageFault)
        assert event.flags == 3
        uffd.write_protect(memory.address, page, protect=False)
        toucher.finish()


@pytest.mark.parametrize("backing", [Backing.SHARED, Backing.MEMFD])
def test_write_protection_of_shared_memory(backing: Backing) -> None:
    memory = Mapping.create(4 * PAGE, PAGE, backing)
    check_write_protection(memory, PAGE, source(7))
    memory.close()


@pytest.mark.hugetlb
def test_write_protection_of_huge_pages(huge_pages: int, huge_source: int) -> None:
    memory = Mapping.create(2 * HUGE, HUGE, Backing.HUGETLB)
    check_write_protection(memory, HUGE, huge_source)
    memory.close()


@pytest.mark.hugetlb
def test_a_minor_fault_on_a_huge_page_is_continued(huge_pages: int, huge_source: int) -> None:
    needs(Features.MINOR_HUGETLBFS)
    first = Mapping.create(2 * HUGE, HUGE, Backing.HUGETLB)
    second = Mapping.of_file(first.fd, 0, first.length, HUGE)
    syscalls.memcpy(first.address, huge_source, HUGE)
    with Userfaultfd.open(Features.MINOR_HUGETLBFS, user_mode_only=True) as uffd:
        offered = uffd.register(second.address, second.length, RegisterMode.MINOR)
        assert offered & Ioctls.CONTINUE
        toucher = Toucher(second.address + HUGE - 8)
        event = next_event(uffd)
        assert isinstance(event, PageFault)
        assert event.flags == 4
        assert uffd.continue_(second.address, HUGE) == HUGE
        assert toucher.finish() == b"\x07" * 8
        with pytest.raises(AlreadyPresentError):
            uffd.continue_(second.address, HUGE)
    first.close()
    second.close()


# ---- when memory runs out


@pytest.mark.hugetlb
def test_an_empty_pool_of_huge_pages(huge_pages: int, huge_source: int) -> None:
    """The real pool, emptied by pages without a reservation."""
    count = huge_pages + 1
    memory = syscalls.map_memory(count * HUGE, PRIVATE | HUGETLB | NORESERVE)
    untouched = syscalls.map_memory(HUGE, PRIVATE)
    with Userfaultfd.open(user_mode_only=True) as uffd:
        uffd.register(memory, count * HUGE)
        placed = 0
        while int(FREE.read_text()):
            uffd.copy(memory + placed * HUGE, huge_source, HUGE)
            placed += 1
        # Nothing is there: it is the pool that is empty, and the kernel's EEXIST says so too.
        with pytest.raises(AlreadyPresentError) as full:
            uffd.copy(memory + placed * HUGE, huge_source, HUGE)
        assert full.value.done == 0
        # With one page free a source that is not in memory has no place to be read to meanwhile.
        syscalls.madvise(memory, HUGE, mmap.MADV_DONTNEED)
        with pytest.raises(NoMemoryLeftError) as none_left:
            uffd.copy(memory + placed * HUGE, untouched, HUGE)
        assert "vm.nr_hugepages" in none_left.value.advice
        assert uffd.copy(memory + placed * HUGE, huge_source, HUGE) == HUGE
        assert ctypes.string_at(memory + placed * HUGE, 8) == b"\x07" * 8
        uffd.unregister(memory, count * HUGE)
    syscalls.unmap_memory(memory, count * HUGE)
    syscalls.unmap_memory(untouched, HUGE)


# ---- scattered pages from any iterable


@pytest.fixture
def scattered() -> Iterator[tuple[Userfaultfd, list[int]]]:
    """A descriptor and the addresses of eight missing pages of it."""
    memory = Mapping.create(8 * PAGE, PAGE)
    with Userfaultfd.open(user_mode_only=True) as uffd:
        uffd.register(memory.address, memory.length)
        yield uffd, [memory.address + number * PAGE for number in range(8)]
    memory.close()


def test_one_source_for_all(scattered: tuple[Userfaultfd, list[int]]) -> None:
    uffd, pages = scattered
    assert uffd.copy_each(pages[:3], itertools.repeat(source(7)), PAGE) == 3 * PAGE
    assert ctypes.string_at(pages[0], 3 * PAGE) == b"\x07" * 3 * PAGE
    with pytest.raises(AlreadyPresentError) as caught:
        uffd.copy_each([*pages[3:6], pages[0], *pages[6:]], itertools.repeat(source(7)), PAGE)
    assert caught.value.done == 3 * PAGE
    assert uffd.copy_each(pages[6:], itertools.repeat(source(7)), PAGE) == 2 * PAGE


def test_a_generator_as_long_as_the_destinations(
    scattered: tuple[Userfaultfd, list[int]],
) -> None:
    uffd, pages = scattered
    assert uffd.copy_each(pages, (source(byte) for byte in range(1, 9)), PAGE) == 8 * PAGE
    assert ctypes.string_at(pages[7], PAGE) == b"\x08" * PAGE


@pytest.mark.parametrize("count", [0, 2, 7, 9])
def test_as_many_sources_as_destinations(
    scattered: tuple[Userfaultfd, list[int]], count: int
) -> None:
    uffd, pages = scattered
    with pytest.raises(ValueError, match=f"8 destinations, but {count} sources"):
        uffd.copy_each(pages, [source(7)] * count, PAGE)
    # Nothing was done; and where it can't be known before, the error says what was.
    if count < 8:
        with pytest.raises(ValueError, match=f"after {count * PAGE} bytes"):
            uffd.copy_each(pages, iter([source(7)] * count), PAGE)
        again = uffd.copy_each(pages[count:], [source(7)] * (8 - count), PAGE)
        assert again == (8 - count) * PAGE


def test_a_refused_page_is_told_before_too_few_sources(
    scattered: tuple[Userfaultfd, list[int]],
) -> None:
    uffd, pages = scattered
    with pytest.raises(AlreadyPresentError) as caught:
        uffd.copy_each([pages[0], pages[0], pages[1]], iter([source(7)] * 2), PAGE)
    assert caught.value.done == PAGE
    with pytest.raises(ResolveError) as refused:
        uffd.copy_each([pages[1], 1 << 64], [source(7)] * 2, PAGE)
    assert refused.value.done == PAGE


def test_an_error_of_the_sources_is_theirs(scattered: tuple[Userfaultfd, list[int]]) -> None:
    uffd, pages = scattered
    with pytest.raises(ValueError, match="invalid literal"):
        uffd.copy_each(pages, (int(text) for text in ("x",)), PAGE)


def test_nothing_to_copy(scattered: tuple[Userfaultfd, list[int]]) -> None:
    uffd, _ = scattered
    assert uffd.copy_each([], [], PAGE) == 0
    assert uffd.copy_each([], itertools.repeat(source(7)), PAGE) == 0


def test_what_no_page_size_divides_is_refused(
    scattered: tuple[Userfaultfd, list[int]],
) -> None:
    uffd, pages = scattered
    started = time.monotonic()
    for length in (0, 1, -PAGE, 1 << 64):
        with pytest.raises(UserfaultError) as caught:
            uffd.copy_each(pages, [source(7)] * 8, length)
        assert caught.value.strerror == "Invalid argument"
    assert time.monotonic() - started < 5
