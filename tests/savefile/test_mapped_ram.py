"""Mapped-ram files made in the test; those of stock QEMU are read in tests/interop."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from postcopy_proto import messages as m
from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.savefile import MappedRam, open_saved_vm
from postcopy_proto.wire import encode
from tests.savefile.streams import DESCRIPTION, DEVICE, PAGE

ALIGNMENT = 1 << 16
BLOCKS = {"pc.ram": 20, "pc.bios": 3}


def content() -> dict[str, NDArray[np.uint8]]:
    random = np.random.default_rng(0)
    memory = {
        name: random.integers(256, size=(count, PAGE), dtype=np.uint8)
        for name, count in BLOCKS.items()
    }
    memory["pc.ram"][[0, 3, 4, 19]] = 0
    return memory


def mapped_ram(*, header: bytes | None = None, between: bytes = b"") -> bytes:
    """`header` takes the place of the first block's; `between` follows RAM's START section."""
    data = bytearray(encode(m.StreamHeader()))
    data += encode(m.Configuration("pc-q35-10.0", capabilities=("mapped-ram",)))
    data += encode(m.SectionStart(1, "ram", 0, 4))
    data += (sum(BLOCKS.values()) * PAGE | 4).to_bytes(8, "big")
    for name, memory in content().items():
        data += bytes([len(name)]) + name.encode() + (len(memory) * PAGE).to_bytes(8, "big")
        bitmap_at = len(data) + 28
        bitmap = np.packbits(memory.any(axis=1), bitorder="little").tobytes().ljust(8, b"\0")
        pages_at = -(-(bitmap_at + len(bitmap)) // ALIGNMENT) * ALIGNMENT
        data += header or struct.pack(">IQQQ", 1, PAGE, bitmap_at, pages_at)
        header = None
        data += bitmap
        data += bytes(pages_at - len(data)) + memory.tobytes()
    data += encode(m.RamEos()) + encode(m.SectionFooter(1)) + between
    data += encode(m.SectionEnd(1)) + encode(m.RamEos()) + encode(m.SectionFooter(1))
    return bytes(data) + DEVICE + encode(m.Eof()) + DESCRIPTION


def test_pages_stand_at_their_places(tmp_path: Path) -> None:
    (tmp_path / "vm").write_bytes(mapped_ram(between=encode(m.SwitchoverStart())))
    vm = open_saved_vm(tmp_path / "vm")
    assert isinstance(vm, MappedRam)
    assert (vm.section_id, vm.device_state) == (1, DEVICE)
    assert vm.configuration == m.Configuration("pc-q35-10.0")
    for name, memory in content().items():
        pages = np.random.default_rng(1).permutation(len(memory))
        zero = vm.zero_pages(name, pages)
        np.testing.assert_array_equal(zero, ~memory[pages].any(axis=1))
        for wanted in (pages[~zero], np.sort(pages)):
            np.testing.assert_array_equal(vm.read_pages(name, wanted), memory[wanted])
        for page, row in enumerate(memory):
            assert bytes(vm.read_page(name, page) or bytes(PAGE)) == row.tobytes()
            assert (vm.read_page(name, page) is None) == (not row.any())
    vm.close()
    assert [path.name for path in tmp_path.iterdir()] == ["vm"]


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        ((2, PAGE, 200, 4096), ErrorKind.UNSUPPORTED),
        ((1, 2 * PAGE, 200, 4096), ErrorKind.UNSUPPORTED),
        ((1, PAGE, 2**64 - 1, 2**64 - 1), ErrorKind.RANGE),
        ((1, PAGE, 0, ALIGNMENT), ErrorKind.RANGE),
        ((1, PAGE, 200, 201), ErrorKind.RANGE),
        ((1, PAGE, 200, 1 << 40), ErrorKind.RANGE),
    ],
)
def test_headers_that_do_not_fit(
    tmp_path: Path, header: tuple[int, int, int, int], kind: ErrorKind
) -> None:
    (tmp_path / "vm").write_bytes(mapped_ram(header=struct.pack(">IQQQ", *header)))
    with pytest.raises(RemoteProtocolError, match=r"RAMBlock pc\.ram") as caught:
        open_saved_vm(tmp_path / "vm")
    assert caught.value.kind is kind


def test_truncated_or_damaged(tmp_path: Path) -> None:
    data, path = mapped_ram(), tmp_path / "vm"
    random = np.random.default_rng(2)
    interesting = [*range(200), *range(len(data) - 200, len(data))]
    without_description = len(data) - len(DESCRIPTION)
    for at in [*interesting[::3], *random.integers(len(data), size=50).tolist()]:
        if at != without_description:
            path.write_bytes(data[:at])
            with pytest.raises(RemoteProtocolError) as caught:
                open_saved_vm(path)
            assert caught.value.channel is Channel.FILE
    for at in interesting:
        changed = bytearray(data)
        changed[at] ^= 1 << int(random.integers(8))
        path.write_bytes(changed)
        try:
            open_saved_vm(path).close()
        except RemoteProtocolError as error:
            assert error.channel is Channel.FILE  # noqa: PT017  or it opens: not all is checked
