"""A user whom the kernel, by a container's seccomp filter, gives no userfaultfd: exit 3 and why."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from postcopy_proto.net.transport import TransportError, connect, parse_address
from tests.userfault.support import unprivileged

pytestmark = [
    pytest.mark.userfault,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter is for x86-64"),
]

FORBIDDEN = """
import ctypes, struct, sys
# load the call's number; 323 is userfaultfd: EPERM; all others: allow
steps = (0x20, 0, 0, 0), (0x15, 0, 1, 323), (6, 0, 0, 0x00050001), (6, 0, 0, 0x7FFF0000)
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
program = Program(len(steps), ctypes.addressof(code))
assert libc.prctl(22, 2, ctypes.byref(program)) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
from postcopy_proto.cli.main import main
sys.exit(main())
"""


def forbidden(*arguments: str) -> subprocess.CompletedProcess[str]:
    device = Path("/dev/userfaultfd")
    if device.exists() and device.stat().st_mode & 0o006:
        pytest.skip("everybody may open /dev/userfaultfd here")
    return unprivileged([sys.executable, "-c", FORBIDDEN, *arguments])


def test_probe() -> None:
    result = forbidden("probe", "--json")
    assert result.returncode == 3, result.stderr
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert "user-mode-only" in checks["userfaultfd"]["advice"]
    assert "seccomp" in checks["userfaultfd-user-mode"]["advice"]
    assert "user-mode-only" not in checks["userfaultfd-user-mode"]["advice"]


def test_demo() -> None:
    result = forbidden("demo")
    assert result.returncode == 3, result.stderr
    (line,) = result.stderr.splitlines()
    assert "userfaultfd-user-mode: device: Permission denied, system call: Operation not" in line
    assert "seccomp" in line
    assert "not checked" not in line


def test_receive_with_a_guest_does_not_even_listen(tmp_path: Path) -> None:
    """A source that had come and switched over could not take its VM back."""
    listen = f"unix:{tmp_path}/s"
    result = forbidden("receive", "--listen", listen, "--output", str(tmp_path / "x"), "--touch=1")
    assert result.returncode == 3
    (line,) = result.stderr.splitlines()
    assert "seccomp" in line
    with pytest.raises(TransportError):
        connect(parse_address(listen))
    assert list(tmp_path.iterdir()) == []


def test_without_a_guest_none_is_needed(tmp_path: Path) -> None:
    shutil.copyfile(__file__, tmp_path / "no-vm")
    result = forbidden("decode", str(tmp_path / "no-vm"))
    assert result.returncode == 1
