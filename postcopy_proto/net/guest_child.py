"""The guest process's own program; `net.guest` starts it and speaks to it.

It owns memory, does to it what only its owner can, and touches it in threads while this main
thread goes on answering. One message each way is a packet of JSON, with descriptors beside it:

    {"op": "map", "length", "page_size", "backing"}      → {"address"}
    {"op": "features"}                                   → {"features"}
    {"op": "open", "features", "user_mode_only"}         → {"user_mode_only"} + userfaultfd
    {"op": "discard", "region", "ranges": [[start, length], …]}       no answer
    {"op": "huge_pages", "region", "on"}                              no answer
    {"op": "lock_memory", "on"}                                       no answer
    {"op": "flush"}                                      → {}; or the first failure since the last
    {"op": "touch", "count", "threads"} + memory file    → {}; {"touched": true} when all are done
    {"op": "close"}                                      the process exits with 0

A failure answers {"error": [operation, errno, strerror, detail, advice]}. When the other side goes
away the process exits with `ORPHANED`: its memory would never fill. A bug here ends it with
`BROKEN` and a traceback.

The memory file of a touch holds three arrays of `count` 64-bit integers: addresses to read, how
many nanoseconds each read took (0: not yet), and the 8 bytes that were read.

Only the standard library and the standard-library part of this package are imported, to keep
the process small.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import socket
import threading
import time
import traceback
from typing import Any

from postcopy_proto.errors import UserfaultError
from postcopy_proto.userfault import syscalls
from postcopy_proto.userfault.abi import Features
from postcopy_proto.userfault.descriptor import Userfaultfd, available_features
from postcopy_proto.userfault.mapping import Backing, Mapping

ORPHANED = 70
"""Exit status when the process that serves the memory has gone."""
BROKEN = 71
"""Exit status of a guest that came upon a bug of its own."""
MESSAGE_MAX = 64 * 1024
"""Bytes of one message."""


class _Guest:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._send_lock = threading.Lock()
        self._mappings: list[Mapping] = []
        self._uffds: list[Userfaultfd] = []
        self._failure: UserfaultError | None = None

    def run(self) -> int:
        """Answers until told to end; returns the exit status."""
        while True:
            data, fds, _, _ = socket.recv_fds(self._control, MESSAGE_MAX, 1)
            if not data:
                return ORPHANED
            message = json.loads(data)
            if message["op"] == "close":
                return 0
            self._answer(message, fds)

    def _answer(self, message: dict[str, Any], fds: list[int]) -> None:
        operation = message.pop("op")
        silent = operation in ("discard", "huge_pages", "lock_memory")
        try:
            answer, answer_fds = getattr(self, f"_do_{operation}")(*fds, **message)
        except Exception as failure:
            # Whatever it is: who asked is told, instead of seeing nothing but our end.
            error = _as_userfault_error(operation, failure)
            if silent:
                self._failure = self._failure or error
            else:
                self._send_error(error)
            return
        finally:
            for fd in fds:
                os.close(fd)
        if not silent:
            self._send(answer, answer_fds)

    def _send(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        with self._send_lock:
            socket.send_fds(self._control, [json.dumps(message).encode()], fds)

    def _send_error(self, error: UserfaultError) -> None:
        fields = (error.operation, error.errno, error.strerror, error.detail, error.advice)
        self._send({"error": fields})

    # ---- the commands

    def _do_map(
        self, length: int, page_size: int, backing: str
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        mapping = Mapping.create(length, page_size, Backing(backing))
        self._mappings.append(mapping)
        return {"address": mapping.address}, ()

    def _do_features(self) -> tuple[dict[str, Any], tuple[int, ...]]:
        return {"features": int(available_features())}, ()

    def _do_open(
        self, features: int, user_mode_only: bool | None
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        uffd = Userfaultfd.open(Features(features), user_mode_only=user_mode_only)
        # Kept open here: should the handler die, whoever touches a missing page waits until this
        # process ends, instead of reading zeros that were never there.
        self._uffds.append(uffd)
        return {"user_mode_only": uffd.user_mode_only}, (uffd.fileno(),)

    def _do_discard(
        self, region: int, ranges: list[tuple[int, int]]
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        mapping = self._mappings[region]
        for start, length in ranges:
            mapping.discard(start, length)
        return {}, ()

    def _do_huge_pages(self, region: int, on: bool) -> tuple[dict[str, Any], tuple[int, ...]]:
        self._mappings[region].advise_huge_pages(on)
        return {}, ()

    def _do_lock_memory(self, on: bool) -> tuple[dict[str, Any], tuple[int, ...]]:
        syscalls.lock_memory(on)
        return {}, ()

    def _do_flush(self) -> tuple[dict[str, Any], tuple[int, ...]]:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return {}, ()

    def _do_touch(
        self, plan: int, count: int, threads: int
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        memory = mmap.mmap(plan, count * 24)
        left = [threads]
        lock = threading.Lock()

        def work(first: int) -> None:
            _touch(memory, count, first, threads)
            with lock:
                left[0] -= 1
                last = left[0] == 0
            if last:
                self._send({"touched": True})

        for first in range(threads):
            threading.Thread(target=work, args=(first,), daemon=True).start()
        return {}, ()


def _as_userfault_error(operation: str, failure: Exception) -> UserfaultError:
    """What a command failed with, in the one form that is sent."""
    if isinstance(failure, UserfaultError):
        return failure
    if isinstance(failure, OSError) and failure.errno is not None:
        return UserfaultError(operation, failure.errno, os.strerror(failure.errno))
    text = str(failure) if isinstance(failure, ValueError) else repr(failure)
    return UserfaultError(operation, errno.EINVAL, text)


def _touch(memory: mmap.mmap, count: int, first: int, step: int) -> None:
    """Reads 8 bytes at every `step`-th address, without the GIL, and notes how long it took."""
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    slots = memoryview(memory).cast("Q")
    read, clock = syscalls.memcpy, time.perf_counter_ns
    words = base + count * 16
    for index in range(first, count, step):
        address = slots[index]
        word = words + index * 8
        start = clock()
        read(word, address, 8)
        slots[count + index] = (clock() - start) or 1


def main(fd: int, parent: int) -> None:
    """Runs the guest on control socket `fd`; exits."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, 9)
    # After a change of user the process is not dumpable, and its parent could not write to it.
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)
    if os.getppid() != parent:
        os._exit(ORPHANED)
    status = ORPHANED
    try:
        status = _Guest(socket.socket(fileno=fd)).run()
    except ConnectionError:
        pass
    except Exception:
        status = BROKEN
        traceback.print_exc()
    finally:
        # Threads may wait for pages that nobody will place: no interpreter shutdown.
        os._exit(status)
