"""What stock QEMU saved, read by the page stores and compared with what it has in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from postcopy_proto.savefile import MappedRam, SavedVm, SaveStream, open_saved_vm
from tests.interop.guest import Guest
from tests.interop.qemu import Lab, Qemu, wait_until
from tests.savefile.test_libvirt import libvirt_header

pytestmark = pytest.mark.qemu


def whole_block(vm: SavedVm, idstr: str) -> NDArray[np.uint8]:
    [block] = [block for block in vm.blocks if block.idstr == idstr]
    pages = np.arange(block.page_count())
    content = np.zeros((len(pages), 4096), np.uint8)
    for first in range(0, len(pages), 512):
        part = pages[first : first + 512]
        wanted = part[~vm.zero_pages(idstr, part)]
        content[wanted] = vm.read_pages(idstr, wanted)
    return content


def assert_holds(vm: SavedVm, source: Qemu) -> None:
    ram, memory = whole_block(vm, "pc.ram"), source.memory()
    outside_rom = np.ones(len(memory), np.bool_)
    outside_rom[0xA0000 // 4096 : 0x100000 // 4096] = False  # ROM is seen there, not RAM
    np.testing.assert_array_equal(ram[outside_rom], memory[outside_rom])


def save(lab: Lab, qemu_binary: str, *, uri: str | None = None, **capabilities: bool) -> Qemu:
    source = lab.start(qemu_binary)
    source.wait_letters(2)
    source.capabilities(**capabilities)
    source.stop()
    source.save(lab.path("vm"), uri=uri)
    return source


def test_stream_and_its_cached_index(lab: Lab, qemu_binary: str) -> None:
    source = save(lab, qemu_binary)
    path = lab.path("vm")
    for attempt in ("indexed", "from the cache"):
        vm = open_saved_vm(path)
        assert isinstance(vm, SaveStream), attempt
        assert_holds(vm, source)
        assert vm.configuration.machine == "pc-i440fx-5.2"
        assert vm.device_state.startswith(b"\x04")
        assert b"globalstate" in vm.device_state
        vm.close()
    assert sorted(p.name for p in path.parent.glob("vm*")) == ["vm", "vm.postcopy-index"]


@pytest.mark.qemu_versions((0,), (9, 0))
def test_compressed_pages(lab: Lab, qemu_binary: str) -> None:
    source = save(lab, qemu_binary, compress=True)
    vm = open_saved_vm(lab.path("vm"))
    assert (vm.zero_pages("pc.ram", np.arange(4096))).any()
    assert_holds(vm, source)
    vm.close()


def test_xbzrle(lab: Lab, qemu_binary: str) -> None:
    source = lab.start(qemu_binary, Guest(ticks=0))
    source.wait_letters(2)
    source.capabilities(xbzrle=True)
    source.parameters(max_bandwidth=8 << 20, xbzrle_cache_size=64 << 20, downtime_limit=1)
    source.migrate(f"exec:cat>{lab.path('vm')}")
    wait_for_passes(source, 3)
    source.parameters(max_bandwidth=1 << 40, downtime_limit=10000)
    source.wait_migration("completed")
    assert source.migration["xbzrle-cache"]["pages"] > 0
    for _ in range(2):
        vm = open_saved_vm(lab.path("vm"))
        assert_holds(vm, source)
        vm.close()


def wait_for_passes(source: Qemu, count: int) -> None:
    wait_until(
        lambda: source.migration.get("ram", {}).get("dirty-sync-count", 0) >= count,
        60,
        f"{count} passes",
    )


@pytest.mark.qemu_versions((9, 0), (999,))
@pytest.mark.parametrize("offset", [0, 12345])
def test_mapped_ram(lab: Lab, qemu_binary: str, offset: int) -> None:
    path = lab.path("vm")
    uri = f"file:{path}" + (f",offset={offset}" if offset else "")
    source = save(lab, qemu_binary, uri=uri, mapped_ram=True)
    if offset:
        put_libvirt_header(path, offset)
    vm = open_saved_vm(path)
    assert isinstance(vm, MappedRam)
    assert_holds(vm, source)
    assert vm.configuration.capabilities is None
    vm.close()


def put_libvirt_header(path: Path, length: int) -> None:
    """The header of libvirt's sparse format in front of a mapped-ram file."""
    with open(path, "r+b") as file:
        file.write(libvirt_header(6, length=length))
