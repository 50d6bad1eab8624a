"""The forward channel: everything a source says, in the order of its sections.

QEMU: migration/savevm.c `qemu_loadvm_state`, `qemu_loadvm_state_header`, `qemu_loadvm_state_main`,
`qemu_loadvm_section_start_full`, `qemu_loadvm_section_part_end`, `check_section_footer`. The
layouts stand with their families: stream.py, configuration.py, commands.py, block_list.py,
pages.py. This module knows only which of them may come next, and never why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.messages import (
    Configuration,
    EndOfStream,
    Eof,
    Message,
    Packaged,
    PostcopyAdvise,
    PostcopyRamDiscard,
    RamBlockList,
    RamEos,
    RecvBitmap,
    SectionEnd,
    SectionFooter,
    SectionPart,
    SectionStart,
    StreamHeader,
    VmDescription,
)
from postcopy_proto.ramblock import TARGET_PAGE_SIZE, RAMBlock, encode_idstr, is_power_of_two
from postcopy_proto.wire import stream
from postcopy_proto.wire.block_list import BlockListReader
from postcopy_proto.wire.buffer import NeedMoreError
from postcopy_proto.wire.commands import (
    ENVELOPE_SIZE,
    PACKAGED_LENGTH,
    MigCmd,
    check_command,
    decode_command,
)
from postcopy_proto.wire.configuration import read_configuration
from postcopy_proto.wire.decoder import Decoder
from postcopy_proto.wire.device_state import DeviceStateReader
from postcopy_proto.wire.fields import checked_idstr, malformed
from postcopy_proto.wire.limits import Limits
from postcopy_proto.wire.ram import RamReader
from postcopy_proto.wire.stream import QemuVm

S = TypeVar("S", SectionPart, SectionEnd)

RAM_IDSTR = "ram"
RAM_VERSION = 4
"""the only version of RAM's sections that QEMU loads"""

CAPABILITY_IGNORE_SHARED = "x-ignore-shared"
CAPABILITY_MAPPED_RAM = "mapped-ram"


class ForwardDecoder(Decoder):
    """The forward channel -> messages: what a destination, or a reader of save files, reads.

    `header`: whether the stream opens with file header and configuration; a recovery does not.
    None decides by the first byte. `blocks`: the block list where the stream has none (recovery);
    a list in the stream takes its place. `page_sizes`: host page size by block, in bytes, as far
    as the caller knows it; the stream must agree. With `strict=False` a command that is in no
    table comes as `UnknownCommand`. `channel` only names the stream in errors.

    From the first SECTION_FULL of a device on the stream is opaque: see device_state.py. Iterable
    sections other than `ram` are refused by name.
    """

    def __init__(
        self,
        *,
        header: bool | None = True,
        blocks: Iterable[RAMBlock] | None = None,
        page_sizes: Mapping[str, int] | None = None,
        target_page_size: int = TARGET_PAGE_SIZE,
        limits: Limits | None = None,
        strict: bool = True,
        channel: Channel = Channel.FORWARD,
    ) -> None:
        super().__init__(channel, limits or Limits())
        self._header = header
        self._strict = strict
        self._page_sizes = dict(page_sizes or {})
        for name, size in self._page_sizes.items():
            if not is_power_of_two(size):
                raise ValueError(f"RAMBlock {name}: page size {size} is no power of 2")
        self._target_page_size = target_page_size
        self._blocks: dict[str, RAMBlock] = {block.idstr: block for block in blocks or ()}
        known = None if blocks is None else self._blocks
        self._ram = RamReader(self._buffer, known, target_page_size, self._limits)
        self._capabilities: tuple[str, ...] = ()
        self._summary: int | None = None  # of POSTCOPY_ADVISE(16), once it was read
        self._ram_id: int | None = None  # RAM's section id
        self._block_list: BlockListReader | None = None
        self._devices: DeviceStateReader | None = None
        self._devices_offset = 0
        self._inside = "the file header"
        self._next: Callable[[], Message] = self._read_header

    @property
    def blocks(self) -> Mapping[str, RAMBlock]:
        """The RAMBlocks by name, in the source's order: the stream's list, or the caller's."""
        return self._blocks

    def _read(self) -> Message:
        return self._next()

    def _expect(self, reader: Callable[[], Message], inside: str) -> None:
        """Say what comes next, and what the stream is inside of until then."""
        self._next = reader
        self._inside = inside

    # ---- header and configuration

    def _read_header(self) -> Message:
        if self._header is None:
            self._header = self._buffer.peek(1)[0] == stream.QEMU_VM_FILE_MAGIC >> 24
        if not self._header:
            self._expect_item()
            return self._read_item()
        message: StreamHeader = stream.decode_header(self._buffer.peek(stream.HEADER_SIZE))
        self._buffer.skip(stream.HEADER_SIZE)
        self._expect(self._read_configuration, "the configuration")
        return message

    def _read_configuration(self) -> Configuration:
        message = read_configuration(self._buffer, self._limits)
        self._capabilities = message.capabilities or ()
        self._check_configuration(message)
        self._expect_item()
        return message

    def _check_configuration(self, message: Configuration) -> None:
        start = self._start
        if CAPABILITY_MAPPED_RAM in self._capabilities:
            raise RemoteProtocolError(
                "capability mapped-ram is on: its pages stand at fixed places of a file; "
                "read it as a file, not as a stream",
                kind=ErrorKind.UNSUPPORTED,
                offset=start,
                message=message.NAME,
            )
        bits = message.target_page_bits
        if bits is not None and (bits > 63 or 1 << bits != self._target_page_size):
            raise RemoteProtocolError(
                f"target pages of 2^{bits} bytes; {self._target_page_size} is expected",
                kind=ErrorKind.MISMATCH,
                offset=start,
                message=message.NAME,
            )

    # ---- items

    def _expect_item(self) -> None:
        self._expect(self._read_item, "the stream before its EOF")

    def _read_item(self) -> Message:
        kind = self._buffer.peek(1)[0]
        reader = _ITEMS.get(kind)
        if reader is None:
            raise RemoteProtocolError(
                f"byte {kind:#04x} where a section or command should begin",
                kind=ErrorKind.UNKNOWN,
                message="SECTION",
            )
        return reader(self)

    def _read_command(self) -> Message:
        buffer, start = self._buffer, self._buffer.offset
        head = buffer.peek(ENVELOPE_SIZE)
        cmd, length = int.from_bytes(head[1:3], "big"), int.from_bytes(head[3:], "big")
        check_command(cmd, length, strict=self._strict)
        size = ENVELOPE_SIZE + length
        payload = buffer.peek(size)[ENVELOPE_SIZE:]
        if cmd == MigCmd.PACKAGED:
            return self._read_packaged(size, PACKAGED_LENGTH.parse(payload).length)
        message = decode_command(
            cmd, payload, offset=start + ENVELOPE_SIZE, blocks=self._ram.blocks
        )
        if isinstance(message, PostcopyAdvise):
            self._check_advise(message)
        elif isinstance(message, (RecvBitmap, PostcopyRamDiscard)):
            checked_idstr(encode_idstr(message.block), self._limits.idstr)
        buffer.skip(size)
        return message

    def _read_packaged(self, head: int, length: int) -> Packaged:
        if length > self._limits.package_bytes:
            raise RemoteProtocolError(
                f"package of {length} bytes; the limit is {self._limits.package_bytes}",
                kind=ErrorKind.LIMIT,
                message=Packaged.NAME,
            )
        payload = bytes(self._buffer.peek(head + length)[head:])
        self._buffer.skip(head + length)
        return Packaged(payload)

    def _check_advise(self, message: PostcopyAdvise) -> None:
        if message.page_size_summary is None:
            return
        if message.target_page_size != self._target_page_size:
            raise RemoteProtocolError(
                f"target pages of {message.target_page_size} bytes; {self._target_page_size} "
                "is expected",
                kind=ErrorKind.MISMATCH,
                message=message.NAME,
            )
        if CAPABILITY_IGNORE_SHARED in self._capabilities:
            raise RemoteProtocolError(
                "together with capability x-ignore-shared, which QEMU refuses",
                kind=ErrorKind.UNSUPPORTED,
                message=message.NAME,
            )
        self._summary = message.page_size_summary

    # ---- RAM sections

    def _read_start(self) -> SectionStart:
        size = self._section_header_size()
        message = stream.SECTION_START.decode(self._buffer.peek(size))
        if message.idstr != RAM_IDSTR:
            raise RemoteProtocolError(
                f"section {message.idstr!r} of another iterable than RAM has no known end",
                kind=ErrorKind.UNSUPPORTED,
                message=message.NAME,
            )
        if (message.instance_id, message.version_id) != (0, RAM_VERSION):
            raise RemoteProtocolError(
                f"RAM with instance_id {message.instance_id} and version_id "
                f"{message.version_id}; 0 and {RAM_VERSION} are expected",
                kind=ErrorKind.MISMATCH,
                message=message.NAME,
            )
        if self._ram_id is not None:
            raise RemoteProtocolError(
                f"a second START of RAM, whose section_id is {self._ram_id}",
                kind=ErrorKind.STATE,
                message=message.NAME,
            )
        self._buffer.skip(size)
        self._ram_id = message.section_id
        self._expect(self._read_block_list, "the block list")
        return message

    def _section_header_size(self) -> int:
        """Bytes of the START or FULL header at the read position; its name was checked."""
        at = stream.SECTION_NAME_AT
        name_end = at + 1 + self._buffer.peek(at + 1)[at]
        checked_idstr(self._buffer.peek(name_end)[at + 1 :], self._limits.idstr)
        return name_end + stream.SECTION_AFTER_NAME

    def _read_block_list(self) -> RamBlockList:
        if self._block_list is None:
            self._block_list = BlockListReader(
                self._buffer,
                target_page_size=self._target_page_size,
                summary=self._summary,
                page_sizes=self._page_sizes,
                gpa=CAPABILITY_IGNORE_SHARED in self._capabilities,
                limits=self._limits,
            )
            self._block_list_offset = self._buffer.offset
        message = self._block_list.read()
        self._start = self._block_list_offset
        self._blocks = self._block_list.blocks()
        self._ram.blocks = self._blocks
        self._expect(self._read_ram, "a section of RAM")
        return message

    def _read_part(self) -> SectionPart:
        return self._open_section(stream.SECTION_PART.decode(self._section_id()))

    def _read_end(self) -> SectionEnd:
        return self._open_section(stream.SECTION_END.decode(self._section_id()))

    def _section_id(self) -> memoryview:
        return self._buffer.peek(stream.SECTION_ID_SIZE)

    def _open_section(self, message: S) -> S:
        if self._ram_id is None and not self._header:
            self._ram_id = message.section_id  # a recovery inherits it from the broken stream
        if message.section_id != self._ram_id:
            raise RemoteProtocolError(
                f"section_id {message.section_id}; "
                + (
                    "no section was started"
                    if self._ram_id is None
                    else f"RAM's is {self._ram_id}, and no other iterable was started"
                ),
                kind=ErrorKind.UNKNOWN,
                message=message.NAME,
            )
        self._buffer.skip(stream.SECTION_ID_SIZE)
        self._expect(self._read_ram, "a section of RAM")
        return message

    def _read_ram(self) -> Message:
        message = self._ram.read(self._ram.peek_word())
        if isinstance(message, RamEos):
            self._expect(self._read_footer, "a section, before its footer")
        return message

    def _read_footer(self) -> SectionFooter:
        kind = self._buffer.peek(1)[0]
        if kind != QemuVm.SECTION_FOOTER:
            raise malformed(
                f"byte {kind:#04x} behind section {self._ram_id}; its footer opens with "
                f"{QemuVm.SECTION_FOOTER.value:#04x}",
                SectionFooter.NAME,
            )
        message = stream.FOOTER.decode(self._section_id())
        if message.section_id != self._ram_id:
            raise RemoteProtocolError(
                f"footer of section {message.section_id} behind section {self._ram_id}",
                kind=ErrorKind.MISMATCH,
                message=message.NAME,
            )
        self._buffer.skip(stream.SECTION_ID_SIZE)
        self._expect_item()
        return message

    # ---- device sections

    def _read_full(self) -> Message:
        stream.SECTION_FULL.decode(self._buffer.peek(self._section_header_size()))
        self._devices_offset = self._buffer.offset
        self._devices = DeviceStateReader(
            self._devices_offset, self._limits.device_state_bytes, self._limits.description_bytes
        )
        self._expect(self._read_devices, "device sections")
        return self._read_devices()

    def _read_devices(self) -> Message:
        """Everything from the first device section on, once its end is known."""
        assert self._devices is not None
        self._buffer.pass_to(self._devices.add)
        if self._devices.complete:
            return self._finish_devices(self._devices.messages())
        if self._buffer.eof and (parts := self._devices.messages_at_end()):
            return self._finish_devices(parts)
        raise NeedMoreError

    def _finish_devices(self, parts: list[tuple[int, Message]]) -> Message:
        """Hand out the first part now, the others next; nothing may follow them."""
        self._expect(self._read_nothing, "")
        self._ready.extend((self._devices_offset + at, message) for at, message in parts[1:])
        self._start = self._devices_offset
        return parts[0][1]

    # ---- the end

    def _read_eof(self) -> Eof:
        message = stream.EOF.decode(self._buffer.peek(1))
        self._buffer.skip(1)
        self._expect(self._read_description, "")
        return message

    def _read_description(self) -> VmDescription:
        """The description that may follow EOF where no device section preceded it."""
        kind = self._buffer.peek(1)[0]
        if kind != QemuVm.VMDESCRIPTION:
            return self._read_nothing()
        head = stream.VMDESCRIPTION_TEXT_AT
        length = int.from_bytes(self._buffer.peek(head)[1:], "big")
        if length > self._limits.description_bytes:
            raise RemoteProtocolError(
                f"description of {length} bytes; the limit is {self._limits.description_bytes}",
                kind=ErrorKind.LIMIT,
                message=VmDescription.NAME,
            )
        message = stream.VMDESCRIPTION.decode(self._buffer.peek(head + length))
        self._buffer.skip(head + length)
        self._expect(self._read_nothing, "")
        return message

    def _read_nothing(self) -> VmDescription:
        """Behind the last item: only the end of the stream may come."""
        byte = self._buffer.peek(1)[0]
        raise malformed(f"byte {byte:#04x} behind the end of the stream", Eof.NAME)

    def _at_end(self) -> EndOfStream:
        buffer = self._buffer
        if not self._inside and not buffer.pending:
            return EndOfStream(buffer.total, clean=True)
        if self._devices is not None and self._devices.in_description:
            return self._broke_off(VmDescription.NAME)
        return self._broke_off(self._inside or VmDescription.NAME)


_ITEMS: dict[int, Callable[[ForwardDecoder], Message]] = {
    QemuVm.EOF: ForwardDecoder._read_eof,
    QemuVm.SECTION_START: ForwardDecoder._read_start,
    QemuVm.SECTION_PART: ForwardDecoder._read_part,
    QemuVm.SECTION_END: ForwardDecoder._read_end,
    QemuVm.SECTION_FULL: ForwardDecoder._read_full,
    QemuVm.COMMAND: ForwardDecoder._read_command,
}
