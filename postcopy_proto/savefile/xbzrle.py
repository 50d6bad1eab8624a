"""XBZRLE: a page as what changed since it was sent before.

QEMU: migration/xbzrle.c `xbzrle_decode_buffer`. The encoding is a sequence of

    zrun    bytes that stay as they are; 0 only at the start
    nzrun   bytes that follow here and replace what is there; never 0
    nzrun bytes

each run's length in one byte below 0x80, or in two: low 7 bits with 0x80 set, then the high ones.
"""

from __future__ import annotations

from postcopy_proto.errors import ErrorKind, RemoteProtocolError
from postcopy_proto.messages import XbzrlePage


def apply(encoded: bytes, page: bytearray) -> None:
    """Change `page` as `encoded` says; RemoteProtocolError when it makes no sense."""
    position = at = 0
    while position < len(encoded):
        first = position == 0
        skip, position = _run_length(encoded, position)
        if skip == 0 and not first:
            raise _wrong("a run of 0 unchanged bytes")
        at += skip
        count, position = _run_length(encoded, position)
        if count == 0:
            raise _wrong("a run of 0 changed bytes")
        end = position + count
        if end > len(encoded) or at + count > len(page):
            raise _wrong(f"a run of {count} bytes at {at:#x} goes beyond the page or the record")
        page[at : at + count] = encoded[position:end]
        at, position = at + count, end


def _run_length(encoded: bytes, position: int) -> tuple[int, int]:
    """A run's length, and where it ends."""
    if position >= len(encoded):
        raise _wrong("ends before a run's length")
    low = encoded[position]
    if low < 0x80:
        return low, position + 1
    if position + 1 >= len(encoded):
        raise _wrong("ends inside a run's length")
    high = encoded[position + 1]
    if high >= 0x80:
        raise _wrong("a run's length of more than two bytes")
    return low & 0x7F | high << 7, position + 2


def _wrong(reason: str) -> RemoteProtocolError:
    return RemoteProtocolError(reason, kind=ErrorKind.MALFORMED, message=XbzrlePage.NAME)
