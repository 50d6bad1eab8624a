"""The operator's part at a stock destination, over QMP: capabilities, migrate-incoming, the end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from postcopy_proto.errors import HostUnsupportedError, PostcopyError

T = TypeVar("T")

TIMEOUT = 30.0
"""Seconds that QEMU may take to answer one command."""

START_SECONDS = 2.0
"""Seconds to wait for the socket of a QEMU that has just been started; it makes it in a moment."""

POLL_SECONDS = 0.02
"""How often a migration's state is asked for while we wait for its end."""


class QmpError(PostcopyError):
    """QEMU refused a command, or can't be talked to; the text is QEMU's where it has one."""


class Monitor:
    """A QMP connection to one QEMU, used from ordinary code.

    QmpError when there is no QEMU at `path`, and HostUnsupportedError when the library qemu.qmp
    is not installed.
    """

    def __init__(self, path: str, *, timeout: float = TIMEOUT) -> None:
        try:
            from qemu.qmp import QMPClient
        except ImportError:
            raise HostUnsupportedError(
                ["qemu.qmp is not installed; pip install 'postcopy-proto[qmp]'"]
            ) from None
        self._timeout = timeout
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient("postcopy")
        try:
            self._run(self._connect(path), f"; is another client connected to {path}?")
        except BaseException:
            self._loop.close()
            raise

    async def _connect(self, path: str) -> None:
        from qemu.qmp import ConnectError

        deadline = time.monotonic() + min(START_SECONDS, self._timeout)
        while True:
            try:
                await self._client.connect(path)
                return
            except ConnectError as error:
                cause = error.exc
                young = isinstance(cause, (FileNotFoundError, ConnectionRefusedError))
                if not young or time.monotonic() > deadline:
                    reason = getattr(cause, "strerror", None) or str(cause).partition("\n")[0]
                    reason = reason or "it closed the connection"
                    raise QmpError(
                        f"no QMP at {path}: {reason}; a QEMU that runs with "
                        f"-qmp unix:{path},server=on,wait=off is needed"
                    ) from error
            await asyncio.sleep(0.005)

    def execute(self, command: str, *, within: float | None = None, **arguments: object) -> Any:
        """QEMU's answer; QmpError with its words when it is an error or does not come.

        `within` is how many seconds it may take, where that is less than usual.
        """
        from qemu.qmp import ExecInterruptedError, ExecuteError, StateError

        try:
            return self._run(self._client.execute(command, arguments), within=within)
        except ExecuteError as error:
            raise QmpError(f"QEMU refused {command}: {error}") from error
        except (ExecInterruptedError, StateError) as error:
            raise QmpError(f"QEMU went away during {command}") from error

    def close(self) -> None:
        """Disconnect; QEMU goes on."""
        # Whatever the library says of a connection that broke before: it is of no more use.
        with contextlib.suppress(Exception):
            self._run(self._client.disconnect())
        self._loop.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(
        self, coroutine: Coroutine[Any, Any, T], advice: str = "", *, within: float | None = None
    ) -> T:
        timeout = self._timeout if within is None else min(within, self._timeout)
        try:
            return self._loop.run_until_complete(asyncio.wait_for(coroutine, timeout))
        except TimeoutError:
            raise QmpError(f"QEMU did not answer within {timeout:g} s{advice}") from None
