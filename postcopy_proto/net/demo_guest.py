"""The guest of `postcopy demo --qemu`: a boot sector that fills its RAM and then counts for ever.

From 1 MiB on it counts eight pages up, one byte each, and checks that they held the last count;
from 4 MiB on it fills RAM with x -> x * 1664525 + 1013904223 (mod 2^32) from 0x12345678 on. It
prints `R`, then a letter each time it has counted, a to z and round: so what it says before and
after a restore must be one sequence. `!` and an address mean that it found wrong memory.

Assembled from tests/interop/guest.asm by a test, which compares.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SEED, MULTIPLIER, INCREMENT = 0x12345678, 1664525, 1013904223
DIRTY_END = 0x108000
FILL_START = 4 << 20
FILL_END = 0x5A5A5000
"""stands in the code for where RAM's filled part ends"""

FLOPPY_BYTES = 1474560
LETTERS = b"abcdefghijklmnopqrstuvwxyz"

CODE = bytes.fromhex(
    """
    fa31c08ed88ed0bc0070e4920c0224fee692baf90330c0ee0f0116587d0f20c00c010f22c0ea2a7c0800
    66b810008ed88ec08ed0bc00700000c70540100000ea7c0800c70544100000008e00000f011d5e7d0000
    b0fee621b034e643b04de640b017e640bf00004000b87856341281ff00505a5a7312890769c00d661900
    055ff36e3c83c704ebe6bf0000100081ff00801000730bc6070081c700100000ebedb052e88400000031
    dbe86f000000bf0000100081ff00801000730e381f7537fe0781c700100000ebea89d831d2b91a000000
    f7f188d00461e84e00000043b901000000fbf4e2fcfaebbf50e82d000000b020e62058cf57b021e82d00
    000058b908000000c1c00450240f04303c3976020407e81400000058e2eaf4ebfd500f20c03500000100
    0f22c058c388c466bafd03eca82074fb88e066baf803eec390900000000000000000ffff0000009acf00
    ffff00000092cf001700407d000047000010
    """
)


def floppy(fill_end: int) -> bytes:
    """A floppy that boots it; it fills RAM up to `fill_end`, a multiple of 4096 bytes."""
    code = CODE.replace(FILL_END.to_bytes(4, "little"), fill_end.to_bytes(4, "little"))
    return (code.ljust(510, b"\0") + b"\x55\xaa").ljust(FLOPPY_BYTES, b"\0")


def filled(count: int) -> NDArray[np.uint32]:
    """The first `count` words from FILL_START on."""
    words = np.empty(count, np.uint32)
    words[:1] = SEED
    done, factor, summand = 1, MULTIPLIER, INCREMENT
    while done < count:
        # x advances by `done` steps at once: the part that is there gives the next one.
        part = words[done : 2 * done]
        part[:] = words[: len(part)] * np.uint32(factor) + np.uint32(summand)
        factor, summand = factor * factor % 2**32, (summand * factor + summand) % 2**32
        done *= 2
    return words


def goes_on(before: bytes, after: bytes) -> bool:
    """Whether what it said after is the continuation of what it said before."""
    said = (before + after).split(b"R", 1)[-1]
    return said == (LETTERS * (len(said) // len(LETTERS) + 1))[: len(said)]
