"""The content of one PACKAGED: LISTEN, device sections, PINGs, RUN.

QEMU: migration/migration.c `postcopy_start` fills it, migration/savevm.c
`loadvm_handle_cmd_packaged` loads it. The layouts stand in commands.py and stream.py.

    POSTCOPY_LISTEN      first
    PING                 any number; no QEMU so far puts one here
    SECTION_FULL .. 0x7e device sections with their footers; opaque, may be missing
    PING                 any number: value 3, since 10.2 also 0x42
    POSTCOPY_RUN         last

Device sections have no length, so the package is read from both ends. That is unambiguous: a
section ends with 0x7e and four bytes, where a PING has 0x04 in that place.

ADVISE, RAM_DISCARD, RECV_BITMAP and PACKAGED don't work in a package, since QEMU reads their
payload from the main stream; all commands but the three above are refused where they can be seen.
"""

from __future__ import annotations

from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.messages import DeviceState, Message, Ping, PostcopyListen, PostcopyRun
from postcopy_proto.wire import stream
from postcopy_proto.wire.commands import (
    ENVELOPE_SIZE,
    MigCmd,
    check_command,
    decode_command,
    encode_simple,
)
from postcopy_proto.wire.fields import checked_idstr, malformed
from postcopy_proto.wire.limits import Limits
from postcopy_proto.wire.stream import QemuVm

_LISTEN = encode_simple(PostcopyListen())
_RUN = encode_simple(PostcopyRun())
_PING_HEAD = encode_simple(Ping(0))[:ENVELOPE_SIZE]
_PING_SIZE = ENVELOPE_SIZE + 4


def parse_package(
    payload: bytes | bytearray | memoryview, *, limits: Limits | None = None
) -> list[Message]:
    """The items of a package in order; their encodings joined are `payload` again.

    RemoteProtocolError, with channel PACKAGE and an offset in the payload, for any other content.
    """
    view = memoryview(payload).cast("B")
    try:
        return _parse(view, limits or Limits())
    except RemoteProtocolError as error:
        error.channel = Channel.PACKAGE
        if error.offset is None:
            error.offset = 0
        raise


def _parse(view: memoryview, limits: Limits) -> list[Message]:
    if view[: len(_LISTEN)] != _LISTEN:
        raise malformed("a package opens with this command", PostcopyListen.NAME)
    end = len(view) - len(_RUN)
    if end < len(_LISTEN) or view[end:] != _RUN:
        raise _at(max(end, 0), malformed("a package ends with this command", PostcopyRun.NAME))

    start = len(_LISTEN)
    opening: list[Message] = []
    while start < end and view[start] == QemuVm.COMMAND:
        opening.append(_ping(view[:end], start))
        start += _PING_SIZE
    closing: list[Message] = []
    while end - start >= _PING_SIZE and view[end - _PING_SIZE :][:ENVELOPE_SIZE] == _PING_HEAD:
        end -= _PING_SIZE
        closing.insert(0, _ping(view, end))

    devices: list[Message] = []
    if start < end:
        _check_devices(view[:end], start, limits)
        devices.append(DeviceState(bytes(view[start:end])))
    return [PostcopyListen(), *opening, *devices, *closing, PostcopyRun()]


def _ping(view: memoryview, start: int) -> Message:
    """The PING at `start`; any other command is refused."""
    head = view[start : start + ENVELOPE_SIZE]
    if len(head) < ENVELOPE_SIZE:
        raise _at(start, malformed("a command that the package cuts off"))
    cmd, length = int.from_bytes(head[1:3], "big"), int.from_bytes(head[3:], "big")
    try:
        check_command(cmd, length, strict=True)
    except RemoteProtocolError as error:
        raise _at(start, error) from None
    if cmd != MigCmd.PING:
        raise _at(
            start,
            RemoteProtocolError(
                "this command has no place inside a package",
                kind=ErrorKind.STATE,
                message=MigCmd(cmd).name,
            ),
        )
    payload = view[start + ENVELOPE_SIZE : start + _PING_SIZE]
    if len(payload) < length:
        raise _at(start, malformed("a command that the package cuts off", Ping.NAME))
    return decode_command(cmd, payload)


def _check_devices(view: memoryview, start: int, limits: Limits) -> None:
    """What stands between the commands must open like a device section and end with a footer."""
    if view[start] != QemuVm.SECTION_FULL:
        raise _at(
            start,
            RemoteProtocolError(
                f"byte {view[start]:#04x} where a device section should begin",
                kind=ErrorKind.UNKNOWN,
                message=DeviceState.NAME,
            ),
        )
    name_at = start + stream.SECTION_NAME_AT
    name_size = view[name_at] if name_at < len(view) else 0
    body = name_at + 1 + name_size + stream.SECTION_AFTER_NAME
    footer = len(view) - stream.SECTION_ID_SIZE
    if body > footer:
        raise _at(start, malformed("a device section that the package cuts off", DeviceState.NAME))
    try:
        checked_idstr(view[name_at + 1 : name_at + 1 + name_size], limits.idstr)
    except RemoteProtocolError as error:
        raise _at(start, error) from None
    if view[footer] != QemuVm.SECTION_FOOTER:
        raise _at(
            footer,
            malformed(
                f"byte {view[footer]:#04x} where the last device section's footer should begin",
                DeviceState.NAME,
            ),
        )


def _at(offset: int, error: RemoteProtocolError) -> RemoteProtocolError:
    error.offset = offset
    return error
