"""Guest memory of every backing: how it is made, dropped, read and written."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import os
import signal
import threading

import numpy as np
import pytest

from postcopy_proto.errors import UserfaultError
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.userfault import syscalls
from postcopy_proto.userfault.backend import Backend
from postcopy_proto.userfault.descriptor import Userfaultfd
from postcopy_proto.userfault.mapping import Backing, Mapping
from postcopy_proto.userfault.region import Region
from tests.userfault.support import HUGE, MIB, PAGE, batch, content, resident_pages, run_python

pytestmark = pytest.mark.userfault

SMALL_BACKINGS = [Backing.ANONYMOUS, Backing.SHARED, Backing.MEMFD]


def fill(address: int, length: int, byte: int = 0xAA) -> None:
    ctypes.memset(address, byte, length)


def region_of(block: RAMBlock, backing: Backing) -> Region:
    return Region.create(block, backing)


# ---- dropping


@pytest.mark.parametrize("backing", SMALL_BACKINGS)
def test_discard_drops_exactly_its_pages(backing: Backing) -> None:
    memory = Mapping.create(8 * PAGE, PAGE, backing)
    memory.advise_huge_pages(False)
    fill(memory.address, memory.length)
    memory.discard(2 * PAGE, 3 * PAGE)
    expected = b"\xaa" * 2 * PAGE + bytes(3 * PAGE) + b"\xaa" * 3 * PAGE
    assert resident_pages(memory.address, memory.length) == [not 2 <= page < 5 for page in range(8)]
    assert ctypes.string_at(memory.address, memory.length) == expected
    memory.close()


@pytest.mark.hugetlb
def test_discard_of_huge_pages(huge_pages: int) -> None:
    memory = Mapping.create(3 * HUGE, HUGE, Backing.HUGETLB)
    fill(memory.address, memory.length)
    memory.discard(HUGE, HUGE)
    seen = ctypes.string_at(memory.address, memory.length)
    assert seen == b"\xaa" * HUGE + bytes(HUGE) + b"\xaa" * HUGE
    with pytest.raises(ValueError, match="aligned"):
        memory.discard(0, PAGE)
    memory.close()


def test_discard_outside_or_across_pages_is_refused() -> None:
    memory = Mapping.create(4 * PAGE, PAGE)
    for start, length in ((1, PAGE), (0, 1), (-PAGE, PAGE), (0, -PAGE)):
        with pytest.raises(ValueError, match="aligned"):
            memory.discard(start, length)
    with pytest.raises(ValueError, match="ends after"):
        memory.discard(3 * PAGE, 2 * PAGE)
    memory.discard(4 * PAGE, 0)
    memory.close()


def test_part_of_a_file() -> None:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 8 * PAGE)
    os.pwrite(fd, b"x" * 8 * PAGE, 0)
    block = RAMBlock("ram", 4 * PAGE)
    region = Region.of_file(block, fd, 2 * PAGE)
    region.mapping.discard(PAGE, PAGE)
    assert os.pread(fd, 8 * PAGE, 0) == b"x" * 3 * PAGE + bytes(PAGE) + b"x" * 4 * PAGE
    assert region.read(0, 2 * PAGE) == b"x" * PAGE + bytes(PAGE)
    for offset in (5, -PAGE):
        with pytest.raises(ValueError, match="no multiple"):
            Region.of_file(block, fd, offset)
    with pytest.raises(ValueError, match="shorter"):
        Region.of_file(block, fd, 6 * PAGE)
    region.close()
    os.close(fd)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="page size"):
        Mapping.create(PAGE, 1000)
    with pytest.raises(ValueError, match="length"):
        Mapping.create(PAGE + 1, PAGE)
    with pytest.raises(ValueError, match="hugetlb"):
        Mapping.create(HUGE, HUGE)
    with pytest.raises(ValueError, match="of_file"):
        Mapping.create(PAGE, PAGE, Backing.FILE)
    with pytest.raises(ValueError, match="no multiple"):
        Region(RAMBlock("ram", PAGE + 1), 0, Region.create(RAMBlock("x", PAGE)).owner)


@pytest.mark.parametrize("backing", SMALL_BACKINGS)
def test_lengths_that_no_mapping_can_have(backing: Backing) -> None:
    # mmap would take them modulo 2**64.
    for length in (2**64 + PAGE, 2**63, 0, -PAGE):
        with pytest.raises(ValueError, match="length"):
            Mapping.create(length, PAGE, backing)


def _open_files() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are all that is wanted


def test_a_file_that_must_not_grow_is_an_error_and_is_closed() -> None:
    code = (
        "import os, resource, signal\n"
        "from postcopy_proto.errors import UserfaultError\n"
        "from postcopy_proto.userfault.mapping import Backing, Mapping\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "before = os.listdir('/proc/self/fd')\n"
        "try: Mapping.create(1 << 24, 4096, Backing.MEMFD)\n"
        "except UserfaultError as error: print(error)\n"
        "print(os.listdir('/proc/self/fd') == before)"
    )
    result = run_python(code)
    assert result.stdout == "ftruncate: File too large (16777216 bytes)\nTrue\n", result.stderr


def test_a_descriptor_that_is_not_open_is_a_typed_error() -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    os.close(fd)
    with pytest.raises(UserfaultError) as caught:
        Mapping.of_file(fd, 0, PAGE, PAGE)
    assert caught.value.errno == errno.EBADF


@pytest.mark.hugetlb
def test_pages_smaller_than_those_of_the_file_are_refused(huge_pages: int) -> None:
    fd = os.memfd_create("ram", os.MFD_HUGETLB)
    os.ftruncate(fd, 2 * HUGE)
    before = _open_files()
    with pytest.raises(ValueError, match=f"{HUGE} bytes.*{PAGE} bytes"):
        Region.of_file(RAMBlock("ram", HUGE), fd)
    assert _open_files() == before
    Region.of_file(RAMBlock("ram", HUGE, HUGE), fd, HUGE).close()
    os.close(fd)


def test_no_memory_is_an_error_that_names_the_call() -> None:
    with pytest.raises(UserfaultError, match="mmap") as caught:
        Mapping.create(1 << 62, PAGE)
    assert caught.value.errno == errno.ENOMEM
    with pytest.raises(UserfaultError):
        Mapping.create(1 << 45, HUGE, Backing.HUGETLB)


# ---- huge pages and forks, as QEMU treats its RAM


def _flags(address: int) -> set[str]:
    """VmFlags of the mapping at an address."""
    with open("/proc/self/smaps", encoding="ascii") as file:
        inside = False
        for line in file:
            if "-" in (bounds := line.split(" ")[0]) and ":" not in bounds:
                low, high = (int(part, 16) for part in bounds.split("-"))
                inside = low <= address < high
            elif inside and line.startswith("VmFlags:"):
                return set(line.split()[1:])
    raise AssertionError("no such mapping")


def test_memory_welcomes_huge_pages_and_is_not_inherited() -> None:
    memory = Mapping.create(4 * HUGE, PAGE)
    if "hg" not in _flags(memory.address):
        pytest.skip("this kernel has no transparent huge pages")
    assert "dc" in _flags(memory.address)
    memory.advise_huge_pages(False)
    assert {"nh"} == _flags(memory.address) & {"hg", "nh"}
    memory.advise_huge_pages(True)
    assert {"hg"} == _flags(memory.address) & {"hg", "nh"}
    memory.close()


def test_a_forked_process_dies_rather_than_read_zeros() -> None:
    memory = Mapping.create(PAGE, PAGE)
    fill(memory.address, PAGE)
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        ctypes.string_at(memory.address, 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGSEGV
    memory.close()


# ---- reading and writing


@pytest.mark.parametrize("backing", SMALL_BACKINGS)
def test_write_and_read(backing: Backing) -> None:
    region = Region.create(RAMBlock("ram", 2048 * PAGE), backing)
    pages = content(region.block, 1)
    # More pieces than one process_vm_writev takes, each at an address of its own, backwards.
    backwards = pages[::-1].copy()
    sources = backwards.ctypes.data + np.arange(2047, -1, -1, dtype=np.uint64) * np.uint64(PAGE)
    region.write(np.arange(2048) * PAGE, sources.astype(np.int64), PAGE)
    assert region.read(0, 2048 * PAGE) == pages.tobytes()
    assert region.read(5, 10) == pages.tobytes()[5:15]
    assert region.read(0, 0) == b""
    with pytest.raises(ValueError, match="outside"):
        region.read(2048 * PAGE, 1)
    region.close()


def test_a_region_that_went_away_is_an_error() -> None:
    region = Region.create(RAMBlock("ram", PAGE))
    address = region.address
    region.close()
    stale = Region(RAMBlock("ram", PAGE), address, region.owner)
    with pytest.raises(UserfaultError, match="process_vm_readv") as caught:
        stale.read(0, 1)
    assert caught.value.errno == errno.EFAULT
    with pytest.raises(ValueError, match="another process"):
        _ = stale.mapping


def test_read_waits_without_the_gil_and_refuses_to_wait_for_itself(user_mode_only: bool) -> None:
    region = Region.create(RAMBlock("ram", 8 * PAGE))
    pages = content(region.block, 2, zero_fraction=0)
    pages[4] = 0
    backend = Backend([region], user_mode_only=user_mode_only)
    backend.incoming_init()
    backend.place(batch("ram", pages, [4]))
    backend.enable_notify()
    with pytest.raises(UserfaultError, match="serves them") as caught:
        region.read(0, 2 * PAGE)
    assert caught.value.errno == errno.EDEADLK
    # Ask, serve, read: without ever touching a missing page.
    assert backend.want("ram", PAGE, PAGE) == 1
    assert backend.want("ram", PAGE, PAGE) == 1
    assert backend.read_faults() == [("ram", PAGE)]
    backend.place(batch("ram", pages, [1]))
    assert backend.missing("ram", 0, 3 * PAGE) == [0, 2 * PAGE]
    assert region.read(PAGE, PAGE) == pages[1].tobytes()
    # A zero page of precopy counts as received and is still empty memory.
    assert region.read(4 * PAGE, PAGE) == bytes(PAGE)
    # In another thread, reading waits, and this one can serve it.
    seen: list[bytes] = []
    reader = threading.Thread(target=lambda: seen.append(region.read(2 * PAGE, PAGE)), daemon=True)
    reader.start()
    while reader.is_alive():
        for _, offset in backend.read_faults():
            backend.place(batch("ram", pages, [offset // PAGE]))
    assert seen == [pages[2].tobytes()]
    backend.cleanup()
    assert region.read(0, PAGE) == bytes(PAGE)
    region.close()


@pytest.mark.parametrize("full", [True, False])
def test_the_guest_process_is_not_waited_for_by_who_serves_it(full: bool) -> None:
    """In a process of its own: with a full descriptor the wait would have no end."""
    code = """
import sys
import numpy as np
from postcopy_proto.errors import UserfaultError
from postcopy_proto.net.guest import GuestProcess
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.userfault.backend import Backend
full = sys.argv[1] == "True"
with GuestProcess.start([RAMBlock("ram", 4 * 4096)], user_mode_only=not full) as guest:
    backend = Backend(guest.regions)
    backend.incoming_init()
    backend.enable_notify()
    region, page = guest.regions[0], np.full(4096, 7, np.uint8)
    backend.place_page("ram", 0, page.ctypes.data)
    print(region.read(4088, 8))
    for call, arguments in (
        (region.read, (4088, 16)),
        (region.write, (np.array([0, 4096]), np.array([page.ctypes.data] * 2), 4096)),
    ):
        try:
            call(*arguments)
        except UserfaultError as error:
            print(error.errno)
    print(backend.missing("ram", 0, 3 * 4096))
    backend.cleanup()
"""
    if full:
        try:
            Userfaultfd.open().close()
        except PermissionError as error:
            pytest.skip(f"no full descriptor here: {error}")
    result = run_python(code, str(full))
    expected = [repr(bytes([7] * 8)), f"{errno.EDEADLK}", f"{errno.EDEADLK}", "[4096, 8192]"]
    assert result.stdout.splitlines() == expected, result.stderr


def test_huge_pages_are_split_before_discards() -> None:
    """What postcopy_ram_prepare_discard is for: a discard inside a huge page drops just that."""
    region = Region.create(RAMBlock("ram", 4 * MIB))
    pages = content(region.block, 3, zero_fraction=0)
    backend = Backend([region])
    backend.incoming_init()
    backend.place(batch("ram", pages, range(1024)))
    backend.prepare_discard()
    backend.discard("ram", 512 * PAGE, PAGE)
    present = resident_pages(region.address, 4 * MIB)
    assert present == [page != 512 for page in range(1024)]
    # With huge pages still allowed, a touch nearby could bring the page back as zeros.
    assert "nh" in _flags(region.address) or "hg" not in _flags(region.address)
    backend.enable_notify()
    assert not backend.received["ram"][512]
    assert backend.received["ram"].count() == 1023
    backend.cleanup()
    assert "nh" not in _flags(region.address)
    region.close()


def test_locked_memory_is_unlocked_for_postcopy_and_locked_again() -> None:
    """In a child: mlockall of a whole test process would be felt by other tests."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            region = Region.create(RAMBlock("ram", 4 * PAGE))
            syscalls.lock_memory(True)
            backend = Backend([region], user_mode_only=True, lock_memory=True)
            backend.incoming_init()
            backend.enable_notify()
            unlocked = _locked() == 0
            backend.cleanup()
            status = 0 if unlocked and _locked() > 0 else 2
        except UserfaultError as error:
            status = 3 if error.operation == "mlockall" else 4
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == 3:
        pytest.skip("this user may not lock memory")
    assert status == 0


def _locked() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmLck:"))
