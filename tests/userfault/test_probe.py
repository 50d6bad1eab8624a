"""What the probe says here, to an ordinary user, and where something is missing."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import pytest

from postcopy_proto.cli import probe as cli
from postcopy_proto.userfault import descriptor, syscalls
from postcopy_proto.userfault.descriptor import Userfaultfd
from postcopy_proto.userfault.mapping import Mapping
from postcopy_proto.userfault.probe import FULL, USER_MODE_ONLY, ProbeResult, probe
from tests.userfault.support import PAGE, run_python, unprivileged

pytestmark = pytest.mark.userfault

REQUIRED = (
    "page-size",
    "api-handshake",
    "register",
    "copy",
    "zeropage",
    "wake",
    "unregister",
)


def failed(result: ProbeResult) -> set[str]:
    return {check.name for check in result.checks if check.required and not check.ok}


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["probe", *arguments])
    code: int = args.run(args)
    return code


def test_this_host() -> None:
    before = sorted(path.name for path in Path("/proc/self/fd").iterdir())
    result = probe()
    assert result.supported
    assert failed(result) == set()
    assert set(REQUIRED) <= {check.name for check in result.checks}
    # Everything opened is closed again; the directory itself is open while it is listed.
    assert sorted(path.name for path in Path("/proc/self/fd").iterdir()) == before


def test_the_mode_is_what_can_be_opened() -> None:
    try:
        Userfaultfd.open().close()
    except PermissionError:
        assert probe().mode == USER_MODE_ONLY
    else:
        assert probe().mode == FULL


def test_json_has_the_documented_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"supported", "mode", "checks"}
    assert document["supported"] is True
    assert document["mode"] in (FULL, USER_MODE_ONLY)
    for check in document["checks"]:
        assert {"name", "ok", "detail"} <= set(check)
        assert check["ok"] in (True, False)
        assert check["detail"]


def test_the_text_names_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    text = capsys.readouterr().out
    for name in REQUIRED:
        assert name in text
    assert "Postcopy works here" in text


def test_an_ordinary_user_has_user_mode_only_and_is_told_what_that_lacks() -> None:
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("vm.unprivileged_userfaultfd is 1: everything is allowed")
    code = (
        "import argparse, sys\n"
        "from postcopy_proto.cli import probe\n"
        "parser = argparse.ArgumentParser()\n"
        "probe.add_parser(parser.add_subparsers())\n"
        "args = parser.parse_args(sys.argv[1:])\n"
        "sys.exit(args.run(args))"
    )
    result = unprivileged([sys.executable, "-c", code, "probe", "--json"])
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["mode"] == "user-mode-only"
    full = next(check for check in document["checks"] if check["name"] == "userfaultfd")
    assert full["ok"] is False
    assert "vm.unprivileged_userfaultfd=1" in full["advice"]
    text = " ".join(unprivileged([sys.executable, "-c", code, "probe"]).stdout.split())
    assert "in user mode only" in text
    assert "faults inside the kernel are not" in text


def test_no_userfaultfd_at_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a container that forbids the system call: here by a number that no call has."""
    monkeypatch.setattr(descriptor, "DEVICE", "/dev/no-such-userfaultfd")
    monkeypatch.setattr(syscalls, "_USERFAULTFD_NUMBER", dict.fromkeys(_MACHINES, 100_000))
    result = probe()
    assert result.mode is None
    assert not result.supported
    assert {"register", "copy", "zeropage", "wake", "unregister"} <= failed(result)
    assert run("--json") == 3
    assert json.loads(capsys.readouterr().out)["supported"] is False
    assert run() == 3
    text = " ".join(capsys.readouterr().out.split())
    assert "does not work here" in text
    assert "CONFIG_USERFAULTFD" in text


_MACHINES = ("x86_64", "aarch64", "riscv64", "ppc64le", "s390x")


def test_a_machine_whose_system_call_has_no_number_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptor, "DEVICE", "/dev/no-such-userfaultfd")
    monkeypatch.setattr(syscalls, "_USERFAULTFD_NUMBER", {})
    result = probe()
    assert not result.supported
    assert any("not known here" in reason for reason in result.reasons)


def test_host_pages_of_another_size() -> None:
    """Sixteen of the pages of this machine as one: what is mapped for a check is of host pages."""
    code = (
        "import mmap\n"
        "mmap.PAGESIZE *= 16\n"
        "from postcopy_proto.userfault.probe import probe\n"
        "print(next(check.ok for check in probe().checks if check.name == 'shared-memory'))"
    )
    result = run_python(code)
    assert result.stdout == "True\n", result.stderr


def test_target_pages_bigger_than_the_hosts_are_refused() -> None:
    result = probe(target_page_size=64 * 1024)
    assert failed(result) == {"page-size"}
    assert result.mode is None


def test_locked_memory_is_found_and_stays_locked() -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            memory = Mapping.create(PAGE, PAGE)
            syscalls.lock_memory(True)
            result = probe()
            locked = _locked_line() != "0 kB"
            (lock,) = (check for check in result.checks if check.name == "memory-lock")
            status = 0 if result.supported and not lock.ok and locked else 2
            memory.close()
        except OSError:
            status = 3
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == 3:
        pytest.skip("this user may not lock memory")
    assert status == 0


def _locked_line() -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line for line in lines if line.startswith("VmLck:")).split(":")[1].strip()


@pytest.mark.hugetlb
def test_reserved_huge_pages_are_found(huge_pages: int) -> None:
    check = next(check for check in probe().checks if check.name == "hugetlb-2MiB")
    assert check.ok, check.detail
