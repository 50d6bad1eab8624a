"""A page fault handler of one's own: a VMM's memory comes from a file, page by page, on demand.

The VMM (Firecracker, or whoever speaks its handshake) creates the userfaultfd, registers its empty
RAM and sends the descriptor here with a description of its regions. Its VM runs at once.
"""

from __future__ import annotations

import mmap
import select
import socket
import sys
from pathlib import Path

import numpy as np

from postcopy_proto.errors import PostcopyError
from postcopy_proto.net.handover import Handover, receive_handover
from postcopy_proto.userfault.backend import Backend

PATIENCE_SECONDS = 1.0
"""How long the VMM's end may take to show."""


def serve(handover: Handover, memory_file: Path) -> Backend:
    """Answers every fault until the VMM has ended; returns the backend, for its statistics.

    A VMM that can't be served is ended: that beats one that hangs, or that reads zeros.
    """
    try:
        with open(memory_file, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        needed = max(region.offset + region.size for region in handover.described)
        if needed > len(memory):
            raise ValueError(f"{memory_file} has {len(memory):,} bytes, the VM {needed:,}")
        base = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
        sources = {
            region.block.idstr: base + described.offset
            for region, described in zip(handover.regions, handover.described, strict=True)
        }
        backend = Backend(handover.regions)
    except BaseException:
        handover.kill_owner()
        raise
    try:
        answer_faults(backend, sources, handover)
    except BaseException:
        handover.kill_owner()
        handover.owner_ended(PATIENCE_SECONDS)
        raise
    finally:
        # Not before the VMM has ended: whoever still waits is let go, and would read zeros.
        backend.cleanup()
    return backend


def answer_faults(backend: Backend, sources: dict[str, int], handover: Handover) -> None:
    """Until the VMM has ended. `sources` has the address of each block's bytes here."""
    backend.enable_notify()
    answer = backend.answering(sources)
    poll = select.poll()
    poll.register(backend.fileno(), select.POLLIN)
    poll.register(handover.pidfd, select.POLLIN)
    # What was read in the middle of a placement makes the descriptor readable no more.
    while handover.pidfd not in dict(poll.poll(0 if backend.pending else None)):
        try:
            answer()
        except PostcopyError:
            # It ends while it is being served: that is how it should be.
            if not handover.owner_ended(PATIENCE_SECONDS):
                raise


def main() -> int:
    """`python -m postcopy_proto.examples.handler SOCKET FILE`: serves the first VMM to connect."""
    path, memory_file = sys.argv[1:]
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(1)
        connection, _ = listening.accept()
    with receive_handover(connection) as handover:
        backend = serve(handover, Path(memory_file))
    waits = backend.stats.latency_us()
    print(
        f"{backend.stats.pages:,} pages placed; a fault took {waits['p50']} us (p99 {waits['p99']})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
