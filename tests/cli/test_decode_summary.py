"""`postcopy decode --summary`: counts of captures of four releases, whole, cut and damaged."""

from __future__ import annotations

import json

import pytest

from postcopy_proto import messages as m
from postcopy_proto.cli import output
from postcopy_proto.wire import encode
from tests.cli.decoding import CAPTURES, EXPECTED, load, run, summary_of


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
