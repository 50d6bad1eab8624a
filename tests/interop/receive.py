"""Runs `postcopy receive` as an operator does, beside a stock source."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.interop.qemu import wait_until


@dataclass
class Receiver:
    """A running `postcopy receive`."""

    process: subprocess.Popen[str]
    address: str
    stderr: Path

    @classmethod
    def start(cls, listen: str, output: Path, *options: str) -> Receiver:
        stderr = output.with_suffix(".stderr")
        command = [sys.executable, "-m", "postcopy_proto", "receive", "--listen", listen]
        with open(stderr, "wb") as errors:
            process = subprocess.Popen(
                [*command, "--output", str(output), "--json", *options],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

        def announced() -> str:
            assert process.poll() is None, stderr.read_text()
            lines = stderr.read_text().splitlines()
            return lines[0].removeprefix("listening on ") if lines else ""

        return cls(process, wait_until(announced, 20, "postcopy receive to listen"), stderr)

    def result(self, timeout: float = 120) -> dict[str, Any]:
        out, _ = self.process.communicate(timeout=timeout)
        assert self.process.returncode == 0, self.stderr.read_text()
        document: dict[str, Any] = json.loads(out)
        return document

    def failure(self, timeout: float = 60) -> tuple[int, str]:
        """Exit code and the one line that says why."""
        out, _ = self.process.communicate(timeout=timeout)
        assert out == ""
        lines = self.stderr.read_text().splitlines()[1:]
        assert len(lines) == 1, lines
        return self.process.returncode, lines[0]
