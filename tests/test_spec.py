"""The written protocol is current and whole."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from postcopy_proto.wire import Limits
from postcopy_proto.wire.commands import MIG_CMD_ARGS, MigCmd
from postcopy_proto.wire.pages import RamSaveFlag
from postcopy_proto.wire.return_path import RP_CMD_ARGS, MigRpMsg
from postcopy_proto.wire.stream import QemuVm

SPEC = Path(__file__).parent.parent / "spec"
ROOT = SPEC.parent


def test_state_page_is_generated_from_the_tables():
    done = subprocess.run([sys.executable, SPEC / "generate.py", "--check"], check=False)
    assert done.returncode == 0, "run python spec/generate.py"


@pytest.mark.parametrize("page", sorted(SPEC.rglob("*.md")), ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    for module in re.findall(r"`((?:wire|savefile|net|cli|userfault|tests)/[\w/]+\.py)`", text):
        assert (ROOT / "postcopy_proto" / module).exists() or (ROOT / module).exists(), module


@pytest.mark.parametrize("page", sorted(SPEC.rglob("*.md")), ids=lambda page: page.name)
def test_diagrams_are_closed_and_of_a_known_sort(page):
    text = page.read_text()
    assert text.count("```") % 2 == 0
    for diagram in re.findall(r"```mermaid\n(.*?)```", text, re.DOTALL):
        assert diagram.split()[0] in {"sequenceDiagram", "stateDiagram-v2", "flowchart"}


def table_rows(page: str) -> list[list[str]]:
    """The cells of every table line of a page."""
    lines = (SPEC / page).read_text().splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]


def test_commands_are_those_of_the_code():
    written = {
        (int(row[0]), row[1]): row[2]
        for row in table_rows("02-commands.md")
        if len(row) == 5 and row[0].isdigit()
    }
    assert set(written) == {(cmd.value, cmd.name) for cmd in MigCmd if cmd is not MigCmd.INVALID}
    for cmd, lengths in MIG_CMD_ARGS.items():
        assert written[cmd, MigCmd(cmd).name] == " or ".join(map(str, lengths))


def test_return_path_messages_are_those_of_the_code():
    written = {
        (int(row[0]), row[1]): row[2]
        for row in table_rows("03-return-path.md")
        if len(row) == 5 and row[0].isdigit()
    }
    assert set(written) == {
        (one.value, one.name) for one in MigRpMsg if one is not MigRpMsg.INVALID
    }
    for number, length in RP_CMD_ARGS.items():
        assert written[number, MigRpMsg(number).name] == str(length)


def test_flags_and_items_are_those_of_the_code():
    flags = {(int(row[0], 16), row[1]) for row in table_rows("04-ram.md") if row[0][:2] == "0x"}
    assert flags == {(flag.value, flag.name) for flag in RamSaveFlag}
    items = {(int(row[0], 16), row[1]) for row in table_rows("01-stream.md") if row[0][:2] == "0x"}
    names = {QemuVm.SECTION_FOOTER: "FOOTER"}
    assert items == {(item.value, names.get(item, item.name)) for item in QemuVm}


def test_limits_in_the_vectors_readme_are_the_defaults():
    text = (SPEC / "vectors" / "README.md").read_text()
    limits = Limits()
    for phrase in (
        f"{limits.package_bytes >> 20} MiB of package",
        f"{limits.idstr} bytes of name",
        f"{limits.return_path_bytes} of return path message",
        f"{limits.bitmap_bytes >> 20} MiB of bitmap",
        f"{limits.description_bytes >> 20} MiB of description",
        f"{limits.capabilities} capabilities",
        f"2^{limits.block_length.bit_length() - 1} bytes of block",
    ):
        assert phrase in text, phrase
