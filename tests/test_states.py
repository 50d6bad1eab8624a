"""The tables are total: each pair of state and message is in them or is refused, by both ends."""

from __future__ import annotations

import pytest

from postcopy_proto import messages as m
from postcopy_proto.states import (
    FORWARD,
    PLACED_ONCE,
    RETURN_PATH,
    RETURN_PATH_TRIGGERS,
    ForwardState,
    ReturnPathState,
    expected,
    next_forward_state,
    next_return_path_state,
)

F, R = ForwardState, ReturnPathState


def reachable(table: dict, start: object) -> set:
    seen, todo = set(), [start]
    while todo:
        state = todo.pop()
        if state not in seen:
            seen.add(state)
            todo += table[state].values()
    return seen


def walk(*messages: m.Message) -> ForwardState:
    state = F.HEADER
    for message in messages:
        after = next_forward_state(state, message)
        assert after is not None, f"{message.NAME} in {state}"
        state = after
    return state


# What each state has a place for, written out by hand: in QEMU's names, and without looking at the
# code's tables. `name>STATE` leads to another state; all others stay.
SECTION = "SECTION_PART SECTION_END SECTION_FOOTER EOS"
ENCODED = "XBZRLE COMPRESS_PAGE MULTIFD_FLUSH"
ALLOWED = {
    F.HEADER: "QEMU_VM_FILE_MAGIC>CONFIGURATION",
    F.CONFIGURATION: "CONFIGURATION>NONE",
    F.NONE: "OPEN_RETURN_PATH PING UNKNOWN_COMMAND POSTCOPY_ADVISE>ADVISE SECTION_START>PRECOPY",
    F.PRECOPY: f"{SECTION} MEM_SIZE PAGE {ENCODED} OPEN_RETURN_PATH PING SWITCHOVER_START "
    "UNKNOWN_COMMAND DEVICE_STATE>DEVICE EOF>PRECOPY_END",
    F.ADVISE: f"SECTION_START {SECTION} MEM_SIZE PAGE {ENCODED} OPEN_RETURN_PATH PING "
    "SWITCHOVER_START UNKNOWN_COMMAND POSTCOPY_RAM_DISCARD>DISCARD PACKAGED>PACKAGE "
    "DEVICE_STATE>DEVICE EOF>PRECOPY_END",
    F.DISCARD: f"{SECTION} PAGE {ENCODED} PING SWITCHOVER_START UNKNOWN_COMMAND "
    "POSTCOPY_RAM_DISCARD PACKAGED>PACKAGE",
    F.PACKAGE: "POSTCOPY_LISTEN>LISTENING",
    F.LISTENING: "DEVICE_STATE PING POSTCOPY_RUN>RUNNING",
    F.RUNNING: f"{SECTION} PAGE COMPRESS_PAGE PING UNKNOWN_COMMAND EOF>END",
    F.END: "",
    F.DEVICE: "EOF>PRECOPY_END",
    F.PRECOPY_END: "VMDESCRIPTION",
    R.CLOSED: "OPEN_RETURN_PATH>OPEN",
    R.OPEN: "PONG SWITCHOVER_ACK UNKNOWN_RP_MSG POSTCOPY_LISTEN>FAULTS SHUT>SHUT",
    R.FAULTS: "PONG UNKNOWN_RP_MSG REQ_PAGES_ID>NAMED SHUT>SHUT",
    R.NAMED: "REQ_PAGES_ID REQ_PAGES PONG UNKNOWN_RP_MSG SHUT>SHUT",
    R.SHUT: "",
}


@pytest.mark.parametrize("state", [*F, *R], ids=lambda state: f"{type(state).__name__}.{state}")
def test_each_state_allows_these_messages_and_no_others(state: ForwardState | ReturnPathState):
    table = FORWARD if isinstance(state, ForwardState) else RETURN_PATH
    # Two messages are called RECV_BITMAP, one in each direction; neither is in a table so far.
    written = dict(entry.partition(">")[::2] for entry in ALLOWED[state].split())
    assert {message.NAME: str(after) for message, after in table[state].items()} == {
        name: after or str(state) for name, after in written.items()
    }


def test_a_states_name_is_what_errors_call_it() -> None:
    assert [str(state) for state in F] == [state.name for state in F]
    assert [str(state) for state in R] == [state.name for state in R]


OPENING = (m.StreamHeader(), m.Configuration("pc"), m.OpenReturnPath(), m.Ping(1))
SETUP = (m.SectionStart(2, "ram", 0, 4), m.RamBlockList(()), m.RamEos(), m.SectionFooter(2))
PACKAGE = (m.Packaged(b""), m.PostcopyListen(), m.DeviceState(b"x"), m.Ping(3), m.PostcopyRun())


def test_every_state_is_in_a_table_and_can_be_reached() -> None:
    assert set(FORWARD) == set(F)
    assert set(RETURN_PATH) == set(R)
    assert reachable(FORWARD, F.HEADER) == set(F)
    assert reachable(RETURN_PATH, R.CLOSED) == set(R)


def test_a_migration_with_a_switchover() -> None:
    state = walk(
        *OPENING,
        m.PostcopyAdvise(4096, 4096),
        *SETUP,
        m.PostcopyRamDiscard("a", ()),
        m.Ping(2),
        *PACKAGE,
        m.Ping(4),
        m.SectionPart(2),
        m.RamEos(),
        m.SectionFooter(2),
        m.SectionEnd(2),
        m.RamEos(),
        m.SectionFooter(2),
        m.Eof(),
    )
    assert state is F.END


@pytest.mark.parametrize("advised", [True, False])
def test_a_migration_that_never_switches(advised: bool) -> None:
    advise = (m.PostcopyAdvise(4096, 4096),) if advised else ()
    end = (m.SwitchoverStart(), m.DeviceState(b"x"), m.Eof(), m.VmDescription(b"{}"))
    assert walk(*OPENING, *advise, *SETUP, *end) is F.PRECOPY_END


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (F.NONE, m.PostcopyRamDiscard("a", ())),  # before ADVISE
        (F.PRECOPY, m.PostcopyAdvise(4096, 4096)),  # the block list is already read
        (F.PRECOPY, m.Packaged(b"")),
        (F.ADVISE, m.PostcopyListen()),  # outside a package
        (F.ADVISE, m.PostcopyAdvise(4096, 4096)),  # twice
        (F.DISCARD, m.PostcopyListen()),
        (F.DISCARD, m.Eof()),
        (F.PACKAGE, m.PostcopyRun()),  # LISTEN comes first
        (F.PACKAGE, m.Ping(1)),
        (F.LISTENING, m.PostcopyRamDiscard("a", ())),  # a discard after LISTEN
        (F.LISTENING, m.Packaged(b"")),
        (F.RUNNING, m.PostcopyRamDiscard("a", ())),
        (F.RUNNING, m.DeviceState(b"")),
        (F.RUNNING, m.PostcopyRun()),
        (F.END, m.SectionPart(2)),
        (F.END, m.VmDescription(b"{}")),
    ],
    ids=lambda value: getattr(value, "NAME", str(value)),
)
def test_refused(state: ForwardState, message: m.Message) -> None:
    assert next_forward_state(state, message) is None


def test_requests_need_listen_and_a_short_one_needs_a_name() -> None:
    assert next_return_path_state(R.OPEN, m.ReqPagesId(0, 4096, "a")) is None
    assert next_return_path_state(R.OPEN, m.PostcopyListen()) is R.FAULTS
    assert next_return_path_state(R.FAULTS, m.ReqPages(0, 4096)) is None
    assert next_return_path_state(R.FAULTS, m.ReqPagesId(0, 4096, "a")) is R.NAMED
    assert next_return_path_state(R.NAMED, m.ReqPages(0, 4096)) is R.NAMED


def test_nothing_follows_shut() -> None:
    assert RETURN_PATH[R.SHUT] == {}
    assert expected(RETURN_PATH[R.SHUT]) == "nothing"


def test_forward_and_return_messages_do_not_mix() -> None:
    returning = {message for state in RETURN_PATH.values() for message in state}
    forward = {message for state in FORWARD.values() for message in state}
    assert returning & forward == RETURN_PATH_TRIGGERS


def test_pages_are_placed_once_from_listen_on() -> None:
    assert reachable(FORWARD, F.LISTENING) == PLACED_ONCE


def test_expectations_are_in_qemus_names() -> None:
    assert expected(FORWARD[F.PACKAGE]) == "POSTCOPY_LISTEN"
    assert expected(FORWARD[F.LISTENING]) == "DEVICE_STATE, PING, POSTCOPY_RUN"
