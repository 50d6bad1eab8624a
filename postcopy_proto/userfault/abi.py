"""The kernel's userfaultfd interface: structures, ioctl numbers, flags, feature bits.

Everything here is fixed ABI (include/uapi/linux/userfaultfd.h, Linux 6.18;
Documentation/admin-guide/mm/userfaultfd.rst). Each ioctl number is written out, as it shows in a
trace, and computed again from its parts when this module is imported.

Standard library only: the guest process of `net.guest` imports this without numpy.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final

# ---- structures. Native integers of 64 bits, every one in its natural place on 64-bit hosts.

# The two are the same bytes, and `long`, where it has 64 bits, is what Python packs fastest: these
# are packed and unpacked for every page and every fault.
_U64, _S64 = "Ll" if struct.calcsize("@L") == 8 else "Qq"

UFFD_MSG: Final = struct.Struct(f"@B7x3{_U64}")
"""struct uffd_msg: event, then 24 bytes whose meaning depends on it (32 bytes)"""
UFFD_MSG_PAGEFAULT: Final = struct.Struct(f"@B7x2{_U64}I4x")
"""struct uffd_msg of a page fault: event, flags, address, thread id (32 bytes)"""
UFFD_MSG_FORK: Final = struct.Struct("@B7xI20x")
"""struct uffd_msg of a fork: event, descriptor (32 bytes)"""
UFFDIO_API_STRUCT: Final = struct.Struct(f"@3{_U64}")
"""struct uffdio_api: api, features, ioctls"""
UFFDIO_RANGE_STRUCT: Final = struct.Struct(f"@2{_U64}")
"""struct uffdio_range: start, length in bytes; of UNREGISTER and WAKE"""
UFFDIO_REGISTER_STRUCT: Final = struct.Struct(f"@4{_U64}")
"""struct uffdio_register: start, length, mode, ioctls"""
UFFDIO_COPY_STRUCT: Final = struct.Struct(f"@4{_U64}{_S64}")
"""struct uffdio_copy: destination, source, length, mode, bytes copied or -errno"""
UFFDIO_COPY_ADDRESSES: Final = struct.Struct(f"@2{_U64}")
"""its first two members, destination and source"""
UFFDIO_ZEROPAGE_STRUCT: Final = struct.Struct(f"@3{_U64}{_S64}")
"""struct uffdio_zeropage: start, length, mode, bytes zeroed or -errno"""
UFFDIO_WRITEPROTECT_STRUCT: Final = struct.Struct(f"@3{_U64}")
"""struct uffdio_writeprotect: start, length, mode"""
UFFDIO_CONTINUE_STRUCT: Final = struct.Struct(f"@3{_U64}{_S64}")
"""struct uffdio_continue: start, length, mode, bytes mapped or -errno"""
UFFDIO_POISON_STRUCT: Final = struct.Struct(f"@3{_U64}{_S64}")
"""struct uffdio_poison: start, length, mode, bytes poisoned or -errno"""
UFFDIO_MOVE_STRUCT: Final = struct.Struct(f"@4{_U64}{_S64}")
"""struct uffdio_move: destination, source, length, mode, bytes moved or -errno"""
UFFDIO_DONE: Final = struct.Struct(f"@{_S64}")
"""the last member of each of those that have one: bytes done or -errno"""

# ---- ioctl numbers

UFFD_API: Final = 0xAA

USERFAULTFD_IOC_NEW: Final = 0x0000AA00
UFFDIO_API: Final = 0xC018AA3F
UFFDIO_REGISTER: Final = 0xC020AA00
UFFDIO_UNREGISTER: Final = 0x8010AA01
UFFDIO_WAKE: Final = 0x8010AA02
UFFDIO_COPY: Final = 0xC028AA03
UFFDIO_ZEROPAGE: Final = 0xC020AA04
UFFDIO_MOVE: Final = 0xC028AA05
UFFDIO_WRITEPROTECT: Final = 0xC018AA06
UFFDIO_CONTINUE: Final = 0xC020AA07
UFFDIO_POISON: Final = 0xC020AA08

_IOC_NONE, _IOC_WRITE, _IOC_READ = 0, 1, 2


def ioctl_number(direction: int, type_: int, number: int, size: int) -> int:
    """_IOC() of include/uapi/asm-generic/ioctl.h: direction, type, number, argument size."""
    return direction << 30 | size << 16 | type_ << 8 | number


_BOTH = _IOC_READ | _IOC_WRITE
_COMPUTED: Final = {
    USERFAULTFD_IOC_NEW: (_IOC_NONE, 0x00, 0),
    UFFDIO_API: (_BOTH, 0x3F, UFFDIO_API_STRUCT.size),
    UFFDIO_REGISTER: (_BOTH, 0x00, UFFDIO_REGISTER_STRUCT.size),
    UFFDIO_UNREGISTER: (_IOC_READ, 0x01, UFFDIO_RANGE_STRUCT.size),
    UFFDIO_WAKE: (_IOC_READ, 0x02, UFFDIO_RANGE_STRUCT.size),
    UFFDIO_COPY: (_BOTH, 0x03, UFFDIO_COPY_STRUCT.size),
    UFFDIO_ZEROPAGE: (_BOTH, 0x04, UFFDIO_ZEROPAGE_STRUCT.size),
    UFFDIO_MOVE: (_BOTH, 0x05, UFFDIO_MOVE_STRUCT.size),
    UFFDIO_WRITEPROTECT: (_BOTH, 0x06, UFFDIO_WRITEPROTECT_STRUCT.size),
    UFFDIO_CONTINUE: (_BOTH, 0x07, UFFDIO_CONTINUE_STRUCT.size),
    UFFDIO_POISON: (_BOTH, 0x08, UFFDIO_POISON_STRUCT.size),
}
for _number, (_direction, _nr, _size) in _COMPUTED.items():
    assert _number == ioctl_number(_direction, UFFD_API, _nr, _size), f"ioctl {_number:#x}"
assert UFFD_MSG.size == UFFD_MSG_PAGEFAULT.size == UFFD_MSG_FORK.size == 32


class Ioctls(IntFlag):
    """Bits of `ioctls` in uffdio_api and uffdio_register; unknown bits are kept."""

    REGISTER = 1 << 0x00
    UNREGISTER = 1 << 0x01
    WAKE = 1 << 0x02
    COPY = 1 << 0x03
    ZEROPAGE = 1 << 0x04
    MOVE = 1 << 0x05
    WRITEPROTECT = 1 << 0x06
    CONTINUE = 1 << 0x07
    POISON = 1 << 0x08
    API = 1 << 0x3F


class Features(IntFlag):
    """UFFD_FEATURE_*: what a kernel offers and what a descriptor asked for."""

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15
    MOVE = 1 << 16


class RegisterMode(IntFlag):
    """UFFDIO_REGISTER_MODE_*: which faults are reported."""

    MISSING = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2


class Event(IntEnum):
    """UFFD_EVENT_*: the first byte of a struct uffd_msg."""

    PAGEFAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


class FaultFlags(IntFlag):
    """UFFD_PAGEFAULT_FLAG_*; no bit set is a read of a missing page."""

    WRITE = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2


USER_MODE_ONLY: Final = 1
"""UFFD_USER_MODE_ONLY, a flag of the system call and of USERFAULTFD_IOC_NEW"""

COPY_MODE_DONTWAKE: Final = 1 << 0
COPY_MODE_WP: Final = 1 << 1
ZEROPAGE_MODE_DONTWAKE: Final = 1 << 0
WRITEPROTECT_MODE_WP: Final = 1 << 0
WRITEPROTECT_MODE_DONTWAKE: Final = 1 << 1
CONTINUE_MODE_DONTWAKE: Final = 1 << 0
CONTINUE_MODE_WP: Final = 1 << 1
POISON_MODE_DONTWAKE: Final = 1 << 0
MOVE_MODE_DONTWAKE: Final = 1 << 0
MOVE_MODE_ALLOW_SRC_HOLES: Final = 1 << 1
