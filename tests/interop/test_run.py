"""`postcopy run`: one command from a save file to a running VM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interop.guest import Guest, assert_unbroken
from tests.interop.qemu import COMMON_MACHINE, Lab, wait_until

pytestmark = pytest.mark.qemu


@pytest.fixture
def saved(lab: Lab, qemu_binary: str) -> tuple[Path, bytes]:
    source = lab.start(qemu_binary)
    source.wait_letters(2)
    source.save(lab.path("vm"))
    return lab.path("vm"), source.serial


def start(lab: Lab, binary: str, path: Path, *options: str) -> subprocess.Popen[bytes]:
    command = lab.command(binary, Guest(), 64, COMMON_MACHINE)
    serial = ["-serial", f"file:{lab.path('serial')}", "-pidfile", str(lab.path("pid"))]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "postcopy_proto", "run", "--json", *options, str(path), "--"),
            *command,
            *serial,
        ],
        stdout=subprocess.PIPE,
    )


def letters(lab: Lab) -> bytes:
    path = lab.path("serial")
    return path.read_bytes() if path.exists() else b""


def test_stays_as_the_parent(lab: Lab, qemu_binary: str, saved: tuple[Path, bytes]) -> None:
    path, before = saved
    process = start(lab, qemu_binary, path)
    try:
        assert process.stdout is not None
        out = b"".join(iter(process.stdout.readline, b"}\n")) + b"}"
        count = len(letters(lab))
        wait_until(lambda: len(letters(lab)) > count + 3, 30, "letters after the restore")
        assert process.poll() is None
        process.terminate()
        process.wait(20)
    finally:
        process.kill()
    assert process.returncode == 0
    assert json.loads(out)["completed"] is True
    assert_unbroken(before, letters(lab))
    assert not lab.path("pid").exists(), "QEMU removes it when it ends"


def test_detached(lab: Lab, qemu_binary: str, saved: tuple[Path, bytes]) -> None:
    path, before = saved
    process = start(lab, qemu_binary, path, "--detach")
    process.communicate(timeout=30)
    pid = int(lab.path("pid").read_text())
    try:
        assert process.returncode == 0
        count = len(letters(lab))
        wait_until(lambda: len(letters(lab)) > count + 3, 30, "letters after our end")
        assert_unbroken(before, letters(lab))
    finally:
        os.kill(pid, signal.SIGKILL)


def run(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "postcopy_proto", "run", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr


def test_what_can_go_wrong(lab: Lab, qemu_binary: str, saved: tuple[Path, bytes]) -> None:
    path = str(saved[0])
    assert run(path, "--", "/no/such/qemu") == (
        1,
        "postcopy: can't start /no/such/qemu: No such file or directory\n",
    )
    code, error = run(path, "--", qemu_binary, "-machine", "nonsense")
    assert code == 1
    assert "QEMU ended with code 1 before it was ready" in error
    code, error = run(path, "--", qemu_binary, "-incoming", "defer")
    assert code == 2
    code, error = run(path, "--", qemu_binary, "-nodefaults", "-display", "none", "-machine", "q35")
    assert code == 1
    assert "machine type pc-i440fx-5.2" in error
