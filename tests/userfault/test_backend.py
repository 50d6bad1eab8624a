"""The backend over this process's own memory: faults, events, refusals, the model's order."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError, UserfaultError
from postcopy_proto.messages import Pages
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.userfault import syscalls
from postcopy_proto.userfault.backend import Backend
from postcopy_proto.userfault.descriptor import NoMemoryLeftError, Userfaultfd
from postcopy_proto.userfault.loop import serve_faults
from postcopy_proto.userfault.mapping import Backing
from postcopy_proto.userfault.region import Region, ThisProcess
from tests.userfault.support import (
    COUNT,
    HUGE,
    PAGE,
    batch,
    content,
    faults,
    listening,
    resident_pages,
    run_python,
    touch,
)

pytestmark = pytest.mark.userfault


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


def test_neighbours_that_a_huge_page_brought_are_missing_all_the_same() -> None:
    """A source need not discard what it never sent: its bytes come, and zeros must not be there."""
    region = Region.create(RAMBlock("ram", 4 * HUGE))
    pages = content(region.block, 16, zero_fraction=0)
    backend = Backend([region], user_mode_only=True)
    backend.incoming_init()
    backend.place(batch("ram", pages, [512, 600, 2000]))
    backend.enable_notify()
    assert not any(resident_pages(region.address + 513 * PAGE, 87 * PAGE))
    thread = touch(region.address + 513 * PAGE)
    assert faults(backend) == [("ram", 513 * PAGE)]
    backend.place(batch("ram", pages, range(513, 600)))
    thread.join(10)
    assert backend.stats.already_present == 0
    backend.cleanup()
    assert region.read(512 * PAGE, 89 * PAGE) == pages[512:601].tobytes()
    region.close()


def test_the_loop_does_not_forget_what_was_read_on_the_way(
    backend: Backend, region: Region
) -> None:
    """Faults read in the middle of a placement, and what was asked for: no descriptor tells."""
    listening(backend)
    pages = content(region.block, 17, zero_fraction=0)
    address = pages.__array_interface__["data"][0]
    thread = touch(region.address + 2 * PAGE)
    deadline = time.monotonic() + 10
    while not backend.pending and time.monotonic() < deadline:
        backend._collect_events()
    backend.want("ram", 7 * PAGE, PAGE)
    quit_fd = os.eventfd(0)
    served: list[int] = []

    def request(wanted: list[tuple[str, int]]) -> None:
        for idstr, offset in wanted:
            backend.place_page(idstr, offset, address + offset)
            served.append(offset // PAGE)
        if len(served) == 2:
            os.eventfd_write(quit_fd, 1)

    loop = threading.Thread(target=serve_faults, args=(backend, request, quit_fd), daemon=True)
    loop.start()
    loop.join(10)
    assert not loop.is_alive()
    os.close(quit_fd)
    assert sorted(served) == [2, 7]
    thread.join(10)
    assert not thread.is_alive()


def test_reading_memory_here_is_no_fault(backend: Backend, region: Region) -> None:
    pages = content(region.block, 18, zero_fraction=0)
    listening(backend).place(batch("ram", pages, range(16)))
    assert region.read(0, 16 * PAGE) == pages[:16].tobytes()
    assert (backend.stats.faults, backend.stats.woken, backend.stats.zero_filled) == (0, 0, 0)


# ---- holes, and memory that runs out


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
    with pytest.raises(ValueError, match="already"):
        backend.incoming_init()
    backend.cleanup()
    backend.cleanup()
    with pytest.raises(ValueError, match="cleaned up"):
        backend.place(page_at(0))
    with pytest.raises(ValueError, match="cleaned up"):
        backend.enable_notify()
    for late in (backend.incoming_init, backend.prepare_discard):
        with pytest.raises(ValueError, match="cleaned up"):
            late()
    with pytest.raises(ValueError, match="cleaned up"):
        backend.discard("ram", 0, PAGE)
    with pytest.raises(ValueError, match="outside"):
        backend.missing("ram", 0, (COUNT + 1) * PAGE)
    assert backend.missing("ram", 20 * PAGE + 100, 0) == []


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


def test_discarders_are_inhibited_first_and_their_refusal_is_ours(region: Region) -> None:
    """Before anything is registered; and what the hook raises leaves nothing behind."""

    def refuse(on: bool) -> None:
        with Userfaultfd.open(user_mode_only=True) as uffd:
            uffd.register(region.address, PAGE)  # EBUSY if another has it
        raise RuntimeError("the balloon says no")

    before = len(list(Path("/proc/self/fd").iterdir()))
    backend = Backend([region], user_mode_only=True, inhibit_discards=refuse)
    with pytest.raises(RuntimeError, match="balloon"):
        backend.enable_notify()
    assert not backend.listening
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    calls: list[bool] = []
    gone = Region.create(RAMBlock("gone", PAGE))
    failing = Backend([region, gone], user_mode_only=True, inhibit_discards=calls.append)
    gone.close()
    with pytest.raises(UserfaultError, match="UFFDIO_REGISTER"):
        failing.enable_notify()
    assert calls == [True, False]


def test_cleanup_undoes_all_whatever_fails_of_it(region: Region) -> None:
    def refuse(on: bool) -> None:
        if not on:
            raise RuntimeError("the balloon says no")

    before = len(list(Path("/proc/self/fd").iterdir()))
    backend = Backend([region], user_mode_only=True, inhibit_discards=refuse)
    backend.enable_notify()
    thread = touch(region.address)
    faults(backend)
    with pytest.raises(RuntimeError, match="balloon"):
        backend.cleanup()
    thread.join(10)
    assert not thread.is_alive()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert backend._placer._staging._memory.closed
    assert backend.stats.unanswered == 1


def flags_of(address: int) -> set[str]:
    """The two-letter flags of the mapping there (proc_pid_smaps(5))."""
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if first == "VmFlags:":
            if within:
                return set(rest)
        elif "-" in first:
            start, _, end = first.partition("-")
            within = int(start, 16) <= address < int(end, 16)
    raise AssertionError("not mapped")


def test_huge_pages_come_back_without_listen_too(backend: Backend, region: Region) -> None:
    backend.prepare_discard()
    assert "nh" in flags_of(region.address)
    backend.cleanup()
    assert "nh" not in flags_of(region.address)


def test_memory_is_locked_again_without_listen_too() -> None:
    """In a process of its own: it locks all of itself."""
    if os.getuid():
        pytest.skip("locking all memory needs root")
    result = run_python(
        "from postcopy_proto.ramblock import RAMBlock\n"
        "from postcopy_proto.userfault import syscalls\n"
        "from postcopy_proto.userfault.backend import Backend\n"
        "from postcopy_proto.userfault.region import Region\n"
        "def locked():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('VmLck'))\n"
        "region = Region.create(RAMBlock('ram', 64 * 4096))\n"
        "backend = Backend([region], user_mode_only=True, lock_memory=True)\n"
        "syscalls.lock_memory(True)\n"
        "before = locked()\n"
        "backend.incoming_init()\n"
        "between = locked()\n"
        "backend.cleanup()\n"
        "print(before > 0, between, locked() > 0)\n"
    )
    assert result.stdout == "True 0 True\n", result.stderr


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
