"""spec/11-save-files.md says what the code does."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import fields
from pathlib import Path

import numpy as np

from postcopy_proto.savefile import open_saved_vm
from postcopy_proto.savefile.index import ARRAY_AT, MAGIC, SUFFIX, IndexText
from postcopy_proto.savefile.libvirt import FORMATS, HEADER_SIZE
from postcopy_proto.savefile.pages import COMPRESSED, PATCHED, ZERO
from postcopy_proto.savefile.writer import GROUP_PAGES
from tests.savefile.streams import PAGE, SaveStreamBuilder

TEXT = (Path(__file__).parents[2] / "spec" / "11-save-files.md").read_text()


def rows(heading: str, columns: int) -> list[list[str]]:
    """The cells of the tables under a heading that have so many columns, without their heads."""
    part = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    heads = {index - 1 for index, row in enumerate(cells) if set(row[0]) == {"-"}}
    return [
        row
        for index, row in enumerate(cells)
        if len(row) == columns and index not in heads and set(row[0]) != {"-"}
    ]


def test_libvirts_formats_and_header() -> None:
    table = rows("libvirt's image", 3)
    formats = [row[1] for row in table if row[1].isalpha() or row[1][:-1].isalpha()]
    assert tuple(formats) == FORMATS
    layout = [(int(row[0]), row[1]) for row in table if row[1] not in FORMATS]
    assert layout[-1] == (HEADER_SIZE, "")
    at = 0
    for offset, size in layout[:-1]:
        assert offset == at
        at += int(size)
    assert at == HEADER_SIZE


def test_mapped_rams_header() -> None:
    at = 0
    for offset, size, _ in rows("mapped-ram", 3):
        assert int(offset) == at
        at += int(size)
    assert at == struct.calcsize(">IQQQ")


def test_groups_of_the_writer() -> None:
    assert f"groups of {GROUP_PAGES} PAGE records" in TEXT


def test_the_indexs_text_has_the_keys_that_are_written() -> None:
    assert [row[0] for row in rows("The index", 2)][4:] == [
        field.name for field in fields(IndexText)
    ]


def test_an_index_can_be_read_by_what_is_written(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    content = random.integers(1, 256, size=(2, PAGE), dtype=np.uint8)
    stream = SaveStreamBuilder().pages("pc.ram", [4, 9], content)
    stream.compressed("pc.ram", 5, bytes(range(256)) * 16).xbzrle("pc.ram", 9, 8, b"changed")
    data = stream.data
    (tmp_path / "vm").write_bytes(data)
    open_saved_vm(tmp_path / "vm").close()
    index = (tmp_path / f"vm{SUFFIX}").read_bytes()

    assert index[:8] == MAGIC == b"PCINDEX1"
    text_at = int.from_bytes(index[8:16], "big")
    text = json.loads(index[text_at:])
    assert text["checksum"] == zlib.crc32(index[4096:text_at])
    assert ARRAY_AT == 4096
    pages = sum(length for _, length in text["blocks"]) // text["target_page_size"]
    values = np.frombuffer(index, "<i8", pages, 4096)
    assert (ZERO, PATCHED, COMPRESSED) == (-1, 2**62, -2)
    plain, patched, deflated = (int(values[page]) for page in (4, 9, 5))
    assert values[0] == -1
    assert data[plain : plain + PAGE] == content[0].tobytes()
    assert index[patched - 2**62 :][:PAGE] == stream.memory["pc.ram"][9].tobytes()
    at = -2 - deflated
    size = int.from_bytes(data[at : at + 4], "big")
    assert zlib.decompress(data[at + 4 : at + 4 + size]) == bytes(range(256)) * 16
    start, length = text["device_state"]
    assert data[start : start + length] == stream.device_state
