"""Every transition of both roles, as tables.

Rule 1: nothing outside this module decides a transition. A connection looks a message up here
before it sends it or hands it to its caller.

Rule 2: this module does not know which end we are. Both ends walk the same two tables: the
source when it sends a forward message, the destination when it receives one, and the other way
round on the return path. What one end may send is by construction what the other accepts.

Theory of operation
===================

The forward channel has one state. It follows QEMU's PostcopyState (NONE, ADVISE, DISCARD,
LISTENING, RUNNING, END; migration/postcopy-ram.h) and has a few states more, where the stream
itself forbids things that QEMU leaves to chance:

* HEADER and CONFIGURATION: before anything else come the magic and the machine's name.
* NONE: commands that open the migration. ADVISE must come before RAM's START section, since the
  block list gains a field by it; without it, START leads to PRECOPY, from where postcopy can't
  be reached any more.
* ADVISE: postcopy may follow, or may not. RAM comes as precopy.
* DISCARD: at least one discard has been seen.
* PACKAGE: inside MIG_CMD_PACKAGED, before its first item. LISTEN is found nowhere else, for in
  the main stream it would let two readers race for one socket.
* LISTENING: device state is loaded while faults are already served. The package ends in RUN.
* RUNNING: nothing but RAM, pings and the end. A page that arrives here is placed, once.
* END: after EOF. The destination answers with SHUT.
* DEVICE, PRECOPY_END: the ending of a migration that never switched: device state in the main
  stream, EOF, and the description of it.

The return path has a state of its own, because its messages lag behind the forward channel's by
a network's length: CLOSED until OPEN_RETURN_PATH, OPEN until LISTEN, from then on FAULTS, where
pages may be asked for; NAMED once a request has carried a block's name, so that a short request
has a block to refer to; SHUT after the last message.

Recovery after a broken connection starts a new walk and will bring states of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeAlias

from postcopy_proto import messages as m


class ForwardState(StrEnum):
    """Where the forward channel stands."""

    HEADER = "HEADER"
    CONFIGURATION = "CONFIGURATION"
    NONE = "NONE"
    PRECOPY = "PRECOPY"
    ADVISE = "ADVISE"
    DISCARD = "DISCARD"
    PACKAGE = "PACKAGE"
    LISTENING = "LISTENING"
    RUNNING = "RUNNING"
    END = "END"
    DEVICE = "DEVICE"
    PRECOPY_END = "PRECOPY_END"


class ReturnPathState(StrEnum):
    """Where the return path stands."""

    CLOSED = "CLOSED"
    OPEN = "OPEN"
    FAULTS = "FAULTS"
    NAMED = "NAMED"
    SHUT = "SHUT"


MessageType: TypeAlias = type[m.Message]
F = ForwardState
R = ReturnPathState

_SECTIONS: tuple[MessageType, ...] = (m.SectionPart, m.SectionEnd, m.SectionFooter, m.RamEos)
_PRECOPY_RAM: tuple[MessageType, ...] = (
    *_SECTIONS,
    m.Pages,
    m.XbzrlePage,
    m.CompressedPage,
    m.MultifdFlush,
)


def _stay(state: F, *types: MessageType) -> dict[MessageType, F]:
    return dict.fromkeys(types, state)


FORWARD: Mapping[ForwardState, Mapping[MessageType, ForwardState]] = {
    F.HEADER: {m.StreamHeader: F.CONFIGURATION},
    F.CONFIGURATION: {m.Configuration: F.NONE},
    F.NONE: {
        **_stay(F.NONE, m.OpenReturnPath, m.Ping, m.UnknownCommand),
        m.PostcopyAdvise: F.ADVISE,
        m.SectionStart: F.PRECOPY,
    },
    F.PRECOPY: {
        **_stay(F.PRECOPY, *_PRECOPY_RAM, m.RamBlockList),
        **_stay(F.PRECOPY, m.OpenReturnPath, m.Ping, m.SwitchoverStart, m.UnknownCommand),
        m.DeviceState: F.DEVICE,
        m.Eof: F.PRECOPY_END,
    },
    F.ADVISE: {
        **_stay(F.ADVISE, *_PRECOPY_RAM, m.SectionStart, m.RamBlockList),
        **_stay(F.ADVISE, m.OpenReturnPath, m.Ping, m.SwitchoverStart, m.UnknownCommand),
        m.PostcopyRamDiscard: F.DISCARD,
        m.Packaged: F.PACKAGE,
        m.DeviceState: F.DEVICE,
        m.Eof: F.PRECOPY_END,
    },
    F.DISCARD: {
        **_stay(F.DISCARD, *_PRECOPY_RAM, m.PostcopyRamDiscard),
        **_stay(F.DISCARD, m.Ping, m.SwitchoverStart, m.UnknownCommand),
        m.Packaged: F.PACKAGE,
    },
    F.PACKAGE: {m.PostcopyListen: F.LISTENING},
    F.LISTENING: {
        **_stay(F.LISTENING, m.DeviceState, m.Ping),
        m.PostcopyRun: F.RUNNING,
    },
    F.RUNNING: {
        **_stay(F.RUNNING, *_SECTIONS, m.Pages, m.CompressedPage, m.Ping, m.UnknownCommand),
        m.Eof: F.END,
    },
    F.END: {},
    F.DEVICE: {m.Eof: F.PRECOPY_END},
    F.PRECOPY_END: {m.VmDescription: F.PRECOPY_END},
}
"""state -> message -> next state, for messages of the forward channel and of a package's content"""

RETURN_PATH: Mapping[ReturnPathState, Mapping[MessageType, ReturnPathState]] = {
    R.CLOSED: {m.OpenReturnPath: R.OPEN},
    R.OPEN: {
        m.PostcopyListen: R.FAULTS,
        m.Pong: R.OPEN,
        m.SwitchoverAck: R.OPEN,
        m.UnknownReturnPathMessage: R.OPEN,
        m.Shut: R.SHUT,
    },
    R.FAULTS: {
        m.ReqPagesId: R.NAMED,
        m.Pong: R.FAULTS,
        m.UnknownReturnPathMessage: R.FAULTS,
        m.Shut: R.SHUT,
    },
    R.NAMED: {
        m.ReqPagesId: R.NAMED,
        m.ReqPages: R.NAMED,
        m.Pong: R.NAMED,
        m.UnknownReturnPathMessage: R.NAMED,
        m.Shut: R.SHUT,
    },
    R.SHUT: {},
}
"""state -> message -> next state; OPEN_RETURN_PATH and LISTEN are the forward channel's messages
that open the return path and let requests into it"""

RETURN_PATH_TRIGGERS: frozenset[MessageType] = frozenset({m.OpenReturnPath, m.PostcopyListen})
"""messages of the forward channel that move the return path too, where its state has them"""

PLACED_ONCE = frozenset({F.LISTENING, F.RUNNING, F.END})
"""states in which a page, once placed, belongs to the guest and may never be placed again"""


def next_forward_state(state: ForwardState, message: m.Message) -> ForwardState | None:
    """The state after `message`, or None when `state` has no place for it."""
    return FORWARD[state].get(type(message))


def next_return_path_state(state: ReturnPathState, message: m.Message) -> ReturnPathState | None:
    """The return path's state after `message`, or None when `state` has no place for it."""
    return RETURN_PATH[state].get(type(message))


def expected(table: Mapping[MessageType, object]) -> str:
    """What a state allows, for error messages: QEMU's names, joined."""
    names = sorted({message.NAME for message in table})
    return ", ".join(names) if names else "nothing"
