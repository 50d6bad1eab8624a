"""Warm memory: what a machine has not used for a while is slow at its first use.

A virtual machine's host may have to find each page again, at a tenth of the usual speed, and which
of two contestants it meets is chance. So what one of them is about to take is used and freed just
before it does.
"""

from __future__ import annotations

import ctypes
import mmap


def warm(size: int) -> None:
    """Use `size` bytes, page by page, and free them."""
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        first = ctypes.c_char.from_buffer(memory)
        ctypes.memset(ctypes.addressof(first), 1, size)
        del first
