"""A guest process that faults for real, with every backing, in both modes; and how it ends.

POSTCOPY_SOAK=N repeats the random-order test N times instead of once.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from postcopy_proto.errors import UserfaultError
from postcopy_proto.net.guest import GuestError, GuestProcess, Touch
from postcopy_proto.net.guest_child import ORPHANED
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.userfault.backend import Backend
from postcopy_proto.userfault.descriptor import OwnerGoneError
from tests.userfault.support import HUGE, MIB, PAGE, batch, content, run_python, unprivileged

pytestmark = pytest.mark.userfault

SOAK = int(os.environ.get("POSTCOPY_SOAK", "1"))

LAYOUTS = {
    "anonymous": [
        RAMBlock("pc.ram", 8 * MIB),
        RAMBlock("vga.vram", MIB),
        RAMBlock("rom", 3 * PAGE),
    ],
    "memfd": [RAMBlock("pc.ram", 8 * MIB), RAMBlock("rom", 3 * PAGE)],
    "shared": [RAMBlock("pc.ram", 4 * MIB)],
    "hugetlb": [RAMBlock("pc.ram", 16 * MIB, HUGE), RAMBlock("rom", 3 * PAGE)],
}


class Migration:
    """A source and a destination's loop in one, as small as they get."""

    def __init__(
        self,
        guest: GuestProcess,
        backend: Backend,
        contents: dict[str, NDArray[np.uint8]],
        rng: np.random.Generator,
    ) -> None:
        self.guest = guest
        self.backend = backend
        self.contents = contents
        self._rng = rng
        self._host = {region.block.idstr: region.block.page_size for region in guest.regions}

    def precopy(self, old: dict[str, NDArray[np.uint8]]) -> None:
        """All pages as they were; then some host pages are dropped, as dirty since."""
        self.backend.incoming_init()
        for idstr, pages in old.items():
            self.backend.place(batch(idstr, pages, range(len(pages))))
        self.backend.prepare_discard()
        for idstr, pages in old.items():
            per_host = self._host[idstr] // PAGE
            for host_page in range(0, len(pages), per_host):
                run = slice(host_page, host_page + per_host)
                if self._rng.random() < 0.8:
                    self.backend.discard(idstr, host_page * PAGE, per_host * PAGE)
                else:
                    self.contents[idstr][run] = old[idstr][run]
        self.backend.enable_notify()

    def postcopy(self, touch: Touch, duplicates: float = 0.1) -> None:
        """Serves faults; pushes the rest in the background, with some pages sent twice."""
        background = self._background(duplicates)
        poll = select.poll()
        poll.register(self.backend.fileno(), select.POLLIN)
        poll.register(self.guest.fileno(), select.POLLIN)
        pushing = True
        while not touch.poll() or pushing:
            poll.poll(0 if pushing else 1000)
            for idstr, offset in self.backend.read_faults():
                self._place(idstr, offset // PAGE)
            item = next(background, None)
            pushing = item is not None
            if item is not None:
                self._place(*item)
        self._place(self.guest.regions[0].block.idstr, 0)

    def _background(self, duplicates: float) -> Iterator[tuple[str, int]]:
        for idstr, pages in self.contents.items():
            per_host = self._host[idstr] // PAGE
            missing = self.backend.missing(idstr, 0, len(pages) * PAGE)
            for offset in missing:
                yield idstr, offset // PAGE
                if self._rng.random() < duplicates:
                    yield idstr, int(self._rng.integers(0, len(pages)) // per_host * per_host)

    def _place(self, idstr: str, first: int) -> None:
        count = self._host[idstr] // PAGE
        numbers = range(first, first + count)
        self.backend.place(batch(idstr, self.contents[idstr], numbers))

    def check(self, touch: Touch) -> None:
        """What was seen at each touch, and what is there at the end, is what was sent."""
        names = np.array(touch.block_names)[touch.block_indexes]
        for idstr, pages in self.contents.items():
            mine = names == idstr
            words = pages.reshape(-1).view(np.uint64)[touch.offsets[mine] // 8]
            assert (touch.words[mine] == words).all()
        self.backend.cleanup()
        for idstr, pages in self.contents.items():
            assert self.guest.read(idstr) == pages.tobytes()


def migrate(
    blocks: Sequence[RAMBlock], backing: str, seed: int, *, user_mode_only: bool, threads: int
) -> Backend:
    rng = np.random.default_rng(seed)
    new = {block.idstr: content(block, seed) for block in blocks}
    old = {block.idstr: content(block, seed + 1) for block in blocks}
    backing = "anonymous" if backing == "hugetlb" else backing
    with GuestProcess.start(blocks, backing=backing, user_mode_only=user_mode_only) as guest:
        backend = Backend(guest.regions)
        migration = Migration(guest, backend, new, rng)
        migration.precopy(old)
        assert backend.user_mode_only is user_mode_only
        touch = guest.touch(order="random", seed=seed, threads=threads)
        migration.postcopy(touch)
        migration.check(touch)
    assert guest.returncode == 0
    return backend


@pytest.mark.parametrize(
    "backing", ["anonymous", "memfd", "shared", pytest.param("hugetlb", marks=pytest.mark.hugetlb)]
)
def test_every_page_in_random_order_while_pages_arrive(
    backing: str, user_mode_only: bool, request: pytest.FixtureRequest
) -> None:
    if backing == "hugetlb":
        request.getfixturevalue("huge_pages")
    for seed in range(SOAK):
        backend = migrate(LAYOUTS[backing], backing, seed, user_mode_only=user_mode_only, threads=4)
        stats = backend.stats
        assert stats.faults > 0
        assert stats.duplicates > 0
        assert stats.zero_pages > 0 or backing == "hugetlb"
        assert len(stats.waits_ns) == stats.faults
        assert sum(stats.histogram()) == stats.faults


def test_eight_threads_fault_at_once(user_mode_only: bool) -> None:
    """All of them wait at the same time before the first is served; each is told by its id."""
    block = RAMBlock("pc.ram", 64 * PAGE)
    pages = content(block, 3, zero_fraction=0)
    with GuestProcess.start([block], user_mode_only=user_mode_only) as guest:
        backend = Backend(guest.regions)
        backend.incoming_init()
        backend.enable_notify()
        touch = guest.touch(order="sequential", threads=8)
        for _ in range(8):
            wanted: list[tuple[str, int]] = []
            deadline = time.monotonic() + 10
            while len(wanted) < 8 and time.monotonic() < deadline:
                wanted += backend.read_faults()
            assert len(wanted) == 8
            for idstr, offset in reversed(wanted):
                backend.place(batch(idstr, pages, [offset // PAGE]))
        touch.wait(10)
        assert len(backend.stats.by_thread) == 8
        assert all(waits.faults == 8 for waits in backend.stats.by_thread.values())
        assert (touch.words == pages.view(np.uint64)[:, 0]).all()
        backend.cleanup()


def test_touches_of_chosen_pages() -> None:
    blocks = [RAMBlock("a", 4 * PAGE), RAMBlock("b", 4 * PAGE)]
    with GuestProcess.start(blocks, user_mode_only=True) as guest:
        nines = np.full(512, 9, np.uint64)
        guest.regions[1].write(np.array([2 * PAGE]), np.array([nines.ctypes.data]), PAGE)
        touch = guest.touch({"b": np.array([2 * PAGE + 16, 0])})
        touch.wait(10)
        assert touch.finished == len(touch) == 2
        assert touch.words.tolist() == [9, 0]
        assert touch.latency_us()["max"] > 0
        for wrong in ({"b": np.array([4 * PAGE])}, {"b": np.array([-8])}):
            with pytest.raises(ValueError, match="outside"):
                guest.touch(wrong)
        with pytest.raises(ValueError, match="no page"):
            guest.touch({})
        with pytest.raises(ValueError, match="order"):
            guest.touch(order="sideways")
        assert guest.touch(count=3).offsets.shape == (3,)


def test_discards_by_the_thousand_reach_the_guest() -> None:
    block = RAMBlock("pc.ram", 16 * MIB)
    pages = content(block, 4, zero_fraction=0)
    with GuestProcess.start([block], user_mode_only=True) as guest:
        backend = Backend(guest.regions)
        backend.incoming_init()
        backend.place(batch("pc.ram", pages, range(4096)))
        backend.prepare_discard()
        for page in range(0, 4096, 2):
            backend.discard("pc.ram", page * PAGE, PAGE)
        # Overwriting waits for the discards before it: this page must survive them.
        backend.place(batch("pc.ram", pages, [0]))
        guest.flush()
        pages[2::2] = 0
        assert guest.read("pc.ram") == pages.tobytes()


def test_the_guests_failures_are_told_here() -> None:
    with pytest.raises(UserfaultError, match="mmap"):
        GuestProcess.start([RAMBlock("ram", 1 << 50, 1 << 30)])
    with GuestProcess.start([RAMBlock("ram", PAGE)]) as guest:
        guest.regions[0].owner.discard(guest.regions[0], PAGE, PAGE)
        with pytest.raises(UserfaultError, match=r"discard: .* ends after"):
            guest.flush()
        guest.flush()


# ---- ends


def test_a_killed_guest_ends_its_handler_cleanly(caplog: pytest.LogCaptureFixture) -> None:
    block = RAMBlock("ram", 16 * PAGE)
    guest = GuestProcess.start([block], user_mode_only=True)
    backend = Backend(guest.regions)
    backend.incoming_init()
    backend.enable_notify()
    touch = guest.touch()
    assert backend.fileno() >= 0
    os.kill(guest.pid, signal.SIGKILL)
    with pytest.raises(GuestError, match="killed by SIGKILL"):
        touch.wait(10)
    with pytest.raises(OwnerGoneError, match="has exited"):
        backend.place(batch("ram", content(block, 5, 0), range(16)))
    with caplog.at_level(logging.INFO):
        backend.cleanup()
    assert "nothing is left to unregister" in caplog.text
    guest.close()
    assert guest.returncode == -signal.SIGKILL


def test_memory_given_up_half_way_leaves_zeros_and_no_waiting_thread() -> None:
    with GuestProcess.start([RAMBlock("ram", 16 * PAGE)], user_mode_only=True) as guest:
        backend = Backend(guest.regions)
        backend.incoming_init()
        backend.enable_notify()
        touch = guest.touch(threads=8)
        while len(backend.read_faults()) == 0:
            pass
        backend.cleanup()
        touch.wait(10)
        assert not touch.words.any()


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


HANDLER = """
import sys, time
from postcopy_proto.net.guest import GuestProcess
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.userfault.backend import Backend
guest = GuestProcess.start([RAMBlock("ram", 16 * 4096)], user_mode_only=True)
backend = Backend(guest.regions)
backend.incoming_init()
backend.enable_notify()
touch = guest.touch(threads=4)
while not backend.read_faults(): pass
print(guest.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_guest_ends_with_its_handler(how: signal.Signals) -> None:
    """Its threads wait for pages; they must neither hang for ever nor read zeros."""
    handler = subprocess.Popen([sys.executable, "-c", HANDLER], stdout=subprocess.PIPE, stderr=-3)
    assert handler.stdout is not None
    pid = int(handler.stdout.readline())
    assert _alive(pid)
    handler.send_signal(how)
    handler.wait(10)
    deadline = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _alive(pid)
    handler.stdout.close()


def test_a_guest_whose_handler_went_away_says_so() -> None:
    guest = GuestProcess.start([RAMBlock("ram", PAGE)])
    guest._control.close()
    assert guest._process.wait(10) == ORPHANED
    guest.close()


def test_a_guest_is_small() -> None:
    with GuestProcess.start([RAMBlock("ram", PAGE)]) as guest:
        with open(f"/proc/{guest.pid}/status") as file:
            resident = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
        assert resident < 24 * 1024


def test_nothing_is_left_when_a_start_fails() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    children = _children()
    with pytest.raises(UserfaultError):
        GuestProcess.start([RAMBlock("ram", 1 << 50, 1 << 30)])
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert _children() == children


def _children() -> str:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return file.read()


def test_a_guest_of_an_ordinary_user() -> None:
    """The whole way, with user-mode-only memory, process_vm_writev and all."""
    code = """
import json
from tests.userfault.test_guest import LAYOUTS, migrate
backend = migrate(LAYOUTS["anonymous"], "anonymous", 1, user_mode_only=True, threads=2)
print(json.dumps([backend.stats.faults, backend.stats.pages]))
"""
    result = unprivileged([sys.executable, "-c", code])
    assert result.returncode == 0, result.stderr
    faults, pages = json.loads(result.stdout)
    assert faults > 0
    assert pages > 1000


def test_no_full_userfaultfd_for_an_ordinary_user_and_what_to_do() -> None:
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("vm.unprivileged_userfaultfd is 1: everything is allowed")
    code = """
from postcopy_proto.net.guest import GuestProcess
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.userfault.backend import Backend
with GuestProcess.start([RAMBlock("ram", 4096)], user_mode_only=False) as guest:
    backend = Backend(guest.regions)
    try: backend.enable_notify()
    except OSError as error: print(error.errno, error)
"""
    result = unprivileged([sys.executable, "-c", code])
    assert result.stdout.startswith("1 userfaultfd: "), result.stderr
    assert "ask for user-mode-only" in result.stdout


def test_forked_memory_of_the_guest_is_no_memory() -> None:
    """The fork of a guest has no guest RAM: it can't read zeros where pages are missing."""
    code = """
import ctypes, faulthandler, os
from postcopy_proto.userfault.descriptor import Userfaultfd
from postcopy_proto.userfault.mapping import Mapping
faulthandler.disable()
memory = Mapping.create(4096, 4096)
uffd = Userfaultfd.open(user_mode_only=True)
uffd.register(memory.address, 4096)
pid = os.fork()
if pid == 0:
    ctypes.string_at(memory.address, 1)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
uffd.zeropage(memory.address, 4096)
print(ctypes.string_at(memory.address, 1))
"""
    assert run_python(code).stdout.splitlines() == [str(-signal.SIGSEGV), "b'\\x00'"]
