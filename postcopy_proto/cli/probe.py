"""`postcopy probe`: what this host can do for postcopy, and what to do about what it can't."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from postcopy_proto.cli import output
from postcopy_proto.userfault.probe import FULL, USER_MODE_ONLY, Check, ProbeResult, probe

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[Any]

_VERDICTS = {
    FULL: "Postcopy works here: every fault of a guest is reported, those of its kernel included.",
    USER_MODE_ONLY: (
        "Postcopy works here for processes of our own, in user mode only: faults of user code are "
        "reported, faults inside the kernel are not. A system call or KVM that meets a missing "
        "page fails (EFAULT, SIGBUS) instead of waiting, so no VM with KVM, vhost or direct I/O "
        "can be served."
    ),
    None: "Postcopy does not work here.",
}


def add_parser(subparsers: Subparsers) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "probe",
        help="what this host can do, check by check",
        description="Check what postcopy needs of this host, as the current user. "
        "Exit code 0 when it works (in user mode only is enough for our own processes), else 3.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the checks; 0 when postcopy is supported, 3 when not."""
    result = probe()
    if args.json:
        output.print_json(result.as_dict())
    else:
        _print_text(result)
    return output.EXIT_DONE if result.supported else output.EXIT_HOST


def _print_text(result: ProbeResult) -> None:
    rows = [(check.name, _mark(check), check.detail, check.advice) for check in result.checks]
    output.print_table("postcopy probe", ("check", "", "found", "what to do"), rows)
    console = output.stdout_console()
    console.print(_VERDICTS[result.mode], markup=False, soft_wrap=False)


def _mark(check: Check) -> str:
    if check.ok:
        return "ok"
    return "missing" if check.required else "absent"
