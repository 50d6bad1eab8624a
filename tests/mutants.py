"""Mutation score: does some test notice each small change to the protocol's core?

    pip install -e '.[mutation]'
    python -m tests.mutants states.py                     every mutant of a module
    python -m tests.mutants wire --sample 430 --jobs 2    a share of each module of wire/
    python -m tests.mutants wire/ram.py --line 120        what stands in one line

A mutant is the module with one node of its syntax tree replaced: by mutmut's operators, and by a
few for tables (an entry left out, another state, a message more). They are applied to the whole
module, not only inside functions as mutmut does, because tables are read at import. Each runs in
a copy of the checkout and in a process of its own that has not imported the package yet; the
tests that know the module best come first, and the first failure kills. `--seed` gives another
sample.

Last figures: states.py 884 of 884; of wire/'s 5,676 a sample of 441: 405 killed, 3 timed out,
33 survived (92.5 %). Tests written since kill eleven of them; most others change no outcome: names
of constant fields in a schema, the wording of a reason, a step of numpy that only saves time
(`_extend_foretold`, `_extend_run`), None for False. Not looked at to the end: five in scatter.py
and one in device_state.py.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import libcst as cst
import libcst.matchers as m
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "postcopy_proto"
COPIED = (PACKAGE, "tests", "spec", "fuzz", "pyproject.toml")

PRELOADED = ("numpy", "construct", "bitarray", "hypothesis", "pytest", "rich.console")
"""what the tests import, loaded once: a process is forked from there for each mutant"""

WIRE = "tests/wire/test_"
LAST = ["tests/test_vectors.py", WIRE + "properties.py"]
RAM = [WIRE + "pages.py", WIRE + "forward.py", WIRE + "captures.py"]
TESTS: dict[str, list[str]] = {
    "states": ["tests/test_states.py", "tests/test_connections.py"],
    "bitmap": [WIRE + "return_path.py", WIRE + "layouts.py"],
    "block_list": [WIRE + "block_list.py", WIRE + "layouts.py"],
    "buffer": [WIRE + name for name in ("buffer.py", "scatter.py", "forward.py")],
    "commands": [WIRE + "layouts.py", WIRE + "forward.py", WIRE + "package.py"],
    "configuration": [WIRE + "forward.py", WIRE + "layouts.py"],
    "decoder": [WIRE + "return_path.py", WIRE + "buffer.py", WIRE + "forward.py"],
    "device_state": [WIRE + "device_state.py"],
    "discard": [WIRE + "layouts.py", WIRE + "forward.py", "tests/test_dirty_wire.py"],
    "fields": [WIRE + "layouts.py", WIRE + "forward.py"],
    "forward": [WIRE + "forward.py", WIRE + "block_list.py", WIRE + "device_state.py"],
    "package": [WIRE + "package.py"],
    "pages": [WIRE + "layouts.py", *RAM],
    "preempt": [WIRE + "pages.py"],
    "ram": RAM,
    "return_path": [WIRE + "return_path.py", WIRE + "layouts.py"],
    "scatter": [WIRE + "scatter.py"],
    "stream": [WIRE + "layouts.py", WIRE + "forward.py"],
}
"""the tests that know a module best, in the order in which they are run"""

SECONDS = 200
"""of a processor's time for the tests of one mutant: those of wire/ take half as much together"""


class Mutant(NamedTuple):
    """A module with one change: its path in the package, where and what, and the new text."""

    module: str
    line: int
    change: str
    text: str


# ---- making them


def drop_each_element(node: cst.Dict | cst.Tuple | cst.List | cst.Set) -> Iterator[cst.CSTNode]:
    """An entry left out of a table."""
    if isinstance(node, cst.Set) and len(node.elements) == 1:
        return
    for at in range(len(node.elements)):
        rest = [*node.elements[:at], *node.elements[at + 1 :]]
        if isinstance(node, cst.Tuple) and len(rest) == 1:
            rest = [rest[0].with_changes(comma=cst.Comma())]
        yield node.with_changes(elements=rest)


STATES = {
    "F": ["NONE", "PRECOPY", "ADVISE", "DISCARD", "LISTENING", "RUNNING", "END"],
    "R": ["CLOSED", "OPEN", "FAULTS", "NAMED", "SHUT"],
}


def another_state(node: cst.Attribute) -> Iterator[cst.CSTNode]:
    """`F.NONE` and `R.OPEN`, as the state tables write them: two others."""
    if isinstance(node.value, cst.Name) and node.value.value in STATES:
        names = STATES[node.value.value]
        at = names.index(node.attr.value) if node.attr.value in names else 0
        for name in {names[at - 1], names[(at + 1) % len(names)]} - {node.attr.value}:
            yield node.with_changes(attr=cst.Name(name))


OPERATORS = [
    *mutation_operators,
    ((cst.Dict, cst.Tuple, cst.List, cst.Set), drop_each_element),
    (cst.Attribute, another_state),
]


class Finder(cst.CSTVisitor):
    """Every node that may be replaced, with its line and its replacements; no types, no imports."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        self.found: list[tuple[int, cst.CSTNode | None, cst.CSTNode | str]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, (cst.Annotation, cst.Import, cst.ImportFrom)):
            return False
        if isinstance(node, cst.AnnAssign) and m.matches(
            node.annotation.annotation, m.Name("TypeAlias")
        ):
            return False
        place = self.get_metadata(PositionProvider, node, None)
        for kind, operator in OPERATORS:
            if place and isinstance(node, kind):
                self.found += [(place.start.line, node, other) for other in operator(node)]
        return True


def one_message_more() -> Iterator[tuple[int, None, str]]:
    """A message that a state has no place for gets one, and leaves the state as it is."""
    from postcopy_proto import messages, states  # here only: the tests must import it afresh

    every = [kind for kind in vars(messages).values() if isinstance(kind, type)]
    every = [kind for kind in every if issubclass(kind, messages.Message) and kind.NAME]
    for name, table in (("FORWARD", states.FORWARD), ("RETURN_PATH", states.RETURN_PATH)):
        for state, row in table.items():
            for kind in every:
                if kind not in row:
                    here = f"{type(state).__name__}.{state}"
                    yield 0, None, f"{name}[{here}][m.{kind.__name__}] = {here}"


def mutants(module: str, line: int | None, share: Callable[[int], int]) -> list[Mutant]:
    """So many of a module's as `share` gives for their number; `line` is the only one if given."""
    source = (ROOT / PACKAGE / module).read_text()
    wrapper = MetadataWrapper(cst.parse_module(source))
    finder = Finder()
    wrapper.visit(finder)
    if module == "states.py":
        finder.found += one_message_more()
    found = [place for place in finder.found if line in (None, place[0])]
    random.shuffle(found)
    chosen: dict[str, Mutant] = {}
    for at, old, new in found[: share(len(found))]:
        if old is None:
            text, change = f"{source}\n{new}\n", str(new)
        else:
            text = wrapper.module.deep_replace(old, new).code
            change = " -> ".join(cst.Module([]).code_for_node(node).strip() for node in (old, new))
        with contextlib.suppress(SyntaxError):
            compile(text, module, "exec")
            chosen[text] = Mutant(module, at, change, text)
    chosen.pop(source, None)
    return list(chosen.values())


def sample(modules: list[str], size: int | None, line: int | None) -> list[Mutant]:
    """The mutants to run: all, or about `size` of them, the same share of each module."""
    numbers: list[int] = []
    for module in modules:
        mutants(module, line, lambda number: numbers.append(number) or 0)
    part = 1 if size is None else size / sum(numbers)
    chosen = [
        mutant
        for module in modules
        for mutant in mutants(module, line, lambda number: math.ceil(number * part))
    ]
    print(f"{len(chosen)} of {sum(numbers)} mutants of {len(modules)} modules", flush=True)
    random.shuffle(chosen)
    return chosen


# ---- running them


def tests_of(module: str) -> list[str]:
    """Files of tests for a module, in the order in which they are run."""
    chosen = TESTS.get(Path(module).stem, [WIRE + "forward.py"])
    return list(dict.fromkeys([*chosen, *(LAST if module.startswith("wire") else [])]))


_copy: Path


def open_copy(parent: str) -> None:
    """In each worker: its own copy of the checkout, and what can be imported beforehand."""
    global _copy
    _copy = Path(tempfile.mkdtemp(dir=parent))
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, _copy / name, ignore=shutil.ignore_patterns("*.pyc"))
        else:
            shutil.copy(ROOT / name, _copy / name)
    os.environ.update(
        PYTHONPATH=str(_copy), OPENBLAS_NUM_THREADS="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"
    )
    for name in PRELOADED:
        __import__(name)
    from hypothesis import Phase, settings

    settings.register_profile(
        "mutants",
        phases=(Phase.explicit, Phase.generate),  # a failure is enough, it need not be a small one
        max_examples=30,
        deadline=None,
        database=None,
    )
    settings.load_profile("mutants")
    # Compiled once and kept, all but the module that is mutated.
    every = dict.fromkeys(chain(*TESTS.values(), LAST))
    if outcome(["--collect-only"], [list(every)]) != "survived":
        raise RuntimeError(f"the tests in {_copy} can't be collected")


def run_tests_here(options: list[str], stages: list[list[str]]) -> int:
    """In the forked process: 0 when every test passes."""
    import pytest

    os.chdir(_copy)
    sys.path.insert(0, str(_copy))
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", PACKAGE)]:
        del sys.modules[name]
    options = [*options, "-xq", "-p", "no:cacheprovider", "-o", "addopts=", f"--rootdir={_copy}"]
    return next((int(code) for tests in stages if (code := pytest.main([*options, *tests]))), 0)


def outcome(options: list[str], stages: list[list[str]]) -> str:
    """`killed`, `survived` or `timeout`, from a process that runs the tests stage by stage."""
    child = os.fork()
    if not child:
        code = 3
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            signal.alarm(10 * SECONDS)  # a test that waits for ever
            silence = os.open(os.devnull, os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(silence, number)
            code = run_tests_here(options, stages)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGALRM):
        return "timeout"
    return "killed" if code else "survived"


def run(mutant: Mutant) -> tuple[Mutant, str]:
    """A mutant's outcome."""
    path = _copy / PACKAGE / mutant.module
    source = path.read_text()
    sys.dont_write_bytecode = True  # a file changed twice within a second would look current
    for cached in path.parent.glob(f"__pycache__/{path.stem}.*"):
        cached.unlink()
    try:
        path.write_text(mutant.text)
        return mutant, outcome([], [[test] for test in tests_of(mutant.module)])
    finally:
        path.write_text(source)


def run_unchanged(modules: list[str]) -> str:
    """What becomes of the code as it is: without `survived` no figure means anything."""
    return outcome([], [list(dict.fromkeys(chain(*map(tests_of, modules))))])


def modules_in(places: list[str]) -> list[str]:
    package = ROOT / PACKAGE
    found: list[Path] = []
    for place in places:
        path = package / place
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [str(path.relative_to(package)) for path in found]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("where", nargs="+", help="module or directory in the package")
    parser.add_argument("--sample", type=int, metavar="N", help="about so many mutants, not all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--line", type=int, help="only mutants of this line")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    modules = modules_in(arguments.where)
    chosen = sample(modules, arguments.sample, arguments.line)
    count: Counter[tuple[str, str]] = Counter()
    workers = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as parent,
        workers.Pool(arguments.jobs, open_copy, (parent,)) as pool,
    ):
        if (said := pool.apply(run_unchanged, (modules,))) != "survived":
            sys.exit(f"the tests fail for the code as it is: {said}")
        for mutant, said in pool.imap_unordered(run, chosen):
            count[mutant.module, said] += 1
            print(f"{sum(count.values())}/{len(chosen)}", end="\r", file=sys.stderr)
            if said != "killed":
                print(f"{said}: {mutant.module}:{mutant.line}: {mutant.change}", flush=True)
    for module in modules:
        of_module = {said: count[module, said] for said in ("killed", "timeout", "survived")}
        print(f"{module}: " + ", ".join(f"{number} {said}" for said, number in of_module.items()))
    survived = sum(number for (_, said), number in count.items() if said == "survived")
    print(f"score {1 - survived / max(len(chosen), 1):.1%} of {len(chosen)}")


if __name__ == "__main__":
    main()
