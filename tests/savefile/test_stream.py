from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from postcopy_proto import messages as m
from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.ramblock import SinglePageStore
from postcopy_proto.savefile import FlatRam, SaveFileSink, SaveStream, open_saved_vm
from postcopy_proto.savefile.index import ARRAY_AT, SUFFIX
from postcopy_proto.savefile.source import SavedVm
from postcopy_proto.wire import encode
from tests.savefile.streams import DEVICE, PAGE, SaveStreamBuilder, assert_same_pages


def written(path: Path, stream: SaveStreamBuilder) -> Path:
    path.write_bytes(stream.data)
    return path


def refused(path: Path) -> RemoteProtocolError:
    with pytest.raises(RemoteProtocolError) as caught:
        open_saved_vm(path).close()
    assert caught.value.channel is Channel.FILE
    assert caught.value.offset is not None
    assert not list(path.parent.glob(f"{path.name}?*")), "something was left behind"
    return caught.value


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cache", [True, False])
def test_the_last_record_of_a_page_wins(tmp_path: Path, seed: int, cache: bool) -> None:
    stream = SaveStreamBuilder().random(seed, sections=12)
    path = written(tmp_path / "vm", stream)
    for _ in range(2):
        vm = open_saved_vm(path, cache=cache)
        assert_same_pages(vm, stream, seed)
        assert (vm.section_id, vm.configuration.machine) == (2, "pc-i440fx-7.2")
        vm.close()
    assert (tmp_path / f"vm{SUFFIX}").exists() is cache


def test_it_has_the_quick_way_to_one_page(tmp_path: Path) -> None:
    (tmp_path / "vm").write_bytes(SaveStreamBuilder().random(1).data)
    vm = open_saved_vm(tmp_path / "vm")
    assert isinstance(vm, SinglePageStore)
    vm.close()


def test_compressed_and_xbzrle_records(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    stream = SaveStreamBuilder().random(0, sections=2)
    for page in (3, 3, 17):
        stream.compressed("pc.ram", page, random.bytes(2048) + bytes(2048))
    stream.xbzrle("pc.ram", 3, 200, b"changed twice")  # of a compressed page
    stream.xbzrle("pc.ram", 3, 0, b"at the start")
    stream.xbzrle("pc.ram", 299, 4000, random.bytes(96))  # of a zero page or any other
    stream.xbzrle("pc.bios", 1, 5, random.bytes(300))
    stream.pages("pc.bios", [1], np.full((1, PAGE), 7, np.uint8))  # in whole again
    stream.xbzrle("pc.bios", 2, 0, b"z")
    path = written(tmp_path / "vm", stream)
    for _ in range(2):
        vm = open_saved_vm(path)
        assert_same_pages(vm, stream)
        vm.close()


@pytest.mark.parametrize(
    "encoded",
    [b"\x05", b"\x05\x00", b"\x05\x02a", b"\xff\x1f\x03abc", b"\x85", b"\x80\x80\x01a",
     b"\x01\x01a\x00\x01b"],
)  # fmt: skip
def test_senseless_xbzrle_is_refused(tmp_path: Path, encoded: bytes) -> None:
    stream = SaveStreamBuilder().section(encode(m.XbzrlePage("pc.ram", 0, encoded)))
    assert refused(written(tmp_path / "vm", stream)).kind is ErrorKind.MALFORMED


def test_a_compressed_page_that_is_none_is_refused_when_it_is_read(tmp_path: Path) -> None:
    stream = SaveStreamBuilder().section(encode(m.CompressedPage("pc.ram", 0, b"not zlib")))
    vm = open_saved_vm(written(tmp_path / "vm", stream))
    with pytest.raises(RemoteProtocolError, match="inflated"):
        vm.read_pages("pc.ram", np.array([0]))
    vm.close()


def test_without_a_description(tmp_path: Path) -> None:
    stream = SaveStreamBuilder().random(1)
    stream.tail = encode(m.Eof())
    vm = open_saved_vm(written(tmp_path / "vm", stream))
    assert_same_pages(vm, stream)
    vm.close()


def test_switchover_start_is_skipped(tmp_path: Path) -> None:
    stream = SaveStreamBuilder().random(1)
    stream.before_devices = encode(m.SwitchoverStart())
    vm = open_saved_vm(written(tmp_path / "vm", stream))
    assert_same_pages(vm, stream)
    vm.close()


def test_what_our_sink_writes(tmp_path: Path) -> None:
    stream = SaveStreamBuilder().random(9)
    entries = tuple(m.RamBlockEntry(name, n * PAGE) for name, n in stream.blocks.items())
    path = tmp_path / "vm"
    sink = SaveFileSink(path, m.Configuration("pc"), m.RamBlockList(entries), section_id=2)
    for name, memory in stream.memory.items():
        zero = ~memory.any(axis=1)
        positions = np.where(zero, -1, np.arange(len(memory)) * PAGE)
        offsets = np.arange(len(memory), dtype=np.uint64) * np.uint64(PAGE)
        sink.place(m.Pages(name, offsets, positions, memoryview(memory.tobytes())))
    sink.finish(DEVICE)
    vm = open_saved_vm(path)
    assert_same_pages(vm, stream)
    vm.close()


# ---- the cached index


def test_the_cache_is_used_and_belongs_to_its_file(tmp_path: Path) -> None:
    path = written(tmp_path / "vm", SaveStreamBuilder().random(1))
    open_saved_vm(path).close()
    index = tmp_path / f"vm{SUFFIX}"
    first = index.stat().st_ino
    open_saved_vm(path).close()
    assert index.stat().st_ino == first

    other = SaveStreamBuilder().random(2)
    path.write_bytes(other.data)
    vm = open_saved_vm(path)
    assert_same_pages(vm, other)
    vm.close()
    assert index.stat().st_ino != first


def test_another_file_of_the_same_size_and_time_is_told_by_its_content(tmp_path: Path) -> None:
    content = np.ones((300, PAGE), np.uint8)
    path = written(tmp_path / "vm", SaveStreamBuilder().pages("pc.ram", list(range(300)), content))
    open_saved_vm(path).close()
    time = path.stat().st_mtime_ns
    other = SaveStreamBuilder().pages("pc.ram", list(range(300))[::-1], content * 2)
    written(path, other)
    os.utime(path, ns=(time, time))
    vm = open_saved_vm(path)
    assert_same_pages(vm, other)
    vm.close()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes((data[at] ^ 0x10,)) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:10],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"X" + data[1:],
        lambda data: data[:8] + b"\xff" * 8 + data[16:],
        lambda data: data[:8] + bytes(8) + data[16:],
        lambda data: data.replace(b'"pc.ram"', b'"pc.rom"'),
        lambda data: data[: data.index(b'{"size"')] + b"[" * 100_000,
        lambda data: data.replace(b'"patched_pages": 0', b'"patched_pages": 9'),
        lambda data: data.replace(b'"checksum": ', b'"checksum": 1'),
        lambda data: flipped(data, ARRAY_AT),
        lambda data: flipped(data, ARRAY_AT + 1234),
        lambda data: flipped(data, data.index(b'{"size"') - 1),
    ],
)
def test_a_damaged_index_is_made_again(tmp_path: Path, damage: object) -> None:
    stream = SaveStreamBuilder().random(1)
    path = written(tmp_path / "vm", stream)
    open_saved_vm(path).close()
    index = tmp_path / f"vm{SUFFIX}"
    before = index.read_bytes()
    index.write_bytes(damage(before))  # type: ignore[operator]
    vm = open_saved_vm(path)
    assert_same_pages(vm, stream)
    vm.close()
    assert index.read_bytes() == before


def test_a_damaged_page_in_the_index_is_made_again(tmp_path: Path) -> None:
    """One that was put together from XBZRLE records, behind the array."""
    stream = SaveStreamBuilder().random(1).xbzrle("pc.ram", 7, 100, b"changed")
    path = written(tmp_path / "vm", stream)
    open_saved_vm(path).close()
    index = tmp_path / f"vm{SUFFIX}"
    before = index.read_bytes()
    index.write_bytes(flipped(before, before.index(b'{"size"') - PAGE + 101))
    vm = open_saved_vm(path)
    assert_same_pages(vm, stream)
    vm.close()
    assert index.read_bytes() == before


def test_a_directory_that_takes_no_index(tmp_path: Path) -> None:
    stream = SaveStreamBuilder().random(1)
    path = written(tmp_path / "vm", stream)
    # Even root can't make a file there: its name would be too long.
    long = tmp_path / ("v" * 250)
    path.rename(long)
    vm = open_saved_vm(long)
    assert_same_pages(vm, stream)
    vm.close()
    assert list(tmp_path.iterdir()) == [long]


def test_the_save_file_is_never_changed(tmp_path: Path) -> None:
    stream = SaveStreamBuilder().random(1).xbzrle("pc.ram", 0, 0, b"x")
    path = written(tmp_path / "vm", stream)
    path.chmod(0o400)
    before = path.stat()
    open_saved_vm(path).close()
    after = path.stat()
    assert path.read_bytes() == stream.data
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


# ---- files that are none


def small() -> SaveStreamBuilder:
    content = np.arange(3 * PAGE, dtype=np.uint64).view(np.uint8)[: 3 * PAGE].reshape(3, PAGE)
    return SaveStreamBuilder({"pc.ram": 4}).pages("pc.ram", [0, 2, 3], content)


def test_truncated_anywhere(tmp_path: Path) -> None:
    data = small().data
    path = tmp_path / "vm"
    pages_end = data.index(DEVICE)
    cuts = [*range(0, 400, 3), *range(400, pages_end, 211), *range(pages_end, len(data), 5)]
    whole_without_description = len(data) - len(small().tail) + 1
    for cut in cuts:
        if cut == whole_without_description:
            continue  # a file that our receive could have written
        path.write_bytes(data[:cut])
        error = refused(path)
        assert error.kind in (ErrorKind.TRUNCATED, ErrorKind.MALFORMED), (cut, error)


def test_flipped_bytes_never_end_in_anything_but_our_error(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    stream = small()
    data = stream.data
    path = tmp_path / "vm"
    for at in [*range(160), *random.integers(len(data), size=200).tolist()]:
        changed = bytearray(data)
        changed[at] ^= 1 << int(random.integers(8))
        path.write_bytes(changed)
        try:
            vm: SavedVm = open_saved_vm(path, cache=False)
            for block in vm.blocks:
                vm.read_pages(block.idstr, np.arange(block.page_count()))
            vm.close()
        except RemoteProtocolError as error:
            assert error.channel is Channel.FILE, at  # noqa: PT017  it may also open


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a save file"),
        (b"\x7fELF" + bytes(100), "0x51"),
        (b"QEVM\0\0\0\x02" + bytes(100), "obsolete"),
    ],
)
def test_other_files(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "vm"
    path.write_bytes(data)
    assert words in refused(path).reason


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (encode(m.SectionStart(9, "dirty-bitmap", 0, 1)), "dirty-bitmap"),
        (encode(m.SectionStart(9, "block", 0, 1)), "block"),
        (encode(m.SectionStart(9, "0000:00:05.0/vfio", 0, 1)), "vfio"),
        (
            encode(m.SectionPart(2)) + encode(m.MultifdFlush()) + encode(m.RamEos()),
            "multifd",
        ),
        (encode(m.Packaged(b"x")), "postcopy"),
    ],
)
def test_refused_by_name(tmp_path: Path, item: bytes, words: str) -> None:
    stream = small()
    stream._items.append(item)
    error = refused(written(tmp_path / "vm", stream))
    assert error.kind is ErrorKind.UNSUPPORTED
    assert words in error.reason


def test_page_sizes_are_the_destinations(tmp_path: Path) -> None:
    path = written(tmp_path / "vm", SaveStreamBuilder({"m0": 1024, "pc.bios": 20}))
    vm = open_saved_vm(path, page_sizes={"m0": 2 << 20})
    assert [(b.idstr, b.page_size) for b in vm.blocks] == [("m0", 2 << 20), ("pc.bios", 4096)]
    vm.close()
    for wrong in ({"m1": 4096}, {"m0": 5000}, {"m0": 1024}):
        with pytest.raises(ValueError, match="m0"):
            open_saved_vm(path, page_sizes=wrong)


def test_other_target_pages(tmp_path: Path) -> None:
    configuration = m.Configuration("virt-9.0", target_page_bits=14)
    stream = SaveStreamBuilder({"ram": 4}, configuration=configuration)
    with pytest.raises(RemoteProtocolError) as caught:
        open_saved_vm(
            written(
                tmp_path / "vm",
                SaveStreamBuilder(
                    {"ram": 4}, configuration=m.Configuration("virt-9.0", target_page_bits=33)
                ),
            )
        )
    assert caught.value.kind is ErrorKind.UNSUPPORTED
    vm = open_saved_vm(written(tmp_path / "vm", stream))
    assert isinstance(vm, SaveStream)
    assert vm.target_page_size == 1 << 14
    vm.close()


def test_flat_ram(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    memory = random.integers(256, size=(50, PAGE), dtype=np.uint8)
    memory[::3] = 0
    (tmp_path / "ram").write_bytes(memory.tobytes())
    store = FlatRam({"pc.ram": tmp_path / "ram"})
    pages = random.permutation(50)
    np.testing.assert_array_equal(store.zero_pages("pc.ram", pages), ~memory[pages].any(axis=1))
    np.testing.assert_array_equal(store.read_pages("pc.ram", pages), memory[pages])
    assert store.blocks[0].used_length == 50 * PAGE
    store.close()
    (tmp_path / "odd").write_bytes(b"x")
    with pytest.raises(ValueError, match="no pages"):
        FlatRam({"pc.ram": tmp_path / "odd"})
