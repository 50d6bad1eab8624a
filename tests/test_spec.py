"""The written protocol is current and whole."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
