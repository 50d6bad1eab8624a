"""Addresses as QEMU writes them, and real sockets behind them."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

import pytest

from postcopy_proto.net.transport import (
    Address,
    Listener,
    TransferMode,
    TransportError,
    connect,
    limit_buffer,
    parse_address,
    wait_until_accepted,
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tcp:127.0.0.1:4444", Address("tcp", host="127.0.0.1", port=4444)),
        ("tcp::0", Address("tcp", host="127.0.0.1", port=0)),
        ("tcp:[::1]:1", Address("tcp", host="::1", port=1)),
        ("unix:/tmp/a:b", Address("unix", path="/tmp/a:b")),
        ("fd:7", Address("fd", fd=7)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tcp",
        "tcp:host",
        "tcp:h:x",
        "tcp:h:65536",
        "unix:",
        "unix:" + "x" * 108,
        "fd:-1",
        "udp:x:1",
    ],
)
def test_no_addresses(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_address(text)


@pytest.mark.parametrize("kind", ["tcp", "tcp6", "unix"])
def test_both_ends(kind: str, tmp_path: Path) -> None:
    text = {"tcp": "tcp:127.0.0.1:0", "tcp6": "tcp:[::1]:0", "unix": f"unix:{tmp_path / 's'}"}[kind]
    with Listener(parse_address(text)) as listener:
        assert str(listener.address) != "tcp:127.0.0.1:0"
        client = connect(parse_address(str(listener.address)), timeout=5)
        server = listener.accept(timeout=5)
        with client, server:
            client.sendall(b"QEVM")
            assert server.recv(4) == b"QEVM"
    assert list(tmp_path.iterdir()) == []


def test_descriptors() -> None:
    left, right = socket.socketpair()
    with right, Listener(parse_address(f"fd:{left.detach()}")) as listener:
        connected = listener.accept()
        with connected:
            right.sendall(b"x")
            assert connected.recv(1) == b"x"
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    with Listener(parse_address(f"fd:{listening.detach()}")) as listener:
        thread = threading.Thread(target=lambda: connect(Address("tcp", "127.0.0.1", port)).close())
        thread.start()
        listener.accept(timeout=5).close()
        thread.join()


def test_refusals(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TransportError, match=f"can't listen on tcp:127.0.0.1:{port}"):
            Listener(Address("tcp", "127.0.0.1", port))
    with pytest.raises(TransportError, match="can't connect to tcp:"):
        connect(Address("tcp", "127.0.0.1", port), timeout=1)
    with pytest.raises(TransportError, match="can't connect to unix:"):
        connect(Address("unix", path=str(tmp_path / "nobody")))
    quiet = Listener(Address("tcp", "127.0.0.1"))
    with quiet, pytest.raises(TransportError, match="nobody connected"):
        quiet.accept(timeout=0.05)


def test_a_socket_path_in_use_is_left_alone(tmp_path: Path) -> None:
    address = Address("unix", path=str(tmp_path / "s"))
    with Listener(address):
        with pytest.raises(TransportError, match="can't listen"):
            Listener(address)
        connect(address).close()
    Path(address.path).write_text("a file of somebody's")
    with pytest.raises(TransportError, match="can't listen"):
        Listener(address)
    assert Path(address.path).read_text() == "a file of somebody's"


def test_only_latency_mode_limits_the_kernel() -> None:
    with socket.socket() as sock:
        before = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        limit_buffer(sock, socket.SO_RCVBUF, TransferMode.THROUGHPUT)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == before
        limit_buffer(sock, socket.SO_RCVBUF, TransferMode.LATENCY)
        # The kernel doubles what it is asked for, to have room for its own bookkeeping.
        doubled = 2 * TransferMode.LATENCY.value
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == doubled


def test_a_second_connection_does_not_overtake_the_first(tmp_path: Path) -> None:
    for address in (Address("tcp", host="127.0.0.1"), Address("unix", path=str(tmp_path / "s"))):
        with Listener(address) as listener, connect(listener.address) as first:
            first.sendall(b"first")
            wait_until_accepted(first, 5)
            with connect(listener.address) as second, listener.accept(5) as accepted:
                assert accepted.recv(5) == b"first"
                second.close()


def test_a_peer_that_confirms_nothing() -> None:
    """What it has no room for, a kernel does not confirm."""
    with Listener(Address("tcp", host="127.0.0.1")) as listener:
        limit_buffer(listener.socket, socket.SO_RCVBUF, TransferMode.LATENCY)
        with connect(listener.address) as first:
            first.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    first.send(bytes(1 << 20))
            with pytest.raises(TransportError, match=r"nobody confirmed .* within 0\.2 s"):
                wait_until_accepted(first, 0.2)
