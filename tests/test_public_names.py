"""The names of the two packages: all there, looked up late, and the binding by itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import postcopy_proto
from postcopy_proto import userfault

INIT = Path(postcopy_proto.__file__)


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True, cwd=INIT.parents[1]
    ).stdout.strip()


SEEN = "print(sorted({'numpy', 'bitarray', 'construct'} & sys.modules.keys()))"


@pytest.mark.parametrize(
    "imports",
    [
        "from postcopy_proto.userfault import *",
        "from postcopy_proto.userfault import Userfaultfd, UserfaultError",
        "from postcopy_proto import Userfaultfd, UserfaultError",
    ],
)
def test_the_binding_needs_the_standard_library_only(imports: str) -> None:
    assert run(f"import sys\n{imports}\n{SEEN}") == "[]"


def test_the_core_imports_nothing_of_linux() -> None:
    code = (
        "import sys\nfrom postcopy_proto import SourceConnection, DestinationConnection, encode\n"
        "print([name for name in sys.modules if 'userfault' in name or name == 'fcntl'])"
    )
    assert run(code) == "[]"


@pytest.mark.parametrize("package", [postcopy_proto, userfault], ids=lambda module: module.__name__)
def test_every_public_name_is_there(package: object) -> None:
    names = package.__all__  # type: ignore[attr-defined]
    assert len(names) == len(set(names))
    for name in names:
        assert getattr(package, name) is not None
        assert name in dir(package)


def test_names_are_shown_before_they_are_looked_up() -> None:
    assert run("import postcopy_proto; print('Backend' in dir(postcopy_proto))") == "True"


def test_what_does_not_exist_is_an_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = postcopy_proto.nothing  # type: ignore[attr-defined]
    with pytest.raises(ImportError):
        exec("from postcopy_proto import nothing")


def test_type_checkers_see_what_is_looked_up() -> None:
    """The imports that only they read, the table that is read at run time, and `__all__`."""
    (block,) = (node for node in ast.parse(INIT.read_text()).body if _is_for_checkers(node))
    shown = {
        (node.module.split(".", 1)[1].removeprefix("userfault."), alias.name)
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }
    for home, name in shown:
        table = postcopy_proto._HOMES.get(name, "messages").removeprefix("userfault.")
        assert home.removesuffix(".encode") == table, name
    names = {name for _, name in shown}
    assert postcopy_proto._HOMES.keys() <= names <= set(postcopy_proto.__all__)


def _is_for_checkers(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )
