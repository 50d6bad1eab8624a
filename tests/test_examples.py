"""The examples are short, and do what they say when joined."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from postcopy_proto.examples import destination, handler, source


@pytest.mark.parametrize("module", [source, destination, handler])
def test_under_100_lines(module) -> None:
    assert len(Path(module.__file__).read_text().splitlines()) < 100


def test_joined() -> None:
    vm = source.ToyVm({"toy.ram": 8 << 20, "toy.rom": 64 << 10}, seed=7)
    # Both pages are dirty at the switchover; the second is the last that the background sends.
    wanted = [("toy.rom", (16 - 1) * 4096), ("toy.ram", 1024 * 4096)]
    receiver = destination.ToyDestination(wanted)
    left, right = socket.socketpair()
    with left, right:
        thread = threading.Thread(target=receiver.receive, args=(right,))
        thread.start()
        loop = source.migrate(vm, left)
        thread.join(30)
        assert not thread.is_alive()
    assert receiver.device_state == vm.device_state
    assert receiver.requests == 2
    assert {name: bytes(ram) for name, ram in vm.ram.items()} == receiver.memory
    assert sorted(receiver.arrived) == sorted(
        (name, page * 4096)
        for name, page in (("toy.ram", 1024), ("toy.ram", 2047), ("toy.rom", 8), ("toy.rom", 15))
    )
    assert loop.statistics.pages == 2
    assert loop.statistics.zero_pages == 2


def test_as_programs(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    command = [sys.executable, "-m"]
    receiving = subprocess.Popen(
        [*command, "postcopy_proto.examples.destination", path], stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 20
    while not Path(path).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    sent = subprocess.run(
        [*command, "postcopy_proto.examples.source", path], capture_output=True, text=True
    )
    out, _ = receiving.communicate(timeout=30)
    assert sent.returncode == 0, sent.stderr
    assert receiving.returncode == 0
    assert "toy.ram: 8,388,608 bytes" in out
    assert sent.stdout.startswith("4 pages after the switchover")
