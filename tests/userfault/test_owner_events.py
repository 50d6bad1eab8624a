"""What the guest's process does to its memory while it is served: unmaps, moves, protects it."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import threading
import time
from collections.abc import Callable

import pytest

from postcopy_proto.errors import UserfaultError
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.userfault import syscalls
from postcopy_proto.userfault.abi import Features, RegisterMode
from postcopy_proto.userfault.backend import Backend
from postcopy_proto.userfault.descriptor import Userfaultfd
from postcopy_proto.userfault.mapping import Backing, Mapping
from postcopy_proto.userfault.region import Region, ThisProcess
from tests.userfault.support import COUNT, PAGE, batch, content, faults, listening, touch

pytestmark = pytest.mark.userfault

MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2


class Registered(ThisProcess):
    """Memory of this process that comes registered, as a VMM's does."""

    def __init__(self, uffd: Userfaultfd) -> None:
        self._uffd = uffd

    def open_userfaultfd(
        self, features: Features, user_mode_only: bool | None
    ) -> tuple[Userfaultfd, bool]:
        return Userfaultfd.from_fd(os.dup(self._uffd.fileno())), True

    def available_features(self) -> Features:
        return self._uffd.features


def serve_while(backend: Backend, thread: threading.Thread, seconds: float = 10) -> None:
    """Reads faults until that thread has ended; nothing is asked for."""
    deadline = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < deadline:
        assert backend.read_faults() == []
    assert not thread.is_alive()


def started(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_moving_ram_is_an_error(region: Region, backend: Backend) -> None:
    """Its pages would be missing where nobody looks for them."""
    libc = ctypes.CDLL(None)
    libc.mremap.restype = ctypes.c_void_p
    listening(backend)
    size = ctypes.c_size_t(PAGE)
    target = syscalls.map_memory(PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    old, new = ctypes.c_void_p(region.address), ctypes.c_void_p(target)
    mover = started(lambda: libc.mremap(old, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, new))
    with pytest.raises(UserfaultError, match=f"moved its RAM from {region.address:#x}"):
        faults(backend)
    backend.cleanup()
    mover.join(10)
    assert not mover.is_alive()
    syscalls.unmap_memory(target, PAGE)


def test_who_waits_in_memory_that_is_unmapped_is_woken() -> None:
    """To meet the SIGSEGV that it would have met without us."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            faulthandler.disable()  # a SIGSEGV is what is wanted
            region = Region.create(RAMBlock("ram", 8 * PAGE))
            backend = listening(Backend([region], user_mode_only=True))
            touch(region.address)
            faults(backend)
            os.write(told, b"waits")
            started(region.close)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                backend.read_faults()
        finally:
            os._exit(7)
    os.close(told)
    try:
        assert os.read(ready, 5) == b"waits"
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -11
    finally:
        os.close(ready)


def test_what_is_left_of_a_block_is_unregistered(region: Region, backend: Backend) -> None:
    """With a second descriptor of the same registrations, as a VMM keeps one."""
    with Userfaultfd.open(Features.EVENT_UNMAP | Features.EVENT_REMOVE, user_mode_only=True) as own:
        own.register(region.address, COUNT * PAGE)
        handed = Region(region.block, region.address, Registered(own))
        served = Backend([handed], user_mode_only=True)
        served.enable_notify()
        hole = region.address + 5 * PAGE
        serve_while(served, started(lambda: syscalls.unmap_memory(hole, 2 * PAGE)))
        served.cleanup()
        word = touch(region.address)
        dropper = started(lambda: syscalls.madvise(region.address, PAGE, mmap.MADV_DONTNEED))
        for thread in (word, dropper):
            thread.join(10)
            assert not thread.is_alive()
        after = touch(region.address + (COUNT - 1) * PAGE)
        after.join(10)
        assert not after.is_alive()


def test_memory_unmapped_without_a_word_does_not_stop_cleanup(region: Region) -> None:
    """A VMM that did not ask for the event; what else has to be undone is undone."""
    with Userfaultfd.open(user_mode_only=True) as own:
        own.register(region.address, COUNT * PAGE)
        calls: list[bool] = []
        handed = Region(region.block, region.address, Registered(own))
        backend = Backend([handed], inhibit_discards=calls.append)
        backend.enable_notify()
        region.close()
        backend.cleanup()
        assert calls == [True, False]


@pytest.mark.parametrize("handler", ["read_faults", "answering"])
def test_write_protected_pages_are_let_through(region: Region, handler: str) -> None:
    """A VMM that registered its RAM for more than missing pages: nobody waits for ever."""
    pages = content(region.block, 81, 0)
    source = pages.__array_interface__["data"][0]
    with Userfaultfd.open(Features.PAGEFAULT_FLAG_WP, user_mode_only=True) as own:
        own.register(region.address, COUNT * PAGE, RegisterMode.MISSING | RegisterMode.WP)
        backend = Backend([Region(region.block, region.address, Registered(own))])
        backend.enable_notify()
        backend.place(batch("ram", pages, range(4)))
        own.write_protect(region.address + PAGE, PAGE)
        byte = ctypes.create_string_buffer(b"new")
        writer = started(lambda: syscalls.memcpy(region.address + PAGE, ctypes.addressof(byte), 3))
        answer = backend.answering({"ram": source})
        deadline = time.monotonic() + 10
        while writer.is_alive() and time.monotonic() < deadline:
            backend.read_faults() if handler == "read_faults" else answer()
        assert not writer.is_alive()
        assert (backend.stats.write_protected, backend.stats.woken) == (1, 0)
        assert len(backend.stats.waits_ns) == 1
        backend.cleanup()
        assert region.read(PAGE, 4) == b"new" + bytes(pages[1, 3:4])


def test_minor_faults_are_let_through() -> None:
    """What the file has already is the page."""
    first = Mapping.create(COUNT * PAGE, PAGE, Backing.MEMFD)
    second = Region.of_file(RAMBlock("ram", COUNT * PAGE), first.fd)
    ctypes.memset(first.address, 5, PAGE)
    with Userfaultfd.open(Features.MINOR_SHMEM, user_mode_only=True) as own:
        own.register(second.address, COUNT * PAGE, RegisterMode.MISSING | RegisterMode.MINOR)
        backend = Backend([Region(second.block, second.address, Registered(own))])
        backend.enable_notify()
        serve_while(backend, touch(second.address + 8))
        assert (backend.stats.minor, backend.stats.woken) == (1, 0)
        thread = touch(second.address + PAGE)
        assert faults(backend) == [("ram", PAGE)]
        backend.cleanup()
        thread.join(10)
    assert second.read(0, 2) == b"\5\5"
    second.close()
    first.close()


@pytest.mark.parametrize("handler", ["read_faults", "answering"])
def test_events_behind_one_that_is_an_error_are_kept(
    region: Region, backend: Backend, handler: str
) -> None:
    pages = content(region.block, 82, 0)
    listening(backend)
    answer = backend.answering({"ram": pages.__array_interface__["data"][0]})
    stray = syscalls.map_memory(PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    backend._descriptor().register(stray, PAGE)
    astray = touch(stray)
    time.sleep(0.05)
    thread = touch(region.address + 3 * PAGE)
    time.sleep(0.05)
    serve: Callable[[], object] = backend.read_faults if handler == "read_faults" else answer
    with pytest.raises(UserfaultError, match="in no RAMBlock"):
        serve()
    assert backend.pending
    assert serve() == ([("ram", 3 * PAGE)] if handler == "read_faults" else 1)
    assert not backend.pending
    backend._descriptor().unregister(stray, PAGE)
    backend.cleanup()
    for waiting in (thread, astray):
        waiting.join(10)
        assert not waiting.is_alive()
    syscalls.unmap_memory(stray, PAGE)
