"""What every subcommand does alike: data on stdout, everything else on stderr, exit codes.

Tables are for people, JSON is for programs. Colour and progress bars appear on terminals only,
and colour not at all when NO_COLOR is set.
"""

from __future__ import annotations

import errno
import json
import os
import select
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from postcopy_proto.errors import (
    HostUnsupportedError,
    PostcopyError,
    UserfaultError,
)

if TYPE_CHECKING:
    from rich.console import Console

EXIT_DONE = 0
EXIT_FAILED = 1
"""the peer or the stream failed"""
EXIT_USAGE = 2
EXIT_HOST = 3
"""this host can't do it"""
EXIT_INTERRUPTED = 130

_HOST_ERRNOS = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS})
_PIPE_WIDTH = 160
HISTOGRAM_WIDTH = 40
"""characters of the longest bar"""


def print_json(document: object) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def print_json_line(document: object) -> None:
    """One line of a stream of JSON documents on stdout."""
    sys.stdout.write(json.dumps(document, separators=(", ", ": ")) + "\n")


def print_line(text: str) -> None:
    """A line on stdout."""
    sys.stdout.write(f"{printable(text)}\n")


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    right: Iterable[int] = (),
) -> None:
    """A table on stdout; `right` numbers the columns that hold figures."""
    from rich.table import Table
    from rich.text import Text

    aligned_right = frozenset(right)
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number in aligned_right else "left")
    for row in rows:
        # Names come from peers: Text keeps square brackets in them from becoming markup.
        table.add_row(*(Text(printable(cell)) for cell in row))
    stdout_console().print(table)


def print_histogram(title: str, unit: str, rows: Sequence[tuple[int, int]]) -> None:
    """Counts by upper bound in µs, each with a bar; `unit` is what is counted. None: nothing."""
    most = max((count for _, count in rows), default=0)
    if most:
        print_table(
            title,
            ("up to us", unit, ""),
            [
                (f"{up_to:,}", f"{count:,}", "#" * -(-HISTOGRAM_WIDTH * count // most))
                for up_to, count in rows
            ],
            right=(0, 1),
        )


def stdout_console() -> Console:
    """A console on stdout: wide when it is no terminal, so that nothing is cut off there."""
    from rich.console import Console

    class StdoutConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    return StdoutConsole(
        file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH
    )


def printable(cell: object) -> str:
    """Text that a terminal shows as it is: control and stray bytes come out escaped."""
    text = str(cell)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def error(text: object) -> None:
    """The line on stderr that says why we stop."""
    sys.stderr.write(f"postcopy: {printable(text)}\n")


def note(text: object) -> None:
    """A line on stderr for people to know what goes on."""
    sys.stderr.write(f"{printable(text)}\n")


@contextmanager
def progress(
    description: str, total: int | None, *, enabled: bool = True
) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, for as long as the block runs; gives the function that moves it.

    The function takes the bytes done so far. It does nothing when stderr is no terminal.
    """
    if not (enabled and sys.stderr.isatty()):
        yield lambda completed: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(description, total=total)
        yield lambda completed: bar.update(task, completed=completed)


def exit_code(failure: BaseException) -> int:
    """The exit code that says what sort of failure it was."""
    if isinstance(failure, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(failure, HostUnsupportedError):
        return EXIT_HOST
    if isinstance(failure, UserfaultError) and failure.errno in _HOST_ERRNOS:
        return EXIT_HOST
    return EXIT_FAILED


def report(failure: BaseException) -> int:
    """Say on stderr what went wrong, if there is something to say; the exit code."""
    if isinstance(failure, KeyboardInterrupt):
        error("interrupted")
    elif isinstance(failure, BrokenPipeError) and stdout_is_closed():
        return EXIT_DONE  # the reader has seen enough
    elif isinstance(failure, OSError) and not isinstance(failure, PostcopyError):
        error(_describe_os_error(failure))
    else:
        error(failure)
    return exit_code(failure)


def stdout_is_closed() -> bool:
    """Whether the reader of our stdout has gone; from then on stdout leads nowhere."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return False  # no file at all: a test's or an embedder's stdout
    poll = select.poll()
    poll.register(descriptor, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    # What is still buffered would fail once more when the interpreter ends.
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, descriptor)
    os.close(devnull)
    return True


def _describe_os_error(failure: OSError) -> str:
    reason = failure.strerror or str(failure)
    return f"{failure.filename}: {reason}" if failure.filename else reason
