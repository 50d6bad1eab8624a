"""The self-checking guest: its boot image, and what must be in its memory and its output."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MULTIPLIER, INCREMENT = 1664525, 1013904223
SOURCE = Path(__file__).with_name("guest.asm")
MIB = 1 << 20
LETTERS = b"abcdefghijklmnopqrstuvwxyz"


def has_nasm() -> bool:
    return shutil.which("nasm") is not None


def jump(steps: int) -> tuple[int, int]:
    """(a, c) so that x -> a·x + c (mod 2^32) makes `steps` steps of the generator at once."""
    a, c, base_a, base_c = 1, 0, MULTIPLIER, INCREMENT
    while steps:
        if steps & 1:
            a, c = a * base_a & 0xFFFFFFFF, (c * base_a + base_c) & 0xFFFFFFFF
        base_a, base_c = base_a * base_a & 0xFFFFFFFF, (base_c * base_a + base_c) & 0xFFFFFFFF
        steps >>= 1
    return a, c


@dataclass(frozen=True)
class Guest:
    """Byte addresses; the guest dirties one byte a page of [dirty_start, dirty_end) each pass."""

    dirty_start: int = 1 * MIB
    dirty_end: int = 2 * MIB
    fill_start: int = 4 * MIB
    fill_end: int = 5 * MIB
    verify: bool = True
    ticks: int = 2
    seed: int = 0x12345678

    def build(self, directory: Path) -> Path:
        """Assemble the 1.44 MB floppy image; one file for equal guests."""
        image = directory / f"guest-{abs(hash(self)):x}.img"
        if not image.exists():
            a, c = jump(1024)
            defines = {
                "DIRTY_START": self.dirty_start,
                "DIRTY_END": self.dirty_end,
                "FILL_START": self.fill_start,
                "FILL_END": self.fill_end,
                "VERIFY": int(self.verify),
                "TICKS": self.ticks,
                "SEED": self.seed,
                "JUMP_A": a,
                "JUMP_C": c,
            }
            flags = [f"-D{name}={value:#x}" for name, value in defines.items()]
            partial = image.with_suffix(".partial")
            subprocess.run(
                ["nasm", "-f", "bin", *flags, "-o", partial, SOURCE], check=True, timeout=60
            )
            partial.rename(image)
        return image

    def fill_pattern(self) -> NDArray[np.uint32]:
        """What [fill_start, fill_end) holds, dword by dword."""
        count = (self.fill_end - self.fill_start) // 4
        out = np.empty(count, np.uint32)
        out[:1] = self.seed
        done = 1
        while done < count:
            a, c = jump(done)
            n = min(done, count - done)
            out[done : done + n] = out[:n] * np.uint32(a) + np.uint32(c)
            done += n
        return out

    def writes(self, memory_bytes: int) -> NDArray[np.bool_]:
        """Which pages of guest-physical memory the running guest writes: its stack and boot
        sector's surroundings, and the range that it counts up."""
        pages = np.zeros(memory_bytes // 4096, np.bool_)
        pages[:8] = True
        pages[self.dirty_start // 4096 : self.dirty_end // 4096] = True
        return pages


def assert_unbroken(*logs: bytes) -> None:
    """The serial logs, one behind the other, are `R` and then a, b, c … z, a, … without a gap."""
    letters = b"".join(logs)
    start = letters.find(b"R")
    assert start >= 0, f"the guest never started: {letters!r}"
    said = letters[start + 1 :]
    assert b"!" not in said, f"the guest found wrong memory: {said[said.index(b'!') - 3 :]!r}"
    want = (LETTERS * (len(said) // 26 + 1))[: len(said)]
    if said != want:
        at = next(i for i in range(len(said)) if said[i] != want[i])
        raise AssertionError(f"letters broken at {at}: {said[max(0, at - 5) : at + 5]!r}")


STACK_PAGE = 0x6000 // 4096
"""The guest's stack. QEMU before 9.0 under TCG can lose a write to it between two flushes of its
TLB (see `flush` in guest.asm): what lies beyond the stack's end may then differ, harmlessly."""


def assert_same_memory(actual: NDArray[np.uint8], expected: NDArray[np.uint8]) -> None:
    """Equal page by page, shape (pages, 4096), but for the guest's stack."""
    assert actual.shape == expected.shape
    differ = np.flatnonzero((actual != expected).any(axis=1))
    assert set(differ.tolist()) <= {STACK_PAGE}, f"pages {differ[:20]} of {len(differ)} differ"
