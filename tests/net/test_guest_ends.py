"""What a guest process says when it can't do what it is asked, and once it is closed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import numpy as np
import pytest

from postcopy_proto.errors import UserfaultError
from postcopy_proto.net.guest import GuestError, GuestProcess
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.userfault.abi import Features
from postcopy_proto.userfault.backend import Backend
from tests.userfault.support import MIB, PAGE, run_python

pytestmark = pytest.mark.userfault


def test_memory_that_the_system_refuses_is_told_with_the_reason() -> None:
    code = """
import resource
from postcopy_proto.errors import UserfaultError
from postcopy_proto.net.guest import GuestProcess
from postcopy_proto.ramblock import RAMBlock
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try: GuestProcess.start([RAMBlock("ram", 1 << 24)], backing="memfd")
except UserfaultError as error: print(error.errno, error)
"""
    result = run_python(code)
    assert result.stdout.startswith(f"{errno.EFBIG} "), result.stderr
    assert "File too large" in result.stdout
    assert result.stderr == ""


def test_memory_of_no_size_that_the_system_can_count() -> None:
    with pytest.raises(UserfaultError):
        GuestProcess.start([RAMBlock("ram", 1 << 63)], backing="memfd")


def test_a_command_that_fails_does_not_end_the_guest() -> None:
    with GuestProcess.start([RAMBlock("ram", PAGE)], user_mode_only=True) as guest:
        with pytest.raises(UserfaultError, match="touch"):
            guest._ask("touch", count=1, threads=1)
        with pytest.raises(UserfaultError, match="map"):
            guest._ask("map", length=PAGE, page_size=PAGE, backing="none of these")
        touch = guest.touch()
        touch.wait(10)
        assert touch.words.tolist() == [0]
        assert guest.returncode is None


def test_the_userfaultfd_of_a_guest_is_not_inherited() -> None:
    with GuestProcess.start([RAMBlock("ram", PAGE)], user_mode_only=True) as guest:
        uffd, _ = guest.open_userfaultfd(Features(0), None)
        with uffd:
            assert not os.get_inheritable(uffd.fileno())


@pytest.mark.parametrize(
    "call",
    [
        lambda guest: guest.touch(),
        lambda guest: guest.read("ram", 0, 8),
        lambda guest: guest.receive(),
        lambda guest: guest.fileno(),
        lambda guest: guest.available_features(),
        lambda guest: guest.open_userfaultfd(Features(0), None),
        lambda guest: guest.discard(guest.regions[0], 0, PAGE),
        lambda guest: guest.advise_huge_pages(guest.regions[0], True),
        lambda guest: guest.lock_memory(False),
    ],
    ids=["touch", "read", "receive", "fileno", "features", "open", "discard", "huge", "lock"],
)
def test_a_closed_guest_says_so(call: Callable[[GuestProcess], object]) -> None:
    guest = GuestProcess.start([RAMBlock("ram", PAGE)], user_mode_only=True)
    guest.close()
    with pytest.raises(GuestError, match="was closed"):
        call(guest)
    guest.close()
    assert guest.returncode == 0


def test_what_a_closed_guest_was_asked_for_is_forgotten() -> None:
    guest = GuestProcess.start([RAMBlock("ram", MIB)], user_mode_only=True)
    backend = Backend(guest.regions)
    backend.incoming_init()
    backend.enable_notify()
    touch = guest.touch({"ram": np.array([0])})
    guest.discard(guest.regions[0], 0, PAGE)
    guest.close()
    with pytest.raises(GuestError, match="was closed"):
        touch.poll()
    guest.flush()
    backend.cleanup()
