"""The QMP monitor: places where no QEMU answers, each told apart and soon."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest

from postcopy_proto.net.qmp import START_SECONDS, Monitor, QmpError


def failure(path: Path, timeout: float = 10.0) -> str:
    started = time.monotonic()
    with pytest.raises(QmpError) as raised:
        Monitor(str(path), timeout=timeout)
    assert time.monotonic() - started < START_SECONDS + 3
    return str(raised.value)


@pytest.fixture
def listener(tmp_path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(tmp_path / "qmp"))
    sock.listen()
    return sock


def test_no_socket_there(tmp_path: Path) -> None:
    error = failure(tmp_path / "none")
    assert f"no QMP at {tmp_path}/none: No such file or directory" in error
    assert f"-qmp unix:{tmp_path}/none,server=on,wait=off" in error


def test_a_socket_that_nobody_listens_on(tmp_path: Path, listener: socket.socket) -> None:
    listener.close()
    assert "Connection refused" in failure(tmp_path / "qmp")


def test_one_that_is_busy(tmp_path: Path, listener: socket.socket) -> None:
    with listener:
        error = failure(tmp_path / "qmp", timeout=0.5)
    assert "did not answer within 0.5 s; is another client connected" in error


@pytest.mark.parametrize(
    ("said", "words"),
    [(b"HTTP/1.0 400 Bad Request\r\n\r\n", "Greeting"), (b"", "it closed the connection")],
)
def test_something_else_that_listens(
    tmp_path: Path, listener: socket.socket, said: bytes, words: str
) -> None:
    def answer() -> None:
        peer, _ = listener.accept()
        peer.sendall(said)
        peer.close()

    thread = threading.Thread(target=answer)
    with listener:
        thread.start()
        error = failure(tmp_path / "qmp")
        thread.join()
    assert words in error
    assert "\n" not in error
