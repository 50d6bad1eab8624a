"""CONFIGURATION: what both ends must agree on, directly behind the file header.

QEMU: migration/savevm.c `vmstate_configuration`, `configuration_post_load`; subsections by
migration/vmstate.c `vmstate_subsection_save`, `vmstate_subsection_load`. All integers big-endian.

    0    1  0x07, QEMU_VM_CONFIGURATION
    1    4  len
    5    len  name: the machine's class name without "-machine"; no terminator
    then at most one each of these subsections, in this order:

    0    1  0x05, QEMU_VM_SUBSECTION
    1    1  n
    2    n  name
    2+n  4  version_id, 1
    6+n  .  body

    name                             body
    configuration/target-page-bits   u32 bits; absent on x86
    configuration/capabilities       u32 count, count times: u8 n, n bytes of name
    configuration/uuid               16 bytes in textual order

There is no length and no footer: the record ends where the next byte is not 0x05. QEMU takes the
subsections in any order; it writes them in this one, and only that is accepted here.
"""

from __future__ import annotations

from construct import (
    Bytes,
    Const,
    Construct,
    GreedyBytes,
    Int8ub,
    Int32ub,
    Prefixed,
    PrefixedArray,
    Struct,
    Terminated,
)

from postcopy_proto.errors import ErrorKind, RemoteProtocolError
from postcopy_proto.messages import Configuration
from postcopy_proto.wire.buffer import ReceiveBuffer
from postcopy_proto.wire.fields import Idstr, item, malformed
from postcopy_proto.wire.limits import Limits
from postcopy_proto.wire.stream import QemuVm

SUBSECTION_VERSION = 1
UUID_SIZE = 16


def _subsection(name: bytes, body: Construct) -> Construct:
    return Struct(
        "type" / Const(QemuVm.SUBSECTION, Int8ub),
        "name" / Const(name, Prefixed(Int8ub, GreedyBytes)),
        "version_id" / Const(SUBSECTION_VERSION, Int32ub),
        "body" / body,
        Terminated,
    )


TARGET_PAGE_BITS = b"configuration/target-page-bits"
CAPABILITIES = b"configuration/capabilities"
UUID = b"configuration/uuid"

SUBSECTIONS = {
    TARGET_PAGE_BITS: _subsection(TARGET_PAGE_BITS, Int32ub),
    CAPABILITIES: _subsection(CAPABILITIES, PrefixedArray(Int32ub, Idstr)),
    UUID: _subsection(UUID, Bytes(UUID_SIZE)),
}
"""The schemas, in the order in which QEMU declares and writes them."""

CONFIGURATION = item(QemuVm.CONFIGURATION, "name" / Prefixed(Int32ub, GreedyBytes), Terminated)
"""The record without its subsections."""

_NAME_AT = 5  # bytes before the machine's name
_LONGEST_SUBSECTION_NAME = max(len(name) for name in SUBSECTIONS)


def encode_configuration(message: Configuration) -> bytes:
    """The record; ValueError for a value that does not fit."""
    bits, uuid = message.target_page_bits, message.uuid
    if bits is not None and not 0 <= bits < 1 << 32:
        raise ValueError(f"{message.NAME}: target_page_bits is {bits}; 0 to 0xffffffff fits")
    if uuid is not None and len(uuid) != UUID_SIZE:
        raise ValueError(f"{message.NAME}: uuid of {len(uuid)} bytes; {UUID_SIZE} are needed")
    encoded: bytes = CONFIGURATION.build(
        {"name": message.machine.encode("utf-8", "surrogateescape")}
    )
    bodies = (bits, message.capabilities, uuid)
    for schema, body in zip(SUBSECTIONS.values(), bodies, strict=True):
        if body is not None:
            encoded += schema.build({"body": body})
    return encoded


def read_configuration(buffer: ReceiveBuffer, limits: Limits) -> Configuration:
    """Take the record at the read position.

    NeedMoreError until it is whole and the byte behind it, or the end of the stream, is known.
    """
    if buffer.peek(1)[0] != QemuVm.CONFIGURATION:
        raise malformed(
            f"byte {buffer.peek(1)[0]:#04x} behind the file header; "
            f"{QemuVm.CONFIGURATION.value:#04x} opens the configuration",
            Configuration.NAME,
        )
    length = int.from_bytes(buffer.peek(_NAME_AT)[1:], "big")
    if length > limits.idstr:
        raise _over_limit(f"machine name of {length} bytes; the limit is {limits.idstr}")
    size = _NAME_AT + length
    remaining = list(SUBSECTIONS)
    extents = {}
    while not buffer.ends_after(size) and buffer.peek(size + 1)[size] == QemuVm.SUBSECTION:
        name = _subsection_name(buffer, size, remaining)
        del remaining[: remaining.index(name) + 1]
        extents[name] = slice(size, size + _subsection_size(buffer, size, name, limits))
        size = extents[name].stop
    record = buffer.peek(size)
    machine: bytes = CONFIGURATION.parse(record[: _NAME_AT + length]).name
    bodies = {name: SUBSECTIONS[name].parse(record[at]).body for name, at in extents.items()}
    buffer.skip(size)
    return Configuration(
        machine=machine.decode("utf-8", "surrogateescape"),
        target_page_bits=bodies.get(TARGET_PAGE_BITS),
        capabilities=tuple(bodies[CAPABILITIES]) if CAPABILITIES in bodies else None,
        uuid=bodies.get(UUID),
    )


def _subsection_name(buffer: ReceiveBuffer, start: int, expected: list[bytes]) -> bytes:
    length = buffer.peek(start + 2)[start + 1]
    if length > _LONGEST_SUBSECTION_NAME:
        raise _unknown(f"subsection name of {length} bytes", expected)
    name = bytes(buffer.peek(start + 2 + length)[start + 2 :])
    if name not in expected:
        raise _unknown(f"subsection {name!r}", expected)
    return name


def _subsection_size(buffer: ReceiveBuffer, start: int, name: bytes, limits: Limits) -> int:
    """Bytes of the subsection at `start`, once they have arrived; its version_id is checked."""
    body = 2 + len(name) + 4
    version = int.from_bytes(buffer.peek(start + body)[start + body - 4 :], "big")
    if version != SUBSECTION_VERSION:
        raise RemoteProtocolError(
            f"{name.decode()} has version {version}; {SUBSECTION_VERSION} is known",
            kind=ErrorKind.MISMATCH,
            message=Configuration.NAME,
        )
    if name == UUID:
        return body + UUID_SIZE
    number = int.from_bytes(buffer.peek(start + body + 4)[start + body :], "big")
    size = body + 4
    if name == TARGET_PAGE_BITS:
        return size
    if number > limits.capabilities:
        raise _over_limit(f"{number} capabilities; the limit is {limits.capabilities}")
    for _ in range(number):
        size += 1 + buffer.peek(start + size + 1)[start + size]
    return size


def _over_limit(reason: str) -> RemoteProtocolError:
    return RemoteProtocolError(reason, kind=ErrorKind.LIMIT, message=Configuration.NAME)


def _unknown(what: str, expected: list[bytes]) -> RemoteProtocolError:
    names = ", ".join(name.decode() for name in expected) or "no subsection"
    return RemoteProtocolError(
        f"{what}; {names} may stand here, and what is unknown has no length to skip it by",
        kind=ErrorKind.UNKNOWN,
        message=Configuration.NAME,
    )
