"""A destination of one's own, on the sans-I/O core and one blocking socket.

Its memory is a bytearray a block. It has no guest that faults; to show a request it asks for the
pages it is told to want as soon as it may, and notes what arrived in which order.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterable

from postcopy_proto import (
    NEED_DATA,
    DestinationConnection,
    DeviceState,
    EndOfStream,
    Pages,
    Ping,
    Pong,
    PostcopyListen,
    RamBlockList,
    Shut,
)

CHUNK = 1 << 16


class ToyDestination:
    """Receives one migration; `wanted` are (idstr, byte offset) to ask for at the switchover."""

    def __init__(self, wanted: Iterable[tuple[str, int]] = ()) -> None:
        self.connection = DestinationConnection()
        self.memory: dict[str, bytearray] = {}
        self.device_state = b""
        self.requests = 0
        self.arrived: list[tuple[str, int]] = []
        """pages that came after LISTEN, in order"""
        self._wanted = list(wanted)
        self._listening = False

    def receive(self, sock: socket.socket) -> None:
        """Run the migration to its end; RemoteProtocolError when the source breaks the rules."""
        while not self.connection.ended:
            self.connection.receive_data(sock.recv(CHUNK))
            while (event := self.connection.next_event()) is not NEED_DATA:
                if isinstance(event, EndOfStream):
                    return
                sock.sendall(self.handle(event))
        sock.sendall(self.connection.send(Shut(0)))

    def handle(self, event: object) -> bytes:
        """Act on one message; what to send in return."""
        match event:
            case RamBlockList(blocks):
                self.memory = {block.idstr: bytearray(block.used_length) for block in blocks}
            case Pages():
                self.place(event)
            case Ping(value):
                return self.connection.send(Pong(value))
            case PostcopyListen():
                self._listening = True
                data, self.requests = self.connection.request_pages(self._wanted)
                return data
            case DeviceState(data):
                self.device_state = data
            case _:
                pass
        return b""

    def place(self, pages: Pages) -> None:
        """Put a batch where it belongs."""
        memory = self.memory[pages.block]
        for index, offset in enumerate(pages.offsets.tolist()):
            content = pages.page(index)  # None: a zero page
            end = min(offset + pages.page_size, len(memory))
            memory[offset:end] = content[: end - offset] if content else bytes(end - offset)
            if self._listening:
                self.arrived.append((pages.block, offset))


def main() -> int:
    """`python -m postcopy_proto.examples.destination PATH`: listen on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(sys.argv[1])
        listening.listen(1)
        sock, _ = listening.accept()
    with sock:
        destination = ToyDestination()
        destination.receive(sock)
    for name, memory in destination.memory.items():
        print(f"{name}: {len(memory):,} bytes, {len(memory) - memory.count(0):,} not zero")
    return 0


if __name__ == "__main__":
    sys.exit(main())
