"""The forward channel: the order of its items, section ids, footers, EOF; and every refusal."""

from __future__ import annotations

import pytest

from postcopy_proto import messages as m
from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.messages import NEED_DATA, EndOfStream
from postcopy_proto.ramblock import ByteRange, RAMBlock
from postcopy_proto.wire import ForwardDecoder, Limits, encode
from tests.wire.helpers import (
    ADVISE,
    HEADER,
    P,
    batch,
    channel_of,
    cut,
    decode,
    end_section,
    events,
    every_byte,
    forward,
    h,
    join,
    one_block,
    page,
    refuse,
    start,
)

HEAD = [m.StreamHeader(), m.Configuration("pc-i440fx-7.2")]
AT = len(HEADER)


def test_a_whole_postcopy_in_order() -> None:
    blocks = m.RamBlockList((m.RamBlockEntry("pc.ram", 8 * P), m.RamBlockEntry("b", P)))
    package = join(m.PostcopyListen(), m.Ping(3), m.PostcopyRun())
    messages: list[m.Message] = [
        *HEAD,
        m.OpenReturnPath(),
        m.Ping(1),
        m.PostcopyAdvise(P, P),
        m.SectionStart(7, "ram", 0, 4),
        blocks,
        m.MultifdFlush(),
        m.RamEos(),
        m.SectionFooter(7),
        m.SectionPart(7),
        batch("pc.ram", (0, page(0)), (1, page(1)), (2, None), (3, page(3))),
        batch("b", (0, page(9))),
        m.RamEos(),
        m.SectionFooter(7),
        m.SwitchoverStart(),
        m.PostcopyRamDiscard("pc.ram", (ByteRange(0, 8 * P),)),
        m.Packaged(package),
        m.Ping(4),
        m.SectionPart(7),
        batch("b", (0, None), named=False),
        batch("pc.ram", (7, None), (6, None), (5, None)),
        m.RamEos(),
        m.SectionFooter(7),
        m.SectionEnd(7),
        m.RamEos(),
        m.SectionFooter(7),
        m.Eof(),
    ]
    assert decode(forward(), join(*messages)) == messages


def test_offsets_follow_the_stream() -> None:
    messages = [
        m.StreamHeader(),
        m.Configuration("pc"),
        m.Ping(1),
        m.SectionStart(7, "ram", 0, 4),
        m.RamBlockList((m.RamBlockEntry("b", P),)),
        m.RamEos(),
        m.SectionFooter(7),
        m.Eof(),
        m.VmDescription(b"{}"),
    ]
    data = join(*messages)
    for chunks in ([data], list(every_byte(data))):
        decoder = ForwardDecoder()
        seen = []
        assert (decoder.offset, decoder.event_offset) == (0, 0)
        for chunk in chunks:
            decoder.receive_data(chunk)
            while (event := decoder.next_event()) is not NEED_DATA:
                seen.append((decoder.event_offset, decoder.offset, event))
        at, expected = 0, []
        for message in messages:
            expected.append((at, at + len(encode(message)), message))
            at += len(encode(message))
        assert seen == expected


def test_blocks_are_the_streams_list() -> None:
    entries = (m.RamBlockEntry("m0", 1 << 21, 1 << 21), m.RamBlockEntry("b", P))
    decoder = ForwardDecoder()
    assert decoder.blocks == {}
    decoder.receive_data(HEADER + encode(m.PostcopyAdvise(1 << 21 | P, P)) + start(*entries))
    decoder.receive_data(end_section())
    list(decoder)
    assert list(decoder.blocks.values()) == [RAMBlock("m0", 1 << 21, 1 << 21), RAMBlock("b", P)]


def test_page_sizes_fill_in_where_the_stream_says_nothing() -> None:
    decoder = ForwardDecoder(page_sizes={"m0": 1 << 21, "other": P})
    decoder.receive_data(HEADER + start(m.RamBlockEntry("m0", 1 << 21), m.RamBlockEntry("b", P)))
    list(decoder)
    assert [block.page_size for block in decoder.blocks.values()] == [1 << 21, P]


def test_page_sizes_must_be_page_sizes() -> None:
    with pytest.raises(ValueError, match="RAMBlock b: page size 3 is no power of 2"):
        ForwardDecoder(page_sizes={"b": 3})


@pytest.mark.parametrize("size", [0, 512, 4097, -4096])
def test_target_page_size_must_be_one(size: int) -> None:
    with pytest.raises(ValueError, match=f"target page size {size}; a power of two of at least"):
        ForwardDecoder(target_page_size=size)


@pytest.mark.parametrize("size", [1024, 65536])
def test_other_target_pages(size: int) -> None:
    pages = batch("b", (0, page(1, size)), (3, None), (2, page(2, size)), page_size=size)
    blocks = (m.RamBlockEntry("b", 4 * size),)
    stream = HEADER + encode(m.PostcopyAdvise(size, size)) + start(*blocks) + end_section()
    stream += join(m.SectionPart(2), pages) + end_section() + b"\0"
    got = decode(forward(target_page_size=size), stream)
    assert got[-4] == pages


# ---- with and without a header


RECOVERY = join(m.RecvBitmap("pc.ram"), m.RecvBitmap("b"), m.PostcopyResume(), m.SectionPart(9))


@pytest.mark.parametrize("header", [False, None])
def test_a_recovery_has_no_header_and_any_section_id(header: bool | None) -> None:
    stream = RECOVERY + join(batch("pc.ram", (3, None)), m.RamEos(), m.SectionFooter(9), m.Eof())
    assert decode(forward(header=header), stream) == [
        m.RecvBitmap("pc.ram"),
        m.RecvBitmap("b"),
        m.PostcopyResume(),
        m.SectionPart(9),
        batch("pc.ram", (3, None)),
        m.RamEos(),
        m.SectionFooter(9),
        m.Eof(),
    ]


def test_the_first_byte_decides_about_the_header() -> None:
    assert decode(forward(header=None), HEADER + b"\0") == [*HEAD, m.Eof()]
    decoder = ForwardDecoder(header=None)
    decoder.receive_data(b"\0")
    assert list(decoder) == [m.Eof()], "one byte is enough"


def test_a_recovery_keeps_to_one_section_id() -> None:
    stream = RECOVERY + join(m.RamEos(), m.SectionFooter(9), m.SectionEnd(8))
    at = len(stream) - 5
    refuse(
        forward(header=False), stream, ErrorKind.UNKNOWN, at, "section_id 8; RAM's is 9",
        "SECTION_END",
    )  # fmt: skip


def test_a_recovery_knows_the_blocks_it_was_given() -> None:
    make = forward(header=False, blocks=[RAMBlock("pc.ram", 4 * P)])
    assert make().blocks == {"pc.ram": RAMBlock("pc.ram", 4 * P)}
    at = len(RECOVERY)
    good = batch("pc.ram", (3, None))
    assert cut(make, RECOVERY + encode(good))[4] == good
    refuse(
        make, RECOVERY + encode(batch("pc.ram", (4, None))), ErrorKind.RANGE, at,
        "page at 0x4000 of RAMBlock 'pc.ram', which ends at 0x4000", "RAM",
    )  # fmt: skip
    refuse(
        make, RECOVERY + encode(batch("b", (0, None))), ErrorKind.UNKNOWN, at,
        "RAMBlock 'b' is not in the block list", "RAM",
    )  # fmt: skip


def test_without_a_list_offsets_end_at_the_limit() -> None:
    make = forward(header=False, limits=Limits(block_length=4 * P))
    refuse(
        make, RECOVERY + encode(batch("b", (4, None))), ErrorKind.RANGE, len(RECOVERY),
        "which ends at 0x4000", "RAM",
    )  # fmt: skip


# ---- refusals: (what precedes is good, bytes, kind, offset from there, text, message)

MALFORMED, UNKNOWN, STATE = ErrorKind.MALFORMED, ErrorKind.UNKNOWN, ErrorKind.STATE
MISMATCH, LIMIT, RANGE = ErrorKind.MISMATCH, ErrorKind.LIMIT, ErrorKind.RANGE
UNSUPPORTED = ErrorKind.UNSUPPORTED

HEADERS = [
    (h("5145564e 00000003"), MALFORMED, "magic 0x5145564e; 0x5145564d opens"),
    (h("5145564d 00000002"), UNSUPPORTED, "version 2 of the stream format is obsolete"),
    (h("5145564d 00000004"), MISMATCH, "stream version 4; 3 is spoken"),
    (h("5145564d 03000000"), MISMATCH, "stream version 50331648; 3 is spoken"),
]


@pytest.mark.parametrize(("data", "kind", "text"), HEADERS, ids=str)
def test_header_refused(data: bytes, kind: ErrorKind, text: str) -> None:
    refuse(forward(), data, kind, 0, text, "QEMU_VM_FILE_MAGIC")


def subsection(name: bytes, version: int, body: bytes) -> bytes:
    return b"\x05" + bytes([len(name)]) + name + version.to_bytes(4, "big") + body


BITS = subsection(b"configuration/target-page-bits", 1, h("0000000c"))
CAPABILITIES = subsection(b"configuration/capabilities", 1, h("00000001 01 78"))
UUID = subsection(b"configuration/uuid", 1, bytes(16))
PC = h("07 00000002 7063")

CONFIGURATIONS = [
    (h("08 0001 0000"), MALFORMED, "byte 0x08 behind the file header; 0x07 opens"),
    (h("07 00000100"), LIMIT, "machine name of 256 bytes; the limit is 255"),
    (PC + h("05 03") + b"ram", UNKNOWN, "subsection b'ram'; configuration/target-page-bits, "),
    (PC + h("05 ff"), UNKNOWN, "subsection name of 255 bytes; configuration/target"),
    (PC + h("05 1f"), UNKNOWN, "subsection name of 31 bytes"),
    (PC + h("05 1e") + b"configuration/target-page-bitz", UNKNOWN, "target-page-bitz"),
    (PC + BITS + BITS, UNKNOWN, "configuration/capabilities, configuration/uuid may stand here"),
    (PC + CAPABILITIES + BITS, UNKNOWN, "target-page-bits'; configuration/uuid may stand here"),
    (PC + UUID + CAPABILITIES, UNKNOWN, "capabilities'; no subsection may stand here"),
    (PC + UUID + UUID, UNKNOWN, "configuration/uuid'; no subsection may stand here"),
    (PC + subsection(b"configuration/uuid", 2, bytes(16)), MISMATCH, "uuid has version 2; 1"),
    (
        PC + subsection(b"configuration/capabilities", 1, h("00000041")),
        LIMIT,
        "65 capabilities; the limit is 64",
    ),
    (
        PC + subsection(b"configuration/target-page-bits", 1, h("0000000d")) + b"\0",
        MISMATCH,
        "target pages of 2^13 bytes; 4096 is expected",
    ),
    (
        PC + subsection(b"configuration/target-page-bits", 1, h("ffffffff")) + b"\0",
        MISMATCH,
        "target pages of 2^4294967295 bytes",
    ),
    (
        PC + subsection(b"configuration/capabilities", 1, h("00000001 0a") + b"mapped-ram") + b"\0",
        UNSUPPORTED,
        "capability mapped-ram is on: its pages stand at fixed places of a file",
    ),
]


@pytest.mark.parametrize(("data", "kind", "text"), CONFIGURATIONS, ids=str)
def test_configuration_refused(data: bytes, kind: ErrorKind, text: str) -> None:
    refuse(forward(), HEADER[:8] + data, kind, 8, text, "CONFIGURATION")


@pytest.mark.parametrize(
    ("body", "text"),
    [(h("00000001 00"), "a name of 0 bytes"), (h("00000002 01 61 02 6200"), "a NUL in the name")],
)
def test_capability_names_are_names(body: bytes, text: str) -> None:
    data = PC + subsection(b"configuration/capabilities", 1, body) + b"\0"
    refuse(forward(), HEADER[:8] + data, MALFORMED, 8, text)


def test_limits_of_the_configuration_themselves_fit() -> None:
    many = m.Configuration("m" * 255, capabilities=tuple(f"c{i}" for i in range(64)))
    stream = encode(m.StreamHeader()) + encode(many) + b"\0"
    assert decode(forward(), stream)[1] == many
    limits = Limits(capabilities=63)
    assert events(ForwardDecoder(), [stream])[1] == many
    with pytest.raises(RemoteProtocolError, match="64 capabilities; the limit is 63"):
        events(ForwardDecoder(limits=limits), [stream])


BODY = one_block()
PART = encode(m.SectionPart(2))

ITEMS = [
    (b"\x08\0\1\0\0\x05", UNKNOWN, 5, "byte 0x05 where a section or command should", "SECTION"),
    (b"\x07", UNKNOWN, 0, "byte 0x07 where", "SECTION"),
    (b"\x06", UNKNOWN, 0, "byte 0x06 where", "SECTION"),
    (h("7e 00000002"), UNKNOWN, 0, "byte 0x7e where", "SECTION"),
    (b"Q", UNKNOWN, 0, "byte 0x51 where", "SECTION"),
    (h("08 0000 0000"), UNKNOWN, 0, "MIG_CMD 0x0 is unknown; 1 to 11 are in the table", "COMMAND"),
    (h("08 000c 0000"), UNKNOWN, 0, "MIG_CMD 0xc is unknown", "COMMAND"),
    (h("08 0001 0001"), MALFORMED, 0, "1 bytes of payload; 0 are expected", "OPEN_RETURN_PATH"),
    (h("08 0002 0003"), MALFORMED, 0, "3 bytes of payload; 4 are expected", "PING"),
    (h("08 0002 0005"), MALFORMED, 0, "5 bytes of payload; 4 are expected", "PING"),
    (h("08 0003 0008"), MALFORMED, 0, "8 bytes of payload; 0 or 16", "POSTCOPY_ADVISE"),
    (h("08 0004 0001"), MALFORMED, 0, "0 are expected", "POSTCOPY_LISTEN"),
    (h("08 0005 0001"), MALFORMED, 0, "0 are expected", "POSTCOPY_RUN"),
    (h("08 0007 0005"), MALFORMED, 0, "4 are expected", "PACKAGED"),
    (h("08 0008 0001"), MALFORMED, 0, "0 are expected", "ENABLE_COLO"),
    (h("08 0009 0001"), MALFORMED, 0, "0 are expected", "POSTCOPY_RESUME"),
    (h("08 000b 0001"), MALFORMED, 0, "0 are expected", "SWITCHOVER_START"),
    (h("08 000a 0000"), MALFORMED, 0, "not as laid out", "RECV_BITMAP"),
    (h("08 000a 0001 00"), MALFORMED, 0, "a name of 0 bytes", None),
    (h("08 000a 0002 02 61"), MALFORMED, 0, "not as laid out", "RECV_BITMAP"),
    (h("08 000a 0003 01 61 62"), MALFORMED, 0, "not as laid out", "RECV_BITMAP"),
    (h("08 000a 0003 02 61 00"), MALFORMED, 0, "a NUL in the name", None),
    (h("08 0007 0004 10000001"), LIMIT, 0, "package of 268435457 bytes; the limit is", "PACKAGED"),
    (
        encode(m.PostcopyAdvise(P, 2 * P)),
        MISMATCH,
        0,
        "target pages of 8192 bytes; 4096 is expected",
        "POSTCOPY_ADVISE",
    ),
    (encode(m.SectionStart(2, "ram", 1, 4)), MISMATCH, 0, "instance_id 1", "SECTION_START"),
    (encode(m.SectionStart(2, "ram", 0, 3)), MISMATCH, 0, "version_id 3; 0 and 4", "SECTION_START"),
    (encode(m.SectionStart(2, "ram", 0, 5)), MISMATCH, 0, "version_id 5; 0 and 4", "SECTION_START"),
    (
        encode(m.SectionStart(3, "dirty-bitmap", 0, 1)),
        UNSUPPORTED,
        0,
        "section 'dirty-bitmap' of another iterable than RAM has no known end",
        "SECTION_START",
    ),
    (h("01 00000002 00"), MALFORMED, 0, "a name of 0 bytes", None),
    (h("01 00000002 02 6100"), MALFORMED, 0, "a NUL in the name b'a\\x00'", None),
    (h("04 00000002 00"), MALFORMED, 0, "a name of 0 bytes", None),
    (PART, UNKNOWN, 0, "section_id 2; no section was started", "SECTION_PART"),
    (encode(m.SectionEnd(0)), UNKNOWN, 0, "section_id 0; no section was started", "SECTION_END"),
]


@pytest.mark.parametrize(("data", "kind", "at", "text", "message"), ITEMS, ids=str)
def test_item_refused(
    data: bytes, kind: ErrorKind, at: int, text: str, message: str | None
) -> None:
    assert refuse(forward(), HEADER + data, kind, AT + at, text, message)[:2] == HEAD


SECTIONS = [
    (encode(m.SectionPart(3)), UNKNOWN, 0, "section_id 3; RAM's is 2", "SECTION_PART"),
    (encode(m.SectionEnd(3)), UNKNOWN, 0, "and no other iterable was started", "SECTION_END"),
    (
        encode(m.SectionStart(2, "ram", 0, 4)),
        STATE,
        0,
        "a second START of RAM, whose section_id is 2",
        "SECTION_START",
    ),
    (PART + encode(m.RamEos()) + b"\0", MALFORMED, 13, "byte 0x00 behind section 2", None),
    (PART + encode(m.RamEos()) + PART, MALFORMED, 13, "its footer opens with 0x7e", None),
    (
        PART + encode(m.RamEos()) + encode(m.SectionFooter(3)),
        MISMATCH,
        13,
        "footer of section 3 behind section 2",
        None,
    ),
]


@pytest.mark.parametrize(("data", "kind", "at", "text", "message"), SECTIONS, ids=str)
def test_section_refused(
    data: bytes, kind: ErrorKind, at: int, text: str, message: str | None
) -> None:
    before = HEADER + BODY
    message = message or "SECTION_FOOTER"
    refuse(forward(), before + data, kind, len(before) + at, text, message)


def test_x_ignore_shared_has_a_gpa_and_no_postcopy() -> None:
    configuration = m.Configuration("pc", capabilities=("x-ignore-shared",))
    head = encode(m.StreamHeader()) + encode(configuration)
    refuse(
        forward(), head + ADVISE, UNSUPPORTED, len(head),
        "together with capability x-ignore-shared", "POSTCOPY_ADVISE",
    )  # fmt: skip
    blocks = (m.RamBlockEntry("a", P, gpa=0), m.RamBlockEntry("b", P, gpa=1 << 32))
    advise = encode(m.PostcopyAdvise())
    got = decode(forward(), head + advise + start(*blocks) + end_section() + b"\0")
    assert got[4] == m.RamBlockList(blocks)


def test_discards_are_bounded_by_the_block_list() -> None:
    before = HEADER + BODY
    data = encode(m.PostcopyRamDiscard("pc.ram", (ByteRange(63 * P, 2 * P),)))
    make = forward()
    refuse(
        make, before + data, RANGE, len(before) + 5 + 9, "(0x3f000, 0x2000) ends beyond",
        "POSTCOPY_RAM_DISCARD",
    )  # fmt: skip
    data = encode(m.PostcopyRamDiscard("other", (ByteRange(0, P),)))
    refuse(
        make, before + data, UNKNOWN, len(before) + 5 + 2, "unknown RAMBlock 'other'",
        "POSTCOPY_RAM_DISCARD",
    )  # fmt: skip


def test_names_have_a_limit() -> None:
    make = forward(limits=Limits(idstr=2))
    header = encode(m.StreamHeader()) + encode(m.Configuration("pc"))
    at = len(header)
    for message in (m.SectionStart(2, "ram", 0, 4), m.SectionFull(2, "ram", 0, 4)):
        refuse(make, header + encode(message), LIMIT, at, "a name of 3 bytes; the limit is 2")
    for message in (m.RecvBitmap("ram"), m.PostcopyRamDiscard("ram", (ByteRange(0, P),))):
        refuse(make, header + encode(message), LIMIT, at, "a name of 3 bytes; the limit is 2")
    refuse(
        make, HEADER, LIMIT, 8, "machine name of 13 bytes; the limit is 2", "CONFIGURATION"
    )  # fmt: skip


def test_unknown_commands_pass_when_not_strict() -> None:
    stream = HEADER + h("08 000c 0003 616263 08 ffff 0000 00")
    got = decode(forward(strict=False), stream)
    assert got == [*HEAD, m.UnknownCommand(12, b"abc"), m.UnknownCommand(0xFFFF, b""), m.Eof()]
    refuse(forward(strict=False), HEADER + h("08 0000 0000"), UNKNOWN, AT, "0x0", "COMMAND")
    refuse(forward(strict=False), HEADER + h("08 0002 0003"), MALFORMED, AT, "3 bytes", "PING")


def test_a_package_at_the_limit_fits() -> None:
    limits = Limits(package_bytes=100)
    good = HEADER + encode(m.Packaged(bytes(100)))
    assert cut(forward(limits=limits), good)[2] == m.Packaged(bytes(100))
    refuse(
        forward(limits=limits), HEADER + encode(m.Packaged(bytes(101))), LIMIT, AT,
        "package of 101 bytes; the limit is 100", "PACKAGED",
    )  # fmt: skip


def test_a_packages_bytes_are_its_own() -> None:
    chunk = bytearray(HEADER + encode(m.Packaged(b"abc")))
    decoder = ForwardDecoder()
    decoder.receive_data(chunk)
    packaged = list(decoder)[-1]
    chunk[-3:] = b"xxx"
    assert packaged == m.Packaged(b"abc")


def test_the_channel_in_errors() -> None:
    assert channel_of(ForwardDecoder(), b"Q" * 8) is Channel.FORWARD
    assert channel_of(ForwardDecoder(channel=Channel.FILE), b"Q" * 8) is Channel.FILE


# ---- the end


def test_behind_eof_only_a_description_may_follow() -> None:
    good = HEADER + b"\0"
    assert decode(forward(), good + h("06 00000002 7b7d")) == [
        *HEAD, m.Eof(), m.VmDescription(b"{}"),
    ]  # fmt: skip
    at = len(good)
    for byte in (b"\0", b"\x08", b"\x7e", b"\x05", b"\x07"):
        text = f"byte {byte[0]:#04x} behind the end of the stream"
        refuse(forward(), good + byte, MALFORMED, at, text, "EOF")
    refuse(
        forward(), good + h("06 00000002 7b7d 06"), MALFORMED, at + 7,
        "byte 0x06 behind the end of the stream", "EOF",
    )  # fmt: skip
    make = forward(limits=Limits(description_bytes=2))
    assert decode(make, good + h("06 00000002 7b7d"))
    refuse(
        make, good + h("06 00000003"), LIMIT, at, "description of 3 bytes; the limit is 2",
        "VMDESCRIPTION",
    )  # fmt: skip


CUTS = [
    (b"", "inside the file header: more expected"),
    (HEADER[:3], "inside the file header: at least 5 bytes more of a record at 0x0 expected"),
    (HEADER[:8], "inside the configuration: more expected"),
    (HEADER[:10], "inside the configuration: at least 3 bytes more of a record at 0x8 expected"),
    (HEADER, "inside the stream before its EOF: more expected"),
    (
        HEADER + h("08 0002 0004 00"),
        "inside the stream before its EOF: at least 3 bytes more of a record at 0x1a expected",
    ),
    (HEADER + one_block()[:17], "inside the block list: more expected"),
    (HEADER + BODY[:-13], "inside a section of RAM: more expected"),
    (HEADER + BODY[:-5], "inside a section, before its footer: more expected"),
    (
        HEADER + BODY[:-1],
        "inside a section, before its footer: at least 1 bytes more of a record at 0x4a expected",
    ),
    (HEADER + BODY + PART, "inside a section of RAM: more expected"),
    (
        HEADER + b"\0" + h("06 00000002 7b"),
        "inside VMDESCRIPTION: at least 1 bytes more of a record at 0x1b expected",
    ),
]


@pytest.mark.parametrize(("data", "detail"), CUTS, ids=str)
def test_where_a_cut_stream_broke_off(data: bytes, detail: str) -> None:
    end = cut(forward(), data)[-1]
    assert end == EndOfStream(len(data), clean=False, detail=detail)


def test_a_cut_recovery() -> None:
    end = cut(forward(header=None), b"")[-1]
    assert end == EndOfStream(0, clean=False, detail="inside the file header: more expected")


def test_the_end_is_said_for_ever_and_nothing_may_follow() -> None:
    decoder = ForwardDecoder()
    decoder.receive_data(HEADER + b"\0")
    assert list(decoder)[-1] == m.Eof()
    assert decoder.next_event() is NEED_DATA
    decoder.receive_data(b"")
    decoder.receive_data(b"")
    end = EndOfStream(AT + 1, clean=True)
    assert decoder.next_event() == end
    assert decoder.next_event() == end
    assert (decoder.event_offset, decoder.offset) == (AT + 1, AT + 1)
    assert list(decoder) == [end]
    with pytest.raises(ValueError, match="2 bytes received after the end of the stream"):
        decoder.receive_data(b"ab")


def test_the_default_limits() -> None:
    """They are documented: a change is a change of the interface."""
    assert Limits() == Limits(
        idstr=255,
        blocks=4096,
        block_length=1 << 50,
        capabilities=64,
        package_bytes=256 << 20,
        device_state_bytes=256 << 20,
        description_bytes=8 << 20,
        return_path_bytes=512,
        bitmap_bytes=64 << 20,
    )
