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
`ResolveError` that says how many.

Sources: Documentation/admin-guide/mm/userfaultfd.rst, userfaultfd(2), ioctl_userfaultfd(2).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

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
    """EEXIST: the page after `done` bytes is there already. Nobody was woken."""


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
    errno.ENOMEM: (NoMemoryLeftError, "free memory or raise the memory cgroup's limit"),
    errno.ENOSPC: (NoMemoryLeftError, "raise vm.nr_hugepages or the size of the tmpfs"),
}


_NOWHERE: Final = 1 << 30
"""An address that the kernel accepts and that is never registered: below every mapping of a
position-independent program."""


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

    Not for use by two threads at once: the ioctls share one argument buffer.
    """

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
        self._fd = fd
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
        call. UserfaultError when nothing is allowed, naming every attempt, and when a
        feature is not offered, naming it. (QEMU's uffd_open, ufd_version_check)
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
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file.read().splitlines())
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
        argument = bytearray(abi.UFFDIO_REGISTER_STRUCT.pack(start, length, mode, 0))
        self._plain("UFFDIO_REGISTER", abi.UFFDIO_REGISTER, argument, start, length)
        return Ioctls(abi.UFFDIO_REGISTER_STRUCT.unpack(argument)[3])

    def unregister(self, start: int, length: int) -> None:
        """Faults are the kernel's business again: missing pages read as zero. Wakes waiters.

        OwnerGoneError when there is no process any more.
        """
        argument = bytearray(abi.UFFDIO_RANGE_STRUCT.pack(start, length))
        self._plain("UFFDIO_UNREGISTER", abi.UFFDIO_UNREGISTER, argument, start, length)

    def owner_is_gone(self) -> bool:
        """Whether the process whose memory it is has exited.

        Asked by a copy to where nothing is registered; register and unregister say ENOMEM.
        """
        try:
            self.copy(_NOWHERE, _NOWHERE, mmap.PAGESIZE)
        except OwnerGoneError:
            return True
        except ResolveError:
            return False
        return False

    def wake(self, start: int, length: int) -> None:
        """Lets whoever waits in the range try again."""
        abi.UFFDIO_RANGE_STRUCT.pack_into(self._range, 0, start, length)
        self._plain("UFFDIO_WAKE", abi.UFFDIO_WAKE, self._range, start, length)

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
        _PACK_COPY(argument, 0, destination, source, length, mode, 0)
        try:
            _ioctl(self._fd, _UFFDIO_COPY, argument)
        except OSError as error:
            detail = f"{destination:#x} + {length:#x} from {source:#x}"
            raise self._outcome("UFFDIO_COPY", error, _unpack_done(argument, 32), detail) from None
        return length

    def copy_each(
        self, destinations: Sequence[int], sources: Iterable[int], length: int, *, wake: bool = True
    ) -> int:
        """`copy` of `length` bytes for every destination and its source, one ioctl each.

        For scattered pages: a loop over `copy` takes a tenth longer. Returns all bytes done;
        the ResolveError of the first that is refused has those done up to there, and the rest
        has not been tried.
        """
        fd, argument, request, pack = self._fd, self._argument, _UFFDIO_COPY, _PACK_ADDRESSES
        _PACK_COPY(argument, 0, 0, 0, length, 0 if wake else abi.COPY_MODE_DONTWAKE, 0)
        source = destination = 0
        pairs = zip(destinations, sources, strict=True)
        try:
            for destination, source in pairs:
                pack(argument, 0, destination, source)
                _ioctl(fd, request, argument)
        except OSError as error:
            done = _unpack_done(argument, 32)
            # Not every failure writes it: a whole length is what the one before left there.
            done = done if 0 < done < length else 0
            done += (len(destinations) - 1 - sum(1 for _ in pairs)) * length
            detail = f"{destination:#x} + {length:#x} from {source:#x}"
            raise self._outcome("UFFDIO_COPY", error, done, detail) from None
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
        abi.UFFDIO_MOVE_STRUCT.pack_into(argument, 0, destination, source, length, mode, 0)
        try:
            fcntl.ioctl(self._fd, abi.UFFDIO_MOVE, argument)
        except OSError as error:
            detail = f"{destination:#x} + {length:#x} from {source:#x}"
            raise self._outcome("UFFDIO_MOVE", error, _unpack_done(argument, 32), detail) from None
        return length

    def write_protect(
        self, start: int, length: int, *, protect: bool = True, wake: bool = True
    ) -> None:
        """Write-protects present pages of a WP registration, or lifts it and wakes the writer."""
        mode = abi.WRITEPROTECT_MODE_WP if protect else 0
        # The kernel refuses DONTWAKE together with protecting, which wakes nobody anyway.
        if not (protect or wake):
            mode |= abi.WRITEPROTECT_MODE_DONTWAKE
        argument = bytearray(abi.UFFDIO_WRITEPROTECT_STRUCT.pack(start, length, mode))
        self._plain("UFFDIO_WRITEPROTECT", abi.UFFDIO_WRITEPROTECT, argument, start, length)

    # ---- events

    def poll(self, timeout: float | None = None) -> bool:
        """Whether an event can be read, waiting for `timeout` seconds at most (None: for ever)."""
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        return bool(poller.poll(None if timeout is None else timeout * 1000))

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
            fd = first & 0xFFFFFFFF
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
        _PACK_RESOLVE(argument, 0, start, length, mode, 0)
        try:
            fcntl.ioctl(self._fd, request, argument)
        except OSError as error:
            detail = f"{start:#x} + {length:#x}"
            raise self._outcome(operation, error, _unpack_done(argument, 24), detail) from None
        return length

    def _plain(
        self, operation: str, request: int, argument: bytearray, start: int, length: int
    ) -> None:
        """An ioctl that does all or nothing."""
        try:
            fcntl.ioctl(self._fd, request, argument)
        except OSError as error:
            detail = f"{start:#x} + {length:#x}"
            if error.errno == errno.ENOMEM and self.owner_is_gone():
                error = ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
            raise self._outcome(operation, error, 0, detail) from None

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


def _unpack_done(argument: bytearray, position: int) -> int:
    return int.from_bytes(argument[position : position + 8], "little", signed=True)


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
    # The system call has the last word: where the kernel lacks userfaultfd both say so.
    last = failures[-1][1]
    detail = ", ".join(f"{origin}: {error.strerror}" for origin, error in failures)
    raise _open_error(last.errno or 0, detail, bool(flags & abi.USER_MODE_ONLY))


def _open_error(number: int, detail: str, user_mode_only: bool) -> UserfaultError:
    advice = ""
    kind: type[Any] = UserfaultError
    if number in (errno.EPERM, errno.EACCES):
        kind = UserfaultPermissionError
        # Any user may have one of these, so something stands before the kernel.
        advice = (
            f"allow userfaultfd(2) in the seccomp profile of this container or service, or give "
            f"access to {DEVICE}"
        )
        if not user_mode_only:
            advice = (
                f"give access to {DEVICE}, or CAP_SYS_PTRACE, or set "
                "vm.unprivileged_userfaultfd=1, or ask for user-mode-only"
            )
    elif number == errno.ENOSYS:
        advice = "the kernel was built without CONFIG_USERFAULTFD"
    error: UserfaultError = kind("userfaultfd", number, os.strerror(number), detail, advice)
    return error


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
    argument = bytearray(abi.UFFDIO_API_STRUCT.pack(abi.UFFD_API, features, 0))
    try:
        fcntl.ioctl(fd, abi.UFFDIO_API, argument)
    except OSError as error:
        number = error.errno or 0
        advice = ""
        if number == errno.EINVAL:
            advice = "the kernel does not offer every feature of these"
        elif number == errno.EPERM:
            advice = "EVENT_FORK needs CAP_SYS_PTRACE"
        raise UserfaultError(
            "UFFDIO_API", number, error.strerror or "", f"features {features!r}", advice
        ) from None
    _, available, ioctls = abi.UFFDIO_API_STRUCT.unpack(argument)
    needed = Ioctls.REGISTER | Ioctls.UNREGISTER
    if ioctls & needed != needed:
        detail = f"missing {needed & ~ioctls:#x}"
        raise UserfaultError("UFFDIO_API", errno.ENOTSUP, os.strerror(errno.ENOTSUP), detail)
    return Features(available), Ioctls(ioctls)


def available_features() -> Features:
    """What this kernel offers, asked on a descriptor of its own.

    A descriptor shakes hands once, so what to ask for must be known before. (QEMU's
    uffd_query_features)
    """
    with Userfaultfd.open(user_mode_only=True) as uffd:
        return uffd.available_features
