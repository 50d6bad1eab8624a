"""`postcopy receive` against peers that misbehave: one line, exit 1, and no file."""

from __future__ import annotations

import lzma
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from postcopy_proto import messages as m
from postcopy_proto.examples.source import ToyVm
from postcopy_proto.net.transport import connect, parse_address
from postcopy_proto.ramblock import ByteRange
from postcopy_proto.source import SourceConnection
from postcopy_proto.wire import encode
from tests.interop.receive import Receiver

CAPTURES = Path(__file__).parents[1] / "data" / "captures"
START = SourceConnection(ToyVm({"a": 64 * 4096}), m.Configuration("toy-1")).start()
WHOLE = m.PostcopyRamDiscard("a", (ByteRange(0, 64 * 4096),))
PACKAGE = m.Packaged(b"".join(map(encode, (m.PostcopyListen(), m.PostcopyRun()))))


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "vm.save"
    yield path
    assert not path.exists()
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".partial"] == []


def against(output: Path, data: bytes, *options: str, close: bool = True) -> tuple[int, str]:
    receiver = Receiver.start("tcp:127.0.0.1:0", output, *options)
    with connect(parse_address(receiver.address)) as sock:
        sock.sendall(data)
        if close:
            sock.shutdown(socket.SHUT_WR)
        return receiver.failure()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "forward channel, offset 0x0, state HEADER"),
        (b"GET / HTTP/1.1\r\n\r\n", "forward channel, offset 0x0, state HEADER"),
        (START[:100], "state"),
        (START, "the connection ended before the stream did"),
        (START + encode(m.PostcopyRun()), "POSTCOPY_RUN: not allowed here"),
        (START + encode(WHOLE) + encode(PACKAGE), "state RUNNING"),
        (START + encode(m.PostcopyRamDiscard("b", WHOLE.ranges)), "unknown RAMBlock"),
        (START + b"\x7f", "0x7f"),
    ],
    ids=["nothing", "http", "cut", "short", "run", "cut in postcopy", "block", "section"],
)
def test_bad_peers(output: Path, data: bytes, said: str) -> None:
    code, line = against(output, data)
    assert code == 1
    assert line.startswith("postcopy: forward channel, offset 0x"), line
    assert said in line


def test_every_cut_of_a_real_migration(output: Path) -> None:
    stream = lzma.decompress((CAPTURES / "7.2-precopy1-forward.bin.xz").read_bytes())
    for at in (30, 300, 100_000, len(stream) // 2, len(stream) - 1):
        code, line = against(output, stream[:at])
        assert code == 1, line


@pytest.mark.userfault
def test_a_cut_with_a_guest_leaves_no_process(output: Path) -> None:
    code, _ = against(output, START + encode(WHOLE) + encode(PACKAGE), "--touch", "5")
    assert code == 1
    left = subprocess.run(["pgrep", "-f", "guest_child"], capture_output=True, text=True).stdout
    assert left == ""


def test_a_silent_peer(output: Path) -> None:
    began = time.monotonic()
    code, line = against(output, START, "--timeout", "1", close=False)
    assert code == 1
    assert "silent for 1 s" in line
    assert 0.9 < time.monotonic() - began < 15


def test_nobody_comes(output: Path) -> None:
    receiver = Receiver.start("tcp:127.0.0.1:0", output, "--wait", "0.3")
    code, line = receiver.failure()
    assert code == 1
    assert "nobody connected" in line


def test_an_existing_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "vm.save"
    path.write_bytes(b"precious")
    code, _ = against(path, START)
    assert code == 1
    assert path.read_bytes() == b"precious"


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    code, line = against(tmp_path / "vm.save", START, "--output", str(tmp_path / "no" / "vm.save"))
    assert code == 1
    assert "No such file or directory" in line


def test_interrupted(output: Path) -> None:
    receiver = Receiver.start("tcp:127.0.0.1:0", output)
    with connect(parse_address(receiver.address)) as sock:
        sock.sendall(START)
        time.sleep(0.5)
        receiver.process.send_signal(signal.SIGINT)
        code, line = receiver.failure()
    assert code == 130
    assert line == "postcopy: interrupted"


def test_a_unix_socket_is_removed_and_a_stale_one_replaced(output: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    receiver = Receiver.start(f"unix:{path}", output)
    with connect(parse_address(f"unix:{path}")):
        pass
    assert receiver.failure()[0] == 1
    assert not path.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--listen", "udp:1.2.3.4:5", "--output", "x"],
        ["--listen", "tcp:127.0.0.1:99999", "--output", "x"],
        ["--listen", "tcp:127.0.0.1:0"],
        ["--listen", "tcp:127.0.0.1:0", "--output", "x", "--page-size", "m0=3M"],
        ["--listen", "tcp:127.0.0.1:0", "--output", "x", "--touch", "-1"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "postcopy_proto", "receive", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 2
    assert finished.stdout == ""


def test_an_address_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp:127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "postcopy_proto", "receive", "--listen", address]
        finished = subprocess.run(
            [*command, "--output", str(tmp_path / "x")],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ,
        )
    assert finished.returncode == 1
    assert "can't listen" in finished.stderr
