"""`postcopy demo --qemu`: one saved VM, loaded in full and restored lazily."""

from __future__ import annotations

import contextlib
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from postcopy_proto.errors import PostcopyError
from postcopy_proto.net.demo_guest import FILL_START, filled, floppy, goes_on
from postcopy_proto.net.incoming import IncomingQemu
from postcopy_proto.net.launch import launched, stop
from postcopy_proto.net.qmp import Monitor
from postcopy_proto.net.restore import restore
from postcopy_proto.net.source_loop import SourceStatistics
from postcopy_proto.savefile import open_saved_vm

SMALLEST, LARGEST = 16 << 20, 3 << 30
"""bytes of RAM that this guest can have: its code is in the first MiB, its addresses 32 bits"""

LETTERS = 3
"""letters that the guest says before it is saved, and after it is restored"""

PATIENCE = 120.0
"""seconds that anything may take here"""

POLL_SECONDS = 0.001


class QemuDemoError(PostcopyError):
    """The demo did not show what it should."""


@dataclass(frozen=True, slots=True)
class Load:
    """One way to bring the VM back; seconds from asking for it."""

    first_output: float
    complete: float


@dataclass(frozen=True, slots=True)
class QemuDemoResult:
    """What the demo measured."""

    ram: int
    """bytes"""
    file_size: int
    index_seconds: float
    full: Load
    lazy: Load
    statistics: SourceStatistics
    compared_bytes: int

    @property
    def ratio(self) -> float:
        """How many times sooner the guest spoke."""
        return self.full.first_output / self.lazy.first_output


class _Vm:
    """A VM of the demo's, in its own QEMU: its monitor, and what its guest says."""

    def __init__(self, monitor: Monitor, serial: Path) -> None:
        self.monitor = monitor
        self._serial = serial

    @property
    def said(self) -> bytes:
        return self._serial.read_bytes() if self._serial.exists() else b""

    @property
    def speaks(self) -> bool:
        """Whether its guest has said anything; quick, to be asked again and again."""
        return self._serial.exists() and self._serial.stat().st_size > 0

    def status(self) -> str:
        answer: str = self.monitor.execute("query-migrate").get("status", "none")
        if answer == "failed":
            raise QemuDemoError("QEMU could not do its part of the demo")
        return answer

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                raise QemuDemoError(f"waited {PATIENCE:g} s for {what}")
            time.sleep(POLL_SECONDS)


class QemuDemo:
    """The demo with `ram` bytes and the given QEMU; `note` is told what is being done."""

    def __init__(self, qemu: str, ram: int, note: Callable[[str], None]) -> None:
        self._qemu = qemu
        self._ram = ram
        self._note = note

    def run(self) -> QemuDemoResult:
        """Save, load in full, restore lazily, compare.

        LaunchError, QmpError, RestoreError as they come; QemuDemoError when the guest's output or
        memory is not what it was.
        """
        with tempfile.TemporaryDirectory(prefix="postcopy-") as directory:
            self._directory = Path(directory)
            (self._directory / "floppy").write_bytes(floppy(self._ram))
            path = self._directory / "vm"
            said = self._save(path)
            self._note("loading it in full")
            full = self._load_in_full(path)
            self._note("indexing it")
            started = time.monotonic()
            open_saved_vm(path).close()
            index_seconds = time.monotonic() - started
            self._note("restoring it lazily")
            lazy, statistics = self._restore(path, said)
            return QemuDemoResult(
                self._ram,
                path.stat().st_size,
                index_seconds,
                full,
                lazy,
                statistics,
                self._ram - FILL_START,
            )

    @contextlib.contextmanager
    def _vm(self, name: str, *, incoming: bool) -> Iterator[_Vm]:
        serial = self._directory / f"{name}.serial"
        command = [self._qemu, "-machine", "pc,accel=tcg", "-m", f"{self._ram >> 20}M"]
        command += ["-nodefaults", "-display", "none", "-boot", "order=a"]
        floppy = f"if=floppy,format=raw,readonly=on,file={self._directory / 'floppy'}"
        command += ["-drive", floppy, "-serial", f"file:{serial}"]
        with (
            open(self._directory / f"{name}.log", "wb") as log,
            launched(command, incoming=incoming, log=log) as (process, monitor),
        ):
            try:
                yield _Vm(monitor, serial)
            finally:
                stop(process)

    def _save(self, path: Path) -> bytes:
        self._note(f"booting a VM whose guest fills {self._ram >> 20} MiB")
        with self._vm("source", incoming=False) as vm:
            vm.wait(lambda: len(vm.said) > LETTERS, "the guest to boot")
            self._note("saving it")
            vm.monitor.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
            vm.monitor.execute("migrate", uri=f"exec:cat > {shlex.quote(str(path))}")
            vm.wait(lambda: vm.status() == "completed", "the VM to be saved")
            return vm.said

    def _load_in_full(self, path: Path) -> Load:
        with self._vm("full", incoming=True) as vm:
            started = time.monotonic()
            vm.monitor.execute("migrate-incoming", uri=f"exec:cat {shlex.quote(str(path))}")
            vm.wait(lambda: vm.speaks, "the guest to go on")
            seconds = time.monotonic() - started
            return Load(seconds, seconds)

    def _restore(self, path: Path, said: bytes) -> tuple[Load, SourceStatistics]:
        with (
            self._vm("lazy", incoming=True) as vm,
            contextlib.closing(open_saved_vm(path)) as saved,
        ):
            spoke: list[float] = []

            def watch(statistics: SourceStatistics) -> None:
                if not spoke and vm.speaks:
                    spoke.append(time.monotonic() - statistics.started_at)

            statistics = restore(saved, None, IncomingQemu(vm.monitor), on_progress=watch)
            vm.wait(lambda: len(vm.said) >= LETTERS, "the guest to go on")
            watch(statistics)
            vm.monitor.execute("stop")
            if not goes_on(said, vm.said):
                raise QemuDemoError(f"the guest did not go on: {said!r}, then {vm.said!r}")
            self._compare(vm)
        return Load(spoke[0], statistics.seconds), statistics

    def _compare(self, vm: _Vm) -> None:
        """The restored memory against what the guest had filled it with."""
        dump = self._directory / "dump"
        size = self._ram - FILL_START
        vm.monitor.execute("pmemsave", val=FILL_START, size=size, filename=str(dump))
        if not np.array_equal(np.fromfile(dump, np.uint32), filled(size // 4)):
            raise QemuDemoError("the restored memory is not what was saved")
        dump.unlink()
