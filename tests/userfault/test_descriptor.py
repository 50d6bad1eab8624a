"""The binding on the real kernel: every ioctl, every event, every outcome."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import functools
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from postcopy_proto.errors import UserfaultError
from postcopy_proto.userfault import descriptor, syscalls
from postcopy_proto.userfault.abi import Features, Ioctls, RegisterMode
from postcopy_proto.userfault.descriptor import (
    AgainError,
    AlreadyPresentError,
    ForkEvent,
    NotRegisteredError,
    OwnerGoneError,
    PageFault,
    RemapEvent,
    RemoveEvent,
    ResolveError,
    UnknownEvent,
    UnmapEvent,
    Userfaultfd,
)
from postcopy_proto.userfault.mapping import Backing, Mapping
from tests.userfault.support import PAGE, ROOT, run_python, unprivileged

pytestmark = pytest.mark.userfault

PAGES = 16


@pytest.fixture
def memory() -> Iterator[Mapping]:
    mapping = Mapping.create(PAGES * PAGE, PAGE)
    yield mapping
    mapping.close()


@pytest.fixture
def uffd(user_mode_only: bool) -> Iterator[Userfaultfd]:
    with Userfaultfd.open(user_mode_only=user_mode_only) as opened:
        yield opened


@functools.cache
def _buffer(byte: int, pages: int) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(bytes([byte]) * pages * PAGE, pages * PAGE)


def source(byte: int, pages: int = 1) -> int:
    """The address of pages full of that byte."""
    return ctypes.addressof(_buffer(byte, pages))


class Toucher(threading.Thread):
    """Reads or writes 8 bytes in a thread that has dropped the GIL."""

    def __init__(self, address: int, *, write: bool = False) -> None:
        super().__init__(daemon=True)
        self._buffer = ctypes.create_string_buffer(8)
        self._arguments = (address, ctypes.addressof(self._buffer))
        if not write:
            self._arguments = self._arguments[::-1]
        self.start()

    def run(self) -> None:
        syscalls.memcpy(*self._arguments, 8)

    def finish(self) -> bytes:
        self.join(10)
        assert not self.is_alive(), "still waits for its page"
        return self._buffer.raw


def next_event(uffd: Userfaultfd, timeout: float = 10) -> descriptor.AnyEvent:
    assert uffd.poll(timeout), "no event came"
    (event,) = uffd.read_events()
    return event


# ---- opening


def test_open_says_what_it_got(user_mode_only: bool) -> None:
    with Userfaultfd.open(Features.THREAD_ID, user_mode_only=user_mode_only) as uffd:
        assert uffd.user_mode_only is user_mode_only
        assert uffd.origin in ("device", "system call")
        assert uffd.features == Features.THREAD_ID
        assert uffd.available_features & Features.MISSING_SHMEM
        assert uffd.ioctls & Ioctls.REGISTER
        assert os.get_inheritable(uffd.fileno()) is False
        assert os.get_blocking(uffd.fileno()) is False
        assert not uffd.closed
    assert uffd.closed


def test_open_blocking() -> None:
    with Userfaultfd.open(user_mode_only=True, nonblocking=False) as uffd:
        assert os.get_blocking(uffd.fileno()) is True


@pytest.mark.parametrize("number", [60, 64])
def test_a_feature_that_no_kernel_has_is_refused(number: int) -> None:
    wanted = Features.THREAD_ID | Features(1 << number)
    with pytest.raises(UserfaultError, match="does not offer these") as caught:
        Userfaultfd.open(wanted, user_mode_only=True)
    assert caught.value.errno == errno.EINVAL
    assert caught.value.detail == f"features {1 << number:#x}"


def test_no_access_to_the_device_tells_more_than_a_system_call_that_is_not_there() -> None:
    if not Path(descriptor.DEVICE).exists():
        pytest.skip(f"no {descriptor.DEVICE}")
    code = (
        "from postcopy_proto.userfault import Userfaultfd, syscalls\n"
        "numbers = syscalls._USERFAULTFD_NUMBER\n"
        "numbers.update(dict.fromkeys(numbers, 100_000))  # as a seccomp profile answers\n"
        "try: print(Userfaultfd.open(user_mode_only=None))\n"
        "except PermissionError as error: print(error)"
    )
    text = unprivileged([sys.executable, "-c", code]).stdout
    if "Userfaultfd fd=" in text:
        pytest.skip(f"an ordinary user may open {descriptor.DEVICE}")
    assert "device: Permission denied, system call: Function not implemented" in text
    assert f"give access to {descriptor.DEVICE}" in text
    assert "CONFIG_USERFAULTFD" not in text


def test_a_machine_whose_system_call_has_no_number_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptor, "DEVICE", "/dev/no-such-userfaultfd")
    monkeypatch.setattr(syscalls, "_USERFAULTFD_NUMBER", {})
    with pytest.raises(UserfaultError, match="not known here") as caught:
        Userfaultfd.open(user_mode_only=True)
    assert caught.value.errno == errno.ENOSYS
    assert "needs no number" in caught.value.advice


def test_without_the_device_the_system_call_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptor, "DEVICE", "/dev/no-such-userfaultfd")
    with Userfaultfd.open(user_mode_only=True) as uffd:
        assert uffd.origin == "system call"


def test_no_permission_names_every_attempt_and_what_to_do() -> None:
    code = (
        "from postcopy_proto.userfault.descriptor import *\n"
        "try: Userfaultfd.open()\n"
        "except PermissionError as error: print(error)\n"
        "else: print('allowed')\n"
        "uffd = Userfaultfd.open(user_mode_only=None); print(uffd.user_mode_only)"
    )
    if int(Path("/proc/sys/vm/unprivileged_userfaultfd").read_text()):
        pytest.skip("vm.unprivileged_userfaultfd is 1: everything is allowed")
    result = unprivileged([sys.executable, "-c", code])
    refused, mode = result.stdout.splitlines()
    assert "device: " in refused
    assert "system call: Operation not permitted" in refused
    assert "vm.unprivileged_userfaultfd=1" in refused
    assert mode == "True"


def test_from_fd_adopts_a_descriptor_with_its_features() -> None:
    with (
        Userfaultfd.open(Features.THREAD_ID, user_mode_only=True) as uffd,
        Userfaultfd.from_fd(os.dup(uffd.fileno())) as other,
    ):
        assert other.features == Features.THREAD_ID
        assert other.user_mode_only is None


def test_from_fd_refuses_other_files_and_unfinished_handshakes() -> None:
    with open("/dev/null") as file:
        other = file.fileno()
        with pytest.raises(ValueError, match="no userfaultfd"):
            Userfaultfd.from_fd(other)
    with pytest.raises(ValueError, match="no userfaultfd: it is not open"):
        Userfaultfd.from_fd(other)
    fd = syscalls.userfaultfd(os.O_CLOEXEC | 1)
    try:
        with pytest.raises(ValueError, match="handshake"):
            Userfaultfd.from_fd(fd)
    finally:
        os.close(fd)


# ---- registering, resolving


def test_register_returns_the_ioctls_and_unregister_ends_it(
    uffd: Userfaultfd, memory: Mapping
) -> None:
    offered = uffd.register(memory.address, memory.length)
    assert offered & (Ioctls.COPY | Ioctls.ZEROPAGE | Ioctls.WAKE) == (
        Ioctls.COPY | Ioctls.ZEROPAGE | Ioctls.WAKE
    )
    uffd.unregister(memory.address, memory.length)
    assert ctypes.string_at(memory.address, 4) == bytes(4)


def test_register_refuses_what_it_must(uffd: Userfaultfd, memory: Mapping) -> None:
    with pytest.raises(UserfaultError) as caught:
        uffd.register(memory.address + 1, PAGE)
    assert caught.value.errno == errno.EINVAL
    uffd.register(memory.address, memory.length)
    with Userfaultfd.open(user_mode_only=True) as other, pytest.raises(UserfaultError) as caught:
        other.register(memory.address, memory.length)
    assert caught.value.errno == errno.EBUSY


def test_a_fault_is_reported_and_a_copy_resolves_it(uffd: Userfaultfd, memory: Mapping) -> None:
    uffd.register(memory.address, memory.length)
    toucher = Toucher(memory.address + 3 * PAGE + 16)
    event = next_event(uffd)
    assert event == PageFault(memory.address + 3 * PAGE, 0, 0)
    assert uffd.copy(memory.address + 3 * PAGE, source(7), PAGE) == PAGE
    assert toucher.finish() == b"\x07" * 8


def test_a_write_fault_names_its_thread() -> None:
    memory = Mapping.create(PAGE, PAGE)
    with Userfaultfd.open(Features.THREAD_ID, user_mode_only=True) as uffd:
        uffd.register(memory.address, PAGE)
        toucher = Toucher(memory.address, write=True)
        event = next_event(uffd)
        assert event == PageFault(memory.address, 1, toucher.native_id)
        uffd.zeropage(memory.address, PAGE)
        toucher.finish()
    memory.close()


def test_the_source_may_be_unaligned(uffd: Userfaultfd, memory: Mapping) -> None:
    uffd.register(memory.address, memory.length)
    raw = ctypes.create_string_buffer(bytes(range(256)) * 17, 256 * 17)
    uffd.copy(memory.address, ctypes.addressof(raw) + 3, PAGE)
    assert ctypes.string_at(memory.address, PAGE) == raw.raw[3 : 3 + PAGE]


RESOLVERS: dict[str, Callable[[Userfaultfd, int, bool], int]] = {
    "copy": lambda uffd, at, wake: uffd.copy(at, source(9), PAGE, wake=wake),
    "zeropage": lambda uffd, at, wake: uffd.zeropage(at, PAGE, wake=wake),
}


@pytest.mark.parametrize("resolver", RESOLVERS)
def test_without_wake_whoever_waits_goes_on_waiting(
    uffd: Userfaultfd, memory: Mapping, resolver: str
) -> None:
    uffd.register(memory.address, memory.length)
    toucher = Toucher(memory.address)
    next_event(uffd)
    RESOLVERS[resolver](uffd, memory.address, False)
    time.sleep(0.05)
    assert toucher.is_alive()
    uffd.wake(memory.address, PAGE)
    assert toucher.finish() == (b"\x09" if resolver == "copy" else b"\0") * 8


# ---- outcomes


def test_a_present_page_is_an_outcome_of_its_own(uffd: Userfaultfd, memory: Mapping) -> None:
    uffd.register(memory.address, memory.length)
    uffd.zeropage(memory.address, PAGE)
    for again in (
        lambda: uffd.zeropage(memory.address, PAGE),
        lambda: uffd.copy(memory.address, source(9), PAGE),
    ):
        with pytest.raises(AlreadyPresentError) as caught:
            again()
        assert caught.value.done == 0
        assert caught.value.errno == errno.EEXIST


def test_a_partial_result_says_how_many_bytes_were_done(uffd: Userfaultfd, memory: Mapping) -> None:
    uffd.register(memory.address, memory.length)
    uffd.zeropage(memory.address + 5 * PAGE, PAGE)
    with pytest.raises(AgainError) as caught:
        uffd.copy(memory.address, source(1, PAGES), memory.length)
    assert caught.value.done == 5 * PAGE
    uffd.zeropage(memory.address + 8 * PAGE, PAGE)
    with pytest.raises(AgainError) as caught:
        uffd.zeropage(memory.address + 6 * PAGE, 10 * PAGE)
    assert caught.value.done == 2 * PAGE


def test_scattered_pages_are_copied_one_by_one(uffd: Userfaultfd, memory: Mapping) -> None:
    uffd.register(memory.address, memory.length)
    numbers = [5, 1, 7, 2]
    destinations = [memory.address + number * PAGE for number in numbers]
    sources = [source(number) for number in numbers]
    assert uffd.copy_each(destinations, sources, PAGE) == 4 * PAGE
    for number in numbers:
        assert ctypes.string_at(memory.address + number * PAGE, PAGE) == bytes([number]) * PAGE


def test_scattered_pages_end_at_the_first_that_is_refused(
    uffd: Userfaultfd, memory: Mapping
) -> None:
    uffd.register(memory.address, memory.length)
    uffd.copy(memory.address + 2 * PAGE, source(9), PAGE)
    destinations = [memory.address + number * PAGE for number in (0, 1, 2, 3)]
    sources = [source(number + 1) for number in range(4)]
    with pytest.raises(AlreadyPresentError) as caught:
        uffd.copy_each(destinations, sources, PAGE)
    assert caught.value.done == 2 * PAGE
    with pytest.raises(AlreadyPresentError) as caught:
        uffd.copy_each([memory.address + 3 * PAGE] * 2, [source(4)] * 2, PAGE)
    assert caught.value.done == PAGE, "the same page twice: the second one is refused"
    # Refused before the kernel has looked at any page: what is left of the last call is no result.
    with pytest.raises(ResolveError) as caught:
        uffd.copy_each([memory.address + 4 * PAGE, 1], [source(5), source(6)], PAGE)
    assert caught.value.done == PAGE


def test_without_wake_scattered_pages_wake_nobody(uffd: Userfaultfd, memory: Mapping) -> None:
    uffd.register(memory.address, memory.length)
    toucher = Toucher(memory.address)
    next_event(uffd)
    assert uffd.copy_each([memory.address], [source(3)], PAGE, wake=False) == PAGE
    toucher.join(0.1)
    assert toucher.is_alive()
    uffd.wake(memory.address, PAGE)
    assert toucher.finish() == b"\x03" * 8


def test_an_unregistered_range_is_an_outcome_of_its_own(uffd: Userfaultfd, memory: Mapping) -> None:
    with pytest.raises(NotRegisteredError):
        uffd.zeropage(memory.address, PAGE)


def test_the_owner_is_gone() -> None:
    left, right = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        memory = Mapping.create(PAGE, PAGE)
        uffd = Userfaultfd.open(user_mode_only=True)
        uffd.register(memory.address, PAGE)
        socket.send_fds(right, [memory.address.to_bytes(8, "little")], [uffd.fileno()])
        right.recv(1)
        os._exit(0)
    data, fds, _, _ = socket.recv_fds(left, 8, 1)
    with Userfaultfd.from_fd(fds[0]) as uffd:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        address = int.from_bytes(data, "little")
        assert uffd.owner_is_gone()
        for call in (uffd.zeropage, uffd.register, uffd.unregister):
            with pytest.raises(OwnerGoneError) as caught:
                call(address, PAGE)
            assert caught.value.errno == errno.ESRCH
    left.close()
    right.close()


def test_other_errors_stay_typed(uffd: Userfaultfd, memory: Mapping) -> None:
    uffd.register(memory.address, memory.length)
    with pytest.raises(ResolveError) as caught:
        uffd.copy(memory.address, 0, PAGE)
    assert caught.value.errno == errno.EFAULT
    with pytest.raises(ResolveError) as caught:
        uffd.wake(memory.address + 1, PAGE)
    assert caught.value.errno == errno.EINVAL


# ---- the other modes


def test_write_protection_stops_a_writer(memory: Mapping) -> None:
    with Userfaultfd.open(Features.PAGEFAULT_FLAG_WP, user_mode_only=True) as uffd:
        offered = uffd.register(
            memory.address, memory.length, RegisterMode.MISSING | RegisterMode.WP
        )
        assert offered & Ioctls.WRITEPROTECT
        uffd.copy(memory.address, source(9), PAGE, write_protect=True)
        toucher = Toucher(memory.address, write=True)
        event = next_event(uffd)
        assert isinstance(event, PageFault)
        assert event.flags == 3
        uffd.write_protect(memory.address, PAGE, protect=False, wake=False)
        time.sleep(0.05)
        assert toucher.is_alive()
        uffd.wake(memory.address, PAGE)
        toucher.finish()
        uffd.write_protect(memory.address, PAGE)
        toucher = Toucher(memory.address, write=True)
        next_event(uffd)
        uffd.write_protect(memory.address, PAGE, protect=False)
        toucher.finish()


def test_a_minor_fault_is_continued() -> None:
    if not descriptor.available_features() & Features.MINOR_SHMEM:
        pytest.skip("this kernel has no minor faults on shared memory")
    first = Mapping.create(4 * PAGE, PAGE, Backing.MEMFD)
    second = Mapping.of_file(first.fd, 0, first.length, PAGE)
    syscalls.memcpy(first.address, source(3), PAGE)
    with Userfaultfd.open(Features.MINOR_SHMEM, user_mode_only=True) as uffd:
        offered = uffd.register(second.address, second.length, RegisterMode.MINOR)
        assert offered & Ioctls.CONTINUE
        toucher = Toucher(second.address)
        event = next_event(uffd)
        assert isinstance(event, PageFault)
        assert event.flags == 4
        assert uffd.continue_(second.address, PAGE) == PAGE
        assert toucher.finish() == b"\x03" * 8
        with pytest.raises(AlreadyPresentError):
            uffd.continue_(second.address, PAGE)
    first.close()
    second.close()


def test_a_poisoned_page_kills_who_touches_it() -> None:
    if not descriptor.available_features() & Features.POISON:
        pytest.skip("this kernel has no UFFDIO_POISON")
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        mine = Mapping.create(PAGE, PAGE)
        with Userfaultfd.open(Features.POISON, user_mode_only=True) as uffd:
            uffd.register(mine.address, PAGE)
            if uffd.poison(mine.address, PAGE) == PAGE:
                ctypes.string_at(mine.address, 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGBUS


def test_pages_are_moved(memory: Mapping) -> None:
    if not descriptor.available_features() & Features.MOVE:
        pytest.skip("this kernel has no UFFDIO_MOVE")
    other = syscalls.map_memory(4 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    syscalls.memcpy(other, source(5, 2), 2 * PAGE)
    with Userfaultfd.open(Features.MOVE, user_mode_only=True) as uffd:
        uffd.register(memory.address, memory.length)
        toucher = Toucher(memory.address + PAGE)
        next_event(uffd)
        assert uffd.move(memory.address, other, 2 * PAGE) == 2 * PAGE
        assert toucher.finish() == b"\x05" * 8
        with pytest.raises(NotRegisteredError):
            uffd.move(memory.address + 4 * PAGE, other, 2 * PAGE)
        assert uffd.move(memory.address + 4 * PAGE, other, 2 * PAGE, allow_holes=True) == 2 * PAGE
    assert ctypes.string_at(other, 8) == bytes(8)
    syscalls.unmap_memory(other, 4 * PAGE)


# ---- events


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_remove_and_unmap_events_hold_their_cause_until_they_are_read() -> None:
    memory = Mapping.create(PAGES * PAGE, PAGE)
    start = memory.address
    wanted = Features.EVENT_REMOVE | Features.EVENT_UNMAP
    with Userfaultfd.open(wanted, user_mode_only=True) as uffd:
        uffd.register(start, memory.length)
        uffd.zeropage(start, memory.length)
        thread = in_thread(lambda: memory.discard(4 * PAGE, 2 * PAGE))
        assert uffd.poll(10)
        assert thread.is_alive()
        with pytest.raises(AgainError) as caught:
            uffd.zeropage(start + 4 * PAGE, PAGE)
        assert caught.value.done == 0
        assert uffd.read_events() == [RemoveEvent(start + 4 * PAGE, start + 6 * PAGE)]
        thread.join(10)
        uffd.zeropage(start + 4 * PAGE, PAGE)
        thread = in_thread(memory.close)
        assert next_event(uffd) == UnmapEvent(start, start + PAGES * PAGE)
        thread.join(10)


def test_remap_event() -> None:
    libc = ctypes.CDLL(None)
    libc.mremap.restype = ctypes.c_void_p
    old = syscalls.map_memory(2 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    new = syscalls.map_memory(2 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages = ctypes.c_size_t(2 * PAGE)
    with Userfaultfd.open(Features.EVENT_REMAP, user_mode_only=True) as uffd:
        uffd.register(old, 2 * PAGE)
        thread = in_thread(
            lambda: libc.mremap(ctypes.c_void_p(old), pages, pages, 3, ctypes.c_void_p(new))
        )
        assert next_event(uffd) == RemapEvent(old, new, 2 * PAGE)
        thread.join(10)
    syscalls.unmap_memory(new, 2 * PAGE)


def _fork_with_missing_memory(control: socket.socket) -> int:
    """The owner: hands its descriptor over, forks, and lets the new process read a page."""
    try:
        uffd = Userfaultfd.open(Features.EVENT_FORK)
    except UserfaultError as error:
        control.send(str(error).encode())
        return 0
    memory = syscalls.map_memory(PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    uffd.register(memory, PAGE)
    socket.send_fds(control, [memory.to_bytes(8, "little")], [uffd.fileno()])
    pid = os.fork()
    if pid == 0:
        os._exit(ctypes.string_at(memory, 1)[0])
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_fork_event_brings_the_childs_descriptor() -> None:
    """In a process of its own: fork holds the allocator's locks until the event is read."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = _fork_with_missing_memory(theirs)
        finally:
            os._exit(status)
    with ours, theirs:
        data, fds, _, _ = socket.recv_fds(ours, 1000, 1)
        if not fds:
            os.waitpid(pid, 0)
            pytest.skip(f"EVENT_FORK is for the privileged: {data.decode()}")
        address = int.from_bytes(data, "little")
        with Userfaultfd.from_fd(fds[0]) as uffd:
            event = next_event(uffd)
            assert isinstance(event, ForkEvent)
            with event.uffd as child:
                fault = next_event(child)
                assert isinstance(fault, PageFault)
                assert fault.address == address
                child.copy(address, source(9), PAGE)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def test_events_of_later_kernels_are_passed_through(uffd: Userfaultfd) -> None:
    raw = b"\x7f" + bytes(range(31))
    assert uffd.decode(raw) == UnknownEvent(0x7F, raw)


def test_messages_are_what_events_are_made_of(uffd: Userfaultfd, memory: Mapping) -> None:
    uffd.register(memory.address, memory.length)
    assert uffd.read_messages() == b""
    toucher = Toucher(memory.address + PAGE)
    assert uffd.poll(10)
    message = uffd.read_messages()
    assert len(message) == descriptor.MESSAGE_SIZE
    assert uffd.decode(message) == PageFault(memory.address + PAGE, 0, 0)
    uffd.zeropage(memory.address + PAGE, PAGE)
    toucher.finish()


def test_many_faults_come_with_one_read(uffd: Userfaultfd, memory: Mapping) -> None:
    uffd.register(memory.address, memory.length)
    touchers = [Toucher(memory.address + page * PAGE) for page in range(8)]
    deadline = time.monotonic() + 10
    while _pending(uffd) < 8 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert len(uffd.read_events(limit=3)) == 3
    assert len(uffd.read_events(limit=100)) == 5
    assert uffd.read_events() == []
    uffd.zeropage(memory.address, memory.length)
    for toucher in touchers:
        toucher.finish()


def _pending(uffd: Userfaultfd) -> int:
    with open(f"/proc/self/fdinfo/{uffd.fileno()}") as file:
        return int(next(line.split()[1] for line in file if line.startswith("pending:")))


def test_reading_a_closed_or_foreign_descriptor_is_an_error() -> None:
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    with (
        Userfaultfd(memory) as foreign,
        pytest.raises(UserfaultError, match=r"read\(userfaultfd\)"),
    ):
        foreign.read_events()
    reader, writer = os.pipe()
    os.write(writer, b"torn")
    with Userfaultfd(reader) as pipe, pytest.raises(UserfaultError, match="alignment is lost"):
        pipe.read_events()
    os.close(writer)


def test_user_mode_only_fails_faults_of_the_kernel(memory: Mapping) -> None:
    with Userfaultfd.open(user_mode_only=True) as uffd:
        uffd.register(memory.address, memory.length)
        reader, writer = os.pipe()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.write(writer, ctypes.c_void_p(memory.address), 1) == -1
        assert ctypes.get_errno() == errno.EFAULT
        os.close(reader)
        os.close(writer)


def test_the_hazard_of_the_gil_is_real() -> None:
    """A plain access to a missing page stops the thread that would place it: only a kill helps."""
    code = """
import ctypes, sys, threading
from postcopy_proto.userfault import syscalls
from postcopy_proto.userfault.descriptor import Userfaultfd
from postcopy_proto.userfault.mapping import Mapping
memory = Mapping.create(4096, 4096)
uffd = Userfaultfd.open(user_mode_only=True)
uffd.register(memory.address, 4096)
def serve():
    uffd.poll()
    uffd.zeropage(uffd.read_events()[0].address, 4096)
threading.Thread(target=serve, daemon=True).start()
print("touching", flush=True)
if sys.argv[1] == "plain":
    (ctypes.c_char * 4096).from_address(memory.address)[0]
else:
    word = ctypes.create_string_buffer(8)
    syscalls.memcpy(ctypes.addressof(word), memory.address, 8)
print("touched", flush=True)
"""
    assert run_python(code, "without the GIL").stdout.split() == ["touching", "touched"]
    command = [sys.executable, "-c", code, "plain"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"touching\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)
        process.kill()
        assert process.stdout.read() == b""
