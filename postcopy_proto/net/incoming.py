"""A stock destination that is told over QMP what to do."""

from __future__ import annotations

import math
import time
from typing import Any

from postcopy_proto.errors import ErrorKind, HostUnsupportedError, RemoteProtocolError
from postcopy_proto.net.qmp import POLL_SECONDS, Monitor, QmpError
from postcopy_proto.net.transport import Address

FAILURE_SECONDS = 3.0
"""How long it may take to say why a migration broke: by then it has kept us waiting already."""


class IncomingQemu:
    """A QEMU that was started with `-incoming defer`, seen from its operator's side."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def listen(self, address: Address, *, preempt: bool = False) -> None:
        """Have it wait for us there, ready for postcopy, and with `preempt` for two connections.

        HostUnsupportedError with QEMU's reasons when its host can't do postcopy; QmpError when it
        was not started with `-incoming defer`, or knows no postcopy-preempt.
        """
        status = self._monitor.execute("query-status")["status"]
        if status != "inmigrate":
            raise QmpError(
                f"this QEMU is {status}; start it with -incoming defer for a VM to be restored"
            )
        self._set("postcopy-ram")
        if preempt:
            self._set("postcopy-preempt")
        self._monitor.execute("migrate-incoming", uri=str(address))

    def _set(self, name: str) -> None:
        capability = {"capability": name, "state": True}
        try:
            self._monitor.execute("migrate-set-capabilities", capabilities=[capability])
        except QmpError as error:
            if f"'{name}'" in str(error):
                raise QmpError(f"this QEMU has no capability {name}: {error}") from error
            if "not supported" not in str(error):
                raise
            advice = "postcopy probe says what is missing"
            raise HostUnsupportedError([f"{error}; {advice}"]) from error

    def wait(self, timeout: float | None) -> None:
        """Until its migration is completed; RemoteProtocolError with what it said otherwise."""
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        while (migration := self._migration()).get("status") != "completed":
            if migration.get("status") in ("failed", "cancelled", "postcopy-paused"):
                raise self._failed(migration)
            if time.monotonic() > deadline:
                raise RemoteProtocolError(
                    f"QEMU is {migration.get('status')} {timeout:g} s after its last page",
                    kind=ErrorKind.TIMEOUT,
                )
            time.sleep(POLL_SECONDS)

    def failure(self) -> str:
        """What QEMU says of a migration that broke, or "" when it says nothing."""
        try:
            migration = self._monitor.execute("query-migrate", within=FAILURE_SECONDS)
        except QmpError:
            return "QEMU answers no more; if it has ended, what it printed last says why"
        return str(migration.get("error-desc", ""))

    def _migration(self) -> dict[str, Any]:
        answer: dict[str, Any] = self._monitor.execute("query-migrate")
        return answer

    def _failed(self, migration: dict[str, Any]) -> RemoteProtocolError:
        return RemoteProtocolError(
            f"QEMU says {migration['status']}: {migration.get('error-desc', 'no reason given')}",
            kind=ErrorKind.REMOTE,
        )
