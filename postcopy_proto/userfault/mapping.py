"""`Mapping`: a range of this process's memory fit to be guest RAM.

Made the way QEMU makes RAM: huge pages welcome, not inherited by a fork (a forked process would
otherwise see zeros where pages are still missing, because registrations are not inherited).

Standard library only: the guest process of `net.guest` imports this without numpy.
"""

from __future__ import annotations

import errno
import mmap
import os
from enum import StrEnum

from postcopy_proto.errors import UserfaultError
from postcopy_proto.userfault import syscalls

_MAP_NORESERVE = 0x4000
_LENGTH_MAX = 2**63 - 1
"""What a file's size and offset can be; mmap would take a longer one modulo 2**64."""
_HUGE_SHIFT = 26
"""where mmap and memfd_create take the base-2 logarithm of the huge page size"""


class Backing(StrEnum):
    """What guest memory is made of; each is dropped in its own way."""

    ANONYMOUS = "anonymous"
    """private memory; dropped by MADV_DONTNEED"""
    SHARED = "shared"
    """shared memory without a descriptor; dropped by MADV_REMOVE"""
    MEMFD = "memfd"
    """a memory file, mapped shared; dropped by punching a hole"""
    HUGETLB = "hugetlb"
    """a memory file of huge pages, mapped shared; dropped by punching a hole"""
    FILE = "file"
    """part of a file of the caller's on tmpfs or hugetlbfs; dropped by punching a hole"""


class Mapping:
    """`length` bytes at `address`; use `create` or `of_file`.

    A file's mapping keeps a descriptor of it, because holes are punched through that.
    """

    def __init__(
        self, address: int, length: int, page_size: int, backing: Backing, fd: int, offset: int
    ) -> None:
        self.address = address
        self.length = length
        self.page_size = page_size
        self.backing = backing
        self.fd = fd
        """of the file, or -1"""
        self.offset = offset
        """of the mapping's first byte in the file"""

    @classmethod
    def create(cls, length: int, page_size: int, backing: Backing = Backing.ANONYMOUS) -> Mapping:
        """New, empty memory; `length` is a multiple of `page_size`, in bytes.

        ValueError when the sizes don't fit each other or the backing; UserfaultError when the
        kernel has no such memory (ENOMEM: for hugetlb too few pages are reserved).
        """
        _check_sizes(length, page_size)
        if backing is Backing.FILE:
            raise ValueError("a mapping of a file is made by Mapping.of_file")
        if (backing is Backing.HUGETLB) != (page_size != mmap.PAGESIZE):
            raise ValueError(
                f"{backing} memory has no pages of {page_size} bytes: huge pages need hugetlb, "
                f"everything else has {mmap.PAGESIZE}"
            )
        if backing in (Backing.ANONYMOUS, Backing.SHARED):
            private = mmap.MAP_PRIVATE if backing is Backing.ANONYMOUS else mmap.MAP_SHARED
            flags = private | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            address = syscalls.map_memory(length, flags)
            return cls(address, length, page_size, backing, -1, 0)._prepare()
        fd = _memory_file(length, page_size, backing)
        try:
            return cls.of_file(fd, 0, length, page_size, backing=backing)
        finally:
            os.close(fd)

    @classmethod
    def of_file(
        cls,
        fd: int,
        offset: int,
        length: int,
        page_size: int,
        *,
        backing: Backing = Backing.FILE,
    ) -> Mapping:
        """Maps part of a file on tmpfs or hugetlbfs, shared; `offset` in bytes, page-aligned.

        ValueError when it does not fit the file, or the page size not the file's pages;
        UserfaultError when the kernel refuses.
        """
        _check_sizes(length, page_size)
        if offset < 0 or offset % page_size:
            raise ValueError(f"file offset {offset:#x} is no multiple of the page size {page_size}")
        try:
            size, file_page = os.fstat(fd).st_size, os.fstatvfs(fd).f_bsize
            kept = os.dup(fd)  # not inheritable
        except OSError as error:
            raise UserfaultError("fstat, dup", error.errno or 0, error.strerror or "") from None
        try:
            if size < offset + length:
                raise ValueError(f"the file is shorter than {offset:#x} + {length:#x} bytes")
            # That of tmpfs is the host's page, so it is hugetlbfs that has larger ones.
            if file_page > mmap.PAGESIZE and page_size % file_page:
                raise ValueError(
                    f"the file has pages of {file_page} bytes, which pages of {page_size} bytes "
                    "would split"
                )
            address = syscalls.map_memory(length, mmap.MAP_SHARED, kept, offset)
        except BaseException:
            os.close(kept)
            raise
        return cls(address, length, page_size, backing, kept, offset)._prepare()

    def _prepare(self) -> Mapping:
        syscalls.madvise(self.address, self.length, syscalls.MADV_DONTFORK)
        self.advise_huge_pages(True)
        return self

    def advise_huge_pages(self, on: bool) -> None:
        """Allows transparent huge pages, or splits off: MADV_HUGEPAGE, MADV_NOHUGEPAGE.

        Nothing to do for hugetlb, nor on a kernel without transparent huge pages. (QEMU's
        nhp_range, and the first half of cleanup_range)
        """
        if self.page_size != mmap.PAGESIZE:
            return
        advice = syscalls.MADV_HUGEPAGE if on else syscalls.MADV_NOHUGEPAGE
        try:
            syscalls.madvise(self.address, self.length, advice)
        except UserfaultError as error:
            if error.errno != errno.EINVAL:
                raise

    def discard(self, start: int, length: int) -> None:
        """Drops the pages of [start, start + length), bytes from the mapping's start.

        Both are multiples of the page size (ValueError); afterwards the pages are missing.
        (QEMU's ram_block_discard_range)
        """
        if (start | length) & (self.page_size - 1) or start < 0 or length < 0:
            raise ValueError(f"discard {start:#x} + {length:#x} is not aligned to pages")
        if start + length > self.length:
            raise ValueError(f"discard {start:#x} + {length:#x} ends after {self.length:#x}")
        if length == 0:
            return
        if self.fd >= 0:
            syscalls.punch_hole(self.fd, self.offset + start, length)
            return
        shared = self.backing is Backing.SHARED
        advice = syscalls.MADV_REMOVE if shared else mmap.MADV_DONTNEED
        syscalls.madvise(self.address + start, length, advice)

    def close(self) -> None:
        """Unmaps the memory and closes the file."""
        if self.length:
            syscalls.unmap_memory(self.address, self.length)
            self.length = 0
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _check_sizes(length: int, page_size: int) -> None:
    if page_size < mmap.PAGESIZE or page_size & (page_size - 1):
        raise ValueError(f"page size {page_size} is no power of 2 of at least {mmap.PAGESIZE}")
    if not 0 < length <= _LENGTH_MAX or length % page_size:
        raise ValueError(
            f"length {length} is no positive multiple of the page size {page_size} below 2**63"
        )


def _memory_file(length: int, page_size: int, backing: Backing) -> int:
    """A new memory file of that length; its pages come with the first touch."""
    flags = os.MFD_CLOEXEC
    if backing is Backing.HUGETLB:
        flags |= os.MFD_HUGETLB | (page_size.bit_length() - 1) << _HUGE_SHIFT
    try:
        fd = os.memfd_create("guest-ram", flags)
    except OSError as error:
        detail = f"pages of {page_size} bytes"
        raise UserfaultError(
            "memfd_create", error.errno or 0, error.strerror or "", detail
        ) from None
    try:
        os.ftruncate(fd, length)
    except OSError as error:
        os.close(fd)
        detail = f"{length} bytes"
        raise UserfaultError("ftruncate", error.errno or 0, error.strerror or "", detail) from None
    return fd
