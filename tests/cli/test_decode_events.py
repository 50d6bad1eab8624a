"""`postcopy decode`: a line an event, for people and for programs."""

from __future__ import annotations

import json
import os
import subprocess
from itertools import pairwise

import pytest

from postcopy_proto import messages as m
from postcopy_proto.cli import output
from postcopy_proto.errors import ErrorKind
from postcopy_proto.wire import encode
from tests import vectors
from tests.cli.decoding import CAPTURES, EXPECTED, POSTCOPY, events_of, load, run


def test_events_are_lines_with_offsets(capsys):
    assert run(CAPTURES["11.1-immediate-forward"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["0x0000000000", "QEMU_VM_FILE_MAGIC"]
    for expected in (
        "0x0000000029  POSTCOPY_ADVISE         page size summary 0x1000, target page 4096",
        "0x00000000ff  POSTCOPY_RAM_DISCARD    pc.ram 1 range, 32 MiB: [0x0, 0x2000000)",
        "0x00000001ef    POSTCOPY_LISTEN",
        "0x000000349c    PING                  0x42",
        "0x00000034a5    POSTCOPY_RUN",
        "0x00000034aa  PING                    4",
    ):
        assert any(line.startswith(expected) for line in lines), expected
    assert lines[-1].split()[1] == "EOF"


@pytest.mark.parametrize("name", ["7.2-immediate-forward", "11.1-preempt-conn1-forward"])
def test_runs_and_single_pages_cover_the_same(name, capsys):
    def pages(events):
        return [
            (event["name"], event["block"], event["start"] + at)
            for event in events
            if event["name"] in ("PAGE", "ZERO")
            for at in range(0, event["length"], 4096)
        ]

    runs, singles = events_of(name, capsys), events_of(name, capsys, "--pages")
    assert len(runs) < len(singles)
    assert pages(runs) == pages(singles)
    counts = EXPECTED[name]["blocks"]["pc.ram"]
    of_ram = [page for page in pages(runs) if page[1] == "pc.ram"]
    assert sum(page[0] == "ZERO" for page in of_ram) == counts["zero_pages"]
    assert sum(page[0] == "PAGE" for page in of_ram) == counts["pages"]


def test_every_page_line_points_at_its_record(capsys):
    data = load("7.2-immediate-forward")
    for event in events_of("7.2-immediate-forward", capsys, "--pages"):
        if event["name"] in ("PAGE", "ZERO"):
            word = int.from_bytes(data[event["offset"] : event["offset"] + 8], "big")
            assert word & ~0xFFF == event["start"]
            assert word & 0xFDF == (8 if event["name"] == "PAGE" else 2)


def test_return_path_events(capsys):
    events = events_of("11.1-preempt-recover-resumed-return", capsys)
    names = [event["name"] for event in events]
    assert names == ["RECV_BITMAP"] * 6 + ["RESUME_ACK", "SHUT", "END_OF_STREAM"]
    assert events[-1] == {
        "offset": len(load("11.1-preempt-recover-resumed-return")),
        "name": "END_OF_STREAM",
        "clean": True,
        "detail": "",
    }
    assert events[0]["block"] == "pc.ram"
    assert events[0]["bitmap_bytes"] == 1024


@pytest.mark.parametrize(
    ("name", "devices", "last"),
    [
        ("7.2-precopy-only-forward", 31, "globalstate"),
        ("11.1-precopy-forward", 31, "globalstate"),
    ],
)
def test_device_sections_are_named_and_leave_no_gap(name, devices, last, capsys):
    events = events_of(name, capsys)
    sections = [event for event in events if event["name"] == "SECTION_FULL"]
    [state] = [event for event in events if event["name"] == "DEVICE_STATE"]
    assert len(sections) == devices
    assert sections[-1]["idstr"] == last
    assert sections[0]["offset"] == state["offset"]
    for section, following in pairwise(sections):
        assert section["offset"] + section["length"] == following["offset"]
    assert sum(section["length"] for section in sections) == state["data_bytes"]
    assert [event["name"] for event in events[-3:-1]] == ["EOF", "VMDESCRIPTION"]


def test_a_description_that_lies_is_refused(tmp_path, capsys):
    data = load("11.1-precopy-forward")
    for field in (b'"name":"timer"', b'"name": "timer"'):
        data = data.replace(field, field.replace(b"timer", b"tinker"[:5]))
    path = tmp_path / "capture.bin"
    path.write_bytes(data)
    assert run(path) == output.EXIT_FAILED
    captured = capsys.readouterr()
    assert "as described" in captured.err
    told = [line.split()[1] for line in captured.out.splitlines()]
    assert told[-2:] == ["DEVICE_STATE", "EOF"]


def test_cut_events_end_with_where(tmp_path, capsys):
    path = tmp_path / "capture.bin"
    path.write_bytes(load("7.2-recover-forward")[:1000])
    assert run(path) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "(cut off)" in last


def test_names_cannot_drive_the_terminal(tmp_path, capsys):
    path = tmp_path / "capture.bin"
    path.write_bytes(encode(m.RecvBitmap("\x1b]0;gotcha\x07\udcff")) + encode(m.Eof()))
    assert run(path) == 0
    text = capsys.readouterr().out
    assert "\\x1b]0;gotcha\\x07\\udcff" in text
    assert text.isascii()
    assert "\x1b" not in text


def test_names_that_the_terminal_cannot_show(tmp_path):
    path = tmp_path / "capture.bin"
    path.write_bytes(encode(m.RecvBitmap("ram/ü")) + encode(m.Eof()))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*POSTCOPY, path], capture_output=True, env=environment, check=True)
    assert b"ram/\\xfc" in done.stdout


NOT_AS_THE_VECTOR_SAYS = {
    "commands/packaged-empty",  # decode looks into the package too
    "stream/device-state-that-holds-a-false-tail",  # and at what the description says
    "stream/mapped-ram",  # and can tell what is in such a file
}


@pytest.mark.parametrize(
    "vector",
    [
        vector
        for vector in vectors.load()
        if vector.channel != "package"
        and not vector.options.keys() & {"blocks", "page_sizes"}
        and vector.name not in NOT_AS_THE_VECTOR_SAYS
    ],
    ids=lambda vector: vector.name,
)
def test_every_vector_can_be_told(vector, tmp_path, capsys):
    """Every message and every error, as lines, as JSON, page by page, and counted."""
    path = tmp_path / "capture.bin"
    path.write_bytes(vector.data)
    strict = ["--strict"] if vector.error is ErrorKind.UNKNOWN else []
    for more in ([], ["--json"], ["--pages"], ["--summary"]):
        code = run("--channel", vector.channel, *strict, *more, path)
        captured = capsys.readouterr()
        if vector.error is None:
            assert (code, captured.err) == (0, "")
        else:
            assert code == output.EXIT_FAILED
            assert captured.err.startswith("postcopy: ")
        if more == ["--json"] and not strict:
            told = {json.loads(line)["name"] for line in captured.out.splitlines()}
            assert {event["message"] for event in vector.events} <= told
