"""Device sections in the main stream: taken as they are, up to the stream's recognisable tail.

A SECTION_FULL has no length (QEMU: migration/vmstate.c `vmstate_save_state` writes fields only), so
from the first one on a stream can't be read item by item. Its end can be recognised, because a
precopy stream or save file closes with (migration/savevm.c
`qemu_savevm_state_complete_precopy_non_iterable`):

    0x7e u32 section_id     the last section's footer
    0x00                    EOF
    0x06 u32 length, JSON   VMDESCRIPTION: an object with "devices" among its keys

Where the sender writes no description, the stream ends with footer and EOF. A live source keeps
the connection open after the description, so its last byte must be enough to know.
"""

from __future__ import annotations

import json
import re

from postcopy_proto.errors import ErrorKind, RemoteProtocolError
from postcopy_proto.messages import DeviceState, Eof, Message, VmDescription
from postcopy_proto.wire.stream import SECTION_ID_SIZE, VMDESCRIPTION_TEXT_AT, QemuVm

_FOOTER_AND_EOF = SECTION_ID_SIZE + 1
_TAIL_HEAD = _FOOTER_AND_EOF + VMDESCRIPTION_TEXT_AT

_TAIL = re.compile(
    b"%c....%c%c(....)\\{" % (QemuVm.SECTION_FOOTER, QemuVm.EOF, QemuVm.VMDESCRIPTION), re.DOTALL
)
"""footer, EOF, the description's head and the brace that opens its text"""

_TAIL_BROKEN_OFF = re.compile(
    b"%c....%c%c.{0,4}\\Z" % (QemuVm.SECTION_FOOTER, QemuVm.EOF, QemuVm.VMDESCRIPTION), re.DOTALL
)
"""the same where a stream ended before the text"""


class DeviceStateReader:
    """Collects bytes from the first SECTION_FULL on, and finds where they end.

    Every byte is looked at a bounded number of times: JSON holds no control characters, so a
    description that was begun is given up at the first NUL behind its head, and the text of one
    candidate never overlaps the next one's.
    """

    def __init__(self, offset: int, limit: int, description_limit: int) -> None:
        self._data = bytearray()
        self._offset = offset  # in the stream, for errors
        self._limit = limit
        self._description_limit = description_limit
        self._searched = 0  # no tail begins before this
        self._checked = 0  # no NUL in the candidate's text before this; 0 without a candidate
        self._tail = -1  # where the recognised tail begins

    def add(self, piece: memoryview) -> int:
        """Take bytes of the stream up to the tail's last one; returns how many were taken.

        RemoteProtocolError (LIMIT) when there are more bytes than a device state may have.
        """
        before = len(self._data)
        self._data += piece
        end = self._find_end()
        longest = self._limit
        if end is None:
            sections = len(self._data)
            longest += _TAIL_HEAD + self._description_limit
        else:
            del self._data[end:]
            sections = self._tail + SECTION_ID_SIZE
        if sections > longest:
            raise RemoteProtocolError(
                f"more than {self._limit} bytes of device sections without an end",
                kind=ErrorKind.LIMIT,
                offset=self._offset,
                message=DeviceState.NAME,
            )
        return len(self._data) - before

    @property
    def complete(self) -> bool:
        """Whether the tail was recognised."""
        return self._tail >= 0

    @property
    def in_description(self) -> bool:
        """Whether what was taken last looks like the inside of a description."""
        end = bytes(self._data[-_TAIL_HEAD:])
        return self._checked > 0 or _TAIL_BROKEN_OFF.search(end) is not None

    def messages(self) -> list[tuple[int, Message]]:
        """The parts of a complete stream, each with its offset from the first byte taken."""
        eof_at = self._tail + SECTION_ID_SIZE
        text = bytes(self._data[self._tail + _TAIL_HEAD :])
        return [*self._sections(eof_at), (eof_at + 1, VmDescription(text))]

    def messages_at_end(self) -> list[tuple[int, Message]]:
        """The parts of a stream that ended without a description; none if it broke off."""
        data = self._data
        if len(data) <= _FOOTER_AND_EOF or self.in_description:
            return []
        if data[-1] != QemuVm.EOF or data[-_FOOTER_AND_EOF] != QemuVm.SECTION_FOOTER:
            return []
        return self._sections(len(data) - 1)

    def _sections(self, eof_at: int) -> list[tuple[int, Message]]:
        return [(0, DeviceState(bytes(self._data[:eof_at]))), (eof_at, Eof())]

    def _find_end(self) -> int | None:
        """Where the stream ends, if its tail has arrived whole."""
        data = self._data
        while match := _TAIL.search(data, self._searched):
            start, text_at = match.start(), match.end() - 1
            length = int.from_bytes(match[1], "big")
            end = text_at + length
            if length <= self._description_limit and not self._has_nul(text_at, end):
                if end > len(data):
                    self._searched, self._checked = start, len(data)
                    return None
                if _is_description(data[text_at:end]):
                    self._tail = start
                    return end
            self._searched, self._checked = start + 1, 0
        self._searched = max(self._searched, len(data) - _TAIL_HEAD)
        return None

    def _has_nul(self, start: int, end: int) -> bool:
        return self._data.find(0, max(start, self._checked), end) >= 0


def _is_description(text: bytearray) -> bool:
    try:
        description = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(description, dict) and "devices" in description
