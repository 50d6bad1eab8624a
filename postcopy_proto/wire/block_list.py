"""The block list: the first record of RAM's START section.

QEMU: migration/ram.c `ram_save_setup` writes it, `parse_ramblocks` and `parse_ramblock` read it.
All integers big-endian, n bytes of name.

    0    8  word: total of all used_length, with RAM_SAVE_FLAG_MEM_SIZE in the low bits
    then, until the used_lengths sum up to total:
    0    1  n
    1    n  idstr
    1+n  8  used_length
    9+n  8  page_size   only after POSTCOPY_ADVISE(16), for a block not backed by base pages
    .    8  gpa         only with the capability x-ignore-shared

Nothing says whether page_size is there: QEMU's reader looks at its own block. Without one, it can
still be told apart. A name is never empty and a page size has a zero in its first byte, so between
two blocks the next byte decides. After the last block the word of a RAM record follows, and a
power of two above the base page has none of the flags that such a word must have.
"""

from __future__ import annotations

from collections.abc import Mapping

from construct import Construct, If, Int64ub, Struct

from postcopy_proto.errors import ErrorKind, RemoteProtocolError
from postcopy_proto.messages import PostcopyAdvise, RamBlockEntry, RamBlockList
from postcopy_proto.ramblock import TARGET_PAGE_SIZE, RAMBlock, is_power_of_two
from postcopy_proto.wire.buffer import ReceiveBuffer
from postcopy_proto.wire.fields import Idstr, checked_idstr, malformed
from postcopy_proto.wire.limits import Limits
from postcopy_proto.wire.pages import MEM_SIZE, WORD_SIZE


def entry_schema(*, page_size: bool, gpa: bool) -> Construct:
    """The schema of one entry, with or without its optional fields."""
    return Struct(
        "idstr" / Idstr,
        "used_length" / Int64ub,
        "page_size" / If(page_size, Int64ub),
        "gpa" / If(gpa, Int64ub),
    )


_SCHEMAS = {
    (page_size, gpa): entry_schema(page_size=page_size, gpa=gpa)
    for page_size in (False, True)
    for gpa in (False, True)
}


def encode_block_list(message: RamBlockList, target_page_size: int = TARGET_PAGE_SIZE) -> bytes:
    """The list with its word; ValueError for what no reader could take.

    That is: a total that leaves no room for the flag, an empty block, a name twice, a page size
    that is no power of two above the base page, a gpa for some blocks only.
    """
    entries = b"".join(_encode_entry(entry, target_page_size) for entry in message.blocks)
    total = message.total
    if total % target_page_size or total >> 64:
        raise ValueError(
            f"{message.NAME}: total of {total} bytes; a multiple of {target_page_size} below 2^64"
        )
    if len({entry.idstr for entry in message.blocks}) != len(message.blocks):
        raise ValueError(f"{message.NAME}: a block is listed twice")
    if len({entry.gpa is None for entry in message.blocks}) > 1:
        raise ValueError(f"{message.NAME}: some blocks have a gpa and some have none")
    return (total | MEM_SIZE).to_bytes(WORD_SIZE, "big") + entries


def _encode_entry(entry: RamBlockEntry, base: int) -> bytes:
    size, gpa = entry.page_size, entry.gpa
    if not 0 < entry.used_length < 1 << 64:
        raise ValueError(
            f"RAMBlock {entry.idstr}: used_length {entry.used_length}; 1 to 2^64 - 1 fits"
        )
    if size is not None and not (is_power_of_two(size) and base < size < 1 << 56):
        raise ValueError(
            f"RAMBlock {entry.idstr}: page_size {size}; a power of two above {base}, below 2^56"
        )
    if gpa is not None and not 0 <= gpa < 1 << 64:
        raise ValueError(f"RAMBlock {entry.idstr}: gpa {gpa}; 0 to 2^64 - 1 fits")
    encoded: bytes = _SCHEMAS[size is not None, gpa is not None].build(
        {"idstr": entry.idstr, "used_length": entry.used_length, "page_size": size, "gpa": gpa}
    )
    return encoded


class BlockListReader:
    """Reads the entries of one list, one after the other, as they arrive.

    `summary` is the page size summary of POSTCOPY_ADVISE, or None where no page_size can stand;
    `page_sizes` is what the caller knows of the blocks' host pages; `gpa` says whether the
    capability x-ignore-shared is on.
    """

    def __init__(
        self,
        buffer: ReceiveBuffer,
        *,
        target_page_size: int,
        summary: int | None,
        page_sizes: Mapping[str, int],
        gpa: bool,
        limits: Limits,
    ) -> None:
        self._buffer = buffer
        self._base = target_page_size
        self._summary = summary
        self._page_sizes = page_sizes
        self._gpa = gpa
        self._limits = limits
        self._total: int | None = None
        self._missing = 0  # bytes of RAM that the entries still to come must add up to
        self._entries: dict[str, RamBlockEntry] = {}

    def read(self) -> RamBlockList:
        """Take the rest of the list; NeedMoreError keeps the entries that were whole."""
        if self._total is None:
            self._total = self._missing = self._read_total()
        while self._missing:
            self._read_entry()
        return RamBlockList(tuple(self._entries.values()))

    def blocks(self) -> dict[str, RAMBlock]:
        """What the list says, by name in its order; where it gives no page size, the caller's."""
        return {
            name: RAMBlock(
                name,
                entry.used_length,
                entry.page_size or self._page_sizes.get(name, self._base),
            )
            for name, entry in self._entries.items()
        }

    def _read_total(self) -> int:
        word = int.from_bytes(self._buffer.peek(WORD_SIZE), "big")
        if word & (self._base - 1) != MEM_SIZE:
            raise malformed(
                f"word {word:#x}; a START section opens with the block list and its flag "
                f"{MEM_SIZE:#x}",
                RamBlockList.NAME,
            )
        self._buffer.skip(WORD_SIZE)
        return word - MEM_SIZE

    def _read_entry(self) -> None:
        buffer = self._buffer
        length_at = 1 + buffer.peek(1)[0]
        fixed = buffer.peek(length_at + 8)
        name = self._checked_name(fixed[1:length_at])
        used_length = int.from_bytes(fixed[length_at:], "big")
        self._check_length(name, used_length)

        has_page_size = self._has_page_size(len(fixed), last=used_length == self._missing)
        size = len(fixed) + 8 * (has_page_size + self._gpa)
        parsed = _SCHEMAS[has_page_size, self._gpa].parse(buffer.peek(size))
        self._check_page_size(name, parsed.page_size)
        buffer.skip(size)
        self._entries[name] = RamBlockEntry(name, used_length, parsed.page_size, parsed.gpa)
        self._missing -= used_length

    def _checked_name(self, raw: memoryview) -> str:
        name = checked_idstr(raw, self._limits.idstr)
        if name in self._entries:
            raise self._error(ErrorKind.MALFORMED, f"RAMBlock {name!r} is listed twice")
        if len(self._entries) == self._limits.blocks:
            raise self._error(ErrorKind.LIMIT, f"more than {self._limits.blocks} RAMBlocks")
        return name

    def _check_length(self, name: str, used_length: int) -> None:
        if used_length == 0:
            raise self._error(ErrorKind.RANGE, f"RAMBlock {name!r} of 0 bytes")
        if used_length > self._limits.block_length:
            raise self._error(
                ErrorKind.LIMIT,
                f"RAMBlock {name!r} of {used_length:#x} bytes; the limit is "
                f"{self._limits.block_length:#x}",
            )
        if used_length > self._missing:
            raise self._error(
                ErrorKind.MISMATCH,
                f"RAMBlock {name!r} of {used_length:#x} bytes; only {self._missing:#x} are left "
                f"of the total {self._total:#x}",
            )

    def _has_page_size(self, at: int, *, last: bool) -> bool:
        """Whether a page_size stands at `at` bytes from the read position; see the module's text.

        After the last block, a word that is no page size of the summary is left to the RAM
        records.
        """
        if self._summary is None or self._summary == self._base:
            return False
        if not last:
            return self._buffer.peek(at + 1)[at] == 0
        word = int.from_bytes(self._buffer.peek(at + 8)[at:], "big")
        return is_power_of_two(word) and word > self._base and bool(word & self._summary)

    def _check_page_size(self, name: str, page_size: int | None) -> None:
        if page_size is not None and not (is_power_of_two(page_size) and page_size > self._base):
            raise self._error(
                ErrorKind.MALFORMED,
                f"RAMBlock {name!r} with page size {page_size:#x}; a power of two above "
                f"{self._base:#x}, or none, may stand here",
            )
        if self._summary is None:
            return
        said = page_size or self._base
        if not said & self._summary:
            raise self._error(
                ErrorKind.MISMATCH,
                f"RAMBlock {name!r} on pages of {said:#x} bytes, which "
                f"{PostcopyAdvise.NAME}'s summary {self._summary:#x} has not",
            )
        known = self._page_sizes.get(name, said)
        if known != said:
            raise self._error(
                ErrorKind.MISMATCH,
                f"RAMBlock {name!r} on pages of {said:#x} bytes; it has {known:#x} here",
            )

    def _error(self, kind: ErrorKind, reason: str) -> RemoteProtocolError:
        return RemoteProtocolError(
            reason, kind=kind, offset=self._buffer.offset, message=RamBlockList.NAME
        )
