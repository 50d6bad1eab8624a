"""The table of spec/08-model.md: complete, and every name on it exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from postcopy_proto.dirty.discards import DiscardEncoder
from postcopy_proto.ramblock import RAMBlock
from tests.userfault.support import PAGE, ROOT

PAGE_TEXT = (ROOT / "spec" / "08-model.md").read_text()
TESTS = Path(__file__).parent

FUNCTIONS = {
    "ufd_version_check",
    "postcopy_ram_supported_by_host",
    "postcopy_ram_discard_range",
    "init_range",
    "postcopy_ram_incoming_init",
    "nhp_range",
    "postcopy_ram_prepare_discard",
    "ram_block_enable_notify",
    "postcopy_ram_enable_notify",
    "postcopy_ram_fault_thread",
    "postcopy_place_page",
    "postcopy_place_page_zero",
    "postcopy_get_tmp_page",
    "cleanup_range",
    "postcopy_ram_incoming_cleanup",
    "postcopy_discard_send_init",
    "postcopy_discard_send_range",
    "postcopy_discard_send_finish",
}


def rows() -> list[list[str]]:
    """Cells of every table row that names a test."""
    lines = [line for line in PAGE_TEXT.splitlines() if line.startswith("|") and "::" in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_no_function_is_missing() -> None:
    first = " ".join(row[0] for row in rows())
    assert set(re.findall(r"`(\w+)`", first)) >= FUNCTIONS


def counterparts() -> list[str]:
    dotted = re.findall(r"`((?:\w+\.)+\w+)`", " ".join(row[1] for row in rows() if len(row) > 2))
    return sorted(set(dotted))


@pytest.mark.parametrize("name", counterparts())
def test_every_counterpart_exists(name: str) -> None:
    full = name if name.startswith("postcopy_proto.") else f"postcopy_proto.userfault.{name}"
    parts = full.split(".")
    for depth in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:depth]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[depth:]:
            found = getattr(found, attribute)
        return
    raise AssertionError(name)


def test_every_test_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE_TEXT)
    assert len(named) >= len(FUNCTIONS)
    for file, test in named:
        assert f"def {test}(" in (TESTS / file).read_text(), f"{file}::{test}"


def test_discards_of_one_block() -> None:
    """Thirteen runs: a command as the twelfth is queued, another with the one that is left."""
    encoder = DiscardEncoder(RAMBlock("pc.ram", 64 * PAGE), PAGE)
    commands = [encoder.add(2 * run, 1) for run in range(13)]
    commands.append(encoder.finish())
    assert [bool(command) for command in commands] == [False] * 11 + [True, False, True]
    assert (encoder.range_count, encoder.command_count) == (13, 2)
    # Type, command 9, length; version 0, the name, its end; start and length of each range.
    name = b"\0\6pc.ram\0"
    body = name + b"".join((2 * run * PAGE).to_bytes(8) + PAGE.to_bytes(8) for run in range(12))
    assert commands[11].endswith(body)
    assert commands[13].endswith(name + (24 * PAGE).to_bytes(8) + PAGE.to_bytes(8))
    assert encoder.finish() == b""
