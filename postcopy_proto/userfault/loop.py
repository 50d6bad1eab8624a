"""`serve_faults`: the fault loop on its own, for a backend that no migration's loop polls.

A destination polls the userfaultfd together with its sockets (`net.destination_loop`). This is
for everything else: restoring from a local file, tests, a program with its own idea of where
pages come from.
"""

from __future__ import annotations

import logging
import select
from collections.abc import Callable

from postcopy_proto.userfault.backend import Backend

trace = logging.getLogger("postcopy_proto.trace")


def serve_faults(
    backend: Backend, request: Callable[[list[tuple[str, int]]], None], quit_fd: int
) -> None:
    """Calls `request` with each batch of `read_faults` until `quit_fd` becomes readable.

    There is no time limit, and quitting goes before faults. `quit_fd` is an eventfd, or
    anything that polls; it is not read. `request` places the pages, or sees to it that they
    come. Errors end the loop: what `read_faults` and `request` raise. (QEMU's
    postcopy_ram_fault_thread)
    """
    trace.debug("postcopy_ram_fault_thread_entry")
    poll = select.poll()
    poll.register(quit_fd, select.POLLIN)
    poll.register(backend.fileno(), select.POLLIN)
    try:
        while True:
            ready = dict(poll.poll(0 if backend.pending else None))
            if quit_fd in ready:
                trace.debug("postcopy_ram_fault_thread_quit")
                return
            faults = backend.read_faults()
            if faults:
                request(faults)
    finally:
        trace.debug("postcopy_ram_fault_thread_exit")
