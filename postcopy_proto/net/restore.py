"""Lazy restore: a saved VM runs at a stock destination before its RAM is there.

The source's side of a postcopy migration whose precopy phase is empty: everything is discarded,
the device state goes out at once, and every page is delivered afterwards, those first that are
asked for.
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

from postcopy_proto.errors import Channel, PostcopyError, RemoteProtocolError
from postcopy_proto.net.incoming import IncomingQemu
from postcopy_proto.net.qmp import QmpError
from postcopy_proto.net.source_loop import SourceLoop, SourceStatistics
from postcopy_proto.net.transport import (
    Address,
    TransferMode,
    TransportError,
    connect,
    wait_until_accepted,
)
from postcopy_proto.savefile import SavedVm
from postcopy_proto.source import RAM_SECTION_ID, BackgroundOrder, SourceConnection


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """How a VM is delivered."""

    bandwidth: float | None = None
    """bytes a second of pages that nobody asked for; None: no bound; 0: none of them"""
    drain_after: float | None = None
    """with a bandwidth of 0: seconds after which the rest is sent all the same"""
    order: BackgroundOrder = BackgroundOrder.AFTER_REQUEST
    mode: TransferMode = TransferMode.LATENCY
    preempt: bool = False
    """send pages that are asked for over a connection of their own. The destination must have the
    capability postcopy-preempt: a 7.2 without it never reads that connection, and at the end its VM
    has zeros where these pages belong"""
    silence: float | None = 60.0
    """seconds that the destination may keep us waiting; None: no limit"""


class RestoreError(PostcopyError):
    """The destination did not take the VM; the text says at which point and what may be wrong."""


def restore(
    vm: SavedVm,
    address: Address | None,
    qemu: IncomingQemu | None = None,
    *,
    options: RestoreOptions | None = None,
    on_progress: Callable[[SourceStatistics], None] | None = None,
    may_drain: Callable[[], bool] | None = None,
) -> SourceStatistics:
    """Deliver `vm` to the destination that waits at `address`; what was sent.

    With `qemu` it is made to wait there before, and its migration's end is waited for; without
    an address it is given a private socket. `may_drain` is asked, while only requests are
    answered, whether the rest may be sent now.

    RestoreError when the destination does not take the VM; RemoteProtocolError (channel FILE) and
    OSError when the save file can't be read any more.
    """
    options = options or RestoreOptions()
    with contextlib.ExitStack() as stack:
        if address is None:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="postcopy-"))
            address = Address("unix", path=f"{directory}/incoming")
        try:
            if qemu is not None:
                qemu.listen(address, preempt=options.preempt)
            forward = stack.enter_context(connect(address, options.silence))

            def connect_preempt() -> socket.socket:
                wait_until_accepted(forward, options.silence)
                return stack.enter_context(connect(address, options.silence))

            second = connect_preempt if options.preempt else None
            statistics = Restore(vm, forward, options, on_progress, may_drain, second).run()
            if qemu is not None:
                _wait_for(qemu, options.silence)
        except RestoreError as error:
            said = qemu.failure() if qemu is not None else ""
            raise RestoreError(f"{error}. {said}" if said else str(error)) from error
    return statistics


def _wait_for(qemu: IncomingQemu, timeout: float | None) -> None:
    """Until it has completed the migration; RestoreError when it does not, though it has said SHUT
    and so has all of the VM."""
    try:
        qemu.wait(timeout)
    except (QmpError, RemoteProtocolError) as error:
        raise RestoreError(
            f"{error}. It had taken every page: look whether the VM runs there; if it does not, "
            "the save file is as it was and can be restored again"
        ) from error


class Restore:
    """One restore of `vm` over the connected socket `forward`; see `restore`.

    `connect_preempt` makes the second connection, when it is time for that.
    """

    def __init__(
        self,
        vm: SavedVm,
        forward: socket.socket,
        options: RestoreOptions,
        on_progress: Callable[[SourceStatistics], None] | None = None,
        may_drain: Callable[[], bool] | None = None,
        connect_preempt: Callable[[], socket.socket] | None = None,
    ) -> None:
        self._vm = vm
        self._options = options
        self._may_drain = may_drain
        self._connect_preempt = connect_preempt
        self._connection = SourceConnection(
            vm,
            vm.configuration,
            target_page_size=vm.target_page_size,
            section_id=vm.section_id or RAM_SECTION_ID,
            preempt=connect_preempt is not None,
            order=options.order,
        )
        self._loop = SourceLoop(
            self._connection,
            forward,
            mode=options.mode,
            silence=options.silence,
            bandwidth=options.bandwidth or None,
            on_progress=on_progress,
        )

    def run(self) -> SourceStatistics:
        """The whole restore, up to the destination's SHUT."""
        connection, loop = self._connection, self._loop
        try:
            loop.send([connection.start()])
            if self._connect_preempt is not None:
                # Behind the header: 10.1 and later know the first connection by it. Before any
                # answer: 7.1 and 7.2 read nothing until both are there.
                loop.open_preempt(self._connect_preempt())
            loop.send(connection.switchover(None, self._vm.device_state))
            loop.statistics.package_at = time.monotonic()
            if self._options.bandwidth == 0:
                loop.deliver(until=self._drains, background=False)
            loop.deliver()
            loop.finish()
        except (TransportError, RemoteProtocolError) as error:
            if isinstance(error, RemoteProtocolError) and error.channel is Channel.FILE:
                raise
            raise RestoreError(f"{error}; {self._advice()}") from error
        return loop.statistics

    def _drains(self) -> bool:
        """Whether the rest is to be sent, though only requests were to be answered."""
        if self._may_drain is not None and self._may_drain():
            return True
        after, package_at = self._options.drain_after, self._loop.statistics.package_at
        assert package_at is not None
        return after is not None and time.monotonic() - package_at >= after

    def _advice(self) -> str:
        """What to look at, by how far the destination had come."""
        if self._loop.statistics.loaded_at is None:
            machine = self._vm.configuration.machine
            return (
                "it has not run the VM. Check what QEMU printed, and that it has the machine type "
                f"{machine}, the same devices and memory as the saved VM (--page-size, if that is "
                "on huge pages), and the capability postcopy-ram, which must be set before "
                "migrate-incoming, as must postcopy-preempt: with --preempt, and only then"
            )
        if self._connection.owed:
            return (
                "the VM ran there with a part of its memory and is lost; the save file is as it "
                "was and can be restored again"
            )
        return "all pages had been sent: ask QEMU (query-migrate) whether the VM runs"
