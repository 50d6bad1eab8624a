"""The first corpus of each target, from spec/vectors: `python fuzz/corpus.py DIRECTORY`."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fuzz.targets import KNOWN_BLOCKS, SMALL_PAGES, STRICT, TARGETS
from postcopy_proto import messages as m
from postcopy_proto.errors import Channel
from postcopy_proto.wire import encode
from tests import vectors

LARGEST = 6000
"""bytes of an input; longer ones are cut off, which is an input as good as any"""

DEVICE = m.DeviceState(bytes.fromhex("0400000005 03 727463 00000000 00000003 01 7e00000005"))

OF_CHANNEL = {
    Channel.RETURN: ("return_path",),
    Channel.FORWARD: ("forward", "destination", "save_file"),
    Channel.PREEMPT: ("preempt",),
    Channel.PACKAGE: ("package",),
}


def write(directory: Path) -> dict[str, int]:
    """Write the inputs of every target to a directory of its name; how many there are."""
    inputs: dict[str, set[bytes]] = {target: set() for target in TARGETS}
    for vector in vectors.load() + vectors.load_sessions():
        for target in OF_CHANNEL[vector.channel]:
            for how in (STRICT | 7, STRICT | SMALL_PAGES, KNOWN_BLOCKS | 3):
                inputs[target].add(bytes([how]) + vector.data[:LARGEST])
    for session in sessions():
        inputs["destination"] |= {bytes([STRICT | 5]) + session, b"\0" + session}
        inputs["forward"].add(bytes([STRICT]) + session)
    inputs["save_file"] |= {bytes([STRICT | 5]) + tail for tail in tails()}
    inputs["push"] |= {
        bytes([how]) + program for how in range(0, 250, 17) for program in programs()
    }
    for target, datas in inputs.items():
        place = directory / target
        place.mkdir(parents=True, exist_ok=True)
        for data in datas:
            (place / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    return {target: len(datas) for target, datas in inputs.items()}


def sessions() -> list[bytes]:
    """Whole migrations in few bytes: switched over, completed as precopy, and broken off."""
    opening: list[m.Message] = [
        m.StreamHeader(),
        m.Configuration("pc-i440fx-11.1"),
        m.OpenReturnPath(),
        m.Ping(1),
        m.PostcopyAdvise(4096, 4096),
        m.SectionStart(1, "ram", 0, 4),
        m.RamBlockList((m.RamBlockEntry("pc.ram", 0x4000), m.RamBlockEntry("pc.bios", 0x1000))),
        m.RamEos(),
        m.SectionFooter(1),
    ]
    package = (m.PostcopyListen(), DEVICE, m.Ping(3), m.Ping(0x42), m.PostcopyRun())
    switchover: list[m.Message] = [
        m.SwitchoverStart(),
        m.PostcopyRamDiscard("pc.ram", (vectors.ByteRange(0, 0x4000),)),
        m.Ping(2),
        m.Packaged(b"".join(map(encode, package))),
        m.Ping(4),
    ]
    zero = bytes.fromhex("0000000000000002 06 70632e72616d 00 0000000000001022 00")
    records = encode(m.SectionPart(1)) + zero + encode(m.RamEos()) + encode(m.SectionFooter(1))
    closing = b"".join(map(encode, (m.SectionEnd(1), m.RamEos(), m.SectionFooter(1), m.Eof())))
    head, switch = b"".join(map(encode, opening)), b"".join(map(encode, switchover))
    precopy_end = encode(DEVICE) + encode(m.Eof())
    return [
        head + records + switch + records + closing,
        head + switch + closing,
        head + records + records + precopy_end,
        head + records + switch + records[:-7],
    ]


def programs() -> list[bytes]:
    """Pushes of pages: sections of one length, of several, cut by other records and by garbage."""
    return [
        bytes([0x07] * 8),
        bytes([0x03, 0x90] * 8),
        bytes([0x07, 0x90, 0x03, 0x90, 0x07, 0x07, 0x90, 0x01, 0x90]),
        bytes([0x07, 0xD0, 0x07, 0xC1, 0x07, 0xE0, 0x07]),
        bytes([0x07, 0x90, 0x07, 0xE8, 0x07, 0xEA, 0xFF, 0xFF, 0x07]),
        bytes([0x07] * 9),  # past the end of the block
    ]


def tails() -> list[bytes]:
    """Ends of save files: device sections, EOF, and what describes them or nothing."""
    fields = [{"name": "x", "size": 1}]
    subsection = {"vmsd_name": "rtc/a", "version": 1, "fields": [{"name": "y", "size": 2}]}
    array = [{"name": "z", "size": 2, "array_len": 3}]
    rtc = {"name": "rtc", "instance_id": 0, "vmsd_name": "rtc", "version": 3}
    with_subsection = bytes.fromhex(
        "0400000006 03 727463 00000000 00000003 01 05 05 7274632f61 00000001 abcd 7e00000006"
    )
    with_array = bytes.fromhex("0400000007 03 727463 00000000 00000003 010203040506 7e00000007")
    found = []
    for state, devices in (
        (DEVICE.data, [rtc | {"fields": fields}]),
        (with_subsection, [rtc | {"fields": fields, "subsections": [subsection]}]),
        (with_array, [rtc | {"fields": array}]),
        (DEVICE.data + with_array, [rtc | {"fields": fields}, rtc | {"fields": array}]),
        (DEVICE.data, [rtc | {"size": 1}]),
    ):
        text = json.dumps({"page_size": 4096, "devices": devices}).encode()
        end = encode(m.Eof()) + encode(m.VmDescription(text))
        found += [state + end, state + end[:-3], state + encode(m.Eof())]
    return found


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
