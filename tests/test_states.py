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
