"""Save streams made in tests, with what must be read from them."""

from __future__ import annotations

import zlib
from typing import Self

import numpy as np
from numpy.typing import NDArray

from postcopy_proto import messages as m
from postcopy_proto.ramblock import SinglePageStore
from postcopy_proto.savefile import SavedVm
from postcopy_proto.wire import encode

PAGE = 4096
DEVICE = (
    encode(m.SectionFull(5, "timer", 0, 2)) + b"\x7e\0\0\0\x05 state" + encode(m.SectionFooter(5))
)
DESCRIPTION = encode(m.VmDescription(b'{"page_size": 4096, "devices": [{"name": "timer"}]}'))


class SaveStreamBuilder:
    """A save stream that is put together record by record; `data` completes it."""

    def __init__(
        self, blocks: dict[str, int] | None = None, *, configuration: m.Configuration | None = None
    ) -> None:
        self.blocks = blocks or {"pc.ram": 300, "pc.bios": 20}
        self.memory = {name: np.zeros((n, PAGE), np.uint8) for name, n in self.blocks.items()}
        entries = tuple(m.RamBlockEntry(name, n * PAGE) for name, n in self.blocks.items())
        self._items = [
            encode(m.StreamHeader()),
            encode(configuration or m.Configuration("pc-i440fx-7.2")),
            encode(m.SectionStart(2, "ram", 0, 4)),
            encode(m.RamBlockList(entries)),
            encode(m.RamEos()) + encode(m.SectionFooter(2)),
        ]
        self.device_state = DEVICE
        self.tail = encode(m.Eof()) + DESCRIPTION
        self.before_devices = b""

    def section(self, *records: bytes) -> Self:
        self._items += [encode(m.SectionPart(2)), *records]
        self._items.append(encode(m.RamEos()) + encode(m.SectionFooter(2)))
        return self

    def pages(self, block: str, pages: list[int], content: NDArray[np.uint8]) -> Self:
        """One section with these pages; content shape (n, PAGE)."""
        self.memory[block][pages] = content
        positions = np.where(content.any(axis=1), np.arange(len(pages)) * PAGE, -1)
        offsets = np.array(pages, np.uint64) * np.uint64(PAGE)
        data = memoryview(content.tobytes())
        return self.section(encode(m.Pages(block, offsets, positions.astype(np.int64), data)))

    def compressed(self, block: str, page: int, content: bytes) -> Self:
        self.memory[block][page] = np.frombuffer(content, np.uint8)
        return self.section(encode(m.CompressedPage(block, page * PAGE, zlib.compress(content))))

    def xbzrle(self, block: str, page: int, at: int, new: bytes) -> Self:
        """A page that changes from byte `at` on."""
        self.memory[block][page, at : at + len(new)] = np.frombuffer(new, np.uint8)
        return self.section(
            encode(m.XbzrlePage(block, page * PAGE, length(at) + length(len(new)) + new))
        )

    def random(self, seed: int, sections: int = 6) -> Self:
        random = np.random.default_rng(seed)
        for _ in range(sections):
            block = str(random.choice(list(self.blocks)))
            count = int(random.integers(1, self.blocks[block] + 1))
            pages = random.permutation(self.blocks[block])[:count]
            if random.random() < 0.5:
                pages.sort()
            content = random.integers(256, size=(count, PAGE), dtype=np.uint8)
            content[random.random(count) < 0.3] = 0
            self.pages(block, pages.tolist(), content)
        return self

    @property
    def data(self) -> bytes:
        end = encode(m.SectionEnd(2)) + encode(m.RamEos()) + encode(m.SectionFooter(2))
        return b"".join(self._items) + self.before_devices + end + self.device_state + self.tail


def length(value: int) -> bytes:
    """A run's length as XBZRLE writes it."""
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80, value >> 7])


def assert_same_pages(vm: SavedVm, stream: SaveStreamBuilder, seed: int = 0) -> None:
    """Every page, asked for in order, scattered, and one by one."""
    random = np.random.default_rng(seed)
    assert [block.idstr for block in vm.blocks] == list(stream.memory)
    assert vm.device_state == stream.device_state
    for name, memory in stream.memory.items():
        everything = np.arange(len(memory))
        zero = vm.zero_pages(name, everything)
        assert not memory[zero].any()
        for pages in (everything, random.permutation(everything), everything[::3], everything[7:8]):
            np.testing.assert_array_equal(vm.read_pages(name, pages), memory[pages])
        assert vm.read_pages(name, everything[:0]).shape == (0, PAGE)
        if isinstance(vm, SinglePageStore):
            for page in everything.tolist():
                content = vm.read_page(name, page)
                assert (content is None) == zero[page]
                assert bytes(content or bytes(PAGE)) == memory[page].tobytes()
