from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from postcopy_proto.net import demo_guest
from tests.interop.guest import SOURCE, Guest

pytestmark = pytest.mark.qemu


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "postcopy_proto", "demo", "--qemu", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_demo_runs(qemu_binary: str) -> None:
    done = demo(qemu_binary, "--size", "32M", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["verified"] is True
    assert result["bytes"] == 28 << 20
    assert result["file_bytes"] > 28 << 20
    assert result["lazy"]["seconds_to_first_output"] < result["lazy"]["seconds"]


def test_without_a_qemu_and_with_odd_sizes(qemu_binary: str) -> None:
    assert demo("/no/such/qemu").returncode == 3
    for size in ("8M", "4G", "33000000"):
        assert demo(qemu_binary, "--size", size).returncode == 2


def test_the_boot_sector_is_what_the_source_says(tmp_path: Path) -> None:
    defines = {
        "DIRTY_START": 1 << 20,
        "DIRTY_END": demo_guest.DIRTY_END,
        "FILL_START": demo_guest.FILL_START,
        "FILL_END": demo_guest.FILL_END,
        "VERIFY": 0,
        "TICKS": 1,
    }
    image = tmp_path / "image"
    flags = [f"-D{name}={value:#x}" for name, value in defines.items()]
    subprocess.run(["nasm", "-f", "bin", *flags, "-o", image, SOURCE], check=True, timeout=60)
    assert image.read_bytes() == demo_guest.floppy(demo_guest.FILL_END)


def test_the_pattern_is_the_guests() -> None:
    guest = Guest(fill_end=(4 << 20) + 40_000)
    np.testing.assert_array_equal(demo_guest.filled(10_000), guest.fill_pattern())
    assert demo_guest.goes_on(b"Rab", b"cd")
    assert not demo_guest.goes_on(b"Rab", b"bc")
