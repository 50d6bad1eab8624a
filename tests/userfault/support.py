"""What the userfault tests share: contents, batches, faults, unprivileged children, C programs."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from postcopy_proto.messages import Pages
from postcopy_proto.ramblock import TARGET_PAGE_SIZE as PAGE
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.userfault import syscalls
from postcopy_proto.userfault.backend import Backend

MIB = 1 << 20
HUGE = 2 * MIB
COUNT = 64
"""pages of the block that most tests use"""
ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534


def content(block: RAMBlock, seed: int, zero_fraction: float = 0.25) -> NDArray[np.uint8]:
    """Random pages, some of them zero; shape (pages, 4096)."""
    rng = np.random.default_rng(seed)
    pages = rng.integers(0, 256, (block.page_count(), PAGE), np.uint8)
    pages[rng.random(len(pages)) < zero_fraction] = 0
    return pages


def batch(
    idstr: str, pages: NDArray[np.uint8], numbers: Sequence[int], stride: int = PAGE + 8
) -> Pages:
    """The pages with those numbers, `stride` apart; zero pages travel as such."""
    rows = np.zeros((len(numbers), stride), np.uint8)
    rows[:, stride - PAGE :] = pages[list(numbers)]
    positions = np.arange(len(numbers), dtype=np.int64) * stride + (stride - PAGE)
    positions[~pages[list(numbers)].any(axis=1)] = -1
    offsets = np.array(numbers, np.uint64) * PAGE
    return Pages(idstr, offsets, positions, memoryview(rows.reshape(-1)))


def run_python(code: str, *arguments: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    """Runs code in a Python of its own."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def unprivileged(command: Sequence[str], timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Runs a command as an ordinary user, which only root can arrange.

    The one capability left to it lets it read the interpreter and this checkout wherever they
    are installed, and says nothing about userfaultfd.
    """
    if os.getuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("setpriv (util-linux) is not installed")
        drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        drop += [f"--{kind}-caps=-all,+dac_read_search" for kind in ("inh", "ambient")]
        command = [*drop, *command]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment
    )


def compile_c(source: str, folder: Path, name: str = "program", *flags: str) -> Path:
    """Compiles a C program, or skips where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    path = folder / name
    (folder / f"{name}.c").write_text(source)
    command = [compiler, "-O2", "-Wall", "-pthread", *flags, "-o", str(path), f"{path}.c"]
    subprocess.run(command, check=True)
    return path


def resident_pages(address: int, length: int) -> list[bool]:
    """Which 4 KiB pages of this process are present, from /proc/self/pagemap."""
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(address // PAGE * 8)
        entries = np.frombuffer(file.read(length // PAGE * 8), np.uint64)
    return [bool(entry >> 63 & 1) for entry in entries.tolist()]


def listening(backend: Backend) -> Backend:
    """The same backend, past LISTEN."""
    backend.prepare_discard()
    backend.enable_notify()
    return backend


def touch(address: int) -> threading.Thread:
    """A thread that reads 8 bytes there, and waits for them without the GIL."""
    word = ctypes.create_string_buffer(8)
    thread = threading.Thread(
        target=lambda: syscalls.memcpy(ctypes.addressof(word), address, 8), daemon=True
    )
    thread.start()
    return thread


def faults(backend: Backend, timeout: float = 10) -> list[tuple[str, int]]:
    """The next faults that the backend reports."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if found := backend.read_faults():
            return found
        time.sleep(0.001)
    raise AssertionError("no fault came")
