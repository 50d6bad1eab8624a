"""Addresses as QEMU writes them, and the sockets behind them.

`tcp:HOST:PORT` (an IPv6 host in brackets; port 0 picks one), `unix:PATH`, `fd:N` (a connected
socket for `connect`, a listening or a connected one for `listen`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import termios
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from postcopy_proto.errors import PostcopyError

CONFIRMATION_POLL_SECONDS = 0.0005
"""less than a round trip to another machine in most networks"""


class TransferMode(Enum):
    """The one setting for the trade between latency and throughput.

    Its value is how many bytes of background pages are read or sent before faults and requests
    are looked at again. In LATENCY mode it also bounds the kernel's buffers at our end, since
    an urgent page on the same connection waits behind all that they hold.

    Measured over TCP loopback with faults on a preempt channel, each end on a CPU of its own,
    against the same faults on a quiet connection:

        KiB    push GB/s    p50     p99
        128    0.49         1.4x    1.3x
        192    0.57         1.5x    1.8x
        256    0.90         1.5x    1.7x
        384    0.93         2.0x    2.1x

    At 32 KiB, less than loopback's segment of 64 KiB, a connection crawls at 2 MB/s.
    """

    LATENCY = 256 * 1024
    THROUGHPUT = 2 * 1024 * 1024


class TransportError(PostcopyError):
    """A connection could not be made, or went away; the text names the address."""


@dataclass(frozen=True, slots=True)
class Address:
    """One address: `kind` is `tcp`, `unix` or `fd`."""

    kind: str
    host: str = ""
    port: int = 0
    path: str = ""
    fd: int = -1

    def __str__(self) -> str:
        if self.kind == "tcp":
            host = f"[{self.host}]" if ":" in self.host else self.host
            return f"tcp:{host}:{self.port}"
        return f"unix:{self.path}" if self.kind == "unix" else f"fd:{self.fd}"


def parse_address(text: str) -> Address:
    """The address that `text` spells; ValueError with what is wrong."""
    kind, _, rest = text.partition(":")
    if kind == "tcp":
        host, colon, port = rest.rpartition(":")
        if not colon or not port.isdecimal() or int(port) > 65535:
            raise ValueError(f"{text!r}: expected tcp:HOST:PORT with a port of 0 to 65535")
        return Address("tcp", host=host.strip("[]") or "127.0.0.1", port=int(port))
    if kind == "unix":
        if not rest or len(os.fsencode(rest)) > 107:
            raise ValueError(f"{text!r}: expected unix:PATH with a path of 1 to 107 bytes")
        return Address("unix", path=rest)
    if kind == "fd":
        if not rest.isdecimal():
            raise ValueError(f"{text!r}: expected fd:NUMBER")
        return Address("fd", fd=int(rest))
    raise ValueError(f"{text!r}: expected tcp:HOST:PORT, unix:PATH or fd:NUMBER")


class Listener:
    """A listening socket; its path, if it made one, is removed when it is closed.

    TransportError when the address can't be bound. A stale socket file of a listener that is
    gone is replaced; one that somebody answers on is not.
    """

    def __init__(self, address: Address) -> None:
        self._connected: socket.socket | None = None
        self._path: Path | None = None
        try:
            self.socket = self._open(address)
        except OSError as error:
            raise TransportError(f"can't listen on {address}: {error.strerror or error}") from error

    def _open(self, address: Address) -> socket.socket:
        if address.kind == "fd":
            self.address = address
            given = socket.socket(fileno=address.fd)
            if not given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                self._connected = given
            return given
        if address.kind == "unix":
            _remove_stale(Path(address.path))
            listening = socket.socket(socket.AF_UNIX)
            try:
                listening.bind(address.path)
                self._path = Path(address.path)
                listening.listen(2)
            except OSError:
                listening.close()
                raise
            self.address = address
            return listening
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        listening = socket.create_server((address.host, address.port), family=family, backlog=2)
        self.address = Address("tcp", host=address.host, port=listening.getsockname()[1])
        return listening

    def fileno(self) -> int:
        """The listening descriptor, for poll."""
        return self.socket.fileno()

    def accept(self, timeout: float | None = None) -> socket.socket:
        """The next connection; TransportError when none came within `timeout` seconds."""
        if self._connected is not None:
            connected, self._connected = self._connected, None
            return connected
        self.socket.settimeout(timeout)
        try:
            connection, _ = self.socket.accept()
        except TimeoutError:
            raise TransportError(
                f"nobody connected to {self.address} within {timeout:g} s"
            ) from None
        except OSError as error:
            raise TransportError(f"{self.address}: {error.strerror or error}") from error
        tune(connection)
        return connection

    def close(self) -> None:
        """Stop listening and remove the socket file."""
        self.socket.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(address: Address, timeout: float | None = None) -> socket.socket:
    """A connected socket; TransportError that names the address and the cause."""
    try:
        if address.kind == "fd":
            return socket.socket(fileno=address.fd)
        if address.kind == "unix":
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(timeout)
            try:
                connection.connect(address.path)
            except OSError:
                connection.close()
                raise
        else:
            connection = socket.create_connection((address.host, address.port), timeout)
    except OSError as error:
        raise TransportError(f"can't connect to {address}: {error.strerror or error}") from error
    tune(connection)
    return connection


def wait_until_accepted(connection: socket.socket, timeout: float | None = None) -> None:
    """Until a second connection can't overtake this one, over which something was sent.

    A Unix listener has connections in order. Over TCP ours may count as connected while the
    handshake's last packet is still lost: not, when the peer's kernel has confirmed what we sent.
    TransportError when it does not within `timeout` seconds.
    """
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    deadline = None if timeout is None else time.monotonic() + timeout
    while any(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4))):
        if deadline is not None and time.monotonic() > deadline:
            raise TransportError(f"nobody confirmed what was sent within {timeout:g} s")
        time.sleep(CONFIRMATION_POLL_SECONDS)


def tune(connection: socket.socket) -> None:
    """Requests and single pages must not wait for more to be said."""
    if connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def limit_buffer(sock: socket.socket, option: int, mode: TransferMode) -> None:
    """Bound a kernel buffer (SO_SNDBUF, SO_RCVBUF) as the mode wants it."""
    if mode is TransferMode.LATENCY:
        sock.setsockopt(socket.SOL_SOCKET, option, mode.value)


def _remove_stale(path: Path) -> None:
    """Remove a socket file that nobody listens on any more."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(errno.EEXIST, f"{path} exists and is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            return
    raise OSError(errno.EADDRINUSE, "another process listens there")
