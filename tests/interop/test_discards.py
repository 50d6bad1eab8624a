"""Random bitmaps, discarded by us in a real migration's place: stock QEMU goes on to complete.

The precopy phase sends every page, and rubbish for those that are dirty later. So the destination
ends with the right memory only if exactly the dirty pages were discarded: a page too few is there
twice, which stock QEMU refuses, a page too many stays empty.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from postcopy_proto.dirty import DirtyBitmap
from postcopy_proto.net.source_loop import SourceLoop
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.savefile import SavedVm, open_saved_vm
from postcopy_proto.source import SourceConnection
from tests.interop.guest import assert_same_memory, assert_unbroken
from tests.interop.qemu import Lab, Qemu

pytestmark = pytest.mark.qemu

SHAPES = ("0.1 %", "10 %", "50 %", "99.9 %", "alternating", "clustered", "one page", "clean")


def dirty_pages(shape: str, pages: int, random: np.random.Generator) -> NDArray[np.bool_]:
    if shape.endswith(" %"):
        return random.random(pages) < float(shape[:-2]) / 100
    dirty = np.zeros(pages, np.bool_)
    if shape == "alternating":
        dirty[::2] = True
    elif shape == "clustered":
        dirty[:] = np.cumsum(random.random(pages) < 1 / 64) % 2
    elif shape == "one page":
        dirty[random.integers(pages)] = True
    return dirty


class Precopied:
    """A saved VM whose pages in `dirty` are still going to change: inverted, until `settled`."""

    def __init__(self, vm: SavedVm, dirty: dict[str, NDArray[np.bool_]]) -> None:
        self._vm = vm
        self._dirty = dirty
        self.settled = False

    @property
    def blocks(self) -> Sequence[RAMBlock]:
        return self._vm.blocks

    def zero_pages(self, block: str, pages: NDArray[np.intp]) -> NDArray[np.bool_]:
        zero = self._vm.zero_pages(block, pages)
        return zero if self.settled else zero & ~self._dirty[block][pages]

    def read_pages(self, block: str, pages: NDArray[np.intp]) -> NDArray[np.uint8]:
        content = self._vm.read_pages(block, pages)
        if not self.settled:
            content = np.where(self._dirty[block][pages][:, None], ~content, content)
        return content


def migrate(vm: SavedVm, destination: Qemu, path: Path, shape: str, seed: int) -> SourceConnection:
    """Precopy, discards, package, the dirty pages; until the destination says that all is well."""
    random = np.random.default_rng(seed)
    dirty = {b.idstr: dirty_pages(shape, b.page_count(), random) for b in vm.blocks}
    store = Precopied(vm, dirty)
    destination.capabilities(postcopy_ram=True)
    destination.incoming(f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        connection = SourceConnection(store, vm.configuration)
        loop = SourceLoop(connection, sock)
        loop.send([connection.start()])
        for block in vm.blocks:
            for pages in np.array_split(np.arange(block.page_count()), 16):
                if len(pages):
                    loop.send([connection.precopy(block.idstr, pages)])
        store.settled = True
        bitmaps = {}
        for name, marked in dirty.items():
            packed = np.packbits(marked, bitorder="little")
            bitmaps[name] = DirtyBitmap.from_buffer(packed, len(marked))
        loop.send(connection.switchover(bitmaps, vm.device_state))
        assert connection.owed == max(1, sum(bitmap.count() for bitmap in bitmaps.values()))
        loop.deliver()
        loop.finish()
    destination.wait_migration("completed")
    return connection


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, guest_images: Path) -> dict[str, object]:
    """By QEMU binary: the save file, what the source said, and its memory; made when needed."""
    return {"directory": tmp_path_factory.mktemp("saved"), "images": guest_images}


def saved_vm(saved: dict, binary: str) -> tuple[Path, bytes, NDArray[np.uint8]]:
    if binary not in saved:
        path = saved["directory"] / f"vm{len(saved)}"
        with Lab(saved["images"]) as lab:
            source = lab.start(binary)
            source.wait_letters(2)
            source.save(path)
            saved[binary] = path, source.serial, source.memory()
    return saved[binary]


@pytest.mark.parametrize("shape", SHAPES)
def test_exactly_the_dirty_pages_are_discarded(
    lab: Lab, qemu_binary: str, saved: dict, shape: str, repeat: int
) -> None:
    path, _, memory = saved_vm(saved, qemu_binary)
    destination = lab.start(qemu_binary, incoming="defer", paused=True)
    vm = open_saved_vm(path)
    try:
        connection = migrate(vm, destination, lab.path("incoming"), shape, seed=repeat)
    finally:
        vm.close()
    assert connection.discard_commands > 0
    assert_same_memory(destination.memory(), memory)


def test_the_guest_goes_on(lab: Lab, qemu_binary: str, saved: dict) -> None:
    path, serial, _ = saved_vm(saved, qemu_binary)
    destination = lab.start(qemu_binary, incoming="defer")
    vm = open_saved_vm(path)
    try:
        migrate(vm, destination, lab.path("incoming"), "50 %", seed=99)
    finally:
        vm.close()
    destination.wait_letters(3)
    assert_unbroken(serial, destination.serial)
