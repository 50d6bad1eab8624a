"""`Userfaultfd`: the binding. One descriptor, every ioctl, every event.

    with Userfaultfd.open() as uffd:
        offered = uffd.register(address, length)
        ...
        for event in uffd.read_events():
            if isinstance(event, PageFault):
                uffd.copy(event.address & -4096, source_address, 4096)

Addresses are integers in the process that opened the descriptor (its *owner*, which need not be
this one); `source` addresses of `copy` are in this process. Lengths are bytes, and both are
multiples of the page size. Every resolver wakes whoever waits for the range unless
`wake=False`, and returns the bytes it did, which is all of them; if it did less it raises a
`ResolveError` that says how many. What no 64-bit number is, is refused like any other wrong
address (EINVAL); every call on a closed descriptor is a UserfaultError with EBADF.

Sources: Documentation/admin-guide/mm/userfaultfd.rst, userfaultfd(2), ioctl_userfaultfd(2).
"""

from __future__ import annotations

import errno
import fcntl
import functools
import mmap
import os
import select
import struct
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from types import TracebackType
from typing import Final, NamedTuple, Self

from postcopy_proto.errors import UserfaultError
from postcopy_proto.userfault import abi, syscalls
from postcopy_proto.userfault.abi import Event, Features, Ioctls, RegisterMode

DEVICE: Final = "/dev/userfaultfd"
"""The device node: who may open it may have a descriptor without any privilege."""


# ---- outcomes of a resolver that did not do all it was asked


class ResolveError(UserfaultError):
    """A resolver stopped early; `done` bytes from the start of its range are finished."""

    done: int = 0


class AgainError(ResolveError):
    """EAGAIN: part of the range was done, or an event waits to be read first: read, repeat."""


class AlreadyPresentError(ResolveError):
    """EEXIST: the page after `done` bytes is there already. Nobody was woken.

    On hugetlb it can also mean that the pool is empty: where the page's slot in the page table
    exists, Linux 6.18 says EEXIST instead of ENOMEM. So a page that is "there" however often
    whoever waits for it is woken needs a larger vm.nr_hugepages.
    """


class OwnerGoneError(ResolveError):
    """ESRCH: the process whose memory it is has exited."""


class NotRegisteredError(ResolveError):
    """ENOENT: the range is not, or no longer, one registered mapping of the owner."""


class NoMemoryLeftError(ResolveError):
    """ENOMEM or ENOSPC: no page could be allocated; for hugetlb the pool is empty."""


_OUTCOMES: Final[dict[int, tuple[type[ResolveError], str]]] = {
    errno.EAGAIN: (AgainError, "read the pending events and repeat"),
    errno.EEXIST: (AlreadyPresentError, "wake the range and go on"),
    errno.ESRCH: (OwnerGoneError, "the process that owns the memory has exited"),
    errno.ENOENT: (NotRegisteredError, "the range must lie in one registered mapping"),
    errno.ENOMEM: (
        NoMemoryLeftError,
        "free memory or raise the memory cgroup's limit; for huge pages raise vm.nr_hugepages",
    ),
    errno.ENOSPC: (NoMemoryLeftError, "raise vm.nr_hugepages or the size of the tmpfs"),
}


_ANYWHERE: Final = 1 << 30
"""An address that every process can have, a 32-bit one too; what is there plays no part."""


# ---- events


class PageFault(NamedTuple):
    """A thread waits for a page."""

    address: int
    """of the access, rounded down to a page unless EXACT_ADDRESS was asked for"""
    flags: int
    """bits of `abi.FaultFlags`"""
    thread_id: int
    """with feature THREAD_ID, else 0"""


class ForkEvent(NamedTuple):
    """The owner forked; `uffd` is the descriptor of the new process's memory, ours to close."""

    uffd: Userfaultfd


class RemapEvent(NamedTuple):
    """The owner moved `length` bytes by mremap."""

    source: int
    destination: int
    length: int


class RemoveEvent(NamedTuple):
    """The owner dropped the pages [start, end) by madvise; it goes on when this was read."""

    start: int
    end: int


class UnmapEvent(NamedTuple):
    """The owner unmapped [start, end)."""

    start: int
    end: int


class UnknownEvent(NamedTuple):
    """An event that this module has no name for, as the kernel gave it."""

    event: int
    raw: bytes


AnyEvent = PageFault | ForkEvent | RemapEvent | RemoveEvent | UnmapEvent | UnknownEvent

MESSAGE_SIZE: Final = abi.UFFD_MSG.size
"""bytes of a struct uffd_msg"""
UNPACK_FAULTS: Final = abi.UFFD_MSG_PAGEFAULT.iter_unpack
"""messages, taken as page faults → (event, flags, address, thread id) of each"""
PAGEFAULT: Final = int(Event.PAGEFAULT)
_UNPACK_EVENT: Final = abi.UFFD_MSG.unpack_from


class Userfaultfd:
    """An open userfaultfd; use `open`, or `from_fd` for one that another process sent.

    Not for use by two threads at once: the ioctls share one argument buffer. One that is dropped
    without `close` is closed with a ResourceWarning.
    """

    _fd = -1

    def __init__(
        self,
        fd: int,
        features: Features = Features(0),  # noqa: B008 - an immutable flag
        *,
        available: Features = Features(0),  # noqa: B008
        ioctls: Ioctls = Ioctls(0),  # noqa: B008
        user_mode_only: bool | None = None,
        origin: str = "received",
    ) -> None:
        self.features = features
        """what was asked for at the handshake"""
        self.available_features = available
        """what the kernel offers; empty for a received descriptor"""
        self.ioctls = ioctls
        """of the descriptor itself; `register` returns those of a range"""
        self.user_mode_only = user_mode_only
        """whether faults taken inside the kernel fail (EFAULT, SIGBUS) instead of being
        reported; None when the sender did not say"""
        self.origin = origin
        """how it was obtained: `device`, `system call` or `received`"""
        self._argument = bytearray(abi.UFFDIO_COPY_STRUCT.size)
        self._range = bytearray(abi.UFFDIO_RANGE_STRUCT.size)
        self._fd = fd  # last: from here on `__del__` closes it

    # ---- opening

    @classmethod
    def open(
        cls,
        features: Features = Features(0),  # noqa: B008
        *,
        user_mode_only: bool | None = False,
        nonblocking: bool = True,
    ) -> Self:
        """A new descriptor of this process's memory, handshake done.

        `user_mode_only` False demands one that reports every fault; True one for faults of user
        code only, which any user may have; None takes the first and, where that is not allowed,
        the second: look at `.user_mode_only`. The device node is tried before the system
        call. UserfaultError when nothing is allowed, naming every attempt, and when features
        are not offered, naming those. (QEMU's uffd_open, ufd_version_check)
        """
        if user_mode_only is None:
            try:
                return cls.open(features, user_mode_only=False, nonblocking=nonblocking)
            except PermissionError:
                return cls.open(features, user_mode_only=True, nonblocking=nonblocking)
        flags = os.O_CLOEXEC | (os.O_NONBLOCK if nonblocking else 0)
        flags |= abi.USER_MODE_ONLY if user_mode_only else 0
        fd, origin = _new_descriptor(flags)
        try:
            available, ioctls = _handshake(fd, features)
        except BaseException:
            os.close(fd)
            raise
        return cls(
            fd,
            features,
            available=available,
            ioctls=ioctls,
            user_mode_only=user_mode_only,
            origin=origin,
        )

    @classmethod
    def from_fd(cls, fd: int, *, user_mode_only: bool | None = None) -> Self:
        """Adopts a descriptor that its owner opened, shook hands on and sent; it is ours now.

        ValueError when it is no userfaultfd or the handshake is still due: only the owner
        can do it, in its own memory.
        """
        try:
            with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
                fields = dict(line.split(":", 1) for line in file.read().splitlines())
        except FileNotFoundError:
            raise ValueError(f"descriptor {fd} is no userfaultfd: it is not open") from None
        if "API" not in fields:
            raise ValueError(f"descriptor {fd} is no userfaultfd")
        state = int(fields["API"].split(":")[1], 16)
        # The kernel marks a finished handshake by bit 31 of the features it was given.
        if not state >> 31 & 1:
            raise ValueError(f"userfaultfd {fd} was sent before its UFFDIO_API handshake")
        return cls(fd, Features(state & ~(1 << 31)), user_mode_only=user_mode_only)

    def fileno(self) -> int:
        """The descriptor; readable when an event waits (if it is non-blocking)."""
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._fd < 0

    def close(self) -> None:
        """Closes it. With the last copy of the descriptor goes every registration."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        # The default keeps `warn` at hand while the interpreter ends.
        if self._fd >= 0:
            _warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            self.close()

    def __repr__(self) -> str:
        mode = {None: "", True: ", user mode only", False: ", full"}[self.user_mode_only]
        return f"<Userfaultfd fd={self._fd} ({self.origin}{mode})>"

    # ---- ranges

    def register(
        self, start: int, length: int, mode: RegisterMode = RegisterMode.MISSING
    ) -> Ioctls:
        """Faults in the range are reported from now on; returns the resolvers it offers.

        EBUSY: another descriptor has it. EPERM: a file that may not be written. EINVAL: not
        mapped, not page-aligned, or memory that cannot be registered so.
        """
        layout, values = abi.UFFDIO_REGISTER_STRUCT, (mode, 0)
        argument = self._plain(
            "UFFDIO_REGISTER", abi.UFFDIO_REGISTER, layout, start, length, values
        )
        return Ioctls(layout.unpack(argument)[3])

    def unregister(self, start: int, length: int) -> None:
        """Faults are the kernel's business again: missing pages read as zero. Wakes waiters.

        OwnerGoneError when there is no process any more.
        """
        layout = abi.UFFDIO_RANGE_STRUCT
        self._plain("UFFDIO_UNREGISTER", abi.UFFDIO_UNREGISTER, layout, start, length)

    def owner_is_gone(self) -> bool:
        """Whether the process whose memory it is has exited.

        Register and unregister say ENOMEM then, so it is asked by a copy. UserfaultError (ENOMEM)
        when not even the page for that can be mapped.
        """
        # The kernel asks for the owner before it looks at the source, which nobody can read: an
        # owner that lives can't get a page by it, whatever is registered there.
        try:
            self.copy(_ANYWHERE, _unreadable_page(), mmap.PAGESIZE)
        except OwnerGoneError:
            return True
        except ResolveError:
            return False
        return False

    def wake(self, start: int, length: int) -> None:
        """Lets whoever waits in the range try again."""
        argument = self._range
        try:
            _PACK_RANGE(argument, 0, start, length)
            _ioctl(self._fd, _UFFDIO_WAKE, argument)
        except _FAILURES as error:
            raise self._refused("UFFDIO_WAKE", error, 0, start, length) from None

    # ---- resolvers

    def copy(
        self,
        destination: int,
        source: int,
        length: int,
        wake: bool = True,
        write_protect: bool = False,
    ) -> int:
        """Makes missing pages present with a copy of `length` bytes at `source`, atomically.

        `source` needs no alignment. `write_protect` maps them so (for WP registrations).
        """
        # No keyword-only arguments: looking their defaults up costs 3 % of a page's copy.
        mode = 0 if wake else abi.COPY_MODE_DONTWAKE
        if write_protect:
            mode |= abi.COPY_MODE_WP
        argument = self._argument
        try:
            _PACK_COPY(argument, 0, destination, source, length, mode, 0)
            _ioctl(self._fd, _UFFDIO_COPY, argument)
        except _FAILURES as error:
            done = _done(error, argument, 32)
            raise self._refused("UFFDIO_COPY", error, done, destination, length, source) from None
        return length

    def copy_each(
        self, destinations: Sequence[int], sources: Iterable[int], length: int, *, wake: bool = True
    ) -> int:
        """`copy` of `length` bytes for every destination and its source, one ioctl each.

        For scattered pages: a loop over `copy` takes a tenth longer. Returns all bytes done;
        the ResolveError of the first that is refused has those done up to there, and the rest
        has not been tried. ValueError when there are not as many sources: before anything is done
        if they have a length; else, when they run out, it says how many bytes were done. An
        iterator may have more, `itertools.repeat(source)` for one.
        """
        fd, argument, request, pack = self._fd, self._argument, _UFFDIO_COPY, _PACK_ADDRESSES
        given: Iterable[int | None] = sources
        try:
            count = len(sources)  # type: ignore[arg-type]
        except TypeError:
            given = chain(sources, (None,))  # refused by `pack`, should it come to that
        else:
            if count != len(destinations):
                raise ValueError(f"{len(destinations)} destinations, but {count} sources")
        source: int | None = 0
        destination, left = 0, iter(destinations)
        try:
            _PACK_COPY(argument, 0, 0, 0, length, 0 if wake else abi.COPY_MODE_DONTWAKE, 0)
            for destination, source in zip(left, given):  # noqa: B905 - strict is slower
                pack(argument, 0, destination, source)
                _ioctl(fd, request, argument)
        except _FAILURES as error:
            if isinstance(error, ValueError) and self._fd >= 0:
                raise  # of the caller's iterators
            before = max(len(destinations) - 1 - sum(1 for _ in left), 0) * length
            if source is None:
                text = f"the sources ended before the destinations, after {before} bytes"
                raise ValueError(text) from None
            done = _done(error, argument, 32)
            # Not every failure writes it: a whole length is what the one before left there.
            done = done if 0 < done < length else 0
            raise self._refused(
                "UFFDIO_COPY", error, before + done, destination, length, source
            ) from None
        return len(destinations) * length

    def zeropage(self, start: int, length: int, *, wake: bool = True) -> int:
        """Makes missing pages present and zero. Not offered on hugetlb: copy zeros there."""
        mode = 0 if wake else abi.ZEROPAGE_MODE_DONTWAKE
        return self._resolve("UFFDIO_ZEROPAGE", abi.UFFDIO_ZEROPAGE, start, length, mode)

    def continue_(
        self, start: int, length: int, *, wake: bool = True, write_protect: bool = False
    ) -> int:
        """Maps pages that are in the page cache already: resolves a minor fault."""
        mode = 0 if wake else abi.CONTINUE_MODE_DONTWAKE
        if write_protect:
            mode |= abi.CONTINUE_MODE_WP
        return self._resolve("UFFDIO_CONTINUE", abi.UFFDIO_CONTINUE, start, length, mode)

    def poison(self, start: int, length: int, *, wake: bool = True) -> int:
        """Marks missing pages so that touching them raises SIGBUS (Linux 6.6)."""
        mode = 0 if wake else abi.POISON_MODE_DONTWAKE
        return self._resolve("UFFDIO_POISON", abi.UFFDIO_POISON, start, length, mode)

    def move(
        self,
        destination: int,
        source: int,
        length: int,
        *,
        wake: bool = True,
        allow_holes: bool = False,
    ) -> int:
        """Moves present pages of the owner to a missing range of it, without a copy (Linux 6.8).

        Anonymous private memory only. `allow_holes` skips missing source pages.
        """
        mode = 0 if wake else abi.MOVE_MODE_DONTWAKE
        if allow_holes:
            mode |= abi.MOVE_MODE_ALLOW_SRC_HOLES
        argument = self._argument
        try:
            abi.UFFDIO_MOVE_STRUCT.pack_into(argument, 0, destination, source, length, mode, 0)
            fcntl.ioctl(self._fd, abi.UFFDIO_MOVE, argument)
        except _FAILURES as error:
            done = _done(error, argument, 32)
            raise self._refused("UFFDIO_MOVE", error, done, destination, length, source) from None
        return length

    def write_protect(
        self, start: int, length: int, *, protect: bool = True, wake: bool = True
    ) -> None:
        """Write-protects present pages of a WP registration, or lifts it and wakes the writer."""
        mode = abi.WRITEPROTECT_MODE_WP if protect else 0
        # The kernel refuses DONTWAKE together with protecting, which wakes nobody anyway.
        if not (protect or wake):
            mode |= abi.WRITEPROTECT_MODE_DONTWAKE
        layout = abi.UFFDIO_WRITEPROTECT_STRUCT
        self._plain("UFFDIO_WRITEPROTECT", abi.UFFDIO_WRITEPROTECT, layout, start, length, (mode,))

    # ---- events

    def poll(self, timeout: float | None = None) -> bool:
        """Whether an event can be read, waiting for `timeout` seconds at most (None: for ever).

        A timeout below 0 is 0. ValueError on a blocking descriptor, which the kernel can't poll.
        """
        if self._fd < 0:
            raise _closed("poll(userfaultfd)")
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        ready = poller.poll(None if timeout is None else max(timeout, 0) * 1000)
        found = ready[0][1] if ready else 0
        if found & select.POLLNVAL:
            raise _closed("poll(userfaultfd)")
        if found & select.POLLERR:
            raise ValueError(f"{self!r} is blocking: only one opened with nonblocking=True polls")
        return bool(found & select.POLLIN)

    def read_events(self, limit: int = 64) -> list[AnyEvent]:
        """Up to `limit` events in one read; none when none waits on a non-blocking descriptor.

        Read until there is none before you poll again: a thread that was woken on your CPU has
        mostly come to its next fault by then, and every poll saved is a tenth of its wait.
        UserfaultError when the read fails or ends inside a message.
        """
        data = self.read_messages(limit)
        events: list[AnyEvent] = []
        for event, flags, address, thread_id in UNPACK_FAULTS(data):
            if event == PAGEFAULT:
                events.append(_new(PageFault, (address, flags, thread_id)))
            else:
                position = len(events) * MESSAGE_SIZE
                events.append(self.decode(data[position : position + MESSAGE_SIZE]))
        return events

    def read_messages(self, limit: int = 64) -> bytes:
        """As `read_events`, but as the kernel gives them: each a struct uffd_msg of 32 bytes.

        For who serves so many faults that an object for each is too much; every message that is
        no page fault is given to `decode`, once.
        """
        try:
            data = _read(self._fd, limit * MESSAGE_SIZE)
        except BlockingIOError:
            return b""
        except OSError as error:
            if error.errno == errno.EBADF:
                raise _closed("read(userfaultfd)") from None
            raise UserfaultError(
                "read(userfaultfd)", error.errno or 0, error.strerror or ""
            ) from None
        if not data or len(data) % MESSAGE_SIZE:
            detail = f"{len(data)} bytes, not a multiple of {MESSAGE_SIZE}: alignment is lost"
            raise UserfaultError("read(userfaultfd)", errno.EIO, "short read", detail)
        return data

    def decode(self, message: bytes) -> AnyEvent:
        """The event of one struct uffd_msg; that of a fork opens a descriptor."""
        event, first, second, third = _UNPACK_EVENT(message)
        if event == PAGEFAULT:
            [(_, flags, address, thread_id)] = UNPACK_FAULTS(message)
            return PageFault(address, flags, thread_id)
        if event == Event.FORK:
            _, fd = abi.UFFD_MSG_FORK.unpack(message)
            child = Userfaultfd(
                fd, self.features, ioctls=self.ioctls, user_mode_only=self.user_mode_only
            )
            return ForkEvent(child)
        if event == Event.REMAP:
            return RemapEvent(first, second, third)
        if event == Event.REMOVE:
            return RemoveEvent(first, second)
        if event == Event.UNMAP:
            return UnmapEvent(first, second)
        return UnknownEvent(event, message)

    # ---- plumbing

    def _resolve(self, operation: str, request: int, start: int, length: int, mode: int) -> int:
        """The four ioctls whose argument is range, mode and the bytes done."""
        argument = self._argument
        try:
            _PACK_RESOLVE(argument, 0, start, length, mode, 0)
            fcntl.ioctl(self._fd, request, argument)
        except _FAILURES as error:
            done = _done(error, argument, 24)
            raise self._refused(operation, error, done, start, length) from None
        return length

    def _plain(
        self,
        operation: str,
        request: int,
        layout: struct.Struct,
        start: int,
        length: int,
        values: tuple[int, ...] = (),
    ) -> bytearray:
        """An ioctl that does all or nothing; returns its argument as the kernel left it."""
        argument = bytearray(layout.size)
        try:
            layout.pack_into(argument, 0, start, length, *values)
            fcntl.ioctl(self._fd, request, argument)
        except _FAILURES as error:
            failure: Exception = error
            if isinstance(error, OSError) and error.errno == errno.ENOMEM and self.owner_is_gone():
                failure = ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
            raise self._refused(operation, failure, 0, start, length) from None
        return argument

    def _refused(
        self,
        operation: str,
        error: Exception,
        done: int,
        start: int,
        length: int,
        source: int | None = None,
    ) -> UserfaultError:
        """The error for any of `_FAILURES` at an ioctl."""
        if self._fd < 0:
            return _closed(operation)
        if not isinstance(error, OSError):
            # Values that the argument has no room for. They may be of any kind: no hexadecimals.
            where = (start, length) if source is None else (start, length, source)
            detail = f"{error}: {', '.join(map(repr, where))}"
            refused = OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return self._outcome(operation, refused, done, detail)
        if error.errno == errno.EBADF:
            return _closed(operation)
        detail = f"{start:#x} + {length:#x}"
        if source is not None:
            detail += f" from {source:#x}"
        return self._outcome(operation, error, done, detail)

    @staticmethod
    def _outcome(operation: str, error: OSError, done: int, detail: str) -> UserfaultError:
        number = error.errno or 0
        kind, advice = _OUTCOMES.get(number, (ResolveError, ""))
        outcome = kind(operation, number, error.strerror or "", detail, advice)
        # Where nothing was done the kernel leaves the negative errno instead of a count.
        outcome.done = max(done, 0)
        return outcome


# Bound once: they are called for every page. A tuple made by hand costs half of a NamedTuple call.
_new: Final = tuple.__new__
_ioctl: Final = fcntl.ioctl
_read: Final = os.read
_UFFDIO_COPY: Final = abi.UFFDIO_COPY
_PACK_COPY: Final = abi.UFFDIO_COPY_STRUCT.pack_into
_PACK_ADDRESSES: Final = abi.UFFDIO_COPY_ADDRESSES.pack_into
_PACK_RESOLVE: Final = abi.UFFDIO_ZEROPAGE_STRUCT.pack_into
_PACK_RANGE: Final = abi.UFFDIO_RANGE_STRUCT.pack_into
_UFFDIO_WAKE: Final = abi.UFFDIO_WAKE

_FAILURES: Final = (OSError, ValueError, struct.error)
"""What an ioctl can fail with: the kernel's errors, a closed descriptor's, a value's that the
argument has no room for."""


def _done(error: Exception, argument: bytearray, position: int) -> int:
    """Bytes done as the kernel says there; none where it was not even asked."""
    if not isinstance(error, OSError):
        return 0
    (done,) = abi.UFFDIO_DONE.unpack_from(argument, position)
    return int(done)


def _closed(operation: str) -> UserfaultError:
    number = errno.EBADF
    return UserfaultError(operation, number, os.strerror(number), "the userfaultfd is closed")


@functools.cache
def _unreadable_page() -> int:
    """The address of a page that nobody can read, one for the whole process."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return syscalls.map_memory(mmap.PAGESIZE, flags, protection=syscalls.PROT_NONE)


def _new_descriptor(flags: int) -> tuple[int, str]:
    """A descriptor from the device node, else from the system call, with how it was got."""
    failures = []
    attempts: tuple[tuple[str, Callable[[int], int]], ...] = (
        ("device", _from_device),
        ("system call", syscalls.userfaultfd),
    )
    for origin, attempt in attempts:
        try:
            return attempt(flags), origin
        except OSError as error:
            failures.append((origin, error))
    raise _open_error(failures, bool(flags & abi.USER_MODE_ONLY))


def _open_error(failures: Sequence[tuple[str, OSError]], user_mode_only: bool) -> UserfaultError:
    """The error of all attempts: the number is that of the one which says most."""
    # Mostly the system call has the last word. But that it is not there, a seccomp profile says
    # too, and the device node is there only where the kernel has userfaultfd.
    numbers = [error.errno or 0 for _, error in failures]
    hidden = numbers[-1] == errno.ENOSYS and numbers[0] not in _NO_DEVICE
    number = numbers[0] if hidden else numbers[-1]
    detail = ", ".join(f"{origin}: {_reason(error)}" for origin, error in failures)
    advice = ""
    kind: type[UserfaultError] = UserfaultError
    if number in (errno.EPERM, errno.EACCES):
        kind = UserfaultPermissionError
        # Any user may have one of these, so something stands before the kernel.
        advice = (
            f"allow userfaultfd(2) in the seccomp profile of this container or service, or give "
            f"access to {DEVICE}"
        )
        if not (user_mode_only or hidden):
            advice = (
                f"give access to {DEVICE}, or CAP_SYS_PTRACE, or set "
                "vm.unprivileged_userfaultfd=1, or ask for user-mode-only"
            )
    elif number == errno.ENOSYS:
        last = failures[-1][1]
        advice = last.advice if isinstance(last, UserfaultError) else ""
        advice = advice or (
            "the kernel was built without CONFIG_USERFAULTFD, or a seccomp profile hides the call; "
            f"{DEVICE} would do too"
        )
    return kind("userfaultfd", number, os.strerror(number), detail, advice)


_NO_DEVICE: Final = (errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ENOTTY)
"""How the device node fails where there is none, or no driver behind it."""


def _reason(error: OSError) -> str:
    detail = error.detail if isinstance(error, UserfaultError) else ""
    return f"{error.strerror} ({detail})" if detail else error.strerror or ""


class UserfaultPermissionError(UserfaultError, PermissionError):
    """No descriptor of the wanted kind is allowed here."""


def _from_device(flags: int) -> int:
    device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(device, abi.USERFAULTFD_IOC_NEW, flags)
    finally:
        os.close(device)


def _handshake(fd: int, features: Features) -> tuple[Features, Ioctls]:
    """UFFDIO_API: version 0xAA and the wanted features; returns what the kernel offers."""
    argument = bytearray(abi.UFFDIO_API_STRUCT.size)
    try:
        abi.UFFDIO_API_STRUCT.pack_into(argument, 0, abi.UFFD_API, features, 0)
        fcntl.ioctl(fd, abi.UFFDIO_API, argument)
    except (OSError, struct.error) as error:
        number = (error.errno or 0) if isinstance(error, OSError) else errno.EINVAL
        detail, advice = f"features {_names(features)}", ""
        if number == errno.EINVAL and features:
            missing = int(features) & ~_offered()
            detail = f"features {_names(missing or features)}"
            advice = f"the kernel does not offer {'these' if missing else 'all of these'}"
        elif number == errno.EPERM:
            advice = "EVENT_FORK needs CAP_SYS_PTRACE"
        raise UserfaultError("UFFDIO_API", number, os.strerror(number), detail, advice) from None
    _, available, ioctls = abi.UFFDIO_API_STRUCT.unpack(argument)
    needed = Ioctls.REGISTER | Ioctls.UNREGISTER
    if ioctls & needed != needed:
        detail = f"missing {needed & ~ioctls:#x}"
        raise UserfaultError("UFFDIO_API", errno.ENOTSUP, os.strerror(errno.ENOTSUP), detail)
    return Features(available), Ioctls(ioctls)


def _offered() -> int:
    """The features that the kernel offers; every bit, where it can't be asked."""
    try:
        return int(available_features())  # of the flags' own complement, unknown bits are no part
    except UserfaultError:
        return -1


def _names(features: int) -> str:
    """Names of the features, and the number of what has none."""
    known = [feature.name or "" for feature in Features if feature & features]
    unknown = features & ~sum(Features)
    return ", ".join(known + [f"{unknown:#x}"] * bool(unknown))


def available_features() -> Features:
    """What this kernel offers, asked on a descriptor of its own.

    A descriptor shakes hands once, so what to ask for must be known before. (QEMU's
    uffd_query_features)
    """
    with Userfaultfd.open(user_mode_only=True) as uffd:
        return uffd.available_features
