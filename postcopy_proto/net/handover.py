"""Handing a userfaultfd over: the handshake that Firecracker's page fault handlers speak.

The process that owns the memory (a VMM) connects to the handler's Unix socket and sends one
message: a JSON array that describes its regions, with the userfaultfd beside it as SCM_RIGHTS.
Nothing more is said. The regions are registered by then, and their memory is empty.

    [{"base_host_virt_addr": 140737353867264, "size": 1073741824, "offset": 0,
      "page_size": 4096, "page_size_kib": 4096}, …]

All figures are bytes, `page_size_kib` too, despite its name (it is an older Firecracker's only
one). `offset` is where the region begins in the VM's memory file. Unknown fields are ignored.

When the handler dies, whoever touches a missing page must not go on: the VMM keeps its own copy
of the descriptor, so its threads wait; it sees the connection close and ends. When the VMM
can't be served any more, the handler kills it (`Handover.kill_owner`): that beats a VM that
hangs, or one that reads zeros. (docs/snapshotting/handling-page-faults-on-snapshot-resume.md)
"""

from __future__ import annotations

import array
import errno
import json
import mmap
import os
import re
import select
import signal
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, NoReturn, Self

from postcopy_proto.errors import ErrorKind, RemoteProtocolError, UserfaultError
from postcopy_proto.ramblock import RAMBlock, is_power_of_two
from postcopy_proto.userfault.abi import Features
from postcopy_proto.userfault.descriptor import Userfaultfd
from postcopy_proto.userfault.region import Owner, Region

MESSAGE_MAX: Final = 1 << 20
"""Most bytes of a description."""
REGIONS_MAX: Final = 4096
"""Most regions in one."""
TOTAL_MAX: Final = 1 << 45
"""Most bytes of all regions together, 32 TiB: a bitmap of their pages takes 1 GiB here."""
PAGE_SIZE_MAX: Final = 1 << 30
"""Biggest host page in bytes; one of them is mapped here where pages are brought together."""
_ADDRESS_END: Final = 1 << 63
_FDS_MAX: Final = 8
"""descriptors taken from one message; all beyond the first are an error, and closed"""
_PEER_CREDENTIALS: Final = struct.Struct("=iII")
SO_PEERPIDFD: Final = 77
"""getsockopt's option for a pidfd of the peer, Linux 6.5 and later (asm-generic/socket.h)"""
_JSON_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.?)*+(?:"|\Z)', re.DOTALL)
"""one, or as much of it as there is"""


@dataclass(frozen=True, slots=True)
class HandedRegion:
    """One region of the description; all figures in bytes."""

    base_host_virt_addr: int
    size: int
    offset: int
    page_size: int = mmap.PAGESIZE

    def as_dict(self) -> dict[str, int]:
        """With both names of the page size, as Firecracker sends them."""
        return {
            "base_host_virt_addr": self.base_host_virt_addr,
            "size": self.size,
            "offset": self.offset,
            "page_size": self.page_size,
            "page_size_kib": self.page_size,
        }


class HandedOwner(Owner):
    """The process that sent the descriptor. Only it can drop its memory, and it does not."""

    def __init__(self, pid: int, uffd: Userfaultfd) -> None:
        self._pid = pid
        self._uffd = uffd

    @property
    def pid(self) -> int:
        """As the kernel named it when it connected."""
        return self._pid

    def open_userfaultfd(
        self, features: Features, user_mode_only: bool | None
    ) -> tuple[Userfaultfd, bool]:
        """The one that was sent, a copy of it; the regions are registered."""
        fd = os.dup(self._uffd.fileno())
        return Userfaultfd.from_fd(fd, user_mode_only=self._uffd.user_mode_only), True

    def available_features(self) -> Features:
        """Those that it was opened with."""
        return self._uffd.features

    def discard(self, region: Region, start: int, length: int) -> None:
        """Not possible: UserfaultError (EOPNOTSUPP)."""
        number = errno.EOPNOTSUPP
        raise UserfaultError(
            "discard",
            number,
            os.strerror(number),
            f"the memory is that of process {self._pid}, which handed it over registered",
            "its memory is empty at first: begin with enable_notify",
        )

    def advise_huge_pages(self, region: Region, on: bool) -> None:
        """The owner's own affair; nothing happens."""

    def lock_memory(self, on: bool) -> None:
        """The owner's own affair; nothing happens."""


class Handover:
    """What was received: `regions` for a Backend, which begins with `enable_notify`."""

    def __init__(
        self,
        connection: socket.socket,
        uffd: Userfaultfd,
        described: Sequence[HandedRegion],
        pidfd: int,
    ) -> None:
        self.connection = connection
        """readable at the owner's end: it never says anything else"""
        self.uffd = uffd
        self.described = tuple(described)
        self.owner = HandedOwner(_peer_pid(connection), uffd)
        self.pidfd = pidfd
        """becomes readable when the owner has exited"""
        self.regions = [
            Region(
                RAMBlock(f"memory@{region.offset:#x}", region.size, region.page_size),
                region.base_host_virt_addr,
                self.owner,
            )
            for region in described
        ]
        """named by their offset in the VM's memory file: memory@0x0"""

    def owner_ended(self, timeout: float = 0) -> bool:
        """Whether the owner has exited, after waiting up to `timeout` seconds for that."""
        return _readable(self.pidfd, timeout)

    def kill_owner(self) -> None:
        """Ends a VMM that can't be served any more, by SIGKILL."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Closes connection and descriptors. Doing it again is fine."""
        self.connection.close()
        self.uffd.close()
        fd, self.pidfd = self.pidfd, -1
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


def hand_over(
    connection: socket.socket, uffd: Userfaultfd, regions: Sequence[HandedRegion]
) -> None:
    """The VMM's half: one message with the description and the descriptor.

    Keep `uffd` open and the connection too: when it ends, the handler has gone.
    """
    message = json.dumps([region.as_dict() for region in regions]).encode()
    sent = socket.send_fds(connection, [message], [uffd.fileno()])
    if sent < len(message):
        connection.sendall(message[sent:])


def receive_handover(connection: socket.socket, timeout: float = 5.0) -> Handover:
    """The handler's half, on an accepted Unix stream connection; takes it over.

    The userfaultfd is made non-blocking, at the VMM's end too: they are one. RemoteProtocolError
    when the description is malformed, does not come in `timeout` seconds, comes without a
    userfaultfd, or the VMM has ended. Everything received is closed then, the connection too.
    """
    fds: list[int] = []
    with ExitStack() as opened:
        opened.enter_context(connection)
        opened.callback(_close_all, fds)
        message = _receive(connection, fds, time.monotonic() + timeout)
        regions = parse_description(message)
        uffd = opened.enter_context(_adopt(fds[0]))
        fds.clear()
        pidfd = _open_peer(connection)
        opened.callback(os.close, pidfd)
        handover = Handover(connection, uffd, regions, pidfd)
        if handover.owner_ended():
            _reject("the process that sent it has ended", ErrorKind.TRUNCATED)
        opened.pop_all()
    return handover


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _adopt(fd: int) -> Userfaultfd:
    """The userfaultfd that came, or RemoteProtocolError: then `fd` is still the caller's."""
    try:
        uffd = Userfaultfd.from_fd(fd)
    except ValueError as error:
        _reject(str(error))
    # A blocking one is never reported as readable, and its read would wait for ever.
    os.set_blocking(fd, False)
    return uffd


def _peer_pid(connection: socket.socket) -> int:
    """Who connected, as the kernel noted it."""
    credentials = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size
    )
    pid: int = _PEER_CREDENTIALS.unpack(credentials)[0]
    return pid


def _open_peer(connection: socket.socket) -> int:
    """A pidfd of who connected; RemoteProtocolError when there is none to be had."""
    try:
        try:
            return connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise
        # An older kernel: here the number may by now be another process's.
        return os.pidfd_open(_peer_pid(connection))
    except OSError as error:
        _reject(
            f"the process that sent it has ended, or is not visible here: {error.strerror}",
            ErrorKind.TRUNCATED,
        )


def _readable(fd: int, timeout: float) -> bool:
    """Whether `fd` can be read or has ended, after waiting up to `timeout` seconds for that."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def receive_fds(connection: socket.socket, size: int, count: int) -> tuple[bytes, list[int]]:
    """Up to `size` bytes and `count` descriptors, which no program started from here inherits.

    `socket.recv_fds` can't say so: it drops its flags.
    """
    fds = array.array("i")
    data, ancillary, _, _ = connection.recvmsg(
        size, socket.CMSG_LEN(count * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, fds.tolist()


def _receive(connection: socket.socket, fds: list[int], deadline: float) -> bytes:
    """Reads until a whole JSON value and one descriptor are there.

    Normally one message brings both; some senders' descriptor comes with a later one.
    """
    message = bytearray()
    while not (fds and _is_whole(message)):
        left = deadline - time.monotonic()
        if left <= 0 or not _readable(connection.fileno(), left):
            what = "description" if not message else "userfaultfd" if not fds else "rest"
            _reject(f"the {what} did not come in time", ErrorKind.TIMEOUT)
        try:
            data, new = receive_fds(connection, 65536, _FDS_MAX)
        except ConnectionError:
            data, new = b"", []
        fds += new
        message += data
        if len(fds) > 1:
            _reject(f"{len(fds)} descriptors came with the description instead of 1")
        if not data:
            _reject("the connection ended before the handover was complete", ErrorKind.TRUNCATED)
        if len(message) > MESSAGE_MAX:
            _reject(f"the description is longer than {MESSAGE_MAX} bytes", ErrorKind.LIMIT)
    return bytes(message)


def _is_whole(message: bytearray) -> bool:
    """Whether every bracket is closed, and there is something at all."""
    bare = _JSON_STRING.sub(b"", message)
    opened = bare.count(b"[") + bare.count(b"{")
    return bool(message.strip()) and opened <= bare.count(b"]") + bare.count(b"}")


def parse_description(message: bytes) -> list[HandedRegion]:
    """The regions of a description; RemoteProtocolError when they can't be regions.

    Each is whole pages at a page boundary, none overlaps another, and together they are no more
    than TOTAL_MAX bytes.
    """
    try:
        entries = json.loads(message)
    except (ValueError, RecursionError) as error:
        _reject(f"the description is no JSON: {error}")
    if not isinstance(entries, list) or not entries:
        _reject("the description is no array with at least one region")
    if len(entries) > REGIONS_MAX:
        _reject(f"{len(entries)} regions, more than {REGIONS_MAX}", ErrorKind.LIMIT)
    regions = [_parse_region(entry) for entry in entries]
    end = 0
    for region in sorted(regions, key=lambda region: region.base_host_virt_addr):
        if region.base_host_virt_addr < end:
            _reject(f"the region at {region.base_host_virt_addr:#x} overlaps another")
        end = region.base_host_virt_addr + region.size
    if (total := sum(region.size for region in regions)) > TOTAL_MAX:
        _reject(f"{total:#x} bytes, more than {TOTAL_MAX:#x}", ErrorKind.LIMIT)
    if len({region.offset for region in regions}) != len(regions):
        _reject("two regions have one offset")
    return regions


def _parse_region(entry: Any) -> HandedRegion:
    if not isinstance(entry, dict):
        _reject("a region is no JSON object")
    address = _figure(entry, "base_host_virt_addr")
    size = _figure(entry, "size")
    offset = _figure(entry, "offset")
    page_size = _figure(entry, "page_size" if "page_size" in entry else "page_size_kib")
    if not is_power_of_two(page_size) or page_size < mmap.PAGESIZE:
        _reject(f"page size {page_size} is no power of 2 of at least {mmap.PAGESIZE}")
    if page_size > PAGE_SIZE_MAX:
        _reject(f"page size {page_size}, more than {PAGE_SIZE_MAX}", ErrorKind.LIMIT)
    if size == 0 or (address | size) % page_size:
        _reject(
            f"{address:#x} + {size:#x} are no whole pages of {page_size} bytes", ErrorKind.RANGE
        )
    if address + size > _ADDRESS_END:
        _reject(f"{address:#x} + {size:#x} is no range of addresses", ErrorKind.RANGE)
    return HandedRegion(address, size, offset, page_size)


def _figure(entry: dict[str, Any], name: str) -> int:
    value = entry.get(name)
    if type(value) is not int or not 0 <= value < _ADDRESS_END:
        # A list or an object is not shown: it may be nested too deep for that.
        shown = type(value).__name__ if isinstance(value, list | dict) else f"{value!r:.40}"
        _reject(f"{name} is {shown}, no figure of bytes")
    return value


def _reject(reason: str, kind: ErrorKind = ErrorKind.MALFORMED) -> NoReturn:
    raise RemoteProtocolError(reason, kind=kind, message="HANDOVER")
