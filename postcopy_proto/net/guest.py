"""`GuestProcess`: a process of its own that owns guest RAM and touches it on command.

It stands in for a VM: its memory faults, its threads wait, and this process serves them without
ever being able to fault on it itself. It is small (it runs without numpy), it sits in a session
of its own, so that Ctrl-C in a terminal ends it in order, and the kernel kills it when the thread
that started it ends, whatever happens.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from postcopy_proto.errors import PostcopyError, UserfaultError
from postcopy_proto.net.handover import receive_fds
from postcopy_proto.ramblock import TARGET_PAGE_SIZE, RAMBlock
from postcopy_proto.userfault.abi import Features
from postcopy_proto.userfault.descriptor import Userfaultfd
from postcopy_proto.userfault.mapping import Backing
from postcopy_proto.userfault.region import Owner, Region

_MESSAGE_MAX = 64 * 1024
_RANGES_PER_MESSAGE = 1000
_ANSWER_SECONDS = 60.0
"""How long the guest's main thread may take to answer; it touches no guest memory itself."""

# Runs the child without the package's `__init__` modules, which would import numpy.
_LAUNCHER = """
import sys, types
root, fd, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for name in ("postcopy_proto", "postcopy_proto.userfault", "postcopy_proto.net"):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [root + "/" + name.replace(".", "/")]
from postcopy_proto.net.guest_child import main
main(fd, parent)
"""


class GuestError(PostcopyError):
    """The guest process has ended, or does not answer."""


class Touch:
    """Pages being read in the guest; `done` when all have been.

    Arrays of shape (count,), in the order of the touches; entries of `latencies_ns` are 0, and of
    `words` meaningless, until that page has been read. Views of memory shared with the guest.
    """

    def __init__(self, guest: GuestProcess, blocks: list[str], plan: _Plan) -> None:
        self._guest = guest
        self._plan = plan
        self.block_names = blocks
        self.block_indexes: NDArray[np.intp] = plan.block_indexes
        """of each touch, an index into `block_names`"""
        self.offsets: NDArray[np.int64] = plan.offsets
        """of each touch, bytes in its block"""
        self.done = False

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def latencies_ns(self) -> NDArray[np.uint64]:
        """How long each read took, the wait for the page included."""
        latencies: NDArray[np.uint64] = self._plan.slots[1]
        return latencies

    @property
    def words(self) -> NDArray[np.uint64]:
        """The 8 bytes that were read at each offset, as a native integer."""
        words: NDArray[np.uint64] = self._plan.slots[2]
        return words

    @property
    def finished(self) -> int:
        """How many pages have been read so far."""
        return int(np.count_nonzero(self.latencies_ns))

    def poll(self) -> bool:
        """Whether all have been read; takes what the guest has said. GuestError if it died."""
        self._guest.receive()
        return self.done

    def wait(self, timeout: float | None = None) -> None:
        """Waits for the end. GuestError when the guest dies or `timeout` seconds pass."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.done:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise GuestError(f"{len(self) - self.finished} touches were not done in time")
            self._guest.receive(left)

    def latency_us(self) -> dict[str, float]:
        """`p50`, `p99` and `max` in µs of the reads done so far, present pages included."""
        finished = self.latencies_ns[self.latencies_ns > 0]
        if len(finished) == 0:
            return {"p50": 0.0, "p99": 0.0, "max": 0.0}
        percentiles = np.percentile(finished, (50, 99, 100)) / 1000
        p50, p99, worst = (round(float(value), 1) for value in percentiles)
        return {"p50": p50, "p99": p99, "max": worst}


class _Plan:
    """The memory file of a touch: addresses, nanoseconds, words; see `guest_child`."""

    def __init__(
        self,
        block_indexes: NDArray[np.intp],
        offsets: NDArray[np.int64],
        addresses: NDArray[np.uint64],
    ) -> None:
        self.block_indexes = block_indexes
        self.offsets = offsets
        self.fd = os.memfd_create("touch", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, max(len(offsets), 1) * 24)
        self.slots: NDArray[np.uint64] = np.memmap(
            f"/proc/self/fd/{self.fd}", np.uint64, "r+", shape=(3, len(offsets))
        )
        self.slots[0] = addresses


class GuestProcess(Owner):
    """Start one with `start`; close it, or use it as a context manager."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self._process = process
        self._control = control
        self._answers: list[tuple[dict[str, Any], list[int]]] = []
        self._touches: list[Touch] = []
        self._discards: dict[int, list[tuple[int, int]]] = {}
        self._unflushed = False
        self._user_mode_only: bool | None = None
        self.regions: list[Region] = []
        """one a block, in the order given to `start`"""

    @classmethod
    def start(
        cls,
        blocks: Sequence[RAMBlock],
        *,
        backing: Backing | str = Backing.ANONYMOUS,
        user_mode_only: bool | None = None,
    ) -> Self:
        """A guest with empty RAM for those blocks; those of huge pages are hugetlb in any case.

        Start it in a thread that outlives it. `user_mode_only` as for `Userfaultfd.open`.
        GuestError or UserfaultError when it can't be had, nothing left behind.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = str(Path(__file__).resolve().parents[2])
        command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, root]
        command += [str(theirs.fileno()), str(os.getpid())]
        try:
            with theirs:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            raise
        guest = cls(process, ours)
        try:
            guest._user_mode_only = user_mode_only
            for block in blocks:
                guest._map(block, Backing(backing))
        except BaseException:
            guest.close()
            raise
        return guest

    def _map(self, block: RAMBlock, backing: Backing) -> None:
        if block.page_size != TARGET_PAGE_SIZE:
            backing = Backing.HUGETLB
        answer, _ = self._ask(
            "map", length=block.used_length, page_size=block.page_size, backing=str(backing)
        )
        self.regions.append(Region(block, answer["address"], self))

    # ---- Owner

    @property
    def pid(self) -> int:
        """Of the guest."""
        return self._process.pid

    def open_userfaultfd(
        self, features: Features, user_mode_only: bool | None
    ) -> tuple[Userfaultfd, bool]:
        """A new descriptor of the guest's memory, opened by the guest and sent here."""
        mode = self._user_mode_only if user_mode_only is None else user_mode_only
        answer, fds = self._ask("open", features=int(features), user_mode_only=mode)
        if len(fds) != 1:
            raise GuestError("the guest sent no userfaultfd")
        try:
            return Userfaultfd.from_fd(fds[0], user_mode_only=answer["user_mode_only"]), False
        except BaseException:
            os.close(fds[0])
            raise

    def available_features(self) -> Features:
        """Of the guest's kernel and privileges."""
        answer, _ = self._ask("features")
        return Features(answer["features"])

    def discard(self, region: Region, start: int, length: int) -> None:
        """Queued; sent by the thousand, and by `flush`."""
        self._open_control()
        queue = self._discards.setdefault(self._index(region), [])
        queue.append((start, length))
        self._unflushed = True
        if len(queue) >= _RANGES_PER_MESSAGE:
            self._send_discards()

    def _send_discards(self) -> None:
        queues, self._discards = self._discards, {}
        for region, ranges in queues.items():
            for first in range(0, len(ranges), _RANGES_PER_MESSAGE):
                part = ranges[first : first + _RANGES_PER_MESSAGE]
                self._send("discard", region=region, ranges=part)

    def advise_huge_pages(self, region: Region, on: bool) -> None:
        """Sent; done with `flush`."""
        self._send_discards()
        self._send("huge_pages", region=self._index(region), on=on)
        self._unflushed = True

    def lock_memory(self, on: bool) -> None:
        """Of the guest, all of it."""
        self._send("lock_memory", on=on)
        self._unflushed = True
        self.flush()

    def flush(self) -> None:
        """Waits until the guest has done everything sent before."""
        if self._unflushed:
            self._send_discards()
            self._unflushed = False
            self._ask("flush")

    def _index(self, region: Region) -> int:
        return next(i for i, own in enumerate(self.regions) if own is region)

    # ---- what a guest does

    def touch(
        self,
        pages: Mapping[str, NDArray[np.integer[Any]]] | None = None,
        *,
        order: str = "random",
        seed: int = 0,
        count: int | None = None,
        page_size: int = TARGET_PAGE_SIZE,
        threads: int = 1,
    ) -> Touch:
        """Starts reading pages in the guest, by `threads` threads that take turns in the list.

        `pages` are byte offsets by block, in the order to touch them; by default every page of
        every block, `order` "random" (by `seed`) or "sequential", the first `count` of them.
        Returns at once.
        """
        indexes, offsets = self._plan_touches(pages, page_size)
        if pages is None and order == "random":
            shuffled = np.random.default_rng(seed).permutation(len(offsets))
            indexes, offsets = indexes[shuffled], offsets[shuffled]
        elif order not in ("random", "sequential"):
            raise ValueError(f"order is random or sequential, not {order!r}")
        indexes, offsets = indexes[:count], offsets[:count]
        if len(offsets) == 0:
            raise ValueError("no page to touch")
        bases = np.array([region.address for region in self.regions], np.uint64)
        plan = _Plan(indexes, offsets, bases[indexes] + offsets.astype(np.uint64))
        touch = Touch(self, [region.block.idstr for region in self.regions], plan)
        threads = max(1, min(threads, len(offsets)))
        # Known before it is asked for: its end may be told before the answer.
        self._touches.append(touch)
        try:
            self._ask("touch", fds=(plan.fd,), count=len(offsets), threads=threads)
        finally:
            os.close(plan.fd)
        return touch

    def _plan_touches(
        self, pages: Mapping[str, NDArray[np.integer[Any]]] | None, page_size: int
    ) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        """(index into regions, byte offset) of each touch, as two arrays."""
        lists: list[NDArray[np.int64]] = []
        numbers: list[int] = []
        for number, region in enumerate(self.regions):
            block = region.block
            if pages is None:
                wanted = np.arange(0, block.used_length, page_size, dtype=np.int64)
            elif block.idstr in pages:
                wanted = np.asarray(pages[block.idstr], np.int64)
            else:
                continue
            if len(wanted) and not (wanted.min() >= 0 and wanted.max() + 8 <= block.used_length):
                raise ValueError(f"a touch is outside {block.idstr}")
            lists.append(wanted)
            numbers.append(number)
        if not lists:
            return np.zeros(0, np.intp), np.zeros(0, np.int64)
        indexes = np.repeat(np.array(numbers, np.intp), [len(part) for part in lists])
        return indexes, np.concatenate(lists)

    def read(self, block: str, offset: int = 0, length: int | None = None) -> bytes:
        """The guest's memory; missing pages of it are zero once the backend was cleaned up.

        GuestError once it was closed.
        """
        self._open_control()  # its process id may be another's by then
        region = next(region for region in self.regions if region.block.idstr == block)
        if length is None:
            length = region.block.used_length - offset
        return region.read(offset, length)

    # ---- its life

    def fileno(self) -> int:
        """Readable when `receive` has something to take: a finished touch, or the guest's end."""
        return self._open_control().fileno()

    def _open_control(self) -> socket.socket:
        """The control socket; GuestError after `close`."""
        if self._control.fileno() < 0:
            raise GuestError(f"guest process {self.pid} was closed")
        return self._control

    @property
    def returncode(self) -> int | None:
        """None while it runs; its exit status, or minus the signal that killed it."""
        return self._process.poll()

    def receive(self, timeout: float | None = 0) -> None:
        """Takes what the guest has said, waiting up to `timeout` seconds (None: for ever).

        GuestError, saying how it ended, when it is no more.
        """
        control = self._open_control()
        control.settimeout(timeout)
        try:
            data, fds = receive_fds(control, _MESSAGE_MAX, 1)
        except (BlockingIOError, TimeoutError):
            return
        except ConnectionError:
            data = b""
        if not data:
            raise self.how_it_ended()
        message = json.loads(data)
        if message.get("touched"):
            # Touches end in any order; each says so itself by having no 0 left.
            for touch in [touch for touch in self._touches if touch.finished == len(touch)]:
                touch.done = True
                self._touches.remove(touch)
        else:
            self._answers.append((message, fds))

    def how_it_ended(self) -> GuestError:
        """The error that says so, for a guest that is known to be gone."""
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return GuestError(f"guest process {self.pid} closed its control socket")
        if status < 0:
            return GuestError(f"guest process was killed by {signal.Signals(-status).name}")
        return GuestError(f"guest process exited with status {status}")

    def _send(self, operation: str, fds: Sequence[int] = (), **fields: Any) -> None:
        message = json.dumps({"op": operation, **fields}).encode()
        control = self._open_control()
        control.settimeout(_ANSWER_SECONDS)
        try:
            socket.send_fds(control, [message], list(fds))
        except ConnectionError:
            raise self.how_it_ended() from None
        except TimeoutError:
            raise GuestError(f"guest process {self.pid} does not read its commands") from None

    def _ask(
        self, operation: str, fds: Sequence[int] = (), **fields: Any
    ) -> tuple[dict[str, Any], list[int]]:
        """One command and its answer."""
        self._send(operation, fds, **fields)
        deadline = time.monotonic() + _ANSWER_SECONDS
        while not self._answers:
            left = deadline - time.monotonic()
            if left <= 0:
                raise GuestError(f"guest process {self.pid} does not answer")
            self.receive(left)
        answer, received = self._answers.pop(0)
        if "error" in answer:
            raise UserfaultError(*answer["error"])
        return answer, received

    def close(self) -> None:
        """Ends the guest, waiting threads and all; doing it again is fine.

        What was asked of it and not done yet is forgotten: there is no memory to do it to. Asking
        for more is a GuestError.
        """
        self._discards.clear()
        self._unflushed = False
        if self._control.fileno() >= 0:
            # Its main thread answers at once; a thread that waits for a page can't be asked.
            try:
                self._control.settimeout(1)
                self._control.send(b'{"op": "close"}')
                self._process.wait(1)
            except (OSError, subprocess.TimeoutExpired):
                self._process.kill()
            self._control.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for _, fds in self._answers:
            for fd in fds:
                os.close(fd)
        self._answers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
