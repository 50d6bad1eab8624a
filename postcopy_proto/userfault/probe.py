"""What this host can do for postcopy, check by check.

The counterpart of QEMU's postcopy_ram_supported_by_host, in its order and with its reasons, and
what later kernels added. Where QEMU stops at the first failure, this goes on as far as it can:
a person wants the whole list. Everything opened is closed again, memory that was locked stays so.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from postcopy_proto.errors import UserfaultError
from postcopy_proto.ramblock import TARGET_PAGE_SIZE
from postcopy_proto.userfault import syscalls
from postcopy_proto.userfault.abi import Features, Ioctls
from postcopy_proto.userfault.descriptor import Userfaultfd
from postcopy_proto.userfault.mapping import Backing, Mapping

HUGE_PAGES = Path("/sys/kernel/mm/hugepages")
FULL = "full"
USER_MODE_ONLY = "user-mode-only"

OPENINGS = ("userfaultfd", "userfaultfd-user-mode")
"""the checks of which one is enough"""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at; `detail` is what was found, `advice` what to do about it."""

    name: str
    ok: bool
    detail: str
    advice: str = ""
    required: bool = True
    """whether postcopy of ordinary memory depends on it"""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """All checks, and what follows from them."""

    checks: tuple[Check, ...]
    mode: str | None
    """`full`; `user-mode-only`; None where postcopy can't work"""

    @property
    def supported(self) -> bool:
        """Whether postcopy works here, for processes of our own at least."""
        return self.mode is not None

    @property
    def reasons(self) -> list[str]:
        """Why postcopy can't work here and what to do about it; empty where it works."""
        if self.supported:
            return []
        opened = any(check.ok for check in self.checks if check.name in OPENINGS)
        # Without a descriptor nothing behind it was looked at, and its own absence is the reason.
        return [
            f"{check.name}: {check.detail}; {check.advice}"
            for check in self.checks
            if not check.ok and (check.required if opened else check.name in OPENINGS)
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: supported, mode, checks."""
        return {
            "supported": self.supported,
            "mode": self.mode,
            "checks": [asdict(check) for check in self.checks],
        }


def probe(target_page_size: int = TARGET_PAGE_SIZE) -> ProbeResult:
    """Looks at this host as the user and process that we are. Raises nothing."""
    checks = [_check_page_size(target_page_size)]
    full, full_check = _try_open(OPENINGS[0], user_mode_only=False)
    user, user_check = _try_open(OPENINGS[1], user_mode_only=True)
    uffd = full or user
    try:
        checks += [full_check, user_check, _check_handshake(uffd)]
        checks.append(_check_memory_lock())
        checks += _check_registration(uffd)
        checks += _check_backings(uffd)
        checks.append(_check_threads_named(uffd))
    finally:
        for descriptor in (full, user):
            if descriptor is not None:
                descriptor.close()
    mode = None
    if uffd is not None and all(check.ok for check in checks if check.required):
        mode = FULL if full is not None else USER_MODE_ONLY
    return ProbeResult(tuple(checks), mode)


def _check_page_size(target_page_size: int) -> Check:
    ok = target_page_size <= mmap.PAGESIZE
    return Check(
        "page-size",
        ok,
        f"target page {target_page_size}, host page {mmap.PAGESIZE} bytes",
        "" if ok else "the target page must not be bigger than the host's",
    )


def _try_open(name: str, *, user_mode_only: bool) -> tuple[Userfaultfd | None, Check]:
    """Full descriptors are wanted, user-mode-only ones are enough: neither is required alone."""
    try:
        uffd = Userfaultfd.open(user_mode_only=user_mode_only)
    except UserfaultError as error:
        detail = error.detail or error.strerror or ""
        return None, Check(name, False, detail, error.advice, required=False)
    return uffd, Check(name, True, f"obtained by {uffd.origin}", required=False)


def _check_handshake(uffd: Userfaultfd | None) -> Check:
    if uffd is None:
        return _not_reached("api-handshake")
    features = ", ".join(feature.name or "" for feature in uffd.available_features)
    return Check("api-handshake", True, f"API 0xAA; features {features}")


def _check_memory_lock() -> Check:
    """Locked memory is never missing; a lock on future mappings would populate guest RAM."""
    locked = _locked_bytes()
    detail = f"{locked} bytes of this process are locked"
    if locked == 0:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        shown = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit} bytes"
        return Check("memory-lock", True, f"{detail}; the limit for locking again is {shown}")
    advice = "it can't be postcopied while locked: a backend unlocks it, and locks again if asked"
    return Check("memory-lock", False, detail, advice, required=False)


def _locked_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").split("\n"):
        if line.startswith("VmLck:"):
            return int(line.split()[1]) * 1024
    return 0


def _check_registration(uffd: Userfaultfd | None) -> Iterator[Check]:
    """Register and unregister a page, and the three resolvers on it, for real."""
    names = ("register", "copy", "zeropage", "wake", "unregister")
    if uffd is None:
        yield from map(_not_reached, names)
        return
    try:
        with _mapping(3 * mmap.PAGESIZE, Backing.ANONYMOUS) as mapping:
            yield from _exercise(uffd, mapping)
    except UserfaultError as error:
        yield Check("register", False, str(error), "the kernel refuses a private mapping")


def _exercise(uffd: Userfaultfd, mapping: Mapping) -> Iterator[Check]:
    page, start = mmap.PAGESIZE, mapping.address
    offered = uffd.register(start, mapping.length)
    names = ", ".join((ioctl.name or "").lower() for ioctl in offered)
    yield Check("register", True, f"anonymous memory offers {names}")
    source = ctypes.create_string_buffer(b"\xa5" * page, page)
    attempts: tuple[tuple[str, Ioctls, Callable[[], object]], ...] = (
        ("copy", Ioctls.COPY, lambda: uffd.copy(start, ctypes.addressof(source), page)),
        ("zeropage", Ioctls.ZEROPAGE, lambda: uffd.zeropage(start + page, page)),
        ("wake", Ioctls.WAKE, lambda: uffd.wake(start, page)),
        ("unregister", Ioctls(0), lambda: uffd.unregister(start, mapping.length)),
    )
    for name, bit, attempt in attempts:
        if offered & bit != bit:
            yield Check(name, False, "not offered", "a kernel of 4.3 or later is needed")
            continue
        try:
            attempt()
        except UserfaultError as error:
            yield Check(name, False, str(error), error.advice)
        else:
            yield Check(name, True, "works")
    seen = ctypes.string_at(start, 2 * page)
    if seen != b"\xa5" * page + bytes(page):
        yield Check("placement", False, "placed pages hold other bytes", "report this kernel")


def _check_backings(uffd: Userfaultfd | None) -> Iterator[Check]:
    """What else than anonymous memory can be registered; none of it is required."""
    yield _check_backing(
        uffd, "shared-memory", Features.MISSING_SHMEM, Backing.MEMFD, mmap.PAGESIZE
    )
    for size in _huge_page_sizes():
        name = f"hugetlb-{_size_text(size)}"
        yield _check_backing(uffd, name, Features.MISSING_HUGETLBFS, Backing.HUGETLB, size)


def _check_backing(
    uffd: Userfaultfd | None, name: str, feature: Features, backing: Backing, page_size: int
) -> Check:
    if uffd is None:
        return _not_reached(name, required=False)
    if not uffd.available_features & feature:
        advice = "a kernel of 4.11 or later is needed"
        return Check(name, False, "not offered by the kernel", advice, required=False)
    try:
        with _mapping(page_size, backing) as mapping:
            uffd.register(mapping.address, mapping.length)
            uffd.unregister(mapping.address, mapping.length)
    except UserfaultError as error:
        advice = error.advice
        if backing is Backing.HUGETLB and error.errno == errno.ENOMEM:
            path = HUGE_PAGES / f"hugepages-{page_size // 1024}kB" / "nr_hugepages"
            advice = f"no page of this size is free: reserve some by {path}"
        return Check(name, False, str(error), advice, required=False)
    return Check(name, True, "can be registered", required=False)


def _check_threads_named(uffd: Userfaultfd | None) -> Check:
    name = "thread-id"
    if uffd is None:
        return _not_reached(name, required=False)
    if uffd.available_features & Features.THREAD_ID:
        return Check(name, True, "faults name their thread", required=False)
    advice = "statistics by thread need a kernel of 4.14 or later"
    return Check(name, False, "faults don't name their thread", advice, required=False)


def _huge_page_sizes() -> list[int]:
    """Bytes of each huge page size that the kernel has, ascending."""
    names = [path.name for path in HUGE_PAGES.glob("hugepages-*kB")]
    return sorted(int(name[len("hugepages-") : -len("kB")]) * 1024 for name in names)


def _size_text(size: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size % unit == 0:
            return f"{size // unit}{name}"
    return str(size)


def _not_reached(name: str, *, required: bool = True) -> Check:
    detail = "not checked: no userfaultfd could be opened"
    return Check(name, False, detail, "see userfaultfd above", required)


@contextmanager
def _mapping(length: int, backing: Backing) -> Iterator[Mapping]:
    page_size = length if backing is Backing.HUGETLB else mmap.PAGESIZE
    mapping = Mapping.create(length, page_size, backing)
    try:
        # After mlockall new memory is locked and populated from the start.
        syscalls.unlock_range(mapping.address, mapping.length)
        mapping.discard(0, mapping.length)
        yield mapping
    finally:
        mapping.close()
