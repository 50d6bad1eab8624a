"""Fixtures: userfaultfd as full as it gets here, and reserved huge pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from postcopy_proto.errors import UserfaultError
from postcopy_proto.userfault.descriptor import Userfaultfd

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
