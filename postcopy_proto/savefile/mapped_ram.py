"""Mapped-ram files (QEMU 9.0 and later): every page has its place, so there is nothing to index.

QEMU: migration/ram.c `mapped_ram_setup_ramblock`, `mapped_ram_read_header`. A save stream whose
configuration names the capability mapped-ram; each entry of its block list goes on after
used_length with a header, big-endian:

    0    4  version, 1
    4    8  page_size, bytes of a target page
    12   8  bitmap_offset
    20   8  pages_offset

Both are file offsets. The bitmap has one bit a page, least significant first: 1 where the page
stands at pages_offset + page * page_size, 0 for a zero page. The next entry follows the pages.
RAM's other sections carry no pages.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from postcopy_proto import messages as m
from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.ramblock import RAMBlock, decode_idstr
from postcopy_proto.savefile.pages import ZERO, PageReader
from postcopy_proto.savefile.source import ReadOnlyFile, broken, relocated, with_page_sizes
from postcopy_proto.wire import ForwardDecoder, Limits
from postcopy_proto.wire.forward import CAPABILITY_MAPPED_RAM
from postcopy_proto.wire.pages import EOS, MEM_SIZE
from postcopy_proto.wire.stream import (
    SECTION_AFTER_NAME,
    SECTION_ID_SIZE,
    SECTION_NAME_AT,
    QemuVm,
)

RAM = b"ram"
VERSION = 1
_BYTE = struct.Struct(">B")
_WORD = struct.Struct(">Q")
_HEADER = struct.Struct(">IQQQ")
_CHUNK = 1 << 20


class MappedRam:
    """A `SavedVm` in a mapped-ram file; `sections_at` is where the configuration ends.

    RemoteProtocolError when the file does not hold what its headers say.
    """

    def __init__(
        self,
        file: ReadOnlyFile,
        configuration: m.Configuration,
        target_page_size: int,
        sections_at: int,
        *,
        page_sizes: Mapping[str, int] | None = None,
    ) -> None:
        self.configuration = _without_mapped_ram(configuration)
        self.target_page_size = target_page_size
        self._file = file
        self._at = sections_at
        self._bitmaps: dict[str, NDArray[np.uint8]] = {}
        self._pages_at: dict[str, int] = {}
        blocks = self._read_start()
        self.blocks = with_page_sizes(blocks, page_sizes or {}, target_page_size)
        self.device_state = self._read_rest(blocks)
        self._reader = PageReader(file, -1, target_page_size)

    def zero_pages(self, block: str, pages: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Which of these pages are zero pages, shape (n,)."""
        present = self._bitmaps[block][pages >> 3] >> (pages & 7).astype(np.uint8)
        zero: NDArray[np.bool_] = present & 1 == 0
        return zero

    def read_pages(self, block: str, pages: NDArray[np.intp]) -> NDArray[np.uint8]:
        """The pages' bytes, shape (n, target page size); good until the next call."""
        offsets = self._pages_at[block] + pages.astype(np.int64) * self.target_page_size
        return self._reader.read(offsets)

    def read_page(self, block: str, page: int) -> memoryview | None:
        """One page's bytes, None for a zero page; good until the next call."""
        present = self._bitmaps[block].item(page >> 3) >> (page & 7) & 1
        offset = self._pages_at[block] + page * self.target_page_size
        return self._reader.read_page(offset if present else ZERO)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    # ---- reading the file's structure

    def _read_start(self) -> list[RAMBlock]:
        """RAM's START section: the block list with the place of each block's pages."""
        name_at = self._at + SECTION_NAME_AT
        kind, name = self._file.read(self._at, 1)[0], self._file.read(name_at, 1 + len(RAM))
        if kind != QemuVm.SECTION_START or name[1:] != RAM:
            raise broken("RAM's START section is missing", self._at, kind=ErrorKind.UNSUPPORTED)
        self.section_id = int.from_bytes(self._file.read(self._at + 1, 4), "big")
        self._at = name_at + len(name) + SECTION_AFTER_NAME
        [word] = self._take(_WORD)
        missing = word - MEM_SIZE
        if missing & (self.target_page_size - 1):
            raise broken(f"word {word:#x} where the block list should begin", self._at)
        blocks: list[RAMBlock] = []
        while missing:
            blocks.append(self._read_block(missing))
            missing -= blocks[-1].used_length
        if self._take(_WORD) != (EOS,):
            raise broken("RAM's START section does not end behind its block list", self._at)
        self._at += SECTION_ID_SIZE
        return blocks

    def _read_block(self, missing: int) -> RAMBlock:
        """One entry of the list, its header and its bitmap; goes on behind its pages."""
        at = self._at
        [size] = self._take(_BYTE)
        name = self._file.read(self._at, size)
        self._at += size
        [used_length] = self._take(_WORD)
        version, page_size, bitmap_at, pages_at = self._take(_HEADER)
        if not name or 0 in name or decode_idstr(name) in self._bitmaps:
            raise broken(f"{name!r} is no name of a RAMBlock, or was one before", at)
        idstr = decode_idstr(name)
        if len(self._bitmaps) == Limits().blocks:
            raise broken("too many RAMBlocks", at, kind=ErrorKind.LIMIT)
        if version != VERSION or page_size != self.target_page_size:
            raise broken(
                f"RAMBlock {idstr}: mapped-ram version {version} with pages of {page_size} "
                f"bytes; {VERSION} and {self.target_page_size} are known",
                at,
                kind=ErrorKind.UNSUPPORTED,
            )
        pages = -(-used_length // page_size)
        bitmap_size = -(-pages // 8)
        if (
            not 0 < used_length <= missing
            or bitmap_at < self._at
            or pages_at < bitmap_at + bitmap_size
            or pages_at + used_length > self._file.size
        ):
            raise broken(f"RAMBlock {idstr} does not fit into the file", at, kind=ErrorKind.RANGE)
        self._bitmaps[idstr] = np.frombuffer(self._file.read(bitmap_at, bitmap_size), np.uint8)
        self._pages_at[idstr] = pages_at
        self._at = pages_at + used_length
        return RAMBlock(idstr, used_length)

    def _take(self, layout: struct.Struct) -> tuple[int, ...]:
        fields = layout.unpack(self._file.read(self._at, layout.size))
        self._at += layout.size
        return fields

    def _read_rest(self, blocks: list[RAMBlock]) -> bytes:
        """What follows RAM's START section: sections without pages, then the device state."""
        decoder = ForwardDecoder(header=False, blocks=blocks, channel=Channel.FILE)
        rest = memoryview(bytearray(_CHUNK))
        device_state: bytes | None = None
        at = self._at
        try:
            while at < self._file.size:
                part = rest[: min(_CHUNK, self._file.size - at)]
                self._file.read_into(part, at)
                at += len(part)
                decoder.receive_data(part)
                device_state = _device_state(decoder) or device_state
            decoder.receive_data(b"")
            device_state = _device_state(decoder) or device_state
        except RemoteProtocolError as error:
            raise relocated(error, self._at) from error
        if device_state is None:
            raise broken(
                "the save file is not whole: it has no device state",
                self._file.size,
                kind=ErrorKind.TRUNCATED,
            )
        return device_state


def _device_state(decoder: ForwardDecoder) -> bytes | None:
    """The device state, if it is among the events that are due."""
    found: bytes | None = None
    for event in decoder:
        match event:
            case m.Pages():
                raise broken("a page outside its place", decoder.event_offset)
            case m.DeviceState(data):
                found = data
            case m.EndOfStream(clean=False, detail=detail):
                raise broken(
                    f"the save file is not whole: it ends {detail}",
                    decoder.event_offset,
                    kind=ErrorKind.TRUNCATED,
                )
    return found


def _without_mapped_ram(configuration: m.Configuration) -> m.Configuration:
    """The configuration that a destination without the capability expects."""
    others = tuple(c for c in configuration.capabilities or () if c != CAPABILITY_MAPPED_RAM)
    return replace(configuration, capabilities=others or None)
