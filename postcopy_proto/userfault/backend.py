"""`Backend`: guest RAM that fills by postcopy. The counterpart of QEMU's postcopy-ram.c.

The calls come in the order of a migration:

    backend = Backend(regions)
    backend.incoming_init()           ADVISE: RAM truly empty
    backend.place(pages)              precopy: plain writes
    backend.prepare_discard()         before the first discard: no huge pages
    backend.discard(block, start, n)  what the source dirtied again
    backend.enable_notify()           LISTEN: userfaultfd opened, every block registered
    backend.read_faults()             what the guest waits for
    backend.place(pages)              postcopy: COPY and ZEROPAGE
    backend.cleanup()                 huge pages back, unregistered, closed

One thread does all of it: poll `fileno()`, read faults, ask for them, place what arrives. The
userfaultfd is non-blocking and nothing here waits. Offsets and lengths are bytes within a block.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from operator import length_hint
from typing import Final, NoReturn

from bitarray import bitarray

from postcopy_proto.errors import (
    Channel,
    ErrorKind,
    PostcopyError,
    RemoteProtocolError,
    UserfaultError,
)
from postcopy_proto.messages import Pages
from postcopy_proto.ramblock import TARGET_PAGE_SIZE
from postcopy_proto.userfault.abi import Event, FaultFlags, Features, Ioctls
from postcopy_proto.userfault.blocks import GuestBlock, GuestBlocks
from postcopy_proto.userfault.descriptor import (
    MESSAGE_SIZE,
    PAGEFAULT,
    UNPACK_FAULTS,
    AgainError,
    AlreadyPresentError,
    AnyEvent,
    ForkEvent,
    NotRegisteredError,
    OwnerGoneError,
    RemapEvent,
    RemoveEvent,
    ResolveError,
    UnmapEvent,
    Userfaultfd,
)
from postcopy_proto.userfault.placing import Placer, refuse_empty_pool
from postcopy_proto.userfault.region import Region
from postcopy_proto.userfault.staging import address_of
from postcopy_proto.userfault.statistics import FaultStatistics

trace = logging.getLogger("postcopy_proto.trace")
log = logging.getLogger(__name__)

_EVENTS: Final = 14
"""Events taken by one read; fewer mean that no more waited. More would need a buffer that Python
takes from the system for each read."""
_READS: Final = 64
"""Reads before one turn of `answering` ends, even if a guest faults as fast as it is answered: its
caller has more to look at."""
_WRITE: Final = int(FaultFlags.WRITE)
"""The flags of a fault on a missing page are at most this; others are MINOR and WP."""


class Backend:
    """A PageSink over regions of one owner; see the module's text for the order of calls.

    `user_mode_only` as for `Userfaultfd.open`; the default takes what is allowed, and
    `.user_mode_only` says what that was. `lock_memory` locks the owner's memory again at cleanup.
    `inhibit_discards(True)` is called before the regions are registered and `(False)` at cleanup:
    the hook for balloons and whoever else drops guest pages. `huge_pages` allows them again at
    cleanup. ValueError when regions are none, of several owners, or share a name.
    """

    def __init__(
        self,
        regions: Sequence[Region],
        *,
        target_page_size: int = TARGET_PAGE_SIZE,
        user_mode_only: bool | None = None,
        lock_memory: bool = False,
        inhibit_discards: Callable[[bool], None] | None = None,
        huge_pages: bool = True,
    ) -> None:
        if not regions:
            raise ValueError("a backend needs at least one region")
        self._owner = regions[0].owner
        if any(region.owner is not self._owner for region in regions):
            raise ValueError("all regions of a backend belong to one owner")
        for region in regions:
            if region.block.page_size < target_page_size:
                raise ValueError(f"{region}: target pages are bigger than its host pages")
        self._page_size = target_page_size
        self._blocks = GuestBlocks(regions, target_page_size)
        self._wanted_mode = user_mode_only
        self._lock_memory = lock_memory
        self._inhibit_discards = inhibit_discards
        self._huge_pages = huge_pages
        self._uffd: Userfaultfd | None = None
        self._forks: list[Userfaultfd] = []
        self._no_huge_pages = False
        self._kept = b""
        self._wanted: list[tuple[str, int]] = []
        self._serving_thread = 0
        self._tracing = False
        self._ended = False
        self.received: dict[str, bitarray] = {block.idstr: block.received for block in self._blocks}
        """per block one bit a target page, little-endian bit order: has arrived"""
        self.stats = FaultStatistics()
        self._placer = Placer(self._blocks, target_page_size, self.stats, self._collect_events)

    # ---- before LISTEN

    def incoming_init(self) -> None:
        """Drops all RAM, before any page arrives: it must be truly empty.

        Memory is unlocked first: locked pages can't be dropped. ValueError after `enable_notify`.
        (postcopy_ram_incoming_init, and the munlockall of postcopy_ram_supported_by_host)
        """
        self._check_not_listening()
        self._owner.lock_memory(False)
        for block in self._blocks:
            self._owner.discard(block.region, 0, block.length)
            block.received.setall(False)
            if trace.isEnabledFor(logging.DEBUG):
                trace.debug(
                    "postcopy_init_range %s: %#x offset=%#x length=%#x",
                    *(block.idstr, block.address, 0, block.length),
                )
        self._owner.flush()

    def prepare_discard(self) -> None:
        """No transparent huge pages from here on: a discard must really drop parts of one.

        Not earlier, so that most of precopy enjoys them. (postcopy_ram_prepare_discard)
        """
        self._check_not_ended()
        self._no_huge_pages = True
        for block in self._blocks:
            self._owner.advise_huge_pages(block.region, False)
            if trace.isEnabledFor(logging.DEBUG):
                trace.debug(
                    "postcopy_nhp_range %s: %#x offset=%#x length=%#x",
                    *(block.idstr, block.address, 0, block.length),
                )
        self._owner.flush()

    def discard(self, block: str, start: int, length: int) -> None:
        """Drops [start, start + length) of a block; the pages will come again.

        Whole host pages inside the block, before `enable_notify`: RemoteProtocolError
        otherwise, with nothing dropped. (postcopy_ram_discard_range)
        """
        self._check_not_ended()
        message = "POSTCOPY_RAM_DISCARD"
        if self._uffd is not None:
            raise RemoteProtocolError(
                f"discard of {block} after LISTEN", kind=ErrorKind.STATE, message=message
            )
        target = self._blocks.named(block, message)
        host = target.host_page_size
        if start < 0 or length < 0 or start + length > target.length or (start | length) % host:
            raise RemoteProtocolError(
                f"discard {start:#x} + {length:#x} is no range of whole host pages ({host}) "
                f"inside {block} of {target.length:#x} bytes",
                kind=ErrorKind.RANGE,
                message=message,
            )
        pages = slice(start // self._page_size, (start + length) // self._page_size)
        target.received[pages] = False
        self._owner.discard(target.region, start, length)
        target.dropped[pages] = self._no_huge_pages
        if trace.isEnabledFor(logging.DEBUG):
            trace.debug(
                "postcopy_ram_discard_range %s: start=%#x length=%#x",
                *(block, target.address + start, length),
            )

    def enable_notify(self) -> None:
        """Opens the userfaultfd and registers every block: from here on missing pages fault.

        Pages that have not come are missing: what a huge page brought beside a page of precopy is
        dropped. UserfaultError when the host can't, with everything opened closed again.
        (postcopy_ram_enable_notify, ram_block_enable_notify)
        """
        self._check_not_listening()
        if self._inhibit_discards is not None:
            self._inhibit_discards(True)
        try:
            self._uffd = uffd = self._open()
        except BaseException:
            if self._inhibit_discards is not None:
                self._inhibit_discards(False)
            raise
        if self._wanted_mode is None and uffd.user_mode_only:
            log.info("userfaultfd in user mode only: faults inside the kernel fail")
        self._serving_thread = threading.get_ident()
        for block in self._blocks:
            block.region.before_read = self._guard(block)
        # Once, for all faults: on their way nothing is asked that can be known before.
        self._tracing = self._placer.tracing = trace.isEnabledFor(logging.DEBUG)
        trace.debug("postcopy_ram_enable_notify")

    def _open(self) -> Userfaultfd:
        """The owner's userfaultfd with every block registered."""
        self._owner.flush()
        self._owner.lock_memory(False)
        # A guest that drops, unmaps or moves pages while being served must not be given their old
        # content. THREAD_ID is for the statistics.
        features = self._owner.available_features() & (
            Features.EVENT_REMOVE | Features.EVENT_UNMAP | Features.EVENT_REMAP | Features.THREAD_ID
        )
        uffd, registered = self._owner.open_userfaultfd(features, self._wanted_mode)
        try:
            if not registered:
                self._drop_stale_pages()
            for block in self._blocks:
                if not registered:
                    self._register(uffd, block)
                elif block.host_page_size != self._page_size:
                    block.can_zeropage = False
        except BaseException:
            uffd.close()
            raise
        return uffd

    def _drop_stale_pages(self) -> None:
        """Empties what has not come: a source need not discard what it never sent."""
        if not self._no_huge_pages:
            # No discard came, and with it nobody who said so. (loadvm_postcopy_handle_listen)
            self.prepare_discard()
        for block in self._blocks:
            for start, end in block.stale_runs():
                self._owner.discard(block.region, start, end - start)
        self._owner.flush()

    @staticmethod
    def _register(uffd: Userfaultfd, block: GuestBlock) -> None:
        offered = uffd.register(block.address, block.length)
        needed = Ioctls.COPY | Ioctls.WAKE
        if offered & needed != needed:
            raise UserfaultError(
                "UFFDIO_REGISTER",
                errno.ENOTSUP,
                os.strerror(errno.ENOTSUP),
                f"{block.idstr}: missing {needed & ~offered!r}",
            )
        block.can_zeropage = bool(offered & Ioctls.ZEROPAGE)

    @property
    def listening(self) -> bool:
        """Between `enable_notify` and `cleanup`."""
        return self._uffd is not None

    @property
    def user_mode_only(self) -> bool | None:
        """Whether faults inside the kernel fail instead of being served; None: not known."""
        return None if self._uffd is None else self._uffd.user_mode_only

    def fileno(self) -> int:
        """The userfaultfd, for poll; ValueError before `enable_notify` and after `cleanup`."""
        return self._descriptor().fileno()

    # ---- faults

    def read_faults(self) -> list[tuple[str, int]]:
        """(idstr, offset) of every host page newly waited for, or asked for by `want`.

        Drains all events that wait. Pages that have arrived are woken, pages reported before
        are not reported again. UserfaultError for an address outside all regions. The offsets
        are of host pages. (postcopy_ram_fault_thread)
        """
        uffd = self._descriptor()
        self._serving_thread = threading.get_ident()
        kept, self._kept = self._kept, b""
        messages = kept or uffd.read_messages(_EVENTS)
        while messages:
            self._take(uffd, messages)
            if len(messages) < _EVENTS * MESSAGE_SIZE and not kept:
                break
            kept, messages = b"", uffd.read_messages(_EVENTS)
        requests, self._wanted = self._wanted, []
        return requests

    @property
    def pending(self) -> bool:
        """Whether `read_faults` has something to report though the descriptor is not readable.

        What `want` asked for, and faults that were read in the middle of a placement: a loop
        polls with a timeout of 0 while this is true.
        """
        return bool(self._kept or self._wanted)

    def _take(self, uffd: Userfaultfd, messages: bytes) -> None:
        """The events of one read; those behind one that is an error are kept."""
        now, events = time.perf_counter_ns(), UNPACK_FAULTS(messages)
        try:
            for event, flags, address, thread_id in events:
                if event == PAGEFAULT:
                    self._fault(address, flags, thread_id, now)
                else:
                    self._other_event(uffd.decode(_current(messages, events)))
        except BaseException:
            self._kept += _rest(messages, events)
            raise

    def answering(self, sources: Mapping[str, int]) -> Callable[[], int]:
        """A function that places every page waited for, from memory of this process.

        `sources` has for each block the address of its bytes, all of them: a mapped file of the
        VM's RAM, mostly. Each call drains the events that wait, answers them and what `want` asked
        for, and returns how many host pages it placed. It does what `read_faults` and `place_page`
        do, without the parts that only matter while a page is on its way. It is made once, by the
        thread that calls it, and keeps at hand what it needs: a vCPU waits for every step.
        Errors as for both; ValueError for a block without a source, and before `enable_notify`.
        """
        if missing := [block.idstr for block in self._blocks if block.idstr not in sources]:
            raise ValueError(f"no source for {', '.join(missing)}")
        uffd, blocks, stats, size = self._descriptor(), self._blocks, self.stats, self._page_size
        fd, room, read, clock = uffd.fileno(), _EVENTS * MESSAGE_SIZE, os.read, time.perf_counter_ns
        place, waits, threads = (
            self._placer.place_host_page,
            stats.waits_ns.append,
            stats.waited_threads.append,
        )
        block = next(iter(blocks))  # where the last fault was, and the next one mostly is
        self._serving_thread = threading.get_ident()

        def answer() -> int:
            nonlocal block
            if self._uffd is not uffd:
                raise ValueError("the backend was cleaned up")
            answered = 0
            # Not only until a read takes less than it could: a thread that was woken on this CPU
            # has mostly run up to its next fault before we go on, and a poll is saved.
            for _ in range(_READS):
                try:
                    messages = read(fd, room)
                except BlockingIOError:
                    break
                except OSError:
                    messages = uffd.read_messages(_EVENTS)  # says it in our words
                now, events = clock(), UNPACK_FAULTS(messages)
                try:
                    for event, flags, address, thread_id in events:
                        if event != PAGEFAULT:
                            self._other_event(uffd.decode(_current(messages, events)))
                            continue
                        if flags > _WRITE:
                            self._fault(address, flags, thread_id, now)
                            continue
                        stats.faults += 1
                        if not block.address <= address < block.end:
                            block, _ = blocks.at(address)
                        offset = (address - block.address) & -block.host_page_size
                        if block.received[offset // size]:
                            self._answer_received(block, offset)
                        else:
                            place(uffd, block, offset, sources[block.idstr] + offset)
                            answered += 1
                        waits(clock() - now)
                        threads(thread_id)
                except BaseException:
                    self._kept += _rest(messages, events)
                    raise
            while self._kept or self._wanted:
                answered += self._answer_kept(sources)
            return answered

        return answer

    def _answer_kept(self, sources: Mapping[str, int]) -> int:
        """Places what `want` asked for and what was read in the middle of a placement."""
        requests = self.read_faults()
        for idstr, offset in requests:
            self.place_page(idstr, offset, sources[idstr] + offset)
        return len(requests)

    def want(self, block: str, start: int, length: int) -> int:
        """Asks for the missing host pages of a range as if the guest had touched them.

        They come with the next `read_faults`; returns how many there are. The way for the
        serving thread to get at memory: ask, go on serving until none is missing, read.
        """
        target = self._blocks.named(block, "want")
        pages = target.missing(start, length)
        for page in pages:
            if page not in target.waiting:
                target.waiting[page] = []
                self._wanted.append((block, page))
        return len(pages)

    def missing(self, block: str, start: int, length: int) -> list[int]:
        """Byte offsets of the host pages of a range that have not arrived."""
        return self._blocks.named(block, "missing").missing(start, length)

    def _fault(self, address: int, flags: int, thread_id: int, now: int) -> None:
        stats = self.stats
        stats.faults += 1
        block, offset = self._blocks.at(address)
        host_page = offset & -block.host_page_size
        if flags > _WRITE:
            self._let_through(block, host_page, flags)
            stats.add_wait(thread_id, time.perf_counter_ns() - now)
            return
        if block.received[host_page // block.page_size]:
            self._answer_received(block, host_page)
            stats.add_wait(thread_id, time.perf_counter_ns() - now)
            return
        waiters = block.waiting.get(host_page)
        if waiters is not None:
            waiters.append((thread_id, now))
            return
        block.waiting[host_page] = [(thread_id, now)]
        stats.requested += 1
        self._wanted.append((block.idstr, host_page))
        if self._tracing:
            trace.debug(
                "postcopy_ram_fault_thread_request Request for HVA=%#x rb=%s offset=%#x",
                *(address, block.idstr, host_page),
            )

    def _let_through(self, block: GuestBlock, host_page: int, flags: int) -> None:
        """A fault on a page that is there: its owner registered more than missing ones.

        Nobody here has a use for them, and the thread waits: MINOR is answered with what the file
        has, and write protection is lifted.
        """
        uffd = self._descriptor()
        address, length = block.address + host_page, block.host_page_size
        try:
            if flags & FaultFlags.MINOR:
                uffd.continue_(address, length)
                self.stats.minor += 1
            else:
                uffd.write_protect(address, length, protect=False)
                self.stats.write_protected += 1
        except (AlreadyPresentError, AgainError, NotRegisteredError):
            self.stats.woken += 1
            uffd.wake(address, length)

    def _answer_received(self, block: GuestBlock, host_page: int) -> None:
        """A fault on a page that counts as received."""
        if self._make_present(block, host_page):
            self.stats.zero_filled += 1
        else:
            self.stats.woken += 1
            self._descriptor().wake(block.address + host_page, block.host_page_size)

    def _make_present(self, block: GuestBlock, host_page: int) -> bool:
        """A page that counts as received: whether it was missing, and zeros were put there.

        It is there by now; or it was, until the guest dropped it; or it came as a zero page in
        precopy, which leaves empty memory empty. All that can be missing are zeros.
        """
        try:
            address, length = block.address + host_page, block.host_page_size
            self._placer.zero(self._descriptor(), block, address, length)
        except AgainError:
            return False
        except AlreadyPresentError as error:
            refuse_empty_pool(block, host_page, error)
            return False
        except NotRegisteredError:
            # Whoever waits there has to be woken all the same, to meet its SIGSEGV.
            log.debug("%s at %#x was unmapped by the guest", block.idstr, host_page)
            return False
        return True

    def _other_event(self, event: AnyEvent) -> None:
        if isinstance(event, RemoveEvent | UnmapEvent):
            self._removed(event.start, event.end, unmapped=isinstance(event, UnmapEvent))
        elif isinstance(event, ForkEvent):
            # Closed, its missing pages would read as zeros; open, whoever touches one waits.
            self.stats.forks += 1
            self._forks.append(event.uffd)
            log.warning("the guest's process forked; the new one's missing pages are not served")
        elif isinstance(event, RemapEvent):
            raise UserfaultError(
                "mremap",
                errno.EFAULT,
                os.strerror(errno.EFAULT),
                f"the guest's process moved its RAM from {event.source:#x}",
            )
        else:
            self.stats.unknown_events += 1
            log.warning("userfaultfd event %r is not known and was skipped", event)

    def _removed(self, start: int, end: int, *, unmapped: bool) -> None:
        """The guest dropped pages: they are zero now, and what still arrives for them is old."""
        for block, low, high in self._blocks.overlapping(start, end):
            host = block.host_page_size
            block.received[low // self._page_size : -(-high // self._page_size)] = True
            self.stats.removed += (high - low) // host
            if unmapped:
                block.unmapped.append((low, high))
            for page in [page for page in block.waiting if low <= page < high]:
                self._answer_received(block, page)
                block.resolved(page, host, self.stats)

    def _collect_events(self) -> None:
        """Reads events in the middle of a placement: the owner can only go on when they are read.

        Removals take effect at once; faults keep for the next `read_faults`.
        """
        uffd = self._descriptor()
        messages = uffd.read_messages(_EVENTS)
        for position in range(0, len(messages), MESSAGE_SIZE):
            message = messages[position : position + MESSAGE_SIZE]
            if message[0] == PAGEFAULT:
                self._kept += message
                continue
            try:
                self._other_event(uffd.decode(message))
            except BaseException:
                self._kept += messages[position + MESSAGE_SIZE :]
                raise

    def _guard(self, block: GuestBlock) -> Callable[[int, int], None]:
        """The check that the serving thread does not wait for itself."""

        def check(offset: int, length: int) -> None:
            if threading.get_ident() != self._serving_thread or self._uffd is None:
                return
            missing = block.missing(offset, length)
            if not missing:
                self._populate(block, offset, length)
            else:
                raise UserfaultError(
                    "read",
                    errno.EDEADLK,
                    os.strerror(errno.EDEADLK),
                    f"{len(missing)} pages of {block.idstr} are missing and this thread serves "
                    "them",
                    "ask for them by Backend.want and go on serving",
                )

        return check

    def _populate(self, block: GuestBlock, offset: int, length: int) -> None:
        """Makes received pages present: a zero page of precopy may still be empty memory."""
        host = block.host_page_size
        for page in range(offset & -host, offset + length, host):
            self._make_present(block, page)

    # ---- placing

    def place(self, pages: Pages, channel: Channel = Channel.FORWARD) -> None:
        """Puts a batch in its place; before `enable_notify` by writing, then by COPY, ZEROPAGE.

        Contiguous pages go by one ioctl. Where host pages are bigger than target pages, they
        are collected per channel and placed whole. Pages that came before (in postcopy) are
        dropped and counted. RemoteProtocolError for an unknown block, offsets outside it or
        misaligned, a page of the wrong host page; UserfaultError when memory runs out or
        the owner has gone. (postcopy_place_page, postcopy_place_page_zero)
        """
        self._check_not_ended()
        if self._uffd is not None:
            if len(pages) == 1 and self._place_single(pages):
                return
            pages = self._placer.place_scattered(self._uffd, pages)
        if len(pages) == 0:
            return
        block, runs = self._placer.check(pages, channel)
        if self._uffd is not None:
            self._placer.place(self._uffd, block, pages, runs, channel)
        else:
            self._owner.flush()
            self._placer.write(block, pages)

    def place_page(self, block: str, offset: int, source: int | None) -> None:
        """Places one host page, from `enable_notify` on: what a vCPU waits for is mostly one.

        The bytes are at address `source` of this process, or zeros when that is None; `offset`
        is the host page's in its block. The short way for who has pages at hand and no stream of
        them. Errors as for `place`; ValueError when not listening. (postcopy_place_page,
        postcopy_place_page_zero)
        """
        target, uffd = self._blocks.by_name.get(block), self._uffd
        if target is None or uffd is None:
            self._refuse_page(block, offset)
        if offset % target.host_page_size or not 0 <= offset < target.length:
            self._refuse_page(block, offset)
        self._placer.place_host_page(uffd, target, offset, source)

    def _place_single(self, pages: Pages) -> bool:
        """A batch of one target page that is a host page; False when it is something else."""
        block, size = self._blocks.by_name.get(pages.block), self._page_size
        if block is None or block.host_page_size != size or pages.page_size != size:
            return False
        offset, position, data = int(pages.offsets[0]), int(pages.positions[0]), pages.data
        if (
            offset % size
            or offset >= block.length
            or (position >= 0 and position + size > len(data))
        ):
            return False
        self.place_page(pages.block, offset, None if position < 0 else address_of(data) + position)
        return True

    def _refuse_page(self, block: str, offset: int) -> NoReturn:
        self._descriptor()
        target = self._blocks.named(block, "PAGE")
        raise RemoteProtocolError(
            f"{offset:#x} is no host page ({target.host_page_size}) of {block} of "
            f"{target.length:#x} bytes",
            kind=ErrorKind.RANGE,
            message="PAGE",
        )

    # ---- the end

    def cleanup(self) -> None:
        """Huge pages allowed again, every block unregistered, everything closed.

        Whoever still waits for a page is woken and reads zeros: call it when all pages have
        arrived, or end the guest before. Memory is locked again if that was asked for. What
        can't be undone is logged, and does not fail a migration whose state is valid. Calling it
        again does nothing. (postcopy_ram_incoming_cleanup)
        """
        if self._ended:
            return
        self._ended = True
        uffd, self._uffd = self._uffd, None
        trace.debug("postcopy_ram_incoming_cleanup_entry")
        with ExitStack() as undo:  # the last first, and each whatever became of the others
            undo.callback(trace.debug, "postcopy_ram_incoming_cleanup_exit")
            undo.callback(self._placer.close)
            undo.callback(self._restore_owner)
            if uffd is not None:
                undo.callback(trace.debug, "postcopy_ram_incoming_cleanup_closeuf")
                if self._inhibit_discards is not None:
                    undo.callback(self._inhibit_discards, False)
                undo.callback(self._close, uffd)
                self._unregister(uffd)
                # The loop that serves faults is our caller: it has ended, there is none to join.
                trace.debug("postcopy_ram_incoming_cleanup_join")

    def _unregister(self, uffd: Userfaultfd) -> None:
        for block in self._blocks:
            block.region.before_read = None
            self.stats.unanswered += sum(map(len, block.waiting.values()))
            if trace.isEnabledFor(logging.DEBUG):
                trace.debug(
                    "postcopy_cleanup_range %s: %#x offset=%#x length=%#x",
                    *(block.idstr, block.address, 0, block.length),
                )
        for block in self._blocks:
            for start, end in block.mapped_ranges():
                try:
                    uffd.unregister(block.address + start, end - start)
                except OwnerGoneError:
                    log.info("the guest's process has ended; nothing is left to unregister")
                    return
                except ResolveError as error:
                    log.warning("%s could not be unregistered: %s", block.idstr, error)

    def _close(self, uffd: Userfaultfd) -> None:
        """The descriptor and those of forks, of which some may not have been looked at."""
        for position in range(0, len(self._kept), MESSAGE_SIZE):
            message = self._kept[position : position + MESSAGE_SIZE]
            if message[0] == Event.FORK:
                self._other_event(uffd.decode(message))
        self._kept = b""
        uffd.close()
        for fork in self._forks:
            fork.close()
        self._forks.clear()

    def _restore_owner(self) -> None:
        """Huge pages and locked memory, as they were; nothing where there is no owner any more."""
        try:
            os.kill(self._owner.pid, 0)
        except ProcessLookupError:
            return
        except PermissionError:
            pass  # it is there, and somebody else's
        try:
            if self._no_huge_pages and self._huge_pages:
                for block in self._blocks:
                    if not block.unmapped:
                        self._owner.advise_huge_pages(block.region, True)
            self._owner.flush()
            if self._lock_memory:
                self._owner.lock_memory(True)
        except PostcopyError as error:
            log.warning("the guest's memory is not as it was before: %s", error)

    # ---- small things

    def _descriptor(self) -> Userfaultfd:
        if self._uffd is None:
            raise ValueError("not listening: enable_notify comes first")
        return self._uffd

    def _check_not_ended(self) -> None:
        if self._ended:
            raise ValueError("the backend was cleaned up")

    def _check_not_listening(self) -> None:
        self._check_not_ended()
        if self._uffd is not None:
            raise ValueError("already listening")


def _rest(messages: bytes, events: Iterator[object]) -> bytes:
    """The messages that an iterator over them has still to give."""
    return messages[len(messages) - length_hint(events) * MESSAGE_SIZE :]


def _current(messages: bytes, events: Iterator[object]) -> bytes:
    """The message that an iterator over them gave last."""
    end = len(messages) - length_hint(events) * MESSAGE_SIZE
    return messages[end - MESSAGE_SIZE : end]
