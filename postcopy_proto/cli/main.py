"""The frame of the command line: `postcopy COMMAND …`.

A subcommand is a module of this package with `add_parser(subparsers)`, which adds its parser and
sets `run` on it: a function that takes the parsed arguments and returns the exit code.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, TypeAlias

from postcopy_proto.cli import output
from postcopy_proto.errors import PostcopyError

if TYPE_CHECKING:
    Subparsers: TypeAlias = argparse._SubParsersAction[Any]

COMMANDS: tuple[str, ...] = ("probe", "demo", "receive", "restore", "run", "decode")
"""the subcommands, by the names of their modules, in the order in which the help lists them"""

TRACE_LOGGER = "postcopy_proto.trace"


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        sys.stdout.write(f"postcopy {metadata.version('postcopy-proto')}\n")
        parser.exit()


def build_parser(commands: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser with these subcommands."""
    parser = argparse.ArgumentParser(
        prog="postcopy",
        description="Both ends of QEMU's postcopy migration, on the wire and in the kernel.",
        epilog="Exit codes: 0 done, 1 the peer or the stream failed, 2 wrong usage, "
        "3 this host can't do it.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument(
        "--trace", action="store_true", help="log QEMU's trace events of postcopy on stderr"
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in commands:
        import_module(f"postcopy_proto.cli.{command}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    # Before anything imports numpy: its BLAS, of which nothing here is used, would start threads
    # that spin for a tenth of a second on CPUs that a VM is about to run on.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a peer's names may be in any script
    # Only the command that was asked for is imported; all of them only to be listed.
    asked = next((argument for argument in arguments if not argument.startswith("-")), None)
    wanted = (asked,) if asked in COMMANDS else COMMANDS
    try:
        parsed = build_parser(wanted).parse_args(arguments)
    except SystemExit as finished:
        return finished.code if isinstance(finished.code, int) else output.EXIT_USAGE
    if parsed.trace:
        _log_trace_events()
    try:
        code: int = parsed.run(parsed)
        sys.stdout.flush()
    except (PostcopyError, OSError, KeyboardInterrupt) as failure:
        return output.report(failure)
    return code


def _log_trace_events() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s.%(msecs)03d %(message)s", "%H:%M:%S"))
    logger = logging.getLogger(TRACE_LOGGER)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)


if __name__ == "__main__":
    sys.exit(main())
