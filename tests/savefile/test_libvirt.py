from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from postcopy_proto.errors import ErrorKind, RemoteProtocolError
from postcopy_proto.savefile import ReadOnlyFile, open_saved_vm
from postcopy_proto.savefile.libvirt import read_header
from tests.savefile.streams import SaveStreamBuilder, assert_same_pages

XML = b"<domain type='qemu'><name>vm</name></domain>"
COOKIE = b"<qemusaved/>"


def libvirt_header(number: int, *, length: int = 4096, order: str = "<", version: int = 2) -> bytes:
    """Header, XML and cookie, padded to `length` bytes in all."""
    fields = (version, length - 92, 1, number, len(XML) + 1)
    head = b"LibvirtQemudSave" + struct.pack(f"{order}5I", *fields)
    return (head.ljust(92, b"\0") + XML + b"\0" + COOKIE + b"\0").ljust(length, b"\0")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("number", "compress"),
    [
        (0, bytes),
        (1, gzip.compress),
        (2, bz2.compress),
        (3, lzma.compress),
        (5, zstandard.ZstdCompressor().compress),
    ],
    ids=["raw", "gzip", "bzip2", "xz", "zstd"],
)
def test_images_are_served(
    tmp_path: Path, number: int, compress: Callable[[bytes], bytes], order: str
) -> None:
    stream = SaveStreamBuilder().random(3)
    path = tmp_path / "vm.save"
    path.write_bytes(libvirt_header(number, order=order) + compress(stream.data))
    for _ in range(2):
        vm = open_saved_vm(path)
        assert_same_pages(vm, stream)
        vm.close()
    file = ReadOnlyFile(path)
    image = read_header(file)
    assert (image.xml, image.was_running, image.data_at) == (XML.decode(), True, 4096)
    file.close()


def test_lzop_is_refused_with_the_command(tmp_path: Path) -> None:
    path = tmp_path / "my vm.save"
    path.write_bytes(libvirt_header(4) + b"\x89LZO")
    with pytest.raises(RemoteProtocolError, match="compressed with lzop") as caught:
        open_saved_vm(path)
    assert f"tail -c +4097 '{path}' | lzop -dc > '{path}.raw'" in caught.value.reason
    assert caught.value.kind is ErrorKind.UNSUPPORTED


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_damaged_compression_leaves_nothing(tmp_path: Path, number: int) -> None:
    compressors = {
        1: gzip.compress,
        2: bz2.compress,
        3: lzma.compress,
        5: zstandard.ZstdCompressor(write_checksum=True).compress,
    }
    data = bytearray(compressors[number](SaveStreamBuilder().random(3).data))
    data[len(data) // 2] ^= 0xFF
    path = tmp_path / "vm.save"
    path.write_bytes(libvirt_header(number) + data)
    with pytest.raises(RemoteProtocolError):
        open_saved_vm(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda h: b"LibvirtQemudPart" + h[16:], ErrorKind.MALFORMED),
        (lambda h: h[:16] + struct.pack("<I", 3) + h[20:], ErrorKind.UNSUPPORTED),
        (lambda h: h[:28] + struct.pack("<I", 7) + h[32:], ErrorKind.UNSUPPORTED),
        (lambda h: h[:20] + struct.pack("<I", 1 << 31) + h[24:], ErrorKind.RANGE),
        (lambda h: h[:50], ErrorKind.TRUNCATED),
        (lambda h: h, ErrorKind.TRUNCATED),
    ],
    ids=["being written", "version", "format", "data_len", "truncated", "no stream"],
)
def test_bad_headers(tmp_path: Path, change: Callable[[bytes], bytes], kind: ErrorKind) -> None:
    path = tmp_path / "vm.save"
    path.write_bytes(change(libvirt_header(0)))
    with pytest.raises(RemoteProtocolError) as caught:
        open_saved_vm(path)
    assert caught.value.kind is kind
