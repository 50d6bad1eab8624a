"""`postcopy run`: starts a stock QEMU and restores a saved VM into it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from postcopy_proto.cli import output, restore

if TYPE_CHECKING:
    from postcopy_proto.cli.main import Subparsers

OURS = ("-incoming", "--incoming", "-daemonize", "--daemonize")
"""what must not be in the command: it is our part, or --detach's"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `run`."""
    parser = subparsers.add_parser(
        "run",
        help="start a QEMU and run a saved VM in it at once",
        usage="%(prog)s [options] FILE -- QEMU [ARGUMENT ...]",
        description="The command is the one that the VM was started with; -incoming defer and a "
        "private QMP socket are added. We stay as its parent until it ends.",
    )
    restore.add_arguments(parser)
    parser.add_argument("--detach", action="store_true", help="leave it running and return")
    parser.add_argument("command", nargs="+", metavar="QEMU", help="qemu-system-x86_64 …")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Start, restore, and wait for the end."""
    from postcopy_proto.net.incoming import IncomingQemu
    from postcopy_proto.net.launch import ended, launched, terminating

    for argument in args.command:
        if argument in OURS:
            return restore.usage(f"{argument} must not be among QEMU's arguments here")
    if args.background_bandwidth == 0 and args.drain_after is None:
        return restore.usage("--background-bandwidth 0 needs --drain-after here")
    if (code := restore.check(args)) is not None:
        return code
    with restore.opened(args) as vm:
        if vm is None:
            return output.EXIT_USAGE
        with launched(args.command, detach=args.detach) as (process, monitor), terminating(process):
            restore.deliver(args, vm, None, IncomingQemu(monitor))
    if args.detach:
        return output.EXIT_DONE
    with terminating(process):
        process.wait()
    if process.returncode != 0:
        output.error(f"QEMU {ended(process)}")
        return output.EXIT_FAILED
    return output.EXIT_DONE
