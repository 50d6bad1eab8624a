from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from postcopy_proto import messages as m
from postcopy_proto.savefile.writer import GROUP_PAGES, SaveFileSink
from postcopy_proto.wire import ForwardDecoder, encode

PAGE = 4096
BLOCKS = m.RamBlockList(
    (
        m.RamBlockEntry("pc.ram", 500 * PAGE, page_size=2 << 20),
        m.RamBlockEntry("pc.bios", 64 * PAGE),
        m.RamBlockEntry("tiny", PAGE),
    )
)
MACHINE = m.Configuration("pc-i440fx-7.2")
DEVICE = (
    encode(m.SectionFull(5, "timer", 0, 2)) + b"\x7e\0\0\0\x05 state" + encode(m.SectionFooter(5))
)


def sink_at(path: Path, **arguments: object) -> SaveFileSink:
    return SaveFileSink(path, MACHINE, BLOCKS, section_id=2, **arguments)  # type: ignore[arg-type]


def batch(block: str, pages: list[int], content: NDArray[np.uint8], stride: int = PAGE) -> m.Pages:
    """Pages of `content`, shape (all pages, PAGE), as zero pages where they are zero."""
    data = bytearray(8)
    positions = []
    for page in pages:
        if content[page].any():
            positions.append(len(data))
            data += content[page].tobytes() + bytes(stride - PAGE)
        else:
            positions.append(-1)
    offsets = np.array(pages, np.uint64) * np.uint64(PAGE)
    return m.Pages(block, offsets, np.array(positions, np.int64), memoryview(data))


def load(path: Path) -> tuple[dict[str, NDArray[np.uint8]], list[m.Message]]:
    """What a loader makes of the file: memory by block, and everything else."""
    memory = {
        e.idstr: np.full((e.used_length // PAGE, PAGE), 0xEE, np.uint8) for e in BLOCKS.blocks
    }
    others: list[m.Message] = []
    decoder = ForwardDecoder()
    for chunk in (path.read_bytes(), b""):
        decoder.receive_data(chunk)
        while not isinstance(event := decoder.next_event(), m.NeedData):
            if isinstance(event, m.Pages):
                for index, offset in enumerate(event.offsets.tolist()):
                    page = event.page(index)
                    memory[event.block][offset // PAGE] = (
                        0 if page is None else np.frombuffer(page, np.uint8)
                    )
            else:
                others.append(event)
                if isinstance(event, m.EndOfStream):
                    break
    return memory, others


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_arrivals_gives_the_last_content(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    model = {e.idstr: np.zeros((e.used_length // PAGE, PAGE), np.uint8) for e in BLOCKS.blocks}
    path = tmp_path / "vm"
    sink = sink_at(path)
    for _ in range(80):
        name = str(random.choice(list(model)))
        pages = len(model[name])
        first = int(random.integers(pages))
        count = int(random.integers(1, 150))
        chosen = [p for p in range(first, first + count) if p < pages]
        action = random.integers(4)
        if action == 0:
            model[name][chosen] = 0
            sink.discard(name, first * PAGE, len(chosen) * PAGE)
            continue
        if action == 1:
            chosen = random.permutation(chosen).tolist()
        model[name][chosen] = random.integers(256, size=(len(chosen), PAGE), dtype=np.uint8)
        model[name][[p for p in chosen if random.random() < 0.3]] = 0
        sink.place(batch(name, chosen, model[name], stride=int(random.choice([PAGE, PAGE + 8]))))
    for name, content in model.items():
        assert sink.read(name, 0, len(content) * PAGE) == content.tobytes()
        assert sink.pages[name] == np.count_nonzero(content.any(axis=1))
    assert not path.exists()
    sink.finish(DEVICE)
    sink.close()
    memory, others = load(path)
    for name, content in model.items():
        np.testing.assert_array_equal(memory[name], content)
    entries = tuple(m.RamBlockEntry(e.idstr, e.used_length) for e in BLOCKS.blocks)
    assert others == [
        m.StreamHeader(),
        MACHINE,
        m.SectionStart(2, "ram", 0, 4),
        m.RamBlockList(entries),
        m.RamEos(),
        m.SectionFooter(2),
        m.SectionEnd(2),
        m.RamEos(),
        m.SectionFooter(2),
        m.DeviceState(DEVICE),
        m.Eof(),
        m.EndOfStream(path.stat().st_size, clean=True),
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_zero_pages_are_counted_until_discarded(tmp_path: Path) -> None:
    sink = sink_at(tmp_path / "vm")
    zeros = np.zeros((500, PAGE), np.uint8)
    sink.place(batch("pc.ram", list(range(10)), zeros))
    assert sink.zero_pages == {"pc.ram": 10, "pc.bios": 0, "tiny": 0}
    sink.discard("pc.ram", 0, 4 * PAGE)
    assert sink.zero_pages["pc.ram"] == 6
    sink.close()


def test_a_group_is_set_aside_once(tmp_path: Path) -> None:
    sink = sink_at(tmp_path / "vm")
    ones = np.ones((500, PAGE), np.uint8)
    sink.place(batch("pc.ram", list(range(2 * GROUP_PAGES)), ones))
    size = sink.partial.stat().st_size
    sink.place(batch("pc.ram", list(range(2 * GROUP_PAGES)), ones))
    assert sink.partial.stat().st_size == size
    sink.close()


def test_the_head_is_kept_verbatim(tmp_path: Path) -> None:
    head = encode(m.StreamHeader()) + encode(m.Configuration("virt-9.0", target_page_bits=12))
    path = tmp_path / "vm"
    SaveFileSink(path, head, BLOCKS, section_id=7).finish(DEVICE)
    assert path.read_bytes().startswith(head + encode(m.SectionStart(7, "ram", 0, 4)))


def test_abort_leaves_nothing(tmp_path: Path) -> None:
    sink = sink_at(tmp_path / "vm")
    sink.place(batch("tiny", [0], np.ones((1, PAGE), np.uint8)))
    sink.close()
    assert list(tmp_path.iterdir()) == []


def test_a_leftover_is_taken_over_but_not_a_file_being_written(tmp_path: Path) -> None:
    (tmp_path / "vm.partial").write_bytes(b"left over" * 1000)
    sink = sink_at(tmp_path / "vm")
    with pytest.raises(BlockingIOError):
        sink_at(tmp_path / "vm")
    sink.finish(DEVICE)
    sink.close()
    assert (tmp_path / "vm").read_bytes().startswith(b"QEVM")


@pytest.mark.parametrize(
    ("block", "pages"), [("nobody", [0]), ("tiny", [1]), ("pc.bios", [63, 64])]
)
def test_pages_outside_are_refused(tmp_path: Path, block: str, pages: list[int]) -> None:
    sink = sink_at(tmp_path / "vm")
    with pytest.raises(ValueError, match=block):
        sink.place(batch(block, pages, np.ones((100, PAGE), np.uint8)))
    with pytest.raises(ValueError, match=block):
        sink.discard(block, pages[-1] * PAGE, PAGE)
    sink.close()


@pytest.mark.parametrize("stride", [PAGE, PAGE + 8], ids=["by groups", "as records"])
def test_a_file_that_cannot_grow_is_named(tmp_path: Path, stride: int) -> None:
    """A full disk, or here the process's limit for files; nothing is left behind."""
    content = np.random.default_rng(9).integers(1, 256, (500, PAGE), np.uint8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    sink = sink_at(tmp_path / "vm")
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * PAGE, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            sink.place(batch("pc.ram", list(range(500)), content, stride))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sink.close()
    assert caught.value.filename == str(tmp_path / "vm.partial")
    assert list(tmp_path.iterdir()) == []
