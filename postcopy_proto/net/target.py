"""What a destination's memory is: a guest process, a save file, or both.

The loop calls a target at each step of a migration, in the order in which QEMU's
migration/savevm.c calls migration/postcopy-ram.c: `open` is its postcopy_ram_incoming_init,
`prepare_discard` postcopy_ram_prepare_discard, `listen` postcopy_ram_enable_notify, `finish`
postcopy_ram_incoming_cleanup.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from postcopy_proto import messages as m
from postcopy_proto.destination import DestinationConnection
from postcopy_proto.errors import Channel, PostcopyError
from postcopy_proto.net.guest import GuestProcess, Touch
from postcopy_proto.ramblock import TARGET_PAGE_SIZE, RAMBlock
from postcopy_proto.savefile.writer import SaveFileSink
from postcopy_proto.userfault.backend import Backend
from postcopy_proto.userfault.descriptor import OwnerGoneError
from postcopy_proto.userfault.statistics import FaultStatistics

COMPARE_BYTES = 1 << 20

TOUCH_SECONDS = 30.0
"""How long the guest's last touches may take once every page has arrived."""

TouchPlan = Callable[[GuestProcess, DestinationConnection], Touch | None]
"""Starts what a guest does once it runs."""


class VerificationError(PostcopyError):
    """Memory differs from what was sent; the text names block and offset."""


class GuestTarget:
    """A process that owns the RAM, faults on it, and is served through the backend.

    The process and its memory live from `open` to `close`, which has to be called on every path.
    """

    def __init__(self, plan: TouchPlan, *, user_mode_only: bool | None = None) -> None:
        self._plan = plan
        self._user_mode_only = user_mode_only
        self._guest: GuestProcess | None = None
        self._backend: Backend | None = None
        self._connection: DestinationConnection | None = None
        self._listening = False
        self.touch: Touch | None = None
        """what the guest was told to touch, once it runs"""

    wants_runs = True
    """one COPY places all of them"""

    @property
    def guest(self) -> GuestProcess:
        """The process; only after `open`."""
        assert self._guest is not None
        return self._guest

    @property
    def backend(self) -> Backend:
        """What serves its faults; only after `open`."""
        assert self._backend is not None
        return self._backend

    @property
    def statistics(self) -> FaultStatistics:
        """Faults, latencies, placements."""
        return self.backend.stats

    def open(self, connection: DestinationConnection) -> None:
        """Start the process with this RAM, and make it truly empty."""
        self._connection = connection
        blocks = list(connection.blocks.values())
        self._guest = GuestProcess.start(blocks, user_mode_only=self._user_mode_only)
        self._backend = Backend(self._guest.regions)
        self._backend.incoming_init()

    def place(self, pages: m.Pages, channel: Channel) -> None:
        """Into the process's memory; atomically from LISTEN on."""
        try:
            self.backend.place(pages, channel)
        except OwnerGoneError as error:
            raise self.guest.how_it_ended() from error

    def prepare_discard(self) -> None:
        """Huge pages off, so that parts of them can be dropped."""
        self.backend.prepare_discard()

    def discard(self, block: str, start: int, length: int) -> None:
        """Drop the range: it reads as missing from now on."""
        self.backend.discard(block, start, length)

    def listen(self) -> None:
        """Register the memory; faults come from now on."""
        self.backend.enable_notify()
        self._listening = True

    def run(self) -> None:
        """Let the process touch its memory."""
        assert self._connection is not None
        self.touch = self._plan(self.guest, self._connection)

    def device_state(self, data: bytes) -> None:
        """A process that only touches memory has no devices."""

    def fileno(self) -> int | None:
        """The userfaultfd."""
        return self.backend.fileno() if self._listening else None

    def read_faults(self) -> list[tuple[str, int]]:
        """Host pages that the process waits for."""
        try:
            return self.backend.read_faults()
        except OwnerGoneError as error:
            raise self.guest.how_it_ended() from error

    @property
    def pending(self) -> bool:
        """Whether faults wait in the backend, which the userfaultfd does not show."""
        return self.backend.pending

    def tick(self) -> None:
        """Notice a process that died."""
        if self._guest is not None:
            self._guest.receive()

    def finish(self) -> None:
        """Unregister the memory, which wakes whoever still waits, and let the touches end."""
        self.backend.cleanup()
        self._listening = False
        if self.touch is not None:
            self.touch.wait(TOUCH_SECONDS)

    def close(self) -> None:
        """End the process; nothing of it remains, nor of what served it."""
        if self._guest is not None:
            self._guest.close()
        # Only then: it lets go whoever still waits for a page, to read zeros.
        if self._backend is not None:
            self._backend.cleanup()


class FileTarget:
    """A save file that a stock QEMU loads, and perhaps a guest process beside it."""

    def __init__(self, path: Path, guest: GuestTarget | None = None) -> None:
        self._path = path
        self._guest = guest
        self._sink: SaveFileSink | None = None
        self._blocks: list[RAMBlock] = []
        self._device_state = b""

    wants_runs = False
    """records go into the file as they are, which saves more than a guest's memory would gain"""

    @property
    def sink(self) -> SaveFileSink:
        """The file that is being written; only after `open`."""
        assert self._sink is not None
        return self._sink

    def open(self, connection: DestinationConnection) -> None:
        """Begin the file: header, configuration and block list."""
        assert connection.configuration is not None  # by the state table
        assert connection.ram_section_id is not None
        self._blocks = list(connection.blocks.values())
        # Host page sizes stay out: the file is loaded as precopy, where the list has no such field.
        entries = (m.RamBlockEntry(block.idstr, block.used_length) for block in self._blocks)
        self._sink = SaveFileSink(
            self._path,
            connection.configuration,
            m.RamBlockList(tuple(entries)),
            section_id=connection.ram_section_id,
        )
        if self._guest is not None:
            self._guest.open(connection)

    def place(self, pages: m.Pages, channel: Channel) -> None:
        """Into the file first: a guest that wakes may not be ahead of it."""
        self.sink.place(pages)
        if self._guest is not None:
            self._guest.place(pages, channel)

    def prepare_discard(self) -> None:
        """Only a guest's memory needs preparing."""
        if self._guest is not None:
            self._guest.prepare_discard()

    def discard(self, block: str, start: int, length: int) -> None:
        """Forget the range in both."""
        self.sink.discard(block, start, length)
        if self._guest is not None:
            self._guest.discard(block, start, length)

    def listen(self) -> None:
        """Only a guest listens for faults."""
        if self._guest is not None:
            self._guest.listen()

    def run(self) -> None:
        """Only a guest runs."""
        if self._guest is not None:
            self._guest.run()

    def device_state(self, data: bytes) -> None:
        """Kept for the end of the file: device sections stand behind RAM there."""
        self._device_state = data

    def fileno(self) -> int | None:
        """The guest's userfaultfd, if there is one."""
        return self._guest.fileno() if self._guest is not None else None

    def read_faults(self) -> list[tuple[str, int]]:
        """The guest's faults."""
        return self._guest.read_faults() if self._guest is not None else []

    @property
    def pending(self) -> bool:
        """The guest's, if there is one."""
        return self._guest is not None and self._guest.pending

    def tick(self) -> None:
        """Notice a guest that died."""
        if self._guest is not None:
            self._guest.tick()

    def finish(self) -> None:
        """Let the guest's touches end, and give the file its final name."""
        if self._guest is not None:
            self._guest.finish()
        # On disk it is only after `close`: until then the VM is where a stock destination would
        # have it too, in this host's memory, and the source need not wait for a disk.
        self.sink.finish(self._device_state)

    def verify(self) -> None:
        """Compare the memory of a guest that ran with the file; VerificationError on a difference.

        After `finish`, and after the source has its SHUT: a check of ours need not keep it waiting.
        """
        if self._guest is not None and self._guest.touch is not None:
            compare(self._guest.guest, self._blocks, self.sink.read)

    def close(self) -> None:
        """End the guest; bring the file to disk, or remove it if it was not finished."""
        try:
            if self._guest is not None:
                self._guest.close()
        finally:
            if self._sink is not None:
                self._sink.close()


def compare(
    guest: GuestProcess,
    blocks: Sequence[RAMBlock],
    expected: Callable[[str, int, int], bytes | memoryview],
) -> int:
    """Compare a guest's memory with `expected(block, offset, length)`, byte for byte.

    Returns the number of bytes compared; VerificationError names the first page that differs.
    """
    compared = 0
    for block in blocks:
        for offset in range(0, block.used_length, COMPARE_BYTES):
            length = min(COMPARE_BYTES, block.used_length - offset)
            seen, sent = (
                guest.read(block.idstr, offset, length),
                expected(block.idstr, offset, length),
            )
            if seen != sent:
                differ = np.flatnonzero(
                    np.frombuffer(seen, np.uint8) != np.frombuffer(sent, np.uint8)
                )
                at = offset + int(differ[0])
                pages = len(np.unique(differ // TARGET_PAGE_SIZE))
                raise VerificationError(
                    f"{block.idstr} at {at:#x}: the guest sees other bytes than were sent "
                    f"({pages} pages differ within this MiB)"
                )
            compared += length
    return compared


def random_missing_pages(count: int, seed: int | None = None) -> TouchPlan:
    """A plan of `count` target pages, at random out of those that have not arrived by then."""

    def plan(guest: GuestProcess, connection: DestinationConnection) -> Touch | None:
        random = np.random.default_rng(seed)
        missing = {
            name: np.flatnonzero(~np.frombuffer(bitmap.bits.unpack(), np.bool_))
            for name, bitmap in connection.received.items()
        }
        total = sum(map(len, missing.values()))
        chosen = random.choice(total, min(count, total), replace=False)
        offsets = {}
        for name, pages in missing.items():
            offsets[name] = pages[chosen[chosen < len(pages)]] * TARGET_PAGE_SIZE
            chosen = chosen[chosen >= len(pages)] - len(pages)
        return guest.touch(offsets) if total else None

    return plan


def every_page(order: str, seed: int) -> TouchPlan:
    """A plan of all pages of all blocks, `random` or `sequential`."""
    return lambda guest, _: guest.touch(order=order, seed=seed)
