"""Write 06-states.md from postcopy_proto/states.py: `python spec/generate.py`.

With `--check` nothing is written; the exit code says whether the page is current.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias, TypeVar

from postcopy_proto import states
from postcopy_proto.states import MessageType

PAGE = Path(__file__).parent / "06-states.md"

HEAD = """# States

<!-- Generated from postcopy_proto/states.py by spec/generate.py. Edit the tables there. -->

"""

State = TypeVar("State", bound=StrEnum)
Table: TypeAlias = Mapping[State, Mapping[MessageType, State]]


def theory() -> str:
    """The module's own explanation, with its heading turned into Markdown."""
    text = inspect.cleandoc(states.__doc__ or "")
    text = text.replace("Theory of operation\n===================", "## Theory of operation")
    _, _, text = text.partition("\n\n")
    return text + "\n"


def names(messages: list[MessageType]) -> str:
    """QEMU's names of some messages, each once, in order."""
    return ", ".join(sorted({message.NAME for message in messages}))


def moves(table: Table[State]) -> list[tuple[State, State, list[MessageType]]]:
    """(state, next state, messages), grouped, in the table's order."""
    grouped: dict[tuple[State, State], list[MessageType]] = {}
    for state, row in table.items():
        for message, after in row.items():
            grouped.setdefault((state, after), []).append(message)
    return [(state, after, messages) for (state, after), messages in grouped.items()]


def diagram(table: Table[State]) -> str:
    """The table as a Mermaid state diagram; what leaves a state unchanged is left to the table."""
    first, *_ = table
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {first.value}"]
    for state, after, messages in moves(table):
        if state is not after:
            lines.append(f"    {state.value} --> {after.value}: {names(messages)}")
    lines += [f"    {state.value} --> [*]" for state, row in table.items() if is_final(state, row)]
    return "\n".join([*lines, "```", ""])


def is_final(state: State, row: Mapping[MessageType, State]) -> bool:
    """Whether nothing leads out of a state."""
    return all(after is state for after in row.values())


def listing(table: Table[State]) -> str:
    """The table as Markdown: a line for each pair of states."""
    lines = ["| in | these messages | lead to |", "|---|---|---|"]
    for state, row in table.items():
        if not row:
            lines.append(f"| {state.value} | none | |")
        for before, after, messages in moves({state: row}):
            target = "stays" if before is after else after.value
            lines.append(f"| {before.value} | {names(messages)} | {target} |")
    return "\n".join([*lines, ""])


def page() -> str:
    """The whole page."""
    placed_once = ", ".join(sorted(state.value for state in states.PLACED_ONCE))
    return HEAD + "\n".join(
        [
            theory(),
            "## The forward channel, and the content of a package\n",
            diagram(states.FORWARD),
            listing(states.FORWARD),
            f"A page may be placed only once in: {placed_once}.\n",
            "## The return path\n",
            f"{names(list(states.RETURN_PATH_TRIGGERS))} travel on the forward channel and move "
            "the return path too.\n",
            diagram(states.RETURN_PATH),
            listing(states.RETURN_PATH).rstrip(),
            "",
        ]
    )


def main(arguments: list[str]) -> int:
    """Write the page, or compare it."""
    if arguments == ["--check"]:
        return 0 if PAGE.exists() and PAGE.read_text() == page() else 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
