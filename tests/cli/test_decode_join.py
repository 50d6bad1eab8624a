"""`postcopy decode --return`: each request joined with the page that answered it."""

from __future__ import annotations

import json

import pytest

from postcopy_proto import messages as m
from postcopy_proto.cli import output
from postcopy_proto.wire import encode
from tests.cli.decoding import CAPTURES, events_of, run


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
