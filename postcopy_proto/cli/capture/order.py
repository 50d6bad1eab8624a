"""The order of messages, by the state tables: what `postcopy decode --strict` refuses beside."""

from __future__ import annotations

from typing import Protocol

from postcopy_proto import messages as m
from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.states import FORWARD, ForwardState, expected, next_forward_state
from postcopy_proto.wire import parse_package


class Consumer(Protocol):
    """What events are given to."""

    def add(self, offset: int, message: m.Message) -> None:
        """Take an event that begins at `offset` of its channel."""


class InOrder:
    """Passes events of a forward channel on as long as each has a place in the state before it.

    A recovery has no header, and its states began on another connection: it is not looked at.
    """

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._state: ForwardState | None = None

    def add(self, offset: int, message: m.Message) -> None:
        """Check one event, then pass it on. RemoteProtocolError when it is out of order."""
        if isinstance(message, m.StreamHeader):
            self._state = ForwardState.HEADER
        if self._state is not None and not isinstance(message, m.EndOfStream):
            self._follow(offset, message)
        self._consumer.add(offset, message)

    def _follow(self, offset: int, message: m.Message) -> None:
        assert self._state is not None
        after = next_forward_state(self._state, message)
        if after is None:
            raise RemoteProtocolError(
                f"not allowed here; expected one of: {expected(FORWARD[self._state])}",
                kind=ErrorKind.STATE,
                channel=Channel.FORWARD,
                offset=offset,
                state=str(self._state),
                message=message.NAME,
            )
        self._state = after
        if isinstance(message, m.Packaged):
            for item in parse_package(message.payload):
                self._follow(offset, item)
