"""Device sections by their description: stock QEMU's, hand-made ones, and hostile ones."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy_proto import messages as m
from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.savefile.description import split_device_state
from postcopy_proto.wire import ForwardDecoder

DATA = Path(__file__).parents[1] / "data"
RTC = {"name": "rtc", "instance_id": 7, "vmsd_name": "mc146818rtc", "version": 3}


def section(body: bytes, name: bytes = b"rtc", instance: int = 7, section_id: int = 5) -> bytes:
    head = b"\x04" + section_id.to_bytes(4, "big") + bytes([len(name)]) + name
    head += instance.to_bytes(4, "big") + (3).to_bytes(4, "big")
    return head + body + b"\x7e" + section_id.to_bytes(4, "big")


def description(*devices: Any) -> bytes:
    return json.dumps({"page_size": 4096, "devices": devices}).encode()


def field(size: int, **more: Any) -> dict[str, Any]:
    return {"name": "x", "type": "buffer", "size": size, **more}


@pytest.mark.parametrize(
    "path",
    [
        DATA / "captures" / "7.2-precopy-only-forward.bin.xz",
        DATA / "releases" / "11.1-precopy-forward.bin.xz",
    ],
    ids=lambda path: path.name,
)
def test_what_stock_qemu_describes(path):
    decoder = ForwardDecoder()
    decoder.receive_data(lzma.decompress(path.read_bytes()))
    events = [event for event in decoder if not isinstance(event, m.Pages)]
    [state] = [event.data for event in events if isinstance(event, m.DeviceState)]
    [text] = [event.text for event in events if isinstance(event, m.VmDescription)]
    sections = split_device_state(state, text)
    assert len(sections) == len(json.loads(text)["devices"]) == 31
    assert sum(found.length for found in sections) == len(state)
    assert len({found.section_id for found in sections}) == 31
    assert {"timer", "fw_cfg", "globalstate", "cpu", "apic"} <= {s.idstr for s in sections}


@pytest.mark.parametrize(
    ("body", "device"),
    [
        (b"", {}),
        (b"abc", {"fields": [field(3)]}),
        (b"abcdef", {"fields": [field(2, array_len=3)]}),
        (b"abcd", {"fields": [field(2, index=0), field(2, index=1)]}),
        (b"abcde", {"fields": [field(5, struct={"fields": [field(5)]})]}),
        (b"old", {"size": 3}),
        (b"old", {"size": 3, "fields": [field(3)]}),
        (
            b"a\x05\x05rtc/s\x00\x00\x00\x01bc",
            {
                "fields": [field(1)],
                "subsections": [{"vmsd_name": "rtc/s", "version": 1, "fields": [field(2)]}],
            },
        ),
        (
            b"\x05\x05rtc/s\x00\x00\x00\x01\x05\x07rtc/s/t\x00\x00\x00\x01z",
            {
                "subsections": [
                    {
                        "vmsd_name": "rtc/s",
                        "subsections": [{"vmsd_name": "rtc/s/t", "fields": [field(1)]}],
                    }
                ]
            },
        ),
    ],
)
def test_lengths(body, device):
    second = section(b"2", name=b"kbd", instance=0, section_id=9)
    kbd = {"name": "kbd", "instance_id": 0, "fields": [field(1)]}
    first = section(body)
    one, two = split_device_state(first + second, description(RTC | device, kbd))
    assert (one.idstr, one.instance_id, one.version_id, one.section_id) == ("rtc", 7, 3, 5)
    assert (one.offset, one.length) == (0, len(first))
    assert (two.idstr, two.offset, two.length) == ("kbd", len(first), len(second))


@pytest.mark.parametrize(
    ("state", "device", "offset"),
    [
        (section(b"abc"), {"fields": [field(4)]}, 0),  # longer than all there is
        (section(b"abc") + b"\x7e", {"fields": [field(4)]}, 25),  # no footer there
        (section(b"abc"), {"fields": [field(2)]}, 23),
        (section(b"abc")[:-1] + b"\x06", {"fields": [field(3)]}, 24),  # another footer's id
        (b"\x01" + section(b"abc")[1:], {"fields": [field(3)]}, 0),
        (section(b"abc", name=b"rtd"), {"fields": [field(3)]}, 0),
        (section(b"abc", instance=8), {"fields": [field(3)]}, 0),
        (section(b"abc") + b"more", {"fields": [field(3)]}, 29),
        (section(b""), {"size": 1 << 80}, 0),
        (section(b""), {"fields": [field(1 << 40, array_len=1 << 40)]}, 0),
    ],
)
def test_state_that_is_not_as_described(state, device, offset):
    with pytest.raises(RemoteProtocolError) as caught:
        split_device_state(state, description(RTC | device), offset=0x1000)
    assert (caught.value.kind, caught.value.channel) == (ErrorKind.MISMATCH, Channel.FILE)
    assert caught.value.offset is not None
    assert 0x1000 <= caught.value.offset <= 0x1000 + len(state)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"devices": 1}',
        b'{"devices": [1]}',
        b'{"devices": [{}]}',
        b'{"devices": [{"name": 1}]}',
        b"[" * 100_000,
        description({"name": "rtc"}),
        description(RTC | {"instance_id": -1}),
        description(RTC | {"size": True}),
        description(RTC | {"size": "3"}),
        description(RTC | {"fields": {}}),
        description(RTC | {"fields": [{}]}),
        description(RTC | {"fields": [field(-1)]}),
        description(RTC | {"fields": [field(1, array_len=1.5)]}),
        description(RTC | {"subsections": [{"fields": []}]}),
    ],
)
def test_descriptions_that_are_none(text):
    with pytest.raises(RemoteProtocolError) as caught:
        split_device_state(section(b"abc"), text)
    assert caught.value.kind is ErrorKind.MALFORMED


def test_no_devices():
    assert split_device_state(b"", b"{}") == []
    with pytest.raises(RemoteProtocolError, match="behind the last"):
        split_device_state(b"\x04", b"{}")


def test_nested_deeper_than_python_recurses():
    device: dict[str, Any] = {"vmsd_name": "rtc", "fields": []}
    for _ in range(400):
        device = {"vmsd_name": "rtc", "subsections": [device]}
    body = b"\x05\x03rtc\x00\x00\x00\x01" * 400
    [found] = split_device_state(section(body), description(RTC | device))
    assert found.length == len(section(body))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["devices", "name", "fields", "subsections", "size", "array_len"]),
            inner,
        )
    ),
    max_leaves=20,
)


@given(st.binary(max_size=60), JSON)
def test_any_state_and_any_json(state, document):
    try:
        sections = split_device_state(state, json.dumps({"devices": document}).encode())
    except RemoteProtocolError:
        return
    assert sum(found.length for found in sections) == len(state)
