"""Commands: section-level items of the forward channel with a length of their own.

QEMU: migration/savevm.c `enum qemu_vm_cmd`, `mig_cmd_args`, `qemu_savevm_command_send`,
`loadvm_process_command`. All integers big-endian; a command has no footer.

    0    1  0x08, QEMU_VM_COMMAND
    1    2  cmd
    3    2  len
    5    len  payload

    cmd                     len      payload                                        function
    1  OPEN_RETURN_PATH     0                                qemu_savevm_send_open_return_path
    2  PING                 4        u32 value                          qemu_savevm_send_ping
    3  POSTCOPY_ADVISE      0 or 16  u64 page size summary,  qemu_savevm_send_postcopy_advise
                                     u64 target page size
    4  POSTCOPY_LISTEN      0                                qemu_savevm_send_postcopy_listen
    5  POSTCOPY_RUN         0                                   qemu_savevm_send_postcopy_run
    6  POSTCOPY_RAM_DISCARD 3+n+16k  see discard.py     qemu_savevm_send_postcopy_ram_discard
    7  PACKAGED             4        u32 length; that many bytes       qemu_savevm_send_packaged
                                     follow outside len
    8  ENABLE_COLO          0                                     qemu_savevm_send_colo_enable
    9  POSTCOPY_RESUME      0                                qemu_savevm_send_postcopy_resume
    10 RECV_BITMAP          1+n      u8 n, n bytes of idstr      qemu_savevm_send_recv_bitmap
    11 SWITCHOVER_START     0        since 10.0             qemu_savevm_send_switchover_start
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from construct import Bytes, Int16ub, Int32ub, Int64ub, Struct, Terminated, this

from postcopy_proto.errors import ErrorKind, RemoteProtocolError
from postcopy_proto.messages import (
    EnableColo,
    Message,
    OpenReturnPath,
    Packaged,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRamDiscard,
    PostcopyResume,
    PostcopyRun,
    RecvBitmap,
    SwitchoverStart,
    UnknownCommand,
)
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.wire.discard import decode_discard, encode_discard
from postcopy_proto.wire.fields import Codec, Idstr, item, malformed
from postcopy_proto.wire.stream import QemuVm


class MigCmd(IntEnum):
    """MIG_CMD_*: the number of a command."""

    INVALID = 0
    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11


COMMAND = item(
    QemuVm.COMMAND, "cmd" / Int16ub, "len" / Int16ub, "payload" / Bytes(this.len), Terminated
)
"""The envelope."""

ENVELOPE_SIZE = 5
"""bytes of the envelope before the payload"""

MAX_PAYLOAD = 0xFFFF
"""bytes of a payload that `len` can count"""

PACKAGED_LENGTH = Struct("length" / Int32ub, Terminated)
"""The payload of PACKAGED: how many bytes follow the command."""

_EMPTY = Struct(Terminated)
_ADVISE = Codec(
    PostcopyAdvise,
    Struct("page_size_summary" / Int64ub, "target_page_size" / Int64ub, Terminated),
)
_CODECS: dict[int, Codec[Any]] = {
    MigCmd.OPEN_RETURN_PATH: Codec(OpenReturnPath, _EMPTY),
    MigCmd.PING: Codec(Ping, Struct("value" / Int32ub, Terminated)),
    MigCmd.POSTCOPY_LISTEN: Codec(PostcopyListen, _EMPTY),
    MigCmd.POSTCOPY_RUN: Codec(PostcopyRun, _EMPTY),
    MigCmd.ENABLE_COLO: Codec(EnableColo, _EMPTY),
    MigCmd.POSTCOPY_RESUME: Codec(PostcopyResume, _EMPTY),
    MigCmd.RECV_BITMAP: Codec(RecvBitmap, Struct("block" / Idstr, Terminated)),
    MigCmd.SWITCHOVER_START: Codec(SwitchoverStart, _EMPTY),
}
_COMMAND_OF = {codec.message: MigCmd(cmd) for cmd, codec in _CODECS.items()}

_KNOWN = frozenset(MigCmd)

MIG_CMD_ARGS: Mapping[int, tuple[int, ...]] = {
    MigCmd.OPEN_RETURN_PATH: (0,),
    MigCmd.PING: (4,),
    MigCmd.POSTCOPY_ADVISE: (0, 16),
    MigCmd.POSTCOPY_LISTEN: (0,),
    MigCmd.POSTCOPY_RUN: (0,),
    MigCmd.PACKAGED: (4,),
    MigCmd.ENABLE_COLO: (0,),
    MigCmd.POSTCOPY_RESUME: (0,),
    MigCmd.SWITCHOVER_START: (0,),
}
"""The lengths that a command's payload may have; commands of variable length are not listed."""


def envelope(cmd: int, payload: bytes) -> bytes:
    """A whole command; ValueError when cmd or the payload's length does not fit 16 bits."""
    if not 0 <= cmd <= 0xFFFF:
        raise ValueError(f"command {cmd}; 0 to 0xffff fits")
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"command {cmd} with {len(payload)} bytes; {MAX_PAYLOAD} fit")
    encoded: bytes = COMMAND.build({"cmd": cmd, "len": len(payload), "payload": payload})
    return encoded


def encode_simple(message: Message) -> bytes:
    """A command whose payload is its fields, or nothing."""
    cmd = _COMMAND_OF[type(message)]
    return envelope(cmd, _CODECS[cmd].encode(message))


def encode_advise(message: PostcopyAdvise) -> bytes:
    """POSTCOPY_ADVISE; both fields or neither, ValueError otherwise."""
    if (message.page_size_summary is None) != (message.target_page_size is None):
        raise ValueError(f"{message.NAME}: {message!r} has one of two fields; both or neither")
    payload = b"" if message.page_size_summary is None else _ADVISE.encode(message)
    return envelope(MigCmd.POSTCOPY_ADVISE, payload)


def encode_ram_discard(message: PostcopyRamDiscard) -> bytes:
    """POSTCOPY_RAM_DISCARD; ValueError as `discard.encode_discard`."""
    return envelope(MigCmd.POSTCOPY_RAM_DISCARD, encode_discard(message))


def encode_packaged(message: Packaged) -> bytes:
    """PACKAGED and the package; ValueError when its length does not fit 32 bits."""
    length = len(message.payload)
    if length >> 32:
        raise ValueError(f"{message.NAME}: package of {length} bytes; {0xFFFFFFFF} fit")
    head = envelope(MigCmd.PACKAGED, PACKAGED_LENGTH.build({"length": length}))
    return head + bytes(message.payload)


def encode_unknown(message: UnknownCommand) -> bytes:
    """A command that is in no table; ValueError for a number that is."""
    if message.command in _KNOWN:
        raise ValueError(
            f"{message.NAME}: command {message.command} is {MigCmd(message.command).name}"
        )
    return envelope(message.command, message.payload)


def check_command(cmd: int, length: int, *, strict: bool) -> None:
    """Refuse a command by its envelope alone, as `loadvm_process_command` does.

    Unknown numbers pass unless `strict`; INVALID never does.
    """
    if cmd == MigCmd.INVALID or (strict and cmd not in _KNOWN):
        raise RemoteProtocolError(
            f"MIG_CMD {cmd:#x} is unknown; 1 to {max(MigCmd).value} are in the table",
            kind=ErrorKind.UNKNOWN,
            message="COMMAND",
        )
    allowed = MIG_CMD_ARGS.get(cmd)
    if allowed is not None and length not in allowed:
        raise malformed(
            f"{length} bytes of payload; {' or '.join(map(str, allowed))} are expected",
            MigCmd(cmd).name,
        )


def decode_command(
    cmd: int,
    payload: memoryview,
    *,
    offset: int | None = None,
    blocks: Mapping[str, RAMBlock] | None = None,
) -> Message:
    """The message in one command that passed `check_command`, PACKAGED excepted.

    `offset` is the stream offset of the payload; `blocks`, if known, bound the ranges of a discard.
    """
    if cmd == MigCmd.POSTCOPY_RAM_DISCARD:
        return decode_discard(payload, offset=offset, blocks=blocks)
    if cmd == MigCmd.POSTCOPY_ADVISE:
        return _ADVISE.decode(payload) if payload else PostcopyAdvise()
    codec = _CODECS.get(cmd)
    if codec is None:
        return UnknownCommand(cmd, bytes(payload))
    message: Message = codec.decode(payload)
    return message
