"""What is no regular file is refused at once, and said to be: pipes, devices, directories."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from postcopy_proto.cli.main import main
from postcopy_proto.errors import ErrorKind, RemoteProtocolError
from postcopy_proto.savefile import open_saved_vm


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("kind", ["named pipe", "pipe", "device", "directory"])
def test_refused(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.mkfifo(tmp_path / "fifo")
    path = {
        "named pipe": str(tmp_path / "fifo"),
        "pipe": f"/dev/fd/{reader}",
        "device": "/dev/zero",
        "directory": str(tmp_path),
    }[kind]
    before = open_files()
    with pytest.raises(RemoteProtocolError, match="no regular file; copy") as caught:
        open_saved_vm(path)
    assert caught.value.kind is ErrorKind.UNSUPPORTED
    assert open_files() == before
    assert main(["restore", path, "--to", "unix:nobody"]) == 1
    assert path in capsys.readouterr().err
    os.close(reader)
    os.close(writer)
