"""Targets leave nothing behind, on whichever path they are closed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from postcopy_proto import messages as m
from postcopy_proto.destination import DestinationConnection
from postcopy_proto.examples.source import ToyVm
from postcopy_proto.net.guest import GuestError, GuestProcess, Touch
from postcopy_proto.net.target import FileTarget, GuestTarget
from postcopy_proto.source import SourceConnection

pytestmark = pytest.mark.userfault

PAGE = 4096


def started_connection() -> DestinationConnection:
    """One that has read RAM's block list: 64 pages named ram."""
    connection = DestinationConnection()
    source = SourceConnection(ToyVm({"ram": 64 * PAGE}), m.Configuration("toy-1"))
    connection.receive_data(source.start())
    while not isinstance(connection.next_event(), m.NeedData):
        pass
    return connection


def first_page(guest: GuestProcess, _: DestinationConnection) -> Touch:
    return guest.touch({"ram": np.array([0])})


def open_descriptors() -> list[str]:
    """What is open, but for the memory files that a `Touch` keeps."""
    with os.scandir("/proc/self/fd") as entries:
        links = [Path(entry.path) for entry in entries]
    opened = [str(link.readlink()) for link in links if os.path.lexists(link)]
    return sorted(name for name in opened if "memfd:touch" not in name)


def test_a_guest_given_up_while_it_waits_leaves_nothing() -> None:
    before = open_descriptors()
    target = GuestTarget(first_page)
    target.open(started_connection())
    target.listen()
    target.run()
    while not target.read_faults():
        assert not target.pending
    target.close()
    assert target.guest.returncode is not None
    assert open_descriptors() == before
    target.close()


def test_a_guest_given_up_at_every_step_leaves_nothing() -> None:
    before = open_descriptors()
    for steps in range(4):
        target = GuestTarget(first_page)
        if steps > 0:
            target.open(started_connection())
        if steps > 1:
            target.prepare_discard()
            target.discard("ram", 0, PAGE)
        if steps > 2:
            target.listen()
        target.close()
        assert open_descriptors() == before


def test_a_file_with_a_guest_given_up_leaves_nothing(tmp_path: Path) -> None:
    before = open_descriptors()
    target = FileTarget(tmp_path / "vm.save", GuestTarget(first_page))
    target.open(started_connection())
    target.listen()
    assert not target.pending
    target.close()
    assert open_descriptors() == before
    assert list(tmp_path.iterdir()) == []
    assert not FileTarget(tmp_path / "vm.save").pending


def test_a_closed_guest_says_so() -> None:
    target = GuestTarget(first_page)
    target.open(started_connection())
    target.close()
    with pytest.raises(GuestError, match="was closed"):
        target.tick()
