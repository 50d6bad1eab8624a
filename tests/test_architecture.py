"""The house stands as it was drawn: no import runs upward, and the core does no I/O."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import postcopy_proto

ROOT = Path(postcopy_proto.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

FLOORS = (
    ("errors", "ramblock", "messages"),
    ("wire", "dirty", "userfault"),
    ("states", "source", "destination"),
    ("savefile",),
    ("net",),
    ("cli", "__main__"),
)
"""ground first, as in the design: a module imports from its own floor and those below"""

SANS_IO = ("errors", "ramblock", "messages", "wire", "dirty", "states", "source", "destination")
FORBIDDEN = {
    "socket",
    "os",
    "threading",
    "time",
    "asyncio",
    "select",
    "mmap",
    "fcntl",
    "ctypes",
    "subprocess",
    "multiprocessing",
    "pathlib",
    "tempfile",
    "selectors",
}
WITHOUT_FLOOR = {"__init__", "examples"}
"""the public names come from everywhere, and examples are users of the package"""


def room(module: Path) -> str:
    """The top-level name below the package that a file belongs to."""
    return module.relative_to(ROOT).parts[0].removesuffix(".py")


def floor(name: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if name in rooms)


def imports(module: Path) -> list[str]:
    """Every module that a file imports, wherever in it."""
    names = []
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            assert node.module is not None
            names.append(node.module)
            if node.module in ("postcopy_proto", "postcopy_proto.cli"):
                names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_every_module_has_a_floor() -> None:
    rooms = {name for level in FLOORS for name in level} | WITHOUT_FLOOR
    assert {room(module) for module in MODULES} <= rooms


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_runs_upward(module: Path) -> None:
    here = room(module)
    if here in WITHOUT_FLOOR:
        return
    for name in imports(module):
        if name.startswith("postcopy_proto.") and module.name != "__main__.py":
            there = name.split(".")[1]
            assert floor(there) <= floor(here), f"{here} imports {name}"


@pytest.mark.parametrize(
    "module",
    [module for module in MODULES if room(module) in SANS_IO],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_the_core_does_no_io(module: Path) -> None:
    assert not {name.split(".")[0] for name in imports(module)} & FORBIDDEN


def test_wire_and_userfault_do_not_know_each_other() -> None:
    for module in MODULES:
        if room(module) in ("wire", "userfault"):
            other = {"wire": "userfault", "userfault": "wire"}[room(module)]
            assert not any(f"postcopy_proto.{other}" in name for name in imports(module)), module


def test_only_declared_dependencies_are_imported() -> None:
    allowed = {"postcopy_proto", "construct", "bitarray", "numpy", "rich", "qemu", "zstandard"}
    for module in MODULES:
        for name in imports(module):
            top = name.split(".")[0]
            assert top in allowed or top in sys.stdlib_module_names, f"{module}: {name}"
