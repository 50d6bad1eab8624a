"""Every message of both directions, as frozen dataclasses that know no bytes.

`wire` turns them into bytes and back. `NAME` is QEMU's name of the message without its prefix
(MIG_CMD_, MIG_RP_MSG_, QEMU_VM_, RAM_SAVE_FLAG_); errors, traces and summaries print it.

The order follows a migration: the stream's envelope, the commands, the RAM records, the content
of a package, and the return path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from postcopy_proto.ramblock import TARGET_PAGE_SIZE, ByteRange, ascends


class Message:
    """Base of all messages."""

    __slots__ = ()
    NAME: ClassVar[str] = ""


# ---- the stream's envelope (migration/savevm.c: qemu_savevm_state_header, save_section_header)


@dataclass(frozen=True, slots=True)
class StreamHeader(Message):
    """Magic and version at the head of every stream that is not a recovery."""

    NAME: ClassVar[str] = "QEMU_VM_FILE_MAGIC"
    version: int = 3


@dataclass(frozen=True, slots=True)
class Configuration(Message):
    """What both ends must agree on before anything else."""

    NAME: ClassVar[str] = "CONFIGURATION"
    machine: str
    """class name of the machine without `-machine`, e.g. `pc-i440fx-7.2`"""
    target_page_bits: int | None = None
    """subsection configuration/target-page-bits; never sent for x86"""
    capabilities: tuple[str, ...] | None = None
    """subsection configuration/capabilities: the validated ones that are on"""
    uuid: bytes | None = None
    """subsection configuration/uuid: 16 bytes in textual order"""


@dataclass(frozen=True, slots=True)
class SectionStart(Message):
    """First section of an iterable: here always `ram`, whose body opens with the block list."""

    NAME: ClassVar[str] = "SECTION_START"
    section_id: int
    idstr: str
    instance_id: int
    version_id: int


@dataclass(frozen=True, slots=True)
class SectionPart(Message):
    """One more piece of an iterable."""

    NAME: ClassVar[str] = "SECTION_PART"
    section_id: int


@dataclass(frozen=True, slots=True)
class SectionEnd(Message):
    """The last piece of an iterable."""

    NAME: ClassVar[str] = "SECTION_END"
    section_id: int


@dataclass(frozen=True, slots=True)
class SectionFull(Message):
    """The head of a device's only section; its body is not self-delimiting."""

    NAME: ClassVar[str] = "SECTION_FULL"
    section_id: int
    idstr: str
    instance_id: int
    version_id: int


@dataclass(frozen=True, slots=True)
class SectionFooter(Message):
    """Closes every section body; repeats the section's id."""

    NAME: ClassVar[str] = "SECTION_FOOTER"
    section_id: int


@dataclass(frozen=True, slots=True)
class Eof(Message):
    """The end of the stream's sections."""

    NAME: ClassVar[str] = "EOF"


@dataclass(frozen=True, slots=True)
class VmDescription(Message):
    """JSON that describes the device sections; follows EOF in precopy streams and save files."""

    NAME: ClassVar[str] = "VMDESCRIPTION"
    text: bytes


# ---- commands (migration/savevm.c: enum qemu_vm_cmd)


@dataclass(frozen=True, slots=True)
class OpenReturnPath(Message):
    """The destination may write to the connection from now on."""

    NAME: ClassVar[str] = "OPEN_RETURN_PATH"


@dataclass(frozen=True, slots=True)
class Ping(Message):
    """Asks for a `Pong` with the same value."""

    NAME: ClassVar[str] = "PING"
    value: int


@dataclass(frozen=True, slots=True)
class PostcopyAdvise(Message):
    """Postcopy may follow. Both fields are None when only dirty bitmaps will be postcopied."""

    NAME: ClassVar[str] = "POSTCOPY_ADVISE"
    page_size_summary: int | None = None
    """bitwise OR of the host page sizes of all blocks"""
    target_page_size: int | None = None
    """bytes"""


@dataclass(frozen=True, slots=True)
class PostcopyListen(Message):
    """First item of a package: register the memory, serve faults, read on."""

    NAME: ClassVar[str] = "POSTCOPY_LISTEN"


@dataclass(frozen=True, slots=True)
class PostcopyRun(Message):
    """Last item of a package: the VM runs at the destination from here."""

    NAME: ClassVar[str] = "POSTCOPY_RUN"


@dataclass(frozen=True, slots=True)
class PostcopyRamDiscard(Message):
    """Byte ranges of one block to drop, because they will be sent again after the switchover."""

    NAME: ClassVar[str] = "POSTCOPY_RAM_DISCARD"
    block: str
    ranges: tuple[ByteRange, ...]
    """a sender ships at most 12; a receiver takes as many as the command's length holds"""


@dataclass(frozen=True, slots=True)
class Packaged(Message):
    """A blob of sections and commands that is received whole before its first byte is parsed."""

    NAME: ClassVar[str] = "PACKAGED"
    payload: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class EnableColo(Message):
    """The stream belongs to COLO."""

    NAME: ClassVar[str] = "ENABLE_COLO"


@dataclass(frozen=True, slots=True)
class PostcopyResume(Message):
    """Recovery: the source has all bitmaps and goes on."""

    NAME: ClassVar[str] = "POSTCOPY_RESUME"


@dataclass(frozen=True, slots=True)
class RecvBitmap(Message):
    """Recovery: the source asks for the received bitmap of one block."""

    NAME: ClassVar[str] = "RECV_BITMAP"
    block: str


@dataclass(frozen=True, slots=True)
class SwitchoverStart(Message):
    """The VM has stopped at the source (QEMU 10.0 and later)."""

    NAME: ClassVar[str] = "SWITCHOVER_START"


@dataclass(frozen=True, slots=True)
class UnknownCommand(Message):
    """A command that is in no table; only with `strict=False`."""

    NAME: ClassVar[str] = "UNKNOWN_COMMAND"
    command: int
    payload: bytes


# ---- RAM records (migration/ram.c: ram_save_setup, ram_load)


@dataclass(frozen=True, slots=True)
class RamBlockEntry:
    """One line of the block list."""

    idstr: str
    used_length: int
    """bytes"""
    page_size: int | None = None
    """host page in bytes; on the wire only for blocks whose host page is not the base page"""
    gpa: int | None = None
    """guest physical address; on the wire only with the capability x-ignore-shared"""


@dataclass(frozen=True, slots=True)
class RamBlockList(Message):
    """The block list at the head of RAM's START section, in the source's order."""

    NAME: ClassVar[str] = "MEM_SIZE"
    blocks: tuple[RamBlockEntry, ...]

    @property
    def total(self) -> int:
        """Sum of the used lengths, which the wire states before the list."""
        return sum(block.used_length for block in self.blocks)


@dataclass(frozen=True, slots=True, eq=False)
class Pages(Message):
    """A batch of consecutive PAGE and ZERO records of one block, in stream order.

    Decoders split a long run of records into batches wherever their input happens to end, so
    two equal streams may come as differently cut batches; `wire.pages.join_pages` makes them
    comparable. `data` is a view of the receive buffer: it is good until the decoder is fed again.
    """

    NAME: ClassVar[str] = "PAGE"
    block: str
    offsets: NDArray[np.uint64]
    """byte offset in the block of each target page, shape (n,)"""
    positions: NDArray[np.int64]
    """where the bytes of each page start in `data`, or -1 for a zero page; shape (n,)"""
    data: memoryview = field(repr=False)
    """the bytes that `positions` point into: record headers and other things may lie between"""
    page_size: int = TARGET_PAGE_SIZE
    """bytes of a target page"""
    named: bool = True
    """whether the first record carries the block's name; all others carry CONTINUE"""

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def zero(self) -> NDArray[np.bool_]:
        """Which pages are zero pages, shape (n,)."""
        return self.positions < 0

    def page(self, index: int) -> memoryview | None:
        """The bytes of one page, or None for a zero page."""
        position = int(self.positions[index])
        return None if position < 0 else self.data[position : position + self.page_size]

    def runs(self) -> Iterator[tuple[int, int]]:
        """(first, count) of entries of one kind, contiguous in the block and in `data`.

        Entries of a run are either all zero pages with ascending offsets, or all pages whose
        bytes follow each other in `data` at one stride as their offsets do in the block.
        """
        count = len(self.offsets)
        if count == 0:
            return
        if self.is_one_run():
            yield 0, count
            return
        offsets = self.offsets.astype(np.int64)
        zero = self.zero
        follows = np.diff(offsets) == self.page_size
        follows &= zero[1:] == zero[:-1]
        step = np.diff(self.positions)
        # A stride may only be decided by the first step of a run: a change of stride ends it.
        same_step = np.ones(count - 1, np.bool_)
        same_step[1:] = (step[1:] == step[:-1]) | zero[2:] | ~follows[:-1]
        breaks = np.flatnonzero(~(follows & same_step)) + 1
        first = 0
        for end in (*breaks.tolist(), count):
            yield first, end - first
            first = end

    def is_one_run(self) -> bool:
        """Whether all entries, one at least, are one run: as is mostly the case, and found soon."""
        positions = self.positions
        if len(positions) == 1:
            return True
        step = int(positions[1]) - int(positions[0])
        if step < 0 or (step == 0) != (positions[0] < 0):
            return False
        return ascends(self.offsets, self.page_size) and ascends(positions, step)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Pages):
            return NotImplemented
        return (
            self.block == other.block
            and self.named == other.named
            and self.page_size == other.page_size
            and np.array_equal(self.offsets, other.offsets)
            and np.array_equal(self.zero, other.zero)
            and all(self.page(i) == other.page(i) for i in range(len(self)))
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class XbzrlePage(Message):
    """A page as a difference to the copy sent before; precopy only."""

    NAME: ClassVar[str] = "XBZRLE"
    block: str
    offset: int
    """byte offset in the block"""
    encoded: bytes = field(repr=False)
    named: bool = True


@dataclass(frozen=True, slots=True)
class CompressedPage(Message):
    """A page deflated with zlib; capability `compress`, QEMU up to 9.0."""

    NAME: ClassVar[str] = "COMPRESS_PAGE"
    block: str
    offset: int
    """byte offset in the block"""
    compressed: bytes = field(repr=False)
    named: bool = True


@dataclass(frozen=True, slots=True)
class MultifdFlush(Message):
    """Wait for the multifd channels here (QEMU 8.1 and later)."""

    NAME: ClassVar[str] = "MULTIFD_FLUSH"


@dataclass(frozen=True, slots=True)
class RamEos(Message):
    """The end of RAM's part of a section, or of a preempt channel."""

    NAME: ClassVar[str] = "EOS"


# ---- what stands between the section headers that we understand


@dataclass(frozen=True, slots=True)
class DeviceState(Message):
    """Device sections, verbatim and not understood: SECTION_FULL items with their footers."""

    NAME: ClassVar[str] = "DEVICE_STATE"
    data: bytes = field(repr=False)


# ---- return path (migration/migration.c: migrate_send_rp_*)


@dataclass(frozen=True, slots=True)
class Shut(Message):
    """The destination is done; 0 when all went well."""

    NAME: ClassVar[str] = "SHUT"
    status: int = 0


@dataclass(frozen=True, slots=True)
class Pong(Message):
    """Answers a `Ping`."""

    NAME: ClassVar[str] = "PONG"
    value: int


@dataclass(frozen=True, slots=True)
class ReqPagesId(Message):
    """The destination wants bytes [start, start + length) of the named block now."""

    NAME: ClassVar[str] = "REQ_PAGES_ID"
    start: int
    length: int
    block: str


@dataclass(frozen=True, slots=True)
class ReqPages(Message):
    """The same, of the block that was named last."""

    NAME: ClassVar[str] = "REQ_PAGES"
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class ReceivedBitmap(Message):
    """Recovery: which target pages of a block have arrived."""

    NAME: ClassVar[str] = "RECV_BITMAP"
    block: str
    bitmap: bytes = field(repr=False)
    """one bit a target page, least significant first; a multiple of 8 bytes"""


@dataclass(frozen=True, slots=True)
class ResumeAck(Message):
    """Recovery: the destination is ready to go on; the value must be 1."""

    NAME: ClassVar[str] = "RESUME_ACK"
    value: int = 1


@dataclass(frozen=True, slots=True)
class SwitchoverAck(Message):
    """The destination's devices agree to the switchover (QEMU 8.1 and later)."""

    NAME: ClassVar[str] = "SWITCHOVER_ACK"


@dataclass(frozen=True, slots=True)
class UnknownReturnPathMessage(Message):
    """A return path message that is in no table; only with `strict=False`."""

    NAME: ClassVar[str] = "UNKNOWN_RP_MSG"
    type: int
    payload: bytes


# ---- not on the wire


@dataclass(frozen=True, slots=True)
class EndOfStream(Message):
    """The last event of a channel, after `receive_data(b"")`."""

    NAME: ClassVar[str] = "END_OF_STREAM"
    offset: int
    """bytes received in all"""
    clean: bool
    """whether the stream ended where it may; False when it broke off"""
    detail: str = ""
    """inside what it broke off, and what was expected"""


class NeedData:
    """The type of `NEED_DATA`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "NEED_DATA"


NEED_DATA = NeedData()
"""What `next_event` returns when nothing more can be said before more bytes arrive."""
