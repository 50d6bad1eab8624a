"""The errors a caller can meet.

Two families. `ProtocolError` is about bytes and messages: a peer broke the rules
(`RemoteProtocolError`), or the caller asked a connection for something that the protocol
forbids at that point (`LocalProtocolError`). `UserfaultError` is about the kernel.

A peer's bytes never raise anything but `RemoteProtocolError`. Every instance says on which
channel, at which byte of the stream, in which state and about which message it was raised, as
fields for programs and in its text for people.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any


class Channel(StrEnum):
    """The byte streams of one migration."""

    FORWARD = "forward"
    """source -> destination, the main stream"""
    RETURN = "return"
    """destination -> source, the return path on the same connection"""
    PREEMPT = "preempt"
    """source -> destination, a second connection that carries requested pages only"""
    PACKAGE = "package"
    """the content of one MIG_CMD_PACKAGED; offsets count from its first byte"""
    FILE = "file"
    """a save file; offsets count from its first byte"""


class ErrorKind(StrEnum):
    """What sort of rule was broken; stable names, used by the shared test vectors."""

    MALFORMED = "malformed"
    """bytes of which no message can consist: bad magic, length, terminator, marker"""
    UNKNOWN = "unknown"
    """a number that is in no table: section type, command, message type, flag, block name"""
    STATE = "state"
    """a known message at a point where the state table has no place for it"""
    LIMIT = "limit"
    """a length or count beyond the documented limit"""
    RANGE = "range"
    """an offset or length outside its RAMBlock, or not aligned to its page"""
    MISMATCH = "mismatch"
    """two values that must be equal are not: sizes, names, totals, versions"""
    TRUNCATED = "truncated"
    """the stream ended inside a record, or before the end that its state calls for"""
    UNSUPPORTED = "unsupported"
    """well formed, but a feature that is refused by name"""
    REMOTE = "remote"
    """the peer said that it failed: SHUT with a non-zero status"""
    TIMEOUT = "timeout"
    """the peer stayed silent for longer than the stated time"""


class PostcopyError(Exception):
    """Base of everything this package raises on purpose."""


class ProtocolError(PostcopyError):
    """A rule of the protocol was broken.

    `reason` is the plain sentence; `channel`, `offset` (bytes from the start of that channel's
    stream), `state` (a name from `states`) and `message` (QEMU's name of the message) are None
    where they do not apply. `str()` joins them into one line.
    """

    def __init__(
        self,
        reason: str,
        *,
        kind: ErrorKind = ErrorKind.MALFORMED,
        channel: Channel | None = None,
        offset: int | None = None,
        state: str | None = None,
        message: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind = kind
        self.channel = channel
        self.offset = offset
        self.state = state
        self.message = message

    def __str__(self) -> str:
        where = []
        if self.channel is not None:
            where.append(f"{self.channel} channel")
        if self.offset is not None:
            where.append(f"offset {self.offset:#x}")
        if self.state is not None:
            where.append(f"state {self.state}")
        if self.message is not None:
            where.append(self.message)
        return f"{', '.join(where)}: {self.reason}" if where else self.reason


class LocalProtocolError(ProtocolError):
    """The caller asked for something that the protocol forbids here; nothing was sent."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the rules; the connection cannot go on."""


class UserfaultError(PostcopyError, OSError):
    """A userfaultfd operation failed.

    `operation` is the ioctl or call by its kernel name; `advice` says what to do about it, or is
    empty. The usual `errno` and `strerror` of OSError are set.
    """

    def __init__(
        self, operation: str, errno: int, strerror: str, detail: str = "", advice: str = ""
    ) -> None:
        OSError.__init__(self, errno, strerror)
        self.operation = operation
        self.detail = detail
        self.advice = advice

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles: with every field, those of derived classes too."""
        arguments = (self.operation, self.errno, self.strerror, self.detail, self.advice)
        return type(self), arguments, self.__dict__

    def __str__(self) -> str:
        text = f"{self.operation}: {self.strerror}"
        if self.detail:
            text += f" ({self.detail})"
        if self.advice:
            text += f"; {self.advice}"
        return text


class HostUnsupportedError(PostcopyError):
    """This host can't do what was asked; `reasons` says why and what to do about each."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles."""
        return type(self), (self.reasons,), self.__dict__
