"""The package: read from both ends, opaque in the middle."""

from __future__ import annotations

import pytest

from postcopy_proto import messages as m
from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.ramblock import ByteRange
from postcopy_proto.wire import Limits, encode, parse_package
from tests.wire.helpers import P, h, join

LISTEN, RUN = m.PostcopyListen(), m.PostcopyRun()
DEVICES = (
    encode(m.SectionFull(0, "timer", 0, 2))
    + bytes(range(40))
    + encode(m.SectionFooter(0))
    + encode(m.SectionFull(5, "globalstate", 0, 1))
    + encode(m.SectionFooter(5))
)
STATE = m.DeviceState(DEVICES)
MALFORMED, UNKNOWN, STATE_ERROR = ErrorKind.MALFORMED, ErrorKind.UNKNOWN, ErrorKind.STATE

GOOD: list[list[m.Message]] = [
    [LISTEN, STATE, m.Ping(3), RUN],
    [LISTEN, STATE, m.Ping(3), m.Ping(0x42), RUN],
    [LISTEN, STATE, *(m.Ping(i) for i in range(9)), RUN],
    [LISTEN, STATE, RUN],
    [LISTEN, RUN],
    [LISTEN, m.Ping(3), RUN],
    [LISTEN, m.Ping(3), m.Ping(0x42), RUN],
    [LISTEN, m.Ping(1), m.Ping(2), STATE, m.Ping(3), RUN],
    [LISTEN, m.DeviceState(encode(m.SectionFull(0, "t", 0, 2)) + encode(m.SectionFooter(0))), RUN],
]


@pytest.mark.parametrize("messages", GOOD, ids=lambda messages: "-".join(x.NAME for x in messages))
def test_a_package(messages: list[m.Message]) -> None:
    payload = join(*messages)
    for data in (payload, bytearray(payload), memoryview(payload)):
        assert parse_package(data) == messages
    assert join(*parse_package(payload)) == payload


def test_what_looks_like_pings_inside_device_state_stays_there() -> None:
    devices = m.DeviceState(
        encode(m.SectionFull(0, "timer", 0, 2))
        + join(m.Ping(3), RUN, m.Ping(3))
        + encode(m.SectionFooter(0x08000200))
    )
    messages: list[m.Message] = [LISTEN, devices, m.Ping(7), RUN]
    assert parse_package(join(*messages)) == messages


FULL = encode(m.SectionFull(0, "timer", 0, 2))
FOOTER = encode(m.SectionFooter(0))

REFUSED = [
    (b"", MALFORMED, 0, "a package opens with this command", "POSTCOPY_LISTEN"),
    (join(RUN), MALFORMED, 0, "a package opens with this command", "POSTCOPY_LISTEN"),
    (join(LISTEN), MALFORMED, 0, "a package ends with this command", "POSTCOPY_RUN"),
    (join(LISTEN) + b"\x08\0\5\0", MALFORMED, 4, "a package ends with", "POSTCOPY_RUN"),
    (join(LISTEN, STATE, m.Ping(3)), MALFORMED, None, "a package ends with", "POSTCOPY_RUN"),
    (join(LISTEN, STATE, RUN) + b"\0", MALFORMED, None, "a package ends with", "POSTCOPY_RUN"),
    (join(LISTEN, LISTEN, STATE, RUN), STATE_ERROR, 5, "no place inside", "POSTCOPY_LISTEN"),
    (join(LISTEN, RUN, STATE, RUN), STATE_ERROR, 5, "no place inside", "POSTCOPY_RUN"),
    (join(LISTEN, m.PostcopyAdvise(P, P), RUN), STATE_ERROR, 5, "no place", "POSTCOPY_ADVISE"),
    (join(LISTEN, m.PostcopyAdvise(), RUN), STATE_ERROR, 5, "no place", "POSTCOPY_ADVISE"),
    (
        join(LISTEN, m.PostcopyRamDiscard("b", (ByteRange(0, P),)), STATE, RUN),
        STATE_ERROR,
        5,
        "this command has no place inside a package",
        "POSTCOPY_RAM_DISCARD",
    ),
    (join(LISTEN, m.RecvBitmap("b"), RUN), STATE_ERROR, 5, "no place", "RECV_BITMAP"),
    (join(LISTEN, m.Packaged(b""), RUN), STATE_ERROR, 5, "no place", "PACKAGED"),
    (join(LISTEN, m.OpenReturnPath(), RUN), STATE_ERROR, 5, "no place", "OPEN_RETURN_PATH"),
    (join(LISTEN, m.Ping(1), m.EnableColo(), RUN), STATE_ERROR, 14, "no place", "ENABLE_COLO"),
    (join(LISTEN) + h("08 000c 0000") + join(RUN), UNKNOWN, 5, "MIG_CMD 0xc", "COMMAND"),
    (join(LISTEN) + h("08 0002 0003") + join(RUN), MALFORMED, 5, "3 bytes", "PING"),
    (join(LISTEN) + h("08 0002 0004 000000") + join(RUN), MALFORMED, 5, "cuts off", "PING"),
    (join(LISTEN) + h("08 0002 00") + join(RUN), MALFORMED, 5, "cuts off", None),
    (
        join(LISTEN) + b"\0" + DEVICES + join(RUN),
        UNKNOWN,
        5,
        "byte 0x00 where a device section should begin",
        "DEVICE_STATE",
    ),
    (
        join(LISTEN, m.SectionPart(1), RUN),
        UNKNOWN,
        5,
        "byte 0x02 where a device section should begin",
        "DEVICE_STATE",
    ),
    (join(LISTEN) + b"\x04" + join(RUN), MALFORMED, 5, "cuts off", "DEVICE_STATE"),
    (join(LISTEN) + FULL + join(RUN), MALFORMED, 5, "cuts off", "DEVICE_STATE"),
    (join(LISTEN) + FULL + FOOTER[:-1] + join(RUN), MALFORMED, 5, "cuts off", "DEVICE_STATE"),
    (
        join(LISTEN) + FULL + bytes(10) + join(m.Ping(3), RUN),
        MALFORMED,
        5 + len(FULL) + 5,
        "byte 0x00 where the last device section's footer should begin",
        "DEVICE_STATE",
    ),
    (
        join(LISTEN, STATE, m.PostcopyAdvise(P, P), m.Ping(3), RUN),
        MALFORMED,
        5 + len(DEVICES) + 16,
        "footer should begin",
        "DEVICE_STATE",
    ),
    (
        join(LISTEN, STATE, m.Packaged(b""), RUN),
        MALFORMED,
        5 + len(DEVICES) + 4,
        "byte 0x04 where the last device section's footer should begin",
        "DEVICE_STATE",
    ),
    (join(LISTEN) + h("04 00000000 00") + bytes(20) + join(RUN), MALFORMED, 5, "0 bytes", None),
    (
        join(LISTEN) + h("04 00000000 02 6100") + bytes(8) + FOOTER + join(RUN),
        MALFORMED,
        5,
        "a NUL in the name",
        None,
    ),
]


@pytest.mark.parametrize(("payload", "kind", "at", "text", "message"), REFUSED, ids=str)
def test_refused(
    payload: bytes, kind: ErrorKind, at: int | None, text: str, message: str | None
) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        parse_package(payload)
    error = caught.value
    assert (error.kind, error.message, error.channel) == (kind, message, Channel.PACKAGE)
    assert error.offset == (len(payload) - 5 if at is None else at)
    assert text in error.reason


def test_names_have_a_limit() -> None:
    payload = join(LISTEN, STATE, RUN)
    assert parse_package(payload, limits=Limits(idstr=5))
    with pytest.raises(RemoteProtocolError, match="a name of 5 bytes; the limit is 4"):
        parse_package(payload, limits=Limits(idstr=4))
