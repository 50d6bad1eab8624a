"""The command line's frame: usage, exit codes, error lines, sizes."""

import argparse
import errno
import subprocess
import sys

import pytest

from postcopy_proto.cli import output
from postcopy_proto.cli.arguments import size
from postcopy_proto.cli.main import COMMANDS, main
from postcopy_proto.errors import (
    Channel,
    HostUnsupportedError,
    RemoteProtocolError,
    UserfaultError,
)

POSTCOPY = [sys.executable, "-m", "postcopy_proto"]


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command}" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"usage: postcopy {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["--no-such-option"]])
def test_wrong_usage_exits_2(arguments, capsys):
    assert main(arguments) == output.EXIT_USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: postcopy" in captured.err


def test_version_as_a_module():
    done = subprocess.run([*POSTCOPY, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("postcopy ")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("4096", 4096),
        ("0x1000", 4096),
        ("64K", 65536),
        ("256M", 256 << 20),
        ("2g", 2 << 30),
        ("1GiB", 1 << 30),
        ("3MB", 3 << 20),
        ("1T", 1 << 40),
    ],
)
def test_size(text, expected):
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5G", "1 M", "12Q", "0xg", "1iBM"])
def test_size_refuses(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        size(text)


@pytest.mark.parametrize(
    ("failure", "code", "line"),
    [
        (
            RemoteProtocolError("expected 7e", channel=Channel.FORWARD, offset=16),
            output.EXIT_FAILED,
            "postcopy: forward channel, offset 0x10: expected 7e\n",
        ),
        (
            UserfaultError("UFFDIO_COPY", errno.ENOENT, "No such file or directory"),
            output.EXIT_FAILED,
            "postcopy: UFFDIO_COPY: No such file or directory\n",
        ),
        (
            UserfaultError("userfaultfd", errno.EPERM, "Operation not permitted", advice="be root"),
            output.EXIT_HOST,
            "postcopy: userfaultfd: Operation not permitted; be root\n",
        ),
        (
            HostUnsupportedError(["no userfaultfd", "no luck"]),
            output.EXIT_HOST,
            "postcopy: no userfaultfd; no luck\n",
        ),
        (KeyboardInterrupt(), output.EXIT_INTERRUPTED, "postcopy: interrupted\n"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "x.bin"),
            output.EXIT_FAILED,
            "postcopy: x.bin: No such file or directory\n",
        ),
        # A socket's broken pipe is a failure; only our own stdout's is not.
        (
            BrokenPipeError(errno.EPIPE, "Broken pipe"),
            output.EXIT_FAILED,
            "postcopy: Broken pipe\n",
        ),
    ],
)
def test_report(failure, code, line, capsys):
    assert output.report(failure) == code
    captured = capsys.readouterr()
    assert captured.err == line
    assert captured.out == ""


def test_names_of_a_peer_cannot_drive_the_terminal(capsys):
    output.error(RemoteProtocolError("unknown RAMBlock '\x1b[31m\n'"))
    assert capsys.readouterr().err == "postcopy: unknown RAMBlock '\\x1b[31m\\n'\n"
    output.print_table("t", ["name"], [["[bold]\x1b]0;x\x07[/bold]"]])
    assert "[bold]\\x1b]0;x\\x07[/bold]" in capsys.readouterr().out


def test_no_progress_bar_without_a_terminal(capsys):
    with output.progress("reading", 10) as moved_to:
        moved_to(5)
    assert capsys.readouterr().err == ""
