"""`Region`: the memory of one RAMBlock, in this process or in another.

**The rule of the interpreter's lock.** A thread that touches a missing page waits in the kernel
until somebody places it. If it holds the GIL meanwhile (an index into a `memoryview`, numpy, any
plain Python access), no other thread of the process runs, the one that would place the page
included: the process hangs for ever. So nothing here hands out a view of guest memory.

* `Region.read` copies inside a call that has dropped the GIL: it waits, others run.
* It refuses to wait in the thread that serves the faults, which would wait for itself
  (EDEADLK): there, `Backend.want` asks for the page and the loop goes on.
* Best of all, the memory belongs to another process (`net.guest`, a VMM): then nothing in this
  one can fault on it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from postcopy_proto.errors import UserfaultError
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.userfault import syscalls
from postcopy_proto.userfault.abi import Features
from postcopy_proto.userfault.descriptor import Userfaultfd
from postcopy_proto.userfault.mapping import Backing, Mapping


class Owner(ABC):
    """The process whose memory regions are, and what only it can do to them."""

    @property
    @abstractmethod
    def pid(self) -> int:
        """Its process id."""

    @abstractmethod
    def open_userfaultfd(
        self, features: Features, user_mode_only: bool | None
    ) -> tuple[Userfaultfd, bool]:
        """The owner's descriptor, and whether its regions are registered already.

        `user_mode_only` as for `Userfaultfd.open`.
        """

    @abstractmethod
    def available_features(self) -> Features:
        """What `open_userfaultfd` may be asked for."""

    @abstractmethod
    def discard(self, region: Region, start: int, length: int) -> None:
        """Drops [start, start + length) of a region; may take effect only with `flush`."""

    @abstractmethod
    def advise_huge_pages(self, region: Region, on: bool) -> None:
        """Allows or forbids transparent huge pages in the region; as `discard`."""

    def flush(self) -> None:
        """Returns when everything asked for before has been done; raises what failed of it."""
        return

    @abstractmethod
    def lock_memory(self, on: bool) -> None:
        """mlockall or munlockall: userfaultfd and locked memory don't go together."""


class ThisProcess(Owner):
    """The owner of regions made here."""

    @property
    def pid(self) -> int:
        """Ours, in a forked process too."""
        return os.getpid()

    def open_userfaultfd(
        self, features: Features, user_mode_only: bool | None
    ) -> tuple[Userfaultfd, bool]:
        """A new descriptor."""
        return Userfaultfd.open(features, user_mode_only=user_mode_only), False

    def available_features(self) -> Features:
        """Asked on a descriptor of its own."""
        with Userfaultfd.open(user_mode_only=True) as uffd:
            return uffd.available_features

    def discard(self, region: Region, start: int, length: int) -> None:
        """At once."""
        region.mapping.discard(start, length)

    def advise_huge_pages(self, region: Region, on: bool) -> None:
        """At once."""
        region.mapping.advise_huge_pages(on)

    def lock_memory(self, on: bool) -> None:
        """Of this process."""
        syscalls.lock_memory(on)


class Region:
    """A RAMBlock at `address` in the memory of `owner`; make one with a class method.

    `block.used_length` is a multiple of `block.page_size`, the host page (ValueError).
    """

    def __init__(
        self, block: RAMBlock, address: int, owner: Owner, mapping: Mapping | None = None
    ) -> None:
        if block.used_length % block.page_size:
            raise ValueError(
                f"RAMBlock {block.idstr}: {block.used_length} bytes are no multiple of its host "
                f"page of {block.page_size}"
            )
        self.block = block
        self.address = address
        self.owner = owner
        self._mapping = mapping
        self.before_read: Callable[[int, int], None] | None = None
        """called by `read` and `write` with (offset, length): the backend's check against waiting
        for oneself"""

    @classmethod
    def create(
        cls, block: RAMBlock, backing: Backing | str = Backing.ANONYMOUS, owner: Owner | None = None
    ) -> Region:
        """New, empty memory in this process; `hugetlb` for huge pages."""
        mapping = Mapping.create(block.used_length, block.page_size, Backing(backing))
        return cls(block, mapping.address, owner or THIS_PROCESS, mapping)

    @classmethod
    def of_file(cls, block: RAMBlock, fd: int, offset: int = 0) -> Region:
        """Part of a file on tmpfs or hugetlbfs, mapped shared in this process.

        ValueError when the block's host page is smaller than the pages of the file.
        """
        mapping = Mapping.of_file(fd, offset, block.used_length, block.page_size)
        return cls(block, mapping.address, THIS_PROCESS, mapping)

    @property
    def mapping(self) -> Mapping:
        """The memory, if it is of this process (ValueError otherwise)."""
        if self._mapping is None:
            raise ValueError(f"RAMBlock {self.block.idstr}: the memory is of another process")
        return self._mapping

    @property
    def end(self) -> int:
        """The first address after the region."""
        return self.address + self.block.used_length

    def __repr__(self) -> str:
        where = f"{self.address:#x} of process {self.owner.pid}"
        return f"<Region {self.block.idstr} {self.block.used_length:#x} bytes at {where}>"

    def read(self, offset: int, length: int) -> bytes:
        """A copy of the bytes [offset, offset + length).

        It waits for missing pages, without the GIL; UserfaultError (EDEADLK) in the thread that
        serves them. In memory of another process a missing page is EFAULT, in any other
        thread, if the descriptor is user-mode-only. ValueError outside the block.
        """
        if not self.block.contains(offset, length):
            raise ValueError(f"{offset:#x} + {length:#x} is outside {self.block.idstr}")
        result = bytearray(length)
        if length == 0:
            return b""
        target = ctypes.addressof(ctypes.c_char.from_buffer(result))
        if self.before_read is not None:
            self.before_read(offset, length)
        if self._mapping is not None:
            syscalls.memcpy(target, self.address + offset, length)
            return bytes(result)
        local = np.array([[target, length]], np.uint64)
        remote = np.array([[self.address + offset, length]], np.uint64)
        _transfer(syscalls.process_vm_readv, self.owner.pid, local, remote)
        return bytes(result)

    def write(self, offsets: NDArray[np.intp], sources: NDArray[np.int64], size: int) -> None:
        """Writes pieces of `size` bytes at addresses `sources` to `offsets`, both of shape (n,).

        Over whatever is there; for memory that is not registered, or is present: nothing is
        woken, and a missing registered page would be waited for here: EDEADLK in the thread that
        serves it.
        """
        if self.before_read is not None:
            for offset in offsets.tolist():
                self.before_read(offset, size)
        for first in range(0, len(sources), syscalls.IOV_MAX):
            part = slice(first, first + syscalls.IOV_MAX)
            local = np.empty((len(sources[part]), 2), np.uint64)
            remote = np.empty_like(local)
            local[:, 0] = sources[part]
            remote[:, 0] = self.address + offsets[part]
            local[:, 1] = remote[:, 1] = size
            _transfer(syscalls.process_vm_writev, self.owner.pid, local, remote)

    def close(self) -> None:
        """Unmaps the memory if it is of this process; after `Backend.cleanup`.

        While it is registered, unmapping waits until the thread that serves has read the event.
        """
        if self._mapping is not None:
            self._mapping.close()


def _transfer(
    call: Callable[[int, int, int, int, int], int],
    pid: int,
    local: NDArray[np.uint64],
    remote: NDArray[np.uint64],
) -> None:
    """One process_vm call that must move everything; iovec arrays of shape (n, 2)."""
    moved = call(pid, local.ctypes.data, len(local), remote.ctypes.data, len(remote))
    wanted = int(local[:, 1].sum())
    if moved != wanted:
        detail = f"{moved} of {wanted} bytes at {int(remote[0, 0]):#x} of process {pid}"
        raise UserfaultError(call.__name__, errno.EFAULT, os.strerror(errno.EFAULT), detail)


THIS_PROCESS = ThisProcess()
"""the owner of regions made in this process"""
