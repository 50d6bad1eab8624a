"""`postcopy demo`: verified, as root and as nobody, and gone without a trace when interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import pytest

pytestmark = pytest.mark.userfault

COMMAND = [sys.executable, "-m", "postcopy_proto", "demo"]
NOBODY = 65534


def demo(*options: str, prefix: Sequence[str] = ()) -> dict[str, Any]:
    finished = subprocess.run(
        [*prefix, *COMMAND, "--json", *options], capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    document: dict[str, Any] = json.loads(finished.stdout)
    return document


def processes() -> set[str]:
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    return {line for line in listed.splitlines() if "guest_child" in line or "demo_source" in line}


def check(document: dict[str, Any], size: int) -> None:
    assert document["verified"] is True
    assert document["bytes"] == size
    assert document["pages"] + document["zero_pages"] > size // 4096
    assert document["zero_pages"] > 0
    assert document["faults"] > 0
    assert document["requests"] > 0
    assert document["discard_ranges"] > document["discard_commands"] > 0
    assert 0 < document["fault_latency_us"]["p50"] <= document["fault_latency_us"]["max"]
    waits = sum(document["fault_latency_histogram"])
    assert waits == sum(thread["faults"] for thread in document["fault_threads"])
    assert 0 < waits <= document["faults"]
    for thread in document["fault_threads"]:
        assert thread["thread_id"] > 0
        assert 0 < thread["max_us"] <= thread["total_us"]
    assert document["seconds"] > 0
    assert document["gigabytes_per_second"] > 0


def test_default() -> None:
    check(demo(), 256 << 20)


@pytest.mark.parametrize("touch", ["random", "sequential"])
@pytest.mark.parametrize("mode", ["latency", "throughput"])
def test_options(touch: str, mode: str) -> None:
    options = ["--size", "32M", "--dirty", "0.9", "--touch", touch, "--mode", mode, "--seed", "3"]
    check(demo(*options), 32 << 20)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_without_privileges() -> None:
    """As nobody, who may still read: the interpreter may live where only root can look."""
    keep = [f"--{which}=+dac_read_search" for which in ("inh-caps", "ambient-caps")]
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *keep]
    document = demo("--size", "32M", prefix=become)
    check(document, 32 << 20)


def test_text() -> None:
    finished = subprocess.run([*COMMAND, "--size", "8M"], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    for word in (
        "verified",
        "faults",
        "discards",
        "fault latency",
        "GB/s",
        "userfaultfd",
        "how long",
        "####",
    ):
        assert word in finished.stdout
    assert finished.stderr == ""


@pytest.mark.parametrize("seconds", [0.3, 1.0, 1.6])
def test_interrupted(seconds: float) -> None:
    before = processes()
    running = subprocess.Popen(
        [*COMMAND, "--size", "512M"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(seconds)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=20)
    assert running.returncode in (130, -signal.SIGINT), errors
    assert "Traceback" not in errors or running.returncode == -signal.SIGINT
    deadline = time.monotonic() + 5
    while processes() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes() == before


def test_killed_outright_leaves_nothing_either() -> None:
    before = processes()
    running = subprocess.Popen([*COMMAND, "--size", "512M"], stdout=subprocess.DEVNULL)
    time.sleep(1.2)
    running.kill()
    running.wait()
    deadline = time.monotonic() + 5
    while processes() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes() == before


@pytest.mark.parametrize("options", [["--size", "1"], ["--dirty", "2"], ["--touch", "backwards"]])
def test_wrong_usage(options: list[str]) -> None:
    finished = subprocess.run([*COMMAND, *options], capture_output=True, text=True)
    assert finished.returncode == 2
