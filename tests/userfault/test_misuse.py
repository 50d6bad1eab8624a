"""A descriptor used in ways it can't be: closed, blocking, dropped, with values of no address."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import pytest

from postcopy_proto.errors import UserfaultError
from postcopy_proto.userfault import syscalls
from postcopy_proto.userfault.descriptor import (
    NotRegisteredError,
    ResolveError,
    Userfaultfd,
    _unreadable_page,
)
from postcopy_proto.userfault.mapping import Mapping
from tests.userfault.support import PAGE, resident_pages, run_python

pytestmark = pytest.mark.userfault

Call = Callable[[Userfaultfd, int], object]
AT_ADDRESS: dict[str, Call] = {
    "register": lambda uffd, at: uffd.register(at, PAGE),
    "unregister": lambda uffd, at: uffd.unregister(at, PAGE),
    "wake": lambda uffd, at: uffd.wake(at, PAGE),
    "copy": lambda uffd, at: uffd.copy(at, PAGE, PAGE),
    "copy from": lambda uffd, at: uffd.copy(PAGE, at, PAGE),
    "copy length": lambda uffd, at: uffd.copy(PAGE, PAGE, at),
    "copy_each": lambda uffd, at: uffd.copy_each([at], [PAGE], PAGE),
    "copy_each from": lambda uffd, at: uffd.copy_each([PAGE], [at], PAGE),
    "zeropage": lambda uffd, at: uffd.zeropage(at, PAGE),
    "continue": lambda uffd, at: uffd.continue_(at, PAGE),
    "poison": lambda uffd, at: uffd.poison(at, PAGE),
    "move": lambda uffd, at: uffd.move(at, PAGE, PAGE),
    "write_protect": lambda uffd, at: uffd.write_protect(at, PAGE),
}
WITHOUT_ADDRESS: dict[str, Call] = {
    "poll": lambda uffd, _: uffd.poll(0),
    "read_events": lambda uffd, _: uffd.read_events(),
    "read_messages": lambda uffd, _: uffd.read_messages(),
    "owner_is_gone": lambda uffd, _: uffd.owner_is_gone(),
}


@pytest.mark.parametrize("name", [*AT_ADDRESS, *WITHOUT_ADDRESS])
def test_every_call_on_a_closed_descriptor_is_one_error(name: str) -> None:
    uffd = Userfaultfd.open(user_mode_only=True)
    uffd.close()
    with pytest.raises(UserfaultError, match="closed") as caught:
        (AT_ADDRESS | WITHOUT_ADDRESS)[name](uffd, PAGE)
    assert type(caught.value) is UserfaultError
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("name", [*AT_ADDRESS, *WITHOUT_ADDRESS])
def test_so_it_is_when_somebody_else_closed_it(name: str) -> None:
    uffd = Userfaultfd.open(user_mode_only=True)
    os.close(uffd.fileno())
    with pytest.raises(UserfaultError, match="closed") as caught:
        (AT_ADDRESS | WITHOUT_ADDRESS)[name](uffd, PAGE)
    assert caught.value.errno == errno.EBADF
    uffd._fd = -1


@pytest.mark.parametrize("address", [1 << 64, -1, -PAGE])
@pytest.mark.parametrize("name", AT_ADDRESS)
def test_what_is_no_address_is_refused_as_one(name: str, address: int) -> None:
    with Userfaultfd.open(user_mode_only=True) as uffd:
        with pytest.raises(ResolveError, match=str(address)) as caught:
            AT_ADDRESS[name](uffd, address)
        assert caught.value.errno == errno.EINVAL
        assert caught.value.done == 0


# ---- poll


def test_a_blocking_descriptor_can_not_be_polled() -> None:
    with (
        Userfaultfd.open(user_mode_only=True, nonblocking=False) as uffd,
        pytest.raises(ValueError, match="nonblocking"),
    ):
        uffd.poll(1)


@pytest.mark.parametrize("timeout", [-0.001, -1, 0])
def test_a_timeout_in_the_past_does_not_wait(timeout: float) -> None:
    with Userfaultfd.open(user_mode_only=True) as uffd:
        seen: list[bool] = []
        thread = threading.Thread(target=lambda: seen.append(uffd.poll(timeout)), daemon=True)
        thread.start()
        thread.join(10)
        assert seen == [False]


def test_a_timeout_is_waited_for() -> None:
    with Userfaultfd.open(user_mode_only=True) as uffd:
        started = time.monotonic()
        assert uffd.poll(0.05) is False
        assert time.monotonic() - started >= 0.05


# ---- whether the owner is gone, and what that costs it: nothing


@pytest.fixture
def low_memory(user_mode_only: bool) -> Iterator[tuple[Userfaultfd, int]]:
    """Registered memory at 1 GiB, where a VMM may map its guest's."""
    address, length = 1 << 30, 16 * PAGE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    fixed_noreplace, private_anonymous = 0x100000, 0x22
    arguments = (address, length, 3, fixed_noreplace | private_anonymous, -1, 0)
    found = libc.mmap(*(ctypes.c_long(argument) for argument in arguments))
    if found != address:
        pytest.skip("something else is mapped at 1 GiB")
    with Userfaultfd.open(user_mode_only=user_mode_only) as uffd:
        uffd.register(address, length)
        yield uffd, address
    syscalls.unmap_memory(address, length)


def test_asking_for_the_owner_places_nothing(low_memory: tuple[Userfaultfd, int]) -> None:
    uffd, address = low_memory
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(uffd.owner_is_gone()), daemon=True)
    thread.start()
    thread.join(10)
    assert seen == [False], "or it waits for itself"
    assert resident_pages(address, 16 * PAGE) == [False] * 16
    assert uffd.read_events() == []
    # A page that nobody can read is refused only after the owner was found.
    with pytest.raises(ResolveError) as caught:
        uffd.copy(address, _unreadable_page(), PAGE)
    assert caught.value.errno == errno.EFAULT
    uffd.unregister(address, 16 * PAGE)
    with pytest.raises(NotRegisteredError):
        uffd.copy(address, _unreadable_page(), PAGE)
    assert uffd.owner_is_gone() is False


# ---- dropped without a close


def _open_userfaultfds() -> int:
    links = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names are all that is wanted
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))  # noqa: PTH115
        except FileNotFoundError:
            continue
    return sum("userfaultfd" in link for link in links)


def test_a_dropped_descriptor_is_closed_with_a_warning() -> None:
    gc.collect()
    before = _open_userfaultfds()
    with pytest.warns(ResourceWarning, match="unclosed <Userfaultfd fd="):
        Userfaultfd.open(user_mode_only=True)
    assert _open_userfaultfds() == before


def test_no_warning_after_close_nor_without_a_descriptor() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uffd = Userfaultfd.open(user_mode_only=True)
        uffd.close()
        uffd.close()
        del uffd
        Userfaultfd.__new__(Userfaultfd)
        with pytest.raises(TypeError):
            Userfaultfd()  # type: ignore[call-arg]
        gc.collect()


def test_at_the_end_of_the_interpreter_too() -> None:
    code = (
        "from postcopy_proto.userfault import Userfaultfd\n"
        "import warnings; warnings.simplefilter('always')\n"
        "kept = Userfaultfd.open(user_mode_only=True)"
    )
    result = run_python(code)
    assert result.returncode == 0
    assert "ResourceWarning: unclosed <Userfaultfd" in result.stderr
    assert "Exception ignored" not in result.stderr


def test_a_child_may_drop_its_copy() -> None:
    """A fork's copy is closed there, and ours goes on."""
    memory = Mapping.create(PAGE, PAGE)
    with Userfaultfd.open(user_mode_only=True) as uffd:
        uffd.register(memory.address, PAGE)
        pid = os.fork()
        if pid == 0:
            uffd.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert uffd.zeropage(memory.address, PAGE) == PAGE
    memory.close()
