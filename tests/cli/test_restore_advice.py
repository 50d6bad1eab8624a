"""A file that is refused: the line says what to do about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from postcopy_proto.cli.main import main
from tests.savefile.streams import SaveStreamBuilder

STREAM = SaveStreamBuilder().data


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (b"root:x:0:0", "migrate exec:cat>FILE"),
        (bytes(3000), "migrate exec:cat>FILE"),
        (STREAM[: len(STREAM) // 2], "copy it again or save the VM again"),
        (STREAM[:-3], "copy it again or save the VM again"),
    ],
    ids=["text", "zeros", "half", "almost all"],
)
def test_advice(
    content: bytes, advice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "vm.save"
    path.write_bytes(content)
    assert main(["restore", str(path), "--to", "unix:nobody"]) == 1
    said = capsys.readouterr().err
    assert advice in said
    assert said.count("\n") == 1
    assert path.read_bytes() == content
