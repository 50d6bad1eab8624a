"""What the tests of `postcopy decode` share: captures, what is in them, and running it."""

from __future__ import annotations

import json
import lzma
import sys
from functools import cache
from pathlib import Path

from postcopy_proto.cli.main import main

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
