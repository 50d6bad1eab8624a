"""Starting the QEMU that a saved VM is restored into."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from postcopy_proto.errors import PostcopyError
from postcopy_proto.net.qmp import Monitor, QmpError

START_SECONDS = 30.0
"""How long a QEMU may take to make its QMP socket."""

STOP_SECONDS = 5.0
"""How long it may take to end when it is told to."""


class LaunchError(PostcopyError):
    """QEMU could not be started, or ended before its VM was restored."""


@contextmanager
def launched(
    command: Sequence[str],
    *,
    incoming: bool = True,
    detach: bool = False,
    log: IO[bytes] | None = None,
) -> Iterator[tuple[subprocess.Popen[bytes], Monitor]]:
    """A QEMU of this command line and a monitor of it; with `incoming` it waits for a VM.

    Input and output are ours, unless `detach` puts it out of the terminal's reach, or `log` takes
    what it says. It is ended
    when the block is left by an exception, and stays otherwise. LaunchError when it does not come
    up.
    """
    with tempfile.TemporaryDirectory(prefix="postcopy-") as directory:
        path = Path(directory) / "qmp"
        added = ["-qmp", f"unix:{path},server=on,wait=off"]
        added += ["-incoming", "defer"] if incoming else []
        try:
            # Detached, it must not hold our reader's pipe; its complaints still come through.
            nowhere = subprocess.DEVNULL if detach else None
            process = subprocess.Popen(
                [*command, *added],
                stdin=nowhere,
                stdout=log or nowhere,
                stderr=log,
                start_new_session=detach,
            )
        except OSError as error:
            raise LaunchError(f"can't start {command[0]}: {error.strerror}") from error
        try:
            with _monitor(path, process) as monitor:
                yield process, monitor
        except BaseException:
            stop(process)
            raise


def _monitor(path: Path, process: subprocess.Popen[bytes]) -> Monitor:
    _wait_for(path, process)
    try:
        return Monitor(str(path))
    except QmpError as error:
        # It may have made its socket, and then have found something wrong.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
            raise _ended_early(process) from error
        raise


def _ended_early(process: subprocess.Popen[bytes]) -> LaunchError:
    return LaunchError(f"QEMU {ended(process)} before it was ready; what it printed says why")


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not path.exists():
        if process.poll() is not None:
            raise _ended_early(process)
        if time.monotonic() > deadline:
            raise LaunchError(f"QEMU made no QMP socket within {START_SECONDS:g} s")
        time.sleep(0.002)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End it, at first kindly; nothing to do where it has ended."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def ended(process: subprocess.Popen[bytes]) -> str:
    """How it ended, for people."""
    code = process.returncode
    return f"ended with code {code}" if code >= 0 else f"was ended by signal {-code}"


@contextmanager
def terminating(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """As its parent: who ends us with SIGTERM ends it."""

    def terminate(number: int, frame: FrameType | None) -> None:
        process.terminate()

    before: Callable[[int, FrameType | None], object] | int | None
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
