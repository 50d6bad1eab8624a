"""`postcopy restore` into stock QEMU: the guest runs at once, nothing is lost, nothing replayed.

POSTCOPY_SOAK=30 repeats every combination.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.interop.guest import Guest, assert_unbroken
from tests.interop.qemu import HUGEPAGE, Lab, Qemu, wait_until

pytestmark = pytest.mark.qemu

ROM = slice(0xA0000 // 4096, 0x100000 // 4096)
SMALL = Guest()
LARGE = Guest(fill_end=80 << 20, verify=False)


@dataclass
class Saved:
    """A saved VM, and what its source had said and held."""

    path: Path
    guest: Guest
    memory_mib: int
    serial: bytes
    memory: NDArray[np.uint8]


class SavedVms:
    """Saves each kind of VM once a session."""

    def __init__(self, directory: Path, images: Path) -> None:
        self._directory = directory
        self._images = images
        self._made: dict[object, Saved] = {}

    def get(
        self,
        binary: str,
        guest: Guest = SMALL,
        *,
        memory_mib: int = 64,
        hugepages: bool = False,
        mapped_ram: bool = False,
    ) -> Saved:
        key = (binary, guest, memory_mib, hugepages, mapped_ram)
        if key not in self._made:
            path = self._directory / f"vm{len(self._made)}"
            with Lab(self._images) as lab:
                source = lab.start(binary, guest, memory_mib=memory_mib, hugepages=hugepages)
                source.wait_letters(2)
                if mapped_ram:
                    source.capabilities(mapped_ram=True)
                source.save(path, uri=f"file:{path}" if mapped_ram else None)
                self._made[key] = Saved(path, guest, memory_mib, source.serial, source.memory())
        return self._made[key]


@pytest.fixture(scope="module")
def saved_vms(tmp_path_factory: pytest.TempPathFactory, guest_images: Path) -> SavedVms:
    return SavedVms(tmp_path_factory.mktemp("saved"), guest_images)


def postcopy(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "postcopy_proto", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str], *, code: int = 0, timeout: float = 60) -> str:
    """Its stdout, or for another code than 0 its stderr."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out if code == 0 else err


def destination(lab: Lab, binary: str, saved: Saved, **arguments: Any) -> Qemu:
    return lab.start(
        binary, saved.guest, memory_mib=saved.memory_mib, incoming="defer", **arguments
    )


def assert_goes_on(qemu: Qemu, saved: Saved) -> None:
    """The guest counts on, and its memory is what was saved but for what it writes."""
    qemu.wait_migration("completed")
    # What it writes anew begins with its next pass; each pass reads what the last one wrote.
    qemu.wait_letters(4)
    qemu.stop()
    assert_unbroken(saved.serial, qemu.serial)
    same = ~saved.guest.writes(qemu.memory_bytes)
    same[ROM] = False
    np.testing.assert_array_equal(qemu.memory()[same], saved.memory[same])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("guest", [SMALL, LARGE], ids=["small", "large"])
def test_restored_to_an_address(
    lab: Lab, saved_vms: SavedVms, qemu_binary: str, transport: str, guest: Guest, repeat: int
) -> None:
    saved = saved_vms.get(qemu_binary, guest, memory_mib=128)
    qemu = destination(lab, qemu_binary, saved)
    address = f"unix:{lab.path('in')}" if transport == "unix" else f"tcp:127.0.0.1:{free_port()}"
    qemu.capabilities(postcopy_ram=True)
    qemu.incoming(address)
    result = json.loads(finished(postcopy("restore", saved.path, "--to", address, "--json")))
    assert_goes_on(qemu, saved)
    assert result["completed"] is True
    assert result["pages"] >= (guest.fill_end - guest.fill_start) // 4096
    # All of RAM, and the few blocks that hold ROMs and tables.
    assert 128 * 256 < result["pages"] + result["zero_pages"] < 128 * 256 + 1000
    assert result["seconds_to_package"] < result["seconds"]


def test_restored_over_qmp(lab: Lab, saved_vms: SavedVms, qemu_binary: str, repeat: int) -> None:
    saved = saved_vms.get(qemu_binary)
    qemu = destination(lab, qemu_binary, saved)
    finished(postcopy("restore", saved.path, "--qmp", qemu.qmp_path))
    assert_goes_on(qemu, saved)


def test_all_memory_is_equal_in_a_paused_vm(
    lab: Lab, saved_vms: SavedVms, qemu_binary: str
) -> None:
    saved = saved_vms.get(qemu_binary)
    qemu = destination(lab, qemu_binary, saved, paused=True)
    finished(postcopy("restore", saved.path, "--qmp", qemu.qmp_path))
    qemu.wait_migration("completed")
    np.testing.assert_array_equal(qemu.memory(), saved.memory)
    qemu.cont()
    qemu.wait_letters(3)
    assert_unbroken(saved.serial, qemu.serial)


@pytest.mark.hugetlb
@pytest.mark.usefixtures("hugepages")
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_restored_on_huge_pages(
    lab: Lab, saved_vms: SavedVms, qemu_binary: str, transport: str, repeat: int
) -> None:
    guest = Guest(dirty_end=HUGEPAGE, fill_end=8 << 20)
    saved = saved_vms.get(qemu_binary, guest, hugepages=True)
    qemu = destination(lab, qemu_binary, saved, hugepages=True)
    to = [] if transport == "unix" else ["--to", f"tcp:127.0.0.1:{free_port()}"]
    finished(postcopy("restore", saved.path, "--qmp", qemu.qmp_path, *to, "--page-size", "m0=2M"))
    assert_goes_on(qemu, saved)


@pytest.mark.qemu_versions((7, 2), (999,))
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_over_two_connections(
    lab: Lab, saved_vms: SavedVms, qemu_binary: str, transport: str, repeat: int
) -> None:
    saved = saved_vms.get(qemu_binary)
    qemu = destination(lab, qemu_binary, saved)
    to = [] if transport == "unix" else ["--to", f"tcp:127.0.0.1:{free_port()}"]
    process = postcopy(
        *("restore", saved.path, "--qmp", qemu.qmp_path, *to, "--preempt", "--json"),
        *("--background-bandwidth", 0, "--drain-after", 1),
    )
    result = json.loads(finished(process))
    assert result["requests"] > 200  # answered on the second one: nothing else was sent at first
    assert_goes_on(qemu, saved)


@pytest.mark.qemu_versions((7, 2), (999,))
def test_over_two_connections_with_much_in_background(
    lab: Lab, saved_vms: SavedVms, qemu_binary: str
) -> None:
    saved = saved_vms.get(qemu_binary, LARGE, memory_mib=128)
    qemu = destination(lab, qemu_binary, saved)
    finished(postcopy("restore", saved.path, "--qmp", qemu.qmp_path, "--preempt"))
    assert_goes_on(qemu, saved)


@pytest.mark.hugetlb
@pytest.mark.usefixtures("hugepages")
@pytest.mark.qemu_versions((7, 2), (999,))
def test_over_two_connections_on_huge_pages(
    lab: Lab, saved_vms: SavedVms, qemu_binary: str, repeat: int
) -> None:
    guest = Guest(dirty_end=HUGEPAGE, fill_end=8 << 20)
    saved = saved_vms.get(qemu_binary, guest, hugepages=True)
    qemu = destination(lab, qemu_binary, saved, hugepages=True)
    finished(
        postcopy("restore", saved.path, "--qmp", qemu.qmp_path, "--preempt", "--page-size", "m0=2M")
    )
    assert_goes_on(qemu, saved)


@pytest.mark.qemu_versions((7, 2), (999,))
def test_two_connections_that_the_destination_waits_for(
    lab: Lab, saved_vms: SavedVms, qemu_binary: str
) -> None:
    saved = saved_vms.get(qemu_binary)
    qemu = destination(lab, qemu_binary, saved)
    address = f"unix:{lab.path('in')}"
    qemu.capabilities(postcopy_ram=True, postcopy_preempt=True)
    qemu.incoming(address)
    error = finished(postcopy("restore", saved.path, "--to", address, "--timeout", 2), code=1)
    assert "postcopy-preempt: with --preempt, and only then" in error


@pytest.mark.qemu_versions((0,), (7, 0))
def test_two_connections_that_this_qemu_has_not(
    lab: Lab, saved_vms: SavedVms, qemu_binary: str
) -> None:
    saved = saved_vms.get(qemu_binary)
    qemu = destination(lab, qemu_binary, saved)
    error = finished(postcopy("restore", saved.path, "--qmp", qemu.qmp_path, "--preempt"), code=1)
    assert "has no capability postcopy-preempt" in error


@pytest.mark.qemu_versions((9, 0), (999,))
def test_mapped_ram(lab: Lab, saved_vms: SavedVms, qemu_binary: str) -> None:
    saved = saved_vms.get(qemu_binary, mapped_ram=True)
    qemu = destination(lab, qemu_binary, saved)
    finished(postcopy("restore", saved.path, "--qmp", qemu.qmp_path))
    assert_goes_on(qemu, saved)


@pytest.mark.qemu_versions((0,), (999,))
def test_saved_by_one_version_restored_by_a_newer_one(
    lab: Lab, saved_vms: SavedVms, qemu_pair: tuple[str, str]
) -> None:
    older, newer = qemu_pair
    saved = saved_vms.get(older)
    qemu = destination(lab, newer, saved)
    finished(postcopy("restore", saved.path, "--qmp", qemu.qmp_path))
    assert_goes_on(qemu, saved)


# ---- pacing


def test_only_what_is_asked_for_until_it_is_drained(
    lab: Lab, saved_vms: SavedVms, qemu_binary: str
) -> None:
    saved = saved_vms.get(qemu_binary)
    qemu = destination(lab, qemu_binary, saved)
    process = postcopy(
        "restore", saved.path, "--qmp", qemu.qmp_path, "--json",
        "--background-bandwidth", 0, "--drain-after", 1.5,
    )  # fmt: skip
    qemu.wait_letters(3)
    assert qemu.migration_status == "postcopy-active"
    result = json.loads(finished(process))
    assert result["seconds"] >= 1.5
    assert result["requests"] > 200  # the guest walks over 256 pages each pass
    assert_goes_on(qemu, saved)


def test_an_interrupt_drains(lab: Lab, saved_vms: SavedVms, qemu_binary: str) -> None:
    saved = saved_vms.get(qemu_binary)
    qemu = destination(lab, qemu_binary, saved)
    process = postcopy("restore", saved.path, "--qmp", qemu.qmp_path, "--background-bandwidth", 0)
    qemu.wait_letters(2)
    process.send_signal(signal.SIGINT)
    finished(process)
    assert_goes_on(qemu, saved)


def test_background_bandwidth(lab: Lab, saved_vms: SavedVms, qemu_binary: str) -> None:
    saved = saved_vms.get(qemu_binary, Guest(fill_end=24 << 20, verify=False))
    qemu = destination(lab, qemu_binary, saved)
    result = json.loads(
        finished(
            postcopy(
                "restore",
                saved.path,
                "--qmp",
                qemu.qmp_path,
                "--json",
                "--background-bandwidth",
                "16M",
                "--background-order",
                "sequential",
            )
        )
    )
    assert 0.9 < result["seconds"] < 5  # 20 MiB and more
    assert_goes_on(qemu, saved)


# ---- what can go wrong


def test_another_machine_type(lab: Lab, saved_vms: SavedVms, qemu_binary: str) -> None:
    saved = saved_vms.get(qemu_binary)
    qemu = destination(lab, qemu_binary, saved, machine="q35")
    error = finished(postcopy("restore", saved.path, "--qmp", qemu.qmp_path), code=1)
    assert "machine type pc-i440fx-5.2" in error
    assert "Machine type received" in qemu.errors


def test_other_memory(lab: Lab, saved_vms: SavedVms, qemu_binary: str) -> None:
    saved = saved_vms.get(qemu_binary)
    qemu = lab.start(qemu_binary, saved.guest, memory_mib=32, incoming="defer")
    error = finished(postcopy("restore", saved.path, "--qmp", qemu.qmp_path), code=1)
    assert "memory" in error


def test_other_devices(lab: Lab, saved_vms: SavedVms, qemu_binary: str) -> None:
    path = lab.path("vm")
    source = lab.start(qemu_binary, extra=["-device", "virtio-rng-pci"])
    source.wait_letters(1)
    source.save(path)
    qemu = lab.start(qemu_binary, incoming="defer")
    error = finished(postcopy("restore", path, "--qmp", qemu.qmp_path), code=1)
    assert "devices" in error
    assert re.search("unknown|loadvm failed", qemu.errors, re.IGNORECASE)


def test_without_the_capability(lab: Lab, saved_vms: SavedVms, qemu_binary: str) -> None:
    saved = saved_vms.get(qemu_binary)
    address = f"unix:{lab.path('in')}"
    destination(lab, qemu_binary, saved).incoming(address)
    error = finished(postcopy("restore", saved.path, "--to", address), code=1)
    assert "capability postcopy-ram, which must be set before migrate-incoming" in error


@pytest.mark.hugetlb
@pytest.mark.usefixtures("hugepages")
def test_huge_pages_not_told(lab: Lab, saved_vms: SavedVms, qemu_binary: str) -> None:
    saved = saved_vms.get(qemu_binary, Guest(dirty_end=HUGEPAGE, fill_end=8 << 20), hugepages=True)
    qemu = destination(lab, qemu_binary, saved, hugepages=True)
    error = finished(postcopy("restore", saved.path, "--qmp", qemu.qmp_path), code=1)
    assert "--page-size" in error
    assert "page sizes" in qemu.errors


def test_a_running_vm(lab: Lab, saved_vms: SavedVms, qemu_binary: str) -> None:
    saved = saved_vms.get(qemu_binary)
    qemu = lab.start(qemu_binary, saved.guest)
    error = finished(postcopy("restore", saved.path, "--qmp", qemu.qmp_path), code=1)
    assert "running" in error
    assert "-incoming defer" in error


def test_nobody_there(lab: Lab, saved_vms: SavedVms, qemu_binary: str) -> None:
    saved = saved_vms.get(qemu_binary)
    for where in (["--to", f"unix:{lab.path('none')}"], ["--to", f"tcp:127.0.0.1:{free_port()}"]):
        assert "can't connect" in finished(postcopy("restore", saved.path, *where), code=1)


@pytest.mark.parametrize("when", ["after the package", "in the middle"])
def test_the_destination_is_killed(
    lab: Lab, saved_vms: SavedVms, qemu_binary: str, when: str
) -> None:
    saved = saved_vms.get(qemu_binary)
    qemu = destination(lab, qemu_binary, saved)
    process = postcopy(
        "restore", saved.path, "--qmp", qemu.qmp_path, "--background-bandwidth", "1M"
    )
    if when == "in the middle":
        qemu.wait_letters(2)
    else:
        wait_until(lambda: "postcopy" in qemu.migration_status, 20, "the package")
    os.kill(qemu.process.pid, signal.SIGKILL)
    error = finished(process, code=1, timeout=20)
    assert "went away" in error or "without SHUT" in error
    assert saved.path.exists()


def test_the_destination_is_stopped(lab: Lab, saved_vms: SavedVms, qemu_binary: str) -> None:
    """Nothing of it answers any more, its monitor neither: --timeout and a moment are all."""
    saved = saved_vms.get(qemu_binary)
    qemu = destination(lab, qemu_binary, saved)
    process = postcopy(
        "restore", saved.path, "--qmp", qemu.qmp_path, "--timeout", "3",
        "--background-bandwidth", "1M",
    )  # fmt: skip
    qemu.wait_letters(2)
    os.kill(qemu.process.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        # At this bandwidth it takes a while until its buffers are full.
        error = finished(process, code=1, timeout=60)
    finally:
        os.kill(qemu.process.pid, signal.SIGCONT)
    assert "waited 3 s for" in error
    assert time.monotonic() - stopped < 30


@pytest.mark.parametrize(
    "arguments",
    [[], ["--to", "nowhere"], ["--to", "unix:x", "--drain-after", "1"], ["--to", "unix:x",
     "--page-size", "nobody=2M"], ["--to", "fd:3", "--preempt"],
     ["--to", "fd:3", "--preempt", "--qmp", "none"]],
)  # fmt: skip
def test_usage(saved_vms: SavedVms, qemu_binary: str, arguments: list[str]) -> None:
    saved = saved_vms.get(qemu_binary)
    finished(postcopy("restore", saved.path, *arguments), code=2)


def test_no_save_file(tmp_path: Path) -> None:
    assert "No such file" in finished(postcopy("restore", tmp_path / "x", "--to", "unix:y"), code=1)
    (tmp_path / "x").write_bytes(b"hello, world, this is no VM")
    assert "file channel, offset 0x0" in finished(
        postcopy("restore", tmp_path / "x", "--to", "unix:y"), code=1
    )
