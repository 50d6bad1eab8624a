"""The stream's envelope: file header, section headers and footers, EOF, VMDESCRIPTION.

QEMU: migration/savevm.c `qemu_savevm_state_header`, `save_section_header`, `save_section_footer`,
`qemu_loadvm_state_main`, `check_section_footer`; numbers QEMU_VM_* from migration/savevm.h. All
integers big-endian, n bytes of name.

    file header                          every stream but a recovery
    0    4  0x5145564d, QEMU_VM_FILE_MAGIC ("QEVM")
    4    4  3, QEMU_VM_FILE_VERSION

    SECTION_START, SECTION_FULL          PART, END              footer
    0    1  0x01, 0x04                   0  1  0x02, 0x03       0  1  0x7e
    1    4  section_id                   1  4  section_id       1  4  section_id
    5    1  n, 1 to 255
    6    n  idstr
    6+n  4  instance_id
    10+n 4  version_id

    EOF                                  VMDESCRIPTION, after EOF of a precopy stream only
    0    1  0x00                         0  1  0x06
                                         1  4  length
                                         5  .  JSON

After a section's header comes its body, then a footer with the same section_id. A body has no
length: RAM's is delimited by its own EOS word, a device's only by knowing the device.
"""

from __future__ import annotations

from enum import IntEnum

from construct import Const, GreedyBytes, Int32ub, Prefixed, Struct

from postcopy_proto.errors import ErrorKind, RemoteProtocolError
from postcopy_proto.messages import (
    DeviceState,
    Eof,
    SectionEnd,
    SectionFooter,
    SectionFull,
    SectionPart,
    SectionStart,
    StreamHeader,
    VmDescription,
)
from postcopy_proto.wire.fields import Codec, Idstr, item, malformed

QEMU_VM_FILE_MAGIC = 0x5145564D
QEMU_VM_FILE_VERSION_COMPAT = 2
QEMU_VM_FILE_VERSION = 3
HEADER_SIZE = 8
"""bytes of the file header"""


class QemuVm(IntEnum):
    """QEMU_VM_*: the type byte that opens every section-level item."""

    EOF = 0x00
    SECTION_START = 0x01
    SECTION_PART = 0x02
    SECTION_END = 0x03
    SECTION_FULL = 0x04
    SUBSECTION = 0x05
    VMDESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    SECTION_FOOTER = 0x7E


HEADER = Struct("magic" / Const(QEMU_VM_FILE_MAGIC, Int32ub), "version" / Int32ub)

_SECTION_HEADER = (
    "section_id" / Int32ub,
    "idstr" / Idstr,
    "instance_id" / Int32ub,
    "version_id" / Int32ub,
)
SECTION_START = Codec(SectionStart, item(QemuVm.SECTION_START, *_SECTION_HEADER))
SECTION_FULL = Codec(SectionFull, item(QemuVm.SECTION_FULL, *_SECTION_HEADER))
SECTION_PART = Codec(SectionPart, item(QemuVm.SECTION_PART, "section_id" / Int32ub))
SECTION_END = Codec(SectionEnd, item(QemuVm.SECTION_END, "section_id" / Int32ub))
FOOTER = Codec(SectionFooter, item(QemuVm.SECTION_FOOTER, "section_id" / Int32ub))
EOF = Codec(Eof, item(QemuVm.EOF))
VMDESCRIPTION = Codec(
    VmDescription, item(QemuVm.VMDESCRIPTION, "text" / Prefixed(Int32ub, GreedyBytes))
)

SECTION_NAME_AT = 5
"""where the length byte of a START's or FULL's name stands"""
SECTION_AFTER_NAME = 8
"""bytes of a START's or FULL's header behind its name"""
SECTION_ID_SIZE = 5
"""bytes of a PART, END or footer"""
VMDESCRIPTION_TEXT_AT = 5
"""where the JSON starts"""

_HEADER = Codec(StreamHeader, HEADER)


def encode_header(message: StreamHeader) -> bytes:
    """The file header; ValueError for any version but 3."""
    if message.version != QEMU_VM_FILE_VERSION:
        raise ValueError(
            f"{message.NAME}: version is {message.version!r}; {QEMU_VM_FILE_VERSION} is spoken"
        )
    return _HEADER.encode(message)


def decode_header(data: memoryview) -> StreamHeader:
    """The file header in 8 bytes; RemoteProtocolError for another magic or version."""
    magic = int.from_bytes(data[:4], "big")
    if magic != QEMU_VM_FILE_MAGIC:
        raise malformed(
            f"magic {magic:#010x}; {QEMU_VM_FILE_MAGIC:#010x} opens a migration stream",
            StreamHeader.NAME,
        )
    message = _HEADER.decode(data)
    if message.version == QEMU_VM_FILE_VERSION_COMPAT:
        raise RemoteProtocolError(
            "version 2 of the stream format is obsolete: QEMU itself refuses it",
            kind=ErrorKind.UNSUPPORTED,
            message=StreamHeader.NAME,
        )
    if message.version != QEMU_VM_FILE_VERSION:
        raise RemoteProtocolError(
            f"stream version {message.version}; {QEMU_VM_FILE_VERSION} is spoken",
            kind=ErrorKind.MISMATCH,
            message=StreamHeader.NAME,
        )
    return message


def encode_device_state(message: DeviceState) -> bytes:
    """Device sections travel as they are; ValueError when there is no byte of them."""
    if not message.data:
        raise ValueError(f"{message.NAME}: no bytes; a device section has at least 20")
    return bytes(message.data)
