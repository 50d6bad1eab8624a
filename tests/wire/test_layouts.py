"""Every message against bytes written down by hand, both ways; and what can't be encoded."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest
from construct import Construct, ConstructError

from postcopy_proto import messages as m
from postcopy_proto import wire
from postcopy_proto.ramblock import ByteRange
from postcopy_proto.wire import PreemptDecoder, ReturnPathDecoder, encode
from postcopy_proto.wire.commands import COMMAND
from postcopy_proto.wire.configuration import CONFIGURATION
from postcopy_proto.wire.encode import _ENCODERS
from postcopy_proto.wire.return_path import MESSAGE, REQ_PAGES_ID
from tests.wire.helpers import ADVISE, HEADER, P, batch, decode, end_section, forward, h, page

CONFIGURATION_UUID = bytes.fromhex("00112233445566778899aabbccddeeff")

HEAD = [
    (m.StreamHeader(), h("5145564d 00000003")),
    (m.Configuration("pc"), h("07 00000002 7063")),
]

CONFIGURATIONS = [
    (m.Configuration(""), h("07 00000000")),
    (m.Configuration("caf\udce9"), h("07 00000004 636166e9")),
    (
        m.Configuration("pc", uuid=CONFIGURATION_UUID),
        h("07 00000002 7063 05 12")
        + b"configuration/uuid"
        + h("00000001 00112233445566778899aabbccddeeff"),
    ),
    (
        m.Configuration("virt", 12, ("x-ignore-shared", "a"), CONFIGURATION_UUID),
        h("07 00000004 76697274 05 1e")
        + b"configuration/target-page-bits"
        + h("00000001 0000000c 05 1a")
        + b"configuration/capabilities"
        + h("00000001 00000002 0f")
        + b"x-ignore-shared"
        + h("01 61 05 12")
        + b"configuration/uuid"
        + h("00000001 00112233445566778899aabbccddeeff"),
    ),
    (
        m.Configuration("pc", capabilities=()),
        h("07 00000002 7063 05 1a") + b"configuration/capabilities" + h("00000001 00000000"),
    ),
]

SCHEMAS = [
    (COMMAND, h("08 0002 0004 00000042")),
    (MESSAGE, h("0002 0004 00000042")),
    (REQ_PAGES_ID, h("0000000000001000 00001000 01 62")),
    (CONFIGURATION, h("07 00000002 7063")),
]


@pytest.mark.parametrize(("schema", "data"), SCHEMAS, ids=lambda value: str(value)[:12])
def test_schemas_take_neither_more_nor_less(schema: Construct, data: bytes) -> None:
    schema.parse(data)
    for wrong in (data + b"\0", data[:-1]):
        with pytest.raises(ConstructError):
            schema.parse(wrong)


def test_public_names_are_there() -> None:
    assert all(hasattr(wire, name) for name in wire.__all__)


def test_the_longest_discard() -> None:
    """As many ranges as the envelope's 16 bits can count the bytes of."""
    message = m.PostcopyRamDiscard("b", tuple(ByteRange(i * P, P) for i in range(4095)))
    data = encode(message)
    assert COMMAND.parse(data).len == 4 + 4095 * 16
    assert decode(forward(), HEADER + ADVISE + data + b"\0")[3] == message
    with pytest.raises(ValueError, match="4095 fit"):
        encode(m.PostcopyRamDiscard("b", (*message.ranges, ByteRange(0, P))))


ITEMS = [
    (m.OpenReturnPath(), h("08 0001 0000")),
    (m.Ping(0x42), h("08 0002 0004 00000042")),
    (m.PostcopyAdvise(), h("08 0003 0000")),
    (m.PostcopyAdvise(0x201000, P), h("08 0003 0010 0000000000201000 0000000000001000")),
    (m.PostcopyListen(), h("08 0004 0000")),
    (m.PostcopyRun(), h("08 0005 0000")),
    (
        m.PostcopyRamDiscard("pc.ram", (ByteRange(0, 0x4000000),)),
        h("08 0006 0019 00 06 70632e72616d 00 0000000000000000 0000000004000000"),
    ),
    (
        m.PostcopyRamDiscard("b", (ByteRange(P, P), ByteRange(1 << 40, 2 * P))),
        h("08 0006 0024 00 01 62 00")
        + h("0000000000001000 0000000000001000 0000010000000000 0000000000002000"),
    ),
    (m.Packaged(b""), h("08 0007 0004 00000000")),
    (m.Packaged(b"abc"), h("08 0007 0004 00000003 616263")),
    (m.EnableColo(), h("08 0008 0000")),
    (m.PostcopyResume(), h("08 0009 0000")),
    (m.RecvBitmap("pc.ram"), h("08 000a 0007 06 70632e72616d")),
    (m.SwitchoverStart(), h("08 000b 0000")),
]

RAM = [
    (m.RamEos(), h("0000000000000010")),
    (m.MultifdFlush(), h("0000000000000200")),
    (batch("pc.ram", (5, None)), h("0000000000005002 06 70632e72616d 00")),
    (batch("pc.ram", (5, None), named=False), h("0000000000005022 00")),
    (batch("pc.ram", (6, page(1))), h("0000000000006008 06 70632e72616d") + page(1)),
    (batch("pc.ram", (6, page(1)), named=False), h("0000000000006028") + page(1)),
    (
        batch("pc.ram", (1, None), (9, page(2)), (3, None), (3, page(3))),
        h("0000000000001002 06 70632e72616d 00 0000000000009028")
        + page(2)
        + h("0000000000003022 00 0000000000003028")
        + page(3),
    ),
    (m.XbzrlePage("b", 2 * P, b"xyz"), h("0000000000002040 01 62 01 0003 78797a")),
    (m.XbzrlePage("b", 2 * P, b"", False), h("0000000000002060 01 0000")),
    (m.CompressedPage("b", 2 * P, b"xyz"), h("0000000000002100 01 62 00000003 78797a")),
    (m.CompressedPage("b", 2 * P, b"", False), h("0000000000002120 00000000")),
]

BLOCK_LISTS = [
    (m.RamBlockList(()), h("0000000000000004")),
    (
        m.RamBlockList((m.RamBlockEntry("pc.ram", 0x4000000), m.RamBlockEntry("b", 0x1000))),
        h("0000000004001004 06 70632e72616d 0000000004000000 01 62 0000000000001000"),
    ),
    (
        m.RamBlockList((m.RamBlockEntry("m0", 0x200000, 0x200000), m.RamBlockEntry("b", 0x1000))),
        h("0000000000201004 02 6d30 0000000000200000 0000000000200000 01 62 0000000000001000"),
    ),
    (
        m.RamBlockList((m.RamBlockEntry("b", 0x1000, gpa=1 << 32),)),
        h("0000000000001004 01 62 0000000000001000 0000000100000000"),
    ),
]

RETURN = [
    (m.Shut(), h("0001 0004 00000000")),
    (m.Shut(1), h("0001 0004 00000001")),
    (m.Pong(0x42), h("0002 0004 00000042")),
    (
        m.ReqPagesId(0x3F000, P, "pc.bios"),
        h("0003 0014 000000000003f000 00001000 07 70632e62696f73"),
    ),
    (m.ReqPages(0xF5000, P), h("0004 000c 00000000000f5000 00001000")),
    (
        m.ReceivedBitmap("b", bytes(range(8))),
        h("0005 0002 01 62 0000000000000008 0001020304050607 0123456789abcdef"),
    ),
    (m.ResumeAck(), h("0006 0004 00000001")),
    (m.SwitchoverAck(), h("0007 0000")),
]

ENVELOPE = [
    (m.SectionStart(2, "ram", 0, 4), h("01 00000002 03 72616d 00000000 00000004")),
    (m.SectionPart(2), h("02 00000002")),
    (m.SectionEnd(2), h("03 00000002")),
    (m.SectionFull(0, "timer", 1, 2), h("04 00000000 05 74696d6572 00000001 00000002")),
    (m.SectionFooter(2), h("7e 00000002")),
    (m.Eof(), h("00")),
    (m.VmDescription(b"{}"), h("06 00000002 7b7d")),
    (m.DeviceState(b"abc"), b"abc"),
    (m.UnknownCommand(99, b"ab"), h("08 0063 0002 6162")),
    (m.UnknownReturnPathMessage(99, b"ab"), h("0063 0002 6162")),
]

EVERYTHING = HEAD + CONFIGURATIONS + ITEMS + RAM + BLOCK_LISTS + RETURN + ENVELOPE


def name(value: object) -> str | None:
    return value.NAME if isinstance(value, m.Message) else None


@pytest.mark.parametrize(("message", "data"), EVERYTHING, ids=name)
def test_encode(message: m.Message, data: bytes) -> None:
    encoded = encode(message)
    assert type(encoded) is bytes
    assert encoded == data


def test_every_message_of_the_vocabulary_is_here() -> None:
    vocabulary = {
        cls
        for _, cls in inspect.getmembers(m, inspect.isclass)
        if issubclass(cls, m.Message) and dataclasses.is_dataclass(cls)
    } - {m.EndOfStream}
    assert {type(message) for message, _ in EVERYTHING} == vocabulary == set(_ENCODERS)


@pytest.mark.parametrize(("message", "data"), HEAD[1:] + CONFIGURATIONS, ids=name)
def test_configuration_decodes(message: m.Message, data: bytes) -> None:
    stream = h("5145564d 00000003") + data + b"\0"
    assert decode(forward(target_page_size=P), stream) == [m.StreamHeader(), message, m.Eof()]


@pytest.mark.parametrize(("message", "data"), ITEMS, ids=name)
def test_item_decodes(message: m.Message, data: bytes) -> None:
    expected = [m.StreamHeader(), m.Configuration("pc-i440fx-7.2"), message, m.Eof()]
    assert decode(forward(), HEADER + data + b"\0") == expected


@pytest.mark.parametrize(("message", "data"), RAM, ids=name)
def test_ram_record_decodes(message: m.Message, data: bytes) -> None:
    """Behind a record that names the block, so that those with CONTINUE have one."""
    before = h("0000000000000002 06") + b"pc.ram" + b"\0"
    if not getattr(message, "named", True) and not isinstance(message, m.Pages):
        before = h("0000000000000002 01 62 00")
    eos = [] if isinstance(message, m.RamEos) else [m.RamEos()]
    stream = h("02 00000007") + before + data + h("0000000000000010") * len(eos)
    stream += h("7e 00000007 00")
    got = decode(forward(header=False), stream)
    assert got[0] == m.SectionPart(7)
    assert got[-2:] == [m.SectionFooter(7), m.Eof()]
    block = "pc.ram" if b"pc.ram" in before else "b"
    if isinstance(message, m.Pages) and not message.named:
        joined = batch(block, (0, None), (int(message.offsets[0]) // P, _content(message)))
        assert got[1:-2] == [joined, m.RamEos()]
    else:
        assert got[1:-2] == [batch(block, (0, None)), message, *eos]


def _content(message: m.Pages) -> bytes | None:
    view = message.page(0)
    return None if view is None else bytes(view)


@pytest.mark.parametrize(("message", "data"), BLOCK_LISTS, ids=name)
def test_block_list_decodes(message: m.RamBlockList, data: bytes) -> None:
    entries = message.blocks
    advise = h("08 0003 0010 0000000000201000 0000000000001000")
    shared = any(entry.gpa is not None for entry in entries)
    capabilities = ("x-ignore-shared",) if shared else None
    head = encode(m.StreamHeader()) + encode(m.Configuration("pc", capabilities=capabilities))
    before = head + (b"" if shared else advise)
    stream = before + h("01 00000002 03 72616d 00000000 00000004") + data + end_section() + b"\0"
    got = decode(forward(), stream)
    assert got[-4:] == [message, m.RamEos(), m.SectionFooter(2), m.Eof()]
    assert message.total == sum(entry.used_length for entry in entries)


@pytest.mark.parametrize(("message", "data"), RETURN, ids=name)
def test_return_path_message_decodes(message: m.Message, data: bytes) -> None:
    assert decode(ReturnPathDecoder, data) == [message]
    assert decode(ReturnPathDecoder, data * 3) == [message] * 3


@pytest.mark.parametrize(("message", "data"), [RAM[0], *RAM[2:3], *RAM[4:5], RAM[6]], ids=name)
def test_preempt_record_decodes(message: m.Message, data: bytes) -> None:
    assert decode(PreemptDecoder, data) == [message]


BAD = [
    (m.StreamHeader(2), "version is 2; 3 is spoken"),
    (m.Configuration("pc", target_page_bits=-1), "target_page_bits is -1; 0 to 0xffffffff fits"),
    (m.Configuration("pc", target_page_bits=1 << 32), "target_page_bits is 4294967296"),
    (m.Configuration("pc", uuid=b"x"), "uuid of 1 bytes; 16 are needed"),
    (m.Configuration("pc", capabilities=("",)), "1 to 255 are allowed"),
    (m.SectionStart(1 << 32, "ram", 0, 4), "section_id is 4294967296; 0 to 0xffffffff fits"),
    (m.SectionStart(1, "", 0, 4), "1 to 255 are allowed"),
    (m.SectionStart(1, "r\0m", 0, 4), "NUL"),
    (m.SectionFull(1, "x", -1, 4), "instance_id is -1"),
    (m.SectionFull(0xFFFFFFFF, "x", -1, 4), "instance_id is -1"),
    (m.SectionPart(-1), "SECTION_PART: section_id is -1; 0 to 0xffffffff fits"),
    (m.SectionEnd(1 << 32), "SECTION_END: section_id"),
    (m.SectionFooter(-1), "SECTION_FOOTER: section_id"),
    (m.DeviceState(b""), "DEVICE_STATE: no bytes"),
    (m.Ping(1 << 32), "PING: value is 4294967296; 0 to 0xffffffff fits"),
    (m.Ping(-1), "PING: value is -1"),
    (m.Ping("x"), "PING: value is 'x'"),  # type: ignore[arg-type]
    (m.PostcopyAdvise(P, None), "both or neither"),
    (m.PostcopyAdvise(None, P), "both or neither"),
    (m.PostcopyAdvise(1 << 64, P), "page_size_summary is"),
    (m.PostcopyAdvise(P, 1 << 64), "target_page_size is"),
    (m.PostcopyRamDiscard("b", ()), "without ranges"),
    (m.RecvBitmap("b" * 256), "256 bytes; 1 to 255 are allowed"),
    (m.UnknownCommand(0, b""), "command 0 is INVALID"),
    (m.UnknownCommand(11, b""), "command 11 is SWITCHOVER_START"),
    (m.UnknownCommand(1 << 16, b""), "command 65536; 0 to 0xffff fits"),
    (m.UnknownCommand(-1, b""), "command -1"),
    (m.UnknownCommand(12, bytes(65536)), "65536 bytes; 65535 fit"),
    (m.RamBlockList((m.RamBlockEntry("b", 100),)), "total of 100 bytes"),
    (m.RamBlockList((m.RamBlockEntry("b", 1 << 64),)), "1 to 2^64 - 1 fits"),
    (m.RamBlockList((m.RamBlockEntry("a", 1 << 63), m.RamBlockEntry("b", 1 << 63))), "below 2^64"),
    (m.RamBlockList((m.RamBlockEntry("b", 0),)), "used_length 0; 1 to"),
    (m.RamBlockList((m.RamBlockEntry("b", -P),)), "used_length -4096"),
    (m.RamBlockList((m.RamBlockEntry("b", P),) * 2), "listed twice"),
    (m.RamBlockList((m.RamBlockEntry("", P),)), "1 to 255 are allowed"),
    (m.RamBlockList((m.RamBlockEntry("b", P, P),)), "page_size 4096"),
    (m.RamBlockList((m.RamBlockEntry("b", P, 3 * P),)), "page_size 12288"),
    (m.RamBlockList((m.RamBlockEntry("b", P, 1 << 56),)), "page_size"),
    (m.RamBlockList((m.RamBlockEntry("b", P, gpa=-1),)), "gpa -1"),
    (m.RamBlockList((m.RamBlockEntry("b", P, gpa=1 << 64),)), "gpa"),
    (
        m.RamBlockList((m.RamBlockEntry("a", P, gpa=0), m.RamBlockEntry("b", P))),
        "some blocks have a gpa",
    ),
    (m.XbzrlePage("b", 0, bytes(P + 1)), "4097 bytes; at most a page of 4096"),
    (m.XbzrlePage("b", 1, b""), "offset 1 is not on a page"),
    (m.XbzrlePage("b", 1 << 64, b""), "below 2^64"),
    (m.XbzrlePage("b", -P, b""), "offset -4096"),
    (m.XbzrlePage("", 0, b""), "1 to 255 are allowed"),
    (m.CompressedPage("b", 0, bytes(P + 15)), "4111 bytes; at most 4110"),
    (m.CompressedPage("b", 1, b""), "offset 1 is not on a page"),
    (m.Shut(-1), "SHUT: status is -1"),
    (m.Pong(1 << 32), "PONG: value is"),
    (m.ReqPages(1 << 64, 1), "REQ_PAGES: start is 18446744073709551616; 0 to 0xffffffffffffffff"),
    (m.ReqPages(0, 1 << 32), "REQ_PAGES: length is 4294967296; 0 to 0xffffffff fits"),
    (m.ReqPages(0, -1), "REQ_PAGES: length is -1"),
    (m.ReqPages("x", 1), "REQ_PAGES: start is 'x'"),  # type: ignore[arg-type]
    (m.ReqPagesId(1 << 64, 1, "b"), "REQ_PAGES_ID: start is"),
    (m.ReqPagesId(0, 1 << 32, "b"), "REQ_PAGES_ID: length is"),
    (m.ReqPagesId(0, 1, ""), "1 to 255 are allowed"),
    (m.ReceivedBitmap("b", b""), "bitmap of 0 bytes"),
    (m.ReceivedBitmap("b", bytes(7)), "bitmap of 7 bytes"),
    (m.ReceivedBitmap("", bytes(8)), "1 to 255 are allowed"),
    (m.ResumeAck(0), "value is 0; it must be 1"),
    (m.UnknownReturnPathMessage(1, b""), "type 1 is SHUT"),
    (m.UnknownReturnPathMessage(0, b""), "type 0 is INVALID"),
    (m.UnknownReturnPathMessage(1 << 16, b""), "type 65536; 0 to 0xffff fits"),
    (m.UnknownReturnPathMessage(-1, b""), "type -1"),
    (m.UnknownReturnPathMessage(8, bytes(65536)), "65536 bytes; 65535 fit"),
    (m.EndOfStream(0, True), "is not on the wire"),
    (m.VmDescription("{}"), "can't be encoded"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("message", "text"), BAD, ids=name)
def test_what_does_not_fit_is_refused_by_value_and_bound(message: m.Message, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        encode(message)


def test_bounds_themselves_fit() -> None:
    assert len(encode(m.XbzrlePage("b", (1 << 64) - P, bytes(P)))) == 10 + 3 + P
    assert len(encode(m.CompressedPage("b", 0, bytes(P + 14)))) == 10 + 4 + P + 14
    assert len(encode(m.UnknownCommand(0xFFFF, bytes(0xFFFF)))) == 5 + 0xFFFF
    assert len(encode(m.UnknownReturnPathMessage(0xFFFF, bytes(0xFFFF)))) == 4 + 0xFFFF
    assert encode(m.ReqPages((1 << 64) - 1, (1 << 32) - 1))[4:] == b"\xff" * 12
    assert encode(m.RamBlockList((m.RamBlockEntry("b", P, 1 << 55, 0),)))
    assert encode(m.RamBlockList((m.RamBlockEntry("b", P, 2 * P, (1 << 64) - 1),)))
    assert encode(m.Configuration("pc", target_page_bits=0xFFFFFFFF))
    assert ADVISE


class Huge(bytes):
    """Says that it has 4 GiB."""

    def __len__(self) -> int:
        return 1 << 32


def test_a_package_of_4_gib_is_refused() -> None:
    with pytest.raises(ValueError, match="package of 4294967296 bytes; 4294967295 fit"):
        encode(m.Packaged(Huge()))
