"""The handshake of Firecracker's page fault handlers, both halves, and peers that get it wrong."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from postcopy_proto.errors import ErrorKind, RemoteProtocolError, UserfaultError
from postcopy_proto.examples import handler
from postcopy_proto.net import handover as protocol
from postcopy_proto.net.handover import (
    PAGE_SIZE_MAX,
    REGIONS_MAX,
    TOTAL_MAX,
    HandedRegion,
    Handover,
    hand_over,
    parse_description,
    receive_handover,
)
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.userfault import syscalls
from postcopy_proto.userfault.abi import Features
from postcopy_proto.userfault.backend import Backend
from postcopy_proto.userfault.descriptor import Userfaultfd
from postcopy_proto.userfault.mapping import Mapping
from tests.userfault.support import PAGE, batch, content

pytestmark = pytest.mark.userfault

COUNT = 32


def vmm(connection: socket.socket, *, wait_for_end: bool) -> int:
    """What a VMM does: owns memory, hands it over, touches it all; exit status 0 when it fits.

    With `wait_for_end` it ends itself (status 9) when the handler goes away, as it should.
    """
    mappings = [Mapping.create(COUNT * PAGE, PAGE) for _ in range(2)]
    features = Features.EVENT_REMOVE
    uffd = Userfaultfd.open(features, user_mode_only=True)
    for mapping in mappings:
        uffd.register(mapping.address, mapping.length)
    described = [
        HandedRegion(mapping.address, mapping.length, index * COUNT * PAGE)
        for index, mapping in enumerate(mappings)
    ]
    hand_over(connection, uffd, described)
    if wait_for_end:
        ended = connection.recv(1) == b""
        return 9 if ended else 3
    pages = [content(RAMBlock(f"memory@{i * COUNT * PAGE:#x}", COUNT * PAGE), i) for i in (0, 1)]
    word = ctypes.create_string_buffer(PAGE)
    for mapping, expected in zip(mappings, pages, strict=True):
        for page in np.random.default_rng(1).permutation(COUNT):
            syscalls.memcpy(ctypes.addressof(word), mapping.address + int(page) * PAGE, PAGE)
            if word.raw != expected[page].tobytes():
                return 1
    # Dropped while being served: reads as zeros, without the handler's help it would not end.
    mappings[0].discard(0, PAGE)
    syscalls.memcpy(ctypes.addressof(word), mappings[0].address, PAGE)
    return 0 if not any(word.raw) else 2


def restless_vmm(connection: socket.socket, event: Features) -> int:
    """One that forks, or moves its memory, in the middle of it all."""
    pages = ctypes.c_size_t(PAGE)
    memory = syscalls.map_memory(PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    elsewhere = syscalls.map_memory(PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    uffd = Userfaultfd.open(event)
    uffd.register(memory, PAGE)
    hand_over(connection, uffd, [HandedRegion(memory, PAGE, 0)])
    if event is Features.EVENT_REMAP:
        remap = ctypes.CDLL(None).mremap
        remap.restype = ctypes.c_void_p
        remap(ctypes.c_void_p(memory), pages, pages, 3, ctypes.c_void_p(elsewhere))
        connection.recv(1)
        return 0
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return ctypes.string_at(memory, 1)[0]


def plain_vmm(connection: socket.socket, *, nonblocking: bool = True, then: str = "touch") -> int:
    """One with a block of COUNT pages: it touches the first byte, waits for our end, or ends."""
    mapping = Mapping.create(COUNT * PAGE, PAGE)
    uffd = Userfaultfd.open(user_mode_only=True, nonblocking=nonblocking)
    uffd.register(mapping.address, mapping.length)
    hand_over(connection, uffd, [HandedRegion(mapping.address, mapping.length, 0)])
    if then == "wait":
        connection.recv(1)
    elif then == "touch":
        word = ctypes.create_string_buffer(8)
        syscalls.memcpy(ctypes.addressof(word), mapping.address, 8)
        return word.raw[0]
    return 0


@contextmanager
def started(body: Callable[[socket.socket], int]) -> Iterator[tuple[int, socket.socket]]:
    """A VMM that has connected; through a listening socket, so that the kernel names it."""
    with TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/uffd.sock")
        listener.listen()
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.connect(f"{folder}/uffd.sock")
                    status = body(connection)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        connection, _ = listener.accept()
        with connection:
            try:
                yield pid, connection
            finally:
                with suppress(ProcessLookupError, ChildProcessError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)


def started_vmm(
    *, wait_for_end: bool = False, event: Features | None = None
) -> AbstractContextManager[tuple[int, socket.socket]]:
    """A well-behaved one, or with `event` a restless one."""
    if event is None:
        return started(lambda connection: vmm(connection, wait_for_end=wait_for_end))
    return started(lambda connection: restless_vmm(connection, event))


def test_a_vmm_is_served_from_its_empty_memory_on() -> None:
    with started_vmm() as (pid, connection), receive_handover(connection) as handover:
        names = [region.block.idstr for region in handover.regions]
        assert names == ["memory@0x0", f"memory@{COUNT * PAGE:#x}"]
        pages = {name: content(RAMBlock(name, COUNT * PAGE), i) for i, name in enumerate(names)}
        backend = Backend(handover.regions)
        backend.enable_notify()
        poll = select.poll()
        poll.register(backend.fileno(), select.POLLIN)
        poll.register(handover.pidfd, select.POLLIN)
        while handover.pidfd not in (ready := dict(poll.poll(10_000))):
            assert ready, "the VMM neither faults nor ends"
            for name, offset in backend.read_faults():
                backend.place(batch(name, pages[name], [offset // PAGE]))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert backend.stats.requested == 2 * COUNT
        assert backend.stats.removed == 1
        backend.cleanup()


def memory_file(folder: Path) -> Path:
    pages = [content(RAMBlock("ram", COUNT * PAGE), i) for i in (0, 1)]
    path = folder / "memory"
    path.write_bytes(b"".join(rows.tobytes() for rows in pages))
    return path


def test_the_example_handler_serves_a_vmm_from_a_file(tmp_path: Path) -> None:
    with started_vmm() as (pid, connection), receive_handover(connection) as handover:
        backend = handler.serve(handover, memory_file(tmp_path))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert backend.stats.pages == 2 * COUNT
    assert backend.stats.removed == 1


def test_the_example_handler_as_a_program(tmp_path: Path) -> None:
    path = tmp_path / "s"
    command = [sys.executable, "-m", "postcopy_proto.examples.handler", path, memory_file(tmp_path)]
    serving = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(path))
                status = vmm(connection, wait_for_end=False)
        finally:
            os._exit(status)
    # Whether it is served or not, it ends: the handler kills a VMM that it can't serve.
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    out, _ = serving.communicate(timeout=30)
    assert serving.returncode == 0
    assert out.startswith(f"{2 * COUNT} pages placed; a fault took ")


def test_the_example_handler_ends_a_vmm_whose_file_is_too_short(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(bytes(PAGE))
    with started_vmm(wait_for_end=True) as (pid, connection):
        with (
            receive_handover(connection) as handover,
            pytest.raises(ValueError, match="has 4,096 bytes"),
        ):
            handler.serve(handover, short)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_the_example_handler_ends_a_vmm_whose_file_is_missing(tmp_path: Path) -> None:
    with started_vmm(wait_for_end=True) as (pid, connection):
        with receive_handover(connection) as handover, pytest.raises(FileNotFoundError):
            handler.serve(handover, tmp_path / "none")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_the_example_handler_serves_a_vmm_with_a_blocking_userfaultfd(tmp_path: Path) -> None:
    """A read of it would wait for ever once the VMM has ended, and poll would not show events."""
    memory = memory_file(tmp_path)
    with (
        started(lambda connection: plain_vmm(connection, nonblocking=False)) as (pid, connection),
        receive_handover(connection) as handover,
    ):
        assert not os.get_blocking(handover.uffd.fileno())
        serving = threading.Thread(target=handler.serve, args=(handover, memory), daemon=True)
        serving.start()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == memory.read_bytes()[0]
        serving.join(10)
        assert not serving.is_alive()


def test_the_example_handler_places_what_no_poll_shows() -> None:
    """Pages that are asked for here, as those whose faults were read amid a placement."""
    with (
        started(lambda connection: plain_vmm(connection, then="wait")) as (pid, connection),
        receive_handover(connection) as handover,
    ):
        [region] = handover.regions
        memory = np.full(COUNT * PAGE, 7, np.uint8)
        backend = Backend(handover.regions)
        backend.want(region.block.idstr, 0, 4 * PAGE)
        sources = {region.block.idstr: memory.__array_interface__["data"][0]}
        serving = threading.Thread(
            target=handler.answer_faults, args=(backend, sources, handover), daemon=True
        )
        serving.start()
        deadline = time.monotonic() + 10
        while backend.stats.pages < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        placed = backend.stats.pages
        os.kill(pid, signal.SIGKILL)
        serving.join(10)
        assert not serving.is_alive()
        assert placed == 4
        backend.cleanup()


def test_the_example_handler_that_fails_leaves_nothing_open(
    privileged: None, tmp_path: Path
) -> None:
    before = open_descriptors()
    with started_vmm(event=Features.EVENT_REMAP) as (pid, connection):
        with (
            receive_handover(connection) as handover,
            pytest.raises(UserfaultError, match="moved its RAM"),
        ):
            handler.serve(handover, memory_file(tmp_path))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert open_descriptors() == before


def test_handed_over_memory_cannot_be_dropped_from_here() -> None:
    with (
        started_vmm(wait_for_end=True) as (_, connection),
        receive_handover(connection) as handover,
    ):
        backend = Backend(handover.regions)
        with pytest.raises(UserfaultError, match="begin with enable_notify"):
            backend.incoming_init()


def test_the_vmm_is_told_when_the_handler_goes() -> None:
    with started_vmm(wait_for_end=True) as (pid, connection):
        receive_handover(connection).close()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def test_the_handler_ends_a_vmm_that_it_cannot_serve() -> None:
    with (
        started_vmm(wait_for_end=True) as (pid, connection),
        receive_handover(connection) as handover,
    ):
        assert handover.owner.pid == pid
        handover.kill_owner()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert select.select([handover.pidfd], [], [], 10)[0]
        handover.kill_owner()


def serve_one_page(handover: Handover) -> Backend:
    """Serves 0x21 to whoever asks, until the VMM has ended; raises what serving raises."""
    backend = Backend(handover.regions)
    backend.enable_notify()
    page = np.full((1, PAGE), 0x21, np.uint8)
    poll = select.poll()
    poll.register(backend.fileno(), select.POLLIN)
    poll.register(handover.pidfd, select.POLLIN)
    try:
        while handover.pidfd not in (ready := dict(poll.poll(10_000))):
            assert ready, "the VMM neither faults nor ends"
            for name, _ in backend.read_faults():
                backend.place(batch(name, page, [0]))
    except BaseException:
        backend.cleanup()
        raise
    return backend


@pytest.fixture
def privileged() -> None:
    try:
        Userfaultfd.open(Features.EVENT_FORK).close()
    except UserfaultError as error:
        pytest.skip(f"these events are for the privileged: {error}")


def test_a_vmm_that_forks_is_served_on(privileged: None, caplog: pytest.LogCaptureFixture) -> None:
    """The event is read, so that the fork goes on; the new process is another's affair."""
    with (
        started_vmm(event=Features.EVENT_FORK) as (pid, connection),
        receive_handover(connection) as handover,
    ):
        backend = serve_one_page(handover)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0x21
        assert backend.stats.forks == 1
        assert "not served" in caplog.text
        backend.cleanup()


def test_a_vmm_that_moves_its_memory_ends_it(privileged: None) -> None:
    with (
        started_vmm(event=Features.EVENT_REMAP) as (_, connection),
        receive_handover(connection) as handover,
        pytest.raises(UserfaultError, match="moved its RAM"),
    ):
        serve_one_page(handover)


# ---- descriptions


def entry(**changes: object) -> dict[str, object]:
    plain = {
        "base_host_virt_addr": 0x7F0000000000,
        "size": 8 * PAGE,
        "offset": 0,
        "page_size": PAGE,
    }
    return {**plain, **changes}


def parse(*entries: object) -> list[HandedRegion]:
    return parse_description(json.dumps(entries).encode())


def test_descriptions_of_several_firecrackers() -> None:
    old = entry(page_size_kib=PAGE)
    del old["page_size"]
    new = entry(base_host_virt_addr=0x7F0000100000, offset=8 * PAGE, page_size_kib=1, flavour="x")
    assert parse(old, new) == [
        HandedRegion(0x7F0000000000, 8 * PAGE, 0, PAGE),
        HandedRegion(0x7F0000100000, 8 * PAGE, 8 * PAGE, PAGE),
    ]
    round_trip = [region.as_dict() for region in parse(old, new)]
    assert parse(*round_trip) == parse(old, new)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (b"", ErrorKind.MALFORMED),
        (b"\xff\xfe", ErrorKind.MALFORMED),
        (b"{}", ErrorKind.MALFORMED),
        (b"[]", ErrorKind.MALFORMED),
        (b"[1]", ErrorKind.MALFORMED),
        (b"[" * 100_000 + b"]" * 100_000, ErrorKind.MALFORMED),
        (json.dumps([entry(size=-PAGE)]).encode(), ErrorKind.MALFORMED),
        (json.dumps([entry(size="8")]).encode(), ErrorKind.MALFORMED),
        (json.dumps([entry(size=True)]).encode(), ErrorKind.MALFORMED),
        (json.dumps([entry(size=1.5)]).encode(), ErrorKind.MALFORMED),
        (json.dumps([entry(size=1 << 70)]).encode(), ErrorKind.MALFORMED),
        (json.dumps([entry(size=0)]).encode(), ErrorKind.RANGE),
        (json.dumps([entry(size=PAGE + 1)]).encode(), ErrorKind.RANGE),
        (json.dumps([entry(base_host_virt_addr=1)]).encode(), ErrorKind.RANGE),
        (json.dumps([entry(base_host_virt_addr=2**63 - PAGE)]).encode(), ErrorKind.RANGE),
        (json.dumps([entry(size=TOTAL_MAX + PAGE)]).encode(), ErrorKind.LIMIT),
        (
            json.dumps(
                [
                    entry(size=TOTAL_MAX),
                    entry(base_host_virt_addr=0x1000, offset=TOTAL_MAX),
                ]
            ).encode(),
            ErrorKind.LIMIT,
        ),
        (
            json.dumps(
                [entry(base_host_virt_addr=0, size=2 * PAGE_SIZE_MAX, page_size=2 * PAGE_SIZE_MAX)]
            ).encode(),
            ErrorKind.LIMIT,
        ),
        (b'[{"size": ' + b"[" * 900 + b"]" * 900 + b"}]", ErrorKind.MALFORMED),
        (json.dumps([entry(size={})]).encode(), ErrorKind.MALFORMED),
        (json.dumps([entry(page_size=0)]).encode(), ErrorKind.MALFORMED),
        (json.dumps([entry(page_size=3 * PAGE)]).encode(), ErrorKind.MALFORMED),
        (json.dumps([entry(), entry(offset=PAGE)]).encode(), ErrorKind.MALFORMED),
        (json.dumps([entry(), entry(base_host_virt_addr=0x100000)]).encode(), ErrorKind.MALFORMED),
        (json.dumps([entry()] * (REGIONS_MAX + 1)).encode(), ErrorKind.LIMIT),
        (b'[{"size": 4096}]', ErrorKind.MALFORMED),
    ],
)
def test_bad_descriptions_are_refused(message: bytes, kind: ErrorKind) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        parse_description(message)
    assert caught.value.kind is kind
    assert caught.value.message == "HANDOVER"


# ---- connections


def receive(
    pieces: list[tuple[bytes, list[int]]], *, end: bool = False, timeout: float = 0.3
) -> Handover:
    left, right = socket.socketpair()

    def send() -> None:
        with suppress(ConnectionError):
            for data, fds in pieces:
                socket.send_fds(left, [data], fds)
        if end:
            left.close()

    sender = threading.Thread(target=send)
    sender.start()
    try:
        return receive_handover(right, timeout)
    finally:
        sender.join()
        left.close()


GOOD = json.dumps([entry()]).encode()


def test_the_descriptor_may_come_with_a_later_message() -> None:
    with Userfaultfd.open(user_mode_only=True) as uffd:
        pieces = [(GOOD[:10], []), (GOOD[10:], []), (b" ", [uffd.fileno()])]
        with receive(pieces) as handover:
            assert len(handover.regions) == 1


@pytest.mark.parametrize(
    ("cut", "rest"),
    [
        (b'[{"x": [1]', b", "),
        (b'[{"x": {}', b", "),
        (b'[{"x": "]}]', b'", '),
        (b'[{"x": "]}"', b", "),
        (b'[{"x": "]}]\\', b'\\", '),
        (b'[{"x": "\\"]}]', b'", '),
        (b" ", b"[{"),
    ],
)
def test_a_description_is_read_to_its_end(cut: bytes, rest: bytes) -> None:
    """However a part of it may look; the descriptor, which ends a read, comes with the first."""
    with Userfaultfd.open(user_mode_only=True) as uffd:
        pieces = [(cut, [uffd.fileno()]), (rest + GOOD[2:], [])]
        with receive(pieces, timeout=5) as handover:
            assert handover.described == (HandedRegion(0x7F0000000000, 8 * PAGE, 0, PAGE),)


def test_what_is_received_is_not_inherited() -> None:
    with (
        Userfaultfd.open(user_mode_only=True) as uffd,
        receive([(GOOD, [uffd.fileno()])]) as handover,
    ):
        assert not os.get_inheritable(handover.uffd.fileno())
        assert not os.get_inheritable(handover.pidfd)
        command = ["ls", "-l", "/proc/self/fd"]
        listed = subprocess.run(command, close_fds=False, capture_output=True, text=True).stdout
        assert "/dev/null" in listed or "pipe" in listed
        assert "userfaultfd" not in listed


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """More of them open than select(2) can name."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip(f"no more than {hard} descriptors may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    yield
    for fd in fds:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_handler_with_more_than_1024_descriptors(many_descriptors: None) -> None:
    with (
        started(lambda connection: plain_vmm(connection, then="wait")) as (_, connection),
        receive_handover(connection) as handover,
    ):
        assert handover.pidfd > 1024
        assert not handover.owner_ended()
        handover.kill_owner()
        assert handover.owner_ended(10)


@pytest.fixture(params=[protocol.SO_PEERPIDFD, 9999], ids=["of the peer", "by number"])
def peer_option(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to the peer's pidfd: a kernel before 6.5 knows no option for it."""
    monkeypatch.setattr(protocol, "SO_PEERPIDFD", request.param)


def test_the_owner_is_who_connected(peer_option: None) -> None:
    with (
        started(lambda connection: plain_vmm(connection, then="wait")) as (pid, connection),
        receive_handover(connection) as handover,
    ):
        assert handover.owner.pid == pid
        handover.kill_owner()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert handover.owner_ended()


@pytest.mark.parametrize("reaped", [False, True])
def test_a_vmm_that_has_ended_before_it_is_read(peer_option: None, reaped: bool) -> None:
    before = open_descriptors()
    with started(lambda connection: plain_vmm(connection, then="end")) as (pid, connection):
        os.waitid(os.P_PID, pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
        with pytest.raises(RemoteProtocolError, match="has ended") as caught:
            receive_handover(connection)
        assert caught.value.kind is ErrorKind.TRUNCATED
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("pieces", "end", "kind", "reason"),
    [
        ([], False, ErrorKind.TIMEOUT, "description did not come"),
        ([(GOOD, [])], False, ErrorKind.TIMEOUT, "userfaultfd did not come"),
        ([(GOOD[:20], [0])], False, ErrorKind.TIMEOUT, "rest did not come"),
        ([(GOOD, [])], True, ErrorKind.TRUNCATED, "ended before"),
        ([(b"[" * 70_000, [])] * 20, False, ErrorKind.LIMIT, "longer than"),
        ([(GOOD, [0])], False, ErrorKind.MALFORMED, "no userfaultfd"),
        ([(GOOD, [0, 0])], False, ErrorKind.MALFORMED, "2 descriptors"),
        ([(b"[", [0])] * 5000, False, ErrorKind.MALFORMED, "2 descriptors"),
    ],
)
def test_handovers_that_fail_leave_nothing_open(
    pieces: list[tuple[bytes, list[int]]], end: bool, kind: ErrorKind, reason: str
) -> None:
    before = open_descriptors()
    with open(os.devnull) as null:
        with pytest.raises(RemoteProtocolError, match=reason) as caught:
            receive([(data, [null.fileno() for _ in fds]) for data, fds in pieces], end=end)
        assert caught.value.kind is kind
    assert open_descriptors() == before


def test_a_descriptor_before_its_handshake_is_refused() -> None:
    fd = syscalls.userfaultfd(os.O_CLOEXEC | 1)
    with pytest.raises(RemoteProtocolError, match="handshake"):
        receive([(GOOD, [fd])])
    os.close(fd)


def test_a_silent_peer_costs_no_more_than_the_timeout() -> None:
    begin = time.monotonic()
    with pytest.raises(RemoteProtocolError):
        receive([])
    assert time.monotonic() - begin < 2


def open_descriptors() -> int:
    with os.scandir("/proc/self/fd") as entries:
        return sum(1 for _ in entries)
