"""Stock QEMUs for the interop tests: start, migrate, save, load, look at memory, stop for sure.

    lab = Lab(directory)
    with lab:
        source = lab.start(binary, Guest(), memory_mib=64)
        source.wait_letters(3)
        source.save(path)

Binaries: `qemu-system-x86_64` of the PATH, and those that POSTCOPY_QEMU_EXTRA names, separated by
colons. Every process a lab starts dies with the test that started it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.interop.guest import Guest, has_nasm
from tests.interop.qmp import QmpClient, QmpError

HUGEPAGE = 2 << 20
COMMON_MACHINE = "pc-i440fx-5.2"
"""The oldest machine type that every QEMU from 5.2 to 11.1 has."""
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def binaries() -> list[str]:
    found = [shutil.which("qemu-system-x86_64")]
    found += os.environ.get("POSTCOPY_QEMU_EXTRA", "").split(":")
    return [path for path in found if path] if has_nasm() else []


@functools.cache
def version_of(binary: str) -> str:
    """Like `7.2`."""
    text = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=30).stdout
    match = re.search(r"version (\d+\.\d+)", text)
    assert match, f"{binary} --version says {text!r}"
    return match[1]


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def wait_until(condition: Callable[[], Any], timeout: float, what: str) -> Any:
    """The first true value of `condition`; AssertionError naming `what` after `timeout` s."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout} s for {what}")
        time.sleep(0.005)


@dataclass
class Qemu:
    """One running QEMU with a QMP client."""

    binary: str
    process: subprocess.Popen[bytes]
    directory: Path
    memory_bytes: int
    guest: Guest
    qmp: QmpClient = field(init=False)

    def __post_init__(self) -> None:
        try:
            self.qmp = QmpClient(self.directory / "qmp")
        except (OSError, ConnectionError) as error:
            self.kill()
            raise AssertionError(f"no QMP from {self.binary}: {self.errors}") from error

    # ---- what it says

    @property
    def qmp_path(self) -> Path:
        """A second QMP socket, free for the program under test."""
        return self.directory / "qmp2"

    @property
    def errors(self) -> str:
        return (self.directory / "stderr").read_text(errors="replace")

    @property
    def serial(self) -> bytes:
        path = self.directory / "serial"
        return path.read_bytes() if path.exists() else b""

    def wait_letters(self, count: int, timeout: float = 60.0) -> None:
        """Until the guest has printed `count` letters in this QEMU."""

        def enough() -> bool:
            if b"!" in self.serial:
                raise AssertionError(f"the guest found wrong memory: {self.serial!r}")
            assert self.process.poll() is None, f"QEMU ended: {self.errors}"
            return len(self.serial) - self.serial.count(b"R") >= count

        wait_until(enough, timeout, f"{count} letters (now {self.serial!r}; {self.errors})")

    # ---- migration

    def capabilities(self, **states: bool) -> None:
        """`postcopy_ram=True`; underscores stand for hyphens."""
        self.qmp.execute(
            "migrate-set-capabilities",
            capabilities=[
                {"capability": name.replace("_", "-"), "state": state}
                for name, state in states.items()
            ],
        )

    def parameters(self, **values: Any) -> None:
        self.qmp.execute(
            "migrate-set-parameters",
            **{name.replace("_", "-"): value for name, value in values.items()},
        )

    @property
    def migration(self) -> dict[str, Any]:
        return self.qmp.execute("query-migrate")

    @property
    def migration_status(self) -> str:
        return self.migration.get("status", "none")

    def wait_migration(self, *states: str, timeout: float = 60.0) -> str:
        """Until the migration is in one of these states; failing early where it has failed."""

        def reached() -> str:
            try:
                now = self.migration
            except (ConnectionError, OSError) as error:
                raise AssertionError(f"QEMU is gone: {self.errors}") from error
            status = now.get("status", "none")
            if status == "failed" and "failed" not in states:
                raise AssertionError(f"migration failed: {now.get('error-desc')}; {self.errors}")
            return status if status in states else ""

        return wait_until(reached, timeout, f"migration {states}")

    def migrate(self, uri: str, **arguments: Any) -> None:
        self.qmp.execute("migrate", uri=uri, **arguments)

    def incoming(self, uri: str) -> None:
        self.qmp.execute("migrate-incoming", uri=uri)

    def save(self, path: Path, *, uri: str | None = None) -> None:
        """Save to a file, as `migrate exec:cat>FILE` does unless `uri` says otherwise; the VM is
        stopped afterwards."""
        self.parameters(max_bandwidth=1 << 40)
        self.migrate(uri or f"exec:cat>{path}")
        self.wait_migration("completed", timeout=120)

    # ---- memory

    def stop(self) -> None:
        self.qmp.execute("stop")

    def cont(self) -> None:
        self.qmp.execute("cont")

    def memory(self) -> NDArray[np.uint8]:
        """Guest-physical memory below the 32-bit hole, shape (pages, 4096); the VM should be
        stopped."""
        size = min(self.memory_bytes, 3 << 30)
        path = self.directory / "memory"
        self.qmp.execute("pmemsave", val=0, size=size, filename=str(path))
        data = np.fromfile(path, np.uint8).reshape(-1, 4096)
        path.unlink()
        return data

    # ---- the end

    def kill(self) -> None:
        if hasattr(self, "qmp"):
            self.qmp.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)


@dataclass
class Lab:
    """Starts QEMUs in directories of their own; leaving it kills them and removes everything."""

    images: Path
    """where guest images are kept, for several labs to share"""
    running: list[Qemu] = field(default_factory=list)
    directory: Path = field(init=False)

    def __enter__(self) -> Lab:
        # Socket paths have at most 107 bytes: no deep test directories. In memory where possible:
        # guests are dumped and saved here.
        shared = Path("/dev/shm")
        parent = shared if os.access(shared, os.W_OK) else Path("/tmp")
        self.directory = Path(tempfile.mkdtemp(prefix="pc-", dir=parent))
        return self

    def __exit__(self, *_: object) -> None:
        for qemu in self.running:
            qemu.kill()
        shutil.rmtree(self.directory)

    def path(self, name: str) -> Path:
        return self.directory / name

    def start(
        self,
        binary: str,
        guest: Guest | None = None,
        *,
        memory_mib: int = 64,
        machine: str = COMMON_MACHINE,
        incoming: str | None = None,
        hugepages: bool = False,
        paused: bool = False,
        extra: Sequence[str] = (),
    ) -> Qemu:
        """One QEMU. `incoming` is "defer" or an address; `paused` keeps the VM stopped (-S)."""
        guest = guest or Guest()
        directory = self.directory / f"q{len(self.running)}"
        directory.mkdir()
        command = self.command(binary, guest, memory_mib, machine, hugepages)
        for name in ("qmp", "qmp2"):
            command += ["-qmp", f"unix:{directory / name},server=on,wait=off"]
        command += ["-serial", f"file:{directory / 'serial'}", *extra]
        if incoming is not None:
            command += ["-incoming", incoming]
        if paused:
            command += ["-S"]
        with open(directory / "stderr", "wb") as stderr:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                preexec_fn=_die_with_parent,
            )
        qemu = Qemu(binary, process, directory, memory_mib << 20, guest)
        self.running.append(qemu)
        return qemu

    def command(
        self, binary: str, guest: Guest, memory_mib: int, machine: str, hugepages: bool = False
    ) -> list[str]:
        """The command line of such a VM, without its sockets and serial port."""
        image = guest.build(self.images)
        if hugepages:
            machine += ",memory-backend=m0"
        command = [binary, "-accel", "tcg", "-machine", machine, "-m", f"{memory_mib}M"]
        if hugepages:
            backend = f"memory-backend-memfd,id=m0,size={memory_mib}M,hugetlb=on,hugetlbsize=2M"
            command += ["-object", backend + ",share=on"]
        command += ["-nodefaults", "-display", "none", "-boot", "order=a,menu=off"]
        return [*command, "-drive", f"if=floppy,format=raw,readonly=on,file={image}"]


@dataclass
class ReservedHugepages:
    """Reserves 2 MiB pages while it is open; `available` says whether the kernel gave them."""

    count: int
    _added: int = 0
    _directory = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")

    def __enter__(self) -> ReservedHugepages:
        self._added = max(0, self.count - self._number("free_hugepages"))
        self._add(self._added)
        return self

    @property
    def available(self) -> bool:
        return self._number("free_hugepages") >= self.count

    def __exit__(self, *_: object) -> None:
        self._add(-self._added)

    def _number(self, name: str) -> int:
        return int((self._directory / name).read_text())

    def _add(self, pages: int) -> None:
        path = self._directory / "nr_hugepages"
        if pages and os.access(path, os.W_OK):
            path.write_text(str(max(0, self._number("nr_hugepages") + pages)))


__all__ = [
    "COMMON_MACHINE",
    "HUGEPAGE",
    "Lab",
    "Qemu",
    "QmpError",
    "ReservedHugepages",
    "binaries",
    "version_of",
    "wait_until",
]
