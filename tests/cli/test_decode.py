"""`postcopy decode` on captures of four releases, on damaged ones, and on pipes."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import pty
import signal
import struct
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard

from postcopy_proto import messages as m
from postcopy_proto.cli import output
from postcopy_proto.cli.capture.reading import detect_channel
from postcopy_proto.cli.main import main
from postcopy_proto.errors import ErrorKind
from postcopy_proto.wire import encode
from tests import vectors
from tests.savefile.test_libvirt import libvirt_header

DATA = Path(__file__).parents[1] / "data"
CAPTURES = {
    path.name.removesuffix(".bin.xz"): path
    for directory in ("captures", "releases")
    for path in sorted((DATA / directory).glob("*.bin.xz"))
}
EXPECTED = json.loads((Path(__file__).parent / "expected-summaries.json").read_text())
"""counted by a parser that has nothing in common with the package's"""

POSTCOPY = [sys.executable, "-m", "postcopy_proto", "decode"]


@cache
def load(name: str) -> bytes:
    return lzma.decompress(CAPTURES[name].read_bytes())


def run(*arguments: object) -> int:
    return main(["decode", *map(str, arguments)])


def summary_of(data: bytes, tmp_path: Path, capsys, *more: str) -> tuple[int, dict, str]:
    path = tmp_path / "capture.bin"
    path.write_bytes(data)
    code = run("--summary", "--json", *more, path)
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


def events_of(name: str, capsys, *more: str) -> list[dict]:
    assert run("--json", *more, CAPTURES[name]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# ---- summaries


def test_every_capture_that_is_not_empty_has_an_expectation():
    assert set(EXPECTED) == {name for name in CAPTURES if load(name)}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_summary(name, capsys):
    assert run("--summary", "--json", "--strict", CAPTURES[name]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == EXPECTED[name]
    assert captured.err == ""


@pytest.mark.parametrize("name", [name for name in CAPTURES if not load(name)])
def test_empty_capture(name, capsys):
    assert run("--summary", "--json", CAPTURES[name]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["channel"], document["bytes"], document["ended"]) == ("forward", 0, "cut")
    assert run("--summary", "--json", "--channel", "preempt", CAPTURES[name]) == 0
    assert json.loads(capsys.readouterr().out) == {"channel": "preempt", "bytes": 0, "blocks": {}}


@pytest.mark.parametrize(
    ("name", "result"),
    [
        # query-migrate's postcopy-requests, as recorded with the captures
        ("7.2-immediate", 17),
        ("7.2-preempt", 15),
        ("7.2-precopy1", 1),
        ("7.2-hugepage", 1),
        ("11.1-immediate", 3),
        ("11.1-preempt", 64),
    ],
)
def test_requests_are_as_many_as_the_source_counted(name, result, capsys):
    assert run("--summary", "--json", CAPTURES[f"{name}-return"]) == 0
    assert sum(json.loads(capsys.readouterr().out)["requests"].values()) == result


@pytest.mark.parametrize("name", ["7.2-immediate-forward", "11.1-preempt-return"])
def test_summary_as_tables(name, capsys):
    assert run("--summary", CAPTURES[name]) == 0
    text = capsys.readouterr().out
    for count in (EXPECTED[name].get("commands") or EXPECTED[name]["messages"]).items():
        assert any(count[0] in line and f" {count[1]:,} " in line for line in text.splitlines()), (
            count
        )


@pytest.mark.parametrize("cut_at", [0, 3, 8, 20, 27, 100, 200, 470, 480, 500, 5000, 20_000, 90_000])
def test_cut_forward_capture_is_no_error(cut_at, tmp_path, capsys):
    whole = load("11.1-immediate-forward")
    code, document, errors = summary_of(whole[:cut_at], tmp_path, capsys)
    assert (code, errors) == (0, "")
    assert (document["bytes"], document["ended"]) == (cut_at, "cut")
    assert (document["machine"] is not None) == (cut_at >= 27)
    # The package was counted only if its last byte had come.
    assert (document["package"] is not None) == (cut_at >= 13_482)
    assert document["commands"].get("PACKAGED", 0) == (cut_at >= 13_482)


def test_every_cut_of_a_return_path_counts_whole_messages(tmp_path, capsys):
    whole = load("11.1-immediate-return")
    seen = 0
    for cut_at in range(2, len(whole) + 1):
        code, document, _ = summary_of(whole[:cut_at], tmp_path, capsys)
        assert code == 0
        assert document["channel"] == "return"
        total = sum(document["messages"].values())
        assert seen <= total <= seen + 1
        seen = total
    assert seen == sum(EXPECTED["11.1-immediate-return"]["messages"].values())


@pytest.mark.parametrize(("lacking", "ended"), [(1, "eof"), (1000, "eof"), (110_000, "cut")])
def test_cut_save_file(lacking, ended, tmp_path, capsys):
    """In the description EOF has been read; in the device sections before it nobody can tell."""
    code, document, _ = summary_of(load("7.2-precopy-only-forward")[:-lacking], tmp_path, capsys)
    assert (code, document["ended"]) == (0, ended)
    assert document["blocks"] == EXPECTED["7.2-precopy-only-forward"]["blocks"]


@pytest.mark.parametrize("behind_eof", range(-2, 8))
def test_save_file_cut_about_its_eof(behind_eof, tmp_path, capsys):
    """The bytes from EOF to the description's first one say that this was EOF."""
    whole = load("7.2-precopy-only-forward")
    eof_at = whole.rindex(b"\0\6\0\1")
    code, document, _ = summary_of(whole[: eof_at + 1 + behind_eof], tmp_path, capsys)
    assert (code, document["ended"]) == (0, "eof" if behind_eof >= 0 else "cut")


def test_cut_preempt_capture(tmp_path, capsys):
    code, document, _ = summary_of(load("7.2-preempt-conn1-forward")[:-9], tmp_path, capsys)
    assert code == 0
    assert document["blocks"] == {"pc.ram": {"pages": 2, "zero_pages": 0}}


@pytest.mark.parametrize("summary", [["--summary", "--json"], ["--json"], []])
def test_malformed_capture_exits_1_after_what_was_read(summary, tmp_path, capsys):
    whole = bytearray(load("11.1-immediate-forward"))
    whole[255] = 0x55  # the first discard's type byte
    path = tmp_path / "capture.bin"
    path.write_bytes(whole)
    assert run(*summary, path) == output.EXIT_FAILED
    captured = capsys.readouterr()
    assert captured.err.startswith("postcopy: forward channel, offset 0xff, SECTION: byte 0x55")
    assert "SWITCHOVER_START" in captured.out
    assert "DISCARD" not in captured.out


def test_malformed_package(tmp_path, capsys):
    whole = bytearray(load("11.1-immediate-forward"))
    whole[13_482 - 5 + 2] = 0x0C  # RUN becomes a command that nobody knows
    code, document, errors = summary_of(bytes(whole), tmp_path, capsys)
    assert code == output.EXIT_FAILED
    assert "package channel, offset" in errors
    assert document["package"]["bytes"] == 12_987


def test_unknown_commands_pass_unless_strict(tmp_path, capsys):
    data = b"".join(
        encode(x) for x in (m.PostcopyResume(), m.UnknownCommand(0x63, b"abc"), m.Eof())
    )
    code, document, _ = summary_of(data, tmp_path, capsys)
    assert (code, document["commands"]) == (0, {"POSTCOPY_RESUME": 1, "0x63": 1})
    code, document, errors = summary_of(data, tmp_path, capsys, "--strict")
    assert (code, document["commands"]) == (1, {"POSTCOPY_RESUME": 1})
    assert "0x63 is unknown" in errors


@pytest.mark.parametrize("channel", ["forward", "preempt", "return"])
def test_more_names_than_any_vm_has_blocks(channel, tmp_path, capsys):
    names = [f"{number:04x}" for number in range(4097)]
    if channel == "return":
        data = b"".join(encode(m.ReqPagesId(0, 4096, name)) for name in names)
    else:
        records = [b"\0" * 7 + b"\x02\x04" + name.encode() + b"\0" for name in names]
        data = b"".join(records)
        if channel == "forward":
            data = encode(m.PostcopyResume()) + encode(m.SectionPart(1)) + data
    code, document, errors = summary_of(data, tmp_path, capsys, "--channel", channel)
    assert code == output.EXIT_FAILED
    assert len(document.get("blocks") or document["requests"]) == 4096
    assert "more than 4096 RAMBlocks" in errors


def test_order_is_checked_when_strict(tmp_path, capsys):
    data = b"".join(
        encode(x)
        for x in (m.StreamHeader(), m.Configuration("pc"), m.PostcopyListen(), m.Ping(1), m.Eof())
    )
    code, document, _ = summary_of(data, tmp_path, capsys)
    assert (code, document["commands"]) == (0, {"POSTCOPY_LISTEN": 1, "PING": 1})
    code, document, errors = summary_of(data, tmp_path, capsys, "--strict")
    assert (code, document["commands"]) == (1, {})
    assert "offset 0xf, state NONE, POSTCOPY_LISTEN: not allowed here; expected one of:" in errors


# ---- events


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


# ---- both directions


def test_join_of_a_preempt_migration(capsys):
    forward, back = CAPTURES["11.1-preempt-forward"], CAPTURES["11.1-preempt-return"]
    preempt = CAPTURES["11.1-preempt-conn1-forward"]
    index = forward.parent / "11.1-preempt-index.jsonl"
    arguments = ["--return", back, "--preempt", preempt, "--index", index, forward]
    assert run("--json", "--slowest", 3, *arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["requests"], document["answered"]) == (64, 64)
    assert document["channels"] == {"preempt": 64}
    assert len(document["slowest"]) == 3
    figures = document["latency_us"]
    assert 0 < figures["min"] <= figures["p50"] <= figures["p99"] <= figures["max"] < 5e6
    assert document["slowest"][0]["latency_us"] == figures["max"]
    assert sum(row["count"] for row in document["histogram"]) == 64
    assert run(*arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("64 requests: 64 answered")
    assert "Slowest" in text
    assert "Histogram" in text


def test_join_by_hand(tmp_path, capsys):
    """Three requests: answered, answered by a page that was under way, and never answered."""
    page = bytes.fromhex("0000000000001002 01 61 00")
    early = bytes.fromhex("0000000000003022 00")
    forward = b"".join(
        [
            *map(encode, (m.PostcopyResume(), m.SectionPart(1))),
            early_named := bytes.fromhex("0000000000003002 01 61 00"),
            page,
            *map(encode, (m.RamEos(), m.SectionFooter(1))),
        ]
    )
    requests = [m.ReqPagesId(0x1000, 4096, "a"), m.ReqPages(0x3000, 4096), m.ReqPages(0x5000, 4096)]
    (tmp_path / "f").write_bytes(forward)
    (tmp_path / "r").write_bytes(b"".join(map(encode, requests)))
    answer = len(forward) - 13 - len(page)
    (tmp_path / "i").write_text(
        "\n".join(
            json.dumps(line)
            for line in (
                [0.0, 0, "open"],
                [0.001, 0, "F", 0, answer],
                [0.002, 0, "R", 0, 18 + 32],
                [0.0025, 0, "F", answer, len(forward) - answer],
                [0.003, 0, "eof-F"],
            )
        )
    )
    assert len(early_named) == len(early) + 2
    arguments = ["--return", tmp_path / "r", tmp_path / "f"]
    assert run("--json", "--index", tmp_path / "i", *arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert [document[key] for key in ("requests", "answered", "before_the_request")] == [3, 2, 1]
    assert document["unanswered"] == 1
    [only] = document["slowest"]
    assert (only["start"], only["latency_us"]) == (0x1000, 500.0)
    assert document["histogram"] == [{"up_to_us": 512, "count": 1}]
    assert run(*arguments) == 0
    assert "no latencies" in capsys.readouterr().out
    assert run("--index", tmp_path / "i", *arguments) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == (
        "3 requests: 2 answered, 1 never; 1 answers were on their way before the request"
    )


def test_a_host_page_is_answered_by_its_last_record(capsys):
    name = "10.0-hugepage"
    forward = CAPTURES[f"{name}-forward"]
    index = forward.parent / f"{name}-index.jsonl"
    assert run("--json", "--return", CAPTURES[f"{name}-return"], "--index", index, forward) == 0
    document = json.loads(capsys.readouterr().out)
    [row] = document["slowest"]
    assert (row["block"], row["length"]) == ("m0", 0x200000)
    runs = [
        event
        for event in events_of(f"{name}-forward", capsys, "--pages")
        if event["name"] in ("PAGE", "ZERO")
        and event["block"] == "m0"
        and row["start"] <= event["start"] < row["start"] + 0x200000
    ]
    last = runs[-1]
    assert last["start"] == row["start"] + 0x1FF000
    assert row["answer_end"] == last["offset"] + (9 if last["name"] == "ZERO" else 8 + 4096)


def test_index_without_the_other_direction_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--index", "x", CAPTURES["7.2-immediate-forward"])
    assert caught.value.code == 2
    assert "belong to --return" in capsys.readouterr().err


def test_broken_index(tmp_path, capsys):
    (tmp_path / "i").write_text("[1, 2\n")
    back = CAPTURES["7.2-immediate-return"]
    arguments = ["--return", back, "--index", tmp_path / "i", CAPTURES["7.2-immediate-forward"]]
    assert run(*arguments) == output.EXIT_FAILED
    assert "is no index" in capsys.readouterr().err


# ---- where the bytes come from


PACKERS = [gzip.compress, bz2.compress, lzma.compress, zstandard.compress]


@pytest.mark.parametrize("pack", [bytes, *PACKERS])
def test_packed_files_are_unpacked(pack, tmp_path, capsys):
    code, document, _ = summary_of(pack(load("11.1-immediate-return")), tmp_path, capsys)
    assert (code, document) == (0, EXPECTED["11.1-immediate-return"])


@pytest.mark.parametrize("pack", PACKERS)
def test_damaged_packed_file(pack, tmp_path, capsys):
    packed = bytearray(pack(load("11.1-immediate-forward")))
    packed[len(packed) // 2 : len(packed) // 2 + 64] = bytes(64)
    code, document, errors = summary_of(bytes(packed), tmp_path, capsys)
    assert code == output.EXIT_FAILED
    assert document["channel"] == "forward"
    assert "the compressed file is damaged" in errors or "channel, offset" in errors


def test_libvirt_save_image(tmp_path, capsys):
    code, document, errors = summary_of(
        libvirt_header(3) + lzma.compress(load("11.1-precopy-forward")), tmp_path, capsys
    )
    assert (code, document) == (0, EXPECTED["11.1-precopy-forward"])
    assert errors == "a libvirt save image (xz); QEMU's bytes begin at 0x1000 of the file\n"


def test_mapped_ram_file(tmp_path, capsys):
    """One block of 20 pages, of which 0, 9 and 19 are in the file."""
    capability = m.Configuration("pc-i440fx-11.1", capabilities=("mapped-ram",))
    head = encode(m.StreamHeader()) + encode(capability) + encode(m.SectionStart(2, "ram", 0, 4))
    entry = (20 * 4096 | 4).to_bytes(8, "big") + b"\x06pc.ram" + (20 * 4096).to_bytes(8, "big")
    bitmap_at, pages_at = 0x200, 0x1000
    layout = struct.pack(">IQQQ", 1, 4096, bitmap_at, pages_at)
    data = (head + entry + layout).ljust(bitmap_at, b"\0") + bytes([1, 2, 8, 0, 0, 0, 0, 0])
    data = data.ljust(pages_at, b"\0") + bytes(20 * 4096)
    device = m.DeviceState(bytes.fromhex("0400000005 03 727463 00000000 00000003 01 7e00000005"))
    data += b"".join(map(encode, (m.RamEos(), m.SectionFooter(2), device, m.Eof())))
    code, document, errors = summary_of(data, tmp_path, capsys)
    assert (code, errors) == (0, "")
    assert (document["machine"], document["ended"]) == ("pc-i440fx-11.1", "eof")
    assert document["blocks"]["pc.ram"]["length"] == 20 * 4096
    assert (document["blocks"]["pc.ram"]["pages"]) == 3
    assert (document["blocks"]["pc.ram"]["zero_pages"]) == 17
    assert run(tmp_path / "capture.bin") == 0
    assert "a mapped-ram file" in capsys.readouterr().err


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


def test_progress_bar_on_a_terminal_only(tmp_path):
    """The bar is drawn on stderr's terminal and leaves stdout alone."""
    master, slave = pty.openpty()
    done = subprocess.run(
        [*POSTCOPY, "--summary", "--json", str(CAPTURES["7.2-immediate-forward"])],
        stdout=subprocess.PIPE,
        stderr=slave,
        check=True,
    )
    os.close(slave)
    drawn = os.read(master, 1 << 16)
    os.close(master)
    assert b"decoding" in drawn
    assert json.loads(done.stdout) == EXPECTED["7.2-immediate-forward"]


def test_standard_input_that_trickles_in():
    data = load("11.1-preempt-return")
    with subprocess.Popen(
        [*POSTCOPY, "--summary", "--json", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        for at in range(0, len(data), 100):
            process.stdin.write(data[at : at + 100])
            process.stdin.flush()
        out, _ = process.communicate()
    assert json.loads(out) == EXPECTED["11.1-preempt-return"]
    assert process.returncode == 0


def test_reader_that_has_seen_enough():
    command = [*POSTCOPY, "--pages", str(CAPTURES["7.2-immediate-forward"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_ctrl_c_while_waiting_for_more():
    with subprocess.Popen(
        [*POSTCOPY, "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(load("7.2-immediate-forward")[:200_000])
        process.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == output.EXIT_INTERRUPTED
    assert errors == b"postcopy: interrupted\n"


def test_memory_stays_constant(tmp_path):
    """128 MiB of pages from a pipe are counted in less memory than that by far."""
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from postcopy_proto.cli.main import main\n"
        "code = main(['decode', '--summary', '--json', '-'])\n"
        "status = Path('/proc/self/status').read_text()\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', status)[1], file=sys.stderr)\n"
        "sys.exit(code)"
    )
    pages, at_once = 1 << 15, 1 << 8
    opening = (
        m.StreamHeader(),
        m.Configuration("pc"),
        m.SectionStart(1, "ram", 0, 4),
        m.RamBlockList((m.RamBlockEntry("pc.ram", pages * 4096),)),
        m.RamEos(),
        m.SectionFooter(1),
        m.SectionPart(1),
    )
    closing = b"".join(map(encode, (m.RamEos(), m.SectionFooter(1), m.Eof())))
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(b"".join(map(encode, opening)))
        body = bytes(4096)
        process.stdin.write((8).to_bytes(8, "big") + b"\x06pc.ram" + body)
        for first in range(0, pages, at_once):
            numbers = range(max(first, 1), first + at_once)
            records = ((page << 12 | 0x28).to_bytes(8, "big") + body for page in numbers)
            process.stdin.write(b"".join(records))
        process.stdin.write(closing)
        out, errors = process.communicate()
    assert process.returncode == 0
    assert json.loads(out)["blocks"]["pc.ram"]["pages"] == pages
    assert int(errors) < 96 << 10  # KiB


@pytest.mark.parametrize(
    ("head", "channel"),
    [
        ("", "forward"),
        ("51", "forward"),
        ("08", "forward"),
        ("08000a", "forward"),
        ("0002", "return"),
        ("000200", "return"),
        ("00030014", "return"),
        ("00080000", "forward"),
        ("0000", "preempt"),
        ("000000000016", "preempt"),
        ("0000000000162008", "preempt"),
        ("0000000000000010", "preempt"),
        ("11223344", "forward"),
        ("00020fff", "forward"),
    ],
)
def test_channels_are_told_by_their_first_bytes(head, channel):
    assert detect_channel(bytes.fromhex(head)) == channel


def test_missing_file(capsys):
    assert run("/nonexistent/capture") == output.EXIT_FAILED
    assert capsys.readouterr().err == "postcopy: /nonexistent/capture: No such file or directory\n"
