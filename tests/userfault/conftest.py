"""Fixtures: userfaultfd as full as it gets here, reserved huge pages, regions with a backend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from postcopy_proto.errors import UserfaultError
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.userfault.backend import Backend
from postcopy_proto.userfault.descriptor import Userfaultfd
from postcopy_proto.userfault.mapping import Backing
from postcopy_proto.userfault.region import Region
from tests.userfault.support import COUNT, HUGE, PAGE, listening

HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
WANTED = 24


@pytest.fixture(params=[False, True], ids=["full", "user-mode-only"])
def user_mode_only(request: pytest.FixtureRequest) -> bool:
    """Both kinds of descriptor, one after the other."""
    wanted = bool(request.param)
    try:
        Userfaultfd.open(user_mode_only=wanted).close()
    except UserfaultError as error:
        pytest.skip(f"no such userfaultfd here: {error}")
    return wanted


@pytest.fixture
def huge_pages() -> Iterator[int]:
    """Reserves huge pages of 2 MiB and gives them back; how many there are."""
    if not HUGE_PAGES.exists():
        pytest.skip("this kernel has no huge pages of 2 MiB")
    before = int(HUGE_PAGES.read_text())
    try:
        HUGE_PAGES.write_text(str(max(before, WANTED)))
    except PermissionError:
        if before < WANTED:
            pytest.skip(f"{before} huge pages are reserved; reserving {WANTED} needs root")
    reserved = int(HUGE_PAGES.read_text())
    if reserved < WANTED:
        pytest.skip(f"only {reserved} huge pages could be reserved")
    yield reserved
    if before < WANTED:
        HUGE_PAGES.write_text(str(before))


@pytest.fixture
def region() -> Iterator[Region]:
    """Memory of this process, a block named ram."""
    made = Region.create(RAMBlock("ram", COUNT * PAGE))
    yield made
    made.close()


@pytest.fixture
def backend(region: Region) -> Iterator[Backend]:
    """Its backend, before LISTEN."""
    made = Backend([region], user_mode_only=True)
    made.incoming_init()
    yield made
    made.cleanup()


@pytest.fixture
def huge_backend(huge_pages: int) -> Iterator[tuple[Backend, Region]]:
    """Four huge pages in a block named huge, past LISTEN."""
    region = Region.create(RAMBlock("huge", 4 * HUGE, HUGE), Backing.HUGETLB)
    backend = Backend([region], user_mode_only=True)
    backend.incoming_init()
    listening(backend)
    yield backend, region
    backend.cleanup()
    region.close()
