"""Real migrations: every capture decodes whole, however it is cut, and encodes to itself."""

from __future__ import annotations

import json
import lzma
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from postcopy_proto import messages as m
from postcopy_proto.messages import EndOfStream
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.wire import (
    ForwardDecoder,
    PreemptDecoder,
    ReturnPathDecoder,
    encode,
    parse_package,
)
from postcopy_proto.wire.decoder import Decoder
from postcopy_proto.wire.pages import join_pages
from tests.wire.helpers import events, every_byte, join, random_cuts

CAPTURES = Path(__file__).parent.parent / "data" / "captures"
NAMES = sorted(path.name.removesuffix(".bin.xz") for path in CAPTURES.glob("*.bin.xz"))
PREFIX = 30_000
"""bytes fed one by one"""


@cache
def load(name: str) -> bytes:
    return lzma.decompress((CAPTURES / f"{name}.bin.xz").read_bytes())


def decoder_of(name: str) -> Decoder:
    if name.endswith("-return"):
        return ReturnPathDecoder()
    if "-conn1-" in name:
        return PreemptDecoder()
    return ForwardDecoder(header=None)


def whole(name: str) -> list[m.Message]:
    data = load(name)
    return events(decoder_of(name), [data] if data else [])


def test_there_are_captures() -> None:
    assert {name.split("-")[0] for name in NAMES} >= {"7.2"}
    assert len(NAMES) >= 24


@pytest.mark.parametrize("name", NAMES)
def test_decodes_whole_and_encodes_to_itself(name: str) -> None:
    got = whole(name)
    end = got[-1]
    assert isinstance(end, EndOfStream)
    assert end.offset == len(load(name))
    assert end.clean is not name.endswith("recover-forward"), "cut, to be recovered"
    assert join(*got[:-1]) == load(name)


@pytest.mark.parametrize("name", NAMES)
def test_any_cut_gives_the_same_events(name: str) -> None:
    data = load(name)
    expected = join_pages(whole(name))
    for seed in range(2):
        assert join_pages(events(decoder_of(name), random_cuts(data, seed, 60_000))) == expected


@pytest.mark.parametrize("name", NAMES)
def test_byte_by_byte(name: str) -> None:
    prefix = load(name)[:PREFIX]
    expected = join_pages(events(decoder_of(name), [prefix] if prefix else []))
    assert join_pages(events(decoder_of(name), every_byte(prefix))) == expected


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("-forward")])
def test_packages(name: str) -> None:
    for event in whole(name):
        if isinstance(event, m.Packaged):
            items = parse_package(event.payload)
            later = [m.Ping(0x42)] if name.startswith("11.") else []
            assert isinstance(items[1], m.DeviceState)
            assert items == [m.PostcopyListen(), items[1], m.Ping(3), *later, m.PostcopyRun()]
            assert join(*items) == event.payload


COMMANDS = {
    "7.2-immediate-forward": {
        "OPEN_RETURN_PATH": 1, "PING": 3, "POSTCOPY_ADVISE": 1, "POSTCOPY_RAM_DISCARD": 6,
        "PACKAGED": 1,
    },
    "7.2-recover-resumed-forward": {"RECV_BITMAP": 6, "POSTCOPY_RESUME": 1},
    "7.2-precopy-only-forward": {"DEVICE_STATE": 1, "EOF": 1, "VMDESCRIPTION": 1},
    "7.2-recover-resumed-return": {
        "RECV_BITMAP": 6, "RESUME_ACK": 1, "REQ_PAGES_ID": 1, "REQ_PAGES": 21, "SHUT": 1,
    },
    "7.2-immediate-return": {"PONG": 4, "REQ_PAGES_ID": 1, "REQ_PAGES": 16, "SHUT": 1},
    "7.2-preempt-conn1-forward": {"PAGE": 3, "EOS": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_in_them(name: str) -> None:
    counts = Counter(event.NAME for event in whole(name))
    assert {key: counts[key] for key in COMMANDS[name]} == COMMANDS[name]


def test_every_page_of_a_postcopy_comes_once_after_the_discards() -> None:
    """immediate: what the discards name, and only that, is sent behind the package, once."""
    discarded: set[tuple[str, int]] = set()
    after: Counter[tuple[str, int]] = Counter()
    behind = False
    for event in whole("7.2-immediate-forward"):
        if isinstance(event, m.PostcopyRamDiscard):
            discarded |= {
                (event.block, page)
                for byte_range in event.ranges
                for page in range(byte_range.start, byte_range.end, 4096)
            }
        elif isinstance(event, m.Packaged):
            behind = True
        elif isinstance(event, m.Pages) and behind:
            after.update((event.block, int(offset)) for offset in event.offsets)
    assert set(after) == discarded
    assert set(after.values()) == {1}


def test_the_hugepage_block_says_its_page_size() -> None:
    decoder = ForwardDecoder()
    decoder.receive_data(load("7.2-hugepage-forward"))
    list(decoder)
    assert decoder.blocks["m0"] == RAMBlock("m0", 32 << 20, 2 << 20)
    assert {block.page_size for name, block in decoder.blocks.items() if name != "m0"} == {4096}


def test_both_channels_of_a_preempt_migration_send_each_page_once() -> None:
    pages: Counter[tuple[str, int]] = Counter()
    behind = False
    for name in ("7.2-preempt-forward", "7.2-preempt-conn1-forward"):
        for event in whole(name):
            behind |= isinstance(event, m.Packaged)
            if isinstance(event, m.Pages) and behind:
                pages.update((event.block, int(offset)) for offset in event.offsets)
    assert set(pages.values()) == {1}


def test_the_description_describes() -> None:
    *_, eof, description, _ = whole("7.2-precopy-only-forward")
    assert eof == m.Eof()
    assert isinstance(description, m.VmDescription)
    assert json.loads(description.text)["page_size"] == 4096


def test_messages_encode_as_they_were_captured() -> None:
    """One by one: each event's bytes stand where the decoder says that it began."""
    for name in NAMES:
        data, decoder = load(name), decoder_of(name)
        decoder.receive_data(data)
        for event in decoder:
            if not isinstance(event, EndOfStream):
                at = decoder.event_offset
                raw = encode(event)
                assert data[at : at + len(raw)] == raw
