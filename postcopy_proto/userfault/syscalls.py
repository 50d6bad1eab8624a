"""The few system calls that Python's standard library has no name for.

Every call goes through a `ctypes.CDLL`, which drops the GIL for its duration: a call that ends in
a page fault stops its own thread and no other. Addresses are plain integers, lengths are bytes.
Failures raise `UserfaultError` with the call's name.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform

from postcopy_proto.errors import UserfaultError

_libc = ctypes.CDLL(None, use_errno=True)

_USERFAULTFD_NUMBER = {"x86_64": 323, "aarch64": 282, "riscv64": 282, "ppc64le": 364, "s390x": 355}

PROT_NONE = 0
MAP_FAILED = ctypes.c_void_p(-1).value
MADV_REMOVE = 9
MADV_DONTFORK = 10
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MCL_CURRENT, MCL_FUTURE = 1, 2
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
IOV_MAX = 1024
"""most iovec entries of one process_vm_readv or process_vm_writev (UIO_MAXIOV)"""

_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.munlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
for _name in ("process_vm_readv", "process_vm_writev"):
    _function = getattr(_libc, _name)
    _function.restype = ctypes.c_ssize_t
    _function.argtypes = (
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    )

memcpy = _libc.memcpy
"""memcpy(destination address, source address, bytes), without the GIL"""
memcpy.restype = ctypes.c_void_p
memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def system_error(operation: str, detail: str = "", advice: str = "") -> UserfaultError:
    """The error of the libc call that just failed in this thread."""
    number = ctypes.get_errno()
    return UserfaultError(operation, number, os.strerror(number), detail, advice)


def _check(result: int, operation: str, detail: str = "") -> int:
    if result < 0:
        raise system_error(operation, detail)
    return result


def userfaultfd(flags: int) -> int:
    """userfaultfd(2): a new descriptor. ENOSYS too where its number is not known here."""
    number = _USERFAULTFD_NUMBER.get(platform.machine())
    if number is None:
        raise UserfaultError(
            "userfaultfd",
            errno.ENOSYS,
            os.strerror(errno.ENOSYS),
            f"the number of the call on {platform.machine()} is not known here",
            "give access to /dev/userfaultfd, which needs no number (Linux 6.1)",
        )
    return _check(_libc.syscall(ctypes.c_long(number), ctypes.c_int(flags)), "userfaultfd")


def map_memory(
    length: int,
    flags: int,
    fd: int = -1,
    offset: int = 0,
    protection: int = mmap.PROT_READ | mmap.PROT_WRITE,
) -> int:
    """mmap(2), readable and writable unless told otherwise; returns the address."""
    address: int = _libc.mmap(None, length, protection, flags, fd, offset)
    if address == MAP_FAILED:
        raise system_error("mmap", f"{length} bytes, flags {flags:#x}")
    return address


def unmap_memory(address: int, length: int) -> None:
    """munmap(2)."""
    _check(_libc.munmap(address, length), "munmap", f"{address:#x} + {length:#x}")


def madvise(address: int, length: int, advice: int) -> None:
    """madvise(2)."""
    where = f"{address:#x} + {length:#x}, advice {advice}"
    _check(_libc.madvise(address, length, advice), "madvise", where)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """fallocate(2) that drops a file's pages and leaves its size."""
    mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    result = _libc.fallocate(fd, mode, offset, length)
    _check(result, "fallocate(PUNCH_HOLE)", f"{offset:#x} + {length:#x}")


def lock_memory(on: bool) -> None:
    """mlockall(2) of all present and future memory, or munlockall(2)."""
    if on:
        _check(_libc.mlockall(MCL_CURRENT | MCL_FUTURE), "mlockall")
    else:
        _check(_libc.munlockall(), "munlockall")


def unlock_range(address: int, length: int) -> None:
    """munlock(2)."""
    _check(_libc.munlock(address, length), "munlock", f"{address:#x} + {length:#x}")


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument."""
    _check(_libc.prctl(option, value, 0, 0, 0), f"prctl({option})")


def process_vm_writev(pid: int, local: int, locals_: int, remote: int, remotes: int) -> int:
    """process_vm_writev(2): two addresses of iovec arrays with their counts; returns bytes."""
    result: int = _libc.process_vm_writev(pid, local, locals_, remote, remotes, 0)
    return _check(result, "process_vm_writev", f"process {pid}")


def process_vm_readv(pid: int, local: int, locals_: int, remote: int, remotes: int) -> int:
    """process_vm_readv(2): two addresses of iovec arrays with their counts; returns bytes."""
    result: int = _libc.process_vm_readv(pid, local, locals_, remote, remotes, 0)
    return _check(result, "process_vm_readv", f"process {pid}")
